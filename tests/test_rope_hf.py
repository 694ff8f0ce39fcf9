"""RopeSpec.from_hf against transformers' own frequencies, and configs that must not be believed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vkernels import RopeSpec

TYPES = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.01 * j for j in range(64)],
        "long_factor": [1.0 + 0.5 * j for j in range(64)],
        "original_max_position_embeddings": 4096,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "proportional": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}
VARIANTS = {
    **TYPES,
    "linear partial": TYPES["linear"] | {"partial_rotary_factor": 0.5},
    "yarn untruncated": TYPES["yarn"] | {"truncate": False},
    "yarn betas": TYPES["yarn"] | {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5},
    "yarn mscale": TYPES["yarn"] | {"mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn factor of the windows": TYPES["yarn"] | {"factor": None},
    "longrope factor": TYPES["longrope"] | {"factor": 8.0},
    "longrope attention": TYPES["longrope"] | {"attention_factor": 1.25},
    "proportional factor": TYPES["proportional"] | {"factor": 2.0},
}


def llama(rope):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=1024, num_attention_heads=8, head_dim=128, max_position_embeddings=131072, rope_parameters=rope
    )


def same(spec, theirs, scale):
    assert torch.equal(torch.tensor(spec.freq_fp32, dtype=torch.float32), theirs.float())
    assert spec.scale == pytest.approx(scale)
    torch.testing.assert_close(torch.tensor(spec.freq, dtype=torch.float64), theirs.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("length", [None, 4096, 4097, 262144])
@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_frequencies_bit_for_bit(name, length):
    config = llama(dict(VARIANTS[name]))
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    spec = RopeSpec.from_hf(config, length=length)
    if name == "default":
        theirs, scale = LlamaRotaryEmbedding(config).inv_freq, 1.0
    else:
        kind = VARIANTS[name]["rope_type"]
        theirs, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    same(spec, theirs, scale)


def test_every_type_of_transformers_is_known():
    llama(None)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ROPE_INIT_FUNCTIONS) <= set(TYPES)


def test_nested_per_layer_type():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import Gemma3TextConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"sliding_attention": dict(TYPES["default"]), "full_attention": dict(TYPES["linear"])}
    config = Gemma3TextConfig(hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters=rope)
    theirs = ROPE_INIT_FUNCTIONS["linear"](config, torch.device("cpu"), layer_type="full_attention")
    same(RopeSpec.from_hf(config, "full_attention"), *theirs)
    assert RopeSpec.from_hf(config, "sliding_attention").freq == RopeSpec.build(128, 1e6).freq
    with pytest.raises(ValueError, match="layer_type must be one of sliding_attention, full_attention, got None"):
        RopeSpec.from_hf(config)


def test_nested_yarn_reads_truncate_of_its_own_layer():
    """transformers 5.23 looks for it outside the nested dict and always truncates."""
    untruncated = dict(VARIANTS["yarn untruncated"])
    nested = SimpleNamespace(head_dim=128, max_position_embeddings=131072, rope_parameters={"full": untruncated})
    flat = SimpleNamespace(head_dim=128, max_position_embeddings=131072, rope_parameters=untruncated)
    assert RopeSpec.from_hf(nested, "full") == RopeSpec.from_hf(flat)
    assert RopeSpec.from_hf(flat) != RopeSpec.from_hf(
        SimpleNamespace(**vars(flat) | {"rope_parameters": TYPES["yarn"]})
    )


def test_sections_and_head_dim_of_hidden_size():
    rope = TYPES["default"] | {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
    config = SimpleNamespace(hidden_size=1024, num_attention_heads=8, max_position_embeddings=1, rope_parameters=rope)
    assert RopeSpec.from_hf(config).axis == (0, 1, 2) * 20 + (0,) * 4


NAN, INF = float("nan"), float("inf")
BAD = {
    "type": ({"rope_type": "magic"}, "rope_type must be one of default, .*, got 'magic'"),
    "axial": ({"rope_type": "axial"}, "rope_type must be one of"),
    "not a dict": ([1], "rope_parameters must be a dict, got list"),
    "mixed": ({"full": {}, "rope_theta": 1.0}, "rope_parameters must be nested for every layer type or for none"),
    "nan theta": ({"rope_theta": NAN}, "rope_theta must be a finite number above 1, got nan"),
    "theta text": ({"rope_theta": "1e4"}, "rope_theta must be a finite number above 1, got '1e4'"),
    "theta zero": ({"rope_theta": 0}, "rope_theta must be"),
    "negative": (TYPES["linear"] | {"factor": -2.0}, "factor must be a finite number above 0, got -2.0"),
    "infinite": (TYPES["dynamic"] | {"factor": INF}, "factor must be"),
    "no factor": ({"rope_type": "linear"}, "factor must be a finite number above 0, got None"),
    "portion": ({"partial_rotary_factor": 1.5}, "partial_rotary_factor must be at most 1"),
    "odd": ({"partial_rotary_factor": 0.4}, "the rotated part of head_dim must be even and at least 2, got 51"),
    "original": (TYPES["yarn"] | {"original_max_position_embeddings": -1}, "original_max_position_embeddings must be"),
    "betas": (TYPES["yarn"] | {"beta_fast": 1, "beta_slow": 32}, "beta_fast must be at least beta_slow=32, got 1"),
    "mscale": (TYPES["yarn"] | {"mscale": NAN}, "mscale must be"),
    "attention": (TYPES["longrope"] | {"attention_factor": -1}, "attention_factor must be"),
    "few factors": (TYPES["longrope"] | {"long_factor": [1.0]}, "long_factor must be 64 finite positive numbers"),
    "no factors": (TYPES["longrope"] | {"short_factor": None}, "short_factor must be 64 finite positive numbers"),
    "zero factor": (TYPES["longrope"] | {"short_factor": [0.0] * 64}, "short_factor must be"),
    "bands": (TYPES["llama3"] | {"high_freq_factor": 1.0}, "high_freq_factor must be above low_freq_factor=1.0"),
    "no band": ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor must be"),
    "sections": ({"mrope_section": [16, 24, 23]}, "mrope_section must be three sizes that sum to the 64 pairs"),
    "two sections": ({"mrope_section": [32, 32]}, "mrope_section must be three sizes"),
    "section sign": ({"mrope_section": [-1, 40, 25]}, "mrope_section must be three sizes"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_in_a_sentence(name):
    rope, match = BAD[name]
    config = SimpleNamespace(head_dim=128, max_position_embeddings=131072, rope_parameters=rope)
    with pytest.raises(ValueError, match=f"^RopeSpec.from_hf: {match}") as error:
        RopeSpec.from_hf(config, "full" if name == "mixed" else None)
    assert "\n" not in str(error.value)


def test_gemma4_head_dim_of_the_layer_type():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("transformers has no Gemma 4")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.Gemma4TextConfig()
    for layer_type, rope in config.rope_parameters.items():
        spec = RopeSpec.from_hf(config, layer_type)
        if rope["rope_type"] == "default":
            assert spec == RopeSpec.build(config.per_layer_config[layer_type].head_dim, rope["rope_theta"])
        else:
            same(spec, *ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"), layer_type=layer_type))
