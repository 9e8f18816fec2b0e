"""Training across hosts: a job submitted from outside to two hosts; a host added and a host cut off during a run."""

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
from support.network import Network, network, why_unavailable
from support.outcomes import read_theta

import distmeta
from distmeta.config.job import Job
from distmeta.runtime import checkpoint as checkpoints

UNAVAILABLE = why_unavailable()
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
DISTMETA = [sys.executable, "-m", "distmeta.cli.main"]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Network]:
    """A head and two hosts with two CPUs each."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    folder = HOME / "net"
    folder.mkdir()
    with network(folder) as made:
        for _ in range(2):
            made.add(cpus=2)
        yield made


def start_train(hosts: Network, *words: str) -> subprocess.Popen[str]:
    """Start `distmeta train job.yaml` on the head. It prints to the file `output`."""
    command = [*DISTMETA, "train", "job.yaml", f"run.address={hosts.address}", *words]
    with Path("output").open("w") as file:
        return subprocess.Popen(
            hosts.run("head", command), stdout=file, stderr=file, text=True, env=dict(os.environ)
        )


def wait_until(has_happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while not has_happened():
        assert process.poll() is None, Path("output").read_text()
        assert time.monotonic() < deadline, Path("output").read_text()
        time.sleep(0.2)


@pytest.mark.slow
def test_job_submitted_from_outside_uses_both_hosts(hosts: Network, workplace: Path) -> None:
    """It comes from a host without Ray, which reaches only the head's dashboard. Each host gets two workers."""
    run_section = {"steps": 40, "name": "submitted", "workers": 4}
    job = tree("maml", run=run_section, output=str(workplace / "there"))
    in_one_process = job | {"run": job["run"] | {"workers": 0}, "output": "runs"}
    expected = distmeta.train(Job.parse(in_one_process)).run
    desk = hosts.add_desk()
    folder = workplace / "desk"
    folder.mkdir()
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    command = [*DISTMETA, "submit", "job.yaml", "--address", hosts.dashboard, "--json"]
    process = subprocess.Popen(
        hosts.run(desk, command),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    metrics = workplace / "there" / "submitted" / "metrics.jsonl"
    numbers_of_workers: set[tuple[int, int]] = set()
    while process.poll() is None:
        if metrics.exists():
            numbers_of_workers.add((hosts.workers("host1"), hosts.workers("host2")))
        time.sleep(0.1)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["status"] == "SUCCEEDED"
    assert "step 40/40" in stderr, "the log was followed"
    assert (2, 2) in numbers_of_workers
    assert read_theta(workplace / "there" / "submitted") == read_theta(expected)


@pytest.mark.slow  # two minutes, most of them until Ray gives up the host that was cut off
def test_run_survives_an_added_host_and_a_lost_one(hosts: Network, workplace: Path) -> None:
    job = tree("maml", run={"steps": 100_000, "name": "hosts"})
    (workplace / "job.yaml").write_text(yaml.safe_dump(job))
    run = workplace / "runs" / "hosts"
    output = workplace / "output"

    def count_steps() -> int:
        path = run / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def wait_for_steps() -> None:
        target = count_steps() + 4
        wait_until(lambda: count_steps() >= target, process)

    def has_lost_two_workers() -> bool:
        text = output.read_text()
        return text.count("its node is gone") + text.count("no answer") >= 2

    process = start_train(hosts, "run.workers={min: 4, max: 6}", "run.start_timeout=120")
    wait_until(lambda: count_steps() >= 5, process)
    assert [hosts.workers(name) for name in ("host1", "host2")] == [2, 2]

    hosts.add(cpus=2)
    wait_until(lambda: "is ready: 6 now" in output.read_text(), process)
    assert hosts.workers("host3") == 2
    wait_for_steps()

    hosts.unplug("host1")
    wait_until(has_lost_two_workers, process)
    wait_for_steps()

    process.send_signal(signal.SIGTERM)
    process.wait(120)
    assert process.returncode == 130, output.read_text()
    assert "Traceback" not in output.read_text()
    step = checkpoints.load(run).progress.step
    expected = distmeta.train(Job.parse(tree("maml", run={"steps": step}))).run
    assert read_theta(run) == read_theta(expected)
