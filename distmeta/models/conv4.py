"""The four-block convolutional network of the few-shot literature (Vinyals et al. 2016, §4.1.1)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from distmeta.errors import InputError

Norm = Literal["batch", "group", "layer", "none"]
Width = Annotated[int, Field(ge=1)]


class Conv4(nn.Module):
    """x [N, C, H, W] -> [N, out_features]: four blocks of 3×3 convolution, norm, ReLU and halving; one linear layer.

    Convolutions have no bias before a norm. A batch norm would cancel it, so its gradient would be noise.

    Args:
        width: channels of every block, or a list of four; 64 for Omniglot and 32 for miniImageNet in the MAML paper.
        norm: `batch` uses the statistics of the batch in training and in evaluation, as MAML's code does. There are no
            running statistics that could leak from task to task. A query set that is scored with its own statistics is
            *transductive*: a prediction depends on the other queries. `group`, `layer` and `none` are not.
        pool: `max`: halve by 2×2 max pooling, as often as the image allows. `stride`: halve by strided convolutions and
            average the last map, as the MAML paper does for Omniglot (§5.2); it needs fewer operations.
        halvings: how many blocks halve, counted from the first. With 3, the last map of a 28×28 image is 3×3 (4×4 with
            strides), so the features know where in the image they are.
        average: average the last map to get the features, or use the map itself; null: average with `pool: stride`.

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
        in_channels = in_shape[0]
        sides = list(in_shape[1:])
        self.average = pool == "stride" if average is None else average
        blocks = []
        for k, out_channels in enumerate(widths):
            halves = k < halvings and (pool == "stride" or min(sides) >= 2)  # a pool cannot halve one pixel
            stride = 2 if halves and pool == "stride" else 1
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=norm == "none"),
                    build_norm(norm, out_channels),
                    nn.ReLU(),
                    nn.MaxPool2d(2) if halves and pool == "max" else nn.Identity(),
                )
            )
            in_channels = out_channels
            if halves:
                sides = [side // 2 if pool == "max" else (side + 1) // 2 for side in sides]
        self.blocks = nn.Sequential(*blocks)
        map_size = 1 if self.average else math.prod(sides)
        self.head = nn.Linear(in_channels * map_size, out_features)

    def features(self, x_NCHW: Tensor) -> Tensor:
        """Return the inputs of the head, [N, features]."""
        maps = self.blocks(x_NCHW)
        return maps.mean((2, 3)) if self.average else maps.flatten(1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.head(self.features(x_NCHW))


def build_norm(norm: str, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels, track_running_stats=False)
    if norm == "group":
        # Groups have at least 4 channels, because a single channel of a one-pixel map has no variance.
        groups = next(g for g in (8, 4, 2, 1) if channels % g == 0 and (channels >= 4 * g or g == 1))
        return nn.GroupNorm(groups, channels)
    if norm == "layer":
        return nn.GroupNorm(1, channels)
    return nn.Identity()
