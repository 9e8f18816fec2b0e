"""The last linear layer of a model: which one it is, and how it starts in a task.

Shapes: N examples, F features, W ways.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from distmeta.protocols import one_hot

HeadInit = Literal["linear", "shared", "prototype"]


def find_head(module: nn.Module, out_features: int | None) -> tuple[str, ...]:
    """Return the names of the head's weight and, if it has one, its bias; empty if there is no head.

    The head is the submodule `head` if that is a linear layer, else the last linear layer with `out_features` outputs.
    """
    linear = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    matching = [name for name, layer in linear.items() if layer.out_features == out_features]
    if "head" in linear:
        name = "head"
    elif matching:
        name = matching[-1]
    else:
        return ()
    prefix = f"{name}." if name else ""
    if linear[name].bias is None:
        return (prefix + "weight",)
    return (prefix + "weight", prefix + "bias")


def build_prototype_head(features_NF: Tensor, y_N: Tensor, ways: int) -> tuple[Tensor, Tensor]:
    """Return the weight [W, F] and bias [W] of a linear layer that classifies like a prototypical network.

        w_c = 2 p_c,   b_c = −‖p_c‖²,   p_c = mean features of class c

    Reference: Triantafillou et al. 2020, arXiv 1903.03096, §3.
    """
    classes_NW = one_hot(y_N, ways, features_NF.dtype)
    prototypes_WF = classes_NW.T @ features_NF / classes_NW.sum(0).clamp(min=1)[:, None]
    return 2 * prototypes_WF, -prototypes_WF.square().sum(1)
