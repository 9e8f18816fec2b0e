"""All trackers of a run, as one object for the training loop."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from distmeta.errors import InputError, first_line
from distmeta.tracking import background
from distmeta.tracking.background import BackgroundTracker, End
from distmeta.tracking.interface import AttachesFiles, Status, StepRecord, TrackedRun

ATTACH_SECONDS = 30.0
"""How long `attach_files` waits for a store."""


class NamedTracker(Protocol):
    """One tracker as a job names it (`config.sections`)."""

    @property
    def type(self) -> str: ...
    @property
    def part(self) -> Any:
        """The class."""
        ...

    @property
    def options(self) -> Mapping[str, Any]: ...


class Trackers:
    """The trackers of one run, by name. None of them can fail or slow the training."""

    def __init__(self, trackers: Mapping[str, BackgroundTracker]):
        self._trackers = dict(trackers)
        self._is_closed = False

    @property
    def ids(self) -> dict[str, str]:
        """The run's id in each store that has answered."""
        return {name: t.run_id for name, t in self._trackers.items() if t.run_id is not None}

    def log_step(self, record: Mapping[str, Any]) -> None:
        """Queue one line of metrics.jsonl. Values that are not finite numbers are left out."""
        values = {key: float(value) for key, value in record.items() if key != "step" and is_number(value)}
        step = StepRecord(int(record["step"]), time.time(), values)
        for tracker in self._trackers.values():
            tracker.log_step(step)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Queue a file or folder, to be stored under `folder` among the run's artifacts."""
        for tracker in self._trackers.values():
            tracker.log_artifact(path.absolute(), folder)

    def close(self, status: Status) -> None:
        """Deliver what is queued, for at most `CLOSE_SECONDS`, and set the status. Later calls do nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        end = End(status, time.time())
        deadline = time.monotonic() + background.CLOSE_SECONDS
        for tracker in self._trackers.values():
            tracker.request_end(end)
        for tracker in self._trackers.values():
            tracker.join(deadline - time.monotonic())


def is_number(value: Any) -> bool:
    """Return whether a value of a record is a finite number."""
    return isinstance(value, Real) and math.isfinite(value)


def name_trackers(sections: Sequence[NamedTracker]) -> dict[str, NamedTracker]:
    """Return the sections by the names of their trackers: the type, with a number from the second of a type on."""
    named: dict[str, NamedTracker] = {}
    counts: dict[str, int] = {}
    for section in sections:
        if section.type == "none":
            continue
        count = counts.get(section.type, 0) + 1
        counts[section.type] = count
        name = section.type if count == 1 else f"{section.type}-{count}"
        named[name] = section
    return named


def open_trackers(sections: Mapping[str, NamedTracker], run: TrackedRun, ids: Mapping[str, str]) -> Trackers:
    """Build the trackers and start their threads. Wait for their stores' first answers, at most `OPEN_SECONDS`.

    Args:
        sections: the job's trackers by name (`name_trackers`).
        run: the run that they track. Its `run_id` is replaced for each tracker.
        ids: the ids of the run to continue, by the tracker's name.

    Raises:
        InputError: a tracker's package is missing; an address, an account or an option is wrong.
    """
    built = {
        name: section.part(replace(run, run_id=ids.get(name)), **section.options)
        for name, section in sections.items()
    }
    started = {name: BackgroundTracker(name, tracker, run.report) for name, tracker in built.items()}
    trackers = Trackers(started)
    deadline = time.monotonic() + background.OPEN_SECONDS
    try:
        for tracker in started.values():
            tracker.wait_until_open(max(deadline - time.monotonic(), 0.0))
    except InputError:
        trackers.close("FAILED")
        raise
    return trackers


def attach_files(
    sections: Mapping[str, NamedTracker],
    ids: Mapping[str, str],
    paths: Sequence[Path],
    folder: str,
    report: Callable[[str], None],
) -> None:
    """Add files to a run that has ended, in every store that can. Report which store did not take them and why."""
    for name, section in sections.items():
        part = section.part
        if name not in ids or not isinstance(part, AttachesFiles):
            continue
        run = TrackedRun(name="", folder=Path(), report=report, run_id=ids[name])
        failure = _attach_with_timeout(section.part(run, **section.options), paths, folder)
        if failure:
            names = ", ".join(path.name for path in paths)
            report(f"tracking: {names} not sent to {name} ({failure})")


def _attach_with_timeout(tracker: AttachesFiles, paths: Sequence[Path], folder: str) -> str | None:
    """Return why the files were not attached, or None if they were."""
    outcome = ["it does not answer"]

    def attach() -> None:
        try:
            tracker.attach_files(paths, folder)
            outcome[0] = ""
        except Exception as error:  # a tracker may raise anything
            outcome[0] = first_line(error)

    thread = threading.Thread(target=attach, name="distmeta-artifacts", daemon=True)
    thread.start()
    thread.join(ATTACH_SECONDS)
    return outcome[0] or None
