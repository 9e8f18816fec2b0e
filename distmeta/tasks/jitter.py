"""Small random affine warps of training images, drawn with the task.

Shapes: R images, C channels, H, W; U uniform numbers per image (`WARP_NUMBERS`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor

from distmeta.errors import InputError, did_you_mean
from distmeta.seeding import draw_uniforms


class JitterLimits(NamedTuple):
    """The largest warp. Each number of a warp is uniform from -limit to limit, for every image independently."""

    rotate: float = 0.0
    """Degrees."""
    scale: float = 0.0
    """Height and width are each multiplied by a factor from 1 - scale to 1 + scale."""
    shear: float = 0.0
    """Pixels sideways per pixel down."""
    shift: float = 0.0
    """Pixels, along each axis."""


_HIGHEST = JitterLimits(rotate=180.0, scale=0.9, shear=2.0, shift=math.inf)
WARP_NUMBERS = 6
"""Uniform numbers per image: rotation, width, height, shear, shift across, shift down."""
PART = 3
"""The part of a task's random numbers that gives its warps; `tasks.sampling` has other parts."""


def check_jitter(options: dict[str, float]) -> dict[str, float]:
    """Return the options of a job's `tasks.jitter` unchanged.

    Raises:
        InputError: an unknown name, or a limit out of range.
    """
    for name, limit in options.items():
        if name not in JitterLimits._fields:
            hint = did_you_mean(name, JitterLimits._fields)
            raise InputError(f"tasks.jitter.{name}: got an unknown key, {hint}")
        highest = _HIGHEST._asdict()[name]
        if not 0 <= limit <= highest or limit == math.inf:
            expected = f"a number from 0 to {highest:g}"
            if highest == math.inf:
                expected = "a number of pixels, 0 or more"
            raise InputError(f"tasks.jitter.{name}: got {limit}, expected {expected}")
    return options


JitterOptions = Annotated[dict[str, float], AfterValidator(check_jitter)]
"""The fields of `JitterLimits` as a job has them. A limit that is left out is 0."""


def draw_warps(limits: JitterLimits, ids: Sequence[Any] | np.ndarray, images: int) -> np.ndarray:
    """Draw the warps of `images` images of each task, float64 [T, images, U]; see `warp_images`.

    They do not change what else a task draws.
    """
    unit = draw_uniforms(ids, images * WARP_NUMBERS, PART).reshape(len(ids), images, WARP_NUMBERS)
    angle = math.radians(limits.rotate)
    largest = (angle, limits.scale, limits.scale, limits.shear, limits.shift, limits.shift)
    return (2 * unit - 1) * largest


def jitter_images(
    x_RCHW: Tensor, limits: JitterLimits, ids: Sequence[Any] | np.ndarray, support: int
) -> Tensor:
    """Warp the images of the tasks `ids`: first all tasks' support rows, `support` per task, then all query rows."""
    images = len(x_RCHW) // len(ids)
    warps_TRU = draw_warps(limits, ids, images)
    support_warps = warps_TRU[:, :support].reshape(-1, WARP_NUMBERS)
    query_warps = warps_TRU[:, support:].reshape(-1, WARP_NUMBERS)
    return warp_images(x_RCHW, np.concatenate([support_warps, query_warps]))


def warp_images(images: Tensor, warps: np.ndarray) -> Tensor:
    """Warp each image by its own affine map about its centre, with bilinear interpolation and zeros outside.

        p' = R(angle) · [[1, shear], [0, 1]] · diag(1 + width, 1 + height) · p + shift,   p = (across, down)

    The result of one image does not depend on the others.

    Args:
        images: float [R, C, H, W].
        warps: [R, U]: angle in radians, counter-clockwise as seen; width and height as changes of the factor 1; shear;
            pixels to the right; pixels down.
    """
    height, width = images.shape[-2:]
    matrix, offset = _invert_maps(warps)
    matrix_R22 = matrix.astype(np.float32)
    offset_R2 = offset.astype(np.float32)
    x_W = (np.arange(width) - (width - 1) / 2).astype(np.float32)
    y_H = (np.arange(height) - (height - 1) / 2).astype(np.float32)
    grid_RHW2 = np.empty((len(images), height, width, 2), np.float32)
    for axis, half in ((0, width / 2), (1, height / 2)):  # grid_sample's coordinates go from -1 to 1
        rows = matrix_R22[:, axis, 1, None] * y_H + offset_R2[:, axis, None]
        columns = matrix_R22[:, axis, 0, None] * x_W
        np.add(rows[:, :, None], columns[:, None, :], out=grid_RHW2[..., axis])
        grid_RHW2[..., axis] /= np.float32(half)
    grid = torch.from_numpy(grid_RHW2).to(images.dtype)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _invert_maps(warps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return matrices [R, 2, 2] and offsets [R, 2] that map a position of the result to its source."""
    angle, width, height, shear, right, down = warps.T
    cos = np.cos(angle)
    sin = np.sin(angle)
    zero = np.zeros_like(angle)
    rotation = _stack_matrix(cos, sin, -sin, cos)  # y points down
    stretch = _stack_matrix(1 + width, shear * (1 + height), zero, 1 + height)
    inverse = np.linalg.inv(rotation @ stretch)
    offset = -inverse @ np.stack([right, down], 1)[..., None]
    return inverse, offset[..., 0]


def _stack_matrix(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Return [[a, b], [c, d]] for each image, [R, 2, 2]."""
    return np.stack([np.stack([a, b], 1), np.stack([c, d], 1)], 1)
