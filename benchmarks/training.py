"""What the accuracy benchmarks share: a training as a user starts it, the scores of unseen tasks, nearest neighbour."""

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
from distmeta.runtime.pool import LocalPool
from distmeta.runtime.problem import Problem
from distmeta.runtime.scores import evaluate_tasks
from distmeta.runtime.training import Silent
from distmeta.seeding import task_ids


class Progress(Silent):
    """Says now and then how far a training is, and keeps how long each step took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.processor: list[float] = []
        """Seconds of this process's processor alone: what others on the machine do hardly counts."""
        self._before = time.process_time()

    def step(self, record: Mapping[str, Any]) -> None:
        now = time.process_time()
        self.seconds.append(record["seconds_step"])
        self.processor.append(now - self._before)
        self._before = now
        if record["step"] % 100 == 0:
            said(f"  step {record['step']}: loss {record['loss_after']:.4f}")


def said(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def trained(job: Job, progress: Progress | None = None) -> tuple[Problem, Theta, float]:
    """distmeta's training, as a user starts it: the problem, the last theta, the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        tree = job.tree() | {"output": folder, "tracking": {"type": "none"}}
        quiet = Job.parse(tree).replace(run={"eval_every": 0, "checkpoint_every": 0})
        started = time.perf_counter()
        run = distmeta.train(quiet, reporter=progress or Progress()).run
        seconds = time.perf_counter() - started
        learner = distmeta.load(run)
    return learner.problem, learner.theta, seconds


def scores(problem: Problem, theta: Theta, metric: str, split: str, tasks: int, steps: int) -> np.ndarray:
    """The metric of each task after 0 … `steps` inner steps, [tasks, steps + 1], by distmeta's evaluation."""
    layout = Layout.of(theta)
    pool = LocalPool(problem, layout)
    flat = layout.flatten(theta)
    results = evaluate_tasks(problem, pool, flat, split, tasks, lambda: None, steps)
    return np.concatenate([result.metrics[f"{metric}_curve"] for result in results])


def nearest_neighbour(problem: Problem, tasks: int) -> np.ndarray:
    """Accuracy of each test task by the label of the nearest support image (Euclidean, raw pixels)."""
    support, query = problem.family.draw("test", task_ids(problem.job.seed, "test", 0, tasks))
    nearest_TQ = torch.cdist(query.x.flatten(2), support.x.flatten(2)).argmin(-1)
    return (support.y.gather(1, nearest_TQ) == query.y).double().mean(1).numpy()


def overlap(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    """Whether two intervals do."""
    return abs(a["mean"] - b["mean"]) <= a["ci95"] + b["ci95"]


def distance(theta: Theta, reference: Theta) -> float:
    """‖θ − r‖ / ‖r‖."""
    squares = [float((theta[name] - value).square().sum()) for name, value in reference.items()]
    return math.sqrt(sum(squares) / sum(float(v.square().sum()) for v in reference.values()))
