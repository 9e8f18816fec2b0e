"""The training loop: take a step, write its record, evaluate, save."""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from distmeta.compute.vectors import Layout
from distmeta.config.job import Job
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.checkpoint import Progress
from distmeta.runtime.failure_policy import LostShardError
from distmeta.runtime.interruption import InterruptedRun, StopRequested
from distmeta.runtime.outer_optimizer import select_average
from distmeta.runtime.parameter_server import mean_metrics
from distmeta.runtime.problem import Problem, build_checkpoint
from distmeta.runtime.reporter import Reporter
from distmeta.runtime.run_folder import RunFolder
from distmeta.runtime.scores import describe_harm, evaluate_tasks, find_primary_metric, join_metrics
from distmeta.runtime.startup import last_step, outer_settings_at
from distmeta.runtime.strategy import LostStateError, Record, Strategy
from distmeta.tracking.interface import Status
from distmeta.tracking.trackers import Trackers

SPIKE_WINDOW = 50
"""A loss is compared with that many losses before it."""
SPIKE_LEAST = 20
"""With fewer losses before it, a loss is no spike."""
SPIKE_FACTOR = 10.0


@dataclass
class Training:
    """A training in progress."""

    problem: Problem
    strategy: Strategy
    folder: RunFolder
    trackers: Trackers
    reporter: Reporter
    stop: threading.Event
    """Set by a signal."""
    progress: Progress
    is_tracked: bool
    """Whether the job has trackers."""
    changed_values: Mapping[str, float] = field(default_factory=dict)
    """The current values of the keys that the job changes at any step."""
    next_change: int | None = 0
    """Completed steps before the next of the job's changes; None if no more will come."""
    saved: tuple[Progress, Path] | None = None
    """What the last checkpoint holds, and its folder."""
    last_tracked_step: int = 0
    """The last step that the trackers were told."""
    recent_losses: deque[float] = field(default_factory=lambda: deque(maxlen=SPIKE_WINDOW))
    rewound_to: int | None = None
    """The step of the checkpoint that the run last returned to."""
    harm: str | None = None
    """What the last evaluation says about tasks that adaptation makes worse."""
    rewinds: int = 0
    """How often in a row it returned there."""

    # --- The loop -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end. Whatever ends the loop, the last completed state is saved and the trackers are told."""
        status: Status = "FAILED"
        try:
            self.trackers.log_artifact(self.folder.path / "job.yaml")
            if self.progress.step == 0:
                self._save()
            last_checkpoint = self._take_all_steps()
            failure = self.folder.publish()  # one more attempt
            if failure:
                raise OSError(f"output: {failure}")
            self.trackers.log_artifact(last_checkpoint, "checkpoint")
            status = "FINISHED"
        except StopRequested:
            status = "KILLED"
            self._save_what_is_left()
            raise InterruptedRun(str(self.folder.uri or self.folder.path), self.progress.step) from None
        except Exception:
            self._save_what_is_left()
            raise
        finally:
            self.trackers.close(status)

    def _take_all_steps(self) -> Path:
        """Run the loop, and return the last checkpoint. If theta is lost, continue from the checkpoint before."""
        lost: LostStateError | None = None
        while True:
            try:
                if lost is not None:
                    self._rewind(lost)
                self._loop()
                return self._save()
            except LostStateError as error:
                lost = error

    def _loop(self) -> None:
        """Take one step after the other.

        A step's record waits in `progress.pending` until its evaluation is done, so that an interruption in between
        loses neither.
        """
        run = self.problem.job.run
        while not is_finished(self.progress, self.problem.job):
            if self.progress.pending is None:
                self._advance()
            record = dict(self.progress.pending or {})
            step = self.progress.step
            if run.eval_every and (step % run.eval_every == 0 or step == run.steps):
                record |= self._validate()
            self.progress = replace(self.progress, pending=None)
            self._write(record)
            must_save = step in (self.progress.best_step, run.steps)
            if must_save or (run.checkpoint_every and step % run.checkpoint_every == 0):
                self._save()
            self.reporter.step(record)  # last: a reporter may look at what is saved
        if self.harm is not None:
            self.reporter.report(self.harm)
        if self.progress.step < run.steps:
            stale = self.progress.stale
            self.reporter.report(f"validation has not improved for {stale} evaluations: stopped")

    def _advance(self) -> None:
        """Take the next step. If the strategy takes several at once, only the last one can be evaluated."""
        step = self.progress.step
        if self.next_change is not None and step >= self.next_change:
            self._enter_phase(step)
        records = self.strategy.advance(self.problem, step, self.check)
        *earlier, record = [{**record, **self.changed_values} for record in records]
        loss = self.progress.loss if record["loss_after"] is None else record["loss_after"]
        self.progress = replace(self.progress, step=record["step"], loss=loss, pending=record)
        for earlier_record in earlier:
            self._write(earlier_record)
        for earlier_record in earlier:
            self.reporter.step(earlier_record)

    def check(self) -> None:
        """Abandon the step if a signal came. Strategies and pools call it while they wait, and between shards."""
        if self.stop.is_set():
            raise StopRequested

    def _enter_phase(self, step: int) -> None:
        """Take up the values that the job's changes give to the step after `step` completed ones."""
        job = self.problem.job
        upcoming = [change.step for change in job.changes if change.step > step]
        self.next_change = upcoming[0] if upcoming else None
        self.changed_values = job.changed_values(step)
        phase = job.phase(step)
        if phase != self.problem.phase:
            self.problem = self.problem.at(phase)
            self.strategy.retune(job.at(step).outer)

    def _write(self, record: Record) -> None:
        self.folder.append(record)
        # after a return to a checkpoint, trackers already know the steps that are repeated
        if self.is_tracked and record["step"] > self.last_tracked_step:
            self.trackers.log_step(record)
            self.last_tracked_step = record["step"]
        if record["loss_after"] is not None:
            self._report_spike(record["step"], record["loss_after"])
            self.recent_losses.append(record["loss_after"])

    def _report_spike(self, step: int, loss: float) -> None:
        """Tell the user if the losses begin to be far above those before."""
        recent = list(self.recent_losses)
        if is_spike(loss, recent) and not is_spike(recent[-1], recent[:-1]):
            median = statistics.median(recent)
            self.reporter.report(
                f"step {step}: loss {loss:.3g}, far above the last {len(recent)} steps (median {median:.3g})"
            )

    def _validate(self) -> Record:
        """Score theta on the validation tasks, the same ones every time, and note whether it is the best so far."""
        flat = self._find_evaluated_theta()
        count = self.problem.job.run.eval_tasks
        results = evaluate_tasks(self.problem, self.strategy.pool, flat, "val", count, self.check)
        self.harm = describe_harm(join_metrics(results), "validation tasks")
        record = {f"val_{name}": value for name, value in mean_metrics(results, over_all=True).items()}
        name, sign = find_primary_metric(record, "val_")
        value = record[name]
        best = self.progress.best
        if value is not None and (best is None or sign * value > sign * best):
            self.progress = replace(self.progress, best=value, best_step=self.progress.step, stale=0)
        else:
            self.progress = replace(self.progress, stale=self.progress.stale + 1)
        return record

    def _find_evaluated_theta(self) -> np.ndarray:
        """Return theta as a flat vector, or its moving average if the job keeps one."""
        if self.problem.job.outer.ema is None:
            return self.strategy.flat()
        theta, tensors, _ = self.strategy.state()
        return Layout.from_theta(theta).flatten(select_average(theta, tensors))

    # --- Saving ---------------------------------------------------------------------------------------------------

    def _save(self) -> Path:
        """Save the last completed state, unless that has been done. Return the checkpoint's folder."""
        # a tracker knows its run's id as soon as its store has answered
        self.progress = replace(self.progress, tracking_ids=self.progress.tracking_ids | self.trackers.ids)
        if self.saved is not None and self.saved[0] == self.progress:
            return self.saved[1]
        self.folder.flush()
        checkpoint = build_checkpoint(self.problem, self.strategy.state(), self.progress)
        path = checkpoints.save(self.folder.path, checkpoint, self.problem.job.run.keep)
        self.saved = (self.progress, path)
        failure = self.folder.publish()
        if failure:
            self.reporter.report(f"output: {failure}; the next save tries again")
        return path

    def _save_what_is_left(self) -> None:
        """Save. If theta is lost, the last checkpoint is what is left."""
        try:
            self._save()
        except LostStateError as error:
            self.reporter.report(f"{error}: the steps after the last checkpoint are lost")
            self.progress = self.saved[0] if self.saved else self.progress

    # --- Lost theta -----------------------------------------------------------------------------------------------

    def _rewind(self, error: LostStateError) -> None:
        """Return to the last checkpoint.

        Raises:
            LostShardError: the run has returned there as often as `run.max_shard_failures` allows.
        """
        path, checkpoint = checkpoints.load_newest_intact(self.folder.path, self.reporter.report)
        progress = replace(checkpoint.progress, tracking_ids=self.progress.tracking_ids)
        self.rewinds = self.rewinds + 1 if self.rewound_to == progress.step else 1
        self.rewound_to = progress.step
        limit = self.problem.job.run.max_shard_failures
        if self.rewinds > limit:
            raise LostShardError(f"{error}, {limit + 1} times since step {progress.step}")
        self.reporter.report(f"{error}: back to the checkpoint of step {progress.step}")
        self.folder.rewind(progress)
        self.progress = progress
        self.saved = (progress, path)
        self.changed_values = {}
        self.next_change = 0
        self.problem = self.problem.at(self.problem.job.phase(last_step(progress)))
        self.strategy.load(checkpoint.state, outer_settings_at(self.problem.job, progress))


def is_finished(progress: Progress, job: Job) -> bool:
    """Return whether nothing is left to do: all steps are done, or validation has not improved for too long."""
    has_patience = job.run.patience is None or progress.stale < job.run.patience
    return progress.pending is None and (progress.step >= job.run.steps or not has_patience)


def is_spike(loss: float, recent: Sequence[float]) -> bool:
    """Return whether a loss is far above the recent ones.

    It is if it exceeds their median by more than the median's size and ten times their median absolute deviation.
    """
    if len(recent) < SPIKE_LEAST:
        return False
    median = statistics.median(recent)
    deviation = statistics.median(abs(one - median) for one in recent)
    return loss - median > max(SPIKE_FACTOR * deviation, abs(median))
