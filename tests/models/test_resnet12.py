"""resnet12: shapes, parameters, dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tree
from torch import nn

import distmeta
from distmeta.config.job import Job
from distmeta.models.resnet12 import ResNet12
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.problem import build_problem


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("shape", [(3, 84, 84), (1, 28, 28), (1, 1, 5)])
def test_resnet12_shapes(norm: Any, shape: tuple[int, ...]) -> None:
    model = ResNet12(shape, 5, widths=[4, 6, 8, 10], norm=norm)
    x = torch.randn(2, *shape)
    assert model(x).shape == (2, 5)
    assert model.features(x).shape == (2, 10)
    assert model.blocks(x).shape[2:] == tuple(
        max(side // 16, 1) if min(shape[1:]) > 1 else side for side in shape[1:]
    )
    assert len([m for m in model.modules() if isinstance(m, nn.Conv2d)]) == 4 * 4
    assert not list(model.buffers())


def test_resnet12_has_as_many_parameters_as_in_the_paper() -> None:
    """MetaOptNet's has 12.4 million parameters without the head."""
    model = ResNet12((3, 84, 84), 5)
    assert sum(p.numel() for p in model.blocks.parameters()) == 12_424_320
    assert model.head.in_features == 640


def test_resnet12_with_dropout_trains_with_second_derivatives_and_repeats(workplace: Path) -> None:
    model = {"type": "resnet12", "widths": [2, 2, 3, 4], "dropout": 0.2}
    tasks = {"type": "digits", "ways": 3, "shots": 1, "queries": 2}
    small = tree("maml", model=model, tasks=tasks, run={"steps": 2, "tasks_per_step": 4})
    first = checkpoints.load(distmeta.train(Job.parse(small)).run).theta
    second = checkpoints.load(distmeta.train(Job.parse(small)).run).theta
    start = build_problem(Job.parse(small)).init()
    assert all(first[name].equal(second[name]) for name in first)
    assert any(not first[name].equal(start[name]) for name in first)
