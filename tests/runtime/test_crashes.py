"""The driver dies: in the middle of writing a checkpoint, at any moment of a run, with the disk full."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, tree
from processes import descendants, environment, gone, listening, send, shared_files, words, worker_pids

import distmeta
from distmeta.config.job import Job
from distmeta.runtime import checkpoint as checkpoints

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])}


def test_killed_at_every_system_call_that_writes(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip(
            "strace is not installed: the checkpoint writer cannot be killed between two system calls"
        )
    done = subprocess.run(
        [sys.executable, str(HERE / "crash_points.py"), str(tmp_path)],
        capture_output=True, text=True, timeout=300, env=ENVIRONMENT,
    )  # fmt: skip
    if "Operation not permitted" in done.stderr:
        pytest.skip(
            "strace may not attach here: the checkpoint writer cannot be killed between two system calls"
        )
    assert done.returncode == 0, done.stderr
    points = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert len(points) == 2
    assert min(points) > 30, points


def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_whole(workplace: Path) -> None:
    """A real one: a small file system of its own, filled up but for a little."""
    (workplace / "job.yaml").write_text(
        yaml.safe_dump(tree("maml", run={"steps": 500, "checkpoint_every": 1, "keep": 999}))
    )
    (workplace / "small").mkdir()
    mount = f"mount -t tmpfs -o size=1m none {workplace}/small"
    script = f"""
        {mount} || exit 77
        {sys.executable} -m distmeta.cli.main train job.yaml run.name=full output=small --json
        code=$?
        cp -r small/full copied
        rm -rf small/full/checkpoints/step-0000000[1-9]
        {sys.executable} -m distmeta.cli.main train --resume small/full run.steps=9 >/dev/null 2>&1; echo resumed $?
        exit $code
    """
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "--user", "sh", "-c", script],
        capture_output=True, text=True, timeout=300, env=ENVIRONMENT,
    )  # fmt: skip
    if done.returncode in (77, 127) or "unshare" in done.stderr:
        pytest.skip(f"no file system of its own to fill: {done.stderr.strip()[:200]}")
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert "make room, then distmeta train --resume small/full" in done.stdout
    assert "No space left on device" in done.stdout
    checkpoint = checkpoints.load(workplace / "copied")
    assert checkpoint.progress.step > 3
    assert not list((workplace / "copied" / "checkpoints").glob(".writing-step*"))
    assert "resumed 0" in done.stdout


def test_a_killed_driver_leaves_nothing_behind_and_is_resumed(workplace: Path) -> None:
    """With workers of every kind: one at work, one that was stopped and cannot end by itself.

    A Ray of the run's own, as a user has it who has set nothing: it asks for a token and listens on loopback.
    """
    job = tree("maml", run={"steps": 100_000, "workers": 2, "name": "killed", "checkpoint_every": 3})
    (workplace / "job.yaml").write_text(yaml.safe_dump(job))
    line = [sys.executable, "-m", "distmeta.cli.main", "train", "job.yaml"]
    nothing_set = {key: value for key, value in ENVIRONMENT.items() if not key.startswith("RAY_AUTH_")}
    with (workplace / "said").open("w") as said:
        process = subprocess.Popen(line, stdout=said, stderr=said, env=nothing_set, start_new_session=True)
    run = workplace / "runs" / "killed"
    deadline = time.monotonic() + 180
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 7:
        assert process.poll() is None, (workplace / "said").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = descendants(process.pid)
    workers, shared = worker_pids(process.pid), shared_files(family)
    assert len(workers) == 2
    assert any("RAY_AUTH_MODE=token" in environment(pid) for pid in family)
    listeners = listening([process.pid, *family])
    assert len(listeners) > 4, "a raylet, its agents, the control store"
    assert {address.rpartition(":")[0] for address in listeners} <= {"127.0.0.1", "::1"}
    for text in ((workplace / "said").read_text(), (run / "job.yaml").read_text()):
        assert not re.search("RAY_AUTH_TOKEN|[0-9a-f]{64}", text)
    send(workers[:1], signal.SIGSTOP)
    send([process.pid], signal.SIGKILL)
    process.wait(30)
    left = gone(family, 30)
    assert not left, [words(pid) for pid in left]
    assert not [path for path in shared if path.exists()]

    step = checkpoints.load(run).progress.step + 4
    distmeta.train(Job.load(run / "job.yaml", [f"run.steps={step}", "run.workers=0"]), resume=run)
    alone = distmeta.train(Job.parse(tree("maml", run={"steps": step}))).run
    theta, expected = checkpoints.load(run).theta, checkpoints.load(alone).theta
    assert all(theta[name].equal(expected[name]) for name in expected)
    rows = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, step + 1))
