"""One thread per tracker. It makes training independent of the tracker's speed and failures.

The training appends records and file names to two queues. The thread empties them every `PERIOD` seconds, steps before
files. If a call raises, everything stays in the queues and is sent later.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from distmeta.errors import InputError, first_line, summarize_error
from distmeta.tracking.interface import LogsBatches, RefusedError, SetsStatus, Status, StepRecord, Tracker

PERIOD = 2.0
"""Seconds between two deliveries."""
OPEN_SECONDS = 20.0
"""How long the start of a training waits for a store's first answer. A new SQLite store of MLflow takes about 5 s."""
CLOSE_SECONDS = 10.0
"""How long the end of a training waits until everything is delivered."""
LONGEST_PAUSE = 15.0
"""Longest pause, in seconds, before the next attempt to reach a store that does not answer."""
MAX_BATCH = 1000
"""Most steps that are offered to a tracker in one call."""


class End(NamedTuple):
    """How and when a run ended."""

    status: Status
    time: float
    """Seconds since 1970."""


class BackgroundTracker:
    """Runs a tracker in its own daemon thread.

    Args:
        name: the tracker's name in messages (`trackers.name_trackers`).
    """

    def __init__(self, name: str, tracker: Tracker, report: Callable[[str], None]):
        self._name = name
        self._tracker = tracker
        self._report = report
        self._steps: deque[StepRecord] = deque()
        self._files: deque[tuple[Path, str]] = deque()
        self._refused_steps = 0
        self._refused_files = 0
        self._is_open = False
        self._is_away = False
        self._reason = ""  # the last failure, in parentheses
        self._mistake: InputError | None = None
        self._end: End | None = None
        self._answered = threading.Event()
        self._wake = threading.Event()
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"distmeta-tracking-{name}", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        return self._tracker.run_id

    def wait_until_open(self, seconds: float) -> None:
        """Wait for the store's first answer. Training starts even if there is none.

        Raises:
            InputError: an address, an account or an option is wrong.
        """
        if not self._answered.wait(seconds):
            self._is_away = True
            self._answered.set()  # from now on every error counts as an outage, also an InputError
            self._report(f"tracking: no answer from {self._name} yet; training starts without waiting for it")
        if self._mistake is not None:
            raise self._mistake

    def log_step(self, record: StepRecord) -> None:
        """Queue the numbers of a step."""
        self._steps.append(record)

    def log_artifact(self, path: Path, folder: str) -> None:
        """Queue a file or a folder. It is read when its turn comes."""
        self._files.append((path, folder))

    def request_end(self, end: End) -> None:
        """Ask the thread to deliver what is queued and to end."""
        self._end = end
        self._wake.set()

    def join(self, seconds: float) -> None:
        """Wait for the thread to end, then report what was not delivered."""
        self._thread.join(max(seconds, 0.0))
        self._abandoned.set()
        steps = len(self._steps) + self._refused_steps
        files = len(self._files) + self._refused_files
        is_late = self._thread.is_alive()
        if steps or files or is_late:
            status = f"; its status {self._end.status} was not set" if self._end and is_late else ""
            self._report(
                f"tracking: {steps} steps and {files} files of this run did not reach {self._name}"
                f"{self._reason}; the run folder has them{status}"
            )

    def _run(self) -> None:
        """Deliver every `PERIOD` seconds; wait longer while that fails. No exception leaves this method."""
        pause = 0.0
        while not self._abandoned.is_set():
            self._wake.wait(pause)
            end = self._end  # read before delivering: everything queued before the end is then delivered
            try:
                self._deliver(end)
            except Exception as error:  # whatever a tracker, a database driver or an HTTP client raises
                if isinstance(error, InputError) and not self._answered.is_set():
                    self._mistake = error
                    break
                pause = self._note_failure(error, pause)
                if end is not None:
                    self._abandoned.wait(1.0)  # `_wake` is set for good and would not pause
            else:
                pause = PERIOD
                self._note_success()
                if end is not None:
                    break
            self._answered.set()
        self._answered.set()

    def _note_failure(self, error: Exception, pause: float) -> float:
        """Report the first failure of an outage. Return the pause before the next attempt, in seconds."""
        self._reason = f" ({summarize_error(error)})"
        if not self._is_away:
            self._is_away = True
            self._report(f"tracking: {self._name} is away, records are kept and sent later{self._reason}")
            return 1.0
        return min(max(2 * pause, 1.0), LONGEST_PAUSE)

    def _note_success(self) -> None:
        if self._is_away:
            self._is_away = False
            self._reason = ""
            self._report(f"tracking: {self._name} answers again; everything kept was sent")

    def _deliver(self, end: End | None) -> None:
        tracker = self._tracker
        if not self._is_open:
            tracker.open()
            self._is_open = True
        self._send_steps()
        if end is not None and isinstance(tracker, SetsStatus):
            tracker.set_status(end.status, end.time)
        self._send_files()
        if end is not None:
            tracker.close(end.status)

    def _send_steps(self) -> None:
        while self._steps:
            if self._steps[0].step <= self._tracker.last_step:
                self._steps.popleft()
                continue
            for _ in range(self._send_first_steps()):
                self._steps.popleft()

    def _send_first_steps(self) -> int:
        """Send the first steps of the queue. Return how many are done."""
        tracker = self._tracker
        count = min(len(self._steps), MAX_BATCH)
        records = [self._steps[i] for i in range(count)]  # by index: the training may append meanwhile
        if isinstance(tracker, LogsBatches):
            try:
                return tracker.log_steps(records)
            except RefusedError:
                pass  # one of them is refused; send only the first, to find out which
        try:
            tracker.log_step(records[0])
        except RefusedError as error:
            self._refused_steps += 1
            if self._refused_steps == 1:
                step = records[0].step
                self._report(
                    f"tracking: step {step} was refused by {self._name}; others are counted ({first_line(error)})"
                )
        return 1

    def _send_files(self) -> None:
        while self._files:
            path, folder = self._files[0]
            if not path.exists():
                self._note_refused_file(path, "it does not exist")
            else:
                try:
                    self._tracker.log_artifact(path, folder)
                except RefusedError as error:
                    self._note_refused_file(path, first_line(error))
            self._files.popleft()

    def _note_refused_file(self, path: Path, reason: str) -> None:
        self._refused_files += 1
        self._report(f"tracking: {path} was not sent to {self._name} ({reason})")
