"""A cluster that already exists: `ray start --head --block` in a process of this test, joined by its address."""

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
from support.outcomes import read_theta

import distmeta
from distmeta.config.job import Job

WITHOUT_COMPILER = {"CXX": "no-such-compiler"}


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The address of a head node whose workers find no C++ compiler."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        f"--port={port}",
        "--num-cpus=2",
        "--include-dashboard=false",
        "--node-ip-address=127.0.0.1",
        f"--temp-dir={HOME}/head",
    ]
    log_path = HOME / "head.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=os.environ | WITHOUT_COMPILER
        )
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in log_path.read_text():
            assert process.poll() is None, log_path.read_text()
            assert time.monotonic() < deadline, "the head node did not start"
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def run_train(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `distmeta train job.yaml --json`."""
    command = [sys.executable, "-m", "distmeta.cli.main", "train", "job.yaml", "--json", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


@pytest.mark.slow
def test_run_without_a_compiler_on_its_worker_is_not_compiled(head: str, workplace: Path) -> None:
    """Its theta is that of a job that does not ask for compilation. The cluster is named by RAY_ADDRESS."""
    job = tree("maml", run={"workers": 1}, compute={"compile": True})
    (workplace / "job.yaml").write_text(yaml.safe_dump(job))
    uncompiled = distmeta.train(Job.load("job.yaml", ["run.workers=0", "compute.compile=false"])).run
    done = run_train(RAY_ADDRESS=head)
    assert done.returncode == 0, done.stderr
    message = (
        r"compute.compile: there is no C\+\+ compiler \(no-such-compiler\) on \S+; "
        "the whole run is computed without compilation"
    )
    assert len(re.findall(message, done.stderr)) == 1
    run = Path(json.loads(done.stdout)["run"])
    assert Job.load(run / "job.yaml").compute.compile is False
    assert read_theta(run) == read_theta(uncompiled)


@pytest.mark.slow  # Ray itself tries for 20 s
def test_wrong_token_is_one_line(head: str, workplace: Path) -> None:
    (workplace / "job.yaml").write_text(yaml.safe_dump(tree("maml", run={"workers": 2})))
    done = run_train(f"run.address={head}", RAY_AUTH_TOKEN="0" * 32)
    assert done.returncode == 2
    assert "are RAY_AUTH_MODE and RAY_AUTH_TOKEN the cluster's?" in json.loads(done.stdout)["error"]
    assert not (workplace / "runs").exists()
    assert os.environ["RAY_AUTH_TOKEN"] not in done.stdout + done.stderr


def test_address_without_a_cluster_is_one_line(workplace: Path) -> None:
    (workplace / "job.yaml").write_text(yaml.safe_dump(tree("maml", run={"workers": 2})))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        done = run_train(f"run.address=127.0.0.1:{closed.getsockname()[1]}")
    assert done.returncode == 2
    assert "nothing answers at" in json.loads(done.stdout)["error"]
    assert not (workplace / "runs").exists()
