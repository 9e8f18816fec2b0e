"""A job on a Ray cluster: check it here, package it, have `distmeta train` run there, follow its log."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distmeta.cluster.jobs_client import Submission, connect, dashboard, explained, follow
from distmeta.cluster.packaging import pack
from distmeta.config.job import Job
from distmeta.errors import InputError, redact

STOP_SECONDS = 60
"""From `ray job stop`'s SIGTERM to its SIGKILL, to save a checkpoint in. Ray's own default is 3."""
ROOT = '"${DISTMETA_HOME:-$HOME/distmeta}"'
"""Where relative paths of runs are on the driver's node: Ray deletes a job's working folder after the job."""


def submit(
    job: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    address: str | None = None,
    working_dir: str | Path = ".",
    resume: str | None = None,
    sweep: bool = False,
    driver_cpus: float = 0,
    wait: bool = True,
    show: Callable[[str], None] = lambda text: None,
) -> Submission:
    """Runs a job on a Ray cluster; with `wait`, until its end.

    Args:
        job: job file, in the working folder; None with a `resume` that names a run.
        address: URL of Ray's dashboard; None: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, else this machine's.
        working_dir: folder that is packaged: the job, the user's own modules, small data.
        resume: as in `train`; runs are on the cluster, relative paths of theirs under `ROOT`.
        sweep: run `distmeta sweep` instead of `distmeta train`.
        driver_cpus: CPUs that the driver asks for, on any node; 0: it runs on the head and asks for none.
        show: gets the log as it comes, in pieces.

    Raises:
        InputError: the job, the folder, the address or the token is wrong; nothing was submitted.
        LeftRunning: Ctrl-C while waiting.
    """
    url, folder = dashboard(address), Path(working_dir)
    file, loaded = _checked(job, overrides, folder, resume)
    if sweep:
        _check_sweep(loaded, resume)
    client = connect(url)
    with tempfile.TemporaryDirectory() as scratch, explained(url):
        named = [] if loaded is None else [file, *_files_named(loaded, folder)]
        runs = [] if loaded is None or _is_rooted(loaded.output) else [os.path.normpath(loaded.output)]
        runs = [name for name in runs if not name.startswith(".")]  # the folder itself, or outside of it
        package = pack(folder, Path(scratch) / "package.zip", named, runs)
        if package.withheld:
            show(f"not packaged, since their names are those of secrets: {', '.join(package.withheld)}\n")
        submission_id = client.submit_job(
            entrypoint=entrypoint(file, overrides, loaded, resume, sweep),
            submission_id=_new_id("resumed" if loaded is None else loaded.name),
            runtime_env={"working_dir": str(package.path), "env_vars": _variables(show)},
            entrypoint_num_cpus=driver_cpus or None,
        )
    show(f"submitted {submission_id} to {redact(url)}: {len(package.files)} files of {folder.resolve()}\n")
    words = ["distmeta", "submit", *([str(job)] if job is not None else []), *overrides]
    words += ["--working-dir", str(working_dir)] * (str(working_dir) != ".") + ["--sweep"] * sweep
    again = shlex.join([*words, "--address", redact(url)])
    submission = Submission(submission_id, url, "PENDING", again=again)
    if not wait:
        return submission
    with explained(url):
        return follow(client, submission, show)


def entrypoint(
    file: str, overrides: Sequence[str], job: Job | None, resume: str | None, sweep: bool = False
) -> str:
    """The driver's command line; its shell fills in the folder that outlives the job."""
    line = shlex.join(["distmeta", "sweep" if sweep else "train", *([file] if file else []), *overrides])
    if job is not None and not _is_rooted(job.output):
        line += f' output="$root"/{shlex.quote(os.path.normpath(job.output))}'
    if job is not None and job.run.address is not None:
        line += " run.address=null"  # on the cluster that it is submitted to
    if resume is not None:
        relative = resume != "auto" and not _is_rooted(resume)
        line += " --resume " + '"$root"/' * relative + shlex.quote(resume)
    database = "${MLFLOW_TRACKING_URI:-sqlite:///$root/mlflow.db}"
    # exec: the signal of `ray job stop` and the exit status are the driver's, not a shell's
    return f'root={ROOT}; mkdir -p "$root"; export MLFLOW_TRACKING_URI="{database}"; exec {line}'


def _checked(
    job: str | Path | None, overrides: Sequence[str], folder: Path, resume: str | None
) -> tuple[str, Job | None]:
    """The job file's path within the working folder, and the job, read there as the cluster will."""
    texts = [("--resume", resume or ""), *((text.partition("=")[0], text) for text in overrides)]
    if job is None:
        if resume is None or resume == "auto":
            raise InputError("JOB: missing, expected a job file (only --resume RUN goes without)")
        _refuse_credentials(texts)
        return "", None
    path = Path(job) if Path(job).exists() or not (folder / job).exists() else folder / job
    file = os.path.relpath(path.resolve(), folder.resolve())
    if path.exists() and file.startswith(".."):
        raise InputError(
            f"JOB: got {str(job)!r}, which is outside the working folder {folder.resolve()}, expected a file in it: "
            "give --working-dir a folder that has both the job and its modules"
        )
    with _inside(folder):
        loaded = Job.load(file if path.exists() else job, overrides)
    _refuse_credentials([*_texts(loaded.tree()), *texts])
    return file, loaded


def _check_sweep(job: Job | None, resume: str | None) -> None:
    """Refuses here what `distmeta sweep` would refuse there."""
    if job is not None and job.sweep is None:
        raise InputError("--sweep: the job has no section sweep, expected one with a space")
    if job is not None and "://" in job.output:
        raise InputError(
            f"output: got {redact(job.output)!r}, expected a folder (that all nodes see) for a sweep"
        )
    if resume == "auto":
        raise InputError("--resume: got auto with --sweep, expected the sweep's folder on the cluster")


def _refuse_credentials(texts: Sequence[tuple[str, str]]) -> None:
    for key, text in texts:
        if redact(text) != text:
            raise InputError(
                f"{key}: has credentials in its address, which Ray shows to all who may see the job, expected none: "
                "set them in the environment of the cluster's nodes"
            )


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """In the working folder for a moment: a job's relative paths and modules are meant from there."""
    before = os.getcwd()
    try:
        os.chdir(folder)
    except OSError as error:
        raise InputError(
            f"--working-dir: got {str(folder)!r}, expected a folder ({error.strerror})"
        ) from None
    try:
        yield
    finally:
        os.chdir(before)


def _files_named(job: Job, folder: Path) -> list[str]:
    """Relative paths of files that the job names, such as `tasks.path`: they go along even where git ignores them."""
    texts = [text for _, text in _texts(job.tree()) if text and "\0" not in text and not _is_rooted(text)]
    names = [os.path.normpath(text) for text in texts]
    return [name for name in names if not name.startswith("..") and (folder / name).is_file()]


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _texts(value, f"{key}.{name}".lstrip("."))
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value, key)


def _is_rooted(path: str) -> bool:
    """Whether a path means the same in every working folder: absolute, or a URI."""
    return path.startswith("/") or "://" in path


def _variables(show: Callable[[str], None]) -> dict[str, str]:
    """The job's environment: MLflow's variables. What is secret stays, since Ray shows and logs the others."""
    carried = {"RAY_JOB_STOP_WAIT_TIME_S": os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", str(STOP_SECONDS))}
    for name in sorted(name for name in os.environ if name.startswith("MLFLOW_")):
        value = os.environ[name]
        if re.search("PASSWORD|TOKEN|SECRET|KEY|CREDENTIAL", name) or redact(value) != value:
            show(
                f"{name} is a secret and not carried along: set it in the environment of the cluster's nodes\n"
            )
        elif name == "MLFLOW_TRACKING_URI" and re.match(
            r"sqlite:///(?!/)|file:(?!/)|(?!/|databricks)[^:]*$", value
        ):
            show(f"{name} is a file of this machine and not carried along\n")
        else:
            carried[name] = value
    return carried


def _new_id(name: str) -> str:
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
