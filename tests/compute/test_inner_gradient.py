"""The gradient inside a task: equal to `torch.func.grad`, or to plain autograd if only that works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmeta.compute.inner_gradient import inner_gradient, inner_vjp, is_inside_transform

Phi = dict[str, Tensor]


def make_phi(requires_grad: bool = False) -> Phi:
    generator = torch.Generator().manual_seed(0)
    phi = {
        "a": torch.randn(3, generator=generator, dtype=torch.float64),
        "b": torch.randn(3, generator=generator, dtype=torch.float64),
        "unused": torch.ones(2, dtype=torch.float64),
    }
    return {name: value.requires_grad_(requires_grad) for name, value in phi.items()}


def loss_of(phi: Phi) -> Tensor:
    return (phi["a"].sin() * phi["b"].square()).sum()


def test_gradient_equals_torch_func_and_is_zero_for_unused_tensors() -> None:
    phi = make_phi()
    found = inner_gradient(loss_of, phi)
    expected = torch.func.grad(loss_of)(phi)
    assert all(torch.equal(found[name], expected[name]) for name in phi)
    assert not found["unused"].any()


def test_second_derivative_goes_through_the_gradient() -> None:
    phi = make_phi(requires_grad=True)
    total = inner_gradient(loss_of, phi)["a"].sum()
    (found,) = torch.autograd.grad(total, [phi["a"]])
    torch.testing.assert_close(found, -phi["a"].sin() * phi["b"].square(), rtol=1e-12, atol=0)


def test_only_the_dependence_through_the_argument_counts() -> None:
    """A loss that also reads the same tensor from elsewhere sees a constant there, as in `torch.func.grad`."""
    phi = make_phi(requires_grad=True)

    def loss(p: Phi) -> Tensor:
        return (p["a"] * phi["a"]).sum()

    assert torch.equal(inner_gradient(loss, phi)["a"], phi["a"])


def test_first_order_gradient_is_a_constant() -> None:
    phi = make_phi(requires_grad=True)
    gradient, loss = inner_gradient(lambda p: (loss_of(p), loss_of(p)), phi, has_aux=True, first_order=True)
    assert not any(value.requires_grad for value in gradient.values())
    assert loss.requires_grad  # what the loss returns besides still has its history


@pytest.mark.parametrize("first_order", [False, True])
def test_nothing_has_a_history_without_grad_mode(first_order: bool) -> None:
    phi = make_phi(requires_grad=True)
    with torch.no_grad():
        gradient, loss = inner_gradient(
            lambda p: (loss_of(p), loss_of(p)), phi, has_aux=True, first_order=first_order
        )
    assert not loss.requires_grad
    assert not any(value.requires_grad for value in gradient.values())


def test_gradient_under_vmap_equals_one_after_the_other() -> None:
    rows = torch.stack([make_phi()["a"], make_phi()["b"]])

    def gradient(a: Tensor) -> Tensor:
        assert is_inside_transform()
        return inner_gradient(lambda p: (p**3).sum(), a)

    torch.testing.assert_close(torch.func.vmap(gradient)(rows), 3 * rows**2)
    assert not is_inside_transform()


def test_vjp_may_be_pulled_back_several_times() -> None:
    phi = make_phi()
    _, pull_back = inner_vjp(lambda p: inner_gradient(loss_of, p), phi)
    _, expected = torch.func.vjp(torch.func.grad(loss_of), phi)
    for scale in (1.0, 2.0):
        direction = {name: scale * value for name, value in phi.items()}
        found = pull_back(direction)
        torch.testing.assert_close(found, expected(direction)[0])


class Negate(torch.autograd.Function):
    """A classic function: its context is not set up by a separate method, so `torch.func` refuses it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


def test_classic_autograd_function_has_the_gradient_that_it_defines() -> None:
    phi = make_phi(requires_grad=True)
    gradient = inner_gradient(lambda p: Negate.apply(p["a"].square()).sum(), phi)
    torch.testing.assert_close(gradient["a"], -2 * phi["a"])
    (second,) = torch.autograd.grad(gradient["a"].sum(), [phi["a"]])
    torch.testing.assert_close(second, torch.full_like(phi["a"], -2))


def test_packed_sequences_have_second_derivatives() -> None:
    lstm = nn.LSTM(1, 2, batch_first=True).double()
    x = torch.rand(3, 4, 1, dtype=torch.float64)
    phi = {name: value.detach().requires_grad_() for name, value in lstm.named_parameters()}

    def loss(p: Phi) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 3, 2]), batch_first=True)
        outputs, _ = torch.func.functional_call(lstm, p, (packed,))
        return outputs.data.square().sum()

    def first(weight: Tensor) -> Tensor:
        return inner_gradient(loss, phi | {"weight_hh_l0": weight})["weight_hh_l0"]

    assert torch.autograd.gradcheck(first, (phi["weight_hh_l0"],))
