"""A run's data stay the same: in its process, in its workers, and on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tree
from outcomes import outcome, trained

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime import training as driver
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.problem import build
from distmeta.runtime.worker import Worker, WorkerSpec
from distmeta.tasks.image_preparation import Preparation
from distmeta.tasks.store import write_store

TASKS = {"type": "arrow", "path": "store.arrow", "ways": 3, "shots": 1, "queries": 2, "test": 3, "val": 3}
JOB = tree("maml", tasks=TASKS, run={"name": "changed"})


def store(seed: int = 0) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (60, 1, 8, 8), dtype=np.uint8)
    classes = [f"c{i}" for i in range(12)]
    write_store("store.arrow", images, classes, [""] * 12, [5] * 12, Preparation(size=8))


def test_a_store_that_changes_while_it_is_used(workplace: Path) -> None:
    store()

    class Changes(driver.Silent):
        def step(self, record: Any) -> None:
            if record["step"] == 3:
                data = Path("store.arrow").read_bytes()
                with open("store.arrow", "r+b") as file:
                    file.write(data[: len(data) // 2])
                    file.truncate()

    with pytest.raises(InputError, match=r"^tasks.path: .*changed on disk while it was in use"):
        distmeta.train(Job.parse(JOB), reporter=Changes())
    assert checkpoints.load(workplace / "runs" / "changed").progress.step == 3


def test_a_resume_with_another_store_is_refused(workplace: Path) -> None:
    store()
    calm = outcome(trained(JOB, steps=6))
    run = trained(JOB, name="begun", steps=3)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    store(1)
    with pytest.raises(
        InputError, match=r"^tasks: got data with the fingerprint .*, with which the run began"
    ):
        trained(JOB, resume=run, steps=6)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    store()  # another file, with the same in it
    trained(JOB, resume=run, steps=6)
    assert outcome(run) == calm


def test_a_worker_with_another_store_is_refused(workplace: Path) -> None:
    store()
    problem = build(Job.parse(JOB))
    layout = ParameterServer(problem.init(), problem.job.outer).layout
    spec = WorkerSpec.of(problem, layout)
    Worker(spec)
    store(1)
    with pytest.raises(
        InputError, match=r"^tasks: got data with the fingerprint [0-9a-f]{64} on .*, expected"
    ):
        Worker(spec)
