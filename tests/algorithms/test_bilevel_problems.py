"""The problems of `bilevel` and their tasks: weights find wrong labels, outliers are where they are said to be."""

from __future__ import annotations

import pytest
import torch

from distmeta.algorithms.bilevel_problems import Reweighting
from distmeta.seeding import task_ids
from distmeta.tasks.noisy_digits import NoisySinusoid
from distmeta.tasks.regression import Sinusoid
from distmeta.trees import tree_leaves


def test_outliers_are_only_in_the_support_targets() -> None:
    ids = task_ids(0, "train", 0, 200)
    noisy = NoisySinusoid(shots=20, queries=10, outliers=0.3, spread=15.0).draw("train", ids)
    plain = Sinusoid(shots=20, queries=10).draw("train", ids)
    assert torch.equal(noisy.support.x, plain.support.x)
    assert torch.equal(noisy.query.y, plain.query.y)
    error_TS = (noisy.support.y - plain.support.y)[..., 0]
    assert torch.equal(error_TS == 0, noisy.support.is_clean)
    assert float(noisy.support.is_clean.float().mean()) == pytest.approx(0.7, abs=0.03)
    assert 14 < float(error_TS.abs().max()) <= 15


def test_noisy_sinusoid_depends_only_on_its_id() -> None:
    ids = task_ids(0, "train", 0, 3)
    family = NoisySinusoid()
    together = family.draw("train", ids)
    alone = family.draw("train", ids[1:2])
    for a, b in zip(tree_leaves(together), tree_leaves(alone), strict=True):
        assert torch.equal(a[1], b[0])


def test_weights_start_equal_and_have_mean_one() -> None:
    unused = None
    problem = Reweighting(unused, unused)  # pyright: ignore[reportArgumentType]
    upper = problem.init_upper(torch.Generator().manual_seed(0))
    loss_N = torch.linspace(0, 5, 7)
    assert torch.equal(problem.weigh(upper, loss_N), torch.ones(7))
    falling = {"weight1": torch.ones(32), "bias1": torch.zeros(32), "weight2": -torch.ones(32)}
    weight_N = problem.weigh(falling, loss_N)
    assert float(weight_N.mean()) == pytest.approx(1.0)
    assert bool((weight_N.diff() < 0).all())
