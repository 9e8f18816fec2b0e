"""The last linear layer of a model: which one it is, and how it starts in a task.

Shapes: N examples, F features, W ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from distmeta.errors import InputError, did_you_mean
from distmeta.protocols import one_hot

HeadInit = Literal["linear", "shared", "prototype"]


@runtime_checkable
class NamesHead(Protocol):
    """A module that says which of its submodules is the head."""

    head_module: str


@dataclass(frozen=True)
class Head:
    """The last layer of a model: all trainable parameters of one submodule."""

    module: str | None = None
    """Name of the submodule; None if there is no head, or if it is not certain which one it is."""
    parameters: tuple[str, ...] = ()
    """Names of its parameters in the whole model."""
    is_linear: bool = False
    """Whether it is a linear layer whose parameters are its weight and its bias (no weight norm, no pruning)."""
    doubt: str | None = None
    """Why it is not certain which layer is the head, or which parameters are its own: a message's end."""


def find_head(module: nn.Module, out_features: int | None, name: str | None = None) -> Head:
    """Find the head of a model.

    It is the submodule `name`; else the one that the module names itself (`NamesHead`); else the submodule `head`; else
    the only linear layer with `out_features` outputs. If several layers have them, the head is in doubt.

    Args:
        name: `model.head_module` of the job.

    Raises:
        InputError: there is no submodule with this name, or it has no parameters.
    """
    modules = dict(module.named_modules())
    if name is None and isinstance(module, NamesHead) and isinstance(module.head_module, str):
        name = module.head_module  # a submodule may have this name too, and is no text
    if name is None and "head" in modules and list(modules["head"].parameters()):
        name = "head"
    if name is not None:
        if name not in modules or not list(modules[name].parameters()):
            known = [key for key, value in modules.items() if key and list(value.parameters())]
            raise InputError(
                f"model.head_module: got {name!r}, expected a submodule with parameters; {did_you_mean(name, known)}"
            )
        return _describe_head(module, name)
    candidates = [
        key
        for key, layer in modules.items()
        if isinstance(layer, nn.Linear) and layer.out_features == out_features
    ]
    if not candidates:
        return Head()
    if len(candidates) > 1:
        return Head(
            doubt=f"missing, but {len(candidates)} linear layers have {out_features} outputs "
            f"({', '.join(candidates)}): name the head, for example model.head_module={candidates[-1]}"
        )
    return _describe_head(module, candidates[0])


def _describe_head(module: nn.Module, name: str) -> Head:
    head = module.get_submodule(name)
    own = {id(value) for value in head.parameters()}
    inside = {id(layer) for layer in head.modules()}
    for other_name, other in module.named_modules():
        if id(other) not in inside and any(id(value) in own for value in other.parameters(recurse=False)):
            return Head(
                doubt=f"the head {name!r} shares a parameter with {other_name!r} (tied weights): name the adapted "
                "parameters by globs (algorithm.adapt), or give the head parameters of its own"
            )
    parameters = tuple(key for key, value in module.named_parameters() if id(value) in own)
    is_linear = isinstance(head, nn.Linear) and set(dict(head.named_parameters())) <= {"weight", "bias"}
    return Head(name, parameters, is_linear and "parametrizations" not in dict(head.named_children()))


def build_prototype_head(features_NF: Tensor, y_N: Tensor, ways: int) -> tuple[Tensor, Tensor]:
    """Return the weight [W, F] and bias [W] of a linear layer that classifies like a prototypical network.

        w_c = 2 p_c,   b_c = −‖p_c‖²,   p_c = mean features of class c

    Reference: Triantafillou et al. 2020, arXiv 1903.03096, §3.
    """
    classes_NW = one_hot(y_N, ways, features_NF.dtype)
    prototypes_WF = classes_NW.T @ features_NF / classes_NW.sum(0).clamp(min=1)[:, None]
    return 2 * prototypes_WF, -prototypes_WF.square().sum(1)
