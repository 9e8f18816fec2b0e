"""conv4: shapes, features and norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tree
from torch import nn

from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.models.conv4 import Conv4
from distmeta.runtime.problem import build_problem


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
@pytest.mark.parametrize("pool", ["max", "stride"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 8), (1, 1, 5)])
def test_conv4_shapes(norm: Any, pool: Any, shape: tuple[int, ...]) -> None:
    model = Conv4(shape, 5, width=8, norm=norm, pool=pool)
    x = torch.randn(6, *shape)
    assert model(x).shape == (6, 5)
    assert model.features(x).shape == (6, model.head.in_features)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [8] * 4
    assert all((c.bias is not None) == (norm == "none") for c in convolutions)
    assert {c.stride for c in convolutions} == {(1, 1) if pool == "max" else (2, 2)}
    assert not list(model.buffers())


def test_conv4_has_as_many_features_as_in_the_papers() -> None:
    assert Conv4((1, 28, 28), 5).head.in_features == 64
    assert Conv4((3, 84, 84), 5, width=32).head.in_features == 32 * 5 * 5
    assert Conv4((3, 84, 84), 5, width=32, pool="stride").head.in_features == 32


def test_conv4_may_keep_the_map_as_features() -> None:
    maps = Conv4((1, 28, 28), 5, width=[4, 6, 8, 10], pool="stride", halvings=3, average=False)
    assert maps.head.in_features == 10 * 4 * 4
    assert [m.out_channels for m in maps.modules() if isinstance(m, nn.Conv2d)] == [4, 6, 8, 10]
    x = torch.rand(3, 1, 28, 28)
    assert maps.features(x).shape == (3, 160)
    assert Conv4((1, 28, 28), 5, width=8, halvings=3).features(x).shape == (3, 8 * 3 * 3)
    assert Conv4((1, 28, 28), 5, width=8, average=True, halvings=0).features(x).shape == (3, 8)


def test_batch_norm_has_no_running_statistics() -> None:
    model = Conv4((1, 8, 8), 3, width=4)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 4
    assert not any(m.track_running_stats for m in norms)
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(model.train()(x), model.eval()(x))


@pytest.mark.parametrize("width", [1, 9, 17, 34, 64])
def test_group_norm_works_with_any_width(width: int) -> None:
    assert Conv4((1, 8, 8), 5, width=width, norm="group")(torch.rand(3, 1, 8, 8)).shape == (3, 5)


def test_conv4_without_images_is_an_error() -> None:
    with pytest.raises(
        InputError, match=r"model.type: got conv4 for inputs of shape \(1,\), expected images"
    ):
        build_problem(Job.parse(tree(model={"type": "conv4"})))
