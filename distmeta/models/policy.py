"""A Gaussian policy. (`mlp` is a categorical one: its outputs are logits.)"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from distmeta.errors import InputError
from distmeta.models.mlp import ACTIVATIONS


class Gaussian(nn.Module):
    """x [..., *in_shape] -> [..., 2A]: means by a multi-layer perceptron, and learned logarithms of deviations.

    The deviations do not depend on x; they are parameters, adapted as all others. The default is the policy of
    MAML §5.3: two hidden layers of 100, ReLU; its code starts at `std` 1.

    Args:
        out_features: 2A, of a task family with A real actions.
        std: deviation at the start.
        min_std: none is smaller.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_features: int,
        hidden: list[Annotated[int, Field(ge=1)]] = [100, 100],  # noqa: B006
        activation: Literal["relu", "tanh"] = "relu",
        std: Annotated[float, Field(gt=0)] = 1.0,
        min_std: Annotated[float, Field(gt=0)] = 1e-6,
    ):
        super().__init__()
        if out_features % 2:
            raise InputError(
                f"model.type: got gaussian for tasks with {out_features} outputs, expected tasks with real actions: "
                "use mlp"
            )
        sizes = [math.prod(in_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten(-len(in_shape))]
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(sizes[-1], out_features // 2)
        with torch.no_grad():  # all means start near zero: an untrained policy does not run off
            for parameter in self.head.parameters():
                parameter.mul_(0.01)
        self.log_std = nn.Parameter(torch.full((out_features // 2,), math.log(std)))
        self.smallest = math.log(min_std)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.head(self.body(x))
        return torch.cat([mean, self.log_std.clamp(min=self.smallest).expand_as(mean)], -1)
