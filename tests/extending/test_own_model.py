"""A user's own model is a `torch.nn.Module` in one file outside the package. The job names it as `module:Class`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tree
from safetensors.torch import load_file

import distmeta

FOURIER = '''
"""Regression on fixed Fourier features."""

import torch
from torch import nn


class FourierNet(nn.Module):
    """x [N, D] -> [N, out_features]."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int, frequencies: int = 16, hidden: int = 32):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(in_shape[0], frequencies))
        self.body = nn.Sequential(nn.Linear(2 * frequencies, hidden), nn.Tanh())
        self.head = nn.Linear(hidden, out_features)

    def forward(self, x):
        angles = x @ self.frequencies
        return self.head(self.body(torch.cat([angles.sin(), angles.cos()], -1)))
'''


@pytest.mark.parametrize("algorithm", ["maml", "anil"])
def test_own_model_trains_and_evaluates(workplace: Path, algorithm: str) -> None:
    module = f"fourier_{algorithm}"  # another name per test: Python imports a module only once
    (workplace / f"{module}.py").write_text(FOURIER)
    job = tree(
        algorithm,
        model={"type": f"{module}:FourierNet", "frequencies": 8},
        run={"steps": 2, "checkpoint_every": 1, "keep": 2, "eval_tasks": 8},
        output="runs",
    )

    run = distmeta.train(distmeta.Job.parse(job)).run
    scores = distmeta.evaluate(run)

    records = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    assert all(record["loss_after"] != record["loss_before"] for record in records)
    assert scores.figures["loss_after"] != scores.figures["loss_before"]
    first = load_file(Path(run, "checkpoints/step-00000001/theta.safetensors"))
    second = load_file(Path(run, "checkpoints/step-00000002/theta.safetensors"))
    assert set(first) == {
        "model.body.0.weight",
        "model.body.0.bias",
        "model.head.weight",
        "model.head.bias",
    }
    assert all(bool((first[name] != second[name]).any()) for name in first)
    constants = load_file(Path(run, "checkpoints/step-00000002/constants.safetensors"))
    assert constants["frequencies"].shape == torch.Size([1, 8])
