"""mlp: layers and initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distmeta.models.mlp import MLP


@pytest.mark.parametrize(("hidden", "count"), [([], 1), ([7], 2), ([5, 6], 3)])
def test_mlp_layers(hidden: list[int], count: int) -> None:
    model = MLP((2, 3), 4, hidden=hidden, activation="tanh")
    assert model(torch.randn(9, 2, 3)).shape == (9, 4)
    linear = [m for m in model if isinstance(m, nn.Linear)]
    assert [m.in_features for m in linear] == [6, *hidden]
    assert len(linear) == count
    assert not isinstance(model[-1], nn.Tanh)


def test_mlp_may_start_as_in_the_papers_code() -> None:
    model = MLP((1,), 1, hidden=[200], init="normal")
    weights = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if n.endswith("weight")])
    assert float(weights.abs().max()) <= 0.02
    assert 0.007 < float(weights.std()) < 0.01
    assert all(not p.detach().any() for n, p in model.named_parameters() if n.endswith("bias"))
