"""A user's own algorithm is one file outside the package. The job names it as `module:Class`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import tree
from safetensors.torch import load_file

import distmeta
from distmeta.errors import InputError

LEARNED_RATE = '''
"""MAML with one learned inner rate."""

import torch


class LearnedRate:
    """φ_{k+1} = φ_k − exp(ρ) ∇L_support(φ_k), where ρ is part of theta."""

    group_size = 1  # tasks that one loss needs together

    def __init__(self, model, score, inner_lr: float = 0.01, inner_steps: int = 1):
        self.model = model
        self.score = score
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps

    def init(self, generator):
        return self.model.init(generator) | {"log_rate": torch.tensor(self.inner_lr).log()}

    def begin(self, theta, support):
        return self.model.begin(theta, support)

    def step(self, theta, phi, support, k):
        def support_loss(phi):
            loss, _ = self.score(self.model(phi, support.x), support)
            return loss

        gradient = torch.func.grad(support_loss)(phi)
        return {name: phi[name] - theta["log_rate"].exp() * gradient[name] for name in phi}

    def predict(self, theta, phi, x):
        return self.model(phi, x)
'''


@pytest.mark.parametrize("execution", ["loop", "vmap"])
def test_own_algorithm_trains_and_evaluates(workplace: Path, execution: str) -> None:
    module = f"learned_rate_{execution}"  # another name per test: Python imports a module only once
    (workplace / f"{module}.py").write_text(LEARNED_RATE)
    job = tree(
        {"type": f"{module}:LearnedRate", "inner_lr": 0.05, "inner_steps": 2},
        run={"steps": 2, "checkpoint_every": 1, "keep": 2, "eval_tasks": 8},
        compute={"execution": execution},
        output="runs",
    )

    run = distmeta.train(distmeta.Job.parse(job)).run
    scores = distmeta.evaluate(run)

    records = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    assert all(record["loss_after"] != record["loss_before"] for record in records)
    assert scores.figures["loss_after"] != scores.figures["loss_before"]
    first = load_file(Path(run, "checkpoints/step-00000001/theta.safetensors"))
    second = load_file(Path(run, "checkpoints/step-00000002/theta.safetensors"))
    assert all(bool((first[name] != second[name]).any()) for name in first)


def test_wrong_option_of_own_algorithm_is_an_error(workplace: Path) -> None:
    (workplace / "learned_rate_options.py").write_text(LEARNED_RATE)
    job = tree({"type": "learned_rate_options:LearnedRate", "inner_step": 2})
    with pytest.raises(InputError, match=r"algorithm\.inner_step.*did you mean 'inner_steps'"):
        distmeta.Job.parse(job)
