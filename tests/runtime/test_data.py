"""The tasks' data must stay the same: during a run, on its workers, and on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tree
from support.outcomes import read_outcome, train_job

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.problem import build_problem
from distmeta.runtime.reporter import SilentReporter
from distmeta.runtime.shards import WorkerSpec
from distmeta.runtime.worker import Worker
from distmeta.tasks.image_preparation import Preparation
from distmeta.tasks.store import write_store

TASKS = {"type": "arrow", "path": "store.arrow", "ways": 3, "shots": 1, "queries": 2, "test": 3, "val": 3}
JOB = tree("maml", tasks=TASKS, run={"name": "changed"})


def make_store(seed: int = 0) -> None:
    """Write store.arrow; another seed gives other images."""
    images = np.random.default_rng(seed).integers(0, 256, (60, 1, 8, 8), dtype=np.uint8)
    classes = [f"c{i}" for i in range(12)]
    write_store("store.arrow", images, classes, [""] * 12, [5] * 12, Preparation(size=8))


def test_store_that_changes_during_a_run_stops_it(workplace: Path) -> None:
    make_store()

    class StoreTruncater(SilentReporter):
        def step(self, record: Any) -> None:
            if record["step"] == 3:
                data = Path("store.arrow").read_bytes()
                with open("store.arrow", "r+b") as file:
                    file.write(data[: len(data) // 2])
                    file.truncate()

    with pytest.raises(InputError, match=r"^tasks.path: .*changed on disk while it was in use"):
        distmeta.train(Job.parse(JOB), reporter=StoreTruncater())
    assert checkpoints.load(workplace / "runs" / "changed").progress.step == 3


def test_resume_with_another_store_is_refused(workplace: Path) -> None:
    make_store()
    expected = read_outcome(train_job(JOB, steps=6))
    run = train_job(JOB, name="begun", steps=3)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    make_store(seed=1)
    message = r"^tasks: got data with the fingerprint .*, with which the run began"
    with pytest.raises(InputError, match=message):
        train_job(JOB, resume=run, steps=6)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    make_store()  # another file with the same content
    train_job(JOB, resume=run, steps=6)
    assert read_outcome(run) == expected


def test_worker_with_another_store_is_refused(workplace: Path) -> None:
    make_store()
    problem = build_problem(Job.parse(JOB))
    layout = ParameterServer(problem.init(), problem.job.outer).layout
    spec = WorkerSpec.from_problem(problem, layout)
    Worker.from_spec(spec)
    make_store(seed=1)
    message = r"^tasks: got data with the fingerprint [0-9a-f]{64} on .*, expected"
    with pytest.raises(InputError, match=message):
        Worker.from_spec(spec)
