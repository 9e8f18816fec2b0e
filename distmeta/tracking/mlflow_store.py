"""The calls to MLflow: the store, the experiment, the run, and what their errors mean. `tracking` makes them."""

from __future__ import annotations

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmeta.errors import InputError, redact

PARENT = "mlflow.parentRunId"
"""The tag by which MLflow shows a run under another."""
SEND_SECONDS = 30.0  # how long `send_files` waits for the store
MAX_PARAMS, MAX_VALUE, MAX_NAME = 100, 6000, 250  # MLflow's limits on one call


@dataclass(frozen=True)
class Request:
    """The run that a tracker is to open: a new one, or `run_id` continued."""

    uri: str
    run_id: str | None
    run_name: str
    experiment: str
    experiment_id: str | None  # MLFLOW_EXPERIMENT_ID, which wins over the name
    artifacts: str | None  # where a new experiment keeps its artifacts; None: the server decides
    params: dict[str, str]
    tags: dict[str, str]


def name_of(text: str) -> str:
    """The nearest name that MLflow takes for a metric or a parameter."""
    return re.sub(r"[^\w./: -]", "_", text, flags=re.ASCII)[:MAX_NAME]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted names and texts: {"run": {"steps": 3}} -> {"run.steps": "3"}. Lists and constants as in JSON."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[name_of(name)] = text[:MAX_VALUE]
    return flat


def reason(error: BaseException) -> str:
    """One short line without credentials."""
    return redact(" ".join(str(error).split()))[:300] or type(error).__name__


def is_final(error: BaseException) -> bool:
    """Whether asking again is useless: the address, the account or the experiment is wrong."""
    status = getattr(error, "get_http_status_code", lambda: 0)()
    if status:
        return 400 <= status < 500 and status not in (408, 409, 429, 499)
    wrong = (ImportError, PermissionError, FileNotFoundError, NotADirectoryError, ValueError)
    return isinstance(error, wrong)


def is_refusal(error: BaseException) -> bool:
    """Whether the store understood a batch and will never take it, so that it must not hold up the others."""
    return getattr(error, "error_code", "") in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


def import_mlflow() -> str:
    """Import MLflow, quietly, and return the store's address. It takes seconds, and touches the warnings'
    filters, which are the process's: so in the caller's thread, before anything runs."""
    # MLflow reads these at each call, and there is no other way to tell it. Its defaults hold one call for
    # minutes before an outage shows, and print on the stdout that --json needs. What a user has set stays.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SQLAlchemy's deprecations, raised by MLflow's own tables
        import mlflow.store.tracking.sqlalchemy_store
        import mlflow.tracking

        return mlflow.tracking.get_tracking_uri()


def open_client(uri: str) -> Any:
    """A client. Its first use makes the database's tables: one process at a time, or they end half made."""
    from mlflow.tracking import MlflowClient

    if not uri.startswith("sqlite"):
        return MlflowClient(tracking_uri=uri)
    import fcntl

    lock = f"distmeta-{os.getuid()}-{hashlib.sha256(uri.encode()).hexdigest()[:16]}.lock"
    with open(Path(tempfile.gettempdir()) / lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return MlflowClient(tracking_uri=uri)


def find_run(client: Any, run_id: str | None) -> Any | None:
    """The run, unless it was deleted or is in another store."""
    run = None if run_id is None else or_missing(lambda: client.get_run(run_id))
    return None if run is None or run.info.lifecycle_stage == "deleted" else run


def create_run(client: Any, request: Request) -> Any:
    """A new run in the experiment that the environment or the job names."""
    origin = {} if request.run_id is None else {"distmeta.resumed_from": request.run_id}
    experiment = find_experiment(client, request)
    if PARENT in request.tags and request.run_id is None:  # a trial killed before it could save its run's id
        same = f"tags.`{PARENT}` = '{request.tags[PARENT]}' AND tags.`mlflow.runName` = '{request.run_name}'"
        found = client.search_runs([experiment], same, max_results=1)
        if found:
            return found[0]
        origin[PARENT] = request.tags[PARENT]
    return client.create_run(experiment, run_name=request.run_name, tags=origin)


def running_children(client: Any, parent: str) -> set[str]:
    """Ids of the runs under a parent whose status is RUNNING."""
    experiment = client.get_run(parent).info.experiment_id
    of_parent = f"attributes.status = 'RUNNING' AND tags.`{PARENT}` = '{parent}'"
    return {run.info.run_id for run in client.search_runs([experiment], of_parent)}


def find_experiment(client: Any, request: Request) -> str:
    """The experiment's id. It is created where it is missing; another process may be doing so too."""
    if request.experiment_id is not None:
        field, got = "MLFLOW_EXPERIMENT_ID", request.experiment_id
        found = or_missing(lambda: client.get_experiment(got))
    else:
        field, got = "MLFLOW_EXPERIMENT_NAME", request.experiment
        found = client.get_experiment_by_name(got)
        if found is None:
            try:
                return client.create_experiment(got, artifact_location=request.artifacts)
            except Exception as error:
                if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = client.get_experiment_by_name(got)
    if found is None or found.lifecycle_stage == "deleted":
        what = "is deleted in" if found is not None else "is not in"
        raise InputError(f"{field}: got {got!r}, which {what} {redact(request.uri)}; expected an active one")
    return found.experiment_id


def or_missing(get: Callable[[], Any]) -> Any | None:
    """What `get` finds; None where the store says that it has no such thing."""
    try:
        return get()
    except Exception as error:
        if getattr(error, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def send_files(run_id: str, paths: Sequence[Path], folder: str) -> str | None:
    """Adds files to a run's artifacts and leaves the run as it is; the reason where that failed or took too long."""
    uri = import_mlflow()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return f"there is no {redact(uri)}"  # asking would make one
    ended = ["it does not answer"]

    def work() -> None:
        try:
            with quiet_thread():
                client = open_client(uri)
                if find_run(client, run_id) is None:
                    ended[0] = f"run {run_id} is not in {redact(uri)}"
                    return
                for path in paths:
                    client.log_artifact(run_id, str(path), folder)
            ended[0] = ""
        except Exception as error:  # whatever a database driver or a cloud's client may raise
            ended[0] = reason(error)

    thread = threading.Thread(target=work, name="distmeta-artifacts", daemon=True)
    thread.start()
    thread.join(SEND_SECONDS)
    return ended[0] or None


def describe(client: Any, run: Any, request: Request) -> None:
    """Mark the run RUNNING, with the tags and the parameters it lacks. A parameter cannot change in MLflow:
    what a resume changed becomes a tag `distmeta.resumed.<parameter>`."""
    from mlflow.entities import Param, RunTag

    had = run.data.params
    changed = {f"distmeta.resumed.{k}": v for k, v in request.params.items() if k in had and had[k] != v}
    params = [Param(k, v) for k, v in request.params.items() if k not in had]
    tags = [RunTag(k, v[:MAX_VALUE]) for k, v in {**request.tags, **changed}.items()]
    for i in range(0, max(len(params), len(tags)), MAX_PARAMS):
        some = slice(i, i + MAX_PARAMS)
        client.log_batch(run.info.run_id, params=params[some], tags=tags[some], synchronous=True)
    if run.info.status != "RUNNING":
        client.update_run(run.info.run_id, status="RUNNING")


@contextmanager
def quiet_thread() -> Iterator[None]:
    """Drop what MLflow and urllib3 log in this thread, and in no other: outages are said by us, once."""
    ident = threading.get_ident()

    def other_threads(record: logging.LogRecord) -> bool:
        return record.thread != ident

    places = [logging.getLogger("urllib3.connectionpool"), logging.getLogger("alembic.runtime.migration")]
    places += [handler for name in ("mlflow", "alembic") for handler in logging.getLogger(name).handlers]
    for place in places:
        place.addFilter(other_threads)
    try:
        yield
    finally:
        for place in places:
            place.removeFilter(other_threads)
