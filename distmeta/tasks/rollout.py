"""Policies that act in environments: what all reinforcement learning families share.

Shapes: T tasks, N trajectories of each, H time steps of an episode, E episodes of a trajectory, O observation
features, A actions.
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
from distmeta.trajectories import Trajectories, estimate_advantages, sample_action, surrogate_loss


class VectorEnvironment(NamedTuple):
    """The environments of T tasks, N copies of each, as two functions."""

    reset: Callable[[int], tuple[Any, Tensor]]
    """reset(episode) -> (state, observation [T, N, O])."""
    step: Callable[[Any, Tensor], tuple[Any, Tensor, Tensor, Tensor]]
    """step(state, action) -> (state, observation, reward [T, N], ended [T, N]).

    What it returns for an environment that has ended is ignored.
    """


class Film(NamedTuple):
    """A task family that films the first trajectory of the first task in everything it collects."""

    family: Any
    scenes: list[list[np.ndarray]]
    """One scene per batch that `family` has collected: frames, uint8 [height, width, 3]."""
    rate: int
    """Frames per second."""


@dataclass(frozen=True)
class ActionSpace:
    """The actions of a task family: one of `count` discrete actions, or `count` real numbers."""

    count: int
    continuous: bool

    @property
    def policy_outputs(self) -> int:
        """Number of outputs that a policy needs: logits, or means and log deviations."""
        return 2 * self.count if self.continuous else self.count

    def draw_noise(self, ids: Any, k: int, trajectories: int, steps: int) -> Tensor:
        """Draw the exploration noise of the trajectories that are collected after k inner steps.

        Returns:
            Standard normal [T, N, E·H, A] for continuous actions, uniform [T, N, E·H] for discrete ones.
        """
        generators = [task_generator(i, k + 1) for i in ids]
        if self.continuous:
            shape = (trajectories, steps, self.count)
            drawn = [generator.standard_normal(shape, np.float32) for generator in generators]
        else:
            drawn = [generator.random((trajectories, steps), np.float32) for generator in generators]
        return torch.from_numpy(np.stack(drawn))

    def encode(self, action: Tensor) -> Tensor:
        """Return actions as numbers [..., A]; discrete ones as one-hot rows."""
        if self.continuous:
            return action
        return torch.nn.functional.one_hot(action, self.count).float()


@dataclass(frozen=True)
class Collector:
    """Collects trajectories and estimates the advantages of their actions.

    A trajectory is `episodes` episodes of at most `horizon` steps in the same task, one after the other. With `history`
    the policy sees, beside the observation, its last action, the last reward and whether an episode begins: everything
    that it needs to learn across episodes (RL²: Duan et al. 2016, arXiv 1611.02779, §2.2).
    """

    trajectories: int
    horizon: int
    episodes: int
    history: bool
    discount: float
    gae_lambda: float
    normalise: bool

    def input_shape(self, observation: int, actions: ActionSpace) -> tuple[int, ...]:
        """Return the shape of what a policy sees, for observations of so many features."""
        history = actions.count + 2 if self.history else 0
        return (observation + history,)

    def collect(
        self, environment: VectorEnvironment, actions: ActionSpace, noise: Tensor, policy: Any
    ) -> Trajectories:
        """Act for E episodes of H steps. `policy(x [T, N, ·])` is called once per time step, in order of time."""
        x, action, outputs, reward, real = _act(self, environment, actions, noise, policy)
        advantage, scale = estimate_advantages(
            x, reward, real, self.discount, self.gae_lambda, self.normalise
        )
        return Trajectories(x, action, outputs, advantage, real, reward.sum(-1), scale)


def score_policy(outputs: Tensor, batch: Trajectories) -> tuple[Tensor, Metrics]:
    """Return the loss whose gradient is the policy gradient, and the mean undiscounted return of a trajectory."""
    return surrogate_loss(outputs, batch), {"return": batch.total.mean()}


class _TimeStep(NamedTuple):
    """What happened in one time step of all environments."""

    x: Tensor
    """What the policy saw, [T, N, ·]."""
    action: Tensor
    outputs: Tensor
    reward: Tensor
    """[T, N]; 0 if the episode had ended before."""
    running: Tensor
    """1 if the step was taken, [T, N]."""


def _act(
    collector: Collector, environment: VectorEnvironment, actions: ActionSpace, noise: Tensor, policy: Any
) -> list[Tensor]:
    """Return the fields of `_TimeStep`, stacked over the E·H time steps: [T, N, E·H, ·]."""
    steps: list[_TimeStep] = []
    for episode in range(collector.episodes):
        state, observation = environment.reset(episode)
        running = torch.ones(observation.shape[:2])
        for t in range(collector.horizon):
            x = observation
            if collector.history:
                x = torch.cat([observation, *_describe_history(actions, steps, running, t == 0)], -1)
            outputs = policy(x)
            _check_outputs(outputs, actions)
            action = sample_action(outputs, noise[:, :, len(steps)])
            state, observation, reward, ended = environment.step(state, action)
            steps.append(_TimeStep(x, action, outputs, reward * running, running))
            running = running * ~ended
    return [torch.stack(field, 2) for field in zip(*steps, strict=True)]


def _describe_history(
    actions: ActionSpace, steps: list[_TimeStep], running: Tensor, begins: bool
) -> tuple[Tensor, ...]:
    """Return the last action [T, N, A], the last reward [T, N, 1], and whether an episode begins [T, N, 1].

    Action and reward are zero before the first step.
    """
    first = torch.full_like(running, float(begins))[..., None]
    if not steps:
        return torch.zeros(*running.shape, actions.count), torch.zeros_like(first), first
    return actions.encode(steps[-1].action), steps[-1].reward[..., None], first


def _check_outputs(outputs: Tensor, actions: ActionSpace) -> None:
    if outputs.shape[-1] == actions.policy_outputs:
        return
    meaning = "one per action"
    if actions.continuous:
        meaning = "a mean and a log deviation per action"
    raise InputError(
        f"model.type: got a policy with {outputs.shape[-1]} outputs, expected {actions.policy_outputs}: {meaning}"
    )
