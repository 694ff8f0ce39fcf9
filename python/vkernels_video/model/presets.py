"""Models by name: the papers' sizes, and small ones of the same shape that run anywhere."""

from __future__ import annotations

from dataclasses import replace

from vkernels_video.model.config import (
    BranchConfig,
    DecoderConfig,
    EncoderConfig,
    QFormerConfig,
    ReasonerConfig,
    T5Config,
    TaskConfig,
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
    template="{video}###Human: {question} ###Assistant: ",
    begin=False,
    tokenizer="checkpoint",
)
TINY_TRUNK = TrunkConfig(width=64, heads=4, layers=4, mlp=128, image=42, projection=32)
TINY_LLAMA = DecoderConfig(
    width=128, heads=4, kv_heads=2, layers=2, mlp=192, context=256, rope_scaling="none", frame_attention="causal"
)
# Every path in a second: 3 x 3 patches, clips of four frames, grouped heads.
TINY = VideoLLMConfig(
    EncoderConfig(width=64, heads=4, layers=2, image=42, patch=14, frames=4),
    DecoderConfig(width=128, heads=4, kv_heads=2, layers=2, mlp=192, context=64),
    kv_group=32,
    kv_residual=32,
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
        TrunkConfig(select_layer=-2),
        LLAMA_7B,
        branch=BranchConfig(),
        connector="linear",
        arrange="all",
        kv="none",
        template="USER: {question}\n<vid_start>{video}<vid_end> ASSISTANT:",
        tokenizer="checkpoint",
    ),
    "st_llm_7b_qa": replace(ST_LLM, branch=BranchConfig(layers=3, gated=False, spatial_eps=1e-5, output="frames")),
    "st_llm_7b_conversation": replace(ST_LLM, arrange="global_local"),
    "intp_video_llava_7b": VideoLLMConfig(
        EncoderConfig(width=1024, heads=16, layers=24, select_layer=-2),
        replace(LLAMA_7B, context=4096, eps=1e-5, rope_scaling="ntk"),
        kv="int2",
        template="USER: {video}\n{question} ASSISTANT:",
        tokenizer="checkpoint",
    ),
    # Video-LLaVA's token counts (257 per frame, 8 frames per clip) at a width that two cores can run.
    "small": VideoLLMConfig(
        EncoderConfig(width=512, heads=8, layers=6),
        DecoderConfig(width=512, heads=8, kv_heads=8, layers=4, mlp=1376),
    ),
    "tiny": TINY,
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
    "tiny_intp_video_llava": replace(TINY, kv="int2"),
}
PRESETS = {name: replace(config, name=name) for name, config in PRESETS.items()}


def opt(size: str = "125m", **changes) -> ReasonerConfig:
    """OPT by size."""
    width, heads, layers = _size("opt", OPT, size)
    return ReasonerConfig(width=width, heads=heads, layers=layers, mlp=4 * width, **changes)


def gpt2(size: str = "small", **changes) -> ReasonerConfig:
    """GPT-2 by size."""
    width, heads, layers = _size("gpt2", GPT2, size)
    return ReasonerConfig(
        width=width, heads=heads, layers=layers, mlp=4 * width, vocab=50257, context=1024, activation="gelu_tanh",
        position_offset=0, **changes,
    )  # fmt: skip


def t5(size: str = "base", **changes) -> T5Config:
    """T5 by size."""
    width, heads, layers = _size("t5", T5, size)
    return T5Config(width=width, heads=heads, layers=layers, mlp=4 * width, **changes)


def _size(family: str, sizes: dict[str, tuple[int, int, int]], size: str) -> tuple[int, int, int]:
    if size not in sizes:
        raise ValueError(f"{family}: size must be one of {', '.join(sizes)}, got {size!r}")
    return sizes[size]


OPT = {"125m": (768, 12, 12), "1.3b": (2048, 32, 24), "2.7b": (2560, 32, 32), "6.7b": (4096, 32, 32)}
GPT2 = {"small": (768, 12, 12), "medium": (1024, 16, 24), "large": (1280, 20, 36), "xl": (1600, 25, 48)}
T5 = {"small": (512, 8, 6), "base": (768, 12, 12), "large": (1024, 16, 24)}

TINY_OPT = ReasonerConfig(width=64, heads=4, layers=2, mlp=128, vocab=300, context=256)
TINY_TASK = TaskConfig("online_action_detection", features=32, classes=7, reasoner=TINY_OPT)
# VideoLLM's: EPIC-KITCHENS' 3806 actions online, Breakfast's 48 with every unit seeing every other.
TASK_PRESETS = {
    "videollm_opt": TaskConfig("online_action_detection", features=2048, classes=3806, reasoner=opt("1.3b")),
    "videollm_gpt2": TaskConfig("online_action_detection", features=2048, classes=3806, reasoner=gpt2("medium")),
    "videollm_t5": TaskConfig("action_segmentation", features=2048, classes=48, reasoner=t5("large", causal=False)),
    "tiny_videollm_opt": TINY_TASK,
    "tiny_videollm_gpt2": replace(TINY_TASK, reasoner=replace(TINY_OPT, activation="gelu_tanh", position_offset=0)),
    "tiny_videollm_t5": TaskConfig(
        "action_segmentation",
        features=32,
        classes=7,
        reasoner=T5Config(width=64, heads=4, layers=2, mlp=128, head=16, vocab=300, causal=False),
    ),
}
TASK_PRESETS = {name: replace(config, name=name) for name, config in TASK_PRESETS.items()}


def presets() -> list[str]:
    """Names that `from_preset` takes."""
    return [*PRESETS, *TASK_PRESETS]


def preset(name: str) -> VideoLLMConfig:
    """A `VideoLLM`'s config."""
    if name in TASK_PRESETS:
        raise ValueError(f"config: {name} must be built by TaskModel.from_preset, or from_preset, got VideoLLM's")
    if name not in PRESETS:
        raise ValueError(f"config: size must be one of {', '.join(PRESETS)}, got {name}")
    return PRESETS[name]


def task_preset(name: str) -> TaskConfig:
    """A `TaskModel`'s config."""
    if name not in TASK_PRESETS:
        raise ValueError(f"config: size must be one of {', '.join(TASK_PRESETS)}, got {name}")
    return TASK_PRESETS[name]
