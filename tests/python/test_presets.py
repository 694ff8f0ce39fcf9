"""Every preset: the small ones run, in both implementations alike; the large ones have the papers' sizes."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("einops")

from transformers import GPT2Config, GPT2Model, OPTConfig, OPTModel, T5Config, T5EncoderModel
from vkernels_video.model import TaskModel, VideoLLM, from_preset, preset, presets
from vkernels_video.model.masking import random_keep
from vkernels_video.model.presets import PRESETS, TASK_PRESETS, gpt2, t5
from vkernels_video.model.sequence import Example
from vkernels_video.model.st_llm import training_losses

TINY = [name for name in PRESETS if name.startswith("tiny")]
EXACT = [name for name in TINY if PRESETS[name].kv == "none"]  # quantised caches agree to a code
QUESTION = "what moves?"


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert a.shape == b.shape
    assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("frames", [1, 2, 8])
@pytest.mark.parametrize("name", EXACT)
def test_implementations_generate_the_same(name, frames):
    model = VideoLLM.from_preset(name, seed=2).eval()
    pixels = torch.randn(frames, 3, 42, 42)
    eager = model.generate(pixels, QUESTION, 12, "eager")
    fast = model.generate(pixels, QUESTION, 12, "vkernels")
    assert fast.prompt == eager.prompt
    assert fast.tokens == eager.tokens
    close(fast.logits, eager.logits)


def test_intp_generates_the_same_from_two_bits():
    """8 frames are two clips; the answer is long enough for two more groups to become codes."""
    model = VideoLLM.from_preset("tiny_intp_video_llava", seed=2).eval()
    pixels = torch.randn(8, 3, 42, 42)
    eager, fast = (model.generate(pixels, QUESTION, 70, impl) for impl in ("eager", "vkernels"))
    assert fast.tokens == eager.tokens
    close(fast.logits[:1], eager.logits[:1])
    assert ((fast.logits - eager.logits).norm(dim=1) <= 0.01 * eager.logits.norm(dim=1)).all()


# Frames, and whether ST-LLM's masks drop tokens: a pooled video and interleaved clips are read whole.
TRAINED = {
    "tiny": (4, False),
    "tiny_bt_llava": (8, False),
    "tiny_st_llm_qa": (8, True),
    "tiny_st_llm_conversation": (8, True),
    "tiny_intp_video_llava": (4, False),
}


@pytest.mark.parametrize("name", TINY)
def test_a_training_step_is_the_same_from_pixels_to_gradients(name):
    frames, masked = TRAINED[name]
    model = VideoLLM.from_preset(name, seed=3)
    pixels = torch.randn(2, frames, 3, 42, 42)
    text, shown = torch.randint(0, 259, (2, 6)), torch.arange(6) < torch.tensor([[6], [4]])
    asked = (text, shown) if model.reads else ()
    examples = [Example([1], [5, 6], [7, 8]), Example([1, 2], [9], [10])]
    sides = []
    for impl in ("eager", "vkernels"):
        model.zero_grad()
        torch.manual_seed(0)  # dropped paths
        rows = model.visual(model.features(pixels, impl), impl, *asked).flatten(1, 2)
        keep = random_keep(2, rows.shape[1], 0.5, torch.Generator().manual_seed(0)) if masked else None
        losses = training_losses(model.decoder, model.mvm, examples, rows, keep, impl)
        losses["total"].backward()
        sides.append((losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (eager, eager_grads), (fast, fast_grads) = sides
    for key, loss in eager.items():
        torch.testing.assert_close(fast[key], loss, rtol=1e-4, atol=1e-5)
    assert fast_grads.keys() == eager_grads.keys()
    assert any(name.startswith("encoder") for name in fast_grads)
    largest = max(float(g.norm()) for g in eager_grads.values())
    for key, grad in eager_grads.items():
        assert (fast_grads[key] - grad).norm() <= 3e-4 * grad.norm() + 3e-6 * largest, key


@pytest.mark.parametrize(
    ("name", "frames", "tokens", "decoder_parameters"),
    [
        ("bt_llava_7b", 1, 257, 6_738_415_616),
        ("st_llm_7b_qa", 16, 32, 6_738_423_808),
        ("st_llm_7b_conversation", 16, 32, 6_738_423_808),
        ("intp_video_llava_7b", 64, 257, 6_738_415_616),
    ],
)
def test_the_large_ones_have_the_papers_sizes(name, frames, tokens, decoder_parameters):
    """Rows into the LLM (257 per video, 16 x 32, 257 per frame) and LLaMA-7B's parameters, on the meta device."""
    with torch.device("meta"):
        model = VideoLLM(preset(name))
    assert sum(p.numel() for p in model.decoder.parameters()) == decoder_parameters
    count = 16 if name == "st_llm_7b_qa" else 64
    pixels = torch.empty(count, 3, 224, 224, device="meta")
    text = torch.zeros(1, 4, dtype=torch.int64, device="meta") if name.startswith("st") else None
    rows = model.visual(model.encode(pixels, "eager"), "eager", text)
    assert rows.flatten(0, 1).shape == (frames, tokens, 4096)


def test_branch_sizes_are_the_papers():
    """12.60 M per spatial and 5.25 M per temporal layer of CLIP, 71.5 M with four of each; EVA with three 105.6 M."""
    for name, layers, expected in (("bt_llava_7b", 4, 71.5e6), ("st_llm_7b_qa", 3, 105.6e6)):
        with torch.device("meta"):
            encoder = VideoLLM(preset(name)).encoder
        branch = sum(p.numel() for n, p in encoder.named_parameters() if "btadapter_S" in n or "btadapter_T" in n)
        assert len(encoder.btadapter_S_layers) == layers
        assert abs(branch - expected) < 0.01 * expected


def test_too_long_a_prompt_is_refused_not_cut():
    model = VideoLLM.from_preset("tiny_st_llm_qa").eval()
    with pytest.raises(ValueError, match=r"prompt and answer must fit the decoder's 256 positions, got 44 \+ 300"):
        model.generate(torch.randn(8, 3, 42, 42), QUESTION, 300)
    with pytest.raises(ValueError, match="pixels must hold at least one frame, got 0"):
        model.generate(torch.zeros(0, 3, 42, 42), QUESTION, 3)


# --- VideoLLM's


def test_every_preset_builds():
    """The large ones on the meta device; each names itself, and has a small one of its shape."""
    for name in presets():
        with torch.device("cpu" if name.startswith(("tiny", "digits")) else "meta"):
            model = (TaskModel if name in TASK_PRESETS else VideoLLM)(TASK_PRESETS.get(name) or preset(name))
        assert model.config.name == name
    large = [name for name in presets() if "_7b" in name or name.startswith("videollm_")]
    assert len(large) == 7
    assert {f"tiny_{name.replace('_7b', '')}" for name in large} <= set(presets())


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("videollm_opt", lambda: OPTModel(OPTConfig(
            hidden_size=2048, num_hidden_layers=24, ffn_dim=8192, num_attention_heads=32, word_embed_proj_dim=2048))),
        ("videollm_gpt2", lambda: GPT2Model(GPT2Config(n_embd=1024, n_layer=24, n_head=16))),
        ("videollm_t5", lambda: T5EncoderModel(T5Config(d_model=1024, d_ff=4096, num_layers=24, num_heads=16))),
    ],
)  # fmt: skip
def test_reasoners_have_transformers_sizes(name, theirs):
    with torch.device("meta"):
        ours, theirs = TaskModel(TASK_PRESETS[name]).reasoner, theirs()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_reasoners_by_size():
    assert (gpt2("xl").width, gpt2("xl").heads, gpt2().vocab) == (1600, 25, 50257)
    assert (t5("small").width, t5("small").mlp, t5("small").head) == (512, 2048, 64)
    with pytest.raises(ValueError, match=r"t5: size must be one of small, base, large, got '3b'"):
        t5("3b")


@pytest.mark.parametrize("name", ["tiny_videollm_opt", "tiny_videollm_gpt2", "tiny_videollm_t5"])
def test_a_task_model_agrees_forward_and_backward(name):
    model = from_preset(name, seed=4)
    assert torch.equal(model.translator.linear.weight, TaskModel.from_preset(name, 4).translator.linear.weight)
    units, labels = torch.randn(2, 9, 4, 32), torch.randint(0, 7, (2, 9))
    sides = []
    for impl in ("eager", "vkernels"):
        model.zero_grad()
        outputs = model(units, impl=impl)
        model.loss(outputs, labels).backward()
        sides.append([*outputs.values(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for eager, fast in zip(*sides, strict=True):
        assert (fast - eager).norm() <= 1e-4 * eager.norm() + 1e-6


def test_presets_go_to_their_class():
    assert isinstance(from_preset("tiny"), VideoLLM)
    changed = TaskModel.from_preset("tiny_videollm_opt", task="action_segmentation", classes=3)
    assert changed(torch.randn(1, 5, 32))["dense"].shape == (1, 5, 3)
    with pytest.raises(ValueError, match=r"config: tiny_videollm_opt must be built by TaskModel\.from_preset"):
        VideoLLM.from_preset("tiny_videollm_opt")
    with pytest.raises(ValueError, match=r"config: size must be one of videollm_opt, .*, got tiny"):
        TaskModel.from_preset("tiny")
    with pytest.raises(ValueError, match=r"task must be one of online_action_detection, .*, got 'chess'"):
        TaskModel.from_preset("tiny_videollm_opt", task="chess")
