"""The outer learning rates: one for each parameter group of theta, on the schedule's clock."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from distmeta.config.parts import import_part
from distmeta.config.sections import OuterSection, ScheduleSection
from distmeta.errors import InputError, first_line
from distmeta.runtime.outer_optimizer import group_tensors


class OuterRates:
    """The rates of all groups after a number of steps.

    Args:
        names: of theta's tensors.
        steps: completed steps.

    Raises:
        InputError: a glob in `outer.groups` matches nothing, or the scheduler cannot be built.
    """

    def __init__(self, names: Sequence[str], outer: OuterSection, steps: int = 0):
        self._names = names
        self.steps = steps
        self.retune(outer)

    def retune(self, outer: OuterSection) -> None:
        """Continue with other settings. The clock stays."""
        self.outer = outer
        self.groups = group_tensors(self._names, outer)
        first_rates = [options["lr"] for options in self.groups.options]
        self._schedule = build_schedule(outer.schedule, first_rates)

    def advance(self) -> None:
        self.steps += 1

    def of_groups(self) -> list[float]:
        """Return the rate of each parameter group."""
        return self._schedule.rates(self.steps)

    def of_tensors(self) -> list[float]:
        """Return the rate of each tensor of theta, in its order."""
        rates = self.of_groups()
        return [rates[index] for index in self.groups.indices]


class Schedule(Protocol):
    def rates(self, step: int) -> list[float]:
        """Return the rate of each group after `step` steps."""
        ...


def build_schedule(section: ScheduleSection, first_rates: Sequence[float]) -> Schedule:
    """Build the schedule that a job names."""
    return (TorchSchedule if ":" in section.type else ShapeSchedule)(section, first_rates)


class ShapeSchedule:
    """A shape of `schedule_factor` times the first rates."""

    def __init__(self, section: ScheduleSection, first_rates: Sequence[float]):
        self._section = section
        self._first_rates = first_rates

    def rates(self, step: int) -> list[float]:
        factor = schedule_factor(self._section, step)
        return [rate * factor for rate in self._first_rates]


def schedule_factor(schedule: ScheduleSection, step: int) -> float:
    """Return the factor on every rate after `step` steps, a function of t = min(step / length, 1)."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    t = min((step - schedule.warmup) / max((schedule.steps or 1) - schedule.warmup, 1), 1.0)
    if schedule.type == "linear":
        return 1 - (1 - schedule.final) * t
    if schedule.type == "cosine":
        return schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * t)) / 2
    return schedule.final**t if schedule.type == "exponential" else 1.0


@runtime_checkable
class Steps(Protocol):
    """What distmeta needs of a scheduler. Not all of torch's derive from `LRScheduler`."""

    def step(self) -> object: ...


class TorchSchedule:
    """A scheduler of `torch.optim.lr_scheduler`, or a user's own, after the steps of the warm-up.

    It runs on an optimizer that only has the rates. To go to the step of a checkpoint, it is built again and takes all
    steps up to it, so its rates only depend on the number of steps.

    Raises:
        InputError: it cannot be imported, refuses an option, is no scheduler, or needs more than the number of steps.
    """

    def __init__(self, section: ScheduleSection, first_rates: Sequence[float]):
        self._section = section
        self._first_rates = first_rates
        self._restart()
        self._advance("a scheduler that needs only the number of steps")
        self._restart()

    def rates(self, step: int) -> list[float]:
        warmup = self._section.warmup
        if step < warmup:
            return [rate * (step + 1) / warmup for rate in self._first_rates]
        if step - warmup < self._steps:
            self._restart()
        while self._steps < step - warmup:
            self._advance("one that lasts for all steps of the run")
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def _restart(self) -> None:
        self._steps = 0
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in self._first_rates]
        # Adagrad has neither momentum nor betas, which some schedulers would change, but only here.
        self._optimizer = torch.optim.Adagrad(groups)
        self._scheduler = build_torch_scheduler(self._section, self._optimizer)

    def _advance(self, expected: str) -> None:
        self._optimizer.step()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                self._scheduler.step()
        except Exception as error:
            raise InputError(
                f"outer.schedule.type: {self._section.type} fails in step {self._steps + 1} ({first_line(error)}), "
                f"expected {expected}"
            ) from error
        self._steps += 1


def build_torch_scheduler(section: ScheduleSection, optimizer: torch.optim.Optimizer) -> Steps:
    """Build the scheduler that `outer.schedule.type` names.

    Raises:
        InputError: it cannot be imported, refuses an option, or is no scheduler.
    """
    build = import_part("outer.schedule.type", section.type, {})
    try:
        scheduler = build(optimizer, **section.options)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"outer.schedule.options: {section.type} refuses them ({first_line(error)})"
        ) from None
    if not isinstance(scheduler, Steps):
        raise InputError(
            f"outer.schedule.type: got {section.type!r}, which builds {type(scheduler).__name__}, expected a scheduler "
            "of torch.optim.lr_scheduler"
        )
    return scheduler
