"""ST-LLM: both implementations are one training step, and that step is the paper's.

The witnesses are transformers' Llama on each sample alone, and numbers worked by hand.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("einops")

from transformers import LlamaForCausalLM
from vkernels_video.model.config import DecoderConfig
from vkernels_video.model.decoder import Decoder
from vkernels_video.model.masking import random_keep
from vkernels_video.model.sequence import Example, inputs, lay
from vkernels_video.model.st_llm import GlobalLocal, MVMHead, mvm_loss, training_losses

CONFIG = DecoderConfig(width=64, heads=4, kv_heads=2, layers=2, mlp=96, vocab=50, context=64)
EXAMPLES = [
    Example([1, 2], [3, 4, 5], [6, 7, 8]),
    Example([], [9], [10]),
    Example([11, 12, 13], [], [14, 15]),
]
N = 20


def decoder(seed: int = 0) -> Decoder:
    model = Decoder(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2, generator=generator)
    return model


def video() -> Tensor:
    return torch.randn(3, N, 64, generator=torch.Generator().manual_seed(5))


def llama(model: Decoder) -> LlamaForCausalLM:
    theirs, weights = LlamaForCausalLM(model.llama), model.state_dict().items()
    theirs.load_state_dict({n if n.startswith("lm_head") else f"model.{n}": w for n, w in weights})
    return theirs.eval()


# --- the step is the paper's


@pytest.mark.parametrize("impl", ["eager", "vkernels"])
@pytest.mark.parametrize("dropped", [0.0, 0.43])
def test_answer_loss_is_transformers_loss_of_the_spliced_sequences(impl, dropped):
    model, rows = decoder(), video()
    keep = random_keep(3, N, dropped, torch.Generator().manual_seed(2)) if dropped else None
    got = training_losses(model, None, EXAMPLES, rows, keep, impl)["answer"]
    theirs, total, count = llama(model), torch.zeros(()), 0
    for i, example in enumerate(EXAMPLES):  # one by one: no padding, no packing
        own = rows[i] if keep is None else rows[i, keep[i]]
        before, after = (
            model.embed_tokens(torch.tensor(ids, dtype=torch.int64))
            for ids in (example.before, [*example.after, *example.answer])
        )
        logits = theirs(inputs_embeds=torch.cat([before, own, after])[None]).logits[0]
        learned = len(example.answer)
        total = total + torch.nn.functional.cross_entropy(
            logits[-learned - 1 : -1], torch.tensor(example.answer), reduction="sum"
        )
        count += learned
    torch.testing.assert_close(got, total / count, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("positions", ["compacted", "original"])
@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_implementations_agree_forward_and_backward(positions, kind):
    model, head, rows = decoder(), MVMHead(64), video()
    keep = random_keep(3, N, 0.5, torch.Generator().manual_seed(3))
    sides = []
    for impl in ("eager", "vkernels"):
        x = rows.clone().requires_grad_()
        model.zero_grad()
        head.zero_grad()
        losses = training_losses(model, head, EXAMPLES, x, keep, impl, kind=kind, positions=positions)
        losses["total"].backward()
        sides.append((losses, [x.grad, *(p.grad for p in [*model.parameters(), *head.parameters()])]))
    (eager, eager_grads), (fast, fast_grads) = sides
    assert fast.keys() == eager.keys() == {"answer", "mvm", "total"}
    for name, loss in eager.items():
        torch.testing.assert_close(fast[name], loss, rtol=1e-5, atol=1e-6)
    largest = max(float(g.norm()) for g in eager_grads)
    for a, b in zip(fast_grads, eager_grads, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6 * largest
    dropped = torch.ones(3, N, dtype=torch.bool).scatter_(1, keep, False)
    assert bool((fast_grads[0][dropped] == 0).all())


@pytest.mark.parametrize("impl", ["eager", "vkernels"])
def test_the_teacher_sees_everything_at_the_same_places(impl):
    """With nothing dropped student and teacher are the same states, and a head that is the identity leaves no loss."""
    model, head = decoder(), MVMHead(64)
    with torch.no_grad():
        head.head.weight.copy_(torch.eye(64))
        head.head.bias.zero_()
    head.norm = torch.nn.Identity()
    everything = torch.arange(N).expand(3, -1)
    assert abs(float(training_losses(model, head, EXAMPLES, video(), everything, impl)["mvm"].detach())) < 1e-6
    half = everything[:, ::2]
    assert float(training_losses(model, head, EXAMPLES, video(), half, impl)["mvm"].detach()) > 0.01


def test_positions_by_hand():
    keep = torch.tensor([[1, 4]])
    compacted = lay([Example([1], [2, 3], [4])], 2, packed=True)
    assert compacted.positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert compacted.predicting.tolist() == [4]
    original = lay([Example([1], [2, 3], [4])], 2, packed=True, keep=keep, uncut=6)
    assert original.positions.tolist() == [0, 2, 5, 7, 8, 9]
    both = lay([Example([1], [], [4]), Example([], [2, 3], [4, 5])], 2, packed=False)
    assert both.video.tolist() == [[1, 2], [6, 7]]
    assert both.predicting.tolist() == [2, 9, 10]
    assert both.targets.tolist() == [4, 4, 5]
    assert lay([Example([1], [], [4]), Example([], [2, 3], [4, 5])], 2, packed=True).video.tolist() == [[1, 2], [4, 5]]


def test_packed_rows_are_the_padded_rows_without_padding():
    model, rows = decoder(), video()
    keep = random_keep(3, N, 0.3, torch.Generator().manual_seed(4))
    sides = {}
    for impl in ("eager", "vkernels"):
        laid = lay(EXAMPLES, keep.shape[1], packed=impl != "eager")
        sides[impl] = inputs(EXAMPLES, rows, keep, model.embed_tokens, impl, laid), laid.lengths
    padded, lengths = sides["eager"]
    assert torch.equal(
        torch.cat([row[:length] for row, length in zip(padded, lengths, strict=True)]), sides["vkernels"][0][0]
    )


# --- global-local input


@pytest.mark.parametrize(
    ("t", "r", "chosen"),
    [
        (16, 4, [2, 6, 10, 14]),
        (20, 16, [0, 1, 2, 4, 5, 6, 8, 9, 10, 11, 12, 14, 15, 16, 18, 19]),
        (100, 16, [3, 9, 15, 22, 28, 34, 41, 47, 53, 59, 65, 72, 78, 84, 91, 97]),
    ],
)
@pytest.mark.parametrize("impl", ["eager", "vkernels"])
def test_global_local_starts_as_a_choice_of_frames(t, r, chosen, impl):
    x = torch.randn(2, t, 3, 8)
    assert torch.equal(GlobalLocal(8, 4)(x, r, impl), x[:, chosen])


def test_global_local_agrees_and_adds_the_mean():
    module = GlobalLocal(8, 4)
    torch.nn.init.normal_(module.up_proj.weight)
    x = torch.randn(2, 12, 3, 8, requires_grad=True)
    eager, fast = (module(x, 4, impl) for impl in ("eager", "vkernels"))
    torch.testing.assert_close(fast, eager, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(out.square().sum(), [x, *module.parameters()]) for out in (eager, fast)]
    for a, b in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    added = (fast - x[:, [1, 4, 8, 10]])[0]
    torch.testing.assert_close(added[0], added[3])
    expected = module.up_proj(module.down_proj(x[0].mean(0)).clamp(min=0))
    torch.testing.assert_close(added[0], expected, rtol=1e-4, atol=1e-5)


# --- refusals


def test_refusals():
    model, rows = decoder(), video()
    with pytest.raises(ValueError, match="ST-LLM: video and text must fit the decoder's 64 positions, got 88"):
        training_losses(model, None, EXAMPLES, torch.zeros(3, 80, 64), None)
    with pytest.raises(ValueError, match="positions must be compacted or original, got 'kept'"):
        training_losses(model, None, EXAMPLES, rows, None, positions="kept")
    with pytest.raises(ValueError, match="video must hold 2 samples, got 3"):
        training_losses(model, None, EXAMPLES[:2], rows, None)
    with pytest.raises(ValueError, match="examples must hold an answer to learn from, got none"):
        training_losses(model, None, [Example([1], [2], [])], rows[:1], None)
    with pytest.raises(ValueError, match="kind must be cosine or mse, got 'l1'"):
        mvm_loss(rows, rows, "l1")


def test_lora_of_the_peft_library_learns_alike_on_both_implementations():
    peft = pytest.importorskip("peft", reason="the PEFT library is not installed")
    model, rows = decoder(), video()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(0, 0.2, generator=generator)
    keep = random_keep(3, N, 0.5, torch.Generator().manual_seed(3))
    sides = []
    for impl in ("eager", "vkernels"):
        loss = training_losses(model, None, EXAMPLES, rows, keep, impl)["answer"]
        sides.append((loss, *torch.autograd.grad(loss, list(trained.values()))))
    for eager, ours in zip(*sides, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)
