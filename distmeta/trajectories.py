"""Trajectories of policies, and the losses whose gradients are policy gradients.

A policy maps observations to *outputs* that describe a distribution over actions:

- discrete actions: logits [..., A] for A actions; an action is a class index [...].
- continuous actions: means and log standard deviations [..., 2A]; an action is a float vector [..., A].

The functions here tell the two apart by the type or shape of their arguments.

Shapes: T tasks, N trajectories of a task, H time steps, O observation features, A actions, B baseline features,
M = N·H rows of a least-squares problem.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Trajectories(NamedTuple):
    """What a policy did in one task, as constants. A family's `collect` stacks it over tasks, [T, ...]."""

    x: Tensor
    """Observations, [N, H, O]."""
    action: Tensor
    """Actions, [N, H] int64 or [N, H, A] float."""
    behaviour: Tensor
    """Outputs of the policy that acted, [N, H, ·]."""
    advantage: Tensor
    """[N, H]; 0 after the end of a trajectory."""
    real: Tensor
    """1 for a step that was taken, 0 after the end of the trajectory, [N, H]."""
    total: Tensor
    """Sum of the rewards of a trajectory, [N]."""
    scale: Tensor
    """The number that the advantages were divided by, repeated for each trajectory, [N]."""


def sample_action(outputs: Tensor, noise: Tensor) -> Tensor:
    """Turn noise into one action per row of outputs.

    Args:
        outputs: of the policy, [..., A] or [..., 2A].
        noise: uniform on [0, 1), [...], for a discrete action (by the inverse of the distribution function); standard
            normal, [..., A], for a continuous one (mean + deviation · noise).
    """
    if noise.dim() < outputs.dim():
        below = outputs.softmax(-1).cumsum(-1) <= noise[..., None]
        return below.sum(-1).clamp(max=outputs.shape[-1] - 1)
    mean, log_std = outputs.chunk(2, -1)
    return mean + log_std.exp() * noise


def log_prob(outputs: Tensor, action: Tensor) -> Tensor:
    """Return log π(action), [...]: a probability for discrete actions, a density for continuous ones."""
    if not action.is_floating_point():
        return outputs.log_softmax(-1).gather(-1, action[..., None])[..., 0]
    mean, log_std = outputs.chunk(2, -1)
    z = (action - mean) * (-log_std).exp()
    return -(0.5 * z.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def kl_divergence(old: Tensor, new: Tensor, action: Tensor) -> Tensor:
    """Return KL(old ‖ new) of the distributions that two outputs describe, [...].

    Only the type of `action` is used: it tells whether actions are discrete or continuous.
    """
    if not action.is_floating_point():
        log_old = old.log_softmax(-1)
        return (log_old.exp() * (log_old - new.log_softmax(-1))).sum(-1)
    m0, s0 = old.chunk(2, -1)
    m1, s1 = new.chunk(2, -1)
    return (s1 - s0 + ((2 * s0).exp() + (m0 - m1).square()) * (-2 * s1).exp() / 2 - 0.5).sum(-1)


def surrogate_loss(outputs: Tensor, batch: Trajectories, clip: float | None = None) -> Tensor:
    """Return −E[ρ A] over the steps that were taken, with ρ = π(a) / π_behaviour(a).

    For the policy that acted, ρ = 1 and the gradient is the score-function estimator −E[A ∇log π(a)] (REINFORCE). ρ,
    unlike log π, also has the right second derivative there. So a gradient *through* a step on this loss is the
    low-variance-curvature estimator of Rothfuss et al. 2019 (ProMP, arXiv 1810.06784, §5).

    Args:
        outputs: of the current policy for `batch.x`, [N, H, ·].
        batch: trajectories of one task.
        clip: ε of PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7): −E[min(ρ A, clip(ρ, 1−ε, 1+ε) A)].
    """
    ratio = (log_prob(outputs, batch.action) - log_prob(batch.behaviour, batch.action)).exp()
    gain = ratio * batch.advantage
    if clip is not None:
        gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * batch.advantage)
    return -mean_over_steps(gain, batch)


def mean_over_steps(values: Tensor, batch: Trajectories) -> Tensor:
    """Return the mean of values [N, H] over the steps that were taken."""
    return (values * batch.real).sum() / batch.real.sum()


def estimate_advantages(
    x: Tensor, reward: Tensor, real: Tensor, discount: float, lam: float, normalise: bool
) -> tuple[Tensor, Tensor]:
    """Estimate generalised advantages over a linear baseline that is fitted to the same trajectories.

        δ_t = r_t + γ V(x_{t+1}) − V(x_t),   A_t = δ_t + γλ A_{t+1},   V = 0 after the last step

    Reference: Schulman et al. 2016, arXiv 1506.02438.

    Args:
        x: observations, [..., N, H, O].
        reward: [..., N, H].
        real: 1 for the steps that were taken, [..., N, H].
        discount: γ.
        lam: λ.
        normalise: scale to mean 0 and standard deviation 1 over the steps of a task.

    Returns:
        The advantages [..., N, H], and the number that they were divided by [..., N].
    """
    value = fit_baseline(x, reward, real, discount)
    next_advantage = torch.zeros_like(reward[..., 0])
    next_value = torch.zeros_like(reward[..., 0])
    backwards = []
    for t in reversed(range(reward.shape[-1])):
        taken = real[..., t] > 0  # steps after an end leave next_advantage and next_value at 0
        advantage = reward[..., t] + discount * next_value - value[..., t] + discount * lam * next_advantage
        next_advantage = torch.where(taken, advantage, next_advantage)
        next_value = torch.where(taken, value[..., t], next_value)
        backwards.append(torch.where(taken, advantage, 0))
    advantage = torch.stack(backwards[::-1], -1)
    scale = torch.ones_like(advantage[..., 0])
    if not normalise:
        return advantage, scale
    count = real.sum((-2, -1), keepdim=True)
    centred = (advantage - advantage.sum((-2, -1), keepdim=True) / count) * real
    deviation = (centred.square().sum((-2, -1), keepdim=True) / count).sqrt() + 1e-8
    return centred / deviation, scale * deviation[..., 0]


def fit_baseline(x: Tensor, reward: Tensor, real: Tensor, discount: float, ridge: float = 1e-5) -> Tensor:
    """Fit V(x_t), the expected discounted sum of rewards from step t on, and return its values [..., N, H].

    Least squares on the features [x, x², t, t², t³, 1] with t in hundreds of steps, in float64, separately for
    each task. Reference: Duan et al. 2016, arXiv 1604.06778 (`LinearFeatureBaseline` in its code).
    """
    reward_to_go = torch.zeros_like(reward[..., 0])
    backwards = []
    for t in reversed(range(reward.shape[-1])):
        taken = real[..., t] > 0
        reward_to_go = torch.where(taken, reward[..., t] + discount * reward_to_go, reward_to_go)
        backwards.append(reward_to_go)
    target = torch.stack(backwards[::-1], -1)
    clipped = x.clamp(-10, 10)
    time = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device) / 100
    powers = torch.stack([time, time**2, time**3, torch.ones_like(time)], -1)
    features = torch.cat([clipped, clipped.square(), powers.expand(*x.shape[:-1], 4)], -1).double()
    features_MB = features.flatten(-3, -2)
    masked_MB = features_MB * real.double().flatten(-2)[..., None]
    ridge_BB = ridge * torch.eye(features_MB.shape[-1], dtype=torch.float64, device=x.device)
    gram_BB = masked_MB.mT @ features_MB + ridge_BB
    moment_B1 = masked_MB.mT @ target.double().flatten(-2)[..., None]
    fitted = features_MB @ torch.linalg.solve(gram_BB, moment_B1)
    return fitted.view(reward.shape).to(reward.dtype)
