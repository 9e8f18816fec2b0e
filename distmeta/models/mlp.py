"""Multi-layer perceptron."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


class MLP(nn.Sequential):
    """x [..., *in_shape] -> [..., out_features]: linear layers with an activation between them.

    Args:
        hidden: units of the hidden layers. The default is the regressor of MAML (arXiv 1703.03400, §5.1).
        activation: `relu` or `tanh`.
        init: `torch`, as torch.nn.Linear starts; or `normal`, as in the MAML paper's code: weights from a normal
            distribution with standard deviation 0.01, cut at two deviations, and biases 0.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_features: int,
        hidden: list[Annotated[int, Field(ge=1)]] = [40, 40],  # noqa: B006
        activation: Literal["relu", "tanh"] = "relu",
        init: Literal["torch", "normal"] = "torch",
    ):
        sizes = [math.prod(in_shape), *hidden, out_features]
        layers: list[nn.Module] = [nn.Flatten(-len(in_shape))]
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
        super().__init__(*layers[:-1])
        self.head_module = str(len(self) - 1)
        if init == "normal":
            for layer in self:
                if isinstance(layer, nn.Linear):
                    nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
                    nn.init.zeros_(layer.bias)
