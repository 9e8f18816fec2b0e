"""Advantages and baselines against independent computations."""

from __future__ import annotations

import pytest
import torch

from distmeta.trajectories import estimate_advantages, fit_baseline


@pytest.fixture
def rollout() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Observations, rewards, and which steps were taken, of six trajectories of at most nine steps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 9, 2, generator=generator)
    reward = torch.randn(6, 9, generator=generator)
    lengths = torch.tensor([9, 9, 4, 7, 1, 9])
    real = (torch.arange(9) < lengths[:, None]).float()
    return x, reward * real, real


def test_lambda_zero_gives_one_step_errors(rollout) -> None:
    x, reward, real = rollout
    value = fit_baseline(x, reward, real, 0.9) * real
    next_value = torch.cat([value[:, 1:], torch.zeros(6, 1)], 1)
    expected = (reward + 0.9 * next_value - value) * real
    torch.testing.assert_close(estimate_advantages(x, reward, real, 0.9, 0.0, False)[0], expected)


def test_lambda_one_gives_rewards_to_go_less_the_baseline(rollout) -> None:
    x, reward, real = rollout
    value = fit_baseline(x, reward, real, 0.9) * real
    discounts = 0.9 ** torch.arange(9)
    reward_to_go = torch.stack([(reward[:, t:] * discounts[: 9 - t]).sum(1) for t in range(9)], 1)
    expected = (reward_to_go - value) * real
    torch.testing.assert_close(estimate_advantages(x, reward, real, 0.9, 1.0, False)[0], expected)


def test_normalised_advantages_have_mean_zero_and_deviation_one(rollout) -> None:
    x, reward, real = rollout
    normalised, scale = estimate_advantages(x, reward, real, 0.9, 0.95, True)
    taken = estimate_advantages(x, reward, real, 0.9, 0.95, False)[0][real > 0]
    deviation = taken.std(correction=0)
    torch.testing.assert_close(normalised[real > 0], (taken - taken.mean()) / deviation)
    torch.testing.assert_close(scale, deviation.expand(6))


def test_baseline_fits_what_its_features_can_express() -> None:
    x = torch.randn(20, 5, 2, generator=torch.Generator().manual_seed(0))
    time = torch.arange(5) / 100
    expected = 0.3 * x[..., 0] - x[..., 1].square() + 2 * time + 1
    reward = expected - torch.cat([expected[:, 1:], torch.zeros(20, 1)], 1)
    fitted = fit_baseline(x, reward, torch.ones(20, 5), 1.0)
    torch.testing.assert_close(fitted, expected, atol=1e-3, rtol=1e-3)
