"""The thread around a tracker: a tracker that fails, blocks or refuses must not disturb the training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from distmeta.errors import InputError
from distmeta.tracking import background
from distmeta.tracking.interface import RefusedError, Status, StepRecord, TrackedRun
from distmeta.tracking.trackers import Trackers, name_trackers, open_trackers


class ListTracker:
    """Keeps what it gets in lists."""

    def __init__(self, run: TrackedRun, store: list[Any], last_step: int = 0):
        self.run_id = run.run_id
        self.last_step = last_step
        self.store = store

    def open(self) -> None:
        self.run_id = self.run_id or "new"

    def log_step(self, record: StepRecord) -> None:
        self.store.append(record.step)

    def log_artifact(self, path: Path, folder: str) -> None:
        self.store.append(path.name)

    def close(self, status: Status) -> None:
        self.store.append(status)


@dataclass
class Section:
    part: Any
    options: dict[str, Any] = field(default_factory=dict)
    type: str = "mine"


def open_one(part: Any, reported: list[str], ids: dict[str, str] | None = None, **options: Any) -> Trackers:
    run = TrackedRun(name="a", folder=Path(), report=reported.append)
    return open_trackers({"mine": Section(part, options)}, run, ids or {})


def test_steps_files_and_status_arrive_in_order(tmp_path: Path) -> None:
    store: list[Any] = []
    reported: list[str] = []
    trackers = open_one(ListTracker, reported, store=store)
    assert trackers.ids == {"mine": "new"}
    path = tmp_path / "job.yaml"
    path.touch()
    trackers.log_artifact(path)
    for step in (1, 2, 3):
        trackers.log_step({"step": step, "loss": 1.0})
    trackers.close("FINISHED")
    trackers.close("FAILED")  # does nothing
    assert [entry for entry in store if entry != "job.yaml"] == [1, 2, 3, "FINISHED"]
    assert "job.yaml" in store
    assert reported == []


def test_values_are_finite_numbers() -> None:
    class Values(ListTracker):
        def log_step(self, record: StepRecord) -> None:
            self.store.append(record.values)

    store: list[Any] = []
    trackers = open_one(Values, [], store=store)
    trackers.log_step({"step": 1, "a": 1, "b": None, "c": float("nan"), "d": "text", "e": 0.5})
    trackers.close("FINISHED")
    assert store[0] == {"a": 1.0, "e": 0.5}


def test_only_steps_that_the_store_lacks_are_sent() -> None:
    store: list[Any] = []
    trackers = open_one(ListTracker, [], {"mine": "old"}, store=store, last_step=3)
    assert trackers.ids == {"mine": "old"}
    for step in range(1, 6):
        trackers.log_step({"step": step, "loss": 1.0})
    trackers.close("FINISHED")
    assert store == [4, 5, "FINISHED"]


def test_a_failing_tracker_gets_everything_when_it_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Flaky(ListTracker):
        failures = 3

        def log_step(self, record: StepRecord) -> None:
            if record.step == 2 and self.failures:
                self.failures -= 1
                raise KeyError("a bug in somebody's tracker")
            super().log_step(record)

    monkeypatch.setattr(background, "LONGEST_PAUSE", 0.01)
    store: list[Any] = []
    reported: list[str] = []
    trackers = open_one(Flaky, reported, store=store)
    for step in (1, 2, 3):
        trackers.log_step({"step": step, "loss": 1.0})
    trackers.close("FINISHED")
    assert store == [1, 2, 3, "FINISHED"]
    assert len(reported) == 2
    assert "tracking: mine is away, records are kept and sent later (KeyError" in reported[0]
    assert "answers again" in reported[1]


def test_a_tracker_that_blocks_does_not_hold_up_training(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blocking(ListTracker):
        def log_step(self, record: StepRecord) -> None:
            Event().wait(60)

    monkeypatch.setattr(background, "CLOSE_SECONDS", 0.2)
    reported: list[str] = []
    trackers = open_one(Blocking, reported, store=[])
    began = time.monotonic()
    for step in range(1, 1001):
        trackers.log_step({"step": step, "loss": 1.0})
    trackers.close("FINISHED")
    assert time.monotonic() - began < 30, "the store blocks for 60 s"
    assert reported == [
        "tracking: 1000 steps and 0 files of this run did not reach mine; the run folder has them; "
        "its status FINISHED was not set"
    ]


def test_a_mistake_in_open_ends_the_start() -> None:
    class Mistaken(ListTracker):
        def open(self) -> None:
            raise InputError("mine.address: wrong")

    other: list[Any] = []
    run = TrackedRun(name="a", folder=Path(), report=print)
    sections = {"other": Section(ListTracker, {"store": other}), "mine": Section(Mistaken, {"store": []})}
    with pytest.raises(InputError, match=r"mine\.address: wrong"):
        open_trackers(sections, run, {})
    assert other == ["FAILED"]  # the tracker that had started is told


def test_any_other_error_in_open_is_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(ListTracker):
        attempts = 0

        def open(self) -> None:
            self.attempts += 1
            if self.attempts < 3:
                raise ConnectionError("not yet")
            super().open()

    monkeypatch.setattr(background, "LONGEST_PAUSE", 0.01)
    store: list[Any] = []
    reported: list[str] = []
    trackers = open_one(Late, reported, store=store)
    assert trackers.ids == {}
    trackers.log_step({"step": 1, "loss": 1.0})
    trackers.close("FINISHED")
    assert store == [1, "FINISHED"]
    assert trackers.ids == {"mine": "new"}
    assert len(reported) == 2


def test_a_refused_step_in_a_batch_is_the_only_one_that_is_lost() -> None:
    class Batches(ListTracker):
        def log_steps(self, records: Sequence[StepRecord]) -> int:
            batch = records[:4]
            for record in batch:
                self.check(record)
            self.store.append([record.step for record in batch])
            return len(batch)

        def log_step(self, record: StepRecord) -> None:
            self.check(record)
            super().log_step(record)

        def check(self, record: StepRecord) -> None:
            if record.step == 6:
                raise RefusedError("a bad step")

    store: list[Any] = []
    reported: list[str] = []
    trackers = open_one(Batches, reported, store=store)
    for step in range(1, 13):
        trackers.log_step({"step": step, "loss": 1.0})
    trackers.close("FINISHED")
    sent: list[int] = []
    for entry in store[:-1]:
        sent += entry if isinstance(entry, list) else [entry]
    assert sent == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]
    assert "step 6 was refused by mine; others are counted (a bad step)" in reported[0]
    assert "1 steps and 0 files" in reported[1]


def test_a_refused_file_does_not_hold_up_the_others(tmp_path: Path) -> None:
    class Picky(ListTracker):
        def log_artifact(self, path: Path, folder: str) -> None:
            if path.name == "bad":
                raise RefusedError("too large")
            super().log_artifact(path, folder)

    for name in ("bad", "good"):
        (tmp_path / name).touch()
    store: list[Any] = []
    reported: list[str] = []
    trackers = open_one(Picky, reported, store=store)
    for name in ("bad", "missing", "good"):
        trackers.log_artifact(tmp_path / name)
    trackers.close("FINISHED")
    assert store == ["good", "FINISHED"]
    assert "bad was not sent to mine (too large)" in reported[0]
    assert "missing was not sent to mine (it does not exist)" in reported[1]
    assert "0 steps and 2 files" in reported[2]


def test_the_status_is_set_before_the_last_files(tmp_path: Path) -> None:
    class WithStatus(ListTracker):
        def log_artifact(self, path: Path, folder: str) -> None:
            if not any(isinstance(entry, tuple) for entry in self.store):
                raise ConnectionError("the upload is slow")
            super().log_artifact(path, folder)

        def set_status(self, status: Status, time: float) -> None:
            self.store.append((status, time))

    (tmp_path / "file").touch()
    store: list[Any] = []
    trackers = open_one(WithStatus, [], store=store)
    trackers.log_artifact(tmp_path / "file")
    trackers.close("KILLED")
    assert store[0][0] == "KILLED"
    assert abs(store[0][1] - time.time()) < 60
    assert store[-2:] == ["file", "KILLED"]


def test_trackers_are_named_by_type_and_numbered() -> None:
    sections = [Section(None, {}, kind) for kind in ("mlflow", "none", "tensorboard", "mlflow")]
    named = name_trackers(sections)
    assert list(named) == ["mlflow", "tensorboard", "mlflow-2"]
    assert named["mlflow-2"] is sections[3]


def test_no_tracker_does_nothing(tmp_path: Path) -> None:
    trackers = open_trackers({}, TrackedRun(name="a", folder=tmp_path, report=print), {})
    trackers.log_step({"step": 1, "loss": 1.0})
    trackers.log_artifact(Path("missing"))
    trackers.close("FINISHED")
    assert trackers.ids == {}
    assert list(tmp_path.iterdir()) == []
