"""Bernoulli bandits: Duan et al. 2016, RL², arXiv 1611.02779, §3.1."""

from __future__ import annotations

from typing import Annotated, Any, final

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from distmeta.protocols import Metrics
from distmeta.seeding import task_generator
from distmeta.tasks.rollout import Actions, Collection, Environment, score
from distmeta.trajectories import Trajectories

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PAYOFFS = 2**32
"""Added to an inner step's number: the stream of the arms' payoffs, beside that of the exploration."""


@final
class Bandit:
    """`arms` arms, each paying 1 with a probability of its own, uniform on [0, 1]; `horizon` pulls.

    A policy sees a constant, and with `history` (the default) its last arm and what it paid. The payoffs of pull t are
    drawn for every arm, whichever is pulled, from the task's id: two policies that agree meet the same.

    Args:
        trajectories: runs of the same bandit, each from nothing; `eval_trajectories` in val and test.
        horizon, history: see `tasks.rollout.Collection`.
        discount, gae_lambda, normalise: see `policies.advantages`.
    """

    def __init__(
        self,
        arms: Annotated[int, Field(ge=2)] = 10,
        horizon: Count = 100,
        trajectories: Count = 4,
        history: bool = True,
        discount: Fraction = 0.99,
        gae_lambda: Fraction = 1.0,
        normalise: bool = True,
        eval_trajectories: Count | None = None,
    ) -> None:
        self._how = Collection(trajectories, horizon, 1, history, discount, gae_lambda, normalise)
        self._eval_trajectories = eval_trajectories or trajectories
        self._actions = Actions(arms, real=False)
        self.in_shape = self._how.in_shape(1, self._actions)
        self.out_features = self._actions.outputs

    def probabilities(self, ids: Any) -> Tensor:
        """Of each arm, [T, arms]."""
        drawn = [task_generator(i).random(self._actions.count, np.float32) for i in ids]
        return torch.from_numpy(np.stack(drawn))

    def payoffs(self, ids: Any, k: int, copies: int) -> Tensor:
        """What every arm would pay in every pull, 0 or 1: [T, N, H, arms]."""
        shape = (copies, self._how.horizon, self._actions.count)
        drawn = np.stack([task_generator(i, PAYOFFS + k).random(shape, np.float32) for i in ids])
        return (torch.from_numpy(drawn) < self.probabilities(ids)[:, None, None]).float()

    def collect(self, split: str, ids: Any, k: int, policy: Any) -> Trajectories:
        """Pulls of the tasks `ids` under the policy after k inner steps."""
        count = self._how.trajectories if split == "train" else self._eval_trajectories
        noise = self._actions.noise(ids, k, count, self._how.horizon)
        return self._how.run(machine(self.payoffs(ids, k, count)), self._actions, noise, policy)

    def score(self, outputs: Tensor, batch: Trajectories) -> tuple[Tensor, Metrics]:
        return score(outputs, batch)


def machine(payoff_TNHA: Tensor) -> Environment:
    """Bandits whose payoffs are known beforehand. The state is the number of the pull."""
    seen = torch.ones(*payoff_TNHA.shape[:2], 1)
    never = torch.zeros(payoff_TNHA.shape[:2], dtype=torch.bool)

    def step(pull: int, action: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
        paid = payoff_TNHA[:, :, pull].gather(-1, action[..., None])[..., 0]
        return pull + 1, seen, paid, never

    return Environment(lambda episode: (0, seen), step)
