"""Films of digits and the trainer: films follow their rules and seeds, a run resumes bit by bit, training learns."""

import json
import re
from dataclasses import replace

import pytest
import torch

for module in ("transformers", "einops", "sklearn", "matplotlib", "rich"):
    pytest.importorskip(module)

from vkernels_video import jobs, sight, train  # noqa: E402
from vkernels_video.digits import CELL, KINDS, QUESTIONS, Studio, pictures  # noqa: E402
from vkernels_video.jobs import JOBS  # noqa: E402
from vkernels_video.model import VideoLLM, preset  # noqa: E402
from vkernels_video.model.st_llm import training_losses  # noqa: E402
from vkernels_video.model.videollm import END  # noqa: E402
from vkernels_video.train import Recipe, Run, accuracy, answers, plot  # noqa: E402

SMALL = Recipe(steps=12, size=3, warm_up=2, frames=4, sight=0)


def cells(film) -> torch.Tensor:
    """Which places of the board hold a digit: [t 3 3] bool."""
    board = film.frames[:, 0].unfold(1, CELL, CELL).unfold(2, CELL, CELL)
    return (board > -1).flatten(3).any(-1)


# --- films


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [8, 16])
def test_the_same_seed_makes_the_same_film(kind, frames):
    one, two = (Studio(7, "train", frames).film(kind) for _ in range(2))
    assert torch.equal(one.frames, two.frames)
    assert (one.question, one.answer, one.kind) == (two.question, two.answer, kind)
    assert one.frames.shape == (frames, 3, 24, 24)
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
        first, last = shown[0].nonzero()[:, 0].tolist(), shown[-1].nonzero()[:, 0].tolist()
        assert sorted(first) == sorted(last) == [0, 2]


@pytest.mark.parametrize("kind", ["moves", "first", "when"])
@pytest.mark.parametrize("frames", [8, 16, 64])
def test_the_mean_of_the_frames_does_not_know_the_order(kind, frames):
    """Every digit is shown as long as the others, and as long where it ends as where it began."""
    studio = Studio(4, frames=frames)
    for _ in range(10):
        shown = cells(studio.film(kind)).sum(0)
        if kind == "moves":
            assert torch.equal(shown, shown.flip(0))
        elif kind == "first":
            assert set(shown[shown > 0].tolist()) == {frames // 2}
        else:
            assert set(shown[shown > 0].tolist()) == {frames}


def test_the_digit_asked_for_stands_at_its_time():
    """Each quarter shows one digit; the picture of the quarter asked for is one of the answer's, and of no other's."""
    studio = Studio(2, "test")
    for _ in range(20):
        film = studio.film("when")
        part = int(film.question[-1]) - 1
        frame = film.frames[2 * part, 0]
        row, column = (int(x) for x in cells(film)[2 * part].nonzero()[0])
        cell = frame[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL].numpy()
        holders = [digit for digit, images in studio.images.items() if any((image == cell).all() for image in images)]
        assert holders == [int(film.answer)]


def test_a_flash_is_short_and_its_digit_is_asked_for():
    for frames in (4, 64):
        film = Studio(3, frames=frames, kinds=("flash",)).film()
        shown = cells(film).flatten(1).sum(0)
        assert sorted(shown.tolist())[-2:] == [frames, frames]
        assert 1 <= min(shown[shown > 0]) <= max(frames // 8, 1)


def test_of_what_was_shot_every_nth_frame_is_shown():
    shot, shown = Studio(9, frames=16).film("when"), Studio(9, frames=4, every=4).film("when")
    assert torch.equal(shown.frames, shot.frames[::4])
    assert shown.answer == shot.answer


def test_pictures_hold_what_their_labels_say():
    boards, labels = pictures(0, 30)
    shown = (boards[:, 0].unfold(1, CELL, CELL).unfold(2, CELL, CELL) > -1).flatten(3).any(-1).flatten(1)
    assert torch.equal(shown, labels < 10)
    assert not torch.equal(pictures(1, 30)[1], labels)


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
    with pytest.raises(ValueError, match="kind must be one of moves"):
        Studio(0, kinds=("moves", "sum"))
    with pytest.raises(ValueError, match="kind must be one of moves, first, count, when, flash, got 'sum'"):
        Studio(0).film("sum")


# --- training


QUICK = {
    "st_llm": SMALL,
    "branch": replace(JOBS["branch"].recipe, steps=12, size=4, warm_up=2, sight=0),
    "heads": replace(JOBS["heads"].recipe, steps=12, size=3, warm_up=2, frames=5, sight=0),
}


@pytest.mark.parametrize("what", JOBS)
def test_a_run_resumes_bit_by_bit(what, tmp_path):
    whole, first = Run(QUICK[what]), Run(QUICK[what])
    for _ in range(6):
        whole.advance()
    for _ in range(3):
        first.advance()
    first.save(tmp_path)
    torch.randn(3)  # what came before does not matter
    second = Run.resume(tmp_path)
    assert (second.step, second.recipe) == (3, QUICK[what])
    for _ in range(3):
        second.advance()
    assert second.losses == whole.losses
    assert len(set(whole.losses)) == 6
    pairs = zip(second.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(ValueError, match="must hold a saved run, got none"):
        Run.resume(tmp_path / "nowhere")


def test_dropped_paths_resume_too(tmp_path, monkeypatch):
    """What a model draws from torch's own generator follows from the step as well."""
    monkeypatch.setattr(jobs, "BRANCH", replace(jobs.BRANCH, drop_path=0.5))
    losses = []
    for before in (1, 2):
        torch.manual_seed(before)
        run = Run(QUICK["branch"])
        losses.append([run.advance()["total"] for _ in range(2)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("what", "named"), [("branch", ("btadapter", "extra_proj")), ("heads", ("task",))])
def test_what_is_frozen_stays(what, named):
    """The branch learns beside its trunk and text tower, the heads behind their encoder: and all of them do."""
    run = Run(QUICK[what])
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    for _ in range(2):  # behind a temporal_fc of zeros there is no gradient yet
        run.advance()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in run.model.named_parameters() if p.grad is not None}
    assert all(any(part in name for part in named) for name in moved)
    modules = {"branch": ("T_layers.1", "S_layers.1", "extra_proj"), "heads": ("translator", "layers.1", "now", "next")}
    assert all(any(part in name for name in moved) for part in modules[what])


@pytest.mark.parametrize("what", JOBS)
def test_losses_fall(what):
    """The same step again and again, which is the same films."""
    run = Run(QUICK[what])
    for _ in range(20):
        run.step = 2
        run.advance()
    assert run.losses[-1] < 0.6 * run.losses[0], run.losses
    run.model.eval()
    right = JOBS[what].hits(run.model, run.recipe, 6, 1)
    assert sum(map(len, right.values())) == 6
    assert right == JOBS[what].hits(run.model, replace(run.recipe, impl="eager"), 6, 1)


@pytest.mark.parametrize("what", ["branch", "heads"])
def test_implementations_train_other_models_alike(what):
    losses = []
    for impl in ("eager", "vkernels"):
        run = Run(replace(QUICK[what], impl=impl))
        losses.append([run.advance()["total"] for _ in range(3)])
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-3, atol=1e-3)


def test_models_begin_with_the_encoder_that_was_taught():
    """The branch's spatial layers are the trunk's last blocks, its temporal ones the identity."""
    seer, _ = jobs.seen(SMALL)
    taught = seer.encoder.state_dict()
    video = JOBS["branch"].build(QUICK["branch"])[0].video
    for encoder in (video, JOBS["heads"].build(QUICK["heads"])[0].encoder):
        assert all(torch.equal(encoder.state_dict()[name], weight) for name, weight in taught.items())
    for spatial, temporal, block in zip(video.btadapter_S_layers, video.btadapter_T_layers, video.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(spatial.parameters(), block.parameters(), strict=True))
        assert not temporal.temporal_fc.weight.any()


def test_the_newest_digit_is_the_label():
    """Until the first digit comes there is nobody; then every change of the label is a digit more on the board."""
    pixels, labels = jobs.newest(Studio(3, frames=16))
    board = pixels[:, 0].unfold(1, CELL, CELL).unfold(2, CELL, CELL)
    count = (board > -1).flatten(3).any(-1).flatten(1).sum(1)
    assert int(count[-1]) == 3
    assert torch.equal(count == 0, labels == jobs.NOBODY)
    assert torch.equal(count.diff() > 0, labels.diff() != 0)


def test_a_unit_alone_knows_no_past():
    """The same units in another order give the same scores, in that order; with a past they do not."""
    torch.manual_seed(0)
    units, order = torch.randn(2, 6, 9, 64), torch.tensor([3, 0, 5, 1, 4, 2])
    for alone in (True, False):
        model = jobs.Watcher(preset("digits").encoder, alone)
        now = model(units)["now"][:, order]
        assert torch.allclose(model(units[:, order])["now"], now, atol=1e-5) == alone


def test_captions_are_told_apart_once_read():
    tower = jobs.JOBS["branch"].build(QUICK["branch"])[0].text
    captions = jobs.caption_ids(["which digit goes up 3", "which digit goes up 7", "how many digits 3"])
    assert captions.shape == (3, 22)
    assert captions[2, -5:].tolist() == [END] * 5

    def nearest() -> float:
        one = torch.nn.functional.normalize(tower(captions), dim=-1)
        return float((one @ one.T - 2 * torch.eye(3)).max())

    before = nearest()
    jobs.teach_to_read(tower, replace(QUICK["branch"], kinds=("moves", "count")))
    assert nearest() < 0.9 < 0.99 < before
    assert not any(p.requires_grad for p in tower.parameters())


def test_runs_are_refused():
    with pytest.raises(ValueError, match="train: what must be one of st_llm, branch, heads, got 'mvm'"):
        Run(replace(SMALL, what="mvm"))
    with pytest.raises(ValueError, match="train: preset must have a per-frame encoder for heads, got tiny"):
        Run(replace(QUICK["heads"], preset="tiny"))
    with pytest.raises(SystemExit):
        train.main(["--out", "nowhere", "--what", "heads", "--ship", "nowhere"])


@pytest.mark.parametrize("name", ["digits", "tiny_st_llm_qa", "tiny"])
def test_sight_teaches_every_encoder_and_freezes_it(name):
    config = preset(name)
    config = replace(config, encoder=replace(config.encoder, image=24, patch=8))
    model = VideoLLM(config).init_weights(0)
    before = {key: p.clone() for key, p in model.encoder.named_parameters()}
    assert 0.0 <= sight.learn(model, 2, seed=0, size=8) <= 1.0
    taught = {key for key, p in model.encoder.named_parameters() if not torch.equal(p, before[key])}
    assert any("layers" in key for key in taught)
    learning = {key for key, p in model.encoder.named_parameters() if p.requires_grad}
    assert bool(learning) == (config.branch is not None)
    assert all("btadapter" in key or "balance" in key for key in learning)


def test_sight_recognises_digits():
    """After 30 steps more than twice what chance would."""
    assert sight.learn(VideoLLM(preset("digits")).init_weights(0), 30, seed=0, size=32) > 0.2


def test_implementations_train_alike():
    losses = []
    for impl in ("eager", "vkernels"):
        run = Run(replace(SMALL, impl=impl, mvm=True))
        losses.append([run.advance()["total"] for _ in range(3)])
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-3, atol=1e-4)


def test_training_learns_a_batch_by_heart():
    """The same four films again and again: their answers come back, in both implementations alike."""
    run = Run(replace(SMALL, mask=False, rate=2e-3))
    films = [Studio(5, frames=4).film(kind) for kind in QUESTIONS]
    model = run.model
    pixels = torch.stack([film.frames for film in films])
    for _ in range(40):
        rows = model.visual(model.features(pixels)).flatten(1, 2)
        loss = training_losses(model.decoder, None, [train.example(film) for film in films], rows, None)["total"]
        run.optimiser.zero_grad()
        loss.backward()
        run.optimiser.step()
    model.eval()
    told = [film.answer for film in films]
    assert answers(model, films) == answers(model, films, "eager") == told


def test_results_and_curve(tmp_path):
    found = accuracy(Run(SMALL).model, films=16)
    assert found.keys() == {*QUESTIONS, "all"}
    assert sum(found[kind]["films"] for kind in QUESTIONS) == found["all"]["films"] == 16
    assert all(0.0 <= of["low"] <= of["share"] <= of["high"] <= 1.0 for of in found.values())
    plot([3.0, 2.0, 1.0], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_trains_and_goes_on(tmp_path, capsys):
    assert train.main(["--out", str(tmp_path), "--steps", "2", "--size", "2", "--films", "4", "--sight", "2"]) == 0
    assert {"model.safetensors", "loss.png", "result.json", "trainer.pt"} <= {file.name for file in tmp_path.iterdir()}
    assert train.main(["--out", str(tmp_path), "--resume", "--films", "4", "--ship", str(tmp_path / "ship")]) == 0
    assert VideoLLM.from_pretrained(tmp_path / "ship").config == preset("digits")
    assert json.loads((tmp_path / "ship" / "recipe.json").read_text())["recipe"]["sight"] == 2
    assert re.search(r"all +\d+.\d% .*on 4 films", capsys.readouterr().out)


@pytest.mark.parametrize("what", ["branch", "heads"])
def test_the_command_trains_them_all(what, tmp_path, capsys):
    out = ["--out", str(tmp_path), "--films", "6"]
    assert train.main([*out, "--what", what, "--steps", "2", "--size", "2", "--sight", "0", "--tubes", "0.5"]) == 0
    saved = json.loads((tmp_path / "recipe.json").read_text())
    assert (saved["what"], saved["steps"], saved["tubes"]) == (what, 2, 0.5)
    assert train.main([*out, "--resume"]) == 0
    assert {"model.safetensors", "loss.png", "result.json"} <= {file.name for file in tmp_path.iterdir()}
    assert re.search(r"all +\d+.\d% .*on 6 films", capsys.readouterr().out)


def test_the_preset_is_small_enough_to_ship():
    with torch.device("meta"):
        model = VideoLLM(preset("digits"))
    assert sum(p.numel() for p in model.parameters()) * 4 <= 8e6
