"""An outer optimizer of a user's own: `outer.optimizer: package.module:Name`, such as `torch.optim:Adafactor`.

It sees every tensor of theta in its own shape. Checkpoints hold all that it keeps: the tensors and numbers of its
state, and the numbers in its parameter groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distmeta.compute.vectors import Layout
from distmeta.config.parts import import_part
from distmeta.config.sections import OuterSection
from distmeta.errors import InputError, first_line
from distmeta.protocols import Theta
from distmeta.runtime.outer_optimizer import GroupOptions, Groups, add_average

PLAIN_TYPES = (bool, int, float, str, type(None))
"""What a checkpoint holds of an optimizer besides tensors."""


class OwnOptimizer:
    """Wraps a user's optimizer over views of flat theta."""

    def __init__(self, flat: torch.Tensor, layout: Layout, outer: OuterSection, groups: Groups):
        self._layout = layout
        self._given = groups.options
        self._parameters = [torch.nn.Parameter(view) for view in layout.views(flat).values()]
        self._optimizer = build_own_optimizer(self._parameters, groups, outer)
        self._expected = _try_step(layout, outer, groups)
        """Shape and type of each tensor of its state after a step, by `<parameter>/<quantity>`."""

    def step(self, gradient: torch.Tensor, rates: Sequence[float]) -> None:
        gradients = self._layout.views(gradient).values()
        for parameter, value in zip(self._parameters, gradients, strict=True):
            parameter.grad = value
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = {}
        values = {}
        for key, value in _list_quantities(self._optimizer, self._layout.names, self._parameters):
            if isinstance(value, torch.Tensor):
                tensors[key] = value.detach().clone(memory_format=torch.contiguous_format)
            else:
                values[key] = value
        groups = [_select_kept(group) for group in self._optimizer.param_groups]
        return tensors, {"values": values, "groups": groups}

    def check_state(self, tensors: Mapping[str, torch.Tensor], theta: Theta) -> None:
        for key, value in tensors.items():
            if self._expected.get(key) != (value.shape, value.dtype):
                raise InputError(
                    f"checkpoint: its optimizer state {key!r} does not match that of this job's outer.optimizer"
                )

    def load(self, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> None:
        """Restore the state. Options that the job gives stay as they are in the job."""
        self._optimizer.state.clear()
        parameters = dict(zip(self._layout.names, self._parameters, strict=True))
        for key, value in {**plain.get("values", {}), **tensors}.items():
            name, _, quantity = key.rpartition("/")
            kept = value.clone() if isinstance(value, torch.Tensor) else value
            self._optimizer.state[parameters[name]][quantity] = kept
        saved = plain.get("groups", [])
        for group, given, values in zip(self._optimizer.param_groups, self._given, saved, strict=False):
            group.update({key: value for key, value in values.items() if key not in given})


def build_own_optimizer(
    parameters: Sequence[torch.nn.Parameter], groups: Groups, outer: OuterSection
) -> torch.optim.Optimizer:
    """Build a user's optimizer for the tensors of theta.

    Raises:
        InputError: it cannot be imported, is no optimizer, or refuses an option.
    """
    build = import_part("outer.optimizer", outer.optimizer, {})
    members: list[list[torch.nn.Parameter]] = [[] for _ in groups.options]
    for parameter, index in zip(parameters, groups.indices, strict=True):
        members[index].append(parameter)
    sets = [{"params": chosen, **options} for chosen, options in zip(members, groups.options, strict=True)]
    try:
        optimizer = build(sets, lr=outer.lr, **outer.options)
    except (TypeError, ValueError) as error:
        raise InputError(f"outer.options: {outer.optimizer} refuses them ({first_line(error)})") from None
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"outer.optimizer: got {outer.optimizer!r}, which builds {type(optimizer).__name__}, expected a "
            "torch.optim.Optimizer"
        )
    if outer.ema is not None:
        add_average(optimizer, outer.ema)
    return optimizer


def _try_step(
    layout: Layout, outer: OuterSection, groups: Groups
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Take a step on ones, and return the shape and type of each tensor of the state.

    Raises:
        InputError: the step fails, or a checkpoint could not hold the state.
    """
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in layout.shapes]
    optimizer = build_own_optimizer(parameters, groups, outer)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except Exception as error:
        raise InputError(
            f"outer.optimizer: a step of {outer.optimizer} fails ({type(error).__name__}: {first_line(error)}), "
            "expected an optimizer that needs only the gradients"
        ) from error
    expected = {}
    for key, value in _list_quantities(optimizer, layout.names, parameters):
        if isinstance(value, torch.Tensor):
            expected[key] = (value.shape, value.dtype)
        elif not isinstance(value, PLAIN_TYPES):
            raise InputError(
                f"outer.optimizer: {outer.optimizer} keeps {key!r} as {type(value).__name__}, expected tensors and "
                "numbers: checkpoints cannot hold others"
            )
    return expected


def _list_quantities(
    optimizer: torch.optim.Optimizer, names: Sequence[str], parameters: Sequence[torch.nn.Parameter]
) -> list[tuple[str, Any]]:
    """Return what the optimizer keeps for each parameter, as (`<parameter>/<quantity>`, value)."""
    return [
        (f"{name}/{quantity}", value)
        for name, parameter in zip(names, parameters, strict=True)
        for quantity, value in optimizer.state.get(parameter, {}).items()
    ]


def _select_kept(group: GroupOptions) -> GroupOptions:
    """Return the numbers that a parameter group keeps. The rate belongs to the schedule."""
    return {
        key: value
        for key, value in group.items()
        if key not in ("params", "lr") and isinstance(value, PLAIN_TYPES)
    }
