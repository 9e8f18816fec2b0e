"""Ctrl-C and SIGTERM in real processes: the run is saved, exits with 130, and a resume gives the same theta."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tree
from support.outcomes import read_theta
from support.processes import ENVIRONMENT

import distmeta
from distmeta.config.job import Job
from distmeta.runtime import checkpoint as checkpoints


def start(job: dict[str, Any], *words: str) -> subprocess.Popen[str]:
    """Start `distmeta train` in a new process group, as a shell does."""
    Path("job.yaml").write_text(yaml.safe_dump(job))
    return subprocess.Popen(
        [sys.executable, "-m", "distmeta.cli.main", "train", "job.yaml", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=ENVIRONMENT,
    )


def wait_for(path: Path, lines: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not get going"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("workers", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT)], ids=["in-process", "ray"]
)
def test_interrupted_run_is_saved_and_resumed(workers: int, number: signal.Signals, workplace: Path) -> None:
    job = tree("maml", run={"steps": 100_000, "name": "long", "workers": workers})
    process = start(job)
    run = workplace / "runs" / "long"
    wait_for(run / "metrics.jsonl", 5, process)
    os.killpg(process.pid, number)  # the whole group, as a terminal does: Ray's processes must not mind
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "distmeta train --resume runs/long" in err
    assert "Traceback" not in err + out
    step = checkpoints.load(run).progress.step
    assert step == len((run / "metrics.jsonl").read_text().splitlines()) >= 5
    distmeta.train(Job.load(run / "job.yaml", [f"run.steps={step + 3}", "run.workers=0"]), resume=run)
    uninterrupted = distmeta.train(Job.parse(tree("maml", run={"steps": step + 3}))).run
    assert read_theta(run) == read_theta(uninterrupted)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, step + 4))


def test_second_signal_exits_at_once(workplace: Path) -> None:
    job = tree("maml", tasks={"type": "hard_cases:SlowTasks", "seconds": 60.0}, run={"name": "slow"})
    process = start(job)
    wait_for(workplace / "runs" / "slow" / "checkpoints" / "latest", 1, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "the first signal waits for the shard in flight"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
