"""ANIL and BOIL: MAML with `adapt: head` and `adapt: body`, compared with TorchOpt."""

from __future__ import annotations

import warnings

import pytest
import torch
from oracles import build_setting, distance, gradient, iterate_tasks, loss, maml_gradient
from torch import nn

from distmeta.compute.gradient import unroll
from distmeta.protocols import Batch

STEPS = 3
RATE = 0.1
OPTIONS = {"type": "maml", "inner_lr": RATE, "inner_steps": STEPS}


@pytest.mark.parametrize("kind", ["mlp", "conv4"])
def test_adapting_all_parameters_equals_maml(kind: str) -> None:
    ours = gradient(build_setting(OPTIONS | {"adapt": "*"}, kind))
    theirs = maml_gradient(kind, inner_lr=RATE, inner_steps=STEPS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", ["mlp", "conv4"])
@pytest.mark.parametrize("adapt", ["head", "body"])
def test_only_the_selected_part_is_adapted(adapt: str, kind: str) -> None:
    s = build_setting(OPTIONS | {"adapt": adapt}, kind)
    support = Batch(*(leaf[0] for leaf in s.episodes.support))
    phi = unroll(s.problem.algorithm, s.theta, support).phi
    for name in s.theta:
        is_adapted = (name in s.problem.model.head) == (adapt == "head")
        assert torch.equal(phi[name], s.theta[name]) != is_adapted, name


@pytest.mark.parametrize("kind", ["mlp", "conv4"])
@pytest.mark.parametrize("adapt", ["head", "body"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_gradient_equals_torchopt(adapt: str, kind: str, dtype: torch.dtype, tolerance: float) -> None:
    pytest.importorskip("torchopt")
    s = build_setting(OPTIONS | {"adapt": adapt}, kind, dtype)
    net = s.problem.model.module
    start = dict(net.named_parameters())
    part = select_part(net, adapt)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from TorchOpt
        import torchopt

        inner = torchopt.MetaSGD(part, lr=RATE)
        saved = [torchopt.extract_state_dict(piece, by="reference") for piece in (net, inner)]
        for x_s, y_s, x_q, y_q in iterate_tasks(s.episodes):
            for _ in range(STEPS):
                inner.step(loss(net(x_s), y_s))
            loss(net(x_q), y_q).backward()
            torchopt.recover_state_dict(net, saved[0])
            torchopt.recover_state_dict(inner, saved[1])
    theirs = {"model." + name: p.grad for name, p in start.items()}
    ours = gradient(s)
    assert distance(ours, theirs) <= tolerance
    assert all(bool(value.any()) for value in ours.values())


def select_part(net: nn.Module, adapt: str) -> nn.Module:
    """Return the head or the body. It shares its layers with the network."""
    if isinstance(net, nn.Sequential):
        return net[-1] if adapt == "head" else nn.Sequential(*list(net.children())[:-1])
    return net.get_submodule("head" if adapt == "head" else "blocks")
