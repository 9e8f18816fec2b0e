"""A user's own strategy is one file outside the package. The job names it as `module:Class`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import tree
from safetensors.torch import load_file

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError

MEDIAN = '''
"""Combine the shards by the median of each number instead of the mean, so that one bad shard cannot do harm."""

import numpy as np

from distmeta.errors import InputError
from distmeta.runtime.parameter_server import is_finite
from distmeta.runtime.pool import open_pool
from distmeta.runtime.strategy import build_server
from distmeta.strategies.driver import CentralStep


class MedianStrategy(CentralStep):
    requires_workers = False
    equals_driver = False

    def __init__(self, problem, outer, state, report, scale: float = 1.0):
        super().__init__(build_server(problem, outer, state))
        self.scale = scale
        self.pool = open_pool(problem, self.server.layout, report)

    @staticmethod
    def check_job(job, options):
        if job.run.shards is not None and job.run.shards < 3:
            raise InputError(f"run.shards: got {job.run.shards}, expected at least 3 for a median")

    def compute_shards(self, shards, check):
        return self.pool.map(self.flat_for(shards), shards, check)

    def average(self, results, tasks):
        means = [result.gradient / result.tasks for result in results if result.tasks]
        self.mean = np.float32(self.scale) * np.median(means, axis=0).astype(np.float32)
        return is_finite(self.mean)
'''


@pytest.fixture
def own_strategy(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (workplace / "robust.py").write_text(MEDIAN)
    monkeypatch.setattr(sys, "path", [str(workplace), *sys.path])
    yield workplace
    sys.modules.pop("robust", None)


def train(strategy: str, **run: object) -> Path:
    job = Job.parse(tree("maml", strategy={"type": strategy}, run=run))
    return distmeta.train(job).run


def read_theta(folder: Path, step: int) -> np.ndarray:
    theta = load_file(folder / "checkpoints" / f"step-{step:08d}" / "theta.safetensors")
    return np.concatenate([value.numpy().ravel() for value in theta.values()])


def test_own_strategy_trains_resumes_and_evaluates(own_strategy: Path) -> None:
    folder = train("robust:MedianStrategy", steps=4, name="whole")
    begun = train("robust:MedianStrategy", steps=2, name="parts")
    job = Job.parse(
        tree("maml", strategy={"type": "robust:MedianStrategy"}, run={"steps": 4, "name": "parts"})
    )
    resumed = distmeta.train(job, resume=begun).run
    np.testing.assert_array_equal(read_theta(folder, 4), read_theta(resumed, 4))
    assert not np.array_equal(read_theta(folder, 4), read_theta(train("driver", steps=4), 4))
    figures = distmeta.evaluate(folder, ["run.eval_tasks=4"]).figures
    assert figures["loss_after"] is not None


def test_own_strategy_checks_its_options_and_the_job(own_strategy: Path) -> None:
    with pytest.raises(InputError, match=r"^strategy.scale: got 'x', expected number"):
        Job.parse(tree("maml", strategy={"type": "robust:MedianStrategy", "scale": "x"}))
    with pytest.raises(InputError, match=r"^run.shards: got 2, expected at least 3 for a median"):
        Job.parse(tree("maml", strategy={"type": "robust:MedianStrategy"}, run={"shards": 2}))
