"""A Gaussian policy. (`mlp` is a categorical policy: its outputs are logits.)"""

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
    """x [..., *in_shape] -> [..., 2A]: means from a multi-layer perceptron, and learned log standard deviations.

    The deviations do not depend on x. They are parameters, adapted like all others. The default is the policy of MAML
    (arXiv 1703.03400, §5.3), whose code starts with standard deviation 1.

    Args:
        out_features: 2A for tasks with A real actions.
        hidden: units of the hidden layers.
        activation: `relu` or `tanh`.
        std: initial standard deviation, > 0.
        min_std: the smallest standard deviation, > 0.

    Raises:
        InputError: `out_features` is odd, so the actions are not real numbers.
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
        with torch.no_grad():  # All means start near zero, so that an untrained policy does not run away.
            for parameter in self.head.parameters():
                parameter.mul_(0.01)
        self.log_std = nn.Parameter(torch.full((out_features // 2,), math.log(std)))
        self.min_log_std = math.log(min_std)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.head(self.body(x))
        return torch.cat([mean, self.log_std.clamp(min=self.min_log_std).expand_as(mean)], -1)
