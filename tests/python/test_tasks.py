"""VideoLLM: reasoner, stream, heads and losses.

The witnesses are transformers' OPT and GPT-2, recomputation without a cache, a dense reading of prefix and window, and
numbers worked by hand.
Trusted after mutation: 20 planted bugs (the prefix merged with swapped weights, windows and positions off by one,
labels shifted the wrong way, a norm's scale lost in the folded product, empty slots taught a class, captions of other
units, with forgotten words, past their end) turned red.
"""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from transformers import GPT2Config, GPT2Model, OPTConfig, OPTModel
from vkernels_video.model.config import ReasonerConfig, TaskConfig
from vkernels_video.model.presets import opt
from vkernels_video.model.reasoner import Reasoner, Stream
from vkernels_video.model.tasks import FAMILIES, ManyNorms, Segments, TaskModel, retrieval_loss, span_iou, tune

CONFIG = ReasonerConfig(width=32, heads=4, layers=2, mlp=48, vocab=40, context=24)
IMPLS = ("eager", "vkernels")


def reasoner(config: ReasonerConfig = CONFIG) -> Reasoner:
    model = Reasoner(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            near = 1.0 if "norm.weight" in name else 0.0
            parameter.copy_(near + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert (a - b).norm() <= tolerance * b.norm()


# --- the reasoner is OPT and GPT-2


@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_transformers_opt(impl):
    ours = reasoner()
    theirs = OPTModel(
        OPTConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=4,
            max_position_embeddings=24, dropout=0.0, word_embed_proj_dim=32,
        )
    ).eval()  # fmt: skip
    theirs.load_state_dict({f"decoder.{name}": value for name, value in ours.state_dict().items()})
    x = torch.randn(2, 11, 32)
    with torch.no_grad():
        close(ours(x, impl), theirs(inputs_embeds=x).last_hidden_state)


@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_transformers_gpt2(impl):
    ours = reasoner(replace(CONFIG, activation="gelu_tanh", position_offset=0))
    theirs = GPT2Model(GPT2Config(vocab_size=40, n_positions=24, n_embd=32, n_layer=2, n_head=4, n_inner=48)).eval()
    state = {"wte.weight": ours.embed_tokens.weight, "wpe.weight": ours.embed_positions.weight}
    state |= {f"ln_f.{kind}": getattr(ours.final_layer_norm, kind) for kind in ("weight", "bias")}
    for i, layer in enumerate(ours.layers):
        attention = layer.self_attn
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        state |= {
            f"h.{i}.ln_1.weight": layer.self_attn_layer_norm.weight,
            f"h.{i}.ln_1.bias": layer.self_attn_layer_norm.bias,
            f"h.{i}.ln_2.weight": layer.final_layer_norm.weight, f"h.{i}.ln_2.bias": layer.final_layer_norm.bias,
            f"h.{i}.attn.c_attn.weight": torch.cat([p.weight for p in qkv]).T,
            f"h.{i}.attn.c_attn.bias": torch.cat([p.bias for p in qkv]),
            f"h.{i}.attn.c_proj.weight": attention.out_proj.weight.T,
            f"h.{i}.attn.c_proj.bias": attention.out_proj.bias,
            f"h.{i}.mlp.c_fc.weight": layer.fc1.weight.T, f"h.{i}.mlp.c_fc.bias": layer.fc1.bias,
            f"h.{i}.mlp.c_proj.weight": layer.fc2.weight.T, f"h.{i}.mlp.c_proj.bias": layer.fc2.bias,
        }  # fmt: skip
    theirs.load_state_dict(state, strict=False)
    x = torch.randn(2, 11, 32)
    with torch.no_grad():
        close(ours(x, impl), theirs(inputs_embeds=x).last_hidden_state)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("virtual", [{}, {"prompt": 3}, {"prefix": 5}, {"prompt": 2, "prefix": 2}])
def test_implementations_agree_forward_and_backward(virtual, window):
    model = reasoner(replace(CONFIG, **virtual))
    sides = []
    for impl in IMPLS:
        x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model.zero_grad()
        out = model(x, impl, window)
        out.square().sum().backward()
        used = [p for n, p in model.named_parameters() if p.grad is not None]
        sides.append([out, x.grad, *(p.grad for p in used)])
    assert len(sides[0]) == len(sides[1])
    largest = max(float(g.detach().norm()) for g in sides[0])
    for fast, eager in zip(sides[1], sides[0], strict=True):
        assert (fast - eager).norm() <= 1e-4 * eager.norm() + 1e-6 * largest


def test_bidirectional_sees_the_future():
    model = reasoner(replace(CONFIG, causal=False))
    x = torch.randn(1, 6, 32)
    changed = x.clone()
    changed[0, -1] = torch.randn(32)
    for impl in IMPLS:
        assert (model(x, impl)[0, 0] - model(changed, impl)[0, 0]).norm() > 1e-3
        close(model(x, impl), model(x, "eager"))


# --- the stream


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("virtual", [{}, {"prompt": 3}, {"prefix": 4}])
def test_a_stream_equals_full_recomputation(impl, window, virtual):
    """Unit by unit against a ring, or all at once through the window: the same states."""
    model = reasoner(replace(CONFIG, **virtual))
    x = torch.randn(2, 14, 32)
    stream = Stream(model, b=2, window=window, impl=impl)
    states = torch.cat([stream.step(x[:, i : i + 1]) for i in range(14)], dim=1)
    with torch.no_grad():
        close(states, model(x, "eager", window))


def test_a_stream_ends_with_its_positions():
    stream = Stream(reasoner(), window=4)
    for _ in range(24):
        stream.step(torch.zeros(1, 1, 32))
    with pytest.raises(ValueError, match="Reasoner: tokens must fit the 24 positions, got 25"):
        stream.step(torch.zeros(1, 1, 32))


# --- heads and losses


def config(task: str, **changes) -> TaskConfig:
    generator = CONFIG if FAMILIES[task] == "caption" else None
    return TaskConfig(task, features=12, classes=5, reasoner=CONFIG, steps=3, generator=generator, **changes)


def arguments(family: str) -> tuple[dict, object]:
    labels = torch.tensor([[0, 1, 2, 3, 4, 0], [1, -100, 3, 3, 2, 2]])
    segments = [
        Segments(torch.tensor([1, 2]), torch.tensor([[0.0, 0.3], [0.5, 0.9]])),
        Segments(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2)),
    ]
    captions = torch.randint(0, 40, (2, 6, 4), generator=torch.Generator().manual_seed(2))
    return {
        "caption": ({"captions": captions}, captions),
        "retrieval": ({"text": torch.tensor([[3, 4], [5, 6]])}, segments),
        "highlight": ({"text": torch.tensor([[3], [9]])}, torch.rand(2, 6, generator=torch.Generator().manual_seed(3))),
    }.get(family, ({}, labels))


@pytest.mark.parametrize("task", FAMILIES)
def test_every_task_learns_and_implementations_agree(task):
    """Outputs and gradients agree; thirty steps bring the loss well down."""
    torch.manual_seed(0)
    model = TaskModel(config(task))
    more, targets = arguments(model.family)
    x = torch.randn(2, 6, 3, 12)
    sides = []
    for impl in IMPLS:
        model.zero_grad()
        loss = model.loss(model(x, **more, impl=impl), targets)
        loss.backward()
        sides.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(sides[1][0], sides[0][0], rtol=1e-5, atol=1e-6)
    assert sides[0][1].keys() == sides[1][1].keys()
    largest = max(float(g.norm()) for g in sides[0][1].values())
    for name, grad in sides[0][1].items():
        assert (sides[1][1][name] - grad).norm() <= 1e-4 * grad.norm() + 1e-5 * largest, name
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(30):
        optimiser.zero_grad()
        last = model.loss(model(x, **more), targets)
        last.backward()
        optimiser.step()
    assert float(last.detach()) < 0.5 * float(sides[0][0])


@pytest.mark.parametrize("impl", IMPLS)
def test_units_are_pooled(impl):
    for pool, reduce in (("mean", lambda x: x.mean(2)), ("max", lambda x: x.amax(2))):
        model = TaskModel(config("action_segmentation", pool=pool))
        x = torch.randn(2, 6, 3, 12)
        close(model.translator(x, impl), model.translator.linear(reduce(x)))


def test_many_norms_are_layer_norms():
    norms = ManyNorms(8, 3, 1e-5)
    torch.nn.init.normal_(norms.weight)
    torch.nn.init.normal_(norms.bias)
    linear, x = torch.nn.Linear(8, 4), torch.randn(2, 5, 8)
    expected = [torch.nn.functional.layer_norm(x, (8,), norms.weight[i], norms.bias[i]) for i in range(3)]
    torch.testing.assert_close(norms(x), torch.stack(expected, dim=2))
    for impl in IMPLS:
        torch.testing.assert_close(
            norms.into(x, linear, impl), linear(torch.stack(expected, dim=2)), rtol=1e-5, atol=1e-5
        )


def test_future_and_next_labels_by_hand():
    """A model that is certain of the right label at every place has no loss; one place off and it has."""
    labels = torch.tensor([[0, 1, 2, 3]])
    model = TaskModel(replace(config("long_term_anticipation"), steps=2))
    sure = torch.full((1, 4, 2, 5), -50.0)
    for place, (first, second) in enumerate([(1, 2), (2, 3), (3, 0), (0, 0)]):
        sure[0, place, 0, first] = sure[0, place, 1, second] = 50.0
    assert float(model.loss({"future": sure}, labels)) < 1e-6
    assert float(model.loss({"future": sure.roll(1, 1)}, labels)) > 10
    online = TaskModel(config("online_action_detection"))
    now = torch.nn.functional.one_hot(labels, 5) * 100.0 - 50
    later = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3, 0]]), 5) * 100.0 - 50
    assert float(online.loss({"now": now, "next": later}, labels)) < 1e-6
    assert float(online.loss({"now": now, "next": now}, labels)) > 10


def test_span_overlap_by_hand():
    iou, giou = span_iou(torch.tensor([[0.0, 0.4], [0.6, 0.8]]), torch.tensor([[0.2, 0.6]]))
    torch.testing.assert_close(iou, torch.tensor([[0.2 / 0.6], [0.0]]))
    torch.testing.assert_close(giou, torch.tensor([[0.2 / 0.6], [0.0]]), atol=1e-6, rtol=0)
    _, apart = span_iou(torch.tensor([[0.0, 0.2]]), torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(apart, torch.tensor([[-0.4 / 0.8]]))


def test_matching_finds_the_slot_whatever_its_place():
    target = [Segments(torch.tensor([1, 0]), torch.tensor([[0.1, 0.2], [0.6, 0.9]]))]
    classes = torch.full((1, 3, 3), -20.0)
    classes[0, 0, 0] = classes[0, 1, 2] = classes[0, 2, 1] = 20.0  # slot 0: class 0, slot 1: nothing, slot 2: class 1
    spans = torch.tensor([[[0.6, 0.9], [0.0, 0.0], [0.1, 0.2]]])
    assert float(retrieval_loss(classes, spans, target)) < 1e-5
    with pytest.raises(ValueError, match="targets must fit the 1 slots, got 2"):
        retrieval_loss(classes[:, :1], spans[:, :1], target)


# --- captions


def captioner(**virtual) -> TaskModel:
    """Weights of a size that makes captions differ from unit to unit and word to word."""
    torch.manual_seed(5)
    task = config("online_captioning")
    model = TaskModel(replace(task, generator=replace(CONFIG, **virtual))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 0.1 if name.endswith("bias") else 1.0 if "embed" in name else 0.4
            parameter.copy_(size * torch.randn(parameter.shape) + ("norm.weight" in name))
    return model


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("virtual", [{}, {"prompt": 3}, {"prefix": 2}])
def test_captions_are_the_argmax_of_full_recomputation(impl, virtual):
    """Word by word, each time from the features on; and unit by unit as a stream brings them."""
    model, x, tokens = captioner(**virtual), torch.randn(2, 4, 3, 12), 7
    got = model.caption(model.states(x, impl=impl), tokens, impl=impl)
    said = torch.zeros(2, 4, 0, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(tokens):
            logits = model(x, captions=F.pad(said, (0, 1)), impl="eager")["caption"]
            said = torch.cat([said, logits[:, :, -1:].argmax(-1)], dim=2)
    assert torch.equal(got, said)
    assert len(got.unique()) > 10
    stream, units = Stream(model.reasoner, b=2, impl=impl), model.translator(x, impl)
    live = [model.caption(stream.step(units[:, i : i + 1]), tokens, impl=impl) for i in range(4)]
    assert torch.equal(torch.cat(live, dim=1), got)


def test_captions_end():
    model, tokens = captioner(), 7
    states = model.states(torch.randn(2, 4, 12))
    free = model.caption(states, tokens)
    end = int(free[0, 1, 2])
    for caption, row in zip(model.caption(states, tokens, end).flatten(0, 1), free.flatten(0, 1).tolist(), strict=True):
        stop = row.index(end) if end in row else tokens
        assert caption.tolist() == row[:stop] + [end] * (tokens - stop)


def test_captions_that_cannot_be():
    model = captioner(prompt=3)
    states = torch.randn(1, 2, 32)
    assert model.caption(states, 21).shape == (1, 2, 21)
    with pytest.raises(ValueError, match="Reasoner: tokens must fit the 24 positions, got 25"):
        model.caption(states, 22)
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        model.caption(states, 0)
    with pytest.raises(ValueError, match=r"states must have shape \(b N 32\), got \(2, 32\)"):
        model.caption(states[0], 3)
    with pytest.raises(ValueError, match="task must be online_captioning for captions, got 'moment_query'"):
        TaskModel(config("moment_query")).caption(states, 3)


# --- tuning


@pytest.mark.parametrize("scheme", ["all", "basic", "bias", "first_block", "last_block", "prompt", "prefix"])
def test_tuning_trains_what_it_says(scheme):
    task = replace(config("online_action_detection"), reasoner=replace(CONFIG, prompt=2, prefix=2))
    trained = tune(model := TaskModel(task), scheme)
    outside = [n for n, _ in model.named_parameters() if not n.startswith("reasoner.")]
    assert set(outside) <= set(trained)
    inside = {n.removeprefix("reasoner.") for n in trained} - set(outside)
    expected = {
        "all": {n for n, _ in model.reasoner.named_parameters()}, "basic": set(),
        "bias": {n for n, _ in model.reasoner.named_parameters() if n.endswith(".bias")},
        "first_block": {n for n, _ in model.reasoner.named_parameters() if n.startswith("layers.0.")},
        "last_block": {n for n, _ in model.reasoner.named_parameters() if n.startswith("layers.1.")},
        "prompt": {"prompt"}, "prefix": {"layers.0.self_attn.prefix", "layers.1.self_attn.prefix"},
    }[scheme]  # fmt: skip
    assert inside == expected
    model.loss(model(torch.randn(1, 4, 12)), torch.tensor([[0, 1, 2, 3]])).backward()
    unused = {"reasoner.embed_tokens.weight"}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(trained) - unused


def test_lora_without_the_peft_library_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"lora needs the PEFT library \(pip install peft\)"):
        tune(TaskModel(config("online_action_detection")), "lora")


def test_lora_is_the_peft_librarys_and_trains_alone():
    pytest.importorskip("peft", reason="lora needs the PEFT library (pip install peft)")
    model, features, labels = TaskModel(config("online_action_detection")), torch.randn(1, 4, 12), torch.arange(4)[None]
    before = model(features)
    trained = tune(model, "lora", rank=2)
    inside = [name for name in trained if name.startswith("reasoner.")]
    assert len(inside) == 2 * 2 * 2  # layers, q and v, A and B
    assert all("lora_" in name for name in inside)
    torch.testing.assert_close(model(features), before)  # B starts at zero
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if name not in trained}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        losses.append(model.loss(model(features), labels))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[2] < losses[1] < losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert all(p.detach().abs().max() > 0 for name, p in model.named_parameters() if name in inside)


def test_refusals():
    with pytest.raises(ValueError, match=r"task must be one of online_action_detection, .*, got 'chess'"):
        TaskModel(replace(config("moment_query"), task="chess"))
    with pytest.raises(ValueError, match="generator must be given for online_captioning, got None"):
        TaskModel(replace(config("moment_query"), task="online_captioning"))
    model = TaskModel(config("online_captioning"))
    with pytest.raises(ValueError, match="captions must be given for online_captioning, got None"):
        model(torch.randn(1, 3, 12))
    with pytest.raises(ValueError, match=r"features must have shape \(b N d\) or \(b N u d\), got \(1, 0, 12\)"):
        model(torch.randn(1, 0, 12))
    with pytest.raises(ValueError, match="tokens must fit the 24 positions, got 30"):
        TaskModel(config("action_segmentation"))(torch.randn(1, 30, 12))
    with pytest.raises(ValueError, match=r"scheme must be one of all, .*, got 'some'"):
        tune(model, "some")
    with pytest.raises(ValueError, match="the reasoner must have a prefix for this scheme, got prefix=0"):
        tune(model, "prefix")
    with pytest.raises(ValueError, match=r"size must be one of 125m, .*, got '13b'"):
        opt("13b")
    with pytest.raises(ValueError, match="the reasoner must be causal"):
        Stream(reasoner(replace(CONFIG, causal=False)))
    with pytest.raises(ValueError, match=r"unit must have shape \(b 1 c\), got \(1, 2, 32\)"):
        Stream(reasoner()).step(torch.zeros(1, 2, 32))
