"""A cluster that is already there: `ray start --head --block` under a pid that we hold, joined by address."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import HOME, tree

import distmeta
from distmeta.config.job import Job
from distmeta.runtime import checkpoint as checkpoints

WITHOUT_A_COMPILER = {"CXX": "no-such-compiler"}


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A head node whose workers find no C++ compiler."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
    log = (HOME / "head.log").open("w")
    process = subprocess.Popen(
        [Path(sys.executable).with_name("ray"), *words, "--node-ip-address=127.0.0.1", f"--temp-dir={HOME}/head"],
        stdout=log, stderr=log, start_new_session=True, env=os.environ | WITHOUT_A_COMPILER,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while "Ray runtime started" not in (HOME / "head.log").read_text():
        assert process.poll() is None, (HOME / "head.log").read_text()
        assert time.monotonic() < deadline, "the head node did not start"
        time.sleep(0.1)
    yield f"127.0.0.1:{port}"
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    log.close()


def train(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distmeta.cli.main", "train", "job.yaml", "--json", *words],
        capture_output=True, text=True, timeout=120, env=os.environ | environment,
    )  # fmt: skip


def test_joined_by_environment_and_without_a_compiler_on_a_worker(head: str, workplace: Path) -> None:
    """The whole run goes without: its theta is that of one that was not to compile."""
    job = tree("maml", run={"workers": 1}, compute={"compile": True})
    (workplace / "job.yaml").write_text(yaml.safe_dump(job))
    alone = distmeta.train(Job.load("job.yaml", ["run.workers=0", "compute.compile=false"])).run
    done = train(RAY_ADDRESS=head)
    assert done.returncode == 0, done.stderr
    said = (
        r"compute.compile: there is no C\+\+ compiler \(no-such-compiler\) on \S+; the whole run goes without"
    )
    assert len(re.findall(said, done.stderr)) == 1
    run = Path(json.loads(done.stdout)["run"])
    assert Job.load(run / "job.yaml").compute.compile is False
    theta, expected = checkpoints.load(run).theta, checkpoints.load(alone).theta
    assert all(theta[name].equal(expected[name]) for name in expected)


@pytest.mark.slow  # Ray itself tries for 20 s
def test_a_wrong_token_is_one_line(head: str, workplace: Path) -> None:
    (workplace / "job.yaml").write_text(yaml.safe_dump(tree("maml", run={"workers": 2})))
    done = train(f"run.address={head}", RAY_AUTH_TOKEN="0" * 32)
    assert done.returncode == 2
    assert "are RAY_AUTH_MODE and RAY_AUTH_TOKEN the cluster's?" in json.loads(done.stdout)["error"]
    assert not (workplace / "runs").exists()
    assert os.environ["RAY_AUTH_TOKEN"] not in done.stdout + done.stderr


def test_nothing_at_an_address_is_one_line(workplace: Path) -> None:
    (workplace / "job.yaml").write_text(yaml.safe_dump(tree("maml", run={"workers": 2})))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        done = train(f"run.address=127.0.0.1:{closed.getsockname()[1]}")
    assert done.returncode == 2
    assert "nothing answers at" in json.loads(done.stdout)["error"]
    assert not (workplace / "runs").exists()
