"""Films of digits and the trainer: films follow their rules and seeds, a run resumes bit by bit, training learns."""

from dataclasses import replace

import pytest
import torch

for module in ("transformers", "einops", "sklearn", "matplotlib", "rich"):
    pytest.importorskip(module)

from vkernels_video import train  # noqa: E402
from vkernels_video.digits import CELL, KINDS, Studio  # noqa: E402
from vkernels_video.model import VideoLLM, preset  # noqa: E402
from vkernels_video.train import Recipe, Run, accuracy, answers, plot  # noqa: E402

SMALL = Recipe(steps=12, size=3, warm_up=2, frames=4)


def cells(film) -> torch.Tensor:
    """Which places of the board hold a digit: [t 4 4] bool."""
    board = film.frames[:, 0].unfold(1, CELL, CELL).unfold(2, CELL, CELL)
    return (board > -1).flatten(3).any(-1)


# --- films


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [8, 16])
def test_the_same_seed_makes_the_same_film(kind, frames):
    one, two = (Studio(7, "train", frames).film(kind) for _ in range(2))
    assert torch.equal(one.frames, two.frames)
    assert (one.question, one.answer, one.kind) == (two.question, two.answer, kind)
    assert one.frames.shape == (frames, 3, 32, 32)
    assert float(one.frames.min()) == -1.0
    assert not torch.equal(one.frames, Studio(8, "train", frames).film(kind).frames)


def test_counted_digits_are_there():
    studio = Studio(0)
    for _ in range(40):
        film = studio.film("count")
        assert int(cells(film).any(0).sum()) == int(film.answer)


def test_moving_digits_cross_the_board():
    studio = Studio(1)
    for _ in range(20):
        shown = cells(studio.film("moves"))
        assert bool((shown.flatten(1).sum(1) == 2).all())
        first, last = shown[0].nonzero()[:, 1].tolist(), shown[-1].nonzero()[:, 1].tolist()
        assert sorted(first) == sorted(last) == [0, 3]


def test_the_digit_asked_for_stands_at_its_time():
    """Each quarter shows one digit; the picture of the quarter asked for is one of the answer's, and of no other's."""
    studio = Studio(2, "test")
    for _ in range(20):
        film = studio.film("when")
        part = int(film.question[-2]) - 1
        frame = film.frames[2 * part, 0]
        row, column = (int(x) for x in cells(film)[2 * part].nonzero()[0])
        cell = frame[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL].numpy()
        holders = [digit for digit, images in studio.images.items() if any((image == cell).all() for image in images)]
        assert holders == [int(film.answer)]


def test_training_and_test_share_no_image():
    train_images, test_images = Studio(0, "train").images, Studio(0, "test").images
    seen = {image.tobytes() for images in train_images.values() for image in images}
    assert not any(image.tobytes() in seen for images in test_images.values() for image in images)
    assert sum(map(len, train_images.values())) + sum(map(len, test_images.values())) == 1797


def test_refusals():
    with pytest.raises(ValueError, match="split must be train or test, got 'all'"):
        Studio(0, "all")
    with pytest.raises(ValueError, match="frames must be at least 4, got 3"):
        Studio(0, frames=3)
    with pytest.raises(ValueError, match="kind must be one of moves, first, count, when, got 'sum'"):
        Studio(0).film("sum")


# --- training


def test_a_run_resumes_bit_by_bit(tmp_path):
    whole, first = Run(SMALL), Run(SMALL)
    for _ in range(6):
        whole.advance()
    for _ in range(3):
        first.advance()
    first.save(tmp_path)
    second = Run.resume(tmp_path)
    assert second.step == 3
    for _ in range(3):
        second.advance()
    assert second.losses == whole.losses
    pairs = zip(second.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(ValueError, match="must hold a saved run, got none"):
        Run.resume(tmp_path / "nowhere")


def test_implementations_train_alike():
    losses = []
    for impl in ("eager", "vkernels"):
        run = Run(replace(SMALL, impl=impl, mvm=True))
        losses.append([run.advance()["total"] for _ in range(3)])
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-3, atol=1e-4)


def test_training_learns_a_batch_by_heart():
    """The same four films again and again: their answers come back, in both implementations alike."""
    run = Run(replace(SMALL, mask=False, rate=2e-3))
    films = [Studio(5, frames=4).film(kind) for kind in KINDS]
    model = run.model
    pixels = torch.stack([film.frames for film in films])
    for _ in range(40):
        rows = model.visual(model.features(pixels)).flatten(1, 2)
        loss = train.training_losses(model.decoder, None, [train.example(film) for film in films], rows, None)["total"]
        run.optimiser.zero_grad()
        loss.backward()
        run.optimiser.step()
    model.eval()
    told = [film.answer for film in films]
    assert answers(model, films) == answers(model, films, "eager") == told


def test_results_and_curve(tmp_path):
    found = accuracy(Run(SMALL).model, films=16)
    assert found.keys() == {*KINDS, "all"}
    assert all(0.0 <= share <= 1.0 for share in found.values())
    plot([3.0, 2.0, 1.0], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_trains_and_goes_on(tmp_path, capsys):
    assert train.main(["--out", str(tmp_path), "--steps", "2", "--size", "2", "--films", "4"]) == 0
    assert {"model.safetensors", "loss.png", "result.json", "trainer.pt"} <= {file.name for file in tmp_path.iterdir()}
    assert train.main(["--out", str(tmp_path), "--resume", "--films", "4"]) == 0
    assert '"all"' in capsys.readouterr().out


def test_the_preset_is_small_enough_to_ship():
    with torch.device("meta"):
        model = VideoLLM(preset("digits"))
    assert sum(p.numel() for p in model.parameters()) * 4 <= 8e6
