"""From encoder features to rows of the decoder's width."""

from __future__ import annotations

from torch import Tensor, nn

from vkernels_video.model.config import QFormerConfig, VideoLLMConfig
from vkernels_video.model.qformer import QFormer


class Projector(nn.Sequential):
    """LLaVA's mlp2x_gelu."""

    def __init__(self, source: int, width: int):
        super().__init__(nn.Linear(source, width), nn.GELU(), nn.Linear(width, width))


class QFormerConnector(nn.Module):
    """InstructBLIP's: LayerNorm, queries that read each frame, a linear map."""

    def __init__(self, config: QFormerConfig, width: int):
        super().__init__()
        self.ln_vision = nn.LayerNorm(config.source)
        self.qformer = QFormer(config)
        self.llama_proj = nn.Linear(config.width, width)

    def forward(self, x: Tensor, text: Tensor | None, shown: Tensor | None, impl: str) -> Tensor:
        """x [b t l c] -> [b t queries width]; text [b s] are the questions, `shown` [b s] is False at padding."""
        tokens = self.qformer(self.ln_vision(x).flatten(0, 1), text, shown, impl)
        return self.llama_proj(tokens).unflatten(0, x.shape[:2])


def build(config: VideoLLMConfig) -> nn.Module:
    source, width = config.encoder.width, config.decoder.width
    if config.qformer is not None:
        return QFormerConnector(config.qformer, width)
    return nn.Linear(source, width) if config.connector == "linear" else Projector(source, width)
