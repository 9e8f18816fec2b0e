"""Reptile and iMAML, compared with limits and closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tree
from torch import nn

from distmeta.algorithms.adaptation import select_minibatch
from distmeta.algorithms.imaml import IMAML, solve_conjugate_gradients
from distmeta.compute.execution import Execution, shard_gradient
from distmeta.compute.gradient import unroll
from distmeta.config.job import Job
from distmeta.protocols import Batch, Episode
from distmeta.runtime.problem import build_problem
from distmeta.seeding import task_ids
from distmeta.tasks.few_shot import ClassificationScore
from distmeta.trees import tree_leaves

LOOP = Execution("loop", 1)


@pytest.mark.parametrize("steps", [1, 4])
def test_reptile_gradient_is_theta_minus_phi(steps: int) -> None:
    """With one inner step it is α∇L_support(θ)."""
    problem = build_problem(
        Job.parse(tree({"type": "reptile", "inner_lr": 0.03, "inner_steps": steps, "inner_optimizer": "sgd"}))
    )
    theta = problem.init()
    ids = task_ids(0, "train", 0, 1)
    episodes = problem.family.draw("train", ids)
    result = shard_gradient(problem.algorithm, problem.score("train"), theta, episodes, ids, LOOP)
    phi = dict(theta)
    for _ in range(steps):
        gradient = torch.func.grad(
            lambda p: nn.functional.mse_loss(problem.model(p, episodes.support.x[0]), episodes.support.y[0])
        )(phi)
        phi = {name: phi[name] - 0.03 * gradient[name] for name in phi}
    for name in theta:
        torch.testing.assert_close(result.gradient[name], theta[name] - phi[name])
        if steps == 1:
            torch.testing.assert_close(result.gradient[name], 0.03 * gradient[name])


CLASSES = ClassificationScore(5)


def score_targets(outputs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return (outputs - batch.y).square().mean(), {}


def select_rows(y: Any, score: Any) -> list[list[int]]:
    """Return the rows of the first four minibatches of two."""
    x = torch.arange(len(tree_leaves(y)[0]))
    return [select_minibatch(Batch(x, y), k, 2, score).x.tolist() for k in range(4)]


def test_minibatches_start_again_after_the_last_row() -> None:
    batch = Batch(torch.arange(5.0)[:, None], torch.arange(5))
    assert [select_minibatch(batch, k, 2, CLASSES).y.tolist() for k in range(3)] == [[0, 1], [2, 3], [4, 0]]
    assert select_minibatch(batch, 7, None, CLASSES) is batch
    assert select_minibatch(batch, 0, 6, CLASSES) is batch


SIGNS = torch.tensor([-1, 1, -1, 1, 1])


@pytest.mark.parametrize(
    "y", [SIGNS, {"sign": SIGNS, "mask": torch.full((5, 2, 2), -1)}], ids=["tensor", "dict"]
)
def test_minibatches_have_the_rows_with_target_minus_one(y: Any) -> None:
    """-1 marks padding only in a classification."""
    assert select_rows(y, score_targets) == [[0, 1], [2, 3], [4, 0], [1, 2]]


def test_minibatches_of_classes_skip_padding() -> None:
    y = torch.tensor([0, -1, 1, -1, 2])
    assert select_rows(y, CLASSES) == [[0, 2], [4, 0], [2, 4], [0, 2]]


class Quadratic:
    """L_support(φ) = ½ φᵀAφ − bᵀφ and L_query(φ) = ½‖φ − c‖², so everything is known in closed form."""

    head_init = "linear"

    def __init__(self, n: int = 6):
        generator = torch.Generator().manual_seed(3)
        root = torch.randn(n, n, generator=generator, dtype=torch.float64)
        self.a = root @ root.T / n
        self.b = torch.randn(n, generator=generator, dtype=torch.float64)
        self.c = torch.randn(n, generator=generator, dtype=torch.float64)
        self.theta = {"model.w": torch.randn(n, generator=generator, dtype=torch.float64)}

    def __call__(self, phi, x):
        return phi["model.w"]

    def begin(self, theta, support=None, ways=None):
        return dict(theta)

    def init(self, generator):
        return self.theta

    def score(self, w, batch):
        is_query = batch.y
        support = 0.5 * w @ self.a @ w - self.b @ w
        return torch.where(is_query, 0.5 * (w - self.c).square().sum(), support), {}

    def episode(self) -> Episode:
        x = torch.zeros(1)
        return Episode(Batch(x, torch.tensor(False)), Batch(x, torch.tensor(True)))


def test_imaml_reaches_the_inner_optimum_and_the_implicit_gradient() -> None:
    """φ* = (A + λI)⁻¹(b + λθ) and v = (I + A/λ)⁻¹(φ* − c)."""
    problem = Quadratic()
    lam = 2.0
    imaml = IMAML(problem, problem.score, inner_lr=0.1, inner_steps=600, lam=lam, cg_steps=6)
    theta = problem.theta
    identity = torch.eye(6, dtype=torch.float64)
    optimum = torch.linalg.solve(problem.a + lam * identity, problem.b + lam * theta["model.w"])
    phi = unroll(imaml, theta, problem.episode().support, detach=True)["model.w"]
    torch.testing.assert_close(phi, optimum, rtol=1e-10, atol=1e-10)
    expected = torch.linalg.solve(identity + problem.a / lam, optimum - problem.c)
    gradient, metrics = torch.func.grad(
        lambda t: imaml.meta_loss(t, problem.episode(), unroll, problem.score), has_aux=True
    )(theta)
    torch.testing.assert_close(gradient["model.w"], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(metrics["loss"], 0.5 * (optimum - problem.c).square().sum())


def test_imaml_equals_reverse_mode_through_a_long_inner_loop() -> None:
    """At the inner optimum, the implicit gradient equals back-propagation through the path (Theorem 1)."""
    problem = Quadratic()
    imaml = IMAML(problem, problem.score, inner_lr=0.1, inner_steps=600, lam=2.0, cg_steps=6)
    episode = problem.episode()

    def loss_after_unrolling(theta):
        return problem.score(unroll(imaml, theta, episode.support)["model.w"], episode.query)[0]

    implicit = torch.func.grad(lambda t: imaml.meta_loss(t, episode, unroll, problem.score)[0])(problem.theta)
    explicit = torch.func.grad(loss_after_unrolling)(problem.theta)
    torch.testing.assert_close(implicit["model.w"], explicit["model.w"], rtol=1e-8, atol=1e-8)


def test_conjugate_gradients_stay_at_a_zero_residual() -> None:
    b = {"w": torch.tensor([1.0, 2.0])}
    solved = solve_conjugate_gradients(lambda v: {"w": 2 * v["w"]}, b, steps=5)
    torch.testing.assert_close(solved["w"], torch.tensor([0.5, 1.0]))
