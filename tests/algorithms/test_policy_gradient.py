"""Policy gradients in float64, compared with finite differences of the exact expected return of a bandit."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from conftest import tree
from torch import Tensor
from torch.func import grad

from distmeta.algorithms.maml_rl import PolicyMAML
from distmeta.compute.gradient import unroll
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.protocols import Episode, PerStep, Theta
from distmeta.runtime.problem import build_problem
from distmeta.trajectories import Trajectories, kl_divergence, log_prob, sample_action, surrogate_loss

PAYS = torch.tensor([0.1, 0.7, 0.4], dtype=torch.float64)
RATE = 0.8


def policy_logits(theta: Theta) -> Tensor:
    """Return the logits of a policy that sees a constant 1."""
    return theta["model.1.weight"][:, 0] + theta["model.1.bias"]


def expected_return(theta: Theta) -> Tensor:
    return (policy_logits(theta).softmax(-1) * PAYS).sum()


def build_bandit(**options: Any) -> tuple[PolicyMAML, Theta, Any]:
    tasks = {"type": "bandit", "arms": 3, "horizon": 1, "history": False}
    algorithm = {"type": "maml-rl", "inner_lr": RATE, **options}
    built = build_problem(Job.parse(tree(algorithm, tasks=tasks, model={"type": "mlp", "hidden": []})))
    generator = torch.Generator().manual_seed(3)
    theta = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in built.init().items()
    }
    built.model.to(dtype=torch.float64)
    assert isinstance(built.algorithm, PolicyMAML)
    return built.algorithm, theta, built.family


def collect_pulls(theta: Theta, arms: Tensor, weight: Tensor | None = None) -> Trajectories:
    """Return one trajectory per pull. With weights, an average over trajectories is an expectation."""
    count = len(arms)
    weight = torch.ones(count, dtype=torch.float64) if weight is None else weight
    behaviour = policy_logits(theta).detach().expand(count, 1, 3)
    ones = torch.ones(count, dtype=torch.float64)
    pays = PAYS[arms]
    return Trajectories(
        ones[:, None, None], arms[:, None], behaviour, pays[:, None], weight[:, None], pays, ones
    )


def collect_every_arm(theta: Theta) -> Trajectories:
    """Return every arm once, weighted with its probability."""
    return collect_pulls(theta, torch.arange(3), policy_logits(theta).softmax(-1).detach())


def finite_differences(function: Any, theta: Theta, h: float = 1e-5) -> Theta:
    """Return central differences in every entry."""
    found = {name: torch.zeros_like(value) for name, value in theta.items()}
    for name, value in theta.items():
        for i in range(value.numel()):
            step = torch.zeros_like(value)
            step.view(-1)[i] = h
            high = float(function(theta | {name: value + step}).detach())
            low = float(function(theta | {name: value - step}).detach())
            found[name].view(-1)[i] = (high - low) / (2 * h)
    return found


def assert_close(found: Theta, expected: Theta) -> None:
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_surrogate_has_the_gradient_of_the_expected_return(clip: float | None) -> None:
    algorithm, theta, _ = build_bandit()
    batch = collect_every_arm(theta)
    found = grad(lambda t: -surrogate_loss(algorithm.model(t, batch.x), batch, clip))(theta)
    assert_close(found, finite_differences(expected_return, theta))
    weighted = batch.real * batch.advantage
    scores = grad(lambda t: (log_prob(algorithm.model(t, batch.x), batch.action) * weighted).sum())(theta)
    assert_close(found, scores)


def test_meta_gradient_through_the_inner_step_is_exact() -> None:
    """It is ∇ J(θ + α ∇J(θ)): the ratio has the second derivative of the expected return."""
    algorithm, theta, family = build_bandit()

    def adapted_return(theta: Theta) -> Tensor:
        gradient = grad(expected_return)(theta)
        return expected_return({name: theta[name] + RATE * gradient[name] for name in theta})

    support = collect_every_arm(theta)
    phi = algorithm.step(theta, dict(theta), support, 0)
    episode = Episode(PerStep((support,)), collect_every_arm(phi))
    found = grad(lambda t: -algorithm.meta_loss(t, episode, unroll, family.score)[0])(theta)
    assert_close(found, finite_differences(adapted_return, theta))


def test_e_maml_has_the_gradient_of_the_return_expected_over_support_trajectories() -> None:
    """U(θ) = Σ_τ π_θ(τ) J(φ(θ, τ)) over all τ of two pulls. The baseline adds no bias."""
    algorithm, theta, family = build_bandit(e_maml=True)
    support = {arms: collect_pulls(theta, torch.tensor(arms)) for arms in product(range(3), repeat=2)}

    def probability(theta: Theta, arms: tuple[int, ...]) -> Tensor:
        return policy_logits(theta).softmax(-1)[list(arms)].prod()

    def total(theta: Theta) -> Tensor:
        return sum(
            (
                probability(theta, arms) * expected_return(algorithm.step(theta, dict(theta), batch, 0))
                for arms, batch in support.items()
            ),
            torch.zeros((), dtype=torch.float64),
        )

    found = {name: torch.zeros_like(value) for name, value in theta.items()}
    for arms, batch in support.items():
        query = collect_every_arm(algorithm.step(theta, dict(theta), batch, 0))
        mean_return = (query.real * query.total[:, None]).sum()
        query = query._replace(
            total=mean_return.expand(3), real=query.real * 3
        )  # three trajectories of one step
        episode = Episode(PerStep((batch,)), query)

        def loss(t: Theta, episode: Episode = episode) -> Tensor:
            return -algorithm.meta_loss(t, episode, unroll, family.score)[0]

        part = grad(loss)(theta)
        found = {name: found[name] + probability(theta, arms) * part[name] for name in found}
    assert_close(found, finite_differences(total, theta))


def test_e_maml_with_one_trajectory_is_an_error() -> None:
    algorithm, theta, family = build_bandit(e_maml=True)
    one = collect_pulls(theta, torch.tensor([1]))
    with pytest.raises(InputError, match=r"^tasks.trajectories: got 1 with algorithm.e_maml"):
        algorithm.meta_loss(theta, Episode(PerStep((one,)), one), unroll, family.score)


def test_promp_penalty_equals_the_divergence_from_the_behaviour_policy() -> None:
    algorithm, theta, family = build_bandit(kl=0.5)
    plain, _, _ = build_bandit()
    moved = {name: value + 0.1 for name, value in theta.items()} | {
        "model.1.bias": theta["model.1.bias"] * 1.5
    }
    episode = Episode(PerStep((collect_every_arm(theta),)), collect_every_arm(theta))
    penalty, _ = algorithm.meta_loss(moved, episode, unroll, family.score)
    without, _ = plain.meta_loss(moved, episode, unroll, family.score)
    old = torch.distributions.Categorical(logits=policy_logits(theta))
    new = torch.distributions.Categorical(logits=policy_logits(moved))
    expected = 0.5 * torch.distributions.kl_divergence(old, new)
    torch.testing.assert_close(penalty - without, expected)


def test_first_order_treats_the_inner_gradient_as_a_constant() -> None:
    algorithm, theta, family = build_bandit(first_order=True)
    support = collect_every_arm(theta)
    query = collect_every_arm(algorithm.step(theta, dict(theta), support, 0))
    episode = Episode(PerStep((support,)), query)
    found = grad(lambda t: algorithm.meta_loss(t, episode, unroll, family.score)[0])(theta)
    phi = algorithm.step(theta, dict(theta), support, 0)
    assert_close(found, grad(lambda p: surrogate_loss(algorithm.model(p, query.x), query))(phi))


def test_distributions_equal_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    other = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    arms = torch.arange(5)
    m, s = outputs.chunk(2, -1)
    m2, s2 = other.chunk(2, -1)
    normals = [
        torch.distributions.Independent(torch.distributions.Normal(a, b.exp()), 1)
        for a, b in ((m, s), (m2, s2))
    ]
    classes = [torch.distributions.Categorical(logits=o) for o in (outputs, other)]
    for (old, new), action in ((normals, m2), (classes, arms)):
        torch.testing.assert_close(log_prob(outputs, action), old.log_prob(action))
        torch.testing.assert_close(
            kl_divergence(outputs, other, action), torch.distributions.kl_divergence(old, new)
        )
    uniform = torch.rand(20_000, generator=generator, dtype=torch.float64)
    drawn = sample_action(outputs[:1].expand(20_000, 6), uniform)
    torch.testing.assert_close(
        drawn.bincount(minlength=6) / 20_000, outputs[0].softmax(-1).float(), atol=0.015, rtol=0
    )
