"""What is known of attention modules by class name and by the form of their forward, and how each is replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vkernels_video.integrations.eras import forwards, masks
from vkernels_video.integrations.eras.forwards import Forward
from vkernels_video.integrations.eras.rope import NAME
from vkernels_video.integrations.transformers import host
from vkernels_video.integrations.transformers.patches import reads, with_names
from vkernels_video.integrations.transformers.seams import Seam

FUNCTIONS = "ALL_ATTENTION_FUNCTIONS"


@dataclass(frozen=True)
class Kind:
    """One form of attention: the parameters its forward must begin with, and what makes ours of it."""

    parameters: tuple[str, ...]
    make: Callable[[Forward, dict[str, Any], Seam], Forward]  # of the stock forward, other meanings of names, the seam
    turns: bool = False  # it calls apply_rotary_pos_emb

    def lost(self, kind: type) -> str | None:
        """None where the class has this form, else a sentence."""
        forward = kind.forward  # type: ignore[attr-defined]
        if "get_interface" in getattr(forward, "__code__", forward).co_names:
            return f"{kind.__name__} reads the registry of transformers 5 (integrations.transformers serves it)"
        if not host.starts_with(forward, ("self", *self.parameters)):
            return f"{kind.__name__}.forward takes ({', '.join(host.parameters(forward)[1:])})"
        if self.turns and not reads(forward, NAME):
            return f"{kind.__name__}.forward does not call {NAME}"
        return None


def _decoder(stock: Forward, names: dict[str, Any], seam: Seam) -> Forward:
    return forwards.llama(stock, names.get(NAME, stock.__globals__[NAME]), seam)


def _from_dictionary(stock: Forward, names: dict[str, Any], seam: Seam) -> Forward:
    scope = stock.__globals__
    names = {**names, FUNCTIONS: forwards.Served(scope[FUNCTIONS])}
    if "eager_attention_forward" in scope:
        names["eager_attention_forward"] = forwards.served(scope["eager_attention_forward"])
    return with_names(stock, **names)


DECODER = Kind(
    ("hidden_states", "attention_mask", "position_ids", "past_key_value", "output_attentions", "use_cache"),
    _decoder,
    turns=True,
)
CLIP = Kind(
    ("hidden_states", "attention_mask", "causal_attention_mask", "output_attentions"),
    lambda stock, names, seam: forwards.clip(stock, seam),
)
EVA = Kind(("x", "rel_pos_bias"), lambda stock, names, seam: forwards.eva(stock, seam))
QFORMER = Kind(
    (
        "hidden_states",
        "attention_mask",
        "head_mask",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "past_key_value",
        "output_attentions",
    ),
    lambda stock, names, seam: forwards.qformer(stock, seam),
)
BY_NAME = {"LlamaAttention": DECODER, "Qwen2Attention": DECODER, "CLIPAttention": CLIP}
BY_FORM = {"Attention": EVA, "BertSelfAttention": QFORMER}  # names others use too: only of exactly this form


def kind_of(kind: type) -> Kind | None:
    """The form a class's attention has, or should have by its name; None where it is none we know."""
    forward: Any = getattr(kind, "forward", None)
    if reads(forward, FUNCTIONS) and "get_interface" not in forward.__code__.co_names:
        return Kind((), _from_dictionary, turns=reads(forward, NAME))
    for name in (base.__name__ for base in kind.__mro__):
        if (found := BY_NAME.get(name)) is not None:
            return found
        if (found := BY_FORM.get(name)) is not None and host.starts_with(forward, ("self", *found.parameters)):
            return found
    return None


# what makes the mask of a decoder: a method, or a function its forward calls
MASK_METHODS: dict[str, tuple[tuple[str, ...], Callable[[Any, Seam], Forward]]] = {
    "_prepare_decoder_attention_mask": (
        ("attention_mask", "input_shape", "inputs_embeds", "past_key_values_length"),
        masks.decoder_mask,
    ),
    "_update_causal_mask": (
        ("attention_mask", "input_tensor", "cache_position", "past_key_values"),
        masks.updated_mask,
    ),
}
MASK_FUNCTIONS: tuple[str, ...] = (
    "_prepare_4d_causal_attention_mask",
    "_prepare_4d_causal_attention_mask_for_sdpa",
)


def mask_lost(kind: type) -> str | None:
    """None where a decoder makes its mask in a way of these years, else a sentence."""
    for name, (parameters, _) in MASK_METHODS.items():
        if (stock := getattr(kind, name, None)) is not None:
            fits = host.starts_with(stock, ("self", *parameters))
            return None if fits else f"{kind.__name__}.{name} takes ({', '.join(host.parameters(stock)[1:])})"
    if any(reads(kind.forward, name) for name in MASK_FUNCTIONS):  # type: ignore[attr-defined]
        return None
    return f"{kind.__name__} makes its mask in another way"


def seams_of(module: Any) -> list[tuple[str, list[str], str | None]]:
    """(class, kinds of seam, None or what is missing) for every attention class and decoder of a modeling file."""
    found = []
    for name, kind in vars(module).items():
        if not isinstance(kind, type) or kind.__module__ != module.__name__:
            continue
        if (form := kind_of(kind)) is not None:
            found.append((name, ["attention", *["rope"] * form.turns], form.lost(kind)))
        elif name in ("LlamaModel", "Qwen2Model"):
            found.append((name, ["mask"], mask_lost(kind)))
    return found
