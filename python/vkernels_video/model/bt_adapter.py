"""BT-Adapter: a temporal branch beside the last blocks of a frozen image encoder (arXiv:2309.15785).

The branch keeps one token list per video: a CLS for the whole video, then patches in patch-major order,
z [b 1 + l t c] with token 1 + patch t + frame. It reads what the trunk's last blocks produce and never writes back.

Every step is written twice over one set of weights: `_eager` as the paper's code does it (permute, repeat the CLS,
attend, average, permute back), `_vkernels` on tokens that stay where they are. The keys of the state are those of
the published checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

import vkernels as vk
from vkernels_video.model.branch_plans import fuse_rows, merge_frames, merge_video, start_rows
from vkernels_video.model.clip import Block, SelfAttention, Trunk, linear, plus
from vkernels_video.model.config import BranchConfig, TrunkConfig
from vkernels_video.model.losses import contrast, cosine_alignment


def drop_rows(rows: tuple[int, int], rate: float, training: bool, like: Tensor) -> Tensor | None:
    """DropPath's factor per row, 0 or 1 / (1 - rate); None where nothing is dropped."""
    if rate == 0.0 or not training:
        return None
    return torch.empty(rows, device=like.device).bernoulli_(1 - rate).div_(1 - rate).to(like.dtype)


class TemporalLayer(nn.Module):
    """Attention over the frames of every patch; the CLS passes by. It starts as the identity: temporal_fc is 0."""

    def __init__(self, config: TrunkConfig, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.layer_norm1 = nn.LayerNorm(config.width, config.eps)
        self.self_attn = SelfAttention(config)
        self.temporal_fc = nn.Linear(config.width, config.width)
        nn.init.zeros_(self.temporal_fc.weight)
        nn.init.zeros_(self.temporal_fc.bias)

    def forward(self, z: Tensor, t: int, frames: int, impl: str) -> Tensor:
        """z [b 1 + l t c]; `frames` of the t attend together."""
        tubes = (z.shape[1] - 1) // frames
        factor = drop_rows((z.shape[0], tubes), self.drop_path, self.training, z)
        step = self._eager if impl == "eager" else self._vkernels
        return step(z, t, frames, factor)

    def _eager(self, z: Tensor, t: int, frames: int, factor: Tensor | None) -> Tensor:
        cls, patches = z[:, :1], z[:, 1:]
        x = rearrange(patches, "b (p f) c -> (b p) f c", f=frames)
        x = self.self_attn(self.layer_norm1(x), "eager")
        if factor is not None:
            x = x * factor.view(-1, 1, 1)
        x = rearrange(self.temporal_fc(x), "(b p) f c -> b (p f) c", b=len(z))
        return torch.cat([cls, patches + x], dim=1)

    def _vkernels(self, z: Tensor, t: int, frames: int, factor: Tensor | None) -> Tensor:
        attention, fc = self.self_attn, self.temporal_fc
        grid = vk.Grid(t, 1, (z.shape[1] - 1) // t)
        x = self.layer_norm1(z)
        q, k, v, bias = attention.projected(x)
        x = vk.divided_attention(q, k, v, grid, cls=1, order="patch", frames_per_group=frames).flatten(2)
        of_token = None
        if factor is not None:
            of_token = F.pad(factor.repeat_interleave(frames, dim=1), (1, 0))[..., None]
        if x[..., 0].numel() > fc.in_features and linear(fc, attention.out_proj):
            # Nothing but a factor per row stands between the two projections: they are one.
            weight = fc.weight @ attention.out_proj.weight
            bias = fc.weight @ (attention.out_proj.bias if bias is None else bias)
            if of_token is None:
                x = F.linear(x, weight, bias + fc.bias)
            else:
                x = F.linear(x, weight, bias) * of_token + fc.bias
        else:
            x = attention.out(x, bias)
            x = fc(x if of_token is None else x * of_token)
        x[:, 0] = 0  # the CLS passes by
        return plus(x, z)


class SpatialLayer(Block):
    """Attention inside every frame with the CLS of the video at its head, whose output is the mean over the frames."""

    def __init__(self, config: TrunkConfig, drop_path: float, branch: BranchConfig):
        super().__init__(config, branch.spatial_eps)
        self.drop_path, self.drop_whole = drop_path, branch.drop_whole

    def forward(self, z: Tensor, t: int, frames: int, impl: str) -> Tensor:  # type: ignore[override]
        """z [b 1 + l t c]; frames f, f + frames, f + 2 frames ... of the t attend together."""
        factor = drop_rows((z.shape[0], frames), self.drop_path, self.training, z)
        step = self._eager if impl == "eager" or factor is not None else self._vkernels
        attended = step(self.layer_norm1(z), t, frames, factor)
        if impl == "eager":
            z = z + attended
            z = z + self.mlp(self.layer_norm2(z))
        else:
            z = plus(attended, z)
            z = self.mlp.onto(z, self.layer_norm2(z))
        whole = drop_rows((len(z), 1), self.drop_path, self.training, z) if self.drop_whole else None
        return z if whole is None else z * whole[..., None]

    def _eager(self, x: Tensor, t: int, frames: int, factor: Tensor | None) -> Tensor:
        patches = rearrange(x[:, 1:], "b (p f) c -> (b f) p c", f=frames)
        x = torch.cat([repeat(x[:, :1], "b 1 c -> (b f) 1 c", f=frames), patches], dim=1)
        x = self.self_attn(x, "eager")
        if factor is not None:
            x = x * factor.view(-1, 1, 1)
        cls = reduce(x[:, :1], "(b f) 1 c -> b 1 c", "mean", f=frames)
        return torch.cat([cls, rearrange(x[:, 1:], "(b f) p c -> b (p f) c", f=frames)], dim=1)

    def _vkernels(self, x: Tensor, t: int, frames: int, factor: Tensor | None) -> Tensor:
        # The projection behind the attention is affine: averaging before it is averaging after it.
        q, k, v, bias = self.self_attn.projected(x)
        grid = vk.Grid(t, 1, (x.shape[1] - 1) // t)
        together = t // frames
        x = vk.divided_attention(q, k, v, grid, axis="spatial", cls=1, order="patch", frames_per_group=together)
        return self.self_attn.out(x.flatten(2), bias)


class BTAdapter(Trunk):
    """A frozen trunk with a temporal branch beside its last blocks.

    Frames [b t 3 h w]. Above `branch.frames` of them, adjacent frames of the trunk's tokens are averaged in pairs.
    `branch.grouping="compat"` repeats what the published chat model does with 64 frames or fewer: it tells the layers
    half of the frames, so that the halves of the clip attend over time separately, and frames f and f + t / 2 share a
    softmax. The trunk carries no gradient and no graph.
    """

    def __init__(self, config: TrunkConfig, branch: BranchConfig):
        super().__init__(config)
        if not 0 <= config.layers - branch.layers < self.depth:
            raise ValueError(
                f"BTAdapter: layers must lie in 1..{config.layers} and reach the output, got {branch.layers}"
            )
        self.branch = branch
        width = config.width
        rates = [branch.drop_path * i / max(branch.layers - 1, 1) for i in range(branch.layers)]
        self.btadapter_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.btadapter_time_embed = nn.Embedding(branch.frames, width)
        self.btadapter_T_layers = nn.ModuleList(TemporalLayer(config, rate) for rate in rates)
        self.btadapter_S_layers = nn.ModuleList(SpatialLayer(config, rate, branch) for rate in rates)
        if branch.gated:
            self.balance1 = nn.Parameter(torch.zeros(width))
            self.balance2 = nn.Parameter(torch.zeros(width))
        if branch.pretraining:
            self.extra_proj = nn.Sequential(nn.Linear(width, config.projection), nn.LayerNorm(config.projection))

    def copy_trunk_to_branch(self) -> None:
        """The start of training: spatial layers are the trunk's last blocks."""
        for layer, block in zip(self.btadapter_S_layers, self.layers[-self.branch.layers :], strict=True):
            layer.load_state_dict(block.state_dict())

    def freeze_trunk(self) -> None:
        """Gradients for the branch alone: what is named btadapter, balance or extra_proj."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(any(part in name for part in ("btadapter", "balance", "extra_proj")))

    def forward(self, frames: Tensor, impl: str = "vkernels", keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(trunk tokens [b t 1+l c], branch tokens [b 1+k c]) after the last branch layer that is run; with
        `select_layer=-2`, as LLaVA has it, that is the last but one.

        keep:  indices [b k] of the patch-major tokens the branch keeps (`masking.tube_keep`); None keeps all
        """
        first = len(self.layers) - self.branch.layers
        with torch.no_grad():
            taps = self.taps(frames, first, self.depth, impl)
        return taps[-1], self.run_branch(taps, impl, keep)

    def run_branch(self, taps: list[Tensor], impl: str = "vkernels", keep: Tensor | None = None) -> Tensor:
        """The branch on trunk tokens [b t 1+l c] of consecutive blocks, which may come from a file."""
        t = taps[0].shape[1]
        per = 1 if t <= self.branch.frames else 2
        if t == 0 or t % per or t // per > self.branch.frames:
            raise ValueError(
                f"BTAdapter: frames must be 1 to {self.branch.frames}, or even and at most twice that, got {t}"
            )
        t //= per
        together = t
        if self.branch.grouping == "compat" and per == 1:
            if t % 2:
                raise ValueError(f"BTAdapter: frames must be even for compat grouping, got {t}")
            together = t // 2
        z = self._start(taps[0], t, per, impl, keep)
        for i, (tap, temporal, spatial) in enumerate(
            zip(taps, self.btadapter_T_layers, self.btadapter_S_layers, strict=False)
        ):
            if i > 0:
                z = self._fuse(z, tap, t, per, impl, keep)
            z = temporal(z, t, together, impl)
            z = spatial(z, t, together, impl)
        return z

    def _trunk_rows(self, x: Tensor, per: int, keep: Tensor | None) -> Tensor:
        """As the paper's code gets them: trunk tokens [b t 1+l c] -> branch order, the CLS rows averaged."""
        if per > 1:
            x = reduce(x, "b (t per) l c -> b t l c", "mean", per=per)
        patches = rearrange(x[:, :, 1:], "b t l c -> b (l t) c")
        if keep is not None:
            patches = patches.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
        return torch.cat([x[:, :, 0].mean(1, keepdim=True), patches], dim=1)

    def _start(self, x: Tensor, t: int, per: int, impl: str, keep: Tensor | None) -> Tensor:
        positions, times = self.position_embedding.weight.detach(), self.btadapter_time_embed.weight
        if impl != "eager":
            plan = start_rows(t, x.shape[2] - 1, len(times), keep, per=per)
            out = vk.rearrange([x.flatten(1, 2), positions, times, self.btadapter_cls_token[0]], plan)
            assert isinstance(out, Tensor)
            return out
        z = self._trunk_rows(x, per, keep)
        table = rearrange(positions[1:, None] + times[None, :t], "l t c -> 1 (l t) c").expand(len(x), -1, -1)
        if keep is not None:
            table = table.gather(1, keep[..., None].expand(-1, -1, table.shape[-1]))
        cls = (z[:, :1] + self.btadapter_cls_token + positions[0]) / 2
        return torch.cat([cls, z[:, 1:] + table], dim=1)

    def _fuse(self, z: Tensor, x: Tensor, t: int, per: int, impl: str, keep: Tensor | None) -> Tensor:
        share = torch.sigmoid(self.balance2 * self.branch.gate_factor) if self.branch.gated else None
        if impl != "eager":
            plan = fuse_rows(t, x.shape[2] - 1, keep, per=per)
            old = z if share is None else (1 - share) * z
            out = vk.rearrange(x.flatten(1, 2), plan, gate=share, residual=old)
            assert isinstance(out, Tensor)
            return out
        fresh = self._trunk_rows(x, per, keep)
        return z + fresh if share is None else (1 - share) * z + share * fresh

    def video_features(self, x: Tensor, z: Tensor) -> Tensor:
        """Retrieval and zero-shot classification: trunk and branch CLS of every frame, projected, then averaged."""
        trunk, branch = x[:, :, 0], z[:, :1]
        if self.branch.gated:
            share = torch.sigmoid(self.balance1 * self.branch.output_factor)
            fused = (1 - share) * branch + share * trunk
        else:
            fused = trunk + branch
        return self.visual_projection(self.post_layernorm(fused)).mean(1)

    def pretraining_losses(self, x: Tensor, z: Tensor, text: Tensor, keep: Tensor | None) -> dict[str, Tensor]:
        """Video-text contrast, branch-text contrast, alignment of what the branch kept with the trunk, and their sum.

        text: features of the captions [b projection]; `keep` as given to `forward`
        """
        if not self.branch.pretraining:
            raise ValueError("BTAdapter: pretraining_losses must have branch.pretraining=True, got False")
        patches = z[:, 1:]
        losses = {
            "video_text": contrast(self.video_features(x, z), text),
            "branch_text": contrast(self.visual_projection(patches).mean(1), text),
            "alignment": cosine_alignment(self.extra_proj(patches), self._teacher(x, patches, keep)),
        }
        total = losses["video_text"] + 0.1 * losses["branch_text"] + 0.1 * losses["alignment"]
        return losses | {"total": total}

    @torch.no_grad()
    def _teacher(self, x: Tensor, patches: Tensor, keep: Tensor | None) -> Tensor:
        """The trunk's features of the patches the branch kept [b k projection]."""
        per = 1 if x.shape[1] <= self.branch.frames else 2
        rows = self._trunk_rows(x, per, keep)[:, 1:]
        return self.visual_projection(self.post_layernorm(rows))

    def chat_tokens(self, x: Tensor, z: Tensor, impl: str = "vkernels") -> Tensor:
        """LLaVA's input [b l+1 c]: means over time of trunk and branch, averaged; the patches, then the CLS."""
        t_trunk, l = x.shape[1], x.shape[2] - 1  # noqa: E741
        t = (z.shape[1] - 1) // l
        if impl != "eager":
            plan = merge_video(t, l, t_trunk // t)
            out = vk.rearrange([x.flatten(1, 2), z], plan)
            assert isinstance(out, Tensor)
            return out
        branch = torch.cat([z[:, :1], reduce(z[:, 1:], "b (l t) c -> b l c", "mean", t=t)], dim=1)
        both = (x.mean(1) + branch) / 2
        return torch.cat([both[:, 1:], both[:, :1]], dim=1)

    def frame_tokens(self, x: Tensor, z: Tensor, impl: str = "vkernels") -> Tensor:
        """ST-LLM's input [b t 1+l c]: trunk and branch averaged frame by frame."""
        b, t, tokens, c = x.shape
        if impl != "eager":
            out = vk.rearrange([x.flatten(1, 2), z], merge_frames(t, tokens - 1))
            assert isinstance(out, Tensor)
            return out.view(b, t, tokens, c)
        patches = rearrange(z[:, 1:], "b (l t) c -> b t l c", t=t)
        return (x + torch.cat([repeat(z[:, :1], "b 1 c -> b t 1 c", t=t), patches], dim=2)) / 2
