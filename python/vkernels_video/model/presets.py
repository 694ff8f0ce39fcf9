"""Models by name: the papers' sizes, and small ones of the same shape that run anywhere."""

from __future__ import annotations

from dataclasses import replace

from vkernels_video.model.config import (
    BranchConfig,
    DecoderConfig,
    EncoderConfig,
    QFormerConfig,
    TrunkConfig,
    VideoLLMConfig,
)

LLAMA_7B = DecoderConfig(
    width=4096, heads=32, kv_heads=32, layers=32, mlp=11008, vocab=32000, context=2048, eps=1e-6,
    rope_scaling="none", frame_attention="causal",
)  # fmt: skip
EVA_G = TrunkConfig(
    width=1408, heads=16, layers=39, mlp=6144, projection=1024, activation="gelu", eps=1e-6, key_bias=False,
    patch_bias=True, pre_norm=False,
)  # fmt: skip
ST_LLM = VideoLLMConfig(
    EVA_G,
    replace(LLAMA_7B, vocab=32001),
    connector="qformer",
    qformer=QFormerConfig(),
    arrange="all",
    mvm=True,
    kv="none",
)
TINY_TRUNK = TrunkConfig(width=64, heads=4, layers=4, mlp=128, image=42, projection=32)
TINY_LLAMA = DecoderConfig(
    width=128, heads=4, kv_heads=2, layers=2, mlp=192, context=256, rope_scaling="none", frame_attention="causal"
)
TINY_ST_LLM = VideoLLMConfig(
    replace(TINY_TRUNK, width=72, heads=1, key_bias=False, activation="gelu", pre_norm=False),
    TINY_LLAMA,
    connector="qformer",
    qformer=QFormerConfig(source=72, width=64, heads=2, layers=3, mlp=96, queries=4, vocab=259, context=64),
    arrange="all",
    mvm=True,
    kv="none",
)

PRESETS = {
    # BT-Adapter with LLaVA: three of four branch layers reach the LLM, which reads the state before the last block.
    "bt_llava_7b": VideoLLMConfig(
        TrunkConfig(select_layer=-2), LLAMA_7B, branch=BranchConfig(), connector="linear", arrange="all", kv="none"
    ),
    "st_llm_7b_qa": replace(ST_LLM, branch=BranchConfig(layers=3, gated=False, spatial_eps=1e-5, output="frames")),
    "st_llm_7b_conversation": replace(ST_LLM, arrange="global_local"),
    "intp_video_llava_7b": VideoLLMConfig(
        EncoderConfig(width=1024, heads=16, layers=24, select_layer=-2),
        replace(LLAMA_7B, context=4096, eps=1e-5, rope_scaling="ntk"),
        kv="int2",
    ),
    # Video-LLaVA's token counts (257 per frame, 8 frames per clip) at a width that two cores can run.
    "small": VideoLLMConfig(
        EncoderConfig(width=512, heads=8, layers=6),
        DecoderConfig(width=512, heads=8, kv_heads=8, layers=4, mlp=1376),
    ),
    # Every path in a second: 3 x 3 patches, clips of four frames, grouped heads.
    "tiny": VideoLLMConfig(
        EncoderConfig(width=64, heads=4, layers=2, image=42, patch=14, frames=4),
        DecoderConfig(width=128, heads=4, kv_heads=2, layers=2, mlp=192, context=64),
        kv_group=32,
        kv_residual=32,
    ),
    # What `vkernels_video.train` teaches to answer questions about films of digits: one patch per place of the board.
    "digits": VideoLLMConfig(
        TrunkConfig(
            width=64, heads=2, layers=2, mlp=256, image=24, patch=8, projection=32, activation="gelu", pre_norm=False
        ),
        replace(TINY_LLAMA, width=64, heads=2, kv_heads=1, layers=3, mlp=192, context=1024),
        arrange="all",
        mvm=True,
        kv="none",
    ),
    "tiny_bt_llava": VideoLLMConfig(
        replace(TINY_TRUNK, select_layer=-2),
        TINY_LLAMA,
        branch=BranchConfig(layers=3, frames=8),
        connector="linear",
        arrange="all",
        kv="none",
    ),
    "tiny_st_llm_qa": replace(TINY_ST_LLM, branch=BranchConfig(layers=2, frames=8, gated=False, output="frames")),
    "tiny_st_llm_conversation": replace(TINY_ST_LLM, arrange="global_local", local_frames=4),
}
PRESETS = {name: replace(config, name=name) for name, config in PRESETS.items()}


def presets() -> list[str]:
    """Names that `VideoLLM.from_preset` takes."""
    return list(PRESETS)


def preset(name: str) -> VideoLLMConfig:
    if name not in PRESETS:
        raise ValueError(f"config: size must be one of {', '.join(PRESETS)}, got {name}")
    return PRESETS[name]
