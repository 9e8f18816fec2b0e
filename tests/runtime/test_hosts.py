"""Training across hosts: a job submitted from outside on two hosts; one of them added, one cut off while it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import HOME, REPOSITORY, tree
from network import Network, network, refused

import distmeta
from distmeta.config.job import Job
from distmeta.runtime import checkpoint as checkpoints

REFUSED = refused()
pytestmark = pytest.mark.skipif(REFUSED is not None, reason=str(REFUSED))


@pytest.fixture(scope="module")
def hosts() -> Iterator[Network]:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    folder = HOME / "net"
    folder.mkdir()
    with network(folder) as made:
        for _ in range(2):
            made.add(cpus=2)
        yield made


def start(hosts: Network, *words: str) -> subprocess.Popen[str]:
    line = [
        sys.executable,
        "-m",
        "distmeta.cli.main",
        "train",
        "job.yaml",
        f"run.address={hosts.address}",
        *words,
    ]
    with Path("said").open("w") as said:
        return subprocess.Popen(
            hosts.run("head", line), stdout=said, stderr=said, text=True, env=dict(os.environ)
        )


def until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while not happened():
        assert process.poll() is None, Path("said").read_text()
        assert time.monotonic() < deadline, Path("said").read_text()
        time.sleep(0.2)


def bits(run: Path) -> bytes:
    theta = checkpoints.load(run).theta
    return b"".join(name.encode() + theta[name].numpy().tobytes() for name in sorted(theta))


@pytest.mark.slow
def test_submitted_from_outside_across_two_hosts(hosts: Network, workplace: Path) -> None:
    """From a host without Ray, which reaches the head's dashboard alone; each of the two hosts has two workers."""
    job = tree("maml", run={"steps": 40, "name": "submitted", "workers": 4}, output=str(workplace / "there"))
    alone = distmeta.train(Job.parse(job | {"run": job["run"] | {"workers": 0}, "output": "runs"})).run
    desk, folder = hosts.add_desk(), workplace / "desk"
    folder.mkdir()
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    line = [
        sys.executable,
        "-m",
        "distmeta.cli.main",
        "submit",
        "job.yaml",
        "--address",
        hosts.dashboard,
        "--json",
    ]
    process = subprocess.Popen(
        hosts.run(desk, line), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=dict(os.environ),
    )  # fmt: skip
    metrics, seen = workplace / "there" / "submitted" / "metrics.jsonl", set[tuple[int, int]]()
    while process.poll() is None:
        if metrics.exists():
            seen.add((hosts.workers("host1"), hosts.workers("host2")))
        time.sleep(0.1)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["status"] == "SUCCEEDED"
    assert "step 40/40" in stderr, "the log was followed"
    assert (2, 2) in seen
    assert bits(workplace / "there" / "submitted") == bits(alone)


@pytest.mark.slow  # two minutes, most of them until Ray gives up a host that was cut off
def test_across_two_hosts_one_added_one_cut_off(hosts: Network, workplace: Path) -> None:
    job = tree("maml", run={"steps": 100_000, "name": "hosts"})
    (workplace / "job.yaml").write_text(yaml.safe_dump(job))
    run, said = workplace / "runs" / "hosts", workplace / "said"

    def steps() -> int:
        path = run / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    process = start(hosts, "run.workers={min: 4, max: 6}", "run.start_timeout=120")
    until(lambda: steps() >= 5, process)
    assert [hosts.workers(name) for name in ("host1", "host2")] == [2, 2]

    hosts.add(cpus=2)
    until(lambda: "is ready: 6 now" in said.read_text(), process)
    assert hosts.workers("host3") == 2
    before = steps()
    until(lambda: steps() > before + 3, process)

    hosts.unplug("host1")
    until(
        lambda: said.read_text().count("its node is gone") + said.read_text().count("no answer") >= 2, process
    )
    before = steps()
    until(lambda: steps() > before + 3, process)

    process.send_signal(signal.SIGTERM)
    process.wait(120)
    assert process.returncode == 130, said.read_text()
    assert "Traceback" not in said.read_text()
    step = checkpoints.load(run).progress.step
    alone = distmeta.train(Job.parse(tree("maml", run={"steps": step}))).run
    assert bits(run) == bits(alone)
