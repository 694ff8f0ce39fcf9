"""ST-LLM: all video tokens into the LLM, some of them dropped in training (arXiv:2404.00308).

Global-local input for long videos, dynamic masking as real dropping, the masked modelling loss against a pass that sees
everything, and cross-entropy on the answer alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vkernels as vk
from vkernels.rearrangement import frame_mean, global_local, local_frames
from vkernels_video.model.decoder import Decoder
from vkernels_video.model.losses import cosine_alignment
from vkernels_video.model.sequence import Example, Laid, inputs, lay


class GlobalLocal(nn.Module):
    """r local frames, to each of which the mean of all frames is added after a small MLP that starts as zero."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.down_proj = nn.Linear(width, inner)
        self.up_proj = nn.Linear(inner, width)
        nn.init.zeros_(self.up_proj.weight)
        nn.init.zeros_(self.up_proj.bias)

    def forward(self, x: Tensor, r: int, impl: str) -> Tensor:
        """x [b t k c] -> [b r k c]."""
        b, t, k, c = x.shape
        if impl != "eager":
            mean = vk.rearrange(x.flatten(1, 2), frame_mean(t, k))
            assert isinstance(mean, Tensor)
            whole = self.up_proj(F.relu(self.down_proj(mean)))
            out = vk.rearrange([x.flatten(1, 2), whole], global_local(t, r, k))
            assert isinstance(out, Tensor)
            return out.view(b, r, k, c)
        chosen = local_frames(t, r, 1).index[0].tolist()
        mean = x.mean(1, keepdim=True).expand(-1, r, -1, -1)
        return x[:, chosen] + self.up_proj(F.relu(self.down_proj(mean)))


class MVMHead(nn.Module):
    """What the student's states go through before they are compared with the teacher's."""

    def __init__(self, width: int):
        super().__init__()
        self.head = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.head(x))


def mvm_loss(student: Tensor, teacher: Tensor, kind: str = "cosine") -> Tensor:
    """Masked video modelling: mean(2 - 2 cos), as the authors' code, or the squared error their paper writes."""
    if kind not in ("cosine", "mse"):
        raise ValueError(f"mvm_loss: kind must be cosine or mse, got {kind!r}")
    return cosine_alignment(student, teacher) if kind == "cosine" else F.mse_loss(student, teacher.detach())


def refuse_too_long(decoder: Decoder, longest: int) -> None:
    context = decoder.config.context
    if longest > context:
        raise ValueError(f"ST-LLM: video and text must fit the decoder's {context} positions, got {longest}")


def states(
    decoder: Decoder, examples: list[Example], video: Tensor, keep: Tensor | None, impl: str, positions: str
) -> tuple[Tensor, Laid]:
    """The decoder's final states of a batch, and where everything stands in it."""
    n = video.shape[1]
    kept = n if keep is None else keep.shape[1]
    own = keep if positions == "original" else None
    laid = lay(examples, kept, packed=impl != "eager", keep=own, uncut=n)
    refuse_too_long(decoder, int(laid.positions.max()) + 1)
    x = inputs(examples, video, keep, decoder.embed_tokens, impl, laid)
    place = laid.positions.to(x.device)
    return decoder.hidden(x, place.view(x.shape[:2]) if impl == "eager" else place, laid.lengths, impl), laid


def answer_loss(decoder: Decoder, h: Tensor, laid: Laid, impl: str) -> Tensor:
    """Cross-entropy on the tokens of the answers. Only rows that predict one are multiplied by the vocabulary;
    the plain side computes every logit in float32 and ignores most of them, as the published code does."""
    targets = laid.targets.to(h.device)
    if impl != "eager":
        rows = decoder.rows(h, laid.predicting, laid.lengths, impl)
        return F.cross_entropy(decoder.lm_head(rows).float(), targets)
    labels = torch.full((laid.width,), -100, device=h.device)
    labels[laid.predicting] = targets
    return F.cross_entropy(decoder.lm_head(h).float().flatten(0, 1), labels)


def training_losses(
    decoder: Decoder,
    mvm: MVMHead | None,
    examples: list[Example],
    video: Tensor,
    keep: Tensor | None,
    impl: str = "vkernels",
    *,
    kind: str = "cosine",
    positions: str = "compacted",
) -> dict[str, Tensor]:
    """One step on video rows [b n c] of which `keep` [b k] stay (`masking.random_keep`): {"answer", "mvm", "total"}.

    With `mvm` the batch runs a second time with all tokens and without a graph: what it makes of the kept tokens is the
    target. positions="original" gives the kept tokens the positions they had, "compacted" numbers them anew.
    """
    if positions not in ("compacted", "original"):
        raise ValueError(f"ST-LLM: positions must be compacted or original, got {positions!r}")
    if len(examples) != len(video) or not examples:
        raise ValueError(f"ST-LLM: video must hold {len(examples)} samples, got {len(video)}")
    if not any(example.answer for example in examples):
        raise ValueError("ST-LLM: examples must hold an answer to learn from, got none")
    h, laid = states(decoder, examples, video, keep, impl, positions)
    losses = {"answer": answer_loss(decoder, h, laid, impl)}
    if mvm is not None and keep is not None:
        seen = examples
        if impl != "eager":  # what stands behind the video is seen by none of its rows
            refuse_too_long(decoder, max(len(example.text) for example in examples) + video.shape[1])
            seen = [Example(example.before, [], []) for example in examples]
        with torch.no_grad():
            full, everywhere = states(decoder, seen, video, None, impl, positions)
            kept = everywhere.video.gather(1, keep.cpu()).flatten()
            teacher = decoder.rows(full, kept, everywhere.lengths, impl)
        student = mvm(decoder.rows(h, laid.video.flatten(), laid.lengths, impl))
        losses["mvm"] = mvm_loss(student, teacher, kind)
    return losses | {"total": sum(losses.values(), start=torch.zeros((), device=h.device))}
