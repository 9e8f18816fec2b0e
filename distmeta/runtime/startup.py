"""What a training starts with: its problem, its strategy and its trackers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from distmeta.compute.compiler import MissingCompilerError
from distmeta.config.job import Job
from distmeta.config.parts import build_part
from distmeta.config.sections import OuterSection
from distmeta.errors import redact
from distmeta.runtime.checkpoint import Progress, TrainingState
from distmeta.runtime.problem import (
    Problem,
    apply_job_numerics,
    build_problem,
    check_data,
    choose_device,
)
from distmeta.runtime.resolve import resolve, without_compiler
from distmeta.runtime.run_folder import StartingPoint
from distmeta.runtime.strategy import Strategy
from distmeta.tracking.interface import TrackedRun
from distmeta.tracking.trackers import Trackers, name_trackers, open_trackers

Report = Callable[[str], None]
"""Shows a line to the user."""


def prepare_problem(start: StartingPoint, report: Report) -> tuple[Problem, Progress]:
    """Return the problem as the driver needs it (with workers it needs no GPU), and how far the run is."""
    if start.checkpoint is None:
        return resolve_job(start.job, report), Progress(0)
    constants = {name: value.numpy() for name, value in start.checkpoint.constants.items()}
    progress = start.checkpoint.progress
    problem = build_problem(start.job, constants, _choose_driver_device(start.job))
    check_data(problem, start.checkpoint.data)
    return problem.at(start.job.phase(last_step(progress))), progress


def resolve_job(job: Job, report: Report = lambda text: None, device: torch.device | None = None) -> Problem:
    """Build the problem of a new run and decide what its job leaves open.

    Args:
        device: where to compute the first tasks; None: where the driver computes.
    """
    device = device or _choose_driver_device(job)
    with apply_job_numerics(job, device):
        return resolve(build_problem(job, device=device), report)


def _choose_driver_device(job: Job) -> torch.device:
    return torch.device("cpu") if job.run.workers else choose_device(job)


def start_strategy(
    problem: Problem, start: StartingPoint, progress: Progress, report: Report
) -> tuple[Problem, Strategy]:
    """Start the strategy's workers.

    A new run falls back to eager execution if a worker has no C++ compiler. A resumed run raises instead, because
    another way of execution would change its results.
    """
    state = start.checkpoint.state if start.checkpoint else None
    outer = outer_settings_at(problem.job, progress)
    try:
        return problem, build_strategy(problem, outer, state, report)
    except MissingCompilerError as error:
        if start.checkpoint is not None:
            raise
        report(f"compute.compile: there is {error.args[0]}; the whole run is computed without compilation")
    problem = without_compiler(problem)
    return problem, build_strategy(problem, outer, state, report)


def build_strategy(
    problem: Problem, outer: OuterSection, state: TrainingState | None, report: Report
) -> Strategy:
    """Build the strategy that the job names."""
    section = problem.job.strategy
    given = {"problem": problem, "outer": outer, "state": state, "report": report}
    return build_part(section.part, section.options, given)


def last_step(progress: Progress) -> int:
    """Return the index of the last completed step, counted from 0. A pending evaluation belongs to that step."""
    return max(progress.step - 1, 0)


def outer_settings_at(job: Job, progress: Progress) -> OuterSection:
    """Return the outer optimizer's settings in the last completed step; at step 0 the job's own."""
    return job.at(progress.step - 1).outer if progress.step else job.outer


def start_trackers(job: Job, start: StartingPoint, progress: Progress, report: Report) -> Trackers:
    """Start the job's trackers, which continue what they know of this run.

    Raises:
        InputError: a tracker's package, address, account or option is wrong.
    """
    place = start.uri or str(start.folder.absolute())
    run = TrackedRun(
        name=start.folder.name,
        experiment=job.name,
        params=job.to_dict(),
        tags={"distmeta.run": redact(place)},
        run_id=None,
        folder=start.folder,
        report=report,
    )
    return open_trackers(name_trackers(job.trackers), run, progress.tracking_ids)
