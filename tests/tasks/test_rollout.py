"""Collected trajectories: what they depend on, their environments, and that replaying them repeats the policy."""

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
from distmeta.trajectories import Trajectories, surrogate_loss

id_arrays = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3).map(
    lambda ids: np.array(ids, np.uint64)
)


def move_a_little(x: torch.Tensor) -> torch.Tensor:
    """A policy without parameters: small moves with a standard deviation of 0.1."""
    return torch.cat([0.03 * torch.sin(9 * x[..., :2] + 1), torch.full_like(x[..., :2], -2.3)], -1)


def choose_uniformly(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*x.shape[:-1], 3)


FAMILIES: list[tuple[Any, Any]] = [
    (Navigation(trajectories=3, horizon=8), move_a_little),
    (Navigation(trajectories=2, horizon=4, episodes=2, history=True), move_a_little),
    (Bandit(arms=3, horizon=5, trajectories=2), choose_uniformly),
]


def are_equal(a: Trajectories, b: Trajectories) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


@settings(max_examples=20, deadline=None)
@given(ids=id_arrays, k=st.integers(0, 3), which=st.integers(0, len(FAMILIES) - 1))
def test_trajectories_depend_only_on_task_and_inner_step(ids: np.ndarray, k: int, which: int) -> None:
    family, policy = FAMILIES[which]
    together = family.collect("train", ids, k, policy)
    for t in range(len(ids)):
        alone = family.collect("train", ids[t : t + 1], k, policy)
        assert torch.equal(alone.action[0], together.action[t])
        assert torch.equal(alone.total[0], together.total[t])
        torch.testing.assert_close(alone.advantage[0], together.advantage[t])
    assert are_equal(together, family.collect("train", ids, k, policy))
    if isinstance(family, Navigation):  # a bandit may repeat its few discrete actions
        assert not torch.equal(together.action, family.collect("train", ids, k + 1, policy).action)
    assert together.x.shape[-1] == family.in_shape[0]
    assert together.real.shape == (len(ids), *together.x.shape[1:3])
    assert bool((together.advantage[together.real == 0] == 0).all())


@settings(max_examples=20, deadline=None)
@given(ids=id_arrays)
def test_navigation_moves_and_rewards_are_those_of_the_paper(ids: np.ndarray) -> None:
    family = Navigation(trajectories=3, horizon=8)
    batch = family.collect("train", ids, 0, move_a_little)
    goals = family.draw_goals(ids)
    assert bool((goals.abs() <= 0.5).all())
    assert bool((batch.x[:, :, 0] == 0).all())
    moves = batch.action.clamp(-MAX_MOVE, MAX_MOVE)
    torch.testing.assert_close(batch.x[:, :, 1:] - batch.x[:, :, :-1], moves[:, :, :-1])
    distance = (batch.x + moves - goals[:, None, None]).norm(dim=-1)
    torch.testing.assert_close(batch.total, -(distance * batch.real).sum(-1))


def test_navigation_ends_at_the_goal() -> None:
    family = Navigation(trajectories=2, horizon=30)
    ids = task_ids(0, "train", 0, 5)
    goals = family.draw_goals(ids)

    def go_straight(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([goals[:, None] - x, torch.full_like(x, -20.0)], -1)

    batch = family.collect("train", ids, 0, go_straight)
    steps = batch.real.sum(-1)
    expected = ((goals.abs().amax(-1) - GOAL_TOLERANCE) / MAX_MOVE).ceil()
    torch.testing.assert_close(steps, expected[:, None].expand_as(steps))
    assert bool((batch.real.diff(dim=-1) <= 0).all())


def test_traced_path_goes_from_the_origin_to_the_last_position() -> None:
    """Of two episodes it is the last one."""
    family = Navigation(trajectories=2, horizon=4, episodes=2, history=True)
    batch = family.collect("train", task_ids(0, "train", 0, 3), 0, move_a_little)
    for t in range(3):
        moves = batch.action[t, 0, 4:].clamp(-MAX_MOVE, MAX_MOVE)
        moves = moves[batch.real[t, 0, 4:] > 0]
        expected = torch.cat([torch.zeros(1, 2), moves.cumsum(0)])
        torch.testing.assert_close(trace_path(batch, t, 4), expected)


def test_history_shows_last_action_last_reward_and_begin_of_episode() -> None:
    ids = task_ids(0, "train", 0, 2)
    batch = Bandit(arms=3, horizon=5, trajectories=2).collect("train", ids, 0, choose_uniformly)
    actions = torch.nn.functional.one_hot(batch.action[:, :, :-1], 3)
    assert torch.equal(batch.x[:, :, 1:, 1:4], actions.float())
    first = torch.tensor([0.0, 0, 0, 0, 1])
    assert torch.equal(batch.x[:, :, 0, 1:], first.expand(2, 2, 5))
    assert bool((batch.x[:, :, :, 4].sum(-1) <= batch.total).all())
    two_episodes = Navigation(trajectories=2, horizon=4, episodes=2, history=True)
    batch = two_episodes.collect("train", ids, 0, move_a_little)
    assert batch.x[0, 0, :, -1].tolist() == [1, 0, 0, 0, 1, 0, 0, 0]
    assert bool((batch.x[:, :, 4, :2] == 0).all())


def test_arms_pay_with_their_probability() -> None:
    bandit = Bandit(arms=3, horizon=4000)
    ids = task_ids(0, "test", 0, 4)
    frequency = bandit.draw_payoffs(ids, 0, 1).mean((1, 2))
    torch.testing.assert_close(frequency, bandit.draw_probabilities(ids), atol=0.03, rtol=0)
    assert not torch.equal(bandit.draw_payoffs(ids, 0, 1), bandit.draw_payoffs(ids, 1, 1))


def test_parts_of_a_tasks_random_numbers_differ() -> None:
    drawn = [task_generator(7, part).random(4).tolist() for part in range(3)]
    assert drawn[0] == task_generator(7).random(4).tolist()
    assert len({tuple(row) for row in drawn}) == 3


@pytest.mark.parametrize("name", ["maml-rl", "rl2"])
def test_replayed_policy_gives_the_collected_outputs(name: str) -> None:
    """So the importance weights of a collected episode are 1, before and after adaptation."""
    problem = build_problem(Job.parse(tree(name)))
    algorithm = problem.algorithm
    theta = problem.init()
    steps = algorithm.inner_steps
    ids = task_ids(0, "train", 0, 3)
    episodes: Any = make_episodes(problem.family, algorithm, theta, "train", ids, steps)
    state = algorithm.begin(theta, None)
    for k in range(steps):
        support = Trajectories(*(leaf[1] for leaf in episodes.support.batches[k]))
        torch.testing.assert_close(algorithm.predict(theta, state, support.x), support.behaviour)
        state = algorithm.step(theta, state, support, k)
    query = Trajectories(*(leaf[1] for leaf in episodes.query))
    outputs = algorithm.predict(theta, state, query.x)
    torch.testing.assert_close(outputs, query.behaviour)
    assert float(surrogate_loss(outputs, query).detach()) == pytest.approx(0, abs=1e-5)


def test_policy_with_the_wrong_outputs_is_refused() -> None:
    family = Navigation(trajectories=1, horizon=2)
    with pytest.raises(InputError, match=r"^model.type: got a policy with 3 outputs, expected 4: a mean and"):
        family.collect("train", task_ids(0, "train", 0, 1), 0, choose_uniformly)
    with pytest.raises(InputError, match=r"^model.type: got gaussian for tasks with 3 outputs"):
        build_problem(Job.parse(tree("maml-rl", tasks={"type": "bandit", "arms": 3})))


def test_adapting_a_policy_to_examples_is_refused(workplace: Path) -> None:
    learner = distmeta.load(distmeta.train(Job.parse(tree("maml-rl", run={"steps": 1}))).run)
    with pytest.raises(InputError, match=r"^adapt: the tasks navigation have no x and y"):
        learner.adapt([[0.0, 0.0]], [[0.0, 0.0, 0.0, 0.0]])


def test_gym_without_gymnasium_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(InputError, match=r"^tasks.type: got gym, which needs Gymnasium .*distmeta\[rl\]"):
        build_problem(Job.parse(tree("maml-rl", tasks={"type": "gym"})))
