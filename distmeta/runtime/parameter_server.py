"""The parameter server: owns theta and the outer optimizer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from distmeta.compute.memory import keep_freed
from distmeta.compute.vectors import Layout, norm
from distmeta.config.sections import OuterSection, ScheduleSection
from distmeta.errors import InputError
from distmeta.protocols import Theta

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}
COUNT = "step"
"""What torch's optimizers keep once a parameter; all else they keep for each of its elements."""


class ParameterServer:
    """theta as one flat vector, and `outer` (torch.optim, a schedule, clipping) that moves it.

    theta ← theta − optimizer(g · min(1, clip_norm / ‖g‖)),   g the mean meta-gradient over the step's finite tasks
    """

    def __init__(self, theta: Theta, outer: OuterSection):
        keep_freed()
        self.layout = Layout.of(theta)
        self._flat = torch.from_numpy(self.layout.flatten(theta))
        self._vector = self._flat.numpy()
        self._vector.flags.writeable = False
        self._clock = 0
        self._start(outer)

    def _start(self, outer: OuterSection) -> None:
        self.outer = outer
        self._optimizer, self._runs = _optimizer(self._flat, self.layout, outer)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._set_clock(self._clock)

    def _set_clock(self, steps: int) -> None:
        """Every rate as the schedule has it after so many steps."""
        self._clock, factor = steps, schedule_factor(self.outer.schedule, steps)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def flat(self) -> np.ndarray:
        """theta as a float32 vector, a copy."""
        return self._vector.copy()

    def vector(self) -> np.ndarray:
        """theta itself as a float32 vector, always the same one: not to be written to, and moved by the next step."""
        return self._vector

    def theta(self) -> Theta:
        """theta by name, a copy."""
        return {name: view.clone() for name, view in self.layout.views(self._flat).items()}

    def step(self, gradient: np.ndarray, factor: float = 1.0) -> float:
        """One outer step on the mean meta-gradient, at `factor` times the rate; its norm before clipping."""
        size = norm(gradient)
        limit = self.outer.clip_norm
        if limit is not None and size > limit:
            gradient = gradient * np.float32(limit / size)
        whole = torch.from_numpy(np.ascontiguousarray(gradient))
        for run in self._runs:
            run.parameter.grad = whole[run.start : run.stop]
        for group in self._optimizer.param_groups:
            group["lr"] *= factor  # until the schedule sets the next step's
        take_step(self._optimizer)
        for run in self._runs:
            run.parameter.grad = None
        self._set_clock(self._clock + 1)
        return size

    def retune(self, outer: OuterSection) -> None:
        """Goes on with other settings; theta, the optimizer's state and the schedule's clock stay."""
        tensors, _ = self.state()
        self._start(outer)
        self._load_optimizer(tensors)

    def skip(self) -> float:
        """A step without a finite task: neither theta nor the optimizer moves, only the schedule's clock."""
        self._set_clock(self._clock + 1)
        return math.nan

    def rate(self) -> float:
        """The outer rate of the first part."""
        return float(self._optimizer.param_groups[0]["lr"])

    def rates(self) -> list[float]:
        """The outer rate of each tensor of theta, in its order."""
        rates = {id(p): group["lr"] for group in self._optimizer.param_groups for p in group["params"]}
        return [float(rates[id(run.parameter)]) for run in self._runs for _ in run.layout.names]

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The optimizer's tensors as `<parameter>/<quantity>`, and the schedule's clock as plain data."""
        tensors = {}
        for run in self._runs:
            quantities: Theta = self._optimizer.state.get(run.parameter, {})
            for key, value in quantities.items():
                views = run.layout.views(value) if key != COUNT else {}
                for name in run.layout.names:
                    tensors[f"{name}/{key}"] = views.get(name, value).detach().clone()
        return tensors, {"clock": self._clock}

    def load(self, theta: Theta, tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
        """Restores what `state` gave, and theta.

        Raises:
            InputError: theta, or the optimizer's state, has other names or shapes than this job's.
        """
        own = self.layout.views(self._flat)
        check_theta(theta, own)
        check_state(tensors, own)
        clock = _clock_in(plain)
        for name, view in own.items():
            view.copy_(theta[name])
        self._load_optimizer(tensors)
        self._set_clock(clock)

    def _load_optimizer(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for run in self._runs:
            self._optimizer.state.pop(run.parameter, None)
            first = run.layout.names[0]
            quantities = [key.rpartition("/")[2] for key in tensors if key.rpartition("/")[0] == first]
            state = {key: _joined(run.layout, key, tensors) for key in quantities}
            if state:
                self._optimizer.state[run.parameter] = state


def clock_of(names: Iterable[str], outer: OuterSection, plain: dict[str, Any]) -> ParameterServer:
    """The rates alone, as the schedule has them; `skip` moves them on.

    Args:
        plain: as `ParameterServer.state` gave it; nothing: at the start.
    """
    clock = ParameterServer({name: torch.zeros(1) for name in names}, outer)
    if plain != {}:
        clock.load(clock.theta(), {}, plain)
    return clock


def check_theta(theta: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Raises InputError where a checkpoint's theta has other names or shapes than the job's."""
    shapes = [{name: tuple(value.shape) for name, value in tensors.items()} for tensors in (theta, expected)]
    if shapes[0] != shapes[1]:
        raise InputError(
            "checkpoint: its theta has other names or shapes than this job's model and algorithm"
        )


def check_state(tensors: Mapping[str, torch.Tensor], theta: Mapping[str, torch.Tensor]) -> None:
    """Raises InputError where the optimizer's state cannot be that of a run of this job: the file may be anybody's."""
    for key, value in tensors.items():
        name, _, quantity = key.rpartition("/")
        if name not in theta or value.shape != (() if quantity == COUNT else theta[name].shape):
            raise InputError(f"checkpoint: its optimizer has a {key!r} that fits nothing of theta")
        lacking = next((other for other in theta if f"{other}/{quantity}" not in tensors), None)
        if lacking is not None:
            raise InputError(f"checkpoint: its optimizer has {key!r}, but none of {lacking!r}")


def _clock_in(plain: Any) -> int:
    """The schedule's clock that `state` gave. Raises InputError where there is none."""
    clock = plain.get("clock") if isinstance(plain, dict) else None
    if type(clock) is not int or not 0 <= clock < 2**63:
        raise InputError(
            f"checkpoint: got {clock!r} as the clock of its outer rates, expected a number of steps"
        )
    return clock


class _Run(NamedTuple):
    """Neighbouring tensors of one rate, which the optimizer takes for one: it is elementwise."""

    layout: Layout
    parameter: torch.nn.Parameter
    start: int
    stop: int


def _optimizer(flat: torch.Tensor, layout: Layout, outer: OuterSection) -> tuple[torch.optim.Optimizer, list[_Run]]:
    """One parameter group a rate, and what is in them, in theta's order."""
    rates, unused = [], set(outer.rates)
    for name in layout.names:
        glob = next((g for g in outer.rates if fnmatchcase(name, g)), None)
        unused.discard(glob or "")
        rates.append(outer.lr if glob is None else outer.rates[glob])
    if unused:
        names = ", ".join(layout.names)
        raise InputError(f"outer.rates: {sorted(unused)[0]!r} matches nothing of theta: {names}")
    runs: list[_Run] = []
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for rate, members in groupby(range(len(rates)), rates.__getitem__):
        own = list(members)
        part = Layout(tuple(layout.names[i] for i in own), tuple(layout.shapes[i] for i in own))
        start = layout.places[own[0]][0]
        runs.append(_Run(part, torch.nn.Parameter(flat[start : start + part.size]), start, start + part.size))
        groups.setdefault(rate, []).append(runs[-1].parameter)
    return optimizer_of(list(groups.items()), outer), runs


def _joined(layout: Layout, quantity: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A run's quantity from those of its tensors."""
    if quantity == COUNT:
        return tensors[f"{layout.names[0]}/{quantity}"]
    return torch.from_numpy(layout.flatten({name: tensors[f"{name}/{quantity}"] for name in layout.names}))


def optimizer_of(groups: list[tuple[float, list[torch.nn.Parameter]]], outer: OuterSection) -> torch.optim.Optimizer:
    """torch.optim's, with a rate for each group of parameters. Neither fused nor foreach: their bits differ with the
    grouping."""
    options = {
        key: getattr(outer, key)
        for key in ("momentum", "nesterov", "betas", "eps", "weight_decay")
        if getattr(outer, key) is not None
    }
    parts = [{"params": parameters, "lr": rate} for rate, parameters in groups]
    optimizer = OPTIMIZERS[outer.optimizer](parts, lr=outer.lr, foreach=False, **options)
    # asks a GPU whether it captures a graph, and so takes some hundred MB of one that theta is not on
    setattr(optimizer, "_accelerator_graph_capture_health_check", lambda: None)  # noqa: B010 - a method
    return optimizer


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()` without torch's hooks and its profiler's record, which cost a small theta as much again."""
    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(optimizer)


def schedule_factor(schedule: ScheduleSection, step: int) -> float:
    """What every rate is multiplied by after `step` steps: a function of t = min(step / length, 1)."""
    t = min(step / (schedule.steps or 1), 1.0)
    if schedule.type == "linear":
        return 1 - (1 - schedule.final) * t
    if schedule.type == "cosine":
        return schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * t)) / 2
    return schedule.final**t if schedule.type == "exponential" else 1.0
