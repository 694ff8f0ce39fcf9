"""VideoLLM: a language model reasons over units of video, and a linear head answers (arXiv:2305.13292).

Eight tasks in four families. Only final states are supervised; no head has more than the paper gives it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vkernels as vk
from vkernels.rearrangement import csr
from vkernels_video.model import checkpoint
from vkernels_video.model.config import IMPLS, TaskConfig
from vkernels_video.model.presets import task_preset
from vkernels_video.model.reasoner import Reasoner, Stream

FAMILIES = {
    "online_action_detection": "online",
    "online_captioning": "caption",
    "action_anticipation": "future",
    "long_term_anticipation": "future",
    "moment_query": "retrieval",
    "natural_language_query": "retrieval",
    "action_segmentation": "dense",
    "highlight_detection": "highlight",
}
TUNING = ("all", "basic", "bias", "first_block", "last_block", "prompt", "prefix", "lora")


class Translator(nn.Module):
    """Units of features [b N d] or [b N u d] -> embeddings [b N c]: pooled over a unit's cells, one linear map."""

    def __init__(self, source: int, width: int, pool: str):
        super().__init__()
        self.pool = pool
        self.linear = nn.Linear(source, width)

    def forward(self, x: Tensor, impl: str) -> Tensor:
        if x.dim() == 4:
            units, cells = x.shape[1:3]
            if impl != "eager":
                reduce = "max" if self.pool == "max" else "sum"
                weight = None if self.pool == "max" else torch.full((units * cells,), 1.0 / cells)
                rows = torch.arange(units * cells)
                plan = csr("units", torch.arange(units + 1) * cells, rows, weight, (units * cells,), reduce=reduce)
                pooled = vk.rearrange(x.flatten(1, 2), plan)
                assert isinstance(pooled, Tensor)
                x = pooled
            else:
                x = x.amax(2) if self.pool == "max" else x.mean(2)
        return self.linear(x)


class ManyNorms(nn.Module):
    """One state as several: a LayerNorm of its own for each."""

    def __init__(self, width: int, count: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(count, width))
        self.bias = nn.Parameter(torch.zeros(count, width))

    def forward(self, x: Tensor) -> Tensor:
        """[.. c] -> [.. count c]. The statistics are those of x, computed once."""
        normed = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return normed[..., None, :] * self.weight + self.bias

    def into(self, x: Tensor, linear: nn.Linear, impl: str) -> Tensor:
        """`linear` of each: [.. count out]. One product with the scales folded in, instead of `count` copies of x."""
        if impl == "eager":
            return linear(self(x))
        normed = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        weight = linear.weight * self.weight[:, None]  # count out c
        bias = self.bias @ linear.weight.T + linear.bias
        return F.linear(normed, weight.flatten(0, 1), bias.flatten()).unflatten(-1, bias.shape)


@dataclass(frozen=True)
class Segments:
    """What a memory retrieval should find in one video: classes [k] and spans [k 2] (start, end) in 0..1."""

    classes: Tensor
    spans: Tensor


class TaskModel(nn.Module):
    """Translator, reasoner and the head of one task.

    `forward` takes features [b N d] or [b N u d] and, for language queries, token ids [b s] that follow the video.
    """

    def __init__(self, config: TaskConfig):
        super().__init__()
        if config.task not in FAMILIES:
            raise ValueError(f"TaskModel: task must be one of {', '.join(FAMILIES)}, got {config.task!r}")
        self.config, self.family = config, FAMILIES[config.task]
        width, eps = config.reasoner.width, config.reasoner.eps
        self.translator = Translator(config.features, width, config.pool)
        self.reasoner = Reasoner(config.reasoner)
        if self.family == "online":
            self.now, self.next = nn.Linear(width, config.classes), nn.Linear(width, config.classes)
        elif self.family == "caption":
            if config.generator is None:
                raise ValueError("TaskModel: generator must be given for online_captioning, got None")
            self.generator = Reasoner(config.generator)
            self.condition = nn.Linear(width, config.generator.width)
            self.vocabulary = nn.Linear(config.generator.width, config.generator.vocab, bias=False)
        elif self.family == "future":
            self.norms = ManyNorms(width, config.steps, eps)
            self.classify = nn.Linear(width, config.classes)
        elif self.family == "retrieval":
            self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
            self.norms = ManyNorms(width, config.steps, eps)
            self.name = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.classes + 1))
            self.locate = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        else:
            self.classify = nn.Linear(width, config.classes if self.family == "dense" else 1)

    @classmethod
    def from_preset(cls, name: str, seed: int = 0, **changes: Any) -> TaskModel:
        """A preset with seeded random weights; `changes` are fields of its config, `task` and `classes` say.
        `model.reasoner.load(folder)` then reads a checkpoint of its language model."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return cls(replace(task_preset(name), **changes))

    @classmethod
    def from_pretrained(cls, path: str | Path, *, config: TaskConfig | str | None = None) -> TaskModel:
        """What `save_pretrained` wrote, from its folder or file, or by its name on the Hugging Face hub.

        config: of the model, or a preset's name; None reads the folder's own
        Every tensor must fit, or CheckpointError says which do not.
        """
        folder = checkpoint.local(path)
        if config is None:
            config = checkpoint.saved_config(folder, TaskConfig)
        model = cls(task_preset(config) if isinstance(config, str) else config)
        checkpoint.load(model, checkpoint.read(folder), cls.__name__)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Weights as (sharded) safetensors and the config beside them."""
        checkpoint.save(folder, self.config.to_dict(), self.state_dict())

    def states(self, features: Tensor, text: Tensor | None = None, impl: str = "vkernels") -> Tensor:
        """Final states of the units, of the text after them, and of the query at the end where the task has one."""
        if impl not in IMPLS:
            raise ValueError(f"TaskModel: impl must be one of {', '.join(IMPLS)}, got {impl!r}")
        if features.dim() not in (3, 4) or features.shape[1] == 0:
            raise ValueError(f"TaskModel: features must have shape (b N d) or (b N u d), got {tuple(features.shape)}")
        parts = [self.translator(features, impl)]
        if text is not None:
            parts.append(self.reasoner.embed_tokens(text))
        if self.family == "retrieval":
            parts.append(self.query.expand(len(features), -1, -1))
        return self.reasoner(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], impl)

    def forward(
        self, features: Tensor, text: Tensor | None = None, captions: Tensor | None = None, impl: str = "vkernels"
    ) -> dict[str, Tensor]:
        h = self.states(features, text, impl)
        units = features.shape[1]
        if self.family == "online":
            return {"now": self.now(h[:, :units]), "next": self.next(h[:, :units])}
        if self.family == "caption":
            if captions is None:
                raise ValueError("TaskModel: captions must be given for online_captioning, got None")
            return {"caption": self._captions(h[:, :units], captions, impl)}
        if self.family == "future":
            return {"future": self.norms.into(h[:, :units], self.classify, impl)}
        if self.family == "retrieval":
            slots = self.norms(h[:, -1])
            middle, length = self.locate(slots).sigmoid().unbind(-1)
            spans = torch.stack([middle - length / 2, middle + length / 2], dim=-1)
            return {"classes": self.name(slots), "spans": spans}
        out = self.classify(h[:, :units])
        return {"dense": out} if self.family == "dense" else {"saliency": out[..., 0]}

    def _captions(self, h: Tensor, captions: Tensor, impl: str) -> Tensor:
        """Logits [b N s vocab] of captions [b N s], each told by the state of its unit."""
        words = self.generator.embed_tokens(captions[..., :-1].flatten(0, 1))
        x = torch.cat([self.condition(h).flatten(0, 1)[:, None], words], dim=1)
        return self.vocabulary(self.generator(x, impl)).unflatten(0, captions.shape[:2])

    @torch.inference_mode()
    def caption(self, states: Tensor, tokens: int, end: int | None = None, impl: str = "vkernels") -> Tensor:
        """Greedy captions [b N tokens] of units by their states [b N c]: those of `states` for a video, or what a
        `Stream` over the reasoner gives for one unit as it comes. Behind the token `end` a caption repeats it.

        A word costs one step against the generator's cache; it is the one that recomputation of the caption so far
        gives, and no caption depends on another.
        """
        if self.family != "caption":
            raise ValueError(f"TaskModel: task must be online_captioning for captions, got {self.config.task!r}")
        if states.dim() != 3 or states.shape[-1] != self.config.reasoner.width:
            shape = f"(b N {self.config.reasoner.width})"
            raise ValueError(f"TaskModel: states must have shape {shape}, got {tuple(states.shape)}")
        if tokens < 1:
            raise ValueError(f"TaskModel: tokens must be at least 1, got {tokens}")
        length = self.generator.config.prompt + tokens
        stream = Stream(self.generator, states[..., 0].numel(), length, impl)
        x = self.condition(states).flatten(0, 1)[:, None]
        words: list[Tensor] = []
        for _ in range(tokens):
            word = self.vocabulary(stream.step(x)).argmax(-1)
            if end is not None and words:
                word = torch.where(words[-1] == end, end, word)
            words.append(word)
            x = self.generator.embed_tokens(word)
        return torch.cat(words, dim=1).unflatten(0, states.shape[:2])

    def loss(self, outputs: dict[str, Tensor], targets: Tensor | list[Segments]) -> Tensor:
        """What the family is trained with. targets: labels [b N] (-100: none), captions [b N s], saliencies [b N], or
        Segments per video."""
        if self.family == "retrieval":
            assert isinstance(targets, list)
            return retrieval_loss(outputs["classes"], outputs["spans"], targets)
        assert isinstance(targets, Tensor)
        if self.family == "online":
            later = F.pad(targets[:, 1:], (0, 1), value=-100)
            return _entropy(outputs["now"], targets) + _entropy(outputs["next"], later)
        if self.family == "caption":
            return _entropy(outputs["caption"], targets)
        if self.family == "future":
            steps = range(1, outputs["future"].shape[2] + 1)
            ahead = [F.pad(targets[:, f:], (0, min(f, targets.shape[1])), value=-100) for f in steps]
            return _entropy(outputs["future"], torch.stack(ahead, dim=-1))
        if self.family == "dense":
            return _entropy(outputs["dense"], targets)
        return F.mse_loss(outputs["saliency"].sigmoid(), targets)


def _entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over the labels that are there; 0 where none is."""
    total = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100, reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


def span_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(IoU, generalised IoU) [k m] of spans a [k 2] and b [m 2]."""
    start, end = torch.maximum(a[:, None, 0], b[None, :, 0]), torch.minimum(a[:, None, 1], b[None, :, 1])
    both = (end - start).clamp(min=0)
    union = (a[:, 1] - a[:, 0])[:, None] + (b[:, 1] - b[:, 0])[None] - both
    hull = torch.maximum(a[:, None, 1], b[None, :, 1]) - torch.minimum(a[:, None, 0], b[None, :, 0])
    iou = both / union.clamp(min=1e-8)
    return iou, iou - (hull - union) / hull.clamp(min=1e-8)


def retrieval_loss(classes: Tensor, spans: Tensor, targets: list[Segments]) -> Tensor:
    """Slots are matched to targets (Hungarian, scipy's); then class, distance and overlap. The last class is "nothing".

    classes [b m C + 1], spans [b m 2]. Refuses more targets than slots.
    """
    from scipy.optimize import linear_sum_assignment  # half of what importing this module would otherwise take

    total = classes.new_zeros(())
    for logits, found, target in zip(classes, spans, targets, strict=True):
        k, m = len(target.classes), len(found)
        if k > m:
            raise ValueError(f"retrieval_loss: targets must fit the {m} slots, got {k}")
        cost = (
            -logits.softmax(-1)[:, target.classes]
            + torch.cdist(found, target.spans, p=1)
            - span_iou(found, target.spans)[1]
        )
        slots, which = linear_sum_assignment(cost.detach().cpu().numpy())
        labels = torch.full((m,), logits.shape[-1] - 1, device=logits.device)
        labels[slots] = target.classes[which]
        total = total + F.cross_entropy(logits, labels)
        if k:
            mine, theirs = found[slots], target.spans[which]
            overlap = span_iou(mine, theirs)[1].diagonal()
            total = total + F.l1_loss(mine, theirs) + (1 - overlap).mean()
    return total / max(len(targets), 1)


def tune(model: TaskModel, scheme: str, rank: int = 8) -> list[str]:
    """Freeze what a tuning scheme leaves alone; translator and head are always trained. Returns the trained names.

    basic: nothing of the reasoner. bias: its biases. first_block, last_block: that block. prompt, prefix: its virtual
    embeddings or learned keys and values (the config must have them). lora: q and v by the PEFT library. all: all.
    """
    if scheme not in TUNING:
        raise ValueError(f"tune: scheme must be one of {', '.join(TUNING)}, got {scheme!r}")
    config = model.config.reasoner
    if scheme in ("prompt", "prefix") and not getattr(config, scheme):
        raise ValueError(f"tune: the reasoner must have a {scheme} for this scheme, got {scheme}=0")
    if scheme == "lora":
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ImportError("tune: lora needs the PEFT library (pip install peft)") from error
        inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"]), model.reasoner
        )
    last = config.layers - 1
    chosen = {
        "all": "", "basic": None, "bias": ".bias", "first_block": "reasoner.layers.0.",
        "last_block": f"reasoner.layers.{last}.", "prompt": "reasoner.prompt", "prefix": ".prefix", "lora": "lora_",
    }[scheme]  # fmt: skip
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("reasoner.") or (chosen is not None and chosen in name))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
