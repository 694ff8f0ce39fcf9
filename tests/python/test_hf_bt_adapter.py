"""BT-Adapter's layers as they are published, written here again from their description: names, arguments and layout are
theirs, on a CLIP attention (that of transformers 5 and the form of transformers 4) and on EVA's.

Planted, one at a time, and seen red: the CLS given the temporal layer's step; frames and patches of the grid swapped;
the axes of the layers swapped; EVA's biases of q and v swapped; the factor of a dropped tube on the wrong tokens; the
frames of CLIP's module ignored; a layer that computes something else replaced all the same; `t` or the modes not put
back after the comparison.
"""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from test_hf_apply import state
from transformers import CLIPVisionConfig
from transformers.models.clip import modeling_clip
from vkernels_video.integrations import eras
from vkernels_video.integrations import transformers as vkt

C, HEADS, FRAMES, PATCHES = 32, 4, 6, 5


def folded(x, t):
    """Tokens 1 + p*t, patch-major: the sequences of every patch (b*p t c), and of every frame behind its CLS."""
    b, s, c = x.shape
    grid = x[:, 1:].reshape(b, (s - 1) // t, t, c)
    tubes = grid.reshape(-1, t, c)
    frames = torch.cat([x[:, None, :1].expand(b, t, 1, c), grid.transpose(1, 2)], 2)
    return tubes, frames.flatten(0, 1)


def unfolded(frames, b, t):
    """Frames behind their CLS (b*t 1+p c) as tokens; the CLS is the mean."""
    grid = frames.unflatten(0, (b, t))
    return torch.cat([grid[:, :, 0].mean(1, keepdim=True), grid[:, :, 1:].transpose(1, 2).flatten(1, 2)], 1)


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x / keep * torch.rand(len(x), 1, 1, dtype=x.dtype).add(keep).floor()


class CLIPMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)

    def forward(self, hidden_states):
        h = self.fc1(hidden_states)
        return self.fc2(h * torch.sigmoid(1.702 * h))


class CLIPAttention(nn.Module):
    """In the form of transformers 4."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.scale, self.dropout = HEADS, (C // HEADS) ** -0.5, 0.0
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(C, C) for _ in range(4))

    def forward(self, hidden_states, attention_mask=None, causal_attention_mask=None, output_attentions=False):
        q, k, v = (
            p(hidden_states).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = (self.scale * q @ k.transpose(-1, -2)).softmax(-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2)), None


def clip_of_today():
    config = CLIPVisionConfig(hidden_size=C, num_attention_heads=HEADS)
    config._attn_implementation = "sdpa"
    return modeling_clip.CLIPAttention(config)


class BTAdapterLayer_Time(nn.Module):
    def __init__(self, attention, drop=0.0):
        super().__init__()
        self.self_attn, self.layer_norm1 = attention, nn.LayerNorm(C)
        self.proj_drop = nn.Dropout(0)
        self.dropout_layer = DropPath(drop) if drop else nn.Identity()
        self.temporal_fc = nn.Linear(C, C)
        self.t = 8

    def forward(self, hidden_states, attention_mask=None, causal_attention_mask=None):
        x = self.layer_norm1(folded(hidden_states, self.t)[0])
        x = self.self_attn(x, attention_mask, causal_attention_mask=causal_attention_mask, output_attentions=False)[0]
        x = self.temporal_fc(self.dropout_layer(self.proj_drop(x)))
        x = x.reshape(len(hidden_states), -1, C) + hidden_states[:, 1:]
        return torch.cat((hidden_states[:, :1], x), 1)


class BTAdapterLayer_Spatial(nn.Module):
    def __init__(self, attention, drop=0.0):
        super().__init__()
        self.self_attn, self.layer_norm1 = attention, nn.LayerNorm(C)
        self.mlp, self.layer_norm2 = CLIPMLP(), nn.LayerNorm(C)
        self.proj_drop = nn.Dropout(0)
        self.dropout_layer = DropPath(drop) if drop else nn.Identity()
        self.t = 8

    def forward(self, hidden_states, attention_mask, causal_attention_mask):
        x = self.layer_norm1(folded(hidden_states, self.t)[1])
        x = self.self_attn(x, attention_mask, causal_attention_mask=causal_attention_mask, output_attentions=False)[0]
        x = hidden_states + unfolded(self.dropout_layer(self.proj_drop(x)), len(hidden_states), self.t)
        return x + self.mlp(self.layer_norm2(x))


class CLIPLayer_AttnTime(BTAdapterLayer_Time):
    """The chat model's name for it."""


class Attention(nn.Module):
    """EVA's: one matrix, biases for q and v."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.scale = HEADS, (C // HEADS) ** -0.5
        self.qkv, self.proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(C)), nn.Parameter(torch.zeros(C))
        self.relative_position_bias_table = None
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x, rel_pos_bias=None):
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        q, k, v = (
            y.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for y in nn.functional.linear(x, self.qkv.weight, bias).chunk(3, -1)
        )
        weights = self.attn_drop((self.scale * q @ k.transpose(-1, -2)).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class BTAdapter_Temp(nn.Module):
    def __init__(self, drop=0.0):
        super().__init__()
        self.drop_path = DropPath(drop) if drop else nn.Identity()
        self.attn, self.norm1 = Attention(), nn.LayerNorm(C, 1e-6)
        self.temporal_fc = nn.Linear(C, C)

    def forward(self, x, T):
        step = self.temporal_fc(self.drop_path(self.attn(self.norm1(folded(x, T)[0]))))
        return torch.cat((x[:, :1], x[:, 1:] + step.reshape(len(x), -1, C)), 1)


class BTAdapter_Spatial(nn.Module):
    def __init__(self, drop=0.0):
        super().__init__()
        self.drop_path = DropPath(drop) if drop else nn.Identity()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(C), Attention(), nn.LayerNorm(C)
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))

    def forward(self, x, T):
        x = x + unfolded(self.drop_path(self.attn(self.norm1(folded(x, T)[1]))), len(x), T)
        return self.drop_path(x + self.mlp(self.norm2(x)))


class Branch(nn.Module):
    """Two layers, each time, then space."""

    def __init__(self, kind, drop=0.0):
        super().__init__()
        self.kind, self.T = kind, FRAMES
        make = {"clip4": CLIPAttention, "clip5": clip_of_today, "eva": None}[kind]
        first = [CLIPLayer_AttnTime, BTAdapterLayer_Time] if make else [BTAdapter_Temp] * 2
        second = [BTAdapterLayer_Spatial if make else BTAdapter_Spatial] * 2
        given = () if make is None else (make,)
        self.btadapter_T_layers = nn.ModuleList(layer(*(g() for g in given), drop) for layer in first)
        self.btadapter_S_layers = nn.ModuleList(layer(*(g() for g in given), drop) for layer in second)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.dim() > 1 or "bias" in name:
                    p.normal_(0, 0.25)

    def forward(self, x):
        for time, space in zip(self.btadapter_T_layers, self.btadapter_S_layers, strict=True):
            if self.kind == "eva":
                x = space(time(x, self.T), self.T)
            else:
                time.t = space.t = self.T
                x = space(time(x), None, None)
        return x


KINDS = [("eva", eras), ("clip4", eras), ("clip5", vkt), ("eva", vkt)]


def tokens(b=2, t=FRAMES):
    return torch.randn(b, 1 + PATCHES * t, C)


def run(model, x, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    out = model(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in model.parameters())], torch.rand(1)


def close(got, want):
    largest = max(float(w.abs().max()) for w in want[1:])
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(float(b.abs().max()), largest / 10)


@pytest.mark.parametrize(("kind", "library"), KINDS)
def test_both_layers_are_replaced_whole_forward_and_backward_and_put_back(kind, library):
    model, x = Branch(kind).eval(), tokens()
    want, _ = run(model, x)
    before = state(model)
    report = library.apply(model)
    whole = [seam for seam in report.seams if seam.kind == "divided"]
    assert sum(seam.modules for seam in whole) == 4
    got, _ = run(model, x)
    close(got, want)
    assert report.calls["divided"] == 4
    assert not report.calls.get("attention") and not any(seam.stock_calls for seam in whole)  # noqa: PT018
    verified = report.verify({"x": x}, tolerance=1e-5)
    assert (verified.calls_before, verified.calls_after) == ((0 if (kind, library) == ("eva", vkt) else 4), 4)
    assert not any("computes attention itself" in str(left) for left in report.left)
    library.restore(model)
    assert state(model) == before
    assert all(torch.equal(a, b) for a, b in zip(run(model, x)[0], want, strict=True))


@pytest.mark.parametrize("kind", ["clip4", "eva"])
def test_half_the_frames_group_as_the_published_layers_do(kind):
    """The chat model tells its layers half of the frames: halves of the clip over time, two frames to a softmax."""
    model, x = Branch(kind).eval(), tokens()
    model.T = FRAMES // 2
    want = run(model, x)[0]
    eras.apply(model)
    close(run(model, x)[0], want)
    model.T = 1
    ours = run(model, x)[0]
    eras.restore(model)
    close(ours, run(model, x)[0])


@pytest.mark.parametrize("kind", ["clip4", "eva"])
def test_stochastic_depth_draws_what_stock_draws(kind):
    """Tubes are dropped here, by the same draws; frames by stock, as a mean over frames cannot be parted; counted."""
    model, x = Branch(kind, drop=0.5).train(), tokens()
    want, after = run(model, x, seed=3)
    report = eras.apply(model)
    assert model.training
    got, after_ours = run(model, x, seed=3)
    close(got, want)
    assert torch.equal(after, after_ours)
    space = next(seam for seam in report.seams if seam.where.endswith("Spatial"))
    assert dict(space.stock_calls) == {"stochastic depth per frame while training": 2}
    assert report.calls["divided"] == 2
    assert report.calls["attention"] == 2  # in those two


def test_what_a_layer_is_not_given_by_its_adapter_goes_to_stock():
    layer = BTAdapterLayer_Spatial(CLIPAttention()).eval()
    report, x = eras.apply(layer), tokens()
    with pytest.raises(RuntimeError):
        layer(x[:, :-1], None, None)  # as stock: no whole number of frames
    layer.t = FRAMES
    want = type(layer).forward(layer, x, None, None)
    torch.testing.assert_close(layer(x, torch.zeros(1), None), want)  # stock's test attention ignores it
    assert dict(report.seams[0].stock_calls) == {"a mask is given": 1, "tokens are no whole number of 8 frames": 1}
    layer.self_attn.dropout = 0.5
    layer.train()(x, None, None)
    assert report.seams[0].stock_calls["dropout while training"] == 1


class Sums(BTAdapterLayer_Time):
    """A layer of the same names, arguments and parts that computes something else."""

    def forward(self, hidden_states, attention_mask=None, causal_attention_mask=None):
        return 2 * super().forward(hidden_states) - hidden_states


class Told(BTAdapterLayer_Spatial):
    def forward(self, hidden_states, attention_mask, T):
        return super().forward(hidden_states, attention_mask, None)


def bare(layer):
    del layer.temporal_fc
    return layer


@pytest.mark.parametrize("library", [eras, vkt])
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Told(CLIPAttention()), r"Told.forward takes \(hidden_states, attention_mask, T\)"),
        (lambda: bare(BTAdapterLayer_Time(CLIPAttention())), "BTAdapterLayer_Time has no temporal_fc"),
        (lambda: BTAdapterLayer_Time(Attention()), "has no self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"),
        (lambda: Sums(CLIPAttention()), "Sums computes something else than divided attention over time"),
    ],
)
def test_another_structure_of_the_same_name_is_refused_and_left_as_it_was(library, make, sentence):
    layer = nn.Sequential(make(), BTAdapterLayer_Spatial(CLIPAttention())).train()
    if hasattr(layer[0], "temporal_fc"):
        for parameter in layer[0].temporal_fc.parameters():  # as training starts: it must not hide the difference
            nn.init.zeros_(parameter)
    before, random = state(layer), torch.get_rng_state()
    with pytest.raises(vkt.MissingSeam, match=sentence):
        library.apply(layer)
    assert state(layer) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in layer.modules())
    report = library.apply(layer, strict=False)
    assert [seam.where for seam in report.seams if seam.kind == "divided"] == ["BTAdapterLayer_Spatial"]
    assert any(sentence.split(" ")[0] in str(left) or "has no" in str(left) for left in report.left)


def test_instances_that_are_not_served_are_left_with_a_reason():
    several, biased, bound = Branch("clip4"), Branch("eva"), Branch("clip4")
    several.btadapter_T_layers[0].num_cls = 2
    biased.btadapter_S_layers[1].attn.relative_position_bias_table = nn.Parameter(torch.zeros(3, HEADS))
    bound.btadapter_S_layers[0].forward = bound.btadapter_S_layers[0].forward
    reasons = {several: "2 CLS tokens", biased: "relative position bias", bound: "bound to the instance already"}
    for model, reason in reasons.items():
        report = eras.apply(model)
        assert any(left.kind == "divided" and reason in left.why for left in report.left)
        assert sum(seam.modules for seam in report.seams if seam.kind == "divided") == 3


@pytest.mark.parametrize("kind", ["clip4", "eva"])
def test_half_precision_weights_with_norms_in_single(kind):
    """As the EVA tower is loaded: matrices in half precision, norms and biases in single, under autocast."""
    model, x = Branch(kind).eval(), tokens()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = model(x)
        report = eras.apply(model)
        got = model(x)
    assert report.calls["divided"] == 4
    assert (got - want).abs().max() <= 3e-2 * want.abs().max()


def test_it_compiles_whole():
    model, x = Branch("eva").eval(), tokens(1)
    eras.apply(model)
    want = model(x)
    got = torch.compile(model, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(got, want)
