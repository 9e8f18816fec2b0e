"""Tracking with MLflow: one MLflow run per training. The trials of a sweep are runs under the sweep's.

MLflow's own environment variables name the store, the experiment and the account. Tested with MLflow 3.17.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distmeta.errors import InputError, first_line, redact
from distmeta.tracking.interface import RefusedError, Status, StepRecord, TrackedRun

PARENT_TAG = "mlflow.parentRunId"
"""The tag by which MLflow shows a run under another."""
TABLES_TAG = "mlflow.loggedArtifacts"
"""The tag by which MLflow shows artifacts as tables."""
LOCAL_STORE = re.compile(r"sqlite:///(?!/)|file:(?!/)|(?!/|databricks)[^:]*$")
"""Addresses of stores that are files relative to the working folder."""
MAX_METRICS = 1000  # MLflow's limits on one call
MAX_PARAMS = 100
MAX_VALUE = 6000  # characters
MAX_NAME = 250
FILE_ATTEMPTS = 5  # for a file that a store which does answer does not take


class MlflowTracker:
    """Records a training as an MLflow run.

    Args:
        experiment: the MLflow experiment. The variable MLFLOW_EXPERIMENT_NAME has precedence; null: the job's name.
        parent: the id of an MLflow run that this one is shown under. A sweep sets it for its trials.
    """

    environment_prefixes = ("MLFLOW_",)

    @staticmethod
    def is_local(variable: str, value: str) -> bool:
        return variable == "MLFLOW_TRACKING_URI" and LOCAL_STORE.match(value) is not None

    @staticmethod
    def default_store(folder: str) -> tuple[str, str]:
        return "MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db"

    def __init__(self, run: TrackedRun, experiment: str | None = None, parent: str | None = None):
        self.run_id = run.run_id
        self.last_step = 0
        self._run = run
        self._parent = parent
        self._experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or experiment or run.experiment
        self._uri = import_mlflow()
        self._client: Any = None
        self._file_attempts = 0

    def open(self) -> None:
        try:
            with quiet_thread():
                self._connect()
        except InputError:
            raise
        except Exception as error:  # whatever MLflow, a database driver or an HTTP client raises
            if not is_mistake(error):
                raise
            raise InputError(
                f"MLFLOW_TRACKING_URI: got {redact(self._uri)!r}, which MLflow does not take ({first_line(error)}); "
                "expected sqlite:///FILE, a database or an http(s) server, or tracking.type: none"
            ) from None

    def log_step(self, record: StepRecord) -> None:
        self._send_metrics([record])

    def log_steps(self, records: Sequence[StepRecord]) -> int:
        batch = take_batch(records)
        self._send_metrics(batch)
        return len(batch)

    def log_artifact(self, path: Path, folder: str) -> None:
        with quiet_thread():
            try:
                self._client.log_artifact(self.run_id, str(path), folder or None)
            except Exception as error:  # whatever the artifact store's client raises
                self._client.get_run(self.run_id)  # raises if the whole store is away: then the file waits
                self._file_attempts += 1
                if not isinstance(error, ImportError) and self._file_attempts < FILE_ATTEMPTS:
                    raise
                self._file_attempts = 0
                raise RefusedError(first_line(error)) from error
        self._file_attempts = 0

    def set_status(self, status: Status, time: float) -> None:
        with quiet_thread():
            self._client.set_terminated(self.run_id, status, int(time * 1000))

    def close(self, status: Status) -> None:
        """Do nothing: `set_status` has ended the run."""

    def attach_files(self, paths: Sequence[Path], folder: str) -> None:
        database = sqlite_file(self._uri)
        if database is not None and not database.exists():
            raise FileNotFoundError(f"there is no {redact(self._uri)}")  # a client would create it
        with quiet_thread():
            client = open_client(self._uri)
            if find_run(client, self.run_id) is None:
                raise LookupError(f"run {self.run_id} is not in {redact(self._uri)}")
            for path in paths:
                client.log_artifact(self.run_id, str(path), folder)

    def child_options(self, parent_id: str) -> Mapping[str, Any]:
        return {"parent": parent_id}

    def running_children(self, parent_id: str) -> set[str]:
        with quiet_thread():
            client = open_client(self._uri)
            experiment = client.get_run(parent_id).info.experiment_id
            query = f"attributes.status = 'RUNNING' AND tags.`{PARENT_TAG}` = '{parent_id}'"
            return {run.info.run_id for run in client.search_runs([experiment], query)}

    def tag_runs(self, tags: Mapping[str, Mapping[str, str]]) -> None:
        with quiet_thread():
            client = open_client(self._uri)
            for run_id, texts in tags.items():
                for name, text in texts.items():
                    client.set_tag(run_id, name, text[:MAX_VALUE])

    def _connect(self) -> None:
        """Find or create the run. If this fails after the run was created, the next call continues that run."""
        if self._client is None:
            self._client = open_client(self._uri)
        run = find_run(self._client, self.run_id)
        if run is None:
            run = self._create_run()
        self.run_id = run.info.run_id
        self._describe_run(run)
        # `run.data.metrics` has no steps. `to_proto` is the public way to the latest metrics with their steps.
        self.last_step = max((int(metric.step) for metric in run.data.to_proto().metrics), default=0)

    def _create_run(self) -> Any:
        """Create the run, or return the one that an earlier process of the same trial created.

        A trial that was killed before its first checkpoint does not know its run's id.
        """
        origin: dict[str, str] = {}
        if self.run_id is not None:
            self._run.report(
                f"tracking: run {self.run_id} is not in {redact(self._uri)} any more; a new one continues it"
            )
            origin["distmeta.resumed_from"] = self.run_id
        experiment = find_experiment(self._client, self._experiment, self._uri)
        if self._parent is not None and self.run_id is None:
            query = f"tags.`{PARENT_TAG}` = '{self._parent}' AND tags.`mlflow.runName` = '{self._run.name}'"
            found = self._client.search_runs([experiment], query, max_results=1)
            if found:
                return found[0]
            origin[PARENT_TAG] = self._parent
        return self._client.create_run(experiment, run_name=self._run.name, tags=origin)

    def _describe_run(self, run: Any) -> None:
        """Mark the run as running, with its tags and the parameters that it lacks.

        MLflow does not let a parameter change. What a resume changed becomes a tag `distmeta.resumed.<parameter>`.
        """
        from mlflow.entities import Param, RunTag

        stored = run.data.params
        params: list[Any] = []
        texts = dict(self._run.tags)
        if self._parent is not None:
            texts[PARENT_TAG] = self._parent
        if self._run.tables:
            texts[TABLES_TAG] = json.dumps([{"path": path, "type": "table"} for path in self._run.tables])
        for name, value in flatten_params(self._run.params).items():
            if name not in stored:
                params.append(Param(name, value))
            elif stored[name] != value:
                texts[f"distmeta.resumed.{name}"] = value
        tags = [RunTag(name, text[:MAX_VALUE]) for name, text in texts.items()]
        for i in range(0, max(len(params), len(tags)), MAX_PARAMS):
            part = slice(i, i + MAX_PARAMS)
            self._client.log_batch(run.info.run_id, params=params[part], tags=tags[part], synchronous=True)
        if run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")

    def _send_metrics(self, records: Sequence[StepRecord]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(clean_name(name), value, int(record.time * 1000), record.step)
            for record in records
            for name, value in record.values.items()
        ]
        with quiet_thread():
            for i in range(0, len(metrics), MAX_METRICS):
                try:
                    self._client.log_batch(
                        self.run_id, metrics=metrics[i : i + MAX_METRICS], synchronous=True
                    )
                except Exception as error:  # whatever a database driver or an HTTP client raises
                    if is_refusal(error):
                        raise RefusedError(first_line(error)) from error
                    raise


def take_batch(records: Sequence[StepRecord]) -> list[StepRecord]:
    """Return the first records that together fit in one call, at least one."""
    batch: list[StepRecord] = []
    count = 0
    for record in records:
        count += len(record.values)
        if batch and count > MAX_METRICS:
            break
        batch.append(record)
    return batch


def clean_name(text: str) -> str:
    """Return the nearest name that MLflow accepts for a metric or a parameter."""
    return re.sub(r"[^\w./: -]", "_", text, flags=re.ASCII)[:MAX_NAME]


def flatten_params(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return texts by dotted name: {"run": {"steps": 3}} -> {"run.steps": "3"}. Lists and constants as in JSON."""
    params: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            params |= flatten_params(value, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            params[clean_name(name)] = text[:MAX_VALUE]
    return params


def error_code(error: BaseException) -> str:
    """Return MLflow's code of an error, or "" if it is not MLflow's."""
    from mlflow.exceptions import MlflowException

    return str(error.error_code) if isinstance(error, MlflowException) else ""


def is_mistake(error: BaseException) -> bool:
    """Return whether trying again is useless: the address, the account or the experiment is wrong."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return 400 <= status < 500 and status not in (408, 409, 429, 499)
    wrong = (ImportError, PermissionError, FileNotFoundError, NotADirectoryError, ValueError)
    return isinstance(error, wrong)


def is_refusal(error: BaseException) -> bool:
    """Return whether the store understood a call and will never accept it."""
    return error_code(error) in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


def import_mlflow() -> str:
    """Import MLflow without its warnings and return the address of the store.

    The import takes seconds and changes the warning filters, which belong to the whole process. So it takes place in
    the caller's thread.
    """
    # MLflow reads these variables at each call; there is no other way to set them. Its defaults hold a call for
    # minutes before an outage shows, and print on stdout, which --json needs. What a user has set stays.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    with warnings.catch_warnings():
        # MLflow 3.17's tables use what SQLAlchemy deprecates. Remove this when its import is silent.
        warnings.simplefilter("ignore")
        import mlflow.store.tracking.sqlalchemy_store
        import mlflow.tracking

        return mlflow.tracking.get_tracking_uri()


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an SQLite store, or None for another store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def open_client(uri: str) -> Any:
    """Return an MLflow client.

    The first client of an SQLite store creates its tables. Two processes that do so at once leave them half made, so
    they take turns.
    """
    from mlflow.tracking import MlflowClient

    if not uri.startswith("sqlite"):
        return MlflowClient(tracking_uri=uri)
    digest = hashlib.sha256(uri.encode()).hexdigest()[:16]
    with open(Path(tempfile.gettempdir()) / f"distmeta-{os.getuid()}-{digest}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return MlflowClient(tracking_uri=uri)


def find_run(client: Any, run_id: str | None) -> Any | None:
    """Return the run; None if it was deleted or is in another store."""
    if run_id is None:
        return None
    run = call_or_none(lambda: client.get_run(run_id))
    return None if run is None or run.info.lifecycle_stage == "deleted" else run


def find_experiment(client: Any, name: str, uri: str) -> str:
    """Return the experiment's id. MLFLOW_EXPERIMENT_ID has precedence over the name.

    An experiment that does not exist is created; another process may be doing the same.

    Raises:
        InputError: there is no experiment with the given id, or the experiment is deleted.
    """
    experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if experiment_id:
        field = "MLFLOW_EXPERIMENT_ID"
        found = call_or_none(lambda: client.get_experiment(experiment_id))
    else:
        field = "MLFLOW_EXPERIMENT_NAME"
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return client.create_experiment(name, artifact_location=artifact_location(uri, name))
            except Exception as error:  # an MlflowException, or what a database driver raises
                if error_code(error) != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage == "deleted":
        problem = "is not in" if found is None else "is deleted in"
        got = experiment_id or name
        raise InputError(f"{field}: got {got!r}, which {problem} {redact(uri)}; expected an active one")
    return found.experiment_id


def artifact_location(uri: str, experiment: str) -> str | None:
    """Return where a new experiment keeps its artifacts: beside an SQLite file. None: the server decides."""
    if uri.startswith(("http:", "https:", "databricks")):
        return None
    database = sqlite_file(uri)
    parent = Path() if database is None else database.parent
    name = re.sub(r"[^\w.-]+", "_", experiment).strip(".") or "_"
    return ((parent / "mlartifacts").absolute() / name).as_uri()


def call_or_none(call: Callable[[], Any]) -> Any | None:
    """Return the result of a call, or None if the store has no such thing."""
    try:
        return call()
    except Exception as error:  # an MlflowException, or what a database driver raises
        if error_code(error) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


@contextmanager
def quiet_thread() -> Iterator[None]:
    """Drop what MLflow, alembic and urllib3 log in this thread. distmeta reports an outage itself, once."""
    ident = threading.get_ident()

    def is_other_thread(record: logging.LogRecord) -> bool:
        return record.thread != ident

    places: list[logging.Filterer] = [
        logging.getLogger("urllib3.connectionpool"),
        logging.getLogger("alembic.runtime.migration"),
    ]
    for name in ("mlflow", "alembic"):
        places += logging.getLogger(name).handlers
    for place in places:
        place.addFilter(is_other_thread)
    try:
        yield
    finally:
        for place in places:
            place.removeFilter(is_other_thread)
