"""The four-block convolutional network of the few-shot literature (Vinyals et al. 2016, §4.1.1)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor

from distmeta.errors import InputError
from distmeta.protocols import to_float32

Norm = Literal["batch", "group", "layer", "none"]
Width = Annotated[int, Field(ge=1)]


class Conv4(nn.Module):
    """x [N, C, H, W] -> [N, out_features]: four blocks of 3×3 convolution, norm, ReLU, halving; one linear layer.

    Args:
        width: channels of each block, or of the four; 64 for Omniglot, 32 for miniImageNet in the MAML paper.
        norm: `batch` uses the statistics of the batch at hand in training and evaluation alike, as MAML's code
            does: no running statistics exist, so none leak between tasks. Scoring a query set with its own
            statistics is *transductive*: a prediction depends on the other queries. `group`, `layer` and `none`
            are not.
        pool: `max` halves by 2×2 max pooling, as often as the image allows; `stride` by strided convolutions, and
            averages the last map, as the MAML paper does on Omniglot (§5.2), with fewer operations.
        halvings: how many blocks halve, from the first on. With 3 the last map of a 28×28 image is 3×3, or 4×4 by
            strides: features know where in the image they are.
        average: the features are the average of the last map; else the map itself. Default: as `pool` says.

    Convolutions have no bias before a batch norm, which would cancel it: its gradient is pure noise.

    Raises:
        InputError: the inputs are not images.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_features: int,
        width: Width | Annotated[list[Width], Field(min_length=4, max_length=4)] = 64,
        norm: Norm = "batch",
        pool: Literal["max", "stride"] = "max",
        halvings: Annotated[int, Field(ge=0, le=4)] = 4,
        average: bool | None = None,
    ):
        super().__init__()
        if len(in_shape) != 3:
            raise InputError(
                f"model.type: got conv4 for inputs of shape {in_shape}, expected images (C, H, W)"
            )
        widths = [width] * 4 if isinstance(width, int) else width
        channels, sides = in_shape[0], list(in_shape[1:])
        self.average = pool == "stride" if average is None else average
        blocks = []
        for k, wide in enumerate(widths):
            halves = k < halvings and (pool == "stride" or min(sides) >= 2)  # no pool makes one pixel fewer
            stride = 2 if halves and pool == "stride" else 1
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(channels, wide, 3, stride=stride, padding=1, bias=norm == "none"),
                    norm_of(norm, wide),
                    nn.ReLU(),
                    nn.MaxPool2d(2) if halves and pool == "max" else nn.Identity(),
                )
            )
            channels = wide
            if halves:
                sides = [side // 2 if pool == "max" else (side + 1) // 2 for side in sides]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels * (1 if self.average else math.prod(sides)), out_features)

    def features(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, features]."""
        maps = self.blocks(x_NCHW)
        return maps.mean((2, 3)) if self.average else maps.flatten(1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.head(self.features(x_NCHW))


class BatchNorm(nn.BatchNorm2d):
    """Under vmap in float32: of bfloat16 its vmapped derivative mixes two types, which torch (2.13) refuses (pytorch
    issue 184890)."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return super().forward(to_float32(x_NCHW) if _vmapped(x_NCHW) else x_NCHW)


def _vmapped(x: Tensor) -> bool:
    """Whether any of the transforms around x is vmap."""
    while is_functorch_wrapped_tensor(x):
        if is_batchedtensor(x):
            return True
        x = get_unwrapped(x)
    return False


def norm_of(norm: str, width: int) -> nn.Module:
    if norm == "batch":
        return BatchNorm(width, track_running_stats=False)
    if norm == "group":  # groups of 4 channels or more: one channel of one pixel has no variance
        groups = next(g for g in (8, 4, 2, 1) if width % g == 0 and (width >= 4 * g or g == 1))
        return nn.GroupNorm(groups, width)
    if norm == "layer":
        return nn.GroupNorm(1, width)
    return torch.nn.Identity()
