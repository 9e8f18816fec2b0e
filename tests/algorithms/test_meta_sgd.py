"""Meta-SGD, compared with MAML for one constant rate, and with higher for a rate per parameter."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from conftest import tree
from oracles import VMAP, add_noise, build_setting, distance, gradient, iterate_tasks, loss, maml_gradient

import distmeta
from distmeta.config.job import Job
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.problem import build_problem
from distmeta.seeding import torch_generator


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "conv4"])
def test_constant_rate_equals_maml(kind: str, first_order: bool) -> None:
    options = {"inner_lr": 0.125, "inner_steps": 3, "first_order": first_order}  # exact in float32
    ours = gradient(build_setting({"type": "meta-sgd", **options}, kind))
    theirs = maml_gradient(kind, **options)
    assert set(ours) == set(theirs) | {name.replace("model.", "inner_lr.") for name in theirs}
    assert distance(ours, theirs) <= 1e-12
    assert all(bool(value.any()) for value in ours.values())


@pytest.mark.parametrize("kind", ["mlp", "conv4"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_gradient_equals_higher(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """Rates of any size and sign. In higher, every parameter group has its own rate."""
    higher = pytest.importorskip("higher")
    s = build_setting({"type": "meta-sgd", "inner_lr": 0.05, "inner_steps": 3}, kind, dtype)
    s = s._replace(theta=add_noise(s.theta, prefix="inner_lr."))
    net = s.problem.model.module
    rates = {name: s.theta["inner_lr." + name].clone().requires_grad_() for name, _ in net.named_parameters()}
    assert any(bool((rate < 0).any()) for rate in rates.values())
    inner = torch.optim.SGD([{"params": [p]} for p in net.parameters()], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from higher
        for x_s, y_s, x_q, y_q in iterate_tasks(s.episodes):
            with higher.innerloop_ctx(
                net, inner, copy_initial_weights=False, override={"lr": list(rates.values())}
            ) as (fnet, optimizer):
                for _ in range(3):
                    optimizer.step(loss(fnet(x_s), y_s))
                loss(fnet(x_q), y_q).backward()
    theirs = {"model." + name: p.grad for name, p in net.named_parameters()}
    theirs |= {"inner_lr." + name: rate.grad for name, rate in rates.items()}
    ours = gradient(s)
    assert distance(ours, theirs) <= tolerance
    for name, value in theirs.items():
        assert distance({name: ours[name]}, {name: value}) <= 10 * tolerance


def test_rates_start_as_one_draw_from_the_papers_interval() -> None:
    algorithm = build_problem(Job.parse(tree("meta-sgd"))).algorithm

    def draw_rates(seed: int) -> torch.Tensor:
        theta = algorithm.init(torch_generator(seed, "init"))
        return torch.cat([v.flatten() for name, v in theta.items() if name.startswith("inner_lr.")])

    values = [draw_rates(seed) for seed in range(20)]
    assert all(len(value.unique()) == 1 for value in values)
    assert all(0.005 <= float(value[0]) <= 0.1 for value in values)
    assert len({float(value[0]) for value in values}) == 20
    assert torch.equal(draw_rates(3), draw_rates(3))


def test_rates_may_have_another_outer_rate() -> None:
    outer = {"optimizer": "sgd", "lr": 1.0, "groups": {"inner_lr.*": {"lr": 0.01}}}
    s = build_setting({"type": "meta-sgd", "inner_lr": 0.05}, dtype=torch.float32)
    job = Job.parse(tree("meta-sgd", outer=outer))
    server = ParameterServer(s.theta, job.outer)
    moved = gradient(s)
    server.step(server.layout.flatten(moved))
    for name, value in server.theta().items():
        rate = 0.01 if name.startswith("inner_lr.") else 1.0
        torch.testing.assert_close(value, s.theta[name] - rate * moved[name])


@pytest.mark.parametrize("head", ["shared", "prototype"])
def test_head_with_free_ways_has_one_row_of_rates(head: str, workplace: Path) -> None:
    s = build_setting({"type": "meta-sgd", "inner_lr": 0.05, "inner_steps": 2}, "conv4", head=head)
    assert s.theta["inner_lr.head.weight"].shape == (1, 8)
    assert s.theta["inner_lr.head.bias"].shape == (1,)
    assert distance(gradient(s), gradient(s, execution=VMAP)) <= 1e-9
    job = tree({"type": "meta-sgd"}, model={"type": "mlp", "hidden": [16], "head": head})
    job["tasks"] = {"type": "digits", "ways": 3, "shots": 2, "queries": 3}
    run = distmeta.train(Job.parse(job)).run
    for ways in (2, 5):
        figures = distmeta.evaluate(run, [f"tasks.ways={ways}", "run.eval_tasks=4"]).figures
        assert figures["loss_after"] is not None
