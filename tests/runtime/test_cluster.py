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
from conftest import HOME, REPOSITORY, tree

import distmeta
from distmeta.job import Job
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
        [sys.executable, "-m", "distmeta.cli", "train", "job.yaml", "--json", *words],
        capture_output=True, text=True, timeout=120, env=os.environ | environment,
    )  # fmt: skip


def test_joined_by_environment(head: str, workplace: Path) -> None:
    (workplace / "job.yaml").write_text(yaml.safe_dump(tree("maml", run={"workers": 1})))
    alone = distmeta.train(Job.load("job.yaml", ["run.workers=0"])).run
    expected = checkpoints.load(alone).theta
    done = train(RAY_ADDRESS=head)
    assert done.returncode == 0, done.stderr
    theta = checkpoints.load(json.loads(done.stdout)["run"]).theta
    assert all(theta[name].equal(expected[name]) for name in expected)


def test_where_a_worker_has_no_compiler_the_whole_run_goes_without(head: str, workplace: Path) -> None:
    """On the cluster of `run.address`."""
    job = tree("maml", run={"workers": 1}, compute={"compile": True})
    (workplace / "job.yaml").write_text(yaml.safe_dump(job))
    done = train(f"run.address={head}")
    assert done.returncode == 0, done.stderr
    said = (
        r"compute.compile: there is no C\+\+ compiler \(no-such-compiler\) on \S+; the whole run goes without"
    )
    assert len(re.findall(said, done.stderr)) == 1
    run = Path(json.loads(done.stdout)["run"])
    assert Job.load(run / "job.yaml").compute.compile is False


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


WATCHED = """
import json, os, sys
import distmeta
from distmeta.job import Job
from distmeta.runtime.driver import Silent
from processes import descendants, listening

class Watch(Silent):
    def step(self, record):
        if record["step"] == 2:
            below = descendants(os.getpid())
            asks = any("RAY_AUTH_MODE=token" in open(f"/proc/{pid}/environ").read() for pid in below)
            print(json.dumps([sorted(listening([os.getpid(), *below])), len(below), asks]))

distmeta.train(Job.load("job.yaml"), reporter=Watch())
"""


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc")
def test_a_local_ray_asks_for_a_token_and_listens_on_loopback(workplace: Path) -> None:
    """As a user has it, who has set nothing."""
    (workplace / "job.yaml").write_text(yaml.safe_dump(tree("maml", run={"workers": 1})))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", WATCHED], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    listeners, processes, asks_for_a_token = json.loads(done.stdout.splitlines()[-1])
    assert processes > 4, "a raylet, its agents, the control store, a worker"
    assert asks_for_a_token
    assert len(listeners) > 4
    assert {address.rpartition(":")[0] for address in listeners} <= {"127.0.0.1", "::1"}
    assert not re.search("RAY_AUTH_TOKEN|[0-9a-f]{64}", done.stdout + done.stderr)
    run = next((workplace / "runs").iterdir())
    assert not re.search("[0-9a-f]{64}", (run / "job.yaml").read_text())
