"""Bilevel: hypergradients against closed forms and plain autograd; random starts; messages; trust."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tree
from torch import Tensor

import distmeta
from distmeta.algorithms.bilevel import Bilevel
from distmeta.compute.execution import Execution, shard_gradient
from distmeta.compute.gradient import differentiate, unroll
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.protocols import Batch, Episode, Metrics, Theta
from distmeta.runtime.problem import build_problem
from distmeta.seeding import task_ids

DIMENSIONS = 4
IMPLICIT = {"hypergradient": "conjugate-gradients", "implicit_steps": DIMENSIONS}


class Ridge:
    """Learn log λ of a ridge regression: L_lower = ½‖Xw − y‖²/N + ½ e^u ‖w‖², L_upper = ½‖Xw − y‖²/N on other data."""

    def init_upper(self, generator: torch.Generator) -> Theta:
        return {"log_strength": torch.tensor(-1.0)}

    def init_lower(self, generator: torch.Generator) -> Theta:
        return {"weight": torch.randn(DIMENSIONS, generator=generator)}

    def lower_loss(self, upper: Theta, lower: Theta, support: Any) -> Tensor:
        penalty = upper["log_strength"].exp() * lower["weight"].square().sum() / 2
        return F.mse_loss(support.x @ lower["weight"], support.y) / 2 + penalty

    def upper_loss(self, upper: Theta, lower: Theta, query: Any) -> tuple[Tensor, Metrics]:
        return F.mse_loss(query.x @ lower["weight"], query.y) / 2, {}

    def predict(self, upper: Theta, lower: Theta, x: Any) -> Tensor:
        return x @ lower["weight"]


class NoPredictions:
    def init_upper(self, generator: torch.Generator) -> Theta:
        return {}


def make_episode() -> Episode:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Batch:
        x = torch.randn(count, DIMENSIONS, generator=generator, dtype=torch.float64)
        return Batch(x, torch.randn(count, generator=generator, dtype=torch.float64))

    return Episode(draw(12), draw(9))


def build_ridge(**options: Any) -> Bilevel:
    model: Any = None
    score: Any = None
    return Bilevel(model, score, problem="test_bilevel:Ridge", **options)


def compute_hypergradient(algorithm: Bilevel, theta: Theta | None = None) -> Theta:
    if theta is None:
        theta = algorithm.init(torch.Generator())
    theta = {name: value.double() for name, value in theta.items()}
    episode = make_episode()
    score: Any = None
    return differentiate(lambda t: algorithm.meta_loss(t, episode, unroll, score), theta)[0]


def compute_exact_hypergradient() -> float:
    """dL_upper/du of the closed form w = (XᵀX/N + e^u I)⁻¹ Xᵀy/N."""
    support, query = make_episode()
    u = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    covariance = support.x.T @ support.x / len(support.x)
    regularised = covariance + u.exp() * torch.eye(DIMENSIONS, dtype=torch.float64)
    weight = torch.linalg.solve(regularised, support.x.T @ support.y / len(support.x))
    (F.mse_loss(query.x @ weight, query.y) / 2).backward()
    assert u.grad is not None
    return float(u.grad)


@pytest.mark.parametrize(
    "options",
    [
        {},
        IMPLICIT,
        {"hypergradient": "neumann", "implicit_steps": 200},
        {"backprop_steps": 100},
        {"lower_start": "learned"},
    ],
    ids=["unrolled", "conjugate-gradients", "neumann", "truncated", "learned-start"],
)
def test_converged_hypergradient_is_that_of_the_closed_form(options: dict[str, Any]) -> None:
    algorithm = build_ridge(inner_lr=0.3, inner_steps=200, **options)
    found = compute_hypergradient(algorithm)["upper.log_strength"]
    assert float(found) == pytest.approx(compute_exact_hypergradient(), rel=1e-9)


def test_damped_conjugate_gradients_solve_the_damped_system() -> None:
    support, query = make_episode()
    damping = 0.5
    covariance = support.x.T @ support.x / len(support.x)
    identity = torch.eye(DIMENSIONS, dtype=torch.float64)
    strength = torch.tensor(-1.0, dtype=torch.float64).exp()
    hessian = covariance + strength * identity
    weight = torch.linalg.solve(hessian, support.x.T @ support.y / len(support.x))
    gradient = query.x.T @ (query.x @ weight - query.y) / len(query.x)
    expected = -(strength * weight) @ torch.linalg.solve(hessian + damping * identity, gradient)
    algorithm = build_ridge(inner_lr=0.3, inner_steps=200, damping=damping, **IMPLICIT)
    found = compute_hypergradient(algorithm)["upper.log_strength"]
    assert float(found) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"inner_optimizer": "sgd"},
        {"inner_optimizer": "momentum"},
        {"inner_optimizer": "adam"},
        {"inner_optimizer": "adamw", "inner_weight_decay": 0.1},
        {"inner_weight_decay": 0.1, "inner_clip_norm": 0.05, "inner_schedule": "cosine"},
    ],
)
def test_unrolled_hypergradient_equals_finite_differences(options: dict[str, Any]) -> None:
    algorithm = build_ridge(
        **options,
        inner_lr=0.1,
        inner_steps=3,
        learn_inner_lr=True,
        lower_start="learned",
        inner_batch=5,
    )
    theta = {name: value.double() for name, value in algorithm.init(torch.Generator()).items()}
    gradient = compute_hypergradient(algorithm, theta)
    score: Any = None

    def loss(moved: Theta) -> float:
        return algorithm.meta_loss(moved, make_episode(), unroll, score)[0].item()

    for name, value in theta.items():
        step = 1e-6
        direction = torch.ones_like(value)
        higher = loss(theta | {name: value + step * direction})
        lower = loss(theta | {name: value - step * direction})
        assert float(gradient[name].sum()) == pytest.approx((higher - lower) / (2 * step), rel=1e-6), name


def test_truncated_hypergradient_is_that_of_the_last_steps_from_a_constant() -> None:
    algorithm = build_ridge(inner_lr=0.1, inner_steps=5, backprop_steps=2)
    problem = Ridge()
    support, query = make_episode()
    u = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    start = problem.init_lower(torch.Generator().manual_seed(0))["weight"]
    weight = start.double().requires_grad_()
    for k in range(5):
        loss = problem.lower_loss({"log_strength": u}, {"weight": weight}, support)
        weight = weight - 0.1 * torch.autograd.grad(loss, weight, create_graph=True)[0]
        if k == 2:
            weight = weight.detach().requires_grad_()
    problem.upper_loss({}, {"weight": weight}, query)[0].backward()
    assert u.grad is not None
    found = compute_hypergradient(algorithm)["upper.log_strength"]
    assert float(found) == pytest.approx(float(u.grad), rel=1e-12)


def test_task_stops_at_its_lower_loss() -> None:
    """Once a step's lower loss is at most the limit, hypergradients are those of the steps before it."""
    support = make_episode().support
    theta = {name: value.double() for name, value in build_ridge().init(torch.Generator()).items()}
    state = unroll(build_ridge(inner_lr=0.1, inner_steps=2), theta, support, detach=True)
    upper = {"log_strength": theta["upper.log_strength"]}
    limit = float(Ridge().lower_loss(upper, state.phi, support))
    two_steps = compute_hypergradient(build_ridge(inner_lr=0.1, inner_steps=2))
    stopped = compute_hypergradient(build_ridge(inner_lr=0.1, inner_steps=6, inner_stop_loss=limit))
    six_steps = compute_hypergradient(build_ridge(inner_lr=0.1, inner_steps=6))
    assert torch.equal(stopped["upper.log_strength"], two_steps["upper.log_strength"])
    assert not torch.equal(six_steps["upper.log_strength"], two_steps["upper.log_strength"])


def test_neumann_series_of_one_term_replaces_the_hessian() -> None:
    """The hypergradient is −η ∂_u ∂_w L_lower · ∂_w L_upper, here with ∂_u ∂_w L_lower = e^u w."""
    rate = 0.7
    algorithm = build_ridge(
        inner_lr=0.1, inner_steps=3, hypergradient="neumann", implicit_steps=0, neumann_rate=rate
    )
    theta = {name: value.double() for name, value in algorithm.init(torch.Generator()).items()}
    support, query = make_episode()
    weight = unroll(algorithm, theta, support, detach=True).phi["weight"]
    gradient = query.x.T @ (query.x @ weight - query.y) / len(query.x)
    expected = -rate * theta["upper.log_strength"].exp() * (weight @ gradient)
    found = compute_hypergradient(algorithm)["upper.log_strength"]
    assert float(found) == pytest.approx(float(expected), rel=1e-12)


def test_random_start_differs_between_tasks_and_not_between_shards() -> None:
    options = {"type": "bilevel", "problem": "learned-loss", "inner_lr": 0.01, "inner_steps": 1}
    problem = build_problem(Job.parse(tree({**options, "lower_start": "random"})))
    theta = problem.init()
    ids = task_ids(0, "train", 0, 2)
    episodes = problem.family.draw("train", ids)
    loop = Execution("loop", 1)
    both = shard_gradient(problem.algorithm, problem.family.score, theta, episodes, ids, loop)
    second = shard_gradient(
        problem.algorithm,
        problem.family.score,
        theta,
        Episode(*(Batch(*(leaf[1:] for leaf in part)) for part in episodes)),
        ids[1:],
        loop,
    )
    assert both.metrics["loss_after"][1] == second.metrics["loss_after"][0]
    starts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        starts.append(problem.algorithm.begin(theta, None).phi)
    assert any(not torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"lower_start": "learned", **IMPLICIT},
            "algorithm.lower_start: got learned with hypergradient: conj",
        ),
        ({"learn_inner_lr": True, **IMPLICIT}, "algorithm.learn_inner_lr: got true with hypergradient: conj"),
        ({"backprop_steps": 2, **IMPLICIT}, "algorithm.backprop_steps: got 2 with hypergradient: conj"),
        (
            {"inner_weight_decay": 0.1, **IMPLICIT},
            "algorithm.inner_weight_decay: got 0.1 with hypergradient: conj",
        ),
        (
            {"hypergradient": "conjugate-gradients", "implicit_steps": 0},
            "algorithm.implicit_steps: got 0 with hypergradient: conjugate-gradients",
        ),
        ({"options": {"width": 3}}, "algorithm.options: got an unexpected keyword argument 'width'"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=f"^{expected}"):
        build_ridge(**options)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("reweightin", "algorithm.problem: got 'reweightin', expected one of .* did you mean"),
        ("nowhere:Problem", "algorithm.problem: importing 'nowhere:Problem' failed: ModuleNotFoundError"),
        ("os:sep", "algorithm.problem: got 'os:sep', which is a str, expected a class or function"),
        (
            "test_bilevel:NoPredictions",
            "algorithm.problem: got .*, expected the methods init_upper, init_lower",
        ),
    ],
)
def test_problem_that_is_none_is_refused(name: str, expected: str) -> None:
    model: Any = None
    score: Any = None
    with pytest.raises(InputError, match=f"^{expected}"):
        Bilevel(model, score, problem=name)


def test_checkpoint_imports_no_problem_that_the_user_did_not_name(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "from distmeta.algorithms.bilevel_problems import LearnedLoss\nopen('imported', 'w').close()\n"
    (workplace / "stranger.py").write_text(text)
    monkeypatch.syspath_prepend(str(workplace))
    algorithm = {"type": "bilevel", "problem": "stranger:LearnedLoss", "inner_lr": 0.01}
    run = distmeta.train(Job.parse(tree(algorithm, run={"steps": 1}))).run
    monkeypatch.delitem(__import__("sys").modules, "stranger")
    (workplace / "imported").unlink()
    with pytest.raises(InputError, match=r"^algorithm.problem: the checkpoint names 'stranger:LearnedLoss'"):
        distmeta.load(run)
    assert not (workplace / "imported").exists()
    distmeta.evaluate(run, ["algorithm.problem=stranger:LearnedLoss"])
    assert (workplace / "imported").exists()
