"""Run a job on a Ray cluster: check it here, package it, run `distmeta train` there, follow its log."""

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

from distmeta.cluster.jobs_client import Submission, connect, explain_errors, find_dashboard, follow
from distmeta.cluster.packaging import build_package
from distmeta.config.catalog import TRACKERS
from distmeta.config.job import Job
from distmeta.config.parts import import_part
from distmeta.errors import InputError, redact
from distmeta.tracking.interface import KeepsLocalStore, ReadsEnvironment

STOP_SECONDS = 60
"""Time between the SIGTERM and the SIGKILL of `ray job stop`, to save a checkpoint. Ray's own default is 3 s."""
ROOT = '"${DISTMETA_HOME:-$HOME/distmeta}"'
"""Shell text: the folder on the driver's node that relative run folders are in. Ray deletes a job's working folder."""
SECRET_VARIABLE = re.compile("PASSWORD|TOKEN|SECRET|KEY|CREDENTIAL")


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
    """Run a job on a Ray cluster.

    Args:
        job: job file in the working folder; None if `resume` names a run.
        overrides: `key=value` changes to the job.
        address: URL of Ray's dashboard; None: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine's.
        working_dir: folder to package: the job, the user's own modules, small data.
        resume: as in `train`. Runs are on the cluster; relative paths are below `ROOT`.
        sweep: run `distmeta sweep` instead of `distmeta train`.
        driver_cpus: CPUs that the driver reserves, on any node. With 0 it runs on the head node and reserves none.
        wait: show the log and return when the job has ended.
        show: receives the log in pieces as they arrive.

    Raises:
        InputError: the job, the folder, the address or the token is wrong. Nothing was submitted.
        LeftRunning: Ctrl-C while waiting.
    """
    url = find_dashboard(address)
    folder = Path(working_dir)
    file, loaded = _check_job(job, overrides, folder, resume)
    if sweep:
        _check_sweep(loaded, resume)
    client = connect(url)
    with tempfile.TemporaryDirectory() as scratch, explain_errors(url):
        target = Path(scratch) / "package.zip"
        package = build_package(
            folder, target, _files_to_add(file, loaded, folder), _folders_to_leave_out(loaded)
        )
        if package.withheld:
            show(f"not packaged, because their names suggest secrets: {', '.join(package.withheld)}\n")
        submission_id = client.submit_job(
            entrypoint=build_entrypoint(file, overrides, loaded, resume, sweep),
            submission_id=_new_id("resumed" if loaded is None else loaded.name),
            runtime_env={"working_dir": str(package.path), "env_vars": select_variables(loaded, show)},
            entrypoint_num_cpus=driver_cpus or None,
        )
    show(f"submitted {submission_id} to {redact(url)}: {len(package.files)} files of {folder.resolve()}\n")
    command = _describe_command(job, overrides, working_dir, sweep, url)
    submission = Submission(submission_id, url, "PENDING", command=command)
    if not wait:
        return submission
    with explain_errors(url):
        return follow(client, submission, show)


def build_entrypoint(
    file: str, overrides: Sequence[str], job: Job | None, resume: str | None, sweep: bool = False
) -> str:
    """Return the driver's command line. Its shell fills in `ROOT`, the folder that outlives the job.

    Args:
        file: the job file's path in the package, or "" with a `resume` that names a run.
        job: the job itself, or None.
    """
    words = ["distmeta", "sweep" if sweep else "train"]
    if file:
        words.append(file)
    line = shlex.join([*words, *overrides])
    if job is not None and not _is_absolute(job.output):
        line += f' output="$root"/{shlex.quote(os.path.normpath(job.output))}'
    if job is not None and job.run.address is not None:
        line += " run.address=null"  # it runs on the cluster that it is submitted to
    if resume is not None:
        is_relative = resume != "auto" and not _is_absolute(resume)
        folder = '"$root"/' if is_relative else ""
        line += f" --resume {folder}{shlex.quote(resume)}"
    stores = [part.default_store("$root") for part in list_trackers(job) if isinstance(part, KeepsLocalStore)]
    exports = "".join(f'export {name}="${{{name}:-{value}}}"; ' for name, value in stores)
    # exec: the driver itself receives the signal of `ray job stop`, and Ray sees its exit code
    return f'root={ROOT}; mkdir -p "$root"; {exports}exec {line}'


def list_trackers(job: Job | None) -> list[Any]:
    """Return the classes of the shipped trackers and of the job's own."""
    types = dict.fromkeys(TRACKERS)
    if job is not None:
        types |= dict.fromkeys(section.type for section in job.trackers)
    return [import_part("tracking.type", kind, TRACKERS) for kind in types]


def _describe_command(
    job: str | Path | None, overrides: Sequence[str], working_dir: str | Path, sweep: bool, url: str
) -> str:
    """Return the command that submits this job again."""
    words = ["distmeta", "submit"]
    if job is not None:
        words.append(str(job))
    words += overrides
    if str(working_dir) != ".":
        words += ["--working-dir", str(working_dir)]
    if sweep:
        words.append("--sweep")
    return shlex.join([*words, "--address", redact(url)])


def _check_job(
    job: str | Path | None, overrides: Sequence[str], folder: Path, resume: str | None
) -> tuple[str, Job | None]:
    """Read the job in the working folder, as the cluster will. Return its path in that folder, and the job."""
    texts = [("--resume", resume or "")]
    texts += [(text.partition("=")[0], text) for text in overrides]
    if job is None:
        if resume is None or resume == "auto":
            raise InputError("JOB: missing, expected a job file (it is optional only with --resume RUN)")
        _refuse_credentials(texts)
        return "", None
    path = Path(job)
    if not path.exists() and (folder / job).exists():
        path = folder / job
    file = os.path.relpath(path.resolve(), folder.resolve())
    if path.exists() and file.startswith(".."):
        raise InputError(
            f"JOB: got {str(job)!r}, which is outside the working folder {folder.resolve()}, expected a file in it: "
            "give --working-dir a folder that has both the job and its modules"
        )
    with _working_folder(folder):
        loaded = Job.load(file if path.exists() else job, overrides)
    _refuse_credentials([*_list_texts(loaded.to_dict()), *texts])
    return file, loaded


def _check_sweep(job: Job | None, resume: str | None) -> None:
    """Refuse here what `distmeta sweep` would refuse on the cluster."""
    if job is not None and job.sweep is None:
        raise InputError("--sweep: the job has no section sweep, expected one with a space")
    if job is not None and "://" in job.output:
        raise InputError(
            f"output: got {redact(job.output)!r}, expected a folder (that all nodes see) for a sweep"
        )
    if resume == "auto":
        raise InputError("--resume: got auto with --sweep, expected the sweep's folder on the cluster")


def _refuse_credentials(texts: Sequence[tuple[str, str]]) -> None:
    """Check (key, text) pairs: everybody who may see the job on the cluster sees them."""
    for key, text in texts:
        if redact(text) != text:
            raise InputError(
                f"{key}: has credentials in its address, which Ray shows to all who may see the job, expected none: "
                "set them in the environment of the cluster's nodes"
            )


@contextmanager
def _working_folder(folder: Path) -> Iterator[None]:
    """Change the working folder for a moment: a job's relative paths and modules are relative to it."""
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


def _files_to_add(file: str, job: Job | None, folder: Path) -> list[str]:
    """Return the job file and the files that the job names, such as `tasks.path`. Git may ignore them."""
    if job is None:
        return []
    texts = [text for _, text in _list_texts(job.to_dict()) if text and "\0" not in text]
    paths = [os.path.normpath(text) for text in texts if not _is_absolute(text)]
    return [file, *(path for path in paths if not path.startswith("..") and (folder / path).is_file())]


def _folders_to_leave_out(job: Job | None) -> list[str]:
    """Return the folder of the job's runs, if it is a real subfolder of the working folder."""
    if job is None or _is_absolute(job.output):
        return []
    output = os.path.normpath(job.output)
    return [] if output.startswith(".") else [output]


def _list_texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) for every text in a tree."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _list_texts(value, f"{key}.{name}".lstrip("."))
    elif isinstance(tree, list):
        for value in tree:
            yield from _list_texts(value, key)


def _is_absolute(path: str) -> bool:
    """Return whether a path means the same in every working folder: an absolute path or a URI."""
    return path.startswith("/") or "://" in path


def select_variables(job: Job | None, show: Callable[[str], None]) -> dict[str, str]:
    """Return the job's environment: the variables of trackers, except secrets, because Ray shows and logs them."""
    stop_seconds = os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", str(STOP_SECONDS))
    selected = {"RAY_JOB_STOP_WAIT_TIME_S": stop_seconds}
    trackers = list_trackers(job)
    configured = [part for part in trackers if isinstance(part, ReadsEnvironment)]
    prefixes = tuple(prefix for part in configured for prefix in part.environment_prefixes)
    local_stores = [part for part in trackers if isinstance(part, KeepsLocalStore)]
    for name in sorted(name for name in os.environ if name.startswith(prefixes)):
        value = os.environ[name]
        if SECRET_VARIABLE.search(name) or redact(value) != value:
            show(f"{name} is a secret and not sent: set it in the environment of the cluster's nodes\n")
        elif any(part.is_local(name, value) for part in local_stores):
            show(f"{name} is a file on this machine and not sent\n")
        else:
            selected[name] = value
    return selected


def _new_id(name: str) -> str:
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
