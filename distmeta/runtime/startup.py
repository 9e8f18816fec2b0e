"""What a training begins with: the problem, where it stands, and its tracker."""

from __future__ import annotations

from collections.abc import Callable

import torch

from distmeta.compute.compiler import MissingCompilerError
from distmeta.config.job import Job
from distmeta.config.parts import build_part
from distmeta.config.sections import OuterSection
from distmeta.errors import redact
from distmeta.runtime.checkpoint import Progress, TrainingState
from distmeta.runtime.problem import Problem, build, check_data, device_of, numerics_of
from distmeta.runtime.resolve import eager, resolve
from distmeta.runtime.run_folder import Start
from distmeta.runtime.strategy import Strategy
from distmeta.tracking.mlflow import Tracker, open_tracker


def prepared(start: Start, say: Callable[[str], None]) -> tuple[Problem, Progress]:
    """The problem as the driver sees it (beside workers it needs no GPU), and where it stands."""
    if start.checkpoint is None:
        return settled(start.job, say), Progress(0)
    constants = {name: value.numpy() for name, value in start.checkpoint.constants.items()}
    progress = start.checkpoint.progress
    problem = build(start.job, constants, _device(start.job)).at(start.job.phase(last_step(progress)))
    check_data(problem, start.checkpoint.data)
    return problem, progress


def opened(
    problem: Problem, start: Start, progress: Progress, say: Callable[[str], None]
) -> tuple[Problem, Strategy]:
    """The strategy, ready to advance.

    Whether a run compiles is settled at its start: where a worker of a new one has no C++ compiler, none compiles.
    """
    state = start.checkpoint.state if start.checkpoint else None
    outer = outer_at(problem.job, progress)
    try:
        return problem, build_strategy(problem, outer, state, say)
    except MissingCompilerError as error:
        if start.checkpoint is not None:
            raise
        say(f"compute.compile: there is {error.args[0]}; the whole run goes without")
    problem = eager(problem)
    return problem, build_strategy(problem, outer, state, say)


def build_strategy(
    problem: Problem, outer: OuterSection, state: TrainingState | None, say: Callable[[str], None]
) -> Strategy:
    """Build the strategy that the job names, ready to advance."""
    section = problem.job.strategy
    given = {"problem": problem, "outer": outer, "state": state, "report": say}
    return build_part(section.part, section.options, given)


def last_step(progress: Progress) -> int:
    """Completed steps before the last one: a pending evaluation belongs to that one."""
    return max(progress.step - 1, 0)


def outer_at(job: Job, progress: Progress) -> OuterSection:
    """The outer optimizer's settings in the last completed step; at step 0 the job's own."""
    return job.at(progress.step - 1).outer if progress.step else job.outer


def settled(
    job: Job, say: Callable[[str], None] = lambda text: None, device: torch.device | None = None
) -> Problem:
    """The problem of a new run, with what its job leaves open decided; on the device that computes, if not told
    otherwise."""
    device = device or _device(job)
    with numerics_of(job, device):
        return resolve(build(job, device=device), say)


def _device(job: Job) -> torch.device:
    return torch.device("cpu") if job.run.workers else device_of(job)


def tracker_of(job: Job, start: Start, progress: Progress, say: Callable[[str], None]) -> Tracker:
    return open_tracker(
        job.tracking.type,
        run_name=start.folder.name,
        experiment=job.tracking.experiment or job.name,
        params=job.to_dict(),
        tags={"distmeta.run": redact(start.uri or str(start.folder.absolute()))}
        | ({"mlflow.parentRunId": job.tracking.parent} if job.tracking.parent else {}),
        run_id=progress.tracking_id,
        say=say,
    )
