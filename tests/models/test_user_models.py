"""Unusual models of users: running statistics, dropout, fused attention, integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tree

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.problem import build_problem
from distmeta.runtime.resolve import resolve


def build_job(**changes: Any) -> Job:
    return Job.parse(tree(**changes))


def test_running_statistics_are_an_error_with_a_remedy(workplace: Path) -> None:
    with pytest.raises(InputError, match=r"the forward pass changes '1.running_mean'.*use GroupNorm"):
        distmeta.train(build_job(model={"type": "hard_cases:RunningStatisticsNet"}))
    assert not list(workplace.iterdir())


def test_dropout_runs_in_the_loop_and_repeats_bit_by_bit(workplace: Path) -> None:
    small = build_job(
        model={"type": "hard_cases:DropoutNet"}, run={"steps": 3, "eval_every": 3, "eval_tasks": 4}
    )
    problem = resolve(build_problem(small))
    assert problem.execution.mode == problem.job.compute.execution == "loop"
    first = checkpoints.load(distmeta.train(small).run).theta
    second = checkpoints.load(distmeta.train(small).run).theta
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(InputError, match=r"compute.execution: got vmap for a job that draws random numbers"):
        resolve(build_problem(small.replace(compute={"execution": "vmap"})))


def test_dropout_with_collected_data_is_an_error(workplace: Path) -> None:
    job = tree("maml", model={"type": "hard_cases:DropoutNet"}, tasks={"type": "hard_cases:TwoArmedBandit"})
    with pytest.raises(
        InputError, match=r"model.type: hard_cases:DropoutNet has dropout, but data are collected"
    ):
        distmeta.train(Job.parse(job))


def test_fused_attention_trains_with_second_derivatives(workplace: Path) -> None:
    small = build_job(
        model={"type": "hard_cases:AttentionNet"},
        run={"steps": 3, "tasks_per_step": 4, "shards": 2},
        compute={"execution": "loop"},
    )
    summary = distmeta.train(small)
    stored = checkpoints.load(summary.run)
    start = checkpoints.load(summary.run / "checkpoints" / "step-00000000")
    assert summary.loss is not None
    assert np.isfinite(summary.loss)
    assert all(not torch.equal(stored.theta[name], start.theta[name]) for name in stored.theta)


def test_model_on_integers_trains_evaluates_and_adapts(workplace: Path) -> None:
    """Tokens reach the model as integers everywhere."""
    job = tree(
        "maml",
        model={"type": "hard_cases:TokenNet"},
        tasks={"type": "hard_cases:DigitSumTasks"},
        run={"eval_tasks": 5},
    )
    run = distmeta.train(Job.parse(job)).run
    assert distmeta.evaluate(run).figures["loss_after"] is not None
    adapted = distmeta.load(run).adapt([[1, 2, 3], [4, 5, 6]], [[0.2], [0.5]])
    assert adapted([[7, 8, 9]]).shape == (1, 1)
