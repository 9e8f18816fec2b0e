"""Runs behind a URI, on a real S3 server (moto's) on this machine, and behind file://."""

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
from support.ray_head import find_free_ports

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.remote_copy import path_in_run, join, local_folder, run_uri
from distmeta.runtime.training import Run, SilentReporter, train


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    if importlib.util.find_spec("moto") is None:
        pytest.skip("moto is not installed: pip install 'moto[s3]' flask flask-cors")
    (port,) = find_free_ports(1)
    with (HOME / "moto.log").open("w") as log:
        words = [sys.executable, "-W", "ignore", "-m", "moto.server", "-p", str(port)]
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, (HOME / "moto.log").read_text()
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
def bucket(server: tuple[object, int], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The query of a URI that means the server; the bucket is called runs."""
    from pyarrow.fs import S3FileSystem

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    endpoint = f"http://127.0.0.1:{server[1]}"
    S3FileSystem(endpoint_override=endpoint, allow_bucket_creation=True).create_dir("runs")
    return f"?endpoint_override=127.0.0.1%3A{server[1]}&scheme=http"


def job(output: str, **run: object) -> Job:
    return Job.parse(tree("maml", run={"checkpoint_every": 2, "keep": 2} | run, output=output))


def names(uri: str) -> set[str]:
    from pyarrow.fs import FileSelector, FileSystem

    files, inner = FileSystem.from_uri(uri)
    infos = files.get_file_info(FileSelector(inner, recursive=True))
    return {info.path.removeprefix(inner).strip("/") for info in infos if info.is_file}


def forget() -> None:
    """As on another machine: nothing is here."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])


def equal(one: Run | str, other: Run | str) -> bool:
    first, second = (
        checkpoints.load(each if isinstance(each, str) else each.place).theta for each in (one, other)
    )
    return all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_trained_resumed_and_evaluated_behind_a_uri(kind: str, workplace: Path, request, monkeypatch) -> None:
    if kind == "s3":
        output = "s3://runs/deep/er" + request.getfixturevalue("bucket")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
        output = f"file://{workplace}/shared"
    whole = train(job("runs", steps=9))
    half = train(job(output, steps=5, name="a"))
    assert half.place == join(output, "a")
    left = names(half.place)
    top = {path for path in left if path.count("/") < 2}
    assert top == {"job.yaml", "metrics.jsonl", "writer", "checkpoints/latest"}
    assert {path.split("/")[1] for path in left if path.count("/") == 2} == {"step-00000004", "step-00000005"}

    forget()
    rest = train(job(output, steps=9, name="a"), "auto")
    assert equal(rest, whole)
    lines = (rest.run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 10)]

    forget()
    figures = distmeta.evaluate(half.place, ["run.eval_tasks=20"]).figures
    assert figures == distmeta.evaluate(whole.run, ["run.eval_tasks=20"]).figures
    assert distmeta.load(join(half.place, "checkpoints", "latest")).checkpoint.progress.step == 9
    assert not Path(os.environ["XDG_CACHE_HOME"]).exists(), "an evaluation leaves nothing"

    longer = train(job("elsewhere", steps=10), half.place)  # by its URI, whatever the job says
    assert longer.place == half.place
    assert checkpoints.load(half.place).progress.step == 10


def test_what_is_not_there_is_one_line(bucket: str, workplace: Path) -> None:
    for uri in (f"s3://runs/nowhere{bucket}", f"s3://runs/nowhere/checkpoints/best{bucket}"):
        with pytest.raises(
            InputError, match=r"s3://runs/nowhere.*: got no checkpoint, expected a run folder"
        ):
            distmeta.load(uri)
    with pytest.raises(InputError, match=r"step-00000007.*: got no checkpoint"):
        distmeta.load(f"s3://runs/nowhere/checkpoints/step-00000007{bucket}")
    with pytest.raises(InputError, match=r"got no checkpoint"):
        train(job("runs"), f"s3://runs/nowhere{bucket}")
    with pytest.raises(InputError, match=r"output: s3://no-such-bucket/.* cannot be written"):
        train(job(f"s3://no-such-bucket/x{bucket}", name="x"))
    with pytest.raises(InputError, match=r"wrong://x/.*expected a URI such as s3://BUCKET/PREFIX"):
        train(job("wrong://x", name="x"))
    with pytest.raises(InputError, match=r"output: got 's3://runs/x' with credentials") as caught:
        train(job("s3://me:hunter2@runs/x"))
    assert "hunter2" not in str(caught.value)


def test_an_existing_run_is_not_written_over(bucket: str) -> None:
    output = f"s3://runs/once{bucket}"
    train(job(output, steps=2, name="b"))
    forget()
    with pytest.raises(InputError, match=r"run.name: the run folder s3://runs/once/b.* exists already"):
        train(job(output, steps=2, name="b"))


class Meddler(SilentReporter):
    """Puts a file where the store's folder was after step `away`, and the folder back after step `back`."""

    def __init__(self, store: Path, away: int, back: int):
        self.store, self.away, self.back = store, away, back
        self.said: list[str] = []

    def step(self, record: Mapping[str, Any]) -> None:
        hidden = self.store.with_name("hidden")
        if record["step"] == self.away:
            self.store.rename(hidden)
            self.store.touch()
        if record["step"] == self.back:
            self.store.unlink()
            hidden.rename(self.store)

    def report(self, text: str) -> None:
        self.said.append(text)


def test_a_store_that_is_away_for_a_while_loses_nothing(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    store, output = workplace / "store", f"file://{workplace}/store"
    while_away = Meddler(store, away=3, back=5)
    done = train(job(output, steps=7, name="a"), reporter=while_away)
    (said,) = [text for text in while_away.said if "cannot be written" in text]
    assert said.startswith(f"output: {output}/a cannot be written (")
    assert said.endswith("; the next save tries again")
    assert checkpoints.load(done.place).progress.step == 7
    assert names(done.place) == {
        str(path.relative_to(done.run)) for path in done.run.rglob("*") if path.is_file()
    } | {"writer"}

    with pytest.raises(OSError, match=f"the run is in {workplace}/cache"):
        train(job(output, steps=10, name="a"), "auto", Meddler(store, away=9, back=0))
    store.unlink()
    (workplace / "hidden").rename(store)
    assert checkpoints.load(done.place).progress.step == 8
    rest = train(job(output, steps=11, name="a"), "auto")  # from what is here, which is ahead
    assert equal(rest, train(job("runs", steps=11)))
    assert json.loads((rest.run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 11
    assert checkpoints.load(done.place).progress.step == 11


class TakenUp(SilentReporter):
    """After step 3 the run is resumed by its URI: here first, then as on another machine."""

    def __init__(self, uri: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
        self.uri, self.elsewhere, self.monkeypatch = uri, elsewhere, monkeypatch
        self.said: list[str] = []

    def step(self, record: Mapping[str, Any]) -> None:
        if record["step"] != 3:
            return
        with pytest.raises(InputError, match="in use by another process"):
            train(job("runs", steps=6), self.uri)
        with self.monkeypatch.context() as there:
            there.setenv("XDG_CACHE_HOME", str(self.elsewhere))
            assert train(job("runs", steps=6), self.uri).step == 6

    def report(self, text: str) -> None:
        self.said.append(text)


def test_a_run_has_one_writer(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who took a run up last goes on copying it; the other says that it does not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    output = f"file://{workplace}/store"
    first = TakenUp(join(output, "a"), workplace / "elsewhere", monkeypatch)
    with pytest.raises(OSError, match="another process has taken the run up since, on "):
        train(job(output, steps=9, name="a"), reporter=first)
    assert any("another process has taken the run up since" in text for text in first.said)
    assert checkpoints.load(first.uri).progress.step == 6
    lines = (workplace / "store" / "a" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 7)]


def test_uris_are_cut_where_their_query_begins() -> None:
    assert join("s3://b/x/?scheme=http", "a", "b") == "s3://b/x/a/b?scheme=http"
    assert join("gs://b", "a") == "gs://b/a"
    assert run_uri("s3://b/x/a/checkpoints/best?scheme=http") == "s3://b/x/a?scheme=http"
    assert run_uri("s3://b/x/a/") == "s3://b/x/a"
    assert path_in_run("s3://b/x/a/checkpoints/best?scheme=http") == "checkpoints/best"
    assert path_in_run("s3://b/x/a/?scheme=http") == ""
    assert local_folder("s3://b/x/a?scheme=http").name == "a"
    assert local_folder("s3://b/x/a") != local_folder("s3://c/x/a")
