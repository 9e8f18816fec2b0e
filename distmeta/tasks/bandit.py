"""Bernoulli bandits: Duan et al. 2016, RL², arXiv 1611.02779, §3.1."""

from __future__ import annotations

from typing import Annotated, Any, final

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from distmeta.seeding import task_generator
from distmeta.tasks.options import Fraction, Positive
from distmeta.tasks.rollout import ActionSpace, Collector, VectorEnvironment, score_policy
from distmeta.trajectories import Trajectories

PAYOFFS = 2**32
"""Added to the number of an inner step: the part of a task's random numbers that gives the payoffs."""


@final
class Bandit:
    """`arms` arms, each of which pays 1 with its own probability, uniform on [0, 1]; `horizon` pulls.

    A policy sees a constant. With `history` (the default) it also sees its last arm and what that paid. The payoffs of
    all arms are drawn for every pull from the task's id, whichever arm is pulled. So two policies that choose the same
    arms get the same payoffs.

    Args:
        trajectories: runs of the same bandit, each from the beginning.
        eval_trajectories: the same in val and test; `trajectories` by default.
        horizon, history: see `tasks.rollout.Collector`.
        discount, gae_lambda, normalise: see `trajectories.estimate_advantages`.
    """

    def __init__(
        self,
        arms: Annotated[int, Field(ge=2)] = 10,
        horizon: Positive = 100,
        trajectories: Positive = 4,
        history: bool = True,
        discount: Fraction = 0.99,
        gae_lambda: Fraction = 1.0,
        normalise: bool = True,
        eval_trajectories: Positive | None = None,
    ) -> None:
        self._collector = Collector(trajectories, horizon, 1, history, discount, gae_lambda, normalise)
        self._eval_trajectories = eval_trajectories or trajectories
        self._actions = ActionSpace(arms, continuous=False)
        self.in_shape = self._collector.input_shape(1, self._actions)
        self.out_features = self._actions.policy_outputs

    def draw_probabilities(self, ids: Any) -> Tensor:
        """Draw the probability that each arm pays, [T, arms]."""
        drawn = [task_generator(i).random(self._actions.count, np.float32) for i in ids]
        return torch.from_numpy(np.stack(drawn))

    def draw_payoffs(self, ids: Any, k: int, copies: int) -> Tensor:
        """Draw what every arm would pay in every pull, 0 or 1: [T, N, H, arms]."""
        shape = (copies, self._collector.horizon, self._actions.count)
        drawn = np.stack([task_generator(i, PAYOFFS + k).random(shape, np.float32) for i in ids])
        return (torch.from_numpy(drawn) < self.draw_probabilities(ids)[:, None, None]).float()

    def collect(self, split: str, ids: Any, k: int, policy: Any) -> Trajectories:
        """Collect pulls of the tasks `ids` with the policy after k inner steps."""
        count = self._collector.trajectories if split == "train" else self._eval_trajectories
        noise = self._actions.draw_noise(ids, k, count, self._collector.horizon)
        environment = make_bandits(self.draw_payoffs(ids, k, count))
        return self._collector.collect(environment, self._actions, noise, policy)

    score = staticmethod(score_policy)


def make_bandits(payoff_TNHA: Tensor) -> VectorEnvironment:
    """Make bandits with known payoffs. Their state is the number of the pull."""
    observation = torch.ones(*payoff_TNHA.shape[:2], 1)
    ended = torch.zeros(payoff_TNHA.shape[:2], dtype=torch.bool)

    def step(pull: int, action: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
        reward = payoff_TNHA[:, :, pull].gather(-1, action[..., None])[..., 0]
        return pull + 1, observation, reward, ended

    return VectorEnvironment(lambda episode: (0, observation), step)
