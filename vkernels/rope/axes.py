"""Which axis (0 t, 1 h, 2 w, 3 extra, -1 none) each pair follows, by the names the schemes are known by."""

from __future__ import annotations

from collections.abc import Sequence


def chunked(sections: Sequence[int]) -> tuple[int, ...]:
    """Qwen2-VL, Qwen2.5-VL, GLM-4V: T x a, H x b, W x c."""
    return tuple(axis for axis, size in enumerate(sections) for _ in range(size))


def interleaved(sections: Sequence[int]) -> tuple[int, ...]:
    """Qwen3-VL and later: all T, then H at 1, 4, .. below 3 b and W at 2, 5, .. below 3 c."""
    axes = [0] * sum(sections)
    for axis in (1, 2):
        for j in range(axis, min(3 * sections[axis], len(axes)), 3):
            axes[j] = axis
    return tuple(axes)


def spatial_first(sections: Sequence[int]) -> tuple[int, ...]:
    """VideoRoPE and ERNIE-4.5-VL: H and W alternate, T takes the slowest pairs. Sections are (t, h, w)."""
    t, h, w = sections
    return (1, 2) * min(h, w) + (1,) * (h - min(h, w)) + (2,) * (w - min(h, w)) + (0,) * t


def videorope_shifted(sections: Sequence[int]) -> tuple[int, ...]:
    """VideoRoPE as re-implemented with slices 1::2 and 2::2: T first, H W alternating one later."""
    t, h, w = sections
    axes = [0] * (t + h + w)
    for j in range(1, h + w):
        axes[j] = 1 if j % 2 else 2
    return tuple(axes)


def hope(sections: Sequence[int]) -> tuple[int, ...]:
    """HoPE for video: VideoRoPE's spatial pairs; the temporal ones do not turn."""
    return tuple(-1 if axis == 0 else axis for axis in spatial_first(sections))


def ernie(sections: Sequence[int]) -> tuple[int, ...]:
    """ERNIE writes its sections (h, w, t)."""
    h, w, t = sections
    return spatial_first((t, h, w))


def repeat(pattern: Sequence[int], pairs: int) -> tuple[int, ...]:
    """MM-RoPE (0, 0, 1, 2, 1, 2, 1, 2) and VRoPE (0, 1, 2, 3)."""
    return tuple(pattern[j % len(pattern)] for j in range(pairs))


def per_head(heads: Sequence[int], pairs: int) -> tuple[tuple[int, ...], ...]:
    """MHRoPE: all pairs of one kv head follow one axis, `heads` says how many heads per axis; -1 rows are appended by
    the caller for heads that do not turn."""
    return tuple((axis,) * pairs for axis, count in enumerate(heads) for _ in range(count))


NAMED = {
    "mrope": chunked,
    "glm4v": chunked,
    "mrope_interleaved": interleaved,
    "videorope": spatial_first,
    "videorope_shifted": videorope_shifted,
    "hope": hope,
    "ernie": ernie,
}
