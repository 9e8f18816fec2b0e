"""The gradient-norm penalty, compared with MAML, with TorchOpt and with finite differences."""

from __future__ import annotations

import warnings

import pytest
import torch
from oracles import (
    LOOP,
    VMAP,
    build_setting,
    compute_slopes,
    distance,
    gradient,
    iterate_tasks,
    loss,
    maml_gradient,
)

from distmeta.compute.execution import shard_gradient

OPTIONS = {"inner_lr": 0.1, "inner_steps": 3}


def build_small(kind: str = "mlp", lam: float = 0.5, dtype: torch.dtype = torch.float64):
    return build_setting({"type": "gradient-norm", "lam": lam, **OPTIONS}, kind, dtype)


@pytest.mark.parametrize("kind", ["mlp", "conv4"])
def test_no_penalty_equals_maml(kind: str) -> None:
    assert distance(gradient(build_small(kind, 0.0)), maml_gradient(kind, **OPTIONS)) <= 1e-12


def test_gradient_equals_finite_differences() -> None:
    slope, exact = compute_slopes(build_small())
    assert slope == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "conv4"])
def test_penalty_changes_gradient_and_vmap_equals_loop(kind: str) -> None:
    s = build_small(kind)
    assert distance(gradient(s), maml_gradient(kind, **OPTIONS)) > 0.01
    assert distance(gradient(s), gradient(s, execution=VMAP)) <= 1e-9


@pytest.mark.parametrize("kind", ["mlp", "conv4"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_gradient_equals_torchopt(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    pytest.importorskip("torchopt")
    s = build_small(kind, dtype=dtype)
    net = s.problem.model.module
    start = dict(net.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from TorchOpt
        import torchopt

        inner = torchopt.MetaSGD(net, lr=0.1)
        saved = [torchopt.extract_state_dict(part, by="reference") for part in (net, inner)]
        for x_s, y_s, x_q, y_q in iterate_tasks(s.episodes):
            for _ in range(3):
                inner.step(loss(net(x_s), y_s))
            query = loss(net(x_q), y_q)
            parts = torch.autograd.grad(query, list(dict(net.named_parameters()).values()), create_graph=True)
            (query + 0.25 * sum(part.square().sum() for part in parts)).backward()
            torchopt.recover_state_dict(net, saved[0])
            torchopt.recover_state_dict(inner, saved[1])
    theirs = {"model." + name: p.grad for name, p in start.items()}
    assert distance(gradient(s), theirs) <= tolerance


def test_metrics_are_the_query_loss_and_the_gradient_norm() -> None:
    s = build_small(lam=5.0)
    args = (s.problem.score("train"), s.theta, s.episodes, s.ids, LOOP)
    ours = shard_gradient(s.problem.algorithm, *args).metrics
    plain = build_setting({"type": "maml", **OPTIONS})
    theirs = shard_gradient(plain.problem.algorithm, *args).metrics
    torch.testing.assert_close(torch.tensor(ours["loss_after"]), torch.tensor(theirs["loss_after"]))
    assert set(ours) == set(theirs) | {"gradient_norm_after"}
    phi = s.problem.algorithm.begin(s.theta, None)
    x_s, y_s, x_q, y_q = next(iterate_tasks(s.episodes))
    for _ in range(3):
        step = torch.func.grad(lambda p: loss(s.problem.model(p, x_s), y_s))(phi)
        phi = {name: phi[name] - 0.1 * step[name] for name in phi}
    final = torch.func.grad(lambda p: loss(s.problem.model(p, x_q), y_q))(phi)
    norm = torch.cat([value.flatten() for value in final.values()]).norm()
    assert ours["gradient_norm_after"][0] == pytest.approx(float(norm), rel=1e-9)
