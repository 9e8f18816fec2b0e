"""Domains: one class seen in several ways. Fixed image shifts, and which rows of two domains face each other.

An episode's support is drawn from one domain and its query from another, so a learner is scored where it did not
adapt. Shapes: images N, C, H, W.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

Domain = Literal["original", "inverted", "blurred", "noisy", "slanted"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)

NOISE = 0.4
"""Standard deviation of the noise, as a part of the whole range of a pixel."""
_NOISE_KEY = 0x646F6D61696E73  # "domains"; of no run, so that a drawing has the same noise in all


def shifted(images_NCHW: np.ndarray, domain: Domain, ink: int) -> np.ndarray:
    """The drawings as a domain shows them, uint8 in 0..ink, paper at 0; a pure function of the drawings.

    inverted: ink − x. blurred: the binomial 3×3 filter (1 2 1)ᵀ(1 2 1) / 16, paper around the image. noisy: plus a
    normal of deviation `NOISE` · ink, cut to the range; image n always has noise n. slanted: a row moves to the right
    by half a pixel for each row that it is above the middle, linear between pixels, with paper coming in.
    """
    assert images_NCHW.dtype == np.uint8, images_NCHW.dtype
    assert images_NCHW.max(initial=0) <= ink, images_NCHW.max()
    if domain == "original":
        return images_NCHW
    x_NCHW = images_NCHW.astype(np.int64)
    if domain == "inverted":
        shown = ink - x_NCHW
    elif domain == "blurred":
        shown = _blurred(x_NCHW)
    elif domain == "noisy":
        generator = np.random.Generator(np.random.Philox(key=_NOISE_KEY))
        noise_NCHW = generator.standard_normal(x_NCHW.shape)  # in order of n: no image sees how many follow
        shown = np.rint(x_NCHW + NOISE * ink * noise_NCHW).clip(0, ink)
    else:
        shown = _slanted(x_NCHW)
    return shown.astype(np.uint8)


def facing(
    support_rows: np.ndarray, query_rows: np.ndarray, drawing_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A class's rows in two domains, position by position: one drawing is never at two positions.

    drawing_N: the drawing that each row shows. What both domains show comes first, in the drawings' order; then
    what either shows alone, in its order; the longer list is cut. Positions are drawn without replacement, so no
    drawing is in both parts of an episode.
    """
    drawings = drawing_N[support_rows], drawing_N[query_rows]
    _, i, j = np.intersect1d(*drawings, assume_unique=True, return_indices=True)
    both = (
        np.concatenate([support_rows[i], np.delete(support_rows, i)]),
        np.concatenate([query_rows[j], np.delete(query_rows, j)]),
    )
    count = min(map(len, both))
    return both[0][:count], both[1][:count]


def _blurred(x_NCHW: np.ndarray) -> np.ndarray:
    for axis in (2, 3):
        paper = [(0, 0)] * 4
        paper[axis] = (1, 1)
        wide = np.pad(x_NCHW, paper)
        before, here, after = (np.take(wide, np.arange(k, k + x_NCHW.shape[axis]), axis) for k in range(3))
        x_NCHW = before + 2 * here + after
    return (x_NCHW + 8) // 16


def _slanted(x_NCHW: np.ndarray) -> np.ndarray:
    """In quarters of a pixel, which is exact."""
    height, width = x_NCHW.shape[2:]
    wide = np.pad(x_NCHW, [(0, 0), (0, 0), (0, 0), (height, height)])
    rows = []
    for row in range(height):
        whole, quarters = divmod(2 * row - (height - 1), 4)  # to the left
        left = height + whole
        a, b = (wide[:, :, row, k : k + width] for k in (left, left + 1))
        rows.append(((4 - quarters) * a + quarters * b + 2) // 4)
    return np.stack(rows, axis=2)
