"""The training loop: the strategy advances theta by a step; track, evaluate, save."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from distmeta.config.job import Job
from distmeta.config.sections import RunSection as RunSection
from distmeta.errors import redact
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.checkpoint import Checkpoint, Progress
from distmeta.runtime.failure_policy import LostShardError
from distmeta.runtime.interruption import InterruptedRun, StopRequested, interruptions
from distmeta.runtime.problem import Problem, examples_of, fingerprint_of
from distmeta.runtime.run_folder import RunFolder, Start, starting_point
from distmeta.runtime.scores import SPIKE_WINDOW, evaluate_tasks, mean_metrics, primary, spikes
from distmeta.runtime.startup import last_step, opened, outer_at, prepared, tracker_of
from distmeta.runtime.strategy import LostStateError, Strategy
from distmeta.tracking.mlflow import Tracker


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
    strategy: Strategy
    folder: RunFolder
    tracker: Tracker
    reporter: Reporter
    check: Callable[[], None]
    progress: Progress
    changing: Mapping[str, float] = field(default_factory=dict)
    """The values that hold, of the keys that the job changes at any time."""
    saved: tuple[Progress, Path] | None = None
    """What the last checkpoint holds, and where it is."""
    told: int = 0
    """The last step that the tracker was told of."""
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_WINDOW))
    """Losses of the last steps."""
    returns: tuple[int, int] = (0, 0)
    """The step that the run last went back to, and how often in a row."""


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
        problem, progress = prepared(start, reporter.say)
        strategy = None
        if not _finished(progress, problem.job.run):
            problem, strategy = opened(problem, start, progress, reporter.say)
            stack.callback(strategy.close)
        tracker = tracker_of(problem.job, start, progress, reporter.say)
        stack.callback(tracker.close, "FAILED")  # unless the loop got to say how it ended
        folder = RunFolder(start, problem.job)
        stack.callback(folder.close)
        records = folder.records()
        for record in records:
            tracker.log_step(record)  # it leaves out what its store has
        if strategy is None:  # what was to be told may not have been
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
        run = _Run(problem, strategy, folder, tracker, reporter, check, progress)
        run.told = records[-1]["step"] if records else 0
        return _summary(start, _guarded(run))


def _guarded(run: _Run) -> Progress:
    """Runs the loop; whatever ends it, the last completed state is saved and the tracker told."""
    status = "FAILED"
    try:
        run.tracker.log_artifact(run.folder.path / "job.yaml")
        if run.progress.step == 0:
            _save(run)
        final = _all_steps(run)
        if failure := run.folder.publish():  # tried once more
            raise OSError(f"output: {failure}")
        run.tracker.log_artifact(final, "checkpoint")
        status = "FINISHED"
    except StopRequested:
        status = "KILLED"
        _save_what_is_left(run)
        raise InterruptedRun(str(run.folder.uri or run.folder.path), run.progress.step) from None
    except Exception:
        _save_what_is_left(run)
        raise
    finally:
        run.tracker.close(status)
    return run.progress


def _all_steps(run: _Run) -> Path:
    """The loop and its last checkpoint; where theta is lost on the way, on from the checkpoint before."""
    lost: LostStateError | None = None
    while True:
        try:
            if lost is not None:
                _go_back(run, lost)
            lost = None
            _loop(run)
            return _save(run)
        except LostStateError as error:
            lost = error


def _loop(run: _Run) -> None:
    """One step after the other, until all are done or validation stands still.

    A step's record waits in the progress until its evaluation is done: an interruption in between loses neither.
    """
    job = run.problem.job.run
    while not _finished(run.progress, job):
        if run.progress.pending is None:
            _advance(run)
        record, step = dict(run.progress.pending or {}), run.progress.step
        if job.eval_every and (step % job.eval_every == 0 or step == job.steps):
            record |= _validate(run)
        run.progress = replace(run.progress, pending=None)
        _write(run, record)
        last = step in (run.progress.best_step, job.steps)
        if last or (job.checkpoint_every and step % job.checkpoint_every == 0):
            _save(run)
        run.reporter.step(record)  # last: who is told may look at what is saved
    if run.progress.step < job.steps:
        run.reporter.say(f"validation stood still for {run.progress.stale} evaluations: stopped")


def _advance(run: _Run) -> None:
    """The next step; where the strategy takes several at once, all but the last are written without further ado."""
    _enter_phase(run, run.progress.step)
    records = run.strategy.advance(run.problem, run.progress.step, run.check)
    *earlier, record = [{**record, **run.changing} for record in records]
    loss = run.progress.loss if record["loss_after"] is None else record["loss_after"]
    run.progress = replace(run.progress, step=record["step"], loss=loss, pending=record)
    for before in earlier:
        _write(run, before)
    for before in earlier:
        run.reporter.step(before)


def _write(run: _Run, record: dict[str, Any]) -> None:
    run.folder.append(record)
    if record["step"] > run.told:  # else it was before the run went back
        run.tracker.log_step(record)
        run.told = record["step"]
    if record["loss_after"] is not None:
        _watch(run, record["step"], record["loss_after"])


def _watch(run: _Run, step: int, loss: float) -> None:
    """Says where losses begin to be far above those before."""
    recent = list(run.recent)
    if spikes(loss, recent) and not spikes(recent[-1], recent[:-1]):
        usual = statistics.median(recent)
        run.reporter.say(
            f"step {step}: loss {loss:.3g}, far above the last {len(recent)} steps (median {usual:.3g})"
        )
    run.recent.append(loss)


def _go_back(run: _Run, error: LostStateError) -> None:
    """The strategy lost theta: everything as it was at the last checkpoint.

    Raises:
        LostShardError: it was there before, as often as `run.max_shard_failures` allows.
    """
    path, checkpoint = checkpoints.load_whole(run.folder.path, run.reporter.say)
    progress = replace(checkpoint.progress, tracking_id=run.progress.tracking_id)
    step, times = run.returns
    run.returns = progress.step, times + 1 if step == progress.step else 1
    limit = run.problem.job.run.max_shard_failures
    if run.returns[1] > limit:
        raise LostShardError(f"{error}, {limit + 1} times since step {progress.step}")
    run.reporter.say(f"{error}: back to the checkpoint of step {progress.step}")
    run.folder.go_back(progress)
    run.progress, run.saved, run.changing = progress, (progress, path), {}
    run.problem = run.problem.at(run.problem.job.phase(last_step(progress)))
    run.strategy.load(checkpoint.state, outer_at(run.problem.job, progress))


def _finished(progress: Progress, job: RunSection) -> bool:
    """All steps done, or validation stood still for `run.patience` evaluations; and nothing left to evaluate."""
    patient = job.patience is None or progress.stale < job.patience
    return progress.pending is None and (progress.step >= job.steps or not patient)


def _enter_phase(run: _Run, step: int) -> None:
    """Takes up the values that the job's `changes` give the step after `step` completed ones."""
    job = run.problem.job
    phase = job.phase(step)
    if job.changes and (phase != run.problem.phase or not run.changing):
        run.changing = job.changed_values(step)
    if phase != run.problem.phase:
        run.problem = run.problem.at(phase)
        run.strategy.retune(job.at(step).outer)


def _validate(run: _Run) -> dict[str, float | None]:
    """Scores theta on the validation tasks, the same ones every time; notes whether it is the best so far."""
    results = evaluate_tasks(
        run.problem,
        run.strategy.pool,
        run.strategy.flat(),
        "val",
        run.problem.job.run.eval_tasks,
        run.check,
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


def _save(run: _Run) -> Path:
    """Saves the last completed state; the tracker knows its run's id once its store has answered."""
    run.progress = replace(run.progress, tracking_id=run.tracker.run_id or run.progress.tracking_id)
    if run.saved is not None and run.saved[0] == run.progress:
        return run.saved[1]
    run.folder.sync()
    theta, tensors, outer = run.strategy.state()
    state = Checkpoint(
        run.problem.job.to_dict(),
        theta,
        {name: value.cpu() for name, value in run.problem.model.constants.items()},
        tensors,
        outer,
        run.progress,
        examples_of(run.problem.family),
        fingerprint_of(run.problem.family),
    )
    path = checkpoints.save(run.folder.path, state, run.problem.job.run.keep)
    run.saved = (run.progress, path)
    if failure := run.folder.publish():
        run.reporter.say(f"output: {failure}; the next save tries again")
    return path


def _save_what_is_left(run: _Run) -> None:
    """As `_save`; where theta is lost, the last checkpoint is what is left."""
    try:
        _save(run)
    except LostStateError as error:
        run.reporter.say(f"{error}: what came after the last checkpoint is lost")
        run.progress = run.saved[0] if run.saved else run.progress


def _summary(start: Start, progress: Progress) -> Summary:
    return Summary(start.folder, progress.step, progress.loss, progress.best, progress.best_step, start.uri)
