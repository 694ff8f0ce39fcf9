"""What a transformers (>= 5) config says about rotary positions, checked: a config file is not to be trusted."""

from __future__ import annotations

import contextlib
import math
from typing import Any

from vkernels.check import require

OP = "RopeSpec.from_hf"
TYPES = ("default", "mrope", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
_YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(name: str, value: Any, above: float = 0.0) -> Any:
    good = _is_number(value) and value > above
    require(good, OP, name, f"be a finite number above {above:g}", repr(value))
    return value


def _factors(name: str, value: Any, pairs: int) -> list[float]:
    good = isinstance(value, list | tuple) and len(value) == pairs and all(_is_number(x) and x > 0 for x in value)
    require(good, OP, name, f"be {pairs} finite positive numbers, one for each pair", repr(value))
    return list(value)


def parameters(config: Any, layer_type: str | None) -> tuple[Any, dict[str, Any]]:
    """(text config of the layer type, its flat rope_parameters)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    p = getattr(text, "rope_parameters", None) or {}
    require(isinstance(p, dict), OP, "rope_parameters", "be a dict", type(p).__name__)
    nested = {name: value for name, value in p.items() if isinstance(value, dict)}
    if nested:
        rest = [name for name, value in p.items() if name not in nested and value is not None]
        require(not rest, OP, "rope_parameters", "be nested for every layer type or for none", f"{rest} beside dicts")
        require(layer_type in nested, OP, "layer_type", f"be one of {', '.join(nested)}", repr(layer_type))
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            text = text.per_layer_config[layer_type]
        p = nested[str(layer_type)]
    return text, dict(p)


def read(config: Any, layer_type: str | None, length: int | None) -> tuple[int, float, str, dict[str, Any]]:
    """(rotary size, base, scheme, arguments) for `RopeSpec.build`."""
    text, p = parameters(config, layer_type)
    kind = p.get("rope_type", "default")
    require(kind in TYPES, OP, "rope_type", f"be one of {', '.join(TYPES)}", repr(kind))
    base = _number("rope_theta", p.get("rope_theta", 10000.0), above=1.0)
    portion = _number("partial_rotary_factor", p.get("partial_rotary_factor", 1.0))
    require(portion <= 1, OP, "partial_rotary_factor", "be at most 1", portion)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    d = head if kind == "proportional" else int(head * portion)
    require(d >= 2 and d % 2 == 0, OP, "the rotated part of head_dim", "be even and at least 2", d)

    extra: dict[str, Any] = {}
    longest: Any = getattr(text, "max_position_embeddings", None)
    original = p.get("original_max_position_embeddings") or longest
    factor = p.get("factor")
    if kind in ("dynamic", "yarn", "longrope", "llama3"):
        extra["original"] = _number("original_max_position_embeddings", original, above=1.0)
    if factor is None and kind in ("yarn", "longrope"):
        factor = _number("max_position_embeddings", longest) / original
    if kind not in ("default", "mrope"):
        extra["factor"] = _number("factor", 1.0 if factor is None and kind == "proportional" else factor)
    if kind == "dynamic":
        extra |= {"original": _number("max_position_embeddings", longest, above=1.0), "length": length}
    elif kind == "yarn":
        extra |= {name: _number(name, p[name]) for name in _YARN if p.get(name)}
        fast, slow = extra.get("beta_fast", 32), extra.get("beta_slow", 1)
        require(fast >= slow, OP, "beta_fast", f"be at least beta_slow={slow}", fast)
        extra["truncate"] = bool(p.get("truncate", True))
    elif kind == "longrope":
        extra |= {name: _factors(name, p.get(name), d // 2) for name in ("short_factor", "long_factor")}
        extra["length"] = length
        if p.get("attention_factor") is not None:
            extra["attention_factor"] = _number("attention_factor", p["attention_factor"])
    elif kind == "llama3":
        low = _number("low_freq_factor", p.get("low_freq_factor"))
        high = _number("high_freq_factor", p.get("high_freq_factor"))
        require(high > low, OP, "high_freq_factor", f"be above low_freq_factor={low}", high)
        extra |= {"low_freq_factor": low, "high_freq_factor": high}
    elif kind == "proportional":
        extra["portion"] = portion

    sections = p.get("mrope_section")
    if sections:
        good = isinstance(sections, list | tuple) and all(isinstance(x, int) and x >= 0 for x in sections)
        good = good and len(sections) == 3 and sum(sections) == d // 2
        require(good, OP, "mrope_section", f"be three sizes that sum to the {d // 2} pairs", repr(sections))
        extra |= {"axes": "mrope_interleaved" if p.get("mrope_interleaved") else "mrope", "sections": sections}
    return d, base, "default" if kind == "mrope" else kind, extra
