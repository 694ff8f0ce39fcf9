"""What a checkpoint's own config.json says that its tensors' shapes do not: heads, activations, epsilons, bases.

A model built with other values would load without a missing name and answer nonsense, so they are compared.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from vkernels_video.model.config import DecoderConfig, ReasonerConfig, T5Config
from vkernels_video.model.layouts import CheckpointError

FREE = ("context", "causal", "prompt", "prefix")  # ours to choose


def own_config(folder: Path) -> dict[str, Any] | None:
    """config.json of a folder, where there is one."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"checkpoint: {file} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"checkpoint: {file} must hold a dictionary, got {type(data).__name__}")
    return data


def reasoner_config(folder: str | Path, **changes: Any) -> ReasonerConfig | T5Config:
    """The config of an OPT, GPT-2 or T5 checkpoint in a folder; `changes` are fields of the result."""
    folder = Path(folder)
    data = own_config(folder)
    if data is None:
        raise CheckpointError(f"checkpoint: {folder} must hold config.json, got none")
    kind = data.get("model_type")
    try:
        if kind == "opt":
            return ReasonerConfig(**_opt(data) | changes)
        if kind == "gpt2":
            return ReasonerConfig(**_gpt2(data) | changes)
        if kind == "t5":
            return T5Config(**_t5(data) | changes)
    except KeyError as error:
        raise CheckpointError(f"checkpoint: {folder / 'config.json'} must say {error.args[0]}, got nothing") from error
    raise CheckpointError(f"checkpoint: model_type must be one of opt, gpt2, t5, got {kind!r}")


def _opt(data: dict[str, Any]) -> dict[str, Any]:
    width = data["hidden_size"]
    for name, value in (("do_layer_norm_before", True), ("word_embed_proj_dim", width), ("enable_bias", True)):
        if data.get(name, value) != value:
            raise CheckpointError(f"checkpoint: OPT's {name} must be {value}, got {data[name]}")
    return {
        "width": width, "heads": data["num_attention_heads"], "layers": data["num_hidden_layers"],
        "mlp": data["ffn_dim"], "vocab": data["vocab_size"], "context": data["max_position_embeddings"],
        "activation": _named(data.get("activation_function", "relu"), {"relu": "relu"}), "position_offset": 2,
    }  # fmt: skip


def _gpt2(data: dict[str, Any]) -> dict[str, Any]:
    known = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
    return {
        "width": data["n_embd"], "heads": data["n_head"], "layers": data["n_layer"],
        "mlp": data.get("n_inner") or 4 * data["n_embd"], "vocab": data["vocab_size"], "context": data["n_positions"],
        "activation": _named(data.get("activation_function", "gelu_new"), known), "position_offset": 0,
        "eps": data.get("layer_norm_epsilon", 1e-5),
    }  # fmt: skip


def _t5(data: dict[str, Any]) -> dict[str, Any]:
    act = _named(data.get("feed_forward_proj", "relu"), {"relu": "relu", "gated-gelu": "gated"})
    return {
        "width": data["d_model"], "heads": data["num_heads"], "layers": data["num_layers"], "mlp": data["d_ff"],
        "head": data["d_kv"], "vocab": data["vocab_size"], "gated": act == "gated",
        "buckets": data.get("relative_attention_num_buckets", 32),
        "distance": data.get("relative_attention_max_distance", 128), "eps": data.get("layer_norm_epsilon", 1e-6),
    }  # fmt: skip


def _named(activation: str, known: dict[str, str]) -> str:
    if activation not in known:
        raise CheckpointError(f"checkpoint: activation must be one of {', '.join(known)}, got {activation}")
    return known[activation]


def refuse_other_reasoner(config: ReasonerConfig | T5Config, folder: Path) -> None:
    """Raise where a folder's config.json describes another reasoner than `config`."""
    if own_config(folder) is None:
        return
    theirs = reasoner_config(folder)
    if type(theirs) is not type(config):
        raise CheckpointError(
            f"checkpoint: the reasoner must be a {type(theirs).__name__} for {folder}, got {type(config).__name__}"
        )
    for each in fields(theirs):
        wanted, got = getattr(theirs, each.name), getattr(config, each.name)
        if each.name not in FREE and wanted != got:
            raise CheckpointError(f"checkpoint: reasoner.{each.name} must be {wanted} for {folder}, got {got}")


def refuse_other_decoder(config: DecoderConfig, folder: Path) -> None:
    """Raise where a folder's config.json describes another LLaMA than `config`. The papers' repositories call theirs
    something else: that of LLaVA's kind is known by its fields."""
    data = own_config(folder) or {}
    data = data.get("text_config", data)
    if not isinstance(data, dict) or (data.get("model_type") != "llama" and "rms_norm_eps" not in data):
        return
    rope = data.get("rope_parameters") or {}
    heads = data.get("num_attention_heads", config.heads)
    said = {
        "heads": heads,
        "kv_heads": data.get("num_key_value_heads") or heads,
        "eps": data.get("rms_norm_eps", config.eps),
        "rope_theta": data.get("rope_theta", rope.get("rope_theta", config.rope_theta)),
    }
    for name, wanted in said.items():
        if getattr(config, name) != wanted:
            raise CheckpointError(
                f"checkpoint: decoder.{name} must be {wanted} for {folder}, got {getattr(config, name)}"
            )
