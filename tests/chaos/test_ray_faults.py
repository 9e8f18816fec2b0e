"""Faults inside Ray: calls between its processes that fail, and an object store without room."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import HOME, tree
from injector import ENVIRONMENT, RayNodes, kill_with_descendants
from support.outcomes import read_rows_without_times, read_theta

import distmeta
from distmeta.config.job import Job

FAILURE_PERCENT = {
    "num_failures": -1,
    "req_failure_prob": 3,
    "resp_failure_prob": 3,
    "in_flight_failure_prob": 3,
}
"""How often a call is not sent, or its answer is lost, or the two sides disagree about that."""
CALLS = [
    "CoreWorkerService.grpc_client.PushTask",
    "CoreWorkerService.grpc_client.GetObjectStatus",
    "NodeManagerService.grpc_client.RequestWorkerLease",
    "NodeManagerService.grpc_client.ReturnWorkerLease",
]
TRAIN = [sys.executable, "-m", "distmeta.cli.main", "train", "job.yaml"]


@pytest.mark.slow  # each failed call to a worker costs the start of another one
def test_failing_calls_inside_ray_do_not_change_the_result(workplace: Path) -> None:
    """Ray's own fault injection, in the driver and in all processes of the cluster."""
    run = {"steps": 30, "eval_every": 10, "eval_tasks": 60, "name": "undisturbed", "start_timeout": 200.0}
    undisturbed = distmeta.train(Job.parse(tree("maml", run=run))).run
    failing = {"RAY_testing_rpc_failure": json.dumps(dict.fromkeys(CALLS, FAILURE_PERCENT))}
    folder = HOME / "rpc"
    folder.mkdir()
    nodes = RayNodes(folder, failing)
    try:
        nodes.add()
        on_cluster = {"workers": 2, "address": nodes.address, "name": "disturbed", "max_shard_failures": 20}
        (workplace / "job.yaml").write_text(yaml.safe_dump(tree("maml", run=run | on_cluster)))
        done = subprocess.run(TRAIN, capture_output=True, text=True, timeout=280, env=ENVIRONMENT | failing)
    finally:
        nodes.close()
    assert done.returncode == 0, done.stderr
    assert "lost worker" in done.stderr + done.stdout, "no call failed"
    disturbed = workplace / "runs" / "disturbed"
    assert read_theta(disturbed) == read_theta(undisturbed)
    assert read_rows_without_times(disturbed) == read_rows_without_times(undisturbed)


FILLER = """
import sys
import numpy, ray
ray.init(address=sys.argv[1], log_to_driver=False)
held = []
try:
    while True:  # objects that are read in place can neither be moved to disk nor dropped
        held.append(ray.get(ray.put(numpy.zeros(2_000_000, numpy.uint8))))
except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError):
    print("full", flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow  # Ray itself tries for a while before it reports that its store is full
def test_run_waits_for_room_in_the_object_store(workplace: Path) -> None:
    run = {"steps": 6, "tasks_per_step": 4, "shards": 2, "eval_every": 0, "name": "undisturbed"}
    model = {"type": "mlp", "hidden": [1400, 1400]}  # theta has 8 MB
    undisturbed = distmeta.train(Job.parse(tree("maml", model=model, run=run))).run
    folder = HOME / "full"
    folder.mkdir()
    no_disk = {"RAY_local_fs_capacity_threshold": "0.0", "RAY_object_store_full_delay_ms": "10"}
    nodes = RayNodes(folder, no_disk, ["--object-store-memory=100000000"])
    output = workplace / "output"
    filler = None
    driver = None
    try:
        nodes.add()
        filler = subprocess.Popen(
            [sys.executable, "-c", FILLER, nodes.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT | no_disk,
        )
        assert filler.stdin is not None
        assert filler.stdout is not None
        assert filler.stdout.readline() == "full\n"
        on_cluster = {"workers": 1, "address": nodes.address, "name": "disturbed"}
        job = tree("maml", model=model, run=run | on_cluster)
        (workplace / "job.yaml").write_text(yaml.safe_dump(job))
        with output.open("w") as file:
            driver = subprocess.Popen(TRAIN, stdout=file, stderr=file, env=ENVIRONMENT | no_disk)
        deadline = time.monotonic() + 200
        while "Ray's object store is full: waiting for room" not in output.read_text():
            assert driver.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)
        filler.communicate(timeout=60)  # closes its standard input, so it ends
        assert driver.wait(200) == 0, output.read_text()
    finally:
        for process in (filler, driver):
            if process is not None and process.poll() is None:
                kill_with_descendants(process)
        nodes.close()
    assert read_theta(workplace / "runs" / "disturbed") == read_theta(undisturbed)
