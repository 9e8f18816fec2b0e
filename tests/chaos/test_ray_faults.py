"""Faults inside Ray: calls between its processes that fail, an object store without room."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import HOME, tree
from injector import ENVIRONMENT, Nodes, clockless, end

import distmeta
from distmeta.config.job import Job
from distmeta.runtime import checkpoint as checkpoints

UNSURE = {
    "num_failures": -1, "req_failure_prob": 3, "resp_failure_prob": 3, "in_flight_failure_prob": 3,
}  # fmt: skip
"""In percent, of each kind: the call is not sent; it was answered, and the answer is lost; both sides differ."""
CALLS = [
    "CoreWorkerService.grpc_client.PushTask",
    "CoreWorkerService.grpc_client.GetObjectStatus",
    "NodeManagerService.grpc_client.RequestWorkerLease",
    "NodeManagerService.grpc_client.ReturnWorkerLease",
]


@pytest.mark.slow  # every failed call to a worker costs the start of another
def test_calls_inside_ray_fail(workplace: Path) -> None:
    """Ray's own fault injection, in the driver and all of the cluster's processes."""
    run = {"steps": 30, "eval_every": 10, "eval_tasks": 60, "name": "calm", "start_timeout": 200.0}
    calm = distmeta.train(Job.parse(tree("maml", run=run))).run
    failing = {"RAY_testing_rpc_failure": json.dumps(dict.fromkeys(CALLS, UNSURE))}
    folder = HOME / "rpc"
    folder.mkdir()
    nodes = Nodes(folder, failing)
    try:
        nodes.add()
        placed = run | {"workers": 2, "address": nodes.address, "name": "shaken", "max_shard_failures": 20}
        (workplace / "job.yaml").write_text(yaml.safe_dump(tree("maml", run=placed)))
        done = subprocess.run(
            [sys.executable, "-m", "distmeta.cli.main", "train", "job.yaml"],
            capture_output=True, text=True, timeout=280, env=ENVIRONMENT | failing,
        )  # fmt: skip
    finally:
        nodes.close()
    assert done.returncode == 0, done.stderr
    assert "lost worker" in done.stderr + done.stdout, "no call failed"
    shaken = workplace / "runs" / "shaken"
    theta, expected = checkpoints.load(shaken).theta, checkpoints.load(calm).theta
    assert all(theta[name].equal(expected[name]) for name in expected)
    assert clockless(shaken) == clockless(calm)


FILLER = """
import sys
import numpy, ray
ray.init(address=sys.argv[1], log_to_driver=False)
held = []
try:
    while True:  # what is read in place can be neither moved to disk nor dropped
        held.append(ray.get(ray.put(numpy.zeros(2_000_000, numpy.uint8))))
except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError):
    print("full", flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow  # Ray itself tries for a while before it says that its store is full
def test_a_full_object_store_is_waited_for(workplace: Path) -> None:
    run = {"steps": 6, "tasks_per_step": 4, "shards": 2, "eval_every": 0, "name": "calm"}
    model = {"type": "mlp", "hidden": [1400, 1400]}  # theta has 8 MB
    calm = distmeta.train(Job.parse(tree("maml", model=model, run=run))).run
    folder = HOME / "full"
    folder.mkdir()
    no_disk = {"RAY_local_fs_capacity_threshold": "0.0", "RAY_object_store_full_delay_ms": "10"}
    nodes = Nodes(folder, no_disk, ["--object-store-memory=100000000"])
    said = workplace / "said"
    filler = driver = None
    try:
        nodes.add()
        filler = subprocess.Popen(
            [sys.executable, "-c", FILLER, nodes.address],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT | no_disk,
        )  # fmt: skip
        assert filler.stdin is not None
        assert filler.stdout is not None
        assert filler.stdout.readline() == "full\n"
        placed = run | {"workers": 1, "address": nodes.address, "name": "shaken"}
        (workplace / "job.yaml").write_text(yaml.safe_dump(tree("maml", model=model, run=placed)))
        with said.open("w") as file:
            line = [sys.executable, "-m", "distmeta.cli.main", "train", "job.yaml"]
            driver = subprocess.Popen(line, stdout=file, stderr=file, env=ENVIRONMENT | no_disk)
        deadline = time.monotonic() + 200
        while "Ray's object store is full: waiting for room" not in said.read_text():
            assert driver.poll() is None, said.read_text()
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.1)
        filler.communicate(timeout=60)  # its standard input ends, and so does it
        assert driver.wait(200) == 0, said.read_text()
    finally:
        for process in (filler, driver):
            if process is not None and process.poll() is None:
                end(process)
        nodes.close()
    theta, expected = checkpoints.load(workplace / "runs" / "shaken").theta, checkpoints.load(calm).theta
    assert all(theta[name].equal(expected[name]) for name in expected)
