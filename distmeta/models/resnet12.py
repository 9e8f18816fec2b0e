"""The residual network of the few-shot literature (Oreshkin et al. 2018, §4; widths of Lee et al. 2019, §4.1)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from distmeta.errors import InputError
from distmeta.models.conv4 import Norm, Width, build_norm


class ResNet12(nn.Module):
    """x [N, C, H, W] -> [N, out_features]: four residual blocks, the average of the last map, and one linear layer.

    Args:
        widths: channels of the four blocks. The default is that of Lee et al. 2019; (64, 128, 256, 512) is TADAM's.
        norm: as in `conv4`.
        dropout: probability in [0, 1) of dropout on the output of each block, seeded per task. MetaOptNet has 0.1, and
            DropBlock in the last two blocks, which we do not have.

    Raises:
        InputError: the inputs are not images.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_features: int,
        widths: Annotated[list[Width], Field(min_length=4, max_length=4)] = [64, 160, 320, 640],  # noqa: B006
        norm: Norm = "batch",
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ):
        super().__init__()
        if len(in_shape) != 3:
            raise InputError(
                f"model.type: got resnet12 for inputs of shape {in_shape}, expected images (C, H, W)"
            )
        channels = in_shape[0]
        side = min(in_shape[1:])
        blocks = []
        for width in widths:
            blocks.append(ResidualBlock(channels, width, norm, side >= 2, dropout))
            channels = width
            side = max(side // 2, 1)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, out_features)

    def features(self, x_NCHW: Tensor) -> Tensor:
        """Return the inputs of the head, [N, features]."""
        return self.blocks(x_NCHW).mean((2, 3))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.head(self.features(x_NCHW))


class ResidualBlock(nn.Module):
    """Three 3×3 convolutions with a shortcut: maxpool₂ₓ₂(leaky(h + norm(conv₁ₓ₁(x)))).

    h = conv₃ ∘ conv₂ ∘ conv₁(x), each with its norm, the first two with a leaky ReLU of slope 0.1.

    Args:
        halves: whether the block pools, which a map of one pixel does not allow.
    """

    def __init__(self, channels: int, width: int, norm: Norm, halves: bool, dropout: float):
        super().__init__()
        layers: list[nn.Module] = []
        for k, in_channels in enumerate((channels, width, width)):
            layers.append(nn.Conv2d(in_channels, width, 3, padding=1, bias=norm == "none"))
            layers.append(build_norm(norm, width))
            if k < 2:
                layers.append(nn.LeakyReLU(0.1))
        self.convolutions = nn.Sequential(*layers)
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=norm == "none"), build_norm(norm, width)
        )
        self.after = nn.Sequential(
            nn.LeakyReLU(0.1),
            nn.MaxPool2d(2) if halves else nn.Identity(),
            nn.Dropout(dropout) if dropout else nn.Identity(),
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.after(self.convolutions(x_NCHW) + self.shortcut(x_NCHW))
