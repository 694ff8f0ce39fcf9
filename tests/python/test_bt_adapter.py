"""BT-Adapter: both implementations are one branch, and that branch is the paper's.

The witnesses are transformers' CLIP for the trunk, single attentions one by one for the branch, and numbers counted by
hand; nothing learns the answer from the other implementation alone.
Trusted after mutation: 21 planted bugs (a bias lost in the folded projections, factors of dropped paths in the wrong
order, gates swapped, weights and rows of every plan off by one, masks in the wrong order) each turned a test red.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("einops")

from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection
from vkernels_video.model import VideoLLM, preset
from vkernels_video.model.bt_adapter import BTAdapter
from vkernels_video.model.checkpoint import CheckpointError
from vkernels_video.model.clip import ROWS
from vkernels_video.model.config import BranchConfig, TextTowerConfig, TrunkConfig
from vkernels_video.model.losses import contrast, cosine_alignment
from vkernels_video.model.masking import dynamic_rate, random_keep, tube_keep
from vkernels_video.model.text_tower import Pretraining, TextTower

TRUNK = TrunkConfig(width=64, heads=4, layers=5, mlp=128, image=42, projection=32)
PATCHES = 9


def adapter(grouping="correct", *, trunk: TrunkConfig = TRUNK, **branch) -> BTAdapter:
    """Small weights everywhere, so that no layer is the identity and no gate is shut."""
    model = BTAdapter(trunk, BranchConfig(**{"layers": 3, "frames": 6, "grouping": grouping, **branch}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 0.01 if "balance" in name else 0.15
            if parameter.dim() > 1 or any(part in name for part in ("bias", "embed", "balance")):
                parameter.normal_(0, size, generator=generator)
    model.freeze_trunk()
    return model.eval()


def clip(t: int, b: int = 2) -> Tensor:
    return torch.randn(b, t, 3, 42, 42, generator=torch.Generator().manual_seed(t))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert (a - b).norm() <= tolerance * b.norm()


# --- one branch, two implementations


@pytest.mark.parametrize(
    ("t", "grouping"), [(4, "correct"), (6, "compat"), (8, "correct"), (12, "compat"), (1, "correct")]
)
@pytest.mark.parametrize("gated", [True, False])
def test_implementations_agree_forward_and_backward(t, grouping, gated):
    model = adapter(grouping, gated=gated)
    frames = t if t <= 6 else t // 2
    for keep in (None, tube_keep(2, frames, PATCHES, 0.5), tube_keep(2, frames, PATCHES, 0.5, layout="ref")):
        sides = []
        for impl in ("eager", "vkernels"):
            model.zero_grad()
            x, z = model(clip(t), impl, keep)
            outputs = [x, z, model.video_features(x, z)]
            if keep is None:
                outputs.append(model.chat_tokens(x, z, impl))
                if t <= 6:
                    outputs.append(model.frame_tokens(x, z, impl))
            sum(output.square().sum() for output in outputs[1:]).backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            sides.append((outputs, grads))
        (eager, eager_grads), (fast, fast_grads) = sides
        for a, b in zip(fast, eager, strict=True):
            close(a, b)
        assert fast_grads.keys() == eager_grads.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
        largest = max(float(grad.norm()) for grad in eager_grads.values())
        for name, grad in eager_grads.items():  # keys' biases change no softmax: their gradient is rounding
            assert (fast_grads[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * largest, name


def test_implementations_agree_with_dropped_paths():
    model = adapter(drop_path=0.5).train()
    sides = []
    for impl in ("eager", "vkernels"):
        torch.manual_seed(3)
        sides.append(model(clip(4), impl)[1])
    close(sides[1], sides[0])
    assert not torch.allclose(sides[0], model.eval()(clip(4), "eager")[1], atol=1e-2)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("key_bias", [True, False])
def test_what_is_spared_without_gradients_changes_nothing(activation, key_bias):
    """Biases left out of products, products that write into the residual, an MLP by rows (here over several borders):
    all of it happens under no_grad alone, and gives what the plain way gives."""
    trunk = replace(TRUNK, activation=activation, key_bias=key_bias)
    model, frames = adapter(trunk=trunk), clip(6, b=10)
    assert 10 * 6 * (1 + PATCHES) > ROWS
    expected, kept = model(frames, "eager"), frames.clone()
    with torch.no_grad():
        for got, want in zip(model(frames), expected, strict=True):
            close(got, want)
        taps = model.taps(frames, 2, 5, "vkernels")
        before = [tap.clone() for tap in taps]
        model.run_branch(taps)
    assert torch.equal(frames, kept)
    assert all(torch.equal(a, b) for a, b in zip(taps, before, strict=True))  # nothing is written where others read


def test_an_adapter_around_a_map_is_not_passed_by():
    class Doubled(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    places = ["layers.0.self_attn.", "btadapter_T_layers.0.self_attn.", "btadapter_S_layers.1.self_attn."]
    names = [place + name for place in places for name in ("k_proj", "v_proj", "out_proj")]
    for name in [*names, "btadapter_T_layers.1.temporal_fc", "layers.1.mlp.fc1", "btadapter_S_layers.0.mlp.fc2"]:
        model = adapter()
        old = model.get_submodule(name)
        new = Doubled(old.in_features, old.out_features)
        new.load_state_dict(old.state_dict())
        model.set_submodule(name, new)
        with torch.no_grad():
            close(model(clip(2))[1], model(clip(2), "eager")[1])


# --- the trunk is CLIP


def test_trunk_is_transformers_clip():
    model = adapter()
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=5, num_attention_heads=4, image_size=42, patch_size=14,
        projection_dim=32, hidden_act="quick_gelu",
    )  # fmt: skip
    theirs = CLIPVisionModelWithProjection(config).eval()
    ours = {k: v for k, v in model.state_dict().items() if "btadapter" not in k and "balance" not in k}
    found = theirs.state_dict()
    renamed = {}
    for name in found:
        short = name.removeprefix("vision_model.").removeprefix("embeddings.").removeprefix("encoder.")
        renamed[name] = ours.pop(short) if short in ours else found[name]
    assert not ours, f"not in transformers' model: {sorted(ours)}"
    theirs.load_state_dict(renamed)
    pixels = clip(3)
    with torch.no_grad():
        states = theirs(pixels.flatten(0, 1), output_hidden_states=True).hidden_states
        for impl in ("eager", "vkernels"):
            taps = model.taps(pixels, 2, 5, impl)
            for tap, state in zip(taps, states[3:], strict=True):
                close(tap.flatten(0, 1), state)


def test_the_trunk_has_no_graph():
    x, z = adapter()(clip(4))
    assert not x.requires_grad
    assert z.requires_grad


# --- the branch is the paper's


@pytest.mark.parametrize("impl", ["eager", "vkernels"])
def test_a_temporal_layer_starts_as_the_identity(impl):
    fresh = BTAdapter(TRUNK, BranchConfig(layers=3, frames=6))
    z = torch.randn(2, 1 + 9 * 4, 64)
    assert torch.equal(fresh.btadapter_T_layers[0](z, 4, 4, impl), z)


@pytest.mark.parametrize("impl", ["eager", "vkernels"])
def test_the_cls_is_the_mean_of_separate_softmaxes(impl):
    model, t = adapter(), 4
    layer = model.btadapter_S_layers[0]
    z = torch.randn(1, 1 + PATCHES * t, 64)
    got = layer(z, t, t, impl)
    normed = layer.layer_norm1(z)[0]
    ones = []
    for frame in range(t):
        tokens = torch.cat([normed[:1], normed[1 + frame :: t]])
        q, k, v = (
            p(tokens).unflatten(-1, (4, 16))
            for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        weights = torch.einsum("nd,snd->ns", q[0], k).div(4).softmax(-1)
        ones.append(layer.self_attn.out_proj(torch.einsum("ns,snd->nd", weights, v).flatten()))
    cls = z[0, 0] + torch.stack(ones).mean(0)
    close(got[0, 0], cls + layer.mlp(layer.layer_norm2(cls)))
    q, k, v = (x[0] for x in layer.self_attn.project(normed[None]))
    joint = torch.einsum("ns,snd->nd", torch.einsum("nd,snd->ns", q[0], k).div(4).softmax(-1), v)
    assert (layer.self_attn.out_proj(joint.flatten()) - torch.stack(ones).mean(0)).norm() > 1e-3


@pytest.mark.parametrize("impl", ["eager", "vkernels"])
def test_a_compacted_tube_is_the_branch_without_the_dropped_patches(impl):
    """The dropped patches are removed from every softmax: a trunk that never had them gives the same branch."""
    model, t = adapter(), 4
    keep = tube_keep(1, t, PATCHES, 0.4, generator=torch.Generator().manual_seed(1))
    patches = keep[0, ::t] // t
    taps = [torch.randn(1, t, 1 + PATCHES, 64) for _ in range(3)]
    small = adapter(trunk=TrunkConfig(width=64, heads=4, layers=5, mlp=128, image=42, projection=32))
    small.load_state_dict(model.state_dict())
    rows = torch.cat([torch.tensor([0]), 1 + patches])
    with torch.no_grad():
        small.position_embedding = torch.nn.Embedding.from_pretrained(model.position_embedding.weight[rows])
    close(model.run_branch(taps, impl, keep), small.run_branch([tap[:, :, rows] for tap in taps], impl))


@pytest.mark.parametrize("impl", ["eager", "vkernels"])
def test_compat_grouping_attends_in_half_clips(impl):
    """With compat grouping over 6 frames a temporal layer is the same layer on frames 0..2 and on 3..5."""
    layer = adapter().btadapter_T_layers[1]
    z = torch.randn(1, 1 + PATCHES * 6, 64)
    patches = z[:, 1:].unflatten(1, (PATCHES, 6))
    got = layer(z, 6, 3, impl)[:, 1:].unflatten(1, (PATCHES, 6))
    for half in (slice(0, 3), slice(3, 6)):
        alone = torch.cat([z[:, :1], patches[:, :, half].flatten(1, 2)], dim=1)
        close(got[:, :, half].flatten(1, 2), layer(alone, 3, 3, impl)[:, 1:])


@pytest.mark.parametrize("impl", ["eager", "vkernels"])
def test_compat_grouping_reaches_the_layers(impl):
    model = adapter("compat")
    tap = torch.randn(1, 6, 1 + PATCHES, 64)
    start = model._start(tap, 6, 1, impl, None)
    expected = model.btadapter_S_layers[0](model.btadapter_T_layers[0](start, 6, 3, impl), 6, 3, impl)
    close(model.run_branch([tap], impl), expected)


def test_the_config_chooses_the_grouping(tmp_path):
    """A whole model in the published grouping: both implementations, other logits than the correct one, kept in files;
    clips that are averaged in pairs know no such thing."""
    config = preset("tiny_bt_llava")
    compat = replace(config, branch=replace(config.branch, grouping="compat"))
    right, published = (VideoLLM(each).init_weights(0).eval() for each in (config, compat))
    published.save_pretrained(tmp_path)
    again = VideoLLM.from_pretrained(tmp_path)
    assert again.config.branch.grouping == "compat"
    for frames, differ in ((8, True), (16, False)):
        pixels = clip(frames, 1)[0]
        logits = [published.generate(pixels, "what?", 3, impl).logits for impl in ("eager", "vkernels")]
        close(logits[1], logits[0], 1e-4)
        assert torch.equal(again.generate(pixels, "what?", 3).logits, logits[1])
        first = right.generate(pixels, "what?", 3).logits[0]
        assert bool((first - logits[1][0]).norm() > 1e-3 * first.norm()) == differ


def test_video_features_and_teacher_by_hand():
    """An open gate (w -> 1) leaves the trunk's CLS, a shut one the branch's; both are normalised, then projected."""
    model = adapter(pretraining=True)
    x, z = torch.randn(2, 3, 10, 64), torch.randn(2, 1 + 9 * 3, 64)
    for balance, source in ((1.0, x[:, :, 0]), (-1.0, z[:, :1])):
        with torch.no_grad():
            model.balance1.fill_(balance)
        normed = (source - source.mean(-1, keepdim=True)) / (source.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        normed = normed * model.post_layernorm.weight + model.post_layernorm.bias
        close(model.video_features(x, z), (normed @ model.visual_projection.weight.T).mean(1))
    x[:, :, 1:] = x[:, :1, 1:2]  # one token everywhere: whatever is kept, its features are these
    token = torch.nn.functional.layer_norm(x[:, 0, 1], (64,), model.post_layernorm.weight, model.post_layernorm.bias)
    teacher = model._teacher(x, z[:, 1:], None)
    close(teacher, (token @ model.visual_projection.weight.T)[:, None].expand_as(teacher))


@pytest.mark.parametrize("impl", ["eager", "vkernels"])
def test_merges_by_hand(impl):
    model, t = adapter(), 2
    x = torch.arange(2.0 * 10).view(1, 2, 10, 1).expand(-1, -1, -1, 64)  # token (frame, place) holds 10 frame + place
    z = 100 + torch.arange(1.0 + 9 * 2).view(1, -1, 1).expand(-1, -1, 64)  # 100 + its place in the branch
    chat = model.chat_tokens(x, z, impl)[0, :, 0]
    assert chat[-1] == ((0 + 10) / 2 + 100) / 2
    assert chat[3] == ((4 + 14) / 2 + 100 + (1 + 3 * t + 1 + 3 * t + 1) / 2) / 2
    frames = model.frame_tokens(x, z, impl)[0, :, :, 0]
    assert frames[1, 0] == (10 + 100) / 2
    assert frames[1, 4] == (14 + 100 + 1 + 3 * t + 1) / 2


# --- masks


def test_tubes_are_tubes_and_the_published_layout_is_not():
    t, l = 8, 256  # noqa: E741
    keep = tube_keep(200, t, l, 0.7, generator=torch.Generator().manual_seed(0))
    assert keep.shape == (200, 77 * t)
    assert bool((keep.diff(dim=1) > 0).all())
    grouped = keep.view(200, 77, t)
    assert bool((grouped % t == torch.arange(t)).all())
    ref = tube_keep(200, t, l, 0.7, layout="ref", generator=torch.Generator().manual_seed(0))
    assert bool((ref.diff(dim=1) > 0).all())
    groups = ref.view(200, 77, t)
    true_tubes = ((groups // t == groups[..., :1] // t) & (groups % t == torch.arange(t))).all(-1).float().mean()
    per_frame = torch.stack([(ref % t == frame).sum(1) for frame in range(t)])
    assert float(true_tubes) < 0.01  # none in 200 draws
    assert int(per_frame.min()) < 50
    assert int(per_frame.max()) > 110  # 24..152 where tubes have 77


def test_random_masks_keep_equally_many_and_repeat():
    a, b = (random_keep(3, 512, 0.43, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == (3, 512 - int(0.43 * 512))
    assert not torch.equal(a[0], a[1])
    generator = torch.Generator().manual_seed(0)
    rates = [dynamic_rate(generator) for _ in range(3000)]
    assert min(rates) >= 0.1
    assert max(rates) == 0.7
    assert abs(sum(rates) / len(rates) - 0.5) < 0.01


# --- losses


def test_contrast_by_hand():
    """Two orthogonal pairs at scale s: every direction costs log(1 + e^-s)."""
    features = torch.eye(2) * torch.tensor([[3.0], [0.5]])
    expected = 2 * torch.log1p(torch.exp(torch.tensor(-2.0)))
    torch.testing.assert_close(contrast(features, torch.eye(2), 2.0), expected)


def test_alignment_is_zero_along_the_teacher_and_its_gradient_orthogonal_to_the_student():
    teacher = torch.randn(5, 8)
    assert float(cosine_alignment(3 * teacher, teacher)) < 1e-6
    student = torch.randn(5, 8, requires_grad=True)
    cosine_alignment(student, teacher.requires_grad_()).backward()
    assert teacher.grad is None
    assert float((student.grad * student.detach()).sum(-1).abs().max()) < 1e-6


@pytest.mark.parametrize("impl", ["eager", "vkernels"])
def test_pretraining_learns(impl):
    """Some steps on four fixed pairs bring every loss down, and the trunk stays as it was."""
    torch.manual_seed(0)
    model = adapter(pretraining=True).train()
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    text, video = torch.randn(4, 32), clip(4, b=4)
    keep = tube_keep(4, 4, PATCHES, 0.7)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    history = []
    for _ in range(12):
        losses = model.pretraining_losses(*model(video, impl, keep), text, keep)
        optimiser.zero_grad()
        losses["total"].backward()
        optimiser.step()
        history.append({name: float(loss.detach()) for name, loss in losses.items()})
    assert history[-1]["total"] < 0.5 * history[0]["total"]
    assert history[-1]["alignment"] < history[0]["alignment"]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


# --- the text side


TEXT = TextTowerConfig(width=48, heads=4, layers=3, mlp=96, vocab=60, context=12, projection=32, end=59)


def test_text_tower_is_transformers_clip(tmp_path):
    """From the whole CLIP's file; texts of unequal length, whatever stands behind their end marks."""
    text = {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 60,
        "max_position_embeddings": 12, "eos_token_id": 59, "bos_token_id": 58, "pad_token_id": 1,
    }  # fmt: skip
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    tower = TextTower(TEXT)
    tower.load(tmp_path)
    ids = torch.randint(2, 58, (3, 9), generator=generator)
    ids[0, 8] = ids[1, 4] = ids[2, 0] = 59
    states = theirs.text_model(ids).last_hidden_state[[0, 1, 2], [8, 4, 0]]
    expected = theirs.text_projection(states)
    for impl in ("eager", "vkernels"):
        close(tower(ids, impl), expected)
    with pytest.raises(CheckpointError, match=r"encoder\.layers\.0\.mlp\.fc1\.weight \(96, 48\) for \(90, 48\)"):
        TextTower(replace(TEXT, mlp=90)).load(tmp_path)


def test_pretraining_trains_the_branch_alone_and_implementations_agree():
    torch.manual_seed(1)
    model = Pretraining(TRUNK, BranchConfig(layers=3, frames=6, drop_path=0.0, pretraining=True), TEXT)
    ids = torch.randint(0, 59, (2, 7))
    ids[:, -1] = 59
    keep, sides = tube_keep(2, 4, PATCHES, 0.5), []
    for impl in ("eager", "vkernels"):
        model.zero_grad()
        losses = model(clip(4), ids, keep, impl)
        losses["total"].backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        sides.append((losses, grads))
    assert all(any(part in n for part in ("btadapter", "extra_proj", "balance")) for n in sides[0][1])
    for name, loss in sides[0][0].items():
        torch.testing.assert_close(sides[1][0][name], loss, rtol=1e-4, atol=1e-5)
    largest = max(float(g.norm()) for g in sides[0][1].values())
    for name, grad in sides[0][1].items():
        assert (sides[1][1][name] - grad).norm() <= 1e-3 * grad.norm() + 1e-5 * largest, name


@pytest.mark.parametrize("impl", ["eager", "vkernels"])
def test_the_published_eva_branch_drops_whole_videos(impl):
    """Behind the MLP a video's tokens become zero, residual and all, or 1 / (1 - rate) of themselves."""
    model = adapter(drop_path=0.5, drop_whole=True).train()
    layer = model.btadapter_S_layers[2]
    z = torch.randn(64, 1 + PATCHES * 2, 64)
    torch.manual_seed(0)
    got = layer(z, 2, 2, impl)
    gone = (got == 0).flatten(1).all(1)
    assert 16 < int(gone.sum()) < 48
    layer.drop_whole = False
    torch.manual_seed(0)  # the same paths inside
    plain = layer(z, 2, 2, impl)
    close(got[~gone], 2 * plain[~gone])
    assert bool(((plain != 0).flatten(1).any(1)).all())
    assert bool((model.eval().btadapter_S_layers[2](z, 2, 2, impl) != 0).flatten(1).any(1).all())


# --- bad input


def test_text_refusals():
    tower = TextTower(TEXT)
    for ids, sentence in (
        (torch.zeros(1, 13, dtype=torch.int64), r"ids must be \(b s\) with s in 1\.\.12, got \(1, 13\)"),
        (torch.zeros(1, 0, dtype=torch.int64), r"ids must be \(b s\) with s in 1\.\.12, got \(1, 0\)"),
        (torch.zeros(1, 3, dtype=torch.int64), r"every text must hold its end mark 59, got \[\[0, 0, 0\]\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            tower(ids)
    with pytest.raises(ValueError, match=r"text\.projection must be the trunk's 32, got 16"):
        Pretraining(TRUNK, BranchConfig(layers=3, pretraining=True), replace(TEXT, projection=16))


def test_refusals():
    model = adapter()
    with pytest.raises(ValueError, match="frames must be 1 to 6, or even and at most twice that, got 7"):
        model(clip(7))
    with pytest.raises(ValueError, match="got 14"):
        model(clip(14))
    with pytest.raises(ValueError, match="frames must be 1 to 6, or even and at most twice that, got 0"):
        model.run_branch([torch.zeros(1, 0, 10, 64)] * 3)
    with pytest.raises(ValueError, match=r"layers must lie in 1\.\.5 and reach the output, got 1"):
        BTAdapter(replace(TRUNK, select_layer=-2), BranchConfig(layers=1))
    with pytest.raises(ValueError, match="frames must be even for compat grouping, got 5"):
        adapter("compat")(clip(5))
    with pytest.raises(ValueError, match=r"config: branch\.grouping must be correct or compat, got halves"):
        BranchConfig(grouping="halves")
    with pytest.raises(ValueError, match=r"config: branch\.output must be chat or frames, got video"):
        BranchConfig(output="video")
    with pytest.raises(ValueError, match=r"ratio must lie in \[0, 1\), got 1"):
        tube_keep(1, 4, 9, 1.0)
    with pytest.raises(ValueError, match="layout must be one of tube, ref, got 'frame'"):
        tube_keep(1, 4, 9, 0.5, layout="frame")
