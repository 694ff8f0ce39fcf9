"""apply, restore and the report: one instance, everything back, nothing silent, and a sentence for every misuse.

Planted, one at a time, and seen red: a config shared with another model switched; a hook left behind; the forward of
the class patched instead of the instance's; a lost seam passed over in strict mode; a call given back to the stock path
not counted; a rotation of another kind replaced.
"""

import copy
import gc
import os
import subprocess
import sys
import warnings
import weakref
from importlib import import_module

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from transformers.models.llama import modeling_llama
from vkernels_video.integrations import doctor, zoo
from vkernels_video.integrations import transformers as vkt
from vkernels_video.integrations.transformers import attention as attend
from vkernels_video.integrations.transformers import host, known, rope


@pytest.fixture
def llama():
    return zoo.build("LLaMA")


def state(model):
    """What apply could leave behind: every instance attribute of every module, and its hooks, by identity."""
    return {
        name: (
            {key: id(value) for key, value in module.__dict__.items() if not key.startswith("_forward_pre_hooks")},
            list(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    }


# ---- one instance, and back


def test_restore_leaves_the_model_as_it_was(llama):
    before, keys = state(llama.model), copy.deepcopy(llama.model.config.to_dict())
    report = vkt.apply(llama.model)
    assert state(llama.model) != before
    assert vkt.restore(llama.model) is report
    assert state(llama.model) == before
    assert llama.model.config.to_dict() == keys


def test_a_model_of_the_same_config_stays_as_it_is():
    config = transformers.LlamaConfig(**zoo.TEXT)
    ours, other = (transformers.LlamaForCausalLM(config) for _ in range(2))
    before = config._attn_implementation
    report = vkt.apply(ours)
    other(input_ids=torch.tensor([[3, 4]]))
    assert not report.calls["attention"]
    assert other.config is config
    assert config._attn_implementation == before
    assert ours.config._attn_implementation == "vkernels"
    assert "forward" not in other.model.layers[0].self_attn.__dict__
    assert modeling_llama.apply_rotary_pos_emb.__module__ == modeling_llama.__name__


def test_applying_again_returns_the_same_report(llama):
    report = vkt.apply(llama.model)
    after = state(llama.model)
    assert vkt.apply(llama.model) is report
    assert state(llama.model) == after


def test_accelerated_restores_whatever_happens(llama):
    before = state(llama.model)
    seen = []

    def fail():
        with vkt.accelerated(llama.model, rope=False) as report:
            llama.model(**llama.inputs)
            seen.append(report.calls)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert seen == [{"attention": 2}]
    assert state(llama.model) == before


def test_a_patched_model_is_copied_saved_and_collected(llama, tmp_path):
    report = vkt.apply(llama.model)
    twin = copy.deepcopy(llama.model)
    assert torch.equal(twin(**llama.inputs).logits, llama.model(**llama.inputs).logits)
    llama.model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    watched = weakref.ref(twin)
    del twin
    gc.collect()
    assert watched() is None
    assert "LlamaForCausalLM" in str(report)


def test_the_plain_key_serves_from_pretrained(tmp_path):
    vkt.register()
    sample = zoo.build("LLaMA")
    sample.model.save_pretrained(tmp_path)
    ours = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="vkernels").eval()
    stock = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    real = sample.inputs["attention_mask"].bool()
    torch.testing.assert_close(ours(**sample.inputs).logits[real], stock(**sample.inputs).logits[real])


def test_a_part_of_a_model_can_be_patched_alone():
    sample = zoo.build("Qwen2.5-VL")
    report = vkt.apply(sample.model.model.visual)
    sample.model(**sample.inputs)
    assert report.calls == {"patch": 1, "window": 3, "norm": 4, "mlp": 0, "attention": 4, "rope": 4}
    with pytest.raises(ValueError, match=r"not hold a part that is patched already.*visual"):
        vkt.apply(sample.model)


# ---- the report


def test_the_report_counts_what_ran_and_names_what_was_left():
    sample = zoo.build("SigLIP vision")
    report = vkt.apply(sample.model, rope=False)
    sample.model(**sample.inputs)
    sample.model(**sample.inputs)
    assert report.calls == {"attention": 4, "mlp": 0}
    text = str(report)
    assert "SiglipAttention x 2: sdpa of the registry -> vkernels.attention, 4 calls" in text
    assert "MultiheadAttention: torch.nn.MultiheadAttention reads no registry" in text
    assert "the same, 1,024 tokens at a time, 0 calls; 6 on the stock path (a gradient would keep" in text
    assert "rope=False" in text
    report.reset()
    assert report.calls == {"attention": 0, "mlp": 0}


def test_verify_sees_a_wrong_kernel(llama, monkeypatch):
    report = vkt.apply(llama.model)
    stock = attend.vk.attention
    monkeypatch.setattr(attend.vk, "attention", lambda q, k, v, **how: stock(q, k, k, **how))
    with pytest.raises(vkt.Mismatch, match="LlamaForCausalLM differs in logits"):
        report.verify(llama.inputs)


def test_verify_says_which_seams_the_inputs_did_not_reach():
    sample = zoo.build("Qwen2.5-VL")
    report = vkt.apply(sample.model)
    made = report.verify(dict(input_ids=torch.tensor([[3, 4, 5]])))
    assert "attention of Qwen2_5_VLVisionAttention" in made.idle
    assert report.calls["attention"] == 2
    vkt.restore(sample.model)
    with pytest.raises(ValueError, match="verify: model must be patched"):
        report.verify(sample.inputs)


def test_what_attention_does_not_do_goes_to_stock_and_is_counted(llama):
    report = vkt.apply(llama.model)
    llama.model.train()
    for layer in llama.model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    torch.manual_seed(0)
    got = llama.model(**llama.inputs).logits
    with report.suspended():
        torch.manual_seed(0)
        want = llama.model(**llama.inputs).logits
    real = llama.inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=1e-5)
    assert "2 on the stock path (attention dropout of 0.1)" in str(report)


def test_dropout_over_packed_windows_goes_to_stock_with_a_dense_mask():
    sample = zoo.build("Qwen2.5-VL")
    report = vkt.apply(sample.model)
    sample.model.train()
    for block in sample.model.model.visual.blocks:
        block.attn.attention_dropout = 1e-9
    got = sample.model(**sample.inputs).logits
    with report.suspended():
        want = sample.model(**sample.inputs).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert "on the stock path (attention dropout" in str(report)


def test_a_mask_of_the_users_own_goes_to_stock_and_is_counted(llama):
    report = vkt.apply(llama.model)
    own = torch.ones(2, 1, 11, 11).tril().bool()
    got = llama.model(input_ids=llama.inputs["input_ids"], attention_mask=own).logits
    want = llama.model(input_ids=llama.inputs["input_ids"]).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert "2 on the stock path (a dense mask is given)" in str(report)


def test_timesformer_in_training_with_dropout_keeps_its_own_layer():
    sample = zoo.build("TimeSformer")
    report = vkt.apply(sample.model)
    sample.model.train()
    sample.model.encoder.layer[0].output.dropout.p = 0.5
    sample.model(**sample.inputs)
    assert "1 calls; 1 on the stock path (dropout" in str(report)


# ---- transformers' own ways of running a model


@pytest.mark.parametrize("arguments", [dict(cache_implementation="static"), dict(num_beams=2), dict(use_cache=False)])
def test_generate_in_every_way(llama, arguments):
    report = vkt.apply(llama.model)
    call = dict(**llama.inputs, **arguments, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    got = llama.model.generate(**call)
    with report.suspended():
        assert torch.equal(got, llama.model.generate(**call))
    assert not any(seam.stock_calls for seam in report.seams)


def test_a_static_cache_prefills_top_left(llama):
    """More keys than queries and no mask: query i sees keys up to i, and one query sees all."""
    q, k, v = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    module = llama.model.model.layers[0].self_attn
    sdpa = host.attention_interface()["sdpa"]
    for queries in (q, q[:, :, :1]):
        got, _ = attend.attention_forward(module, queries, k, v, None, scaling=0.25)
        torch.testing.assert_close(got, sdpa(module, queries, k, v, None, scaling=0.25)[0], atol=1e-5, rtol=1e-5)


def test_learned_queries_of_one_sample_meet_many():
    q, k, v = torch.randn(1, 2, 3, 16), *torch.randn(2, 4, 2, 6, 16)
    got, _ = attend.attention_forward(torch.nn.Module(), q, k, v, None, is_causal=False)
    want = torch.nn.functional.scaled_dot_product_attention(q.expand(4, -1, -1, -1), k, v).transpose(1, 2)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["LLaMA", "Qwen2.5-VL"])
def test_gradient_checkpointing(name):
    sample = zoo.build(name)
    vkt.apply(sample.model)
    sample.model.train()

    def gradients():
        sample.model.zero_grad()
        sample.model(**sample.inputs, use_cache=False).logits.square().mean().backward()
        return [p.grad.clone() for p in sample.model.parameters() if p.grad is not None]

    plain = gradients()
    sample.model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(), plain)


@pytest.mark.parametrize("name", ["LLaMA", "Qwen2.5-VL", "TimeSformer"])
def test_autocast_is_as_close_as_stock_under_autocast(name):
    sample = zoo.build(name)
    exact = vkt.report.run_once(sample.model, sample.inputs)

    def error():
        with torch.autocast("cpu", torch.bfloat16):
            low = vkt.report.run_once(sample.model, sample.inputs)
        return max(vkt.report.compare(exact, low, sample.inputs).values())

    stock = error()
    vkt.apply(sample.model)
    assert 0 < error() < 2 * stock + 0.01


class Graphs:
    """A backend that runs a graph as it is and counts graphs."""

    def __init__(self):
        torch._dynamo.reset()
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.mark.parametrize("name", ["LLaMA", "Qwen2 (sliding window)"])
def test_a_language_model_compiles_whole(name):
    sample = zoo.build(name)
    vkt.apply(sample.model)
    eager = sample.model(**sample.inputs, use_cache=False).logits
    graphs = Graphs()
    got = torch.compile(sample.model, fullgraph=True, backend=graphs)(**sample.inputs, use_cache=False).logits
    real = sample.inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], eager[real], atol=1e-5, rtol=1e-5)
    assert graphs.count == 1


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "Qwen3-VL"])
def test_the_tower_compiles_without_a_graph_break(name):
    sample = zoo.build(name)
    vkt.apply(sample.model)
    tower, grid = sample.model.model.visual, sample.inputs["video_grid_thw"]
    pixels = sample.inputs["pixel_values_videos"]
    ahead = vkt.vision_kwargs(sample.model, grid)
    eager = tower(pixels, grid)
    graphs = Graphs()
    got = torch.compile(tower, fullgraph=True, backend=graphs)(pixels, grid, **ahead)
    torch.testing.assert_close(got.pooler_output, eager.pooler_output, atol=1e-4, rtol=1e-4)
    assert graphs.count == 1


def test_the_compiled_tower_takes_clips_of_other_sizes():
    sample = zoo.build("Qwen2.5-VL")
    vkt.apply(sample.model)
    tower, pixels = sample.model.model.visual, sample.inputs["pixel_values_videos"]
    torch._dynamo.reset()
    compiled = torch.compile(tower, fullgraph=True, backend="eager")
    for grid in ([3, 6, 10], [2, 6, 10], [2, 4, 6]):
        clip, grid = pixels[: grid[0] * grid[1] * grid[2]], torch.tensor([grid])
        got = compiled(clip, grid, **vkt.vision_kwargs(tower, grid)).pooler_output
        torch.testing.assert_close(got, tower(clip, grid).pooler_output, atol=1e-4, rtol=1e-4)


def test_timesformer_under_autocast_takes_sums_and_norms_apart():
    sample = zoo.build("TimeSformer")
    report = vkt.apply(sample.model)
    with torch.autocast("cpu", torch.bfloat16):
        assert report.verify(sample.inputs, tolerance=4e-2).idle == ()


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "Qwen3-VL", "VideoLLaMA3"])
def test_a_patch_embedding_is_a_product_where_it_neither_overlaps_nor_is_wrapped(name):
    from vkernels_video.integrations.transformers.methods import METHODS

    sample = zoo.build(name)
    names = {n for n, methods in METHODS.items() if methods[0].kind == "patch"}
    embed = next(m for m in sample.model.modules() if type(m).__name__ in names)
    where, conv = next((n, m) for n, m in embed.named_children() if hasattr(m, "kernel_size"))
    rows = torch.randn(6, conv.weight[0].numel(), requires_grad=True)
    want = embed(rows)
    theirs = torch.autograd.grad(want.square().sum(), (rows, *embed.parameters()))
    with vkt.accelerated(sample.model) as report:
        got = embed(rows.double())  # rows take the dtype of the weights
        assert report.calls["patch"] == 1
        ours = torch.autograd.grad(embed(rows).square().sum(), (rows, *embed.parameters()))
    torch.testing.assert_close((got, *ours), (want, *theirs), rtol=1e-4, atol=1e-4)

    class Wrapped(type(conv)):
        pass

    conv.stride = tuple(s + 1 for s in conv.stride)
    assert f"its {where} overlaps or pads" in str(vkt.apply(sample.model))
    vkt.restore(sample.model)
    conv.__class__ = Wrapped
    assert f"its {where} is a Wrapped" in str(vkt.apply(sample.model))


# ---- misuse


class Unknown(transformers.PreTrainedModel):
    """A model of transformers with a config, whose attention is nobody's."""

    config_class = transformers.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.proj, self.norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"vision": False}, {"cache": "int4"}])
def test_an_unsupported_model_is_refused_and_left_as_it_was(options):
    """By then its config is copied and a hook refuses weights: all of it has to go."""
    for model in (torch.nn.Linear(2, 2), Unknown(transformers.LlamaConfig(**zoo.TEXT))):
        before, keys = state(model), model.config.to_dict() if hasattr(model, "config") else None
        with pytest.raises((ValueError, TypeError), match="apply: model must have"):
            vkt.apply(model, **options)
        assert state(model) == before
        assert keys is None or model.config.to_dict() == keys


def test_unsupported_models_are_refused():
    with pytest.raises(ValueError, match=r"apply: model must have a module vkernels can replace.*got Linear"):
        vkt.apply(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="apply: model must be a torch module, got str"):
        vkt.apply("llama")
    with pytest.raises(ValueError, match="not be compiled yet"):
        vkt.apply(torch.compile(torch.nn.Linear(2, 2)))
    inside = torch.nn.Linear(2, 2)
    inside.compile()
    with pytest.raises(ValueError, match="not be compiled yet"):
        vkt.apply(inside)


def test_an_old_transformers_is_refused(llama, monkeypatch):
    before = state(llama.model)
    monkeypatch.setattr(import_module("transformers"), "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"transformers must be version 5 or newer, got 4\.57\.1"):
        vkt.apply(llama.model)
    assert state(llama.model) == before


def test_other_options_on_a_patched_model_are_refused(llama):
    vkt.apply(llama.model)
    with pytest.raises(ValueError, match="be restored before other options"):
        vkt.apply(llama.model, rope=False)


def test_restoring_twice_is_refused(llama):
    vkt.apply(llama.model)
    vkt.restore(llama.model)
    for model in (llama.model, torch.nn.Linear(2, 2), "llama"):
        with pytest.raises(ValueError, match="restore: model must be one that apply has changed and restore has not"):
            vkt.restore(model)


def test_a_model_on_meta_is_refused():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**zoo.TEXT))
    before = state(model)
    with pytest.raises(ValueError, match=r"be on a real device .*on meta"):
        vkt.apply(model)
    assert state(model) == before


def test_mixed_dtypes_are_refused(llama):
    llama.model.model.layers[1].self_attn.k_proj.bfloat16()
    before = state(llama.model)
    with pytest.raises(
        ValueError, match=r"one dtype within an attention module \(model.layers.1.self_attn\), got bfloat16 and"
    ):
        vkt.apply(llama.model)
    assert state(llama.model) == before
    q = torch.randn(1, 1, 2, 8)
    with pytest.raises(TypeError, match="q, k and v must have one dtype"):
        attend.attention_forward(torch.nn.Module(), q, q.bfloat16(), q, None)


def test_attention_weights_are_refused_and_the_model_left_as_it_was(llama):
    """Asked for in a call, the patched model stays patched and usable; in the config, the stock one stays stock."""
    stock = state(llama.model)
    report = vkt.apply(llama.model)
    patched, calls = state(llama.model), report.calls
    for model in (llama.model, llama.model.model):
        with pytest.raises(ValueError, match="output_attentions must be False, the weights are never formed"):
            model(**llama.inputs, output_attentions=True)
    assert state(llama.model) == patched
    assert report.calls == calls
    assert report.verify(llama.inputs).ok
    vkt.restore(llama.model)
    assert state(llama.model) == stock
    llama.model.set_attn_implementation("eager")
    weights = llama.model(**llama.inputs, output_attentions=True).attentions
    assert len(weights) == llama.model.config.num_hidden_layers
    llama.model.config.output_attentions = True
    stock, keys = state(llama.model), llama.model.config.to_dict()
    with pytest.raises(ValueError, match="output_attentions must be False"):
        vkt.apply(llama.model)
    assert state(llama.model) == stock
    assert llama.model.config.to_dict() == keys
    sample = zoo.build("TimeSformer")
    stock = state(sample.model)
    vkt.apply(sample.model)
    patched = state(sample.model)
    with pytest.raises(ValueError, match="output_attentions must be False"):
        sample.model(**sample.inputs, output_attentions=True)
    assert state(sample.model) == patched
    vkt.restore(sample.model)
    assert state(sample.model) == stock


def test_a_lost_seam_raises_with_the_version_or_is_reported(llama, monkeypatch):
    class LlamaAttention(modeling_llama.LlamaAttention):
        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    llama.model.model.layers[1].self_attn.__class__ = LlamaAttention
    before = state(llama.model)
    with pytest.raises(
        vkt.MissingSeam, match=f"transformers {transformers.__version__}: LlamaAttention.forward does not"
    ):
        vkt.apply(llama.model)
    assert state(llama.model) == before
    text = str(vkt.apply(llama.model, strict=False))
    assert "left      rope: LlamaAttention: transformers" in text
    assert "left      attention: LlamaAttention: transformers" in text


def test_a_lost_method_raises_with_the_version_or_is_reported(monkeypatch):
    sample = zoo.build("Qwen2.5-VL")
    tower = type(sample.model.model.visual)
    monkeypatch.delattr(tower, "permute_input_for_window_attn")
    with pytest.raises(vkt.MissingSeam, match="has no permute_input_for_window_attn"):
        vkt.apply(sample.model)
    assert "window" in str(vkt.apply(sample.model, strict=False))


def test_another_rotation_of_the_same_name_is_left_alone():
    def pairs(q, k, cos, sin, unsqueeze_dim=1):
        def turn(x):
            c, s = cos[:, None, :, : x.shape[-1] // 2], sin[:, None, :, : x.shape[-1] // 2]
            return torch.stack((x[..., ::2] * c - x[..., 1::2] * s, x[..., 1::2] * c + x[..., ::2] * s), -1).flatten(-2)

        return turn(q), turn(k)

    forward = rope.with_names(modeling_llama.LlamaAttention.forward, apply_rotary_pos_emb=pairs)
    assert rope.why_not(forward, "apply_rotary_pos_emb") == "apply_rotary_pos_emb is another rotation"
    other = rope.with_names(forward, apply_rotary_pos_emb=lambda q, k, freqs: (q, k))
    assert "takes (q, k, freqs)" in rope.why_not(other, "apply_rotary_pos_emb")
    assert rope.why_not(modeling_llama.LlamaAttention.forward, "apply_rotary_pos_emb") is None


def test_a_forward_somebody_bound_before_is_left_alone(llama):
    module = llama.model.model.layers[0].self_attn
    module.forward = module.forward
    report = vkt.apply(llama.model)
    assert "bound to the instance already" in str(report)
    assert [seam.modules for seam in report.seams if seam.kind == "rope"] == [1]


def test_options_are_checked(llama):
    with pytest.raises(ValueError, match="cache must be None, int8, int4, int2, got 'int3'"):
        vkt.apply(llama.model, cache="int3")
    with pytest.raises(ValueError, match="attention must be True with a cache"):
        vkt.apply(llama.model, cache="int4", attention=False)


def test_vision_kwargs_are_checked():
    sample = zoo.build("VideoLLaMA3")
    grid = sample.inputs["video_grid_thw"]
    with pytest.raises(ValueError, match="merge_sizes must be given for VideoLlama3VisionModel"):
        vkt.vision_kwargs(sample.model, grid)
    with pytest.raises(ValueError, match=r"grid_thw must have shape \(clips 3\), got \(3,\)"):
        vkt.vision_kwargs(sample.model, grid[0])
    with pytest.raises(ValueError, match="model must hold a vision tower that takes grid_thw"):
        vkt.vision_kwargs(zoo.build("CLIP vision").model, grid)
    ahead = vkt.vision_kwargs(sample.model, grid, sample.inputs["video_merge_sizes"])
    assert ahead["max_seqlen"] == 24


# ---- doctor


def test_doctor_says_what_would_be_patched(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert doctor.main() == 0
    text = capsys.readouterr().out
    assert f"transformers  {transformers.__version__}" in text
    assert "every known seam is there" in text
    for family, classes in known.FAMILIES.items():
        assert family in text
        assert all(name in text for name in classes)


def test_doctor_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", lambda self: None)
    assert doctor.main() == 1
    assert "MISSING rope: LlamaAttention.forward does not call apply_rotary_pos_emb" in capsys.readouterr().out
    monkeypatch.setattr(known, "FAMILIES", {"gone": {"Gone": ()}})
    assert doctor.main() == 1
    assert "MISSING class: transformers.models.gone has no Gone" in capsys.readouterr().out


def test_doctor_without_transformers_says_so():
    code = "import sys; sys.modules['transformers'] = None; from vkernels_video.integrations.doctor import main; main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "nothing would be patched: vkernels_video.integrations.transformers needs transformers" in done.stdout
