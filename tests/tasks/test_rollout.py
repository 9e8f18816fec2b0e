"""Environments, trajectories and advantages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tree
from hypothesis import given, settings
from hypothesis import strategies as st

import distmeta
from distmeta.compute.episodes import make_episodes
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime.problem import build_problem
from distmeta.seeding import task_generator, task_ids
from distmeta.tasks.bandit import Bandit
from distmeta.tasks.navigation import GOAL_TOLERANCE, MAX_MOVE, Navigation, trace_path
from distmeta.trajectories import Trajectories, estimate_advantages, fit_baseline, surrogate_loss

ids_of = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3).map(lambda ids: np.array(ids, np.uint64))


def wander(x: torch.Tensor) -> torch.Tensor:
    """A policy without parameters: small moves, σ = 0.1."""
    return torch.cat([0.03 * torch.sin(9 * x[..., :2] + 1), torch.full_like(x[..., :2], -2.3)], -1)


def uniformly(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*x.shape[:-1], 3)


FAMILIES: list[tuple[Any, Any]] = [
    (Navigation(trajectories=3, horizon=8), wander),
    (Navigation(trajectories=2, horizon=4, episodes=2, history=True), wander),
    (Bandit(arms=3, horizon=5, trajectories=2), uniformly),
]


def equal(a: Trajectories, b: Trajectories) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


@settings(max_examples=20, deadline=None)
@given(ids=ids_of, k=st.integers(0, 3), which=st.integers(0, len(FAMILIES) - 1))
def test_a_tasks_trajectories_are_its_own(ids: np.ndarray, k: int, which: int) -> None:
    """They do not depend on the tasks beside it; another inner step has other noise."""
    family, policy = FAMILIES[which]
    together = family.collect("train", ids, k, policy)
    for t in range(len(ids)):
        alone = family.collect("train", ids[t : t + 1], k, policy)
        assert torch.equal(alone.action[0], together.action[t])
        assert torch.equal(alone.total[0], together.total[t])
        torch.testing.assert_close(alone.advantage[0], together.advantage[t])
    assert equal(together, family.collect("train", ids, k, policy))
    assert not torch.equal(together.action, family.collect("train", ids, k + 1, policy).action) or which == 2
    steps = together.x.shape[2]
    assert together.x.shape[-1] == family.in_shape[0]
    assert together.real.shape == (len(ids), together.x.shape[1], steps)
    assert bool((together.advantage[together.real == 0] == 0).all())


@settings(max_examples=20, deadline=None)
@given(ids=ids_of)
def test_navigation_is_the_papers(ids: np.ndarray) -> None:
    family = Navigation(trajectories=3, horizon=8)
    batch = family.collect("train", ids, 0, wander)
    goals = family.goals(ids)
    assert bool((goals.abs() <= 0.5).all())
    moves = batch.x[:, :, 1:] - batch.x[:, :, :-1]
    torch.testing.assert_close(moves, batch.action[:, :, :-1].clamp(-MAX_MOVE, MAX_MOVE))
    assert bool((batch.x[:, :, 0] == 0).all())
    after = batch.x + batch.action.clamp(-MAX_MOVE, MAX_MOVE)
    distance = (after - goals[:, None, None]).norm(dim=-1)
    torch.testing.assert_close(batch.total, -(distance * batch.real).sum(-1))


def test_navigation_ends_at_the_goal() -> None:
    family = Navigation(trajectories=2, horizon=30)
    ids = task_ids(0, "train", 0, 5)
    goals = family.goals(ids)

    def straight(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([goals[:, None] - x, torch.full_like(x, -20.0)], -1)

    batch = family.collect("train", ids, 0, straight)
    steps = batch.real.sum(-1)
    expected = ((goals.abs().amax(-1) - GOAL_TOLERANCE) / MAX_MOVE).ceil()
    torch.testing.assert_close(steps, expected[:, None].expand_as(steps))
    assert bool((batch.real.diff(dim=-1) <= 0).all())


def test_the_way_that_is_drawn_is_the_one_that_was_gone() -> None:
    """From the origin to the place after the last move; of two episodes the last."""
    family = Navigation(trajectories=2, horizon=4, episodes=2, history=True)
    ids = task_ids(0, "train", 0, 3)
    batch = family.collect("train", ids, 0, wander)
    for t in range(3):
        moves = batch.action[t, 0, 4:].clamp(-MAX_MOVE, MAX_MOVE)[batch.real[t, 0, 4:] > 0]
        torch.testing.assert_close(trace_path(batch, t, 4), torch.cat([torch.zeros(1, 2), moves.cumsum(0)]))


def test_history_shows_the_last_action_and_reward_and_where_episodes_begin() -> None:
    ids = task_ids(0, "train", 0, 2)
    batch = Bandit(arms=3, horizon=5, trajectories=2).collect("train", ids, 0, uniformly)
    shown = torch.nn.functional.one_hot(batch.action[:, :, :-1], 3)
    assert torch.equal(batch.x[:, :, 1:, 1:4], shown.float())
    assert torch.equal(batch.x[:, :, 0, 1:], torch.tensor([0.0, 0, 0, 0, 1]).expand(2, 2, 5))
    torch.testing.assert_close(batch.x[:, :, :, 4].sum(-1) <= batch.total, torch.ones(2, 2, dtype=torch.bool))
    two = Navigation(trajectories=2, horizon=4, episodes=2, history=True).collect("train", ids, 0, wander)
    assert two.x[0, 0, :, -1].tolist() == [1, 0, 0, 0, 1, 0, 0, 0]
    assert bool((two.x[:, :, 4, :2] == 0).all())


def test_a_bandits_arms_pay_as_often_as_they_should() -> None:
    bandit = Bandit(arms=3, horizon=4000)
    ids = task_ids(0, "test", 0, 4)
    paid = bandit.payoffs(ids, 0, 1).mean((1, 2))
    torch.testing.assert_close(paid, bandit.probabilities(ids), atol=0.03, rtol=0)
    assert not torch.equal(bandit.payoffs(ids, 0, 1), bandit.payoffs(ids, 1, 1))


def test_streams_of_a_task_differ() -> None:
    drawn = [task_generator(7, part).random(4).tolist() for part in range(3)]
    assert drawn[0] == task_generator(7).random(4).tolist()
    assert len({tuple(row) for row in drawn}) == 3


def test_advantages_at_their_ends() -> None:
    """λ = 1: what is to come less the baseline; λ = 0: one step's surprise; both cut at an episode's end."""
    generator = torch.Generator().manual_seed(0)
    x, reward = torch.randn(6, 9, 2, generator=generator), torch.randn(6, 9, generator=generator)
    real = (torch.arange(9) < torch.tensor([9, 9, 4, 7, 1, 9])[:, None]).float()
    reward = reward * real
    value = fit_baseline(x, reward, real, 0.9) * real
    following = torch.cat([value[:, 1:], torch.zeros(6, 1)], 1)
    one_step = (reward + 0.9 * following - value) * real
    torch.testing.assert_close(estimate_advantages(x, reward, real, 0.9, 0.0, False)[0], one_step)
    to_come = torch.stack([(reward[:, t:] * 0.9 ** torch.arange(9 - t)).sum(1) for t in range(9)], 1)
    torch.testing.assert_close(
        estimate_advantages(x, reward, real, 0.9, 1.0, False)[0], (to_come - value) * real
    )
    scaled, scale = estimate_advantages(x, reward, real, 0.9, 0.95, True)
    plain = estimate_advantages(x, reward, real, 0.9, 0.95, False)[0]
    kept = plain[real > 0]
    torch.testing.assert_close(scaled[real > 0], (kept - kept.mean()) / kept.std(correction=0))
    torch.testing.assert_close(scale, kept.std(correction=0).expand(6))


def test_the_baseline_is_least_squares() -> None:
    x = torch.randn(20, 5, 2, generator=torch.Generator().manual_seed(0))
    wanted = 0.3 * x[..., 0] - x[..., 1].square() + 2 * (torch.arange(5) / 100) + 1
    reward = wanted - torch.cat([wanted[:, 1:], torch.zeros(20, 1)], 1)
    torch.testing.assert_close(fit_baseline(x, reward, torch.ones(20, 5), 1.0), wanted, atol=1e-3, rtol=1e-3)


def test_what_is_replayed_is_what_acted() -> None:
    """The ratios of a collected episode are 1, before adaptation and after it: the importance weights are right."""
    for name in ("maml-rl", "rl2"):
        problem = build_problem(Job.parse(tree(name)))
        algorithm, theta, ids = problem.algorithm, problem.init(), task_ids(0, "train", 0, 3)
        steps = algorithm.inner_steps
        episodes = make_episodes(problem.family, algorithm, theta, "train", ids, steps)
        query = Trajectories(*(leaf[1] for leaf in episodes.query))
        state = algorithm.begin(theta, None)
        for k in range(steps):
            support = Trajectories(*(leaf[1] for leaf in episodes.support.batches[k]))
            torch.testing.assert_close(algorithm.predict(theta, state, support.x), support.behaviour)
            state = algorithm.step(theta, state, support, k)
        outputs = algorithm.predict(theta, state, query.x)
        torch.testing.assert_close(outputs, query.behaviour)
        assert float(surrogate_loss(outputs, query)) == pytest.approx(0, abs=1e-5)


def test_a_policy_of_another_kind_is_refused() -> None:
    family = Navigation(trajectories=1, horizon=2)
    with pytest.raises(InputError, match=r"^model.type: got a policy with 3 outputs, expected 4: a mean and"):
        family.collect("train", task_ids(0, "train", 0, 1), 0, uniformly)
    with pytest.raises(InputError, match=r"^model.type: got gaussian for tasks with 3 outputs"):
        build_problem(Job.parse(tree("maml-rl", tasks={"type": "bandit", "arms": 3})))


def test_adapting_to_examples_is_refused(workplace: Path) -> None:
    learner = distmeta.load(distmeta.train(Job.parse(tree("maml-rl", run={"steps": 1}))).run)
    with pytest.raises(InputError, match=r"^adapt: navigation has no x and y"):
        learner.adapt([[0.0, 0.0]], [[0.0, 0.0, 0.0, 0.0]])


def test_gym_without_gymnasium_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(InputError, match=r"^tasks.type: got gym, which needs Gymnasium .*distmeta\[rl\]"):
        build_problem(Job.parse(tree("maml-rl", tasks={"type": "gym"})))
