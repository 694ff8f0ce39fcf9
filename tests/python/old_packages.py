"""Modeling files of earlier years, from their own wheels, importable beside today's packages under another name.

A wheel is downloaded once into $VKERNELS_OLD_PACKAGES (default ~/.cache/vkernels/old_packages), checked against the
hash below and imported from where it lies; nothing of it is part of this repository. What is real: the modeling and
configuration files, caches, mask and rotary utilities of that version. What stands in for the rest of the package is
below: a config that keeps its arguments, a model class that keeps its config, decorators that decorate nothing.
"""

import hashlib
import importlib
import os
import subprocess
import sys
import tempfile
import types
import zipfile
from pathlib import Path

import pytest
import torch

WHEELS = {
    "transformers==4.28.0": "359a38860ded57a97b4ad9a9889465393e9e05a5de0824863607c85298cba0cd",
    "transformers==4.31.0": "8487aab0195ce1c2a5ae189305118b9720daddbc7b688edb09ccd79e3b149f6b",
    "transformers==4.37.2": "595a8b12a1fcc4ad0ced49ce206c58e17be68c85d7aee3d7546d04a32c910d2e",
    "transformers==4.45.2": "c551b33660cfc815bae1f9f097ecfd1e65be623f13c6ee0dda372bd881460210",
    "transformers==4.48.3": "78697f990f5ef350c23b46bf86d5081ce96b49479ab180b2de7687267de8fd36",
    "llava-torch==1.2.2.post1": "94a25ba4ffd67b3f55b022e7e27c5b4175fc95e6a8c3a1f5b334dd517f128314",
    "salesforce-lavis==1.0.2": "489782efc2d98d8e878112b2758f82ac2e6c10dfcfa087db6656465c7784d49f",
}
FOLDER = Path(os.environ.get("VKERNELS_OLD_PACKAGES") or Path.home() / ".cache" / "vkernels" / "old_packages")


def wheel(requirement: str) -> Path:
    """The wheel of a pinned requirement, downloaded where it is not there yet; the test is skipped where it cannot."""
    found = FOLDER / f"{requirement.replace('==', '-')}.whl"
    if not found.exists() and (why := _downloaded(requirement, found)) is not None:
        pytest.skip(f"{requirement} cannot be downloaded here: {why}")
    digest = hashlib.sha256(found.read_bytes()).hexdigest()
    assert digest == WHEELS[requirement], f"{found} is not the wheel these tests were written for: {digest}"
    return found


_failed: list[str] = []  # why the first download failed: the others are not tried


def _downloaded(requirement: str, to: Path) -> str | None:
    """None, or why not."""
    if _failed:
        return _failed[0]
    FOLDER.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "--retries", "1"]
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        done = subprocess.run([*pip, "-d", folder, requirement], capture_output=True, text=True)
        if done.returncode == 0:
            next(Path(folder).glob("*.whl")).replace(to)  # whole or not at all: another worker may be at it
            return None
    _failed.append((done.stderr.strip().splitlines() or ["pip said nothing"])[-1])
    return _failed[0]


class PretrainedConfig:
    """Keeps what it is given."""

    def __init__(self, **given):
        defaults = dict(output_attentions=False, output_hidden_states=False, use_return_dict=True, use_cache=True)
        self.__dict__.update({**defaults, "_attn_implementation": "eager", "is_decoder": False, **given})

    def __getattr__(self, name):
        if name in ("add_cross_attention", "chunk_size_feed_forward", "rope_scaling", "problem_type"):
            return None
        raise AttributeError(name)


class PreTrainedModel(torch.nn.Module):
    """A module with a config and the few methods the modeling files call on themselves."""

    def __init__(self, config, *args, **kwargs):
        super().__init__()
        self.config = config

    def post_init(self):
        self.apply(self._init_weights)

    init_weights = post_init
    dtype = property(lambda self: next(self.parameters()).dtype)
    device = property(lambda self: next(self.parameters()).device)

    def get_head_mask(self, head_mask, layers):
        return [None] * layers

    def invert_attention_mask(self, mask):
        return (1.0 - mask[:, None, None, :].to(self.dtype)) * -10000.0


def _same(*args, **kwargs):
    return lambda thing: thing


class _Utilities(types.ModuleType):
    """`utils`: only torch is available (is_flash_attn_2_available: no), and every decorator decorates nothing."""

    def __getattr__(self, name):
        if name.startswith("is_"):
            return lambda *args: name == "is_torch_available"
        if "docstring" in name or name.startswith("deprecate"):
            return _same
        raise AttributeError(name)


class _TorchFacts(types.ModuleType):
    """`pytorch_utils`: today's torch is newer than anything those files ask for."""

    def __getattr__(self, name):
        if name == "ALL_LAYERNORM_LAYERS":
            return []
        if name.startswith("is_torch_greater"):
            return True
        raise AttributeError(name)


def _stand_ins(root: str) -> dict[str, types.ModuleType]:
    today = importlib.import_module("transformers")
    utilities, facts = _Utilities(f"{root}.utils"), _TorchFacts(f"{root}.pytorch_utils")
    utilities.logging, utilities.ModelOutput = today.utils.logging, today.utils.ModelOutput
    utilities.__path__ = []
    utilities.torch_int = int
    utilities.LossKwargs = type("LossKwargs", (), {})
    made = {"utils": utilities, "pytorch_utils": facts}
    made |= {f"utils.{part}": utilities for part in ("import_utils", "deprecation", "generic")}
    for name in ("activations", "modeling_outputs"):
        made[name] = importlib.import_module(f"transformers.{name}")
    contents = {
        "configuration_utils": dict(PretrainedConfig=PretrainedConfig),
        "modeling_utils": dict(PreTrainedModel=PreTrainedModel),
        "generation": dict(GenerationMixin=object),
        "modeling_flash_attention_utils": dict(_flash_attention_forward=None, FlashAttentionKwargs=dict),
        "processing_utils": dict(Unpack=_Anything()),
        "onnx": dict(OnnxConfig=object),
    }
    for name, names in contents.items():
        made[name] = types.ModuleType(f"{root}.{name}")
        made[name].__dict__.update(names)
    return made


class _Anything:
    """`Unpack[...]` in an annotation."""

    def __getitem__(self, item):
        return dict


def package(name: str, folder: Path | None = None) -> types.ModuleType:
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [] if folder is None else [str(folder)]
    return module


def transformers_of(version: str, *families: str) -> dict[str, types.ModuleType]:
    """The modeling files of `families` in that version, by family."""
    root = f"transformers_{version.replace('.', '_')}"
    if root not in sys.modules:
        inside = wheel(f"transformers=={version}") / "transformers"
        for name in ("", ".models", ".integrations"):
            package(root + name, inside / name.removeprefix("."))
        sys.modules.update({f"{root}.{name}": module for name, module in _stand_ins(root).items()})
    inside = wheel(f"transformers=={version}") / "transformers"
    found = {}
    for family in families:
        where = f"{root}.models.{family}"
        if where not in sys.modules:
            package(where, inside / "models" / family)
        if version >= "4.48" and "ALL_ATTENTION_FUNCTIONS" not in vars(sys.modules[f"{root}.modeling_utils"]):
            sdpa = importlib.import_module(f"{root}.integrations.sdpa_attention").sdpa_attention_forward
            sys.modules[f"{root}.modeling_utils"].ALL_ATTENTION_FUNCTIONS = {"sdpa": sdpa}
        found[family] = importlib.import_module(f"{where}.modeling_{family}")
        found[family].configuration = sys.modules[f"{where}.configuration_{family}"]
    return found


def beside(version: str, name: str) -> types.ModuleType:
    """Another module of that version (cache_utils)."""
    return importlib.import_module(f"transformers_{version.replace('.', '_')}.{name}")


def run_file(requirement: str, path: str) -> types.ModuleType:
    """One file of a wheel, run with whatever its imports mean now."""
    with zipfile.ZipFile(wheel(requirement)) as archive:
        code = archive.read(path).decode()
    module = types.ModuleType(Path(path).stem)
    exec(compile(code, path, "exec"), module.__dict__)
    return module


def lavis(path: str) -> types.ModuleType:
    """A file of BLIP-2's repository: its timm and its transformers are stand-ins and today's torch."""
    transformers_of("4.28.0")
    old, init = "transformers_4_28_0", torch.nn.init
    layers = dict(drop_path=None, to_2tuple=lambda x: (x, x), trunc_normal_=init.trunc_normal_)
    models = dict(
        PreTrainedModel=PreTrainedModel,
        apply_chunking_to_forward=lambda function, size, axis, *tensors: function(*tensors),
        find_pruneable_heads_and_indices=None,
        prune_linear_layer=None,
    )
    names = {
        "timm.models.layers": layers,
        "timm.models.registry": dict(register_model=lambda function: function),
        "lavis.common.dist_utils": dict(download_cached_file=None),
        "transformers.file_utils": dict(ModelOutput=sys.modules[f"{old}.utils"].ModelOutput),
        "transformers.activations": vars(sys.modules[f"{old}.activations"]),
        "transformers.modeling_outputs": vars(sys.modules[f"{old}.modeling_outputs"]),
        "transformers.modeling_utils": models,
        "transformers.utils": dict(logging=sys.modules[f"{old}.utils"].logging),
        "transformers.models.bert.configuration_bert": dict(BertConfig=PretrainedConfig),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, contents in names.items():
            parts = name.split(".")
            for i in range(1, len(parts)):
                above = types.ModuleType(".".join(parts[:i]))
                above.__path__ = []
                patch.setitem(sys.modules, above.__name__, above)
            module = types.ModuleType(name)
            module.__dict__.update({key: x for key, x in contents.items() if not key.startswith("__")})
            patch.setitem(sys.modules, name, module)
        return run_file("salesforce-lavis==1.0.2", path)
