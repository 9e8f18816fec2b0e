"""Small random affine warps of training images, drawn with the task.

Shapes: R images, C channels, H, W.
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
from distmeta.seeding import uniforms


class Jitter(NamedTuple):
    """The largest warp; each number is drawn uniformly from -limit to limit, for every image by itself."""

    rotate: float = 0.0
    """Degrees."""
    scale: float = 0.0
    """Height and width, each by itself, are multiplied by 1 - scale to 1 + scale."""
    shear: float = 0.0
    """Pixels sideways for each pixel down."""
    shift: float = 0.0
    """Pixels, along each axis."""


_BELOW = Jitter(rotate=180.0, scale=0.9, shear=2.0, shift=math.inf)
NUMBERS = 6
"""Uniforms an image: rotation, width, height, shear, shift across, shift down."""
PART = 3
"""Of a task's random numbers, beside those of `sampling`."""


def checked(options: dict[str, float]) -> dict[str, float]:
    """The options of a job's `tasks.jitter`, as they are.

    Raises:
        InputError: an unknown name, or a limit out of range.
    """
    for name, limit in options.items():
        if name not in Jitter._fields:
            raise InputError(f"tasks.jitter.{name}: got an unknown key, {did_you_mean(name, Jitter._fields)}")
        most = getattr(_BELOW, name)
        if not 0 <= limit <= most or limit == math.inf:
            whole = f"a number from 0 to {most:g}" if most < math.inf else "a number of pixels, 0 or more"
            raise InputError(f"tasks.jitter.{name}: got {limit}, expected {whole}")
    return options


JitterOptions = Annotated[dict[str, float], AfterValidator(checked)]
"""The fields of a `Jitter` as a job has them; a limit left out is 0."""


def drawn(limits: Jitter, ids: Sequence[Any] | np.ndarray, images: int) -> np.ndarray:
    """Warps of `images` images of each task: float64 [T, images, NUMBERS], see `warped`.

    What else a task draws is the same with jitter and without.
    """
    unit = uniforms(ids, images * NUMBERS, PART).reshape(len(ids), images, NUMBERS)
    most = (math.radians(limits.rotate), limits.scale, limits.scale, limits.shear, limits.shift, limits.shift)
    return (2 * unit - 1) * most


def jittered(x_RCHW: Tensor, limits: Jitter, ids: Sequence[Any] | np.ndarray, support: int) -> Tensor:
    """The images of the tasks `ids`, all support rows before all query rows, `support` of a task; warped."""
    images = len(x_RCHW) // len(ids)
    warps = drawn(limits, ids, images)
    parts = (warps[:, :support], warps[:, support:])
    return warped(x_RCHW, np.concatenate([part.reshape(-1, NUMBERS) for part in parts]))


def warped(images: Tensor, warps: np.ndarray) -> Tensor:
    """Each image under its own affine map about its centre, bilinear; what comes in from outside is 0.

        p' = R(angle) · [[1, shear], [0, 1]] · diag(1 + width, 1 + height) · p + shift,   p = (across, down)

    images: float [R, C, H, W]. warps: [R, NUMBERS]: radians (counter-clockwise as seen), width and height as changes
    of the factor 1, shear, pixels to the right, pixels down. An image's result does not depend on the others.
    """
    height, width = images.shape[-2:]
    angle, wider, higher, shear, right, down = warps.T
    cos, sin, zero = np.cos(angle), np.sin(angle), np.zeros_like(angle)
    across, along = np.stack([cos, -sin], 1), np.stack([sin, cos], 1)  # y points down
    turn = np.stack([across, along], 2)
    slant = np.stack([np.stack([1 + wider, zero], 1), np.stack([shear * (1 + higher), 1 + higher], 1)], 2)
    back = np.linalg.inv(turn @ slant)  # from a place in the result to its source
    start = -back @ np.stack([right, down], 1)[..., None]
    place_x = (np.arange(width) - (width - 1) / 2).astype(np.float32)
    place_y = (np.arange(height) - (height - 1) / 2).astype(np.float32)
    back_32, start_32 = back.astype(np.float32), start[..., 0].astype(np.float32)
    grid = np.empty((len(images), height, width, 2), np.float32)
    for axis, half in ((0, width / 2), (1, height / 2)):  # places as grid_sample counts them, -1 to 1
        rows = back_32[:, axis, 1, None] * place_y + start_32[:, axis, None]
        columns = back_32[:, axis, 0, None] * place_x
        np.add(rows[:, :, None], columns[:, None, :], out=grid[..., axis])
        grid[..., axis] /= np.float32(half)
    places = torch.from_numpy(grid).to(images.dtype)
    return F.grid_sample(images, places, mode="bilinear", padding_mode="zeros", align_corners=False)
