"""What happened, sent to MLflow by a background thread. Training neither waits for it nor fails with it.

The training thread appends to two queues; one daemon thread owns the client and empties them: metrics first,
in order, every 2 s, then files. Where a store is away, everything stays queued. `metrics.jsonl` in the run
folder is the truth; the store is a copy of it.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from distmeta.errors import redact
from distmeta.tracking.mlflow_store import (
    MAX_VALUE,
    Request,
    create_run,
    describe,
    find_run,
    flatten,
    import_mlflow,
    is_final,
    is_refusal,
    name_of,
    open_client,
    quiet_thread,
    reason,
    running_children,
)

Status = Literal["FINISHED", "FAILED", "KILLED"]
Say = Callable[[str], None]

PERIOD = 2.0  # seconds between two deliveries
OPEN_SECONDS = 20.0  # how long a start waits for the store's first answer: a new SQLite store takes about 5
CLOSE_SECONDS = 10.0  # how long an end waits for what is queued
LONGEST_BACKOFF = 15.0
FILE_TRIES = 5  # for a file that a store which does answer cannot take
MAX_METRICS = 1000  # MLflow's limit on one call


class Tracker(Protocol):
    """Where a run's history goes besides its folder. Called from one thread; `say` is called from another."""

    @property
    def run_id(self) -> str | None:
        """The store's name for the run; None until the store has answered."""
        ...

    def log_step(self, record: Mapping[str, Any]) -> None:
        """Queue one line of metrics.jsonl. It has `step`; what is no number is left out, and what was sent before."""
        ...

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Queue a file or folder, read when its turn comes; `folder`: its place among the artifacts."""
        ...

    def close(self, status: Status) -> None:
        """Deliver what is queued, for at most CLOSE_SECONDS, set the status, say what was not delivered."""
        ...


class Step(NamedTuple):
    """One line of metrics.jsonl, waiting."""

    step: int
    time_ms: int
    values: dict[str, Any]


def points(step: Step, seen: Mapping[str, int]) -> list[tuple[str, float]]:
    """The numbers of one step that were not sent before: those past the last step that their own name has.

    Per name, for names are logged at different steps: val_loss at every hundredth, after loss at the same.
    """
    named = ((name_of(key), value) for key, value in step.values.items() if key != "step")
    return [(k, float(v)) for k, v in named if isinstance(v, Real) and step.step > seen.get(k, -1)]


def first_batch(steps: deque[Step]) -> list[Step]:
    """The first steps that together stay within one call; at least one. Another thread may be appending."""
    batch, count = [], 0
    for i in range(len(steps)):
        count += len(steps[i].values)
        if batch and count > MAX_METRICS:
            break
        batch.append(steps[i])
    return batch


def open_tracker(
    kind: Literal["mlflow", "none"],
    *,
    run_name: str,
    experiment: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    run_id: str | None,
    say: Say,
) -> Tracker:
    """A tracker for a new run, or for `run_id` continued. Store, experiment and account: MLflow's variables.

    Waits for the store's first answer, at most OPEN_SECONDS. A store that is away is said and retried.
    Raises InputError: the store's address, account or experiment is wrong.
    """
    if kind == "none":
        return NoTracker()
    uri = import_mlflow()
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or experiment
    remote = uri.startswith(("http:", "https:", "databricks"))
    beside = Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") else Path()
    folder = (beside / "mlartifacts").absolute() / (re.sub(r"[^\w.-]+", "_", name).strip(".") or "_")
    request = Request(
        uri=uri,
        run_id=run_id,
        run_name=run_name,
        experiment=name,
        experiment_id=os.environ.get("MLFLOW_EXPERIMENT_ID") or None,
        artifacts=None if remote else folder.as_uri(),
        params=flatten(params),
        tags=dict(tags),
    )
    tracker = MlflowTracker(request, say)
    tracker.wait_for_answer()
    return tracker


def left_running(parent: str | None) -> set[str]:
    """Ids of the runs under a parent that were not told how they ended; empty where the store does not answer."""
    if parent is None:
        return set()
    client = open_client(import_mlflow())
    try:
        with quiet_thread():
            return running_children(client, parent)
    except Exception:  # whatever a database driver or a cloud's client may raise; the tracker has said it
        return set()


def tag_runs(tags: Mapping[str, Mapping[str, str]]) -> None:
    """Sets tags of runs by their ids; nothing where the store does not answer."""
    client = open_client(import_mlflow())
    try:
        with quiet_thread():
            for run_id, texts in tags.items():
                for key, text in texts.items():
                    client.set_tag(run_id, key, text[:MAX_VALUE])
    except Exception:  # as above
        return


class NoTracker:
    """Keeps nothing: the run folder has it all."""

    run_id: str | None = None

    def log_step(self, record: Mapping[str, Any]) -> None:
        pass

    def log_artifact(self, path: Path, folder: str = "") -> None:
        pass

    def close(self, status: Status) -> None:
        pass


class MlflowTracker:
    """Owns the background thread, which owns the client."""

    def __init__(self, request: Request, say: Say):
        self.run_id = request.run_id
        self._request, self._say, self._where = request, say, redact(request.uri)
        self._steps: deque[Step] = deque()
        self._files: deque[tuple[Path, str]] = deque()
        self._client: Any = None
        self._seen: dict[str, int] | None = None  # each name's last step in the store; None: not connected
        self._refused = self._lost = self._tries = 0
        self._down = False
        self._why = ""  # the last failure
        self._mistake: BaseException | None = None
        self._end: tuple[Status, int] | None = None  # the status asked for, and when
        self._answered, self._wake, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="distmeta-tracking", daemon=True)
        self._thread.start()

    def wait_for_answer(self) -> None:
        if not self._answered.wait(OPEN_SECONDS):
            self._down = True
            self._answered.set()  # too late to be an error: from here on it is an outage, whatever it is
            self._say(f"tracking: no answer from {self._where} yet; training starts without waiting for it")
        if self._mistake is not None:
            from distmeta.errors import InputError

            if isinstance(self._mistake, InputError):
                raise self._mistake
            got = f"got {self._where!r}, which MLflow does not take ({reason(self._mistake)})"
            remedy = "expected sqlite:///FILE, a database or an http(s) server, or tracking.type: none"
            raise InputError(f"MLFLOW_TRACKING_URI: {got}; {remedy}") from None

    def log_step(self, record: Mapping[str, Any]) -> None:
        self._steps.append(Step(int(record["step"] or 0), time.time_ns() // 1_000_000, dict(record)))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        self._files.append((Path(path).absolute(), folder))

    def close(self, status: Status) -> None:
        if self._end is not None:
            return
        self._end = (status, time.time_ns() // 1_000_000)
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)
        self._abandoned.set()
        steps, files = len(self._steps) + self._refused, len(self._files) + self._lost
        if steps or files or self._thread.is_alive():
            late = f", nor its status {status}" if self._thread.is_alive() else ""
            what = f"{steps} steps and {files} files of this run{late}"
            self._say(f"tracking: {what} did not reach {self._where}{self._why}; the run folder has them")

    def _work(self) -> None:
        """Deliver every PERIOD; back off while that fails. Nothing raised here may reach training."""
        delay = 0.0
        with quiet_thread():
            while not self._abandoned.is_set():
                self._wake.wait(delay)
                end = self._end  # read first: what was queued before close() is then delivered with it
                try:
                    self._deliver(end)
                except Exception as error:  # whatever a database driver or a cloud's client may raise
                    if not self._answered.is_set() and is_final(error):
                        self._mistake = error
                        break
                    delay = self._away(error, delay)
                    if end is not None:
                        self._abandoned.wait(1.0)
                else:
                    delay = PERIOD
                    self._back()
                    if end is not None:
                        break
                self._answered.set()
        self._answered.set()

    def _away(self, error: Exception, delay: float) -> float:
        self._why = f" ({reason(error)})"
        if not self._down:
            self._down = True
            self._say(f"tracking: {self._where} is away, records are kept and sent later{self._why}")
            return 1.0
        return min(max(2 * delay, 1.0), LONGEST_BACKOFF)

    def _back(self) -> None:
        if self._down:
            self._down, self._why = False, ""
            self._say(f"tracking: {self._where} answers again; everything kept was sent")

    def _deliver(self, end: tuple[Status, int] | None) -> None:
        if self._seen is None:
            self._seen = self._connect()
        while self._steps:
            batch = first_batch(self._steps)
            self._send(batch)
            for _ in batch:
                self._steps.popleft()
        if end is not None:  # before the files: a slow upload must not leave a finished run RUNNING
            self._client.set_terminated(self.run_id, end[0], end[1])
        while self._files:
            self._send_file(*self._files[0])
            self._files.popleft()

    def _connect(self) -> dict[str, int]:
        """Find or create the run. May fail anywhere and be called again: a run once created is continued."""
        self._client = self._client or open_client(self._request.uri)
        run = find_run(self._client, self._request.run_id)
        if run is None:
            if self._request.run_id is not None:
                old = self._request.run_id
                self._say(f"tracking: run {old} is not in {self._where} any more; a new one continues it")
            run = create_run(self._client, self._request)
            self._request = replace(self._request, run_id=run.info.run_id)
        self.run_id = run.info.run_id
        describe(self._client, run, self._request)
        return {metric.key: int(metric.step) for metric in run.data.to_proto().metrics}

    def _send(self, batch: list[Step]) -> None:
        """All numbers of a step in the same call, unless there are more than a call may hold."""
        from mlflow.entities import Metric

        seen = self._seen or {}
        metrics = [Metric(k, v, s.time_ms, s.step) for s in batch for k, v in points(s, seen)]
        try:
            for i in range(0, len(metrics), MAX_METRICS):
                self._client.log_batch(self.run_id, metrics=metrics[i : i + MAX_METRICS], synchronous=True)
        except Exception as error:
            if not is_refusal(error):
                raise
            if len(batch) > 1:
                for step in batch:
                    self._send([step])
                return
            self._refused += 1
            if self._refused == 1:
                self._say(f"tracking: step {batch[0].step} was refused; others are counted ({reason(error)})")

    def _send_file(self, path: Path, folder: str) -> None:
        try:
            self._client.log_artifact(self.run_id, str(path), folder or None)
        except Exception as error:
            self._client.get_run(self.run_id)  # raises where the whole store is away: the file just waits
            self._tries += 1
            if path.exists() and not isinstance(error, ImportError) and self._tries < FILE_TRIES:
                raise
            self._lost += 1
            self._say(f"tracking: {path} was not sent ({reason(error)})")
        self._tries = 0
