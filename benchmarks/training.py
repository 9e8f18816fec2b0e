"""Helpers of the accuracy benchmarks: train a job as a user would, score unseen tasks, nearest neighbour."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import distmeta
from distmeta.compute.vectors import Layout
from distmeta.config.job import Job
from distmeta.protocols import Theta
from distmeta.runtime.problem import Problem
from distmeta.runtime.reporter import SilentReporter
from distmeta.runtime.scores import evaluate_tasks
from distmeta.runtime.worker import LocalPool
from distmeta.seeding import task_ids


class StepTimes(SilentReporter):
    """A reporter that prints the loss every 100 steps and keeps the time of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []
        """Processor time of this process. Other work on the machine hardly changes it."""
        self._processor_before = time.process_time()

    def step(self, record: Mapping[str, Any]) -> None:
        now = time.process_time()
        self.seconds.append(record["seconds_step"])
        self.processor_seconds.append(now - self._processor_before)
        self._processor_before = now
        if record["step"] % 100 == 0:
            note(f"  step {record['step']}: loss {record['loss_after']:.4f}")


def note(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def train_job(job: Job, times: StepTimes | None = None) -> tuple[Problem, Theta, float]:
    """Train with `distmeta.train`. Return the problem, the last theta and the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        tree = job.to_dict() | {"output": folder, "tracking": {"type": "none"}}
        quiet = Job.parse(tree).replace(run={"eval_every": 0, "checkpoint_every": 0})
        started = time.perf_counter()
        run = distmeta.train(quiet, reporter=times or StepTimes()).run
        seconds = time.perf_counter() - started
        learner = distmeta.load(run)
    return learner.problem, learner.theta, seconds


def score_tasks(
    problem: Problem, theta: Theta, metric: str, split: str, tasks: int, steps: int
) -> np.ndarray:
    """Return the metric of each task after 0 … `steps` inner steps, [tasks, steps + 1]."""
    layout = Layout.from_theta(theta)
    pool = LocalPool(problem, layout)
    results = evaluate_tasks(problem, pool, layout.flatten(theta), split, tasks, lambda: None, steps)
    return np.concatenate([result.metrics[f"{metric}_curve"] for result in results])


def score_nearest_neighbour(problem: Problem, tasks: int) -> np.ndarray:
    """Return each test task's accuracy with the label of the nearest support image (Euclidean, raw pixels)."""
    episodes: Any = problem.family.draw("test", task_ids(problem.job.seed, "test", 0, tasks))
    support = episodes.support
    query = episodes.query
    nearest_TQ = torch.cdist(query.x.flatten(2), support.x.flatten(2)).argmin(-1)
    return (support.y.gather(1, nearest_TQ) == query.y).double().mean(1).numpy()


def relative_distance(theta: Theta, reference: Theta) -> float:
    """Return ‖θ − r‖ / ‖r‖ over all parameters."""
    squares = [float((theta[name].double() - value).square().sum()) for name, value in reference.items()]
    norm = sum(float(value.double().square().sum()) for value in reference.values())
    return math.sqrt(sum(squares) / norm)
