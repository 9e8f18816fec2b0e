"""Train a job from its start or from a checkpoint to its end."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from distmeta.config.job import Job
from distmeta.errors import InputError, redact
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.checkpoint import Progress
from distmeta.runtime.interruption import catch_signals
from distmeta.runtime.loop import Training, is_finished
from distmeta.runtime.reporter import Reporter, SilentReporter
from distmeta.runtime.resume import find_starting_point
from distmeta.runtime.run_folder import RunFolder, StartingPoint
from distmeta.runtime.startup import prepare_problem, start_strategy, start_trackers
from distmeta.tracking.trackers import Trackers


@dataclass(frozen=True)
class Run:
    """What a training leaves behind."""

    run: Path
    """The run folder."""
    step: int
    """Completed steps."""
    loss: float | None
    """Mean query loss after adaptation in the last step."""
    best: float | None
    """Best validation score."""
    best_step: int | None
    uri: str | None = None
    """Where the run is copied to, if the job's output is a URI."""

    @property
    def place(self) -> str:
        """How to refer to the run: its URI, else its folder."""
        return self.uri or str(self.run)


def train(job: Job | str | Path, resume: str | Path | None = None, reporter: Reporter | None = None) -> Run:
    """Train a job, or continue a run.

    Args:
        job: a job, or the path of a job file.
        resume: a run folder or checkpoint to continue. "auto": the folder that `run.name` names, if it has something.
        reporter: is told how the run goes.

    Raises:
        InputError: the job or the resume is impossible. Nothing was written, except if the mistake only shows in the
            first step (a compiled gradient that differs from the eager one): then the run is at step 0.
        InterruptedRun: Ctrl-C or SIGTERM. The last completed step was saved.
        NumericsError: a meta-gradient was not finite, with `run.on_nonfinite: stop`. The last step was saved.
    """
    reporter = reporter or SilentReporter()
    start = find_starting_point(job if isinstance(job, Job) else Job.load(job), resume, reporter.report)
    with ExitStack() as stack:
        stack.callback(start.close)
        problem, progress = prepare_problem(start, reporter.report)
        strategy = None
        if not is_finished(progress, problem.job):
            problem, strategy = start_strategy(problem, start, progress, reporter.report)
            stack.callback(strategy.close)
        trackers = start_trackers(problem.job, start, progress, reporter.report)
        stack.callback(trackers.close, "FAILED")  # does nothing if the loop has set another status
        folder = RunFolder(start, problem.job)
        stack.callback(folder.close)
        stack.callback(_save_late_ids, folder, trackers)  # called when the trackers are closed
        records = folder.records()
        for record in records:
            trackers.log_step(record)  # each tracker sends only what its store lacks
        if strategy is None:
            steps = problem.job.run.steps
            reporter.report(f"{start.place} is at step {progress.step} of {steps}: nothing to do")
            trackers.close("FINISHED")
            return _summarize(start, progress)
        stop = stack.enter_context(catch_signals())
        reporter.begin(folder.path, problem.job, progress.step)
        stack.callback(reporter.end)
        if start.uri is not None:
            reporter.report(f"copied after each save to {redact(start.uri)}")
        if problem.job.compute.compile:
            reporter.report("compiling the gradient: the first step takes half a minute or more")
        training = Training(
            problem, strategy, folder, trackers, reporter, stop, progress, bool(problem.job.trackers)
        )
        training.last_tracked_step = records[-1]["step"] if records else 0
        training.run()
        return _summarize(start, training.progress)


def _save_late_ids(folder: RunFolder, trackers: Trackers) -> None:
    """Add the ids that trackers only learned after the last save to that checkpoint.

    A store may answer for the first time while the run ends. Without its id, a resume would start a second run there.
    """
    latest = folder.path / "checkpoints" / "latest"
    with suppress(OSError, InputError):  # a full disk, or a save that failed, was reported before
        if latest.exists() and checkpoints.add_tracking_ids(checkpoints.find(latest), trackers.ids):
            folder.publish()


def _summarize(start: StartingPoint, progress: Progress) -> Run:
    return Run(start.folder, progress.step, progress.loss, progress.best, progress.best_step, start.uri)
