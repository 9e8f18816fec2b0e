"""MAML's meta-gradient, compared with higher and TorchOpt."""

from __future__ import annotations

import warnings

import pytest
import torch
from oracles import KINDS, Setting, build_setting, distance, gradient, iterate_tasks, loss

from distmeta.protocols import Theta

RATE = 0.1
STEPS = 3
MAML = {"type": "maml", "inner_lr": RATE, "inner_steps": STEPS}


def compute_with_higher(s: Setting) -> Theta:
    import higher

    net = s.problem.model.module
    inner = torch.optim.SGD(net.parameters(), lr=RATE)
    for x_s, y_s, x_q, y_q in iterate_tasks(s.episodes):
        with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, optimizer):
            for _ in range(STEPS):
                optimizer.step(loss(fnet(x_s), y_s))
            loss(fnet(x_q), y_q).backward()
    return {"model." + name: p.grad for name, p in net.named_parameters()}


def compute_with_torchopt(s: Setting) -> Theta:
    import torchopt

    net = s.problem.model.module
    start = dict(net.named_parameters())
    inner = torchopt.MetaSGD(net, lr=RATE)
    saved_net = torchopt.extract_state_dict(net, by="reference")
    saved_inner = torchopt.extract_state_dict(inner, by="reference")
    for x_s, y_s, x_q, y_q in iterate_tasks(s.episodes):
        for _ in range(STEPS):
            inner.step(loss(net(x_s), y_s))
        loss(net(x_q), y_q).backward()
        torchopt.recover_state_dict(net, saved_net)
        torchopt.recover_state_dict(inner, saved_inner)
    return {"model." + name: p.grad for name, p in start.items()}


PEERS = {"higher": compute_with_higher, "torchopt": compute_with_torchopt}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_meta_gradient_equals_that_of_peers(
    peer: str, kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the peers
        pytest.importorskip(peer)
        theirs = PEERS[peer](build_setting(MAML, kind, dtype))
    assert distance(gradient(build_setting(MAML, kind, dtype)), theirs) <= tolerance


def test_first_order_equals_the_query_gradient_at_phi() -> None:
    s = build_setting(MAML | {"first_order": True}, dtype=torch.float32)

    def loss_at(phi: Theta, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss(s.problem.model(phi, x), y)

    expected = {name: torch.zeros_like(value) for name, value in s.theta.items()}
    for x_s, y_s, x_q, y_q in iterate_tasks(s.episodes):
        phi = s.theta
        for _ in range(STEPS):
            step = torch.func.grad(loss_at)(phi, x_s, y_s)
            phi = {name: phi[name] - RATE * step[name] for name in phi}
        query_gradient = torch.func.grad(loss_at)(phi, x_q, y_q)
        expected = {name: expected[name] + query_gradient[name] for name in expected}
    for name, value in gradient(s).items():
        torch.testing.assert_close(value, expected[name])
