"""Policy gradients, in float64, against finite differences of the exact expected return of a bandit."""

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


def logits_of(theta: Theta) -> Tensor:
    """Of a policy that sees a constant 1."""
    return theta["model.1.weight"][:, 0] + theta["model.1.bias"]


def expected_return(theta: Theta) -> Tensor:
    return (logits_of(theta).softmax(-1) * PAYS).sum()


def problem(**options: Any) -> tuple[PolicyMAML, Theta, Any]:
    tasks = {"type": "bandit", "arms": 3, "horizon": 1, "history": False}
    algorithm = {"type": "maml-rl", "inner_lr": RATE, **options}
    built = build_problem(Job.parse(tree(algorithm, tasks=tasks, model={"type": "mlp", "hidden": []})))
    generator = torch.Generator().manual_seed(3)
    theta = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in built.init().items()
    }
    built.model.to(dtype=torch.float64)
    algorithm_ = built.algorithm
    assert isinstance(algorithm_, PolicyMAML)
    return algorithm_, theta, built.family


def pulls(theta: Theta, arms: Tensor, weight: Tensor | None = None) -> Trajectories:
    """One pull a trajectory. With weights, an average over trajectories is an expectation."""
    count = len(arms)
    weight = torch.ones(count, dtype=torch.float64) if weight is None else weight
    behaviour = logits_of(theta).detach().expand(count, 1, 3)
    ones = torch.ones(count, dtype=torch.float64)
    pays = PAYS[arms]
    return Trajectories(
        ones[:, None, None], arms[:, None], behaviour, pays[:, None], weight[:, None], pays, ones
    )


def expectation(theta: Theta) -> Trajectories:
    """Every arm once, weighted with its probability."""
    return pulls(theta, torch.arange(3), logits_of(theta).softmax(-1).detach())


def differences(function: Any, theta: Theta, h: float = 1e-5) -> Theta:
    """Central differences in every entry."""
    found = {name: torch.zeros_like(value) for name, value in theta.items()}
    for name, value in theta.items():
        for i in range(value.numel()):
            ends = []
            for sign in (1, -1):
                moved = value.clone()
                moved.view(-1)[i] += sign * h
                ends.append(float(function(theta | {name: moved})))
            found[name].view(-1)[i] = (ends[0] - ends[1]) / (2 * h)
    return found


def assert_near(found: Theta, expected: Theta) -> None:
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_surrogates_gradient_is_the_gradient_of_the_expected_return(clip: float | None) -> None:
    algorithm, theta, _ = problem()
    batch = expectation(theta)
    found = grad(lambda t: -surrogate_loss(algorithm.model(t, batch.x), batch, clip))(theta)
    assert_near(found, differences(expected_return, theta))
    weighted = batch.real * batch.advantage
    scores = grad(lambda t: (log_prob(algorithm.model(t, batch.x), batch.action) * weighted).sum())(theta)
    assert_near(found, scores)


def test_the_meta_gradient_through_the_inner_step_is_exact() -> None:
    """∇ J(θ + α ∇J(θ)): the ratio's second derivative is that of the expected return."""
    algorithm, theta, family = problem()

    def adapted_return(theta: Theta) -> Tensor:
        gradient = grad(expected_return)(theta)
        return expected_return({name: theta[name] + RATE * gradient[name] for name in theta})

    support = expectation(theta)
    phi = algorithm.step(theta, dict(theta), support, 0)
    episode = Episode(PerStep((support,)), expectation(phi))
    found = grad(lambda t: -algorithm.meta_loss(t, episode, unroll, family.score)[0])(theta)
    assert_near(found, differences(adapted_return, theta))


def test_e_maml_is_the_gradient_of_the_return_expected_over_what_is_adapted_on() -> None:
    """U(θ) = Σ_τ π_θ(τ) J(φ(θ, τ)) over all τ of two pulls: how τ is drawn counts, and the baseline leaves no bias."""
    algorithm, theta, family = problem(e_maml=True)
    support = {arms: pulls(theta, torch.tensor(arms)) for arms in product(range(3), repeat=2)}

    def chance(theta: Theta, arms: tuple[int, ...]) -> Tensor:
        return logits_of(theta).softmax(-1)[list(arms)].prod()

    def total(theta: Theta) -> Tensor:
        return sum(
            (
                chance(theta, arms) * expected_return(algorithm.step(theta, dict(theta), batch, 0))
                for arms, batch in support.items()
            ),
            torch.zeros((), dtype=torch.float64),
        )

    found = {name: torch.zeros_like(value) for name, value in theta.items()}
    for arms, batch in support.items():
        query = expectation(algorithm.step(theta, dict(theta), batch, 0))
        reached = (query.real * query.total[:, None]).sum()  # the mean return under the weights
        query = query._replace(total=reached.expand(3), real=query.real * 3)  # three trajectories of one step
        episode = Episode(PerStep((batch,)), query)

        def loss(t: Theta, episode: Episode = episode) -> Tensor:
            return -algorithm.meta_loss(t, episode, unroll, family.score)[0]

        part = grad(loss)(theta)
        found = {name: found[name] + chance(theta, arms) * part[name] for name in found}
    assert_near(found, differences(total, theta))


def test_e_maml_needs_another_trajectory() -> None:
    algorithm, theta, family = problem(e_maml=True)
    one = pulls(theta, torch.tensor([1]))
    with pytest.raises(InputError, match=r"^tasks.trajectories: got 1 with algorithm.e_maml"):
        algorithm.meta_loss(theta, Episode(PerStep((one,)), one), unroll, family.score)


def test_promps_penalty_is_the_divergence_of_the_policies_that_were_adapted() -> None:
    algorithm, theta, family = problem(kl=0.5)
    plain, _, _ = problem()
    moved = {name: value + 0.1 for name, value in theta.items()} | {
        "model.1.bias": theta["model.1.bias"] * 1.5
    }
    episode = Episode(PerStep((expectation(theta),)), expectation(theta))
    penalty, _ = algorithm.meta_loss(moved, episode, unroll, family.score)
    without, _ = plain.meta_loss(moved, episode, unroll, family.score)
    old, new = (torch.distributions.Categorical(logits=logits_of(t)) for t in (theta, moved))
    expected = 0.5 * torch.distributions.kl_divergence(old, new)
    torch.testing.assert_close(penalty - without, expected)


def test_first_order_stops_at_the_inner_gradient() -> None:
    algorithm, theta, family = problem(first_order=True)
    support = expectation(theta)
    query = expectation(algorithm.step(theta, dict(theta), support, 0))
    episode = Episode(PerStep((support,)), query)
    found = grad(lambda t: algorithm.meta_loss(t, episode, unroll, family.score)[0])(theta)
    phi = algorithm.step(theta, dict(theta), support, 0)
    assert_near(found, grad(lambda p: surrogate_loss(algorithm.model(p, query.x), query))(phi))


def test_distributions_are_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, other = (torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    arms = torch.arange(5)
    (m, s), (m2, s2) = outputs.chunk(2, -1), other.chunk(2, -1)
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
