"""Policies as distributions over actions, trajectories, and the losses whose gradients are policy gradients.

A policy is whatever gives *outputs*: logits [..., A] for one of A actions, or means and logarithms of deviations
[..., 2A] for A real ones. Which of the two shows in the actions: class indices [...], or floats [..., A].

Shapes: T tasks, N trajectories of a task, H time steps, O numbers of an observation, B features of a baseline.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Trajectories(NamedTuple):
    """What a policy met in one task, as constants; a family's `collect` returns it stacked over tasks, [T, ...]."""

    x: Tensor
    """What the policy saw, [N, H, O]."""
    action: Tensor
    """What it did, [N, H] int64 or [N, H, A]."""
    behaviour: Tensor
    """Its outputs there, [N, H, ·]."""
    advantage: Tensor
    """[N, H]; zero past a trajectory's end."""
    real: Tensor
    """1 where a step was taken, 0 past the end; [N, H]."""
    total: Tensor
    """Sum of a trajectory's rewards, [N]."""
    scale: Tensor
    """What the advantages were divided by, [N]: the same for all."""


def sample(outputs: Tensor, noise: Tensor) -> Tensor:
    """An action a row from noise: uniform [...] gives a class by the inverse of its distribution function; normal
    [..., A] gives mean + deviation · noise.
    """
    if noise.dim() < outputs.dim():
        below = outputs.softmax(-1).cumsum(-1) <= noise[..., None]
        return below.sum(-1).clamp(max=outputs.shape[-1] - 1)
    mean, log_std = outputs.chunk(2, -1)
    return mean + log_std.exp() * noise


def log_prob(outputs: Tensor, action: Tensor) -> Tensor:
    """log π(action), [...]; that of real actions is a density."""
    if not action.is_floating_point():
        return outputs.log_softmax(-1).gather(-1, action[..., None])[..., 0]
    mean, log_std = outputs.chunk(2, -1)
    z = (action - mean) * (-log_std).exp()
    return -(0.5 * z.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def divergence(old: Tensor, new: Tensor, action: Tensor) -> Tensor:
    """KL(old ‖ new) of the distributions that two outputs stand for, [...]; `action` shows of which kind they are."""
    if not action.is_floating_point():
        log_old = old.log_softmax(-1)
        return (log_old.exp() * (log_old - new.log_softmax(-1))).sum(-1)
    (m0, s0), (m1, s1) = old.chunk(2, -1), new.chunk(2, -1)
    return (s1 - s0 + ((2 * s0).exp() + (m0 - m1).square()) * (-2 * s1).exp() / 2 - 0.5).sum(-1)


def surrogate(outputs: Tensor, batch: Trajectories, clip: float | None = None) -> Tensor:
    """−E[ρ A] over the steps that were taken, ρ = π(a) / π_behaviour(a).

    At the policy that acted, ρ = 1 and the gradient is the score-function estimator −E[A ∇log π(a)] (REINFORCE). Since
    ρ, unlike log π, has the right second derivative there too, a gradient *through* a step on it is the
    low-variance-curvature estimator of Rothfuss et al. 2019 (ProMP, arXiv 1810.06784, §5).

    clip: PPO's ε (Schulman et al. 2017, arXiv 1707.06347, eq. 7): −E[min(ρ A, clip(ρ, 1−ε, 1+ε) A)].
    """
    ratio = (log_prob(outputs, batch.action) - log_prob(batch.behaviour, batch.action)).exp()
    gain = ratio * batch.advantage
    if clip is not None:
        gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * batch.advantage)
    return -mean(gain, batch)


def mean(values: Tensor, batch: Trajectories) -> Tensor:
    """Mean over the steps that were taken, values [N, H]."""
    return (values * batch.real).sum() / batch.real.sum()


def advantages(
    x: Tensor, reward: Tensor, real: Tensor, discount: float, lam: float, normalise: bool
) -> tuple[Tensor, Tensor]:
    """Generalised advantages over a linear baseline of the same trajectories, [..., N, H]; and their scale [..., N].

        δ_t = r_t + γ V(x_{t+1}) − V(x_t),   A_t = δ_t + γλ A_{t+1};   V = 0 after the last step

    `normalise`: to mean 0 and deviation 1 over a task's steps. Reference: Schulman et al. 2016, arXiv 1506.02438.
    """
    value = baseline(x, reward, real, discount)
    found, after, following = [], torch.zeros_like(reward[..., 0]), torch.zeros_like(reward[..., 0])
    for t in reversed(range(reward.shape[-1])):
        taken = real[..., t] > 0  # past an end nothing is taken, and what follows is what follows the end
        here = reward[..., t] + discount * following - value[..., t] + discount * lam * after
        after, following = torch.where(taken, here, after), torch.where(taken, value[..., t], following)
        found.append(torch.where(taken, here, 0))
    advantage = torch.stack(found[::-1], -1)
    scale = torch.ones_like(advantage[..., 0])
    if not normalise:
        return advantage, scale
    count = real.sum((-2, -1), keepdim=True)
    centred = (advantage - advantage.sum((-2, -1), keepdim=True) / count) * real
    deviation = (centred.square().sum((-2, -1), keepdim=True) / count).sqrt() + 1e-8
    return centred / deviation, scale * deviation[..., 0]


def baseline(x: Tensor, reward: Tensor, real: Tensor, discount: float, ridge: float = 1e-5) -> Tensor:
    """V(x_t), least squares of the discounted rewards to come on [x, x², t, t², t³, 1], t in hundreds; [..., N, H].

    Each task's own, in float64. Reference: Duan et al. 2016, arXiv 1604.06778 (its code's `LinearFeatureBaseline`).
    """
    to_come, rest = [], torch.zeros_like(reward[..., 0])
    for t in reversed(range(reward.shape[-1])):
        rest = torch.where(real[..., t] > 0, reward[..., t] + discount * rest, rest)
        to_come.append(rest)
    target = torch.stack(to_come[::-1], -1)
    clipped = x.clamp(-10, 10)
    time = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device) / 100
    powers = torch.stack([time, time**2, time**3, torch.ones_like(time)], -1)
    features = torch.cat([clipped, clipped.square(), powers.expand(*x.shape[:-1], 4)], -1).double()
    rows_MB = features.flatten(-3, -2)
    kept_MB = rows_MB * real.double().flatten(-2)[..., None]
    gram_BB = kept_MB.mT @ rows_MB + ridge * torch.eye(
        rows_MB.shape[-1], dtype=torch.float64, device=x.device
    )
    moment_B1 = kept_MB.mT @ target.double().flatten(-2)[..., None]
    fitted = rows_MB @ torch.linalg.solve(gram_BB, moment_B1)
    return fitted.view(reward.shape).to(reward.dtype)
