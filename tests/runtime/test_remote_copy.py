"""Runs behind a URI: on a real S3 server (moto's) on this machine, and behind file://."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import HOME, tree
from support.outcomes import read_theta
from support.ray_head import find_free_ports

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.remote_copy import join, local_folder, path_in_run, run_uri
from distmeta.runtime.reporter import SilentReporter
from distmeta.runtime.training import train


@pytest.fixture(scope="module")
def s3_server() -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process with an S3 server, and its port."""
    if importlib.util.find_spec("moto") is None:
        pytest.skip("moto is not installed: pip install 'moto[s3]' flask flask-cors")
    (port,) = find_free_ports(1)
    log_path = HOME / "moto.log"
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-p", str(port)]
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, log_path.read_text()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "moto's server did not start"
                time.sleep(0.1)
        yield process, port
        process.send_signal(signal.SIGKILL)
        process.wait(30)


@pytest.fixture
def s3_query(s3_server: tuple[object, int], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The query of a URI that leads to the server. It has a bucket `runs`."""
    from pyarrow.fs import S3FileSystem

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    endpoint = f"http://127.0.0.1:{s3_server[1]}"
    S3FileSystem(endpoint_override=endpoint, allow_bucket_creation=True).create_dir("runs")
    return f"?endpoint_override=127.0.0.1%3A{s3_server[1]}&scheme=http"


def make_job(output: str, **run: object) -> Job:
    return Job.parse(tree("maml", run={"checkpoint_every": 2, "keep": 2} | run, output=output))


def list_files(uri: str) -> set[str]:
    """Return the paths of all files below a URI."""
    from pyarrow.fs import FileSelector, FileSystem

    files, root = FileSystem.from_uri(uri)
    infos = files.get_file_info(FileSelector(root, recursive=True))
    return {info.path.removeprefix(root).strip("/") for info in infos if info.is_file}


def delete_local_copies() -> None:
    """Make this machine like another one, which has none of the runs."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_run_is_trained_resumed_and_evaluated_behind_a_uri(
    kind: str, workplace: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "s3":
        output = "s3://runs/deep/er" + request.getfixturevalue("s3_query")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
        output = f"file://{workplace}/shared"
    local = train(make_job("runs", steps=9))
    half = train(make_job(output, steps=5, name="a"))
    assert half.place == join(output, "a")
    files = list_files(half.place)
    top = {path for path in files if path.count("/") < 2}
    assert top == {"job.yaml", "metrics.jsonl", "writer", "checkpoints/latest"}
    folders = {path.split("/")[1] for path in files if path.count("/") == 2}
    assert folders == {"step-00000004", "step-00000005"}

    delete_local_copies()
    resumed = train(make_job(output, steps=9, name="a"), "auto")
    assert read_theta(resumed.place) == read_theta(local.run)
    lines = (resumed.run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 10)]

    delete_local_copies()
    figures = distmeta.evaluate(half.place, ["run.eval_tasks=20"]).figures
    assert figures == distmeta.evaluate(local.run, ["run.eval_tasks=20"]).figures
    assert distmeta.load(join(half.place, "checkpoints", "latest")).checkpoint.progress.step == 9
    assert not Path(os.environ["XDG_CACHE_HOME"]).exists(), "an evaluation leaves nothing"

    # resumed by its URI, whatever the job's output is
    longer = train(make_job("elsewhere", steps=10), half.place)
    assert longer.place == half.place
    assert checkpoints.load(half.place).progress.step == 10


def test_wrong_uris_are_one_line(s3_query: str, workplace: Path) -> None:
    for uri in (f"s3://runs/nowhere{s3_query}", f"s3://runs/nowhere/checkpoints/best{s3_query}"):
        message = r"s3://runs/nowhere.*: got no checkpoint, expected a run folder"
        with pytest.raises(InputError, match=message):
            distmeta.load(uri)
    with pytest.raises(InputError, match=r"step-00000007.*: got no checkpoint"):
        distmeta.load(f"s3://runs/nowhere/checkpoints/step-00000007{s3_query}")
    with pytest.raises(InputError, match=r"got no checkpoint"):
        train(make_job("runs"), f"s3://runs/nowhere{s3_query}")
    with pytest.raises(InputError, match=r"output: s3://no-such-bucket/.* cannot be written"):
        train(make_job(f"s3://no-such-bucket/x{s3_query}", name="x"))
    with pytest.raises(InputError, match=r"wrong://x/.*expected a URI such as s3://BUCKET/PREFIX"):
        train(make_job("wrong://x", name="x"))
    with pytest.raises(InputError, match=r"output: got 's3://runs/x' with credentials") as caught:
        train(make_job("s3://me:hunter2@runs/x"))
    assert "hunter2" not in str(caught.value)


def test_existing_run_is_not_overwritten(s3_query: str) -> None:
    output = f"s3://runs/once{s3_query}"
    train(make_job(output, steps=2, name="b"))
    delete_local_copies()
    with pytest.raises(InputError, match=r"run.name: the run folder s3://runs/once/b.* exists already"):
        train(make_job(output, steps=2, name="b"))


class StoreHider(SilentReporter):
    """Replaces the store's folder by a file after one step, and brings it back after another one."""

    def __init__(self, store: Path, hide_after: int, return_after: int | None):
        self.store = store
        self.hide_after = hide_after
        self.return_after = return_after
        self.reports: list[str] = []

    def step(self, record: Mapping[str, Any]) -> None:
        hidden = self.store.with_name("hidden")
        if record["step"] == self.hide_after:
            self.store.rename(hidden)
            self.store.touch()
        if record["step"] == self.return_after:
            self.store.unlink()
            hidden.rename(self.store)

    def report(self, text: str) -> None:
        self.reports.append(text)


def test_store_that_is_away_for_a_while_loses_nothing(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    store = workplace / "store"
    output = f"file://{store}"
    reporter = StoreHider(store, hide_after=3, return_after=5)
    done = train(make_job(output, steps=7, name="a"), reporter=reporter)
    (report,) = [text for text in reporter.reports if "cannot be written" in text]
    assert report.startswith(f"output: {output}/a cannot be written (")
    assert report.endswith("; the next save tries again")
    assert checkpoints.load(done.place).progress.step == 7
    local_files = {str(path.relative_to(done.run)) for path in done.run.rglob("*") if path.is_file()}
    assert list_files(done.place) == local_files | {"writer"}

    longer_job = make_job(output, steps=10, name="a")
    with pytest.raises(OSError, match=f"the run is in {workplace}/cache"):
        train(longer_job, "auto", StoreHider(store, hide_after=9, return_after=None))
    store.unlink()
    (workplace / "hidden").rename(store)
    assert checkpoints.load(done.place).progress.step == 8
    resumed = train(make_job(output, steps=11, name="a"), "auto")  # from the local copy, which is ahead
    assert read_theta(resumed.place) == read_theta(train(make_job("runs", steps=11)).run)
    assert json.loads((resumed.run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 11
    assert checkpoints.load(done.place).progress.step == 11


class ResumingReporter(SilentReporter):
    """After step 3 resumes the run by its URI: first on this machine, then as if on another one."""

    def __init__(self, uri: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
        self.uri = uri
        self.elsewhere = elsewhere
        self.monkeypatch = monkeypatch
        self.reports: list[str] = []

    def step(self, record: Mapping[str, Any]) -> None:
        if record["step"] != 3:
            return
        with pytest.raises(InputError, match="in use by another process"):
            train(make_job("runs", steps=6), self.uri)
        with self.monkeypatch.context() as other_machine:
            other_machine.setenv("XDG_CACHE_HOME", str(self.elsewhere))
            assert train(make_job("runs", steps=6), self.uri).step == 6

    def report(self, text: str) -> None:
        self.reports.append(text)


def test_last_process_that_resumed_a_run_copies_it(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process reports that it does not copy any more."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    output = f"file://{workplace}/store"
    reporter = ResumingReporter(join(output, "a"), workplace / "elsewhere", monkeypatch)
    with pytest.raises(OSError, match="another process has resumed the run since, on "):
        train(make_job(output, steps=9, name="a"), reporter=reporter)
    assert any("another process has resumed the run since" in text for text in reporter.reports)
    assert checkpoints.load(reporter.uri).progress.step == 6
    lines = (workplace / "store" / "a" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 7)]


def test_uris_keep_their_query() -> None:
    assert join("s3://b/x/?scheme=http", "a", "b") == "s3://b/x/a/b?scheme=http"
    assert join("gs://b", "a") == "gs://b/a"
    assert run_uri("s3://b/x/a/checkpoints/best?scheme=http") == "s3://b/x/a?scheme=http"
    assert run_uri("s3://b/x/a/") == "s3://b/x/a"
    assert path_in_run("s3://b/x/a/checkpoints/best?scheme=http") == "checkpoints/best"
    assert path_in_run("s3://b/x/a/?scheme=http") == ""
    assert local_folder("s3://b/x/a?scheme=http").name == "a"
    assert local_folder("s3://b/x/a") != local_folder("s3://c/x/a")
