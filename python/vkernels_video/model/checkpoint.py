"""Weights from other people's files, by an audited map of names.

Every tensor of a checkpoint is mapped, or on its source's list of what this model has no use for; everything else is
refused by name. A checkpoint that loads in silence and leaves a module random is how published results got lost.

Files are untrusted: safetensors, or torch archives read with `weights_only=True`; no code of a checkpoint runs.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vkernels_video.model.layouts import SOURCES, CheckpointError, Source, State

log = logging.getLogger("vkernels_video")
CONFIG_FILE = "vkernels_video.json"
POSITIONS, TABLE, HEAD = "encoder.position_embedding.weight", "decoder.embed_tokens.weight", "decoder.lm_head.weight"


def save(folder: str | Path, config: dict[str, Any], state: State) -> None:
    """Weights as (sharded) safetensors and the config beside them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    save_torch_state_dict(dict(state), folder)


def saved_config(folder: Path, kind: type) -> Any:
    """The config that `save` put beside the weights, as one of `kind`."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"checkpoint: {folder} must hold {CONFIG_FILE}, or config must be given, got neither")
    try:
        return kind.from_dict(json.loads(file.read_text()))  # type: ignore[attr-defined]
    except ValueError as error:
        raise CheckpointError(f"checkpoint: {file} cannot be used: {error}") from error


def local(path: str | Path) -> Path:
    """A path as it is; a name that is none is fetched from the Hugging Face hub."""
    if Path(path).exists() or not isinstance(path, str) or path.count("/") != 1 or path.startswith((".", "/", "~")):
        return Path(path)
    return Path(
        snapshot_download(path, allow_patterns=["*.safetensors", "*.bin", "*.pth", "*.json", "*.model", "*.txt"])
    )


def read(path: str | Path) -> State:
    """All tensors of a file, or of the (sharded) checkpoint in a folder."""
    path = Path(path)
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise CheckpointError(f"checkpoint: path must be a file or a folder, got {path}")
    for index in sorted(path.glob("*.index.json")):
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"checkpoint: {index} must be an index of shards, got {error!r}") from error
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise CheckpointError(f"checkpoint: {index} must name files beside it, got {names}")
        return _all(path / name for name in names)
    for pattern in ("*.safetensors", "pytorch_model*.bin", "*.pth", "*.bin"):
        if files := sorted(path.glob(pattern)):
            return _all(files)
    raise CheckpointError(f"checkpoint: {path} must hold .safetensors, .bin or .pth files, got none")


def _all(files: Iterable[Path]) -> State:
    state: State = {}
    for file in files:
        more = _file(file)
        if twice := state.keys() & more.keys():
            raise CheckpointError(
                f"checkpoint: {file} must not repeat tensors of other shards, got {sorted(twice)[:3]}"
            )
        state |= more
    return state


def _file(path: Path) -> State:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"checkpoint: {path} cannot be read: {why}") from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise CheckpointError(f"checkpoint: {path} must hold a dictionary of tensors, got {type(found).__name__}")
    return {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}


def recognise(state: State, among: Sequence[Source] = SOURCES) -> Source:
    """Whose layout this is."""
    for source in among:
        if all(any(re.search(sign, name) for name in state) for sign in source.signs):
            return source
    known = ", ".join(source.name for source in among)
    raise CheckpointError(f"checkpoint: names must be those of {known}, got {sorted(state)[:3]} ...")


def translate(state: State, source: Source) -> tuple[State, list[str]]:
    """The tensors under this model's names, and the names of those its source has but this model does not use."""
    made: State = {}
    unused = []
    for name, tensor in state.items():
        new = name
        for pattern, replacement in source.renames:
            new = re.sub(pattern, replacement, new)
        if any(re.search(pattern, each) for pattern in source.unused for each in (name, new)):
            unused.append(name)
        elif new in made:
            raise CheckpointError(f"checkpoint: every name must have a place of its own, got {name} a second for {new}")
        else:
            made[new] = tensor
    return source.reshape(made), unused


def gather(model: torch.nn.Module, paths: Sequence[Path]) -> tuple[State, str]:
    """The tensors of several checkpoints under this model's names, and whose they are. Of two that are one, that of the
    tuned model counts, not its base's."""
    own, state, givers, names = model.state_dict(), State(), dict[str, Source](), []
    for path in paths:
        found = read(path)
        source = recognise(found)
        fresh, unused = translate(found, source)
        log.info("%s: %d tensors of %s have no use here", path, len(unused), source.name)
        if source.resizes and POSITIONS in fresh and POSITIONS in own:
            fresh[POSITIONS] = resized(fresh[POSITIONS], len(own[POSITIONS]))
        twice = sorted(state.keys() & fresh.keys())
        for name in twice:
            if source.wins(name) == givers[name].wins(name):
                raise CheckpointError(f"checkpoint: {path} must not give {name} a second time, got it twice")
            loser = fresh if givers[name].wins(name) else state
            del loser[name]
        if twice:
            log.info("%s: of tensors given twice the tuned model's count: %s", path, few(twice))
        state |= fresh
        givers |= dict.fromkeys(fresh, source)
        names.append(source.name)
    if TABLE in state and HEAD in state and givers[TABLE] is not givers[HEAD]:
        state[HEAD] = _with_rows(state[HEAD], len(state[TABLE]))
    return state, " + ".join(names)


def _with_rows(head: Tensor, rows: int) -> Tensor:
    """A base's output map beside a tuned table that has more tokens: those are read, never said."""
    more = rows - len(head)
    if more <= 0:
        return head
    log.warning("checkpoint: %d tokens of the tuned table have no row in the base's lm_head: zeros", more)
    return F.pad(head, (0, 0, 0, more))


def resized(table: Tensor, rows: int) -> Tensor:
    """Positions [1 + g g c] of a CLS and a grid of patches, for `rows` of them: bicubic, the CLS as it is."""
    old, new = (math.isqrt(count - 1) for count in (len(table), rows))
    if old == new or old * old + 1 != len(table) or new * new + 1 != rows:
        return table
    log.info("checkpoint: positions of %d x %d patches resized to %d x %d", old, old, new, new)
    grid = table[1:].float().T.unflatten(1, (old, old))[None]  # 1 c g g
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)[0]
    return torch.cat([table[:1], grid.flatten(1).T.to(table.dtype)])


def load(model: torch.nn.Module, state: State, source: str, allow_missing: Sequence[str] = ()) -> list[str]:
    """Put every tensor where it belongs, or none at all. Returns what stayed as it was (patterns `allow_missing`)."""
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    allowed = [name for name in missing if any(re.search(pattern, name) for pattern in allow_missing)]
    wrong = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    problems = {
        "missing": sorted(set(missing) - set(allowed)),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": wrong,
    }
    if any(problems.values()):
        said = "; ".join(f"{len(names)} {kind}: {few(names)}" for kind, names in problems.items() if names)
        raise CheckpointError(f"checkpoint: a {source} checkpoint must fit the model, got {said}")
    model.load_state_dict({**{name: own[name] for name in allowed}, **state})
    return allowed


def few(names: list[str], most: int = 6) -> str:
    """The first names of a list, and how many follow."""
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")
