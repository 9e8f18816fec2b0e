"""Domains: the same class seen in several ways. Image shifts, and pairs of rows from two domains.

The support set of an episode comes from one domain and its query set from another, so a learner is scored where it did
not adapt. Shapes: images N, C, H, W.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Domain = Literal["original", "inverted", "blurred", "noisy", "slanted"]

NOISE = 0.4
"""Standard deviation of the noise as a fraction of the range of a pixel."""
_NOISE_KEY = 0x646F6D61696E73
"""Does not depend on the run's seed, so a drawing has the same noise in all runs. (The bytes spell "domains".)"""


def shift_images(images_NCHW: np.ndarray, domain: Domain, ink: int) -> np.ndarray:
    """Return the drawings as a domain shows them: uint8 from 0 (paper) to `ink`.

    - inverted: ink − x.
    - blurred: the binomial 3×3 filter (1 2 1)ᵀ(1 2 1) / 16, with paper around the image.
    - noisy: plus normal noise of standard deviation `NOISE` · ink, clipped to the range. Image n always has noise n.
    - slanted: each row moves to the right by half a pixel per row above the middle, linear between pixels.
    """
    assert images_NCHW.dtype == np.uint8, images_NCHW.dtype
    assert images_NCHW.max(initial=0) <= ink, images_NCHW.max()
    if domain == "original":
        return images_NCHW
    x_NCHW = images_NCHW.astype(np.int64)
    if domain == "inverted":
        shifted = ink - x_NCHW
    elif domain == "blurred":
        shifted = _blur(x_NCHW)
    elif domain == "noisy":
        generator = np.random.Generator(np.random.Philox(key=_NOISE_KEY))
        # drawn in the order of n, so an image's noise does not depend on later images
        noise_NCHW = generator.standard_normal(x_NCHW.shape)
        shifted = np.rint(x_NCHW + NOISE * ink * noise_NCHW).clip(0, ink)
    else:
        shifted = _slant(x_NCHW)
    return shifted.astype(np.uint8)


def pair_drawings(
    support_rows: np.ndarray, query_rows: np.ndarray, drawing_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Order a class's rows in two domains so that no drawing is at two different positions.

    An episode draws positions without replacement, so no drawing is then in both its support and its query set.

    Args:
        support_rows, query_rows: the class's rows in the two domains.
        drawing_N: the drawing that each row of the store shows.

    Returns:
        Support rows and query rows of the same length. Drawings that both domains have come first, in the order of
        their numbers. Then come those that only one domain has, in their own order. The longer list is cut.
    """
    _, i, j = np.intersect1d(
        drawing_N[support_rows], drawing_N[query_rows], assume_unique=True, return_indices=True
    )
    support = np.concatenate([support_rows[i], np.delete(support_rows, i)])
    query = np.concatenate([query_rows[j], np.delete(query_rows, j)])
    count = min(len(support), len(query))
    return support[:count], query[:count]


def _blur(x_NCHW: np.ndarray) -> np.ndarray:
    for axis in (2, 3):
        paper = [(0, 0)] * 4
        paper[axis] = (1, 1)
        padded = np.pad(x_NCHW, paper)
        before, here, after = (np.take(padded, np.arange(k, k + x_NCHW.shape[axis]), axis) for k in range(3))
        x_NCHW = before + 2 * here + after
    return (x_NCHW + 8) // 16


def _slant(x_NCHW: np.ndarray) -> np.ndarray:
    """Move each row by a multiple of a quarter of a pixel, in exact integers."""
    height, width = x_NCHW.shape[2:]
    padded = np.pad(x_NCHW, [(0, 0), (0, 0), (0, 0), (height, height)])
    rows = []
    for row in range(height):
        pixels_left, quarters = divmod(2 * row - (height - 1), 4)
        start = height + pixels_left
        near = padded[:, :, row, start : start + width]
        far = padded[:, :, row, start + 1 : start + 1 + width]
        rows.append(((4 - quarters) * near + quarters * far + 2) // 4)
    return np.stack(rows, axis=2)
