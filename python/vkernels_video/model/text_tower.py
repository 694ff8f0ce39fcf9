"""CLIP's text tower: what BT-Adapter's branch is contrasted with while it learns. It is frozen.

The keys of its state are those of transformers' CLIPTextModelWithProjection without their first word.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from vkernels_video.model import checkpoint, layouts
from vkernels_video.model.bt_adapter import BTAdapter
from vkernels_video.model.clip import Block
from vkernels_video.model.config import BranchConfig, TextTowerConfig, TrunkConfig


class Embeddings(nn.Module):
    def __init__(self, config: TextTowerConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)


class Encoder(nn.Module):
    def __init__(self, config: TextTowerConfig):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))


class TextTower(nn.Module):
    """Token ids [b s] -> features [b projection]: the state at the end mark, normalised and projected."""

    def __init__(self, config: TextTowerConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width, config.eps)
        self.text_projection = nn.Linear(config.width, config.projection, bias=False)
        self.requires_grad_(False)

    def forward(self, ids: Tensor, impl: str = "vkernels") -> Tensor:
        """The first end mark of each row counts; what follows it is padding that no token before it sees."""
        if ids.dim() != 2 or not 1 <= ids.shape[1] <= self.config.context:
            context = self.config.context
            raise ValueError(f"TextTower: ids must be (b s) with s in 1..{context}, got {tuple(ids.shape)}")
        ends = ids == self.config.end
        if not bool(ends.any(1).all()):
            raise ValueError(f"TextTower: every text must hold its end mark {self.config.end}, got {ids.tolist()}")
        x = self.embeddings.token_embedding(ids) + self.embeddings.position_embedding.weight[: ids.shape[1]]
        for block in self.encoder.layers:
            x = block(x, impl, causal=True)
        last = x[torch.arange(len(ids), device=ids.device), ends.int().argmax(1)]
        return self.text_projection(self.final_layer_norm(last))

    def load(self, path: str | Path) -> None:
        """The text side of a CLIP checkpoint; every tensor of it is found, or CheckpointError says which is not."""
        state, _ = checkpoint.translate(checkpoint.read(path), layouts.CLIP_TEXT)
        checkpoint.load(self, state, layouts.CLIP_TEXT.name)


class Pretraining(nn.Module):
    """BT-Adapter while it learns from pairs of videos and captions: branch and trunk, and the frozen text tower."""

    def __init__(self, trunk: TrunkConfig, branch: BranchConfig, text: TextTowerConfig):
        super().__init__()
        if text.projection != trunk.projection:
            rule = f"be the trunk's {trunk.projection}"
            raise ValueError(f"Pretraining: text.projection must {rule}, got {text.projection}")
        self.video, self.text = BTAdapter(trunk, branch), TextTower(text)
        self.video.freeze_trunk()

    def forward(self, frames: Tensor, ids: Tensor, keep: Tensor | None, impl: str = "vkernels") -> dict[str, Tensor]:
        """Losses of videos [b t 3 h w] and their captions [b s]; `keep` is what the branch sees (`tube_keep`)."""
        with torch.no_grad():
            text = self.text(ids, impl)
        x, z = self.video(frames, impl, keep)
        return self.video.pretraining_losses(x, z, text, keep)
