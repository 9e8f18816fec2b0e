"""CAVIA, compared with the paper's networks written out by hand and with TorchOpt."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import tree
from oracles import TASKS, VMAP, build_setting, distance, gradient, iterate_tasks, loss
from torch import nn

from distmeta.compute.gradient import unroll
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.protocols import Batch
from distmeta.runtime.problem import build_problem

RATE = 0.5
STEPS = 2
SIZE = 4
CAVIA = {"type": "cavia", "inner_lr": RATE, "inner_steps": STEPS, "context": SIZE}


def adapt_context(forward, theta, x_s, y_s, first_order: bool = False) -> torch.Tensor:
    """Return the context after the inner loop, computed with plain autograd."""
    context = torch.zeros(SIZE, dtype=torch.float64, requires_grad=True)
    for _ in range(STEPS):
        (step,) = torch.autograd.grad(loss(forward(theta, context, x_s), y_s), context, create_graph=True)
        context = context - RATE * (step.detach() if first_order else step)
    return context


def gradient_by_hand(s, forward, first_order: bool = False):
    leaves = {name: value.clone().requires_grad_() for name, value in s.theta.items()}
    total = 0.0
    for x_s, y_s, x_q, y_q in iterate_tasks(s.episodes):
        context = adapt_context(forward, leaves, x_s, y_s, first_order)
        total = total + loss(forward(leaves, context, x_q), y_q)
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def run_concatenating_network(theta, context: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The paper's regressor: the context parameters are additional inputs of the first layer."""
    x = torch.cat([x, context.expand(len(x), -1)], 1)
    weight = torch.cat([theta["model.1.weight"], theta["context.weight"]], 1)
    x = torch.tanh(nn.functional.linear(x, weight, theta["model.1.bias"]))
    x = torch.tanh(nn.functional.linear(x, theta["model.3.weight"], theta["model.3.bias"]))
    return nn.functional.linear(x, theta["model.5.weight"], theta["model.5.bias"])


def run_film_network(theta, context: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The paper's classifier: the third convolution's normalized maps are scaled and shifted before the ReLU."""
    for block in range(4):
        x = nn.functional.conv2d(x, theta[f"model.blocks.{block}.0.weight"], stride=2, padding=1)
        scale, shift = (theta[f"model.blocks.{block}.1.{kind}"] for kind in ("weight", "bias"))
        x = nn.functional.batch_norm(x, None, None, scale, shift, training=True)
        if block == 2:
            scale, shift = (theta["context.weight"] @ context)[:, None, None].chunk(2)
            x = (1 + scale) * x + shift
        x = torch.relu(x)
    return nn.functional.linear(x.mean((2, 3)), theta["model.head.weight"], theta["model.head.bias"])


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(
    ("kind", "forward"), [("mlp", run_concatenating_network), ("conv4", run_film_network)]
)
def test_gradient_equals_the_network_of_the_paper(kind: str, forward, first_order: bool) -> None:
    s = build_setting(CAVIA | {"first_order": first_order}, kind)
    assert s.theta["context.weight"].shape == ((16, SIZE))
    ours = gradient(s)
    assert distance(ours, gradient_by_hand(s, forward, first_order)) <= 1e-9
    assert distance(ours, gradient(s, execution=VMAP)) <= 1e-9
    assert all(bool(value.any()) for value in ours.values())


class Context(nn.Module):
    """The only parameter that TorchOpt's inner optimizer updates."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.c = nn.Parameter(torch.zeros(SIZE, dtype=dtype))


@pytest.mark.parametrize(
    ("kind", "forward"), [("mlp", run_concatenating_network), ("conv4", run_film_network)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_gradient_equals_torchopt(kind: str, forward, dtype: torch.dtype, tolerance: float) -> None:
    pytest.importorskip("torchopt")
    s = build_setting(CAVIA, kind, dtype)
    leaves = {name: value.clone().requires_grad_() for name, value in s.theta.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from TorchOpt
        import torchopt

        for x_s, y_s, x_q, y_q in iterate_tasks(s.episodes):
            context = Context(dtype)
            inner = torchopt.MetaSGD(context, lr=RATE)
            for _ in range(STEPS):
                inner.step(loss(forward(leaves, context.c, x_s), y_s))
            loss(forward(leaves, context.c, x_q), y_q).backward()
    assert distance(gradient(s), {name: leaf.grad for name, leaf in leaves.items()}) <= tolerance


def test_inner_loop_changes_only_the_context() -> None:
    s = build_setting(CAVIA)
    algorithm = s.problem.algorithm
    support = Batch(*(leaf[0] for leaf in s.episodes.support))
    start = algorithm.begin(s.theta, support)
    end = unroll(algorithm, s.theta, support)
    assert bool((start.context == 0).all())
    assert start.context.shape == end.context.shape == (SIZE,)
    assert bool((end.context != 0).all())
    model = {name: value for name, value in s.theta.items() if name.startswith("model.")}
    for state in (start, end):
        assert set(state.phi) == set(model)
        assert all(torch.equal(state.phi[name], value) for name, value in model.items())
    torch.testing.assert_close(
        algorithm.predict(s.theta, start, support.x), s.problem.model(model, support.x)
    )


def test_rate_zero_adapts_nothing() -> None:
    s = build_setting(CAVIA, "conv4")
    algorithm = s.problem.algorithm
    algorithm.inner_lr = 0.0
    for t in range(TASKS):
        x, y = (leaf[t] for leaf in s.episodes.support)
        end = unroll(algorithm, s.theta, Batch(x, y))
        assert bool((end.context == 0).all())
        assert torch.equal(algorithm.predict(s.theta, end, x), s.problem.model(s.theta, x))


@pytest.mark.parametrize(
    ("model", "layer", "weight"),
    [
        ({"norm": "batch"}, None, "model.blocks.2.1.weight"),
        ({"norm": "group"}, None, "model.blocks.2.1.weight"),
        ({"norm": "none"}, None, "model.blocks.2.0.weight"),
        ({"norm": "batch"}, "blocks.1.1", "model.blocks.1.1.weight"),
        ({"norm": "batch"}, "head", "model.head.weight"),
        ({"norm": "batch", "freeze": "blocks.*"}, None, "model.head.weight"),
    ],
)
def test_context_enters_the_expected_layer(model, layer: str | None, weight: str) -> None:
    s = build_setting(CAVIA | {"layer": layer}, "conv4", **model)
    assert s.problem.algorithm.weight == weight
    assert distance(gradient(s), gradient(s, execution=VMAP)) <= 1e-9


def test_film_on_a_convolution_equals_film_on_its_maps() -> None:
    s = build_setting(CAVIA, "conv4", norm="none")
    x = s.episodes.query.x[0]
    context = torch.randn(SIZE, dtype=torch.float64)
    scale, shift = (s.theta["context.weight"] @ context)[:, None, None].chunk(2)
    state = s.problem.algorithm.begin(s.theta, None)._replace(context=context)
    outputs = s.problem.algorithm.predict(s.theta, state, x)
    third = s.problem.model.module.get_submodule("blocks.2.0")
    handle = third.register_forward_hook(lambda module, inputs, maps: (1 + scale) * maps + shift)
    torch.testing.assert_close(outputs, s.problem.model(s.theta, x))
    handle.remove()


def test_head_may_be_prototype_but_not_shared() -> None:
    s = build_setting(CAVIA, "conv4", head="prototype")
    assert "model.head.weight" not in s.theta
    assert distance(gradient(s), gradient(s, execution=VMAP)) <= 1e-9
    with pytest.raises(InputError, match=r"model\.head: got shared for cavia, expected linear or prototype"):
        build_setting(CAVIA, "conv4", head="shared")
    with pytest.raises(InputError, match=r"algorithm\.layer: got 'head'"):  # theta has no head
        build_setting(CAVIA | {"layer": "head"}, "conv4", head="prototype")


def test_missing_layer_is_an_error() -> None:
    message = r"algorithm\.layer: got 'blocks.2.2', expected a trainable .*; did you mean 'blocks.2.1'\?"
    with pytest.raises(InputError, match=message):
        build_setting(CAVIA | {"layer": "blocks.2.2"}, "conv4")
    job = tree(CAVIA)
    job["model"] |= {"freeze": "*.bias"}
    with pytest.raises(InputError, match=r"algorithm\.layer: got null, and the model has no trainable"):
        build_problem(Job.parse(job))
