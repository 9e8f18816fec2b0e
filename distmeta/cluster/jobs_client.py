"""Ray's Jobs API: a client whose errors are one line, and a job's log and end, followed across lost connections."""

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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from distmeta.errors import InputError, redact

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CONNECT_SECONDS = 5.0
"""Longest wait for the dashboard to answer at all."""
ANSWER_SECONDS = 60.0
"""Longest wait for an answer, and for a line of the log: a connection that broke may never say so."""
REQUEST_SECONDS = 300.0
"""Longest silence of a request: a package is taken in as a whole."""
LOST_SECONDS = 120.0
"""Without an answer from the cluster, after which following ends."""


@dataclass(frozen=True)
class Submission:
    """A submitted job."""

    submission_id: str
    address: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED, as Ray says."""
    exit_code: int | None = None
    """What `distmeta train` would have exited with here: 0, 1, 2, 130; None while it runs."""
    message: str = ""
    """Why it failed: one line."""
    in_log: bool = False
    """Whether the log ended with that line."""
    run: str | None = None
    """The run folder that its log names, on the cluster."""

    again: str = "distmeta submit"
    """The command that submitted it."""

    @property
    def to_resume(self) -> str:
        return f"{self.again} --resume {shlex.quote(self.run or 'RUN')}"

    def next_steps(self) -> str:
        """What one can do with a job that runs on without us."""
        words = f"--address {redact(self.address)} {self.submission_id}"
        return (
            f"  follow: ray job logs --follow {words}\n  stop, with a checkpoint: ray job stop {words}\n"
            f"  resume after that: {self.to_resume}"
        )


class LeftRunning(KeyboardInterrupt):
    """Following was interrupted; the job goes on."""

    def __init__(self, submission: Submission):
        super().__init__(submission)
        self.submission = submission


def dashboard(address: str | None) -> str:
    """The dashboard's URL: what is given, else what the environment says, else this machine's.

    Raises:
        InputError: not an http(s) URL.
    """
    given = {"--address": address} | {
        name: os.environ.get(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    }
    field, url = next(((name, text) for name, text in given.items() if text), ("--address", DEFAULT_ADDRESS))
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # brackets or a port that are none
        good = False
    if not good:
        raise InputError(
            f"{field}: got {redact(url)!r}, expected the URL of Ray's dashboard, such as http://HEAD:8265 "
            "(--address goes before the environment)"
        )
    return url.rstrip("/")


def connect(url: str) -> Any:
    """A `JobSubmissionClient` of a cluster that answers.

    Raises:
        InputError: nothing answers, something other than Ray does, or it wants another token.
    """
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"--address: nothing answers at {redact(url)} ({error}), expected the dashboard of a running Ray cluster "
            "(a cluster's own network may need `kubectl port-forward` or `ray dashboard`)"
        ) from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import requests
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard_sdk", "job.sdk"):  # they tell of every upload and connection
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.ERROR)
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = url  # Ray lets the environment go before what it is given
    try:
        with explained(url):
            client = JobSubmissionClient(url)
            # Ray asks without a time limit, and gives none to set
            client._do_request = partial(client._do_request, timeout=(CONNECT_SECONDS, REQUEST_SECONDS))
            return client
    except (RuntimeError, ValueError, KeyError, requests.RequestException) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"--address: {redact(url)} does not answer as Ray's dashboard does ({_line(error)}), expected the "
            "dashboard of a cluster that has ray[default]"
        ) from None
    finally:
        if before is None:
            del os.environ["RAY_API_SERVER_ADDRESS"]
        else:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turns what Ray raises on a wrong token, a lost head or a package that it does not take into one line each."""
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
        raise InputError(f"--address: {redact(url)} cannot be reached ({_line(error)})") from None
    except RuntimeError as error:
        if "exceeds the maximum size" in str(error) or "413" in str(error)[:60]:
            raise InputError(
                "--working-dir: the cluster does not take a package of this size, expected a smaller one: have git "
                "ignore large files, or name data by a URI or an absolute path"
            ) from None
        raise


def follow(client: Any, submission: Submission, show: Callable[[str], None]) -> Submission:
    """Shows the log until the job ends; how it ended.

    Raises:
        LeftRunning: Ctrl-C.
        ConnectionError: the cluster did not answer for `LOST_SECONDS`.
    """
    tail = Tail(show)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of how Ray calls aiohttp
            info = asyncio.run(_followed(client, submission, tail))
    except KeyboardInterrupt:
        raise LeftRunning(replace(submission, status="RUNNING", run=tail.run)) from None
    return _ended(submission, info, tail)


class Tail:
    """What of the log was shown: a connection that is opened anew starts from the log's beginning."""

    def __init__(self, show: Callable[[str], None]):
        self._show, self._seen, self._line, self._said = show, 0, "", ""
        self.run: str | None = None
        self.error = ""
        """The last line that begins with `error:`."""

    def say(self, text: str) -> None:
        """Says a line of ours, once."""
        if text != self._said:
            self._said = text
            self._show(text + "\n")

    def take(self, start: int, text: str) -> int:
        """Shows what is new of `text`, which is at `start` of the log; returns where it ends."""
        stop = start + len(text)
        if stop > self._seen:
            new = text[max(self._seen - start, 0) :]
            self._seen = stop
            self._note(new)
            self._show(new)
        return stop

    def _note(self, new: str) -> None:
        *lines, self._line = (self._line + new).split("\n")
        for line in lines:
            if found := re.match(r"(?:run folder|sweep folder|copied after each save to) (\S.*)", line):
                self.run = found[1].strip()
            elif line.startswith("error: "):
                self.error = line.removeprefix("error: ")


async def _followed(client: Any, submission: Submission, tail: Tail) -> Any:
    """Ray's details of the job after its end."""
    import aiohttp

    answered, failure = time.monotonic(), ""
    lost = (aiohttp.ClientError, OSError, RuntimeError, asyncio.TimeoutError)
    while True:
        pieces, position = client.tail_job_logs(submission.submission_id), 0
        try:
            while True:
                position = tail.take(position, await asyncio.wait_for(anext(pieces), ANSWER_SECONDS))
                answered = time.monotonic()
        except StopAsyncIteration:
            pass
        except lost as error:
            failure = _line(error)
        try:
            asked = asyncio.to_thread(client.get_job_info, submission.submission_id)
            info = await asyncio.wait_for(asked, ANSWER_SECONDS)
            answered = time.monotonic()
            if info.status.is_terminal():
                return info
            if info.status == "PENDING" and not position:
                tail.say(info.message)
        except lost as error:
            failure = _line(error)
        if time.monotonic() - answered > LOST_SECONDS:
            raise ConnectionError(
                f"{redact(submission.address)} did not answer for {LOST_SECONDS:g} s ({failure}); the job may go on"
            )
        await asyncio.sleep(1)


def _ended(submission: Submission, info: Any, tail: Tail) -> Submission:
    """The exit status that Ray tells, in `distmeta train`'s terms."""
    status, driver = info.status.value, info.driver_exit_code
    ended = replace(submission, status=status, run=tail.run)
    if (
        status != "FAILED"
    ):  # a stopped job's exit code is not told: SIGTERM came, which saves and exits with 130
        return replace(ended, exit_code=0 if status == "SUCCEEDED" else 130)
    if driver == 127:  # the shell's word for a command that is not there
        message = "the cluster has no `distmeta` on the PATH of its `ray start`, expected it installed on every node"
        return replace(ended, exit_code=2, message=message)
    told = redact(" ".join((info.message or "no reason given").split()))[-300:]
    message = tail.error or (told if driver is None else f"its driver ended with exit code {driver}")
    code = driver if driver in (2, 130) else 1
    return replace(ended, exit_code=code, message=message, in_log=bool(tail.error))


def _line(error: BaseException) -> str:
    return redact((str(error).splitlines() or [""])[0].strip())[:200] or type(error).__name__
