"""The four-block convolutional network of the few-shot literature (Vinyals et al. 2016, §4.1.1)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from distmeta.core import InputError

Norm = Literal["batch", "group", "layer", "none"]


class Conv4(nn.Module):
    """x [N, C, H, W] -> [N, out_features]: four blocks of 3×3 convolution, norm, ReLU, halving; one linear layer.

    Args:
        width: channels of each block; 64 for Omniglot, 32 for miniImageNet in the MAML paper.
        norm: `batch` uses the statistics of the batch at hand in training and evaluation alike, as MAML's code
            does: no running statistics exist, so none leak between tasks. Scoring a query set with its own
            statistics is *transductive*: a prediction depends on the other queries. `group`, `layer` and `none`
            are not.
        pool: `max` halves by 2×2 max pooling, as often as the image allows; `stride` by strided convolutions, and
            averages the last map, as the MAML paper does on Omniglot (§5.2), with fewer operations.

    Convolutions have no bias before a batch norm, which would cancel it: its gradient is pure noise.

    Raises:
        InputError: the inputs are not images.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_features: int,
        width: Annotated[int, Field(ge=1)] = 64,
        norm: Norm = "batch",
        pool: Literal["max", "stride"] = "max",
    ):
        super().__init__()
        if len(in_shape) != 3:
            raise InputError(
                f"model.type: got conv4 for inputs of shape {in_shape}, expected images (C, H, W)"
            )
        channels, side = in_shape[0], min(in_shape[1:])
        self.pool = pool
        blocks, sides = [], list(in_shape[1:])
        for k in range(4):
            halves = pool == "max" and side >= 2  # a map of one pixel stays one
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(
                        channels if k == 0 else width,
                        width,
                        3,
                        stride=2 if pool == "stride" else 1,
                        padding=1,
                        bias=norm == "none",
                    ),
                    _norm(norm, width),
                    nn.ReLU(),
                    nn.MaxPool2d(2) if halves else nn.Identity(),
                )
            )
            if halves:
                side, sides = side // 2, [s // 2 for s in sides]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width * math.prod(sides) if pool == "max" else width, out_features)

    def features(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, features]."""
        maps = self.blocks(x_NCHW)
        return maps.flatten(1) if self.pool == "max" else maps.mean((2, 3))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.head(self.features(x_NCHW))


def _norm(norm: str, width: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(width, track_running_stats=False)
    if norm == "group":  # groups of 4 channels or more: one channel of one pixel has no variance
        groups = next(g for g in (8, 4, 2, 1) if width % g == 0 and (width >= 4 * g or g == 1))
        return nn.GroupNorm(groups, width)
    if norm == "layer":
        return nn.GroupNorm(1, width)
    return torch.nn.Identity()
