"""The training loop: plan, map over the pool, add by the fixed tree, step, track, evaluate, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from distmeta.compute.flat import tree_sum
from distmeta.core import NumericsError
from distmeta.job import Job
from distmeta.mlflow_store import redact
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.checkpoint import Checkpoint, Progress
from distmeta.runtime.folder import RunFolder, Start, starting_point
from distmeta.runtime.interrupt import InterruptedRun, StopRequested, interruptions
from distmeta.runtime.pool import Pool, open_pool
from distmeta.runtime.problem import Problem, build, device_of, examples_of, numerics_of
from distmeta.runtime.resolution import resolve
from distmeta.runtime.scores import evaluate_tasks, mean_metrics, primary
from distmeta.runtime.server import ParameterServer
from distmeta.runtime.worker import shards_of
from distmeta.sections import Run as RunSection
from distmeta.tracking import Tracker, open_tracker


class Reporter(Protocol):
    """Who is told how a run goes."""

    def begin(self, folder: Path, job: Job, step: int) -> None: ...
    def step(self, record: Mapping[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...
    def end(self) -> None: ...


class Silent:
    """The reporter of a program that watches by other means."""

    def begin(self, folder: Path, job: Job, step: int) -> None: ...
    def step(self, record: Mapping[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...
    def end(self) -> None: ...


@dataclass(frozen=True)
class Summary:
    """What a training leaves behind."""

    run: Path
    step: int
    loss: float | None
    """Mean query loss after adaptation in the last step."""
    best: float | None
    """Best validation figure."""
    best_step: int | None
    uri: str | None = None
    """Where the run is copied to, if the job's output is a URI."""

    @property
    def place(self) -> str:
        """What to name the run by: its URI, else its folder."""
        return self.uri or str(self.run)


@dataclass
class _Run:
    """A training under way: what a step, an evaluation and a checkpoint need."""

    problem: Problem
    server: ParameterServer
    pool: Pool
    folder: RunFolder
    tracker: Tracker
    reporter: Reporter
    check: Callable[[], None]
    progress: Progress
    changing: Mapping[str, float] = field(default_factory=dict)
    """The values that hold, of the keys that the job changes at any time."""
    saved: tuple[Progress, Path] | None = None
    """What the last checkpoint holds, and where it is."""


def train(
    job: Job | str | Path, resume: str | Path | None = None, reporter: Reporter | None = None
) -> Summary:
    """Trains a job, or goes on with a run.

    Args:
        job: a job, or the path of a job file.
        resume: a run folder or checkpoint to go on from; "auto": `run.name`'s folder, if it has something.

    Raises:
        InputError: the job or the resume cannot be; nothing was written. What shows in the first step alone (a compiled
            gradient that is not the eager one) leaves the run at step 0.
        InterruptedRun: Ctrl-C or SIGTERM; the last completed step was saved.
        NumericsError: a non-finite meta-gradient under `run.on_nonfinite: stop`; saved.
    """
    reporter = reporter or Silent()
    start = starting_point(job if isinstance(job, Job) else Job.load(job), resume, reporter.say)
    with ExitStack() as stack:
        stack.callback(start.close)
        problem, server, progress = _prepare(start, reporter.say)
        finished = _finished(progress, problem.job.run)
        pool = None if finished else open_pool(problem, server.layout, reporter.say)
        if pool is not None:
            stack.callback(pool.close)
        tracker = _open_tracker(problem.job, start, progress, reporter)
        stack.callback(tracker.close, "FAILED")  # unless the loop got to say how it ended
        folder = RunFolder(start, problem.job)
        stack.callback(folder.close)
        for record in folder.records():
            tracker.log_step(record)  # it leaves out what its store has
        if pool is None:  # what was to be told may not have been
            reporter.say(
                f"{start.place} is at step {progress.step} of {problem.job.run.steps}: nothing to do"
            )
            tracker.close("FINISHED")
            return _summary(start, progress)
        check = stack.enter_context(interruptions())
        reporter.begin(folder.path, problem.job, progress.step)
        if start.uri is not None:
            reporter.say(f"copied after each save to {redact(start.uri)}")
        if problem.job.compute.compile:
            reporter.say("compiling the gradient: the first step takes half a minute or more")
        stack.callback(reporter.end)
        progress = _guarded(_Run(problem, server, pool, folder, tracker, reporter, check, progress))
        return _summary(start, progress)


def _guarded(run: _Run) -> Progress:
    """Runs the loop; whatever ends it, the last completed state is saved and the tracker told."""
    status = "FAILED"
    try:
        run.tracker.log_artifact(run.folder.path / "job.yaml")
        if run.progress.step == 0:
            _save(run)
        _loop(run)
        final = _save(run)
        if failure := run.folder.publish():  # tried once more
            raise OSError(f"output: {failure}")
        run.tracker.log_artifact(final, "checkpoint")
        status = "FINISHED"
    except StopRequested:
        status = "KILLED"
        _save(run)
        raise InterruptedRun(str(run.folder.uri or run.folder.path), run.progress.step) from None
    except Exception:
        _save(run)
        raise
    finally:
        run.tracker.close(status)
    return run.progress


def _loop(run: _Run) -> None:
    """One step after the other, until all are done or validation stands still.

    A step's record waits in the progress until its evaluation is done: an interruption in between loses neither.
    """
    job = run.problem.job.run
    while not _finished(run.progress, job):
        if run.progress.pending is None:
            record = _step(run)
            loss = run.progress.loss if record["loss_after"] is None else record["loss_after"]
            run.progress = replace(run.progress, step=record["step"], loss=loss, pending=record)
        record, step = dict(run.progress.pending or {}), run.progress.step
        if job.eval_every and (step % job.eval_every == 0 or step == job.steps):
            record |= _validate(run)
        run.progress = replace(run.progress, pending=None)
        run.folder.append(record)
        run.tracker.log_step(record)
        last = step in (run.progress.best_step, job.steps)
        if last or (job.checkpoint_every and step % job.checkpoint_every == 0):
            _save(run)
        run.reporter.step(record)  # last: who is told may look at what is saved
    if run.progress.step < job.steps:
        run.reporter.say(f"validation stood still for {run.progress.stale} evaluations: stopped")


def _finished(progress: Progress, job: RunSection) -> bool:
    """All steps done, or validation stood still for `run.patience` evaluations; and nothing left to evaluate."""
    patient = job.patience is None or progress.stale < job.patience
    return progress.pending is None and (progress.step >= job.steps or not patient)


def _step(run: _Run) -> dict[str, Any]:
    """The outer epochs of one step: the record of the first, with all seconds. What fails on the way undoes all."""
    _enter_phase(run, run.progress.step)
    server, epochs, first = run.server, run.problem.outer_epochs, run.server.flat()
    if epochs == 1:
        return _epoch(run, first, 0)
    before = server.theta(), *server.state()
    try:
        record = _epoch(run, first, 0)
        for epoch in range(1, epochs):
            later = _epoch(run, np.concatenate([server.flat(), first]), epoch)
            record |= {key: record[key] + later[key] for key in record if key.startswith("seconds_")}
            dropped = sorted({*record.get("dropped", ()), *later.get("dropped", ())})
            if dropped:  # in any epoch
                tasks = min(record["tasks"], later["tasks"])
                record |= {"dropped": dropped, "tasks_dropped": len(dropped), "tasks": tasks}
    except BaseException:
        server.load(*before)
        raise
    return record | {"tasks_per_second": run.problem.job.run.tasks_per_step / record["seconds_step"]}


def _epoch(run: _Run, flat: np.ndarray, epoch: int) -> dict[str, Any]:
    """Plan, map, aggregate, outer step: the record."""
    problem, settings, step = run.problem, run.problem.job.run, run.progress.step
    started = time.perf_counter()
    assert settings.shards is not None, "resolved before step 0"
    steps = problem.algorithm.inner_steps
    plan = shards_of(problem, "train", step, settings.tasks_per_step, settings.shards, steps)
    results = run.pool.map(flat, [replace(shard, epoch=epoch) for shard in plan], run.check)
    mapped = time.perf_counter()
    tasks = sum(result.tasks for result in results)
    dropped = [task for result in results for task in result.dropped]
    total = tree_sum([r.gradient for r in results if r.gradient is not None])
    gradient = total / np.float32(max(tasks, 1))
    if not np.isfinite(gradient).all():  # finite gradients whose sum is not
        tasks, dropped = 0, list(range(settings.tasks_per_step))
    if dropped and settings.on_nonfinite == "stop":
        raise NumericsError(
            f"step {step + 1}: non-finite meta-gradient of tasks {dropped} (run.on_nonfinite: stop)"
        )
    record: dict[str, Any] = {"step": step + 1} | mean_metrics(results)
    added = time.perf_counter()
    rate = run.server.rate()
    size = run.server.step(gradient) if tasks else run.server.skip()  # from here on nothing may fail
    stepped = time.perf_counter()
    busy = sum(r.seconds_draw + r.seconds_compute for r in results) / run.pool.size
    record |= {"grad_norm": size, "outer_lr": rate, "tasks": tasks, "tasks_dropped": len(dropped)}
    record |= run.changing
    if dropped:
        record["dropped"] = dropped
    return record | {
        "tasks_per_second": settings.tasks_per_step / (stepped - started),
        "seconds_step": stepped - started,
        "seconds_draw": sum(r.seconds_draw for r in results) / run.pool.size,
        "seconds_compute": sum(r.seconds_compute for r in results) / run.pool.size,
        "seconds_transfer": max(mapped - started - busy, 0.0),
        "seconds_aggregate": added - mapped,
        "seconds_outer": stepped - added,
    }


def _enter_phase(run: _Run, step: int) -> None:
    """Takes up the values that the job's `changes` give the step after `step` completed ones."""
    job = run.problem.job
    phase = job.phase(step)
    if job.changes and (phase != run.problem.phase or not run.changing):
        run.changing = job.changing(step)
    if phase != run.problem.phase:
        run.problem = run.problem.at(phase)
        run.server.retune(job.at(step).outer)


def _validate(run: _Run) -> dict[str, float | None]:
    """Scores theta on the validation tasks, the same ones every time; notes whether it is the best so far."""
    results = evaluate_tasks(
        run.problem, run.pool, run.server.flat(), "val", run.problem.job.run.eval_tasks, run.check
    )
    record = {f"val_{name}": value for name, value in mean_metrics(results, every=True).items()}
    name, sign = primary(record, "val_")
    value, best = record[name], run.progress.best
    better = value is not None and (best is None or sign * value > sign * best)
    if better:
        run.progress = replace(run.progress, best=value, best_step=run.progress.step, stale=0)
    else:
        run.progress = replace(run.progress, stale=run.progress.stale + 1)
    return record


def _prepare(start: Start, say: Callable[[str], None]) -> tuple[Problem, ParameterServer, Progress]:
    """The problem as the driver sees it (beside workers it needs no GPU), the parameter server, where it stands."""
    if start.checkpoint is None:
        problem = settled(start.job, say)
        return problem, ParameterServer(problem.init(), problem.job.outer), Progress(0)
    constants = {name: value.numpy() for name, value in start.checkpoint.constants.items()}
    last = start.checkpoint.progress.step - 1  # a pending evaluation belongs to the last step
    problem = build(start.job, constants, _device(start.job)).at(start.job.phase(last))
    server = ParameterServer(problem.init(), start.job.at(last).outer)
    server.load(start.checkpoint.theta, start.checkpoint.optimizer, start.checkpoint.outer)
    return problem, server, start.checkpoint.progress


def settled(job: Job, say: Callable[[str], None] = lambda text: None) -> Problem:
    """The problem of a new run, with what its job leaves open decided."""
    device = _device(job)
    with numerics_of(job, device):
        return resolve(build(job, device=device), say)


def _device(job: Job) -> torch.device:
    return torch.device("cpu") if job.run.workers else device_of(job)


def _open_tracker(job: Job, start: Start, progress: Progress, reporter: Reporter) -> Tracker:
    return open_tracker(
        job.tracking.type,
        run_name=start.folder.name,
        experiment=job.tracking.experiment or job.name,
        params=job.tree(),
        tags={"distmeta.run": redact(start.uri or str(start.folder.absolute()))}
        | ({"mlflow.parentRunId": job.tracking.parent} if job.tracking.parent else {}),
        run_id=progress.tracking_id,
        say=reporter.say,
    )


def _save(run: _Run) -> Path:
    """Saves the last completed state; the tracker knows its run's id once its store has answered."""
    run.progress = replace(run.progress, tracking_id=run.tracker.run_id or run.progress.tracking_id)
    if run.saved is not None and run.saved[0] == run.progress:
        return run.saved[1]
    run.folder.sync()
    tensors, outer = run.server.state()
    state = Checkpoint(
        run.problem.job.tree(),
        run.server.theta(),
        {name: value.cpu() for name, value in run.problem.model.constants.items()},
        tensors,
        outer,
        run.progress,
        examples_of(run.problem.family),
    )
    path = checkpoints.save(run.folder.path, state, run.problem.job.run.keep)
    run.saved = (run.progress, path)
    if failure := run.folder.publish():
        run.reporter.say(f"output: {failure}; the next save tries again")
    return path


def _summary(start: Start, progress: Progress) -> Summary:
    return Summary(start.folder, progress.step, progress.loss, progress.best, progress.best_step, start.uri)
