"""RL²: compared with torch.nn.GRU; acting step by step equals predicting the whole trajectory."""

from __future__ import annotations

import pytest
import torch
from conftest import tree
from torch import nn

from distmeta.algorithms.rl2 import RL2
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.protocols import Theta
from distmeta.runtime.problem import build_problem


def build_parts() -> tuple[RL2, Theta, torch.Tensor]:
    problem = build_problem(Job.parse(tree("rl2", model={"type": "mlp", "hidden": []})))
    generator = torch.Generator().manual_seed(1)
    theta = {k: v + 0.3 * torch.randn(v.shape, generator=generator) for k, v in problem.init().items()}
    assert isinstance(problem.algorithm, RL2)
    return problem.algorithm, theta, torch.randn(4, 7, *problem.family.in_shape, generator=generator)


def test_recurrent_unit_equals_torch_gru() -> None:
    algorithm, theta, x = build_parts()
    gru = nn.GRU(x.shape[-1], algorithm.memory, batch_first=True)
    bias = torch.zeros(3 * algorithm.memory)
    bias[-algorithm.memory :] = theta["rl2.recurrent_bias"]
    with torch.no_grad():
        gru.weight_ih_l0.copy_(theta["rl2.input"].T)
        gru.weight_hh_l0.copy_(theta["rl2.recurrent"].T)
        gru.bias_ih_l0.copy_(theta["rl2.input_bias"])
        gru.bias_hh_l0.copy_(bias)
        hidden, _ = gru(x, theta["rl2.start"].expand(1, 4, -1).contiguous())
        expected = hidden @ theta["rl2.out"] + theta["rl2.out_bias"]
        torch.testing.assert_close(algorithm.predict(theta, algorithm.begin(theta, None), x), expected)


def test_acting_step_by_step_equals_predicting_at_once() -> None:
    algorithm, theta, x = build_parts()
    state = algorithm.begin(theta, None)
    acted = []
    for t in range(x.shape[1]):
        outputs, state = algorithm.act(theta, state, x[:, t])
        acted.append(outputs)
    whole = algorithm.predict(theta, algorithm.begin(theta, None), x)
    torch.testing.assert_close(torch.stack(acted, 1), whole)


def test_inputs_that_are_no_trajectories_are_an_error() -> None:
    algorithm, theta, x = build_parts()
    with pytest.raises(InputError, match=r"rl2 for inputs of shape \[4, 6\]"):
        algorithm.predict(theta, algorithm.begin(theta, None), x[:, 0])
