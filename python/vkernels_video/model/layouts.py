"""Whose names the tensors of a checkpoint have: one `Source` per published layout, and what becomes of each name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

State = dict[str, Tensor]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Source:
    """One published layout: how to recognise it, new names for its tensors, and which of them have no use here."""

    name: str
    signs: tuple[str, ...]  # every pattern matches some key
    renames: tuple[tuple[str, str], ...]  # applied in order, each anywhere in the name
    unused: tuple[str, ...] = ()
    reshape: Callable[[State], State] = lambda state: state
    overrides: tuple[str, ...] = ()  # our names that count before those of a base model beside it
    resizes: bool = False  # positions of another grid are resized, as EVA's code does

    def wins(self, name: str) -> bool:
        """Whether this file's tensor counts before another's of the same name."""
        return any(re.search(pattern, name) for pattern in self.overrides)


def _fused_qkv(state: State) -> State:
    """EVA's packed projection as three, and its two biases; a key bias must be zero, for EVA's keys have none."""
    made: State = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"(.*self_attn)\.qkv\.(weight|bias)", name):
            parts = tensor.chunk(3)
            if match[2] == "bias" and bool((parts[1] != 0).any()):
                raise CheckpointError(
                    f"checkpoint: {name} must be zero for the keys, got {float(parts[1].abs().max())}"
                )
            for part, letter in zip(parts, "qkv", strict=True):
                if (match[2], letter) != ("bias", "k"):
                    made[f"{match[1]}.{letter}_proj.{match[2]}"] = part
        else:
            made[name] = tensor
    return _flat_embeddings(made)


def _flat_embeddings(state: State) -> State:
    """Class and position embeddings without the axes of a batch."""
    for name in ("encoder.class_embedding", "encoder.position_embedding.weight"):
        if name in state:
            state[name] = state[name].flatten(0, -2).squeeze(0) if name.endswith("weight") else state[name].flatten()
    return state


LLAMA = (
    (r"^(?:language_model\.)?(?:model\.)?(embed_tokens|layers|norm)\.", r"decoder.\1."),
    (r"^(?:language_model\.)?lm_head\.", r"decoder.lm_head."),
)
LLAVA = ((r"^(?:model\.)?mm_projector\.", "projector."), *LLAMA)
CLIP = (
    (r"^encoder\.embeddings\.", "encoder."),
    (r"^encoder\.encoder\.layers\.", "encoder.layers."),
)
QFORMER = (
    (r"^Qformer\.bert\.", "projector.qformer."),
    (r"(attention)\.self\.(query|key|value)\.", r"\1.attention.\2."),
    (r"embeddings\.LayerNorm\.", "embeddings.layernorm."),
)
BUFFERS = (r"rotary_emb\.inv_freq$", r"position_ids$")

TUNED = (r"^decoder\.",)  # a whole language model, or the table with the tokens it was given


def eva(tower: str) -> tuple[tuple[str, str], ...]:
    """EVA's tower, with BT-Adapter's branch, under the prefix `tower`."""
    return (
        (rf"^{tower}cls_token$", "encoder.class_embedding"),
        (rf"^{tower}pos_embed$", "encoder.position_embedding.weight"),
        (rf"^{tower}patch_embed\.proj\.", "encoder.patch_embedding."),
        (rf"^{tower}blocks\.", "encoder.layers."),
        (rf"^{tower}(?i:btadapter)_cls$", "encoder.btadapter_cls_token"),
        (rf"^{tower}(?i:btadapter)_position\.", "encoder.btadapter_time_embed."),
        (rf"^{tower}(?i:btadapter)_([ST])\.", r"encoder.btadapter_\1_layers."),
        (r"\.norm([12])\.", r".layer_norm\1."),
        (r"\.attn\.([qv])_bias$", r".self_attn.\1_proj.bias"),
        (r"\.attn\.proj\.", ".self_attn.out_proj."),
        (r"\.attn\.qkv\.", ".self_attn.qkv."),
    )


SOURCES = (
    Source("vkernels_video", (r"^encoder\.class_embedding$", r"^projector\.", r"^decoder\.embed_tokens\."), ()),
    Source(
        "ST-LLM",
        (r"^(model\.stllm_model\.)?visual_encoder\.", r"Qformer\.bert\."),
        (
            (r"^model\.stllm_model\.", ""),
            *eva(r"visual_encoder\."),
            (r"^ln_vision\.", "projector.ln_vision."),
            (r"^query_tokens$", "projector.qformer.query_tokens"),
            *QFORMER,
            (r"^(?:llama|llm)_proj\.", "projector.llama_proj."),
            (r"^(down|up)_proj\.", r"global_local.\1_proj."),
            (r"^mvm_decoder\.", "mvm."),
            *LLAMA,
        ),
        (*BUFFERS, r"^model\.stllm_model\.embed_tokens\.", r"^projector\.qformer\.cls\."),
        _fused_qkv,
        TUNED,
        resizes=True,
    ),
    Source(
        "InstructBLIP",
        (r"^vision_model\.", r"^qformer\."),
        (
            (r"^vision_model\.post_layernorm\.", "projector.ln_vision."),
            (r"^vision_model\.", "encoder."),
            *CLIP,
            (r"self_attn\.projection\.", "self_attn.out_proj."),
            (r"encoder\.position_embedding$", "encoder.position_embedding.weight"),
            (r"^(qformer\.|query_tokens$)", r"projector.\1"),
            (r"^projector\.query_tokens$", "projector.qformer.query_tokens"),
            (r"^language_projection\.", "projector.llama_proj."),
            *LLAMA,
        ),
        BUFFERS,
        _fused_qkv,
        resizes=True,
    ),
    Source(
        "Video-LLaVA",
        (r"^(model\.)?video_tower\.", r"^(model\.)?multi_modal_projector\."),
        (
            (r"^model\.(video_tower|image_tower|multi_modal_projector|language_model)\.", r"\1."),
            (r"^video_tower\.(?:vision_model\.)?", "encoder."),
            *CLIP,
            (r"^multi_modal_projector\.linear_1\.", "projector.0."),
            (r"^multi_modal_projector\.linear_2\.", "projector.2."),
            *LLAMA,
        ),
        (*BUFFERS, r"^image_tower\.", r"^encoder\.post_layernorm\."),
    ),
    Source(
        "LanguageBind",
        (r"temporal_attn\.q_proj\.",),
        (
            (r"^(?:vision_model|model\.video_tower\.video_tower)\.", "encoder."),
            *CLIP,
            (r"\.mlp\.fc1\.", ".mlp.0."),
            (r"\.mlp\.fc2\.", ".mlp.2."),
            (r"^encoder\.position_embedding\.weight$", "encoder.position_embedding"),
            *LLAVA,  # Video-LLaVA's own repository keeps all in one folder
        ),
        (
            *BUFFERS,
            r"^text_model\.",
            r"^(text|visual)_projection\.",
            r"^logit_scale$",
            r"^encoder\.post_layernorm\.",
            r"^model\.image_tower\.",
        ),
    ),
    Source(
        "BT-Adapter",
        (r"(btadapter|timesFPN)_T_layers\.",),
        (
            (r"timesFPN", "btadapter"),
            (r"^(?:backbone|model\.vision_tower)\.", "encoder."),
            *LLAVA,
        ),
        (*BUFFERS, r"^text_backbone\."),
        overrides=TUNED,
    ),
    Source(
        "BT-Adapter EVA",
        (r"^backbone\.btadapter_T\.",),
        (
            *eva(r"backbone\."),
            (r"^backbone\.norm\.", "encoder.post_layernorm."),
            (r"^backbone\.head\.", "encoder.visual_projection."),
        ),
        (*BUFFERS, r"^text_backbone\."),
        _fused_qkv,
        resizes=True,
    ),
    Source("LLaVA projector", (r"^(model\.)?mm_projector\.",), LLAVA, BUFFERS, overrides=TUNED),
    Source(
        "CLIP",
        (r"^vision_model\.embeddings\.class_embedding$",),
        ((r"^vision_model\.", "encoder."), *CLIP, (r"^visual_projection\.", "encoder.visual_projection.")),
        (*BUFFERS, r"^text_model\.", r"^text_projection\.", r"^logit_scale$"),
    ),
    Source("LLaMA", (r"^model\.embed_tokens\.weight$", r"^model\.layers\.0\."), LLAMA, BUFFERS),
)


def _gpt2(state: State) -> State:
    """GPT-2 keeps its maps transposed and its three projections in one."""
    made: State = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"(.*self_attn)\.c_attn\.(weight|bias)", name):
            for part, letter in zip(tensor.T.chunk(3) if tensor.dim() == 2 else tensor.chunk(3), "qkv", strict=True):
                made[f"{match[1]}.{letter}_proj.{match[2]}"] = part
        else:
            transposed = re.search(r"(out_proj|fc[12])\.weight$", name) and tensor.dim() == 2
            made[name] = tensor.T if transposed else tensor
    return made


def t5(decoder: bool) -> Source:
    """One of T5's stacks. What belongs to the other, and the attention from one to the other, has no use here."""
    mine, other = ("decoder", "encoder") if decoder else ("encoder", "decoder")
    mlp = rf"^{mine}\.block\.(\d+)\.layer\.{2 if decoder else 1}\."
    return Source(
        f"T5 {mine}",
        (r"relative_attention_bias\.weight$",),
        (
            (rf"^{mine}\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.", "relative_attention_bias."),
            (rf"^{mine}\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkv])\.", r"layers.\1.self_attn.\2_proj."),
            (rf"^{mine}\.block\.(\d+)\.layer\.0\.SelfAttention\.o\.", r"layers.\1.self_attn.out_proj."),
            (rf"^{mine}\.block\.(\d+)\.layer\.0\.layer_norm\.", r"layers.\1.self_attn_layer_norm."),
            (rf"{mlp}DenseReluDense\.wi(?:_0)?\.", r"layers.\1.wi."),
            (rf"{mlp}DenseReluDense\.wi_1\.", r"layers.\1.wg."),
            (rf"{mlp}DenseReluDense\.wo\.", r"layers.\1.wo."),
            (rf"{mlp}layer_norm\.", r"layers.\1.final_layer_norm."),
            (rf"^{mine}\.final_layer_norm\.", "final_layer_norm."),
            (r"^shared\.", "embed_tokens."),
        ),
        (rf"^{other}\.", rf"^{mine}\.embed_tokens\.", r"^lm_head\.", r"^decoder\.block\.\d+\.layer\.1\."),
    )  # fmt: skip


REASONERS = (
    Source(
        "OPT",
        (r"decoder\.embed_positions\.weight$",),
        ((r"^(?:model\.)?decoder\.", ""),),
        (r"^lm_head\.",),
    ),
    Source(
        "GPT-2",
        (r"^(?:transformer\.)?wpe\.weight$", r"\.c_attn\.weight$"),
        (
            (r"^transformer\.", ""),
            (r"^wte\.", "embed_tokens."),
            (r"^wpe\.", "embed_positions."),
            (r"^ln_f\.", "final_layer_norm."),
            (r"^h\.(\d+)\.ln_1\.", r"layers.\1.self_attn_layer_norm."),
            (r"^h\.(\d+)\.ln_2\.", r"layers.\1.final_layer_norm."),
            (r"^h\.(\d+)\.attn\.c_attn\.", r"layers.\1.self_attn.c_attn."),
            (r"^h\.(\d+)\.attn\.c_proj\.", r"layers.\1.self_attn.out_proj."),
            (r"^h\.(\d+)\.mlp\.c_fc\.", r"layers.\1.fc1."),
            (r"^h\.(\d+)\.mlp\.c_proj\.", r"layers.\1.fc2."),
        ),
        (r"^lm_head\.", r"\.attn\.(masked_)?bias$"),
        _gpt2,
    ),
    Source("T5", (r"^shared\.weight$", r"relative_attention_bias\.weight$"), ()),
)


CLIP_TEXT = Source(
    "CLIP text",
    (r"^text_model\.",),
    ((r"^text_model\.", ""),),
    (*BUFFERS, r"^vision_model\.", r"^visual_projection\.", r"^logit_scale$"),
)
