"""Policies acting in environments: the part that all reinforcement learning families share.

Shapes: T tasks, N trajectories of each, H time steps of an episode, E episodes of a trajectory, O numbers of an
observation, A actions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distmeta.errors import InputError
from distmeta.protocols import Metrics
from distmeta.seeding import task_generator
from distmeta.trajectories import Trajectories, advantages, sample, surrogate


class Environment(NamedTuple):
    """N copies of the environments of T tasks, as two functions."""

    reset: Callable[[int], tuple[Any, Tensor]]
    """episode -> (state, observation [T, N, O])."""
    step: Callable[[Any, Tensor], tuple[Any, Tensor, Tensor, Tensor]]
    """(state, action) -> (state, observation, reward [T, N], ended [T, N]). Past an end what it says is not used."""


class Film(NamedTuple):
    """What a family's `film` returns: itself, with a camera on the first trajectory of the first task."""

    family: Any
    scenes: list[list[np.ndarray]]
    """A scene for every batch that `family` has collected: frames, uint8 [height, width, 3]."""
    rate: int
    """Frames a second."""


@dataclass(frozen=True)
class Actions:
    """The actions of a family: one of `count`, or `count` real numbers."""

    count: int
    real: bool

    @property
    def outputs(self) -> int:
        """Outputs that a policy must have."""
        return 2 * self.count if self.real else self.count

    def noise(self, ids: Any, k: int, trajectories: int, steps: int) -> Tensor:
        """The exploration noise of what is collected after k steps: uniform [T, N, E·H], or normal [T, N, E·H, A]."""
        generators = [task_generator(i, k + 1) for i in ids]
        if self.real:
            drawn = [g.standard_normal((trajectories, steps, self.count), np.float32) for g in generators]
        else:
            drawn = [g.random((trajectories, steps), np.float32) for g in generators]
        return torch.from_numpy(np.stack(drawn))

    def shown(self, action: Tensor) -> Tensor:
        """Actions as numbers, [..., A]."""
        return action if self.real else torch.nn.functional.one_hot(action, self.count).float()


@dataclass(frozen=True)
class Collection:
    """How trajectories are collected, and what advantages are made of their rewards.

    A trajectory is `episodes` episodes of at most `horizon` steps, one after the other in the same task. With `history`
    a policy sees beside the observation its last action, the last reward, and whether an episode begins (RL²: Duan
    et al. 2016, arXiv 1611.02779, §2.2): all that it needs to learn across episodes.
    """

    trajectories: int
    horizon: int
    episodes: int
    history: bool
    discount: float
    gae_lambda: float
    normalise: bool

    def in_shape(self, observation: int, actions: Actions) -> tuple[int, ...]:
        return (observation + (actions.count + 2 if self.history else 0),)

    def run(self, environment: Environment, actions: Actions, noise: Tensor, policy: Any) -> Trajectories:
        """Acts for E episodes of H steps by `policy`, x [T, N, ·] -> outputs, called once a time step, in order."""
        x, action, outputs, reward, real = _act(self, environment, actions, noise, policy)
        advantage, scale = advantages(x, reward, real, self.discount, self.gae_lambda, self.normalise)
        return Trajectories(x, action, outputs, advantage, real, reward.sum(-1), scale)


def _act(
    how: Collection, environment: Environment, actions: Actions, noise: Tensor, policy: Any
) -> list[Tensor]:
    """x [T, N, E·H, ·], actions, outputs, rewards [T, N, E·H], and which steps were taken."""
    rows: list[tuple[Tensor, ...]] = []
    for episode in range(how.episodes):
        state, seen = environment.reset(episode)
        running = torch.ones(seen.shape[:2])
        for t in range(how.horizon):
            if how.history:
                seen = torch.cat([seen, *_history(actions, rows, running, t == 0)], -1)
            outputs = policy(seen)
            if outputs.shape[-1] != actions.outputs:
                raise InputError(
                    f"model.type: got a policy with {outputs.shape[-1]} outputs, expected {actions.outputs}: "
                    + ("a mean and a log deviation for every action" if actions.real else "one an action")
                )
            action = sample(outputs, noise[:, :, len(rows)])
            state, after, reward, ended = environment.step(state, action)
            rows.append((seen, action, outputs, reward * running, running))
            running, seen = running * ~ended, after
    return [torch.stack(column, 2) for column in zip(*rows, strict=True)]


def _history(
    actions: Actions, rows: list[tuple[Tensor, ...]], running: Tensor, begins: bool
) -> tuple[Tensor, ...]:
    """The last action [T, N, A], the last reward and whether an episode begins, [T, N, 1]; zeros before the first."""
    first = torch.full_like(running, float(begins))[..., None]
    if not rows:
        return torch.zeros(*running.shape, actions.count), torch.zeros_like(first), first
    _, action, _, reward, _ = rows[-1]
    return actions.shown(action), reward[..., None], first


def score(outputs: Tensor, batch: Trajectories) -> tuple[Tensor, Metrics]:
    """The loss whose gradient is the policy gradient, and the trajectories' mean return (undiscounted)."""
    return surrogate(outputs, batch), {"return": batch.total.mean()}
