"""MAML's meta-gradient equals that of peers; limits tie it to what is known."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import tree
from torch import nn

from distmeta.compute.execution import Execution, shard_gradient
from distmeta.config.job import Job
from distmeta.runtime.problem import build_problem
from distmeta.seeding import task_ids

LR, STEPS = 0.1, 3
MODELS = {
    "mlp": {
        "model": {"type": "mlp", "hidden": [16, 16], "activation": "tanh"},
        "tasks": {"type": "sinusoid", "shots": 5, "queries": 5},
    },
    "conv4": {
        "model": {"type": "conv4", "width": 8, "pool": "stride"},
        "tasks": {"type": "digits", "ways": 3, "shots": 1, "queries": 3},
    },
}


def setting(kind: str, dtype: torch.dtype):
    algorithm = {"type": "maml", "inner_lr": LR, "inner_steps": STEPS}
    problem = build_problem(Job.parse(tree(algorithm, **MODELS[kind])))
    theta = {name: value.to(dtype) for name, value in problem.init().items()}
    problem.model.to(dtype=dtype)
    ids = task_ids(0, "train", 0, 3)
    episodes = problem.family.draw("train", ids)
    episodes = episodes._replace(
        support=episodes.support._replace(
            x=episodes.support.x.to(dtype), y=as_target(episodes.support.y, dtype)
        ),
        query=episodes.query._replace(x=episodes.query.x.to(dtype), y=as_target(episodes.query.y, dtype)),
    )
    return problem, theta, episodes, ids


def as_target(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return y.to(dtype) if y.is_floating_point() else y


def ours(kind: str, dtype: torch.dtype) -> torch.Tensor:
    problem, theta, episodes, ids = setting(kind, dtype)
    result = shard_gradient(
        problem.algorithm, problem.score("train"), theta, episodes, ids, Execution("loop", 1)
    )
    return torch.cat([value.flatten() for value in result.gradient.values()])


def tasks(episodes):
    for t in range(3):
        yield (episodes.support.x[t], episodes.support.y[t]), (episodes.query.x[t], episodes.query.y[t])


def loss_of(kind: str, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(outputs, y) if kind == "mlp" else nn.functional.cross_entropy(outputs, y)


def with_higher(kind: str, dtype: torch.dtype) -> torch.Tensor:
    import higher

    problem, _, episodes, _ = setting(kind, dtype)
    net = problem.model.module
    inner = torch.optim.SGD(net.parameters(), lr=LR)
    for (x_s, y_s), (x_q, y_q) in tasks(episodes):
        with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, optimizer):
            for _ in range(STEPS):
                optimizer.step(loss_of(kind, fnet(x_s), y_s))
            loss_of(kind, fnet(x_q), y_q).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def with_torchopt(kind: str, dtype: torch.dtype) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchopt

    problem, _, episodes, _ = setting(kind, dtype)
    net = problem.model.module
    inner = torchopt.MetaSGD(net, lr=LR)
    start = (
        torchopt.extract_state_dict(net, by="reference"),
        torchopt.extract_state_dict(inner, by="reference"),
    )
    parameters = list(net.parameters())
    for (x_s, y_s), (x_q, y_q) in tasks(episodes):
        for _ in range(STEPS):
            inner.step(loss_of(kind, net(x_s), y_s))
        loss_of(kind, net(x_q), y_q).backward()
        torchopt.recover_state_dict(net, start[0])
        torchopt.recover_state_dict(inner, start[1])
    return torch.cat([p.grad.flatten() for p in parameters])


@pytest.mark.parametrize("peer", [with_higher, with_torchopt])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_meta_gradient_equals_a_peers(peer, kind: str, dtype: torch.dtype, tolerance: float) -> None:
    pytest.importorskip(peer.__name__.removeprefix("with_"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers'
        theirs = peer(kind, dtype)
    mine = ours(kind, dtype)
    assert float((mine - theirs).norm() / theirs.norm()) <= tolerance


def test_first_order_is_the_query_gradient_at_phi() -> None:
    algorithm = {"type": "maml", "inner_lr": LR, "inner_steps": STEPS, "first_order": True}
    problem = build_problem(Job.parse(tree(algorithm, **MODELS["mlp"])))
    theta, ids = problem.init(), task_ids(0, "train", 0, 1)
    episodes = problem.family.draw("train", ids)
    x, y, x_q, y_q = (v[0] for v in (*episodes.support, *episodes.query))

    def loss(p, x, y):
        return nn.functional.mse_loss(problem.model(p, x), y)

    phi = theta
    for _ in range(STEPS):
        step = torch.func.grad(loss)(phi, x, y)
        phi = {name: phi[name] - LR * step[name] for name in phi}
    expected = torch.func.grad(loss)(phi, x_q, y_q)
    result = shard_gradient(
        problem.algorithm, problem.score("train"), theta, episodes, ids, Execution("loop", 1)
    )
    for name in theta:
        torch.testing.assert_close(result.gradient[name], expected[name])
