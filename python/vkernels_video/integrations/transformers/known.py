"""What is known of transformers' classes by name: which seams each must have, and whether this version has them.

A model of an unknown class is patched too, as far as its modules read the attention registry and call a rotation that
agrees with ours; a known class that has lost a seam is an error, because somebody counts on it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vkernels_video.integrations.transformers import host, rope
from vkernels_video.integrations.transformers.methods import METHODS, Method
from vkernels_video.integrations.transformers.patches import reads

_BOTH, _ATTENTION = ("attention", "rope"), ("attention",)

# modeling file -> its classes with the kinds of seam each must have; METHODS adds those replaced by method
FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": {"LlamaAttention": _BOTH},
    "mistral": {"MistralAttention": _BOTH},
    "qwen2": {"Qwen2Attention": _BOTH},
    "qwen3": {"Qwen3Attention": _BOTH},
    "clip": {"CLIPAttention": _ATTENTION, "CLIPMLP": ()},
    "siglip": {"SiglipAttention": _ATTENTION, "SiglipMLP": ()},
    "video_llava": {"VideoLlavaModel": ()},
    "llava_next_video": {"LlavaNextVideoPooler": (), "LlavaNextVideoModel": ()},
    "llava_onevision": {"LlavaOnevisionModel": ()},
    "qwen2_vl": {"VisionAttention": _BOTH, "VisionMlp": (), "Qwen2VLAttention": _BOTH, "Qwen2VLModel": ()},
    "qwen2_5_vl": {
        "Qwen2_5_VLVisionAttention": _BOTH,
        "Qwen2_5_VLAttention": _BOTH,
        "Qwen2_5_VisionTransformerPretrainedModel": (),
        "Qwen2_5_VisionPatchEmbed": (),
        "Qwen2_5_VLVisionBlock": (),
        "Qwen2_5_VLMLP": (),
        "Qwen2_5_VLModel": (),
    },
    "qwen3_vl": {
        "Qwen3VLVisionAttention": _BOTH,
        "Qwen3VLTextAttention": _BOTH,
        "Qwen3VLVisionPatchEmbed": (),
        "Qwen3VLVisionMLP": (),
        "Qwen3VLModel": (),
    },
    "video_llama_3": {
        "VideoLlama3VisionAttention": _BOTH,
        "VideoLlama3VisionEmbeddings": (),
        "VideoLlama3VisionMLP": (),
        "VideoLlama3VisionModel": (),
        "VideoLlama3Model": (),
    },
    "internvl": {"InternVLVisionAttention": _ATTENTION, "InternVLVisionMLP": (), "InternVLModel": ()},
    "smolvlm": {
        "SmolVLMVisionAttention": _ATTENTION,
        "SmolVLMVisionMLP": (),
        "SmolVLMConnector": (),
        "SmolVLMModel": (),
    },
    "instructblipvideo": {
        "InstructBlipVideoAttention": _ATTENTION,
        "InstructBlipVideoMLP": (),
        "InstructBlipVideoQFormerMultiHeadAttention": _ATTENTION,
        "InstructBlipVideoForConditionalGeneration": (),
    },
    "timesformer": {"TimesformerLayer": ()},
    "vivit": {"VivitAttention": _ATTENTION, "VivitMLP": ()},
    "videomae": {"VideoMAESelfAttention": _ATTENTION},
    "vjepa2": {"VJEPA2RopeAttention": _ATTENTION, "VJEPA2MLP": ()},
}
KNOWN: dict[str, tuple[str, ...]] = {name: kinds for family in FAMILIES.values() for name, kinds in family.items()}


def reads_registry(forward: Any) -> bool:
    """Whether a forward asks transformers' registry for its attention function."""
    return reads(forward, "ALL_ATTENTION_FUNCTIONS")


def reads_softmax(forward: Any) -> bool:
    code = getattr(forward, "__code__", None)
    return code is not None and "softmax" in code.co_names


def is_varlen(forward: Any) -> bool:
    """Whether a forward hands over all packed windows in one call when the key has "flash" in it."""
    return reads(forward, "is_flash_attention_requested") and "cu_seqlens" in host.parameters(forward)


def attention_lost(kind: type) -> str | None:
    """None where the class reads the registry, else a sentence."""
    return None if reads_registry(kind.forward) else f"{kind.__name__}.forward does not read the attention registry"  # type: ignore[attr-defined]


def rope_lost(kind: type) -> str | None:
    """None where the class calls a rotation that is ours, else a sentence."""
    forward = kind.forward  # type: ignore[attr-defined]
    name = rope.rope_name(forward)
    if name is None:
        return f"{kind.__name__}.forward does not call {' or '.join(rope.FUNCTIONS)}"
    return rope.why_not(forward, name)


def method_lost(kind: type, method: Method) -> str | None:
    """None where the class has the method with the parameters we know, else a sentence."""
    stock = getattr(kind, method.name, None)
    if stock is None or not host.starts_with(stock, ("self", *method.parameters)):
        return f"{kind.__name__} has no {method.name}({', '.join(method.parameters)})"
    return None


def seams_of(family: str, name: str) -> list[tuple[str, str | None]]:
    """(kind, None or what is missing) for every seam of a known class of the installed transformers."""
    try:
        kind = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name)
    except (ImportError, AttributeError):
        return [("class", f"transformers.models.{family} has no {name}")]
    look = {"attention": attention_lost, "rope": rope_lost}
    found = [(seam, look[seam](kind)) for seam in FAMILIES[family][name]]
    return found + [(method.kind, method_lost(kind, method)) for method in METHODS.get(name, ())]
