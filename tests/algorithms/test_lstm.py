"""The LSTM meta-learner: fixed gates, one step by hand, the paper's meta-gradient, the preprocessing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import CLASSES, tree

from distmeta.algorithms.lstm import LSTMMetaLearner, flatten, preprocess, unflatten, update
from distmeta.compute.execution import Execution, shard_gradient
from distmeta.compute.gradient import unroll
from distmeta.config.job import Job
from distmeta.protocols import Batch, Episode, Theta
from distmeta.runtime.problem import Problem, build_problem, with_score
from distmeta.seeding import task_ids
from distmeta.tasks.few_shot import ClassificationScore
from distmeta.trees import tree_map

LOOP = Execution("loop", 1)


def build_setting(algorithm: dict[str, Any], **changes: Any) -> tuple[Problem, Theta, Episode]:
    """Build a problem, its theta and the episode of one task, in float64."""
    problem = build_problem(Job.parse(tree({"type": "lstm"} | algorithm, **changes)))
    theta = {name: value.double() for name, value in problem.init().items()}
    problem.model.to(dtype=torch.float64)
    episode = tree_map(lambda leaf: leaf[0], problem.family.draw("train", task_ids(0, "train", 0, 1)))
    episode = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, episode)
    return problem, theta, episode


def meta_gradient(problem: Problem, theta: Theta, episode: Episode) -> Theta:
    one = tree_map(lambda leaf: leaf[None], episode)
    ids = task_ids(0, "train", 0, 1)
    return shard_gradient(problem.algorithm, problem.score("train"), theta, one, ids, LOOP).gradient


@pytest.mark.parametrize("changes", [{}, CLASSES], ids=["regression", "classes"])
def test_fixed_gates_equal_gradient_descent(changes: dict[str, Any]) -> None:
    """f = 1 and i = α, whatever the first layer computes."""
    problem, theta, (support, _) = build_setting({"inner_steps": 4}, **changes)
    rate = 0.1
    theta |= {
        "lstm.forget.weight": torch.zeros_like(theta["lstm.forget.weight"]),
        "lstm.input.weight": torch.zeros_like(theta["lstm.input.weight"]),
        "lstm.forget.bias": torch.tensor([50.0], dtype=torch.float64),
        "lstm.input.bias": torch.tensor([math.log(rate / (1 - rate))], dtype=torch.float64),
    }
    phi = {name: value for name, value in theta.items() if name.startswith("model.")}
    for _ in range(4):
        leaves = {name: value.detach().requires_grad_() for name, value in phi.items()}
        loss = problem.score("train")(problem.model(leaves, support.x), support)[0]
        parts = torch.autograd.grad(loss, list(leaves.values()))
        phi = {name: phi[name] - rate * part for name, part in zip(phi, parts, strict=True)}
    state = unroll(problem.algorithm, theta, support)
    for name, value in phi.items():
        torch.testing.assert_close(state.phi[name], value, rtol=1e-12, atol=1e-14)


def test_theta_starts_near_gradient_descent() -> None:
    _, theta, _ = build_setting({})
    assert 4 <= float(theta["lstm.forget.bias"]) <= 5
    assert -5 <= float(theta["lstm.input.bias"]) <= -4
    assert max(float(theta[f"lstm.{name}"].abs().max()) for name in ("weight", "bias")) <= 0.01


def test_steps_match_computation_by_hand() -> None:
    """The first layer is compared with torch.nn.LSTMCell, the second with the paper's formulas, for one coordinate."""
    problem, theta, (support, _) = build_setting({"hidden": 3}, model={"type": "mlp", "hidden": [2]})
    algorithm = problem.algorithm
    generator = torch.Generator().manual_seed(0)
    for name in theta:  # gates far from saturation
        if name.startswith("lstm."):
            theta[name] = torch.randn(theta[name].shape, generator=generator, dtype=torch.float64)
    cell = torch.nn.LSTMCell(4, 3, dtype=torch.float64)
    with (
        torch.no_grad()
    ):  # our order is input, forget, output, candidate; torch's is input, forget, candidate, output
        weight = torch.cat([theta["lstm.weight"].chunk(4, -1)[i] for i in (0, 1, 3, 2)], -1)
        bias = torch.cat([theta["lstm.bias"].chunk(4, -1)[i] for i in (0, 1, 3, 2)], -1)
        cell.weight_ih.copy_(weight[:4].T)
        cell.weight_hh.copy_(weight[4:].T)
        cell.bias_ih.copy_(bias)
        cell.bias_hh.zero_()
    state = algorithm.begin(theta, support)
    h = s = torch.zeros(3, dtype=torch.float64)
    f = i = torch.zeros((), dtype=torch.float64)
    n = 2  # a coordinate
    for k in range(3):
        loss = problem.score("train")(problem.model(state.phi, support.x), support)[0]
        gradient = torch.func.grad(lambda p: problem.score("train")(problem.model(p, support.x), support)[0])(
            state.phi
        )
        c = flatten(state.phi)[n]
        g = flatten(gradient)[n]
        h, s = cell(torch.cat([preprocess(loss), preprocess(g)]), (h, s))
        f = torch.sigmoid(
            torch.stack([*h, c, f]) @ theta["lstm.forget.weight"][:, 0] + theta["lstm.forget.bias"][0]
        )
        i = torch.sigmoid(
            torch.stack([*h, c, i]) @ theta["lstm.input.weight"][:, 0] + theta["lstm.input.bias"][0]
        )
        state = algorithm.step(theta, state, support, k)
        torch.testing.assert_close(flatten(state.phi)[n], f * c - i * g, rtol=1e-12, atol=1e-14)


def replay(
    problem: Problem, theta: Theta, episode: Episode, recorded: list[tuple[Theta, torch.Tensor]]
) -> float:
    """Return the query loss of theta's cells and gates for given gradients and losses."""
    state = problem.algorithm.begin(theta, episode.support)
    for gradient, loss in recorded:
        state = update(theta, state, gradient, loss)
    outputs = problem.algorithm.predict(theta, state, episode.query.x)
    loss, _ = problem.score("train")(outputs, episode.query)
    return float(loss.detach())


def record(problem: Problem, theta: Theta, episode: Episode) -> list[tuple[Theta, torch.Tensor]]:
    """Return the gradient and the loss of every inner step."""
    state = problem.algorithm.begin(theta, episode.support)
    rows = []
    for k in range(problem.algorithm.inner_steps):
        rows.append(
            torch.func.grad_and_value(
                lambda p: problem.score("train")(problem.model(p, episode.support.x), episode.support)[0]
            )(state.phi)
        )
        state = problem.algorithm.step(theta, state, episode.support, k)
    return rows


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("part", ["model.", "lstm."])
def test_meta_gradient_equals_finite_differences(first_order: bool, part: str) -> None:
    """With the recorded gradients and losses held constant (§3.3), or with everything differentiated."""
    problem, theta, episode = build_setting({"hidden": 4, "inner_steps": 3, "first_order": first_order})
    theta["lstm.input.bias"] = theta["lstm.input.bias"] + 3  # larger steps, for which the two differ
    generator = torch.Generator().manual_seed(0)
    direction = {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in theta.items()
        if name.startswith(part)
    }
    gradient = meta_gradient(problem, theta, episode)
    exact = sum(float((gradient[name] * direction[name]).sum()) for name in direction)
    recorded = record(problem, theta, episode)

    def loss(h: float) -> float:
        moved = theta | {name: theta[name] + h * direction[name] for name in direction}
        return replay(problem, moved, episode, recorded if first_order else record(problem, moved, episode))

    h = 1e-6  # log |∇| is curved
    assert (loss(h) - loss(-h)) / (2 * h) == pytest.approx(exact, rel=1e-6)


def test_first_order_changes_the_gradient() -> None:
    gradients = []
    for first_order in (True, False):
        problem, theta, episode = build_setting({"hidden": 4, "inner_steps": 3, "first_order": first_order})
        theta["lstm.input.bias"] = theta["lstm.input.bias"] + 3
        gradients.append(flatten(meta_gradient(problem, theta, episode)))
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) > 1e-3


def test_preprocessing_matches_computation_by_hand() -> None:
    x = torch.tensor(
        [1.0, -(math.e**-3), 0.0, math.e**-12, -(math.e**-11), math.e**-10, -20.0], dtype=torch.float64
    )
    expected = [
        (0.0, 1.0),
        (-0.3, -1.0),
        (-1.0, 0.0),
        (-1.0, math.e**-2),
        (-1.0, -(math.e**-1)),
        (-1.0, 1.0),  # both branches meet here
        (math.log(20) / 10, -1.0),
    ]
    torch.testing.assert_close(
        preprocess(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14
    )
    assert preprocess(x[0]).shape == (2,)
    assert torch.isfinite(torch.func.jacrev(preprocess)(x)).all()
    assert preprocess(torch.tensor([torch.nan])).isnan().any()


def test_unflatten_reverses_flatten() -> None:
    phi = {"a": torch.randn(2, 3), "b": torch.randn(4), "c": torch.randn(())}
    for name, value in unflatten(flatten(phi), phi).items():
        assert torch.equal(value, phi[name])


def test_state_starts_at_zero_in_every_task() -> None:
    problem, theta, (support, _) = build_setting({"inner_steps": 2})
    again = unroll(problem.algorithm, theta, support)
    unroll(problem.algorithm, theta, Batch(support.x + 1, support.y - 1))
    after = unroll(problem.algorithm, theta, support)
    assert all(torch.equal(again.phi[name], after.phi[name]) for name in again.phi)
    assert not any(bool(part.any()) for part in problem.algorithm.begin(theta, support)[1:])


def test_padding_is_ignored() -> None:
    problem, theta, (support, query) = build_setting({"inner_steps": 2}, **CLASSES)
    assert isinstance(problem.algorithm, LSTMMetaLearner)
    filled = Batch(torch.cat([support.x, support.x[:2]]), torch.cat([support.y, torch.full((2,), -1)]))
    outputs = [
        problem.algorithm.predict(theta, unroll(problem.algorithm, theta, rows), query.x)
        for rows in (support, filled)
    ]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-14)


def test_step_uses_its_minibatch() -> None:
    problem, theta, (support, _) = build_setting({"inner_steps": 2, "inner_batch": 2})
    state = problem.algorithm.begin(theta, support)
    rows = Batch(support.x[2:4], support.y[2:4])
    whole = build_setting({"inner_steps": 2})[0].algorithm
    ours = problem.algorithm.step(theta, state, support, 1)
    theirs = whole.step(theta, state, rows, 0)
    assert all(torch.equal(ours.phi[name], theirs.phi[name]) for name in ours.phi)


@pytest.mark.parametrize("head", ["shared", "prototype"])
def test_head_with_free_ways_predicts_other_ways(head: str) -> None:
    changes = CLASSES | {"model": CLASSES["model"] | {"head": head}}
    problem, theta, (support, query) = build_setting({"inner_steps": 2}, **changes)
    two = with_score(problem.algorithm, ClassificationScore(2))
    rows = Batch(support.x[support.y < 2], support.y[support.y < 2])
    assert two.predict(theta, unroll(two, theta, rows), query.x).shape == (len(query.x), 2)
