"""The outer optimizer: one of torch's, over theta as a flat vector, with options for each tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch

from distmeta.compute.vectors import Layout
from distmeta.config.sections import OPTIMIZER_KEYS, GroupSection, OuterSection
from distmeta.errors import InputError
from distmeta.protocols import Theta

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}
AVERAGE = "average"
"""The quantity that holds the moving average of theta (`outer.ema`)."""
STEP_COUNT = "step"
"""The quantity that torch's optimizers keep once per parameter. All others they keep per element."""

GroupOptions = dict[str, Any]
"""Keyword arguments of the optimizer for some tensors of theta, `lr` among them."""


class Groups(NamedTuple):
    """The parameter groups of theta."""

    options: list[GroupOptions]
    """Of each group, in the order of its first tensor."""
    indices: list[int]
    """The group of each tensor of theta."""


class OuterOptimizer(Protocol):
    """Updates theta, one flat vector, in place."""

    def step(self, gradient: torch.Tensor, rates: Sequence[float]) -> None:
        """Take one step on a flat gradient, with a rate for each group."""
        ...

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return a copy of its state: tensors as `<parameter>/<quantity>`, and plain data."""
        ...

    def check_state(self, tensors: Mapping[str, torch.Tensor], theta: Theta) -> None:
        """Raise `InputError` if the tensors cannot be its state."""
        ...

    def load(self, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        ...


# --- Parameter groups ---------------------------------------------------------------------------------------------


def group_tensors(names: Sequence[str], outer: OuterSection) -> Groups:
    """Return the parameter groups of theta's tensors. The first glob in `outer.groups` that matches a name counts.

    Raises:
        InputError: a glob matches nothing, or nothing that an earlier one does not match.
    """
    by_glob = {glob: merge_options(outer, group) for glob, group in outer.groups.items()}
    default = merge_options(outer)
    groups = Groups([], [])
    unused = dict.fromkeys(outer.groups)
    for name in names:
        glob = next((glob for glob in outer.groups if fnmatchcase(name, glob)), None)
        unused.pop(glob or "", None)
        options = default if glob is None else by_glob[glob]
        if options not in groups.options:
            groups.options.append(options)
        groups.indices.append(groups.options.index(options))
    if unused:
        _refuse_glob(next(iter(unused)), names)
    return groups


def _refuse_glob(glob: str, names: Sequence[str]) -> None:
    if any(fnmatchcase(name, glob) for name in names):
        raise InputError(
            f"outer.groups: earlier globs match everything that {glob!r} matches, expected the narrower glob first"
        )
    raise InputError(f"outer.groups: {glob!r} matches nothing of theta; known: {', '.join(names)}")


def merge_options(outer: OuterSection, group: GroupSection | None = None) -> GroupOptions:
    """Return the optimizer's keyword arguments for a group: its own, else those of all. None is torch's default."""
    options: GroupOptions = {"lr": outer.lr}
    for section in (outer,) if group is None else (outer, group):
        given = {key: getattr(section, key) for key in ("lr", *OPTIMIZER_KEYS)}
        options |= {key: value for key, value in given.items() if value is not None}
        options |= section.options
    return options


# --- torch's optimizers -------------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """Neighbouring tensors of theta in the same group. The optimizer sees one parameter, since it is elementwise."""

    layout: Layout
    parameter: torch.nn.Parameter
    group: int
    start: int
    stop: int
    """Elements [start, stop) of the flat vector."""


class ElementwiseOptimizer:
    """One of torch's optimizers. Its bits do not depend on how theta is cut into parameters."""

    def __init__(self, flat: torch.Tensor, layout: Layout, outer: OuterSection, groups: Groups):
        self._segments = cut_segments(flat, layout, groups)
        members: list[list[torch.nn.Parameter]] = [[] for _ in groups.options]
        for segment in self._segments:
            members[segment.group].append(segment.parameter)
        self._optimizer = build_optimizer(list(zip(groups.options, members, strict=True)), outer)

    def step(self, gradient: torch.Tensor, rates: Sequence[float]) -> None:
        for segment in self._segments:
            segment.parameter.grad = gradient[segment.start : segment.stop]
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._optimizer.step()
        for segment in self._segments:
            segment.parameter.grad = None

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = {}
        for segment in self._segments:
            quantities: Theta = self._optimizer.state.get(segment.parameter, {})
            for key, value in quantities.items():
                views = segment.layout.views(value) if key != STEP_COUNT else {}
                for name in segment.layout.names:
                    tensors[f"{name}/{key}"] = views.get(name, value).detach().clone()
        return tensors, {}

    def check_state(self, tensors: Mapping[str, torch.Tensor], theta: Theta) -> None:
        check_state(tensors, theta)

    def load(self, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> None:
        for segment in self._segments:
            self._optimizer.state.pop(segment.parameter, None)
            first = segment.layout.names[0]
            quantities = [key.rpartition("/")[2] for key in tensors if key.rpartition("/")[0] == first]
            state = {key: join_quantity(segment.layout, key, tensors) for key in quantities}
            if state:
                self._optimizer.state[segment.parameter] = state


def cut_segments(flat: torch.Tensor, layout: Layout, groups: Groups) -> list[Segment]:
    """Cut flat theta into segments, in theta's order."""
    segments = []
    for group, members in groupby(range(len(layout.names)), groups.indices.__getitem__):
        indices = list(members)
        names = tuple(layout.names[i] for i in indices)
        shapes = tuple(layout.shapes[i] for i in indices)
        part = Layout(names, shapes)
        start = layout.places[indices[0]][0]
        stop = start + part.size
        segments.append(Segment(part, torch.nn.Parameter(flat[start:stop]), group, start, stop))
    return segments


def build_optimizer(
    groups: list[tuple[GroupOptions, list[torch.nn.Parameter]]], outer: OuterSection
) -> torch.optim.Optimizer:
    """Build one of torch's optimizers for groups of parameters.

    It is neither fused nor foreach, because their bits depend on how parameters are grouped.
    """
    parameters = [{"params": parameters, **options} for options, parameters in groups]
    optimizer = OPTIMIZERS[outer.optimizer](parameters, foreach=False)
    if outer.ema is not None:
        add_average(optimizer, outer.ema)
    return optimizer


def join_quantity(layout: Layout, quantity: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a segment's quantity from those of its tensors, `<parameter>/<quantity>`."""
    if quantity == STEP_COUNT:
        return tensors[f"{layout.names[0]}/{quantity}"]
    parts = {name: tensors[f"{name}/{quantity}"] for name in layout.names}
    return torch.from_numpy(layout.flatten(parts))


# --- The moving average of theta ----------------------------------------------------------------------------------


def add_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Let an optimizer keep an exponential moving average of its parameters.

        ē_1 = θ_1,   ē_t = d ē_{t−1} + (1 − d) θ_t

    It is one more quantity of the optimizer's state, so every strategy cuts, saves and restores it like the others.
    """

    def update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if AVERAGE in state:
                    state[AVERAGE].lerp_(parameter.detach(), 1 - decay)
                else:
                    state[AVERAGE] = parameter.detach().clone()

    optimizer.register_step_post_hook(update)


def select_average(theta: Theta, tensors: Mapping[str, torch.Tensor]) -> Theta:
    """Return the moving average of theta from the optimizer's state; theta itself before the first step."""
    return {name: tensors.get(f"{name}/{AVERAGE}", value) for name, value in theta.items()}


# --- Checkpoints: the files may come from anybody -----------------------------------------------------------------


def check_theta(theta: Theta, expected: Theta) -> None:
    """Raise `InputError` if a checkpoint's theta has other names or shapes than the job's."""
    found_shapes = {name: tuple(value.shape) for name, value in theta.items()}
    expected_shapes = {name: tuple(value.shape) for name, value in expected.items()}
    if found_shapes != expected_shapes:
        raise InputError(
            "checkpoint: its theta has other names or shapes than this job's model and algorithm"
        )


def check_state(tensors: Mapping[str, torch.Tensor], theta: Theta) -> None:
    """Raise `InputError` if the optimizer state cannot be that of a run with this theta."""
    for key, value in tensors.items():
        name, _, quantity = key.rpartition("/")
        expected_shape = () if quantity == STEP_COUNT or name not in theta else theta[name].shape
        if name not in theta or value.shape != expected_shape:
            raise InputError(f"checkpoint: its optimizer state {key!r} does not match anything in theta")
        missing = next((other for other in theta if f"{other}/{quantity}" not in tensors), None)
        if missing is not None:
            raise InputError(f"checkpoint: its optimizer state has {key!r}, but nothing for {missing!r}")


def read_clock(plain: Any) -> int:
    """Return the number of steps on the schedule's clock, or raise `InputError` if the checkpoint has none."""
    clock = plain.get("clock") if isinstance(plain, dict) else None
    if type(clock) is not int or not 0 <= clock < 2**63:
        raise InputError(
            f"checkpoint: got {clock!r} as the clock of its outer rates, expected a number of steps"
        )
    return clock
