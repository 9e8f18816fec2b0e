"""Ray's Jobs API: a client with one-line errors, and following a job's log across lost connections until it ends."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from distmeta.errors import InputError, first_line, redact

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
CONNECT_SECONDS = 5.0
"""How long to wait for a connection to the dashboard."""
ANSWER_SECONDS = 60.0
"""How long to wait for an answer or a piece of the log. A broken connection may never report that it is broken."""
REQUEST_SECONDS = 300.0
"""How long a request may be silent. A package is uploaded in one request."""
LOST_SECONDS = 120.0
"""Following ends if the cluster has not answered for this long."""
LONGEST_REASON = 300
"""Characters of Ray's reason for a failure that we repeat."""
COMMAND_NOT_FOUND = 127
"""A shell's exit code for an unknown command."""
RUN_LINE = re.compile(r"(?:run folder|sweep folder|copied after each save to) (\S.*)")
"""Lines of a job's log that name its run. The last one counts."""


@dataclass(frozen=True)
class Submission:
    """A submitted job."""

    submission_id: str
    address: str
    """URL of the dashboard."""
    status: str
    """PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED, as Ray reports it."""
    exit_code: int | None = None
    """What `distmeta train` would have exited with here: 0, 1, 2 or 130. None while the job runs."""
    message: str = ""
    """Why the job failed, in one line."""
    in_log: bool = False
    """Whether the job's log contains that line."""
    run: str | None = None
    """The run folder that the log names, on the cluster."""
    command: str = "distmeta submit"
    """The command that submitted the job."""

    @property
    def resume_command(self) -> str:
        return f"{self.command} --resume {shlex.quote(self.run or 'RUN')}"

    def next_steps(self) -> str:
        """Return what the user can do with a job that continues without us."""
        job = f"--address {redact(self.address)} {self.submission_id}"
        return (
            f"  follow: ray job logs --follow {job}\n"
            f"  stop, with a checkpoint: ray job stop {job}\n"
            f"  resume after that: {self.resume_command}"
        )


class LeftRunning(KeyboardInterrupt):
    """Following was interrupted. The job continues."""

    def __init__(self, submission: Submission):
        super().__init__(submission)
        self.submission = submission


def find_dashboard(address: str | None) -> str:
    """Return the dashboard's URL: the given one, or the environment's, or this machine's.

    Raises:
        InputError: the address is not an http(s) URL.
    """
    candidates = [("--address", address)]
    candidates += [(name, os.environ.get(name)) for name in ADDRESS_VARIABLES]
    candidates.append(("--address", DEFAULT_ADDRESS))
    field_name, url = next((name, text) for name, text in candidates if text)
    if not _is_http_url(url):
        raise InputError(
            f"{field_name}: got {redact(url)!r}, expected the URL of Ray's dashboard, such as http://HEAD:8265 "
            "(--address takes precedence over the environment)"
        )
    return url.rstrip("/")


def _is_http_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # unbalanced brackets, or a port that is not a number
        return False


def connect(url: str) -> Any:
    """Return a `JobSubmissionClient` of a cluster that answers.

    Raises:
        InputError: nothing answers, something other than Ray answers, or the token is wrong.
    """
    _check_port(url)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import requests
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard_sdk", "job.sdk"):  # they log every upload and connection
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.ERROR)
    try:
        with explain_errors(url), _address_variable(url):
            client = JobSubmissionClient(url)
    except (RuntimeError, ValueError, KeyError, requests.RequestException) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"--address: {redact(url)} does not answer as Ray's dashboard does ({first_line(error)}), expected the "
            "dashboard of a cluster that has ray[default]"
        ) from None
    # Ray 2.60 sends requests without a time limit, and JobSubmissionClient has no parameter for one. `_do_request` is
    # private. Remove this when the client accepts a timeout.
    client._do_request = partial(client._do_request, timeout=(CONNECT_SECONDS, REQUEST_SECONDS))
    return client


def _check_port(url: str) -> None:
    """Check that something listens at an address. Ray itself would retry for a long time."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"--address: nothing answers at {redact(url)} ({error}), expected the dashboard of a running Ray cluster "
            "(a cluster's own network may need `kubectl port-forward` or `ray dashboard`)"
        ) from None


@contextmanager
def _address_variable(url: str) -> Iterator[None]:
    """Set RAY_API_SERVER_ADDRESS for a moment.

    Up to Ray 2.60 the environment takes precedence over the address that `JobSubmissionClient` is given
    (ray-project/ray#50287). Remove this when that is fixed.
    """
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = url
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def explain_errors(url: str) -> Iterator[None]:
    """Raise Ray's errors about a wrong token, a lost head node or a large package as an InputError of one line."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        raise InputError(
            f"--address: {redact(url)} refuses the token, expected the cluster's: RAY_AUTH_MODE=token with "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from None
    except (ConnectionError, requests.ConnectionError, requests.Timeout) as error:
        raise InputError(f"--address: {redact(url)} cannot be reached ({first_line(error)})") from None
    except RuntimeError as error:
        if "exceeds the maximum size" in str(error) or "413" in str(error)[:60]:
            raise InputError(
                "--working-dir: the cluster does not accept a package of this size, expected a smaller one: let git "
                "ignore large files, or name data by a URI or an absolute path"
            ) from None
        raise


def follow(client: Any, submission: Submission, show: Callable[[str], None]) -> Submission:
    """Show a job's log until the job ends, and return how it ended.

    Raises:
        LeftRunning: Ctrl-C.
        ConnectionError: the cluster did not answer for `LOST_SECONDS`.
    """
    tail = LogTail(show)
    try:
        with warnings.catch_warnings():
            # Ray 2.60 calls aiohttp in a deprecated way. Remove this when Ray does not warn any more.
            warnings.simplefilter("ignore", DeprecationWarning)
            details = asyncio.run(_follow(client, submission, tail))
    except KeyboardInterrupt:
        raise LeftRunning(replace(submission, status="RUNNING", run=tail.run)) from None
    return _conclude(submission, details, tail)


class LogTail:
    """Shows each part of a log once. A new connection starts at the log's beginning again."""

    def __init__(self, show: Callable[[str], None]):
        self._show = show
        self._last_report = ""
        self._line = ""  # the last line, as far as it has arrived
        self.seen = 0
        """Characters of the log that were shown."""
        self.run: str | None = None
        """The run that the log names."""
        self.error = ""
        """The last line that begins with `error: `, without it."""

    def report(self, text: str) -> None:
        """Show a line of ours, unless it is the same as the last one."""
        if text != self._last_report:
            self._last_report = text
            self._show(text + "\n")

    def add(self, start: int, text: str) -> int:
        """Show the new part of `text`, which begins at position `start` of the log. Return where it ends."""
        stop = start + len(text)
        if stop > self.seen:
            new = text[max(self.seen - start, 0) :]
            self.seen = stop
            self._read(new)
            self._show(new)
        return stop

    def _read(self, new: str) -> None:
        *lines, self._line = (self._line + new).split("\n")
        for line in lines:
            if match := RUN_LINE.match(line):
                self.run = match[1].strip()
            elif line.startswith("error: "):
                self.error = line.removeprefix("error: ")


@dataclass
class Contact:
    """When the cluster answered last, and why it did not answer since."""

    last_answer: float = field(default_factory=time.monotonic)
    failure: str = ""

    def succeed(self) -> None:
        self.last_answer = time.monotonic()

    def fail(self, error: BaseException) -> None:
        self.failure = first_line(error)

    @property
    def is_lost(self) -> bool:
        return time.monotonic() - self.last_answer > LOST_SECONDS


async def _follow(client: Any, submission: Submission, tail: LogTail) -> Any:
    """Show the log until the job ends. Return Ray's `JobDetails`."""
    contact = Contact()
    while True:
        await _show_log(client, submission.submission_id, tail, contact)
        details = await _ask_details(client, submission.submission_id, contact)
        if details is not None and details.status.is_terminal():
            return details
        if details is not None and details.status == "PENDING" and not tail.seen:
            tail.report(details.message)
        if contact.is_lost:
            raise ConnectionError(
                f"{redact(submission.address)} did not answer for {LOST_SECONDS:g} s ({contact.failure}); "
                "the job may continue"
            )
        await asyncio.sleep(1)


async def _show_log(client: Any, submission_id: str, tail: LogTail, contact: Contact) -> None:
    """Show the log until it ends or the connection breaks."""
    pieces = client.tail_job_logs(submission_id)
    position = 0
    try:
        while True:
            piece = await asyncio.wait_for(anext(pieces), ANSWER_SECONDS)
            position = tail.add(position, piece)
            contact.succeed()
    except StopAsyncIteration:
        pass
    except _connection_errors() as error:
        contact.fail(error)


async def _ask_details(client: Any, submission_id: str, contact: Contact) -> Any | None:
    try:
        answer = asyncio.to_thread(client.get_job_info, submission_id)
        details = await asyncio.wait_for(answer, ANSWER_SECONDS)
    except _connection_errors() as error:
        contact.fail(error)
        return None
    contact.succeed()
    return details


def _connection_errors() -> tuple[type[Exception], ...]:
    """Return what Ray's client raises if a connection breaks."""
    import aiohttp

    return aiohttp.ClientError, OSError, RuntimeError, asyncio.TimeoutError


def _conclude(submission: Submission, details: Any, tail: LogTail) -> Submission:
    """Translate the end that Ray reports into the exit code and message of `distmeta train`."""
    status = details.status.value
    ended = replace(submission, status=status, run=tail.run)
    if status == "SUCCEEDED":
        return replace(ended, exit_code=0)
    if status != "FAILED":
        # Ray reports no exit code of a stopped job. On SIGTERM a run saves and exits with 130
        return replace(ended, exit_code=130)
    code = details.driver_exit_code
    if code == COMMAND_NOT_FOUND:
        message = "the cluster has no `distmeta` on the PATH of its `ray start`, expected it installed on every node"
        return replace(ended, exit_code=2, message=message)
    if tail.error:
        message = tail.error
    elif code is not None:
        message = f"its driver ended with exit code {code}"
    else:
        reason = " ".join((details.message or "no reason given").split())
        message = redact(reason)[-LONGEST_REASON:]
    exit_code = code if code in (2, 130) else 1
    return replace(ended, exit_code=exit_code, message=message, in_log=bool(tail.error))
