"""MAML++: equal to MAML without its remedies; with them, compared with higher and the authors' schedule."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch
from oracles import (
    LOOP,
    VMAP,
    add_noise,
    build_setting,
    compute_slopes,
    distance,
    gradient,
    iterate_tasks,
    loss,
    maml_gradient,
)
from torch import nn

from distmeta.algorithms.maml import MAML
from distmeta.algorithms.maml_plus_plus import compute_step_weights
from distmeta.compute.scoring import score_tasks

STEPS = 3
PLUS = {"type": "maml-plus-plus", "inner_lr": 0.125, "inner_steps": STEPS, "msl_steps": 100}


@pytest.mark.parametrize("steps", [1, STEPS])
def test_without_remedies_equals_maml(steps: int) -> None:
    """No norms, equal rates, only the loss of the last step."""
    s = build_setting(PLUS | {"inner_steps": steps, "msl_steps": 0})
    theirs = maml_gradient(inner_lr=0.125, inner_steps=steps)
    assert distance(gradient(s, s.problem.algorithm.at(0)), theirs) <= 1e-12
    assert distance(gradient(s, s.problem.algorithm), theirs) <= 1e-12
    assert not any(name.startswith("norm.") for name in s.theta)
    assert {tuple(v.shape) for k, v in s.theta.items() if k.startswith("inner_lr.")} == {(steps,)}


def test_multi_step_loss_of_one_step_equals_maml() -> None:
    s = build_setting(PLUS | {"inner_steps": 1})
    theirs = maml_gradient(inner_lr=0.125, inner_steps=1)
    assert all(distance(gradient(s, s.problem.algorithm.at(step)), theirs) <= 1e-12 for step in (0, 50, 100))


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_equal_norms_per_step_equal_maml_with_unadapted_norms(norm: str) -> None:
    s = build_setting(PLUS, "conv4", norm=norm)
    plain = build_setting({"type": "maml", "inner_lr": 0.125, "inner_steps": STEPS}, "conv4", norm=norm)
    maml = plain.problem.algorithm
    assert isinstance(maml, MAML)
    maml.names = s.problem.algorithm.names
    theirs = gradient(plain)
    ours = gradient(s)
    rows = {name: value for name, value in ours.items() if name.startswith("norm.")}
    assert len(rows) == 8
    assert all(value.shape == (STEPS + 1, 8) for value in rows.values())
    summed = ours | {name.replace("norm.", "model."): value.sum(0) for name, value in rows.items()}
    assert set(theirs) <= set(summed)
    assert distance(summed, theirs) <= 1e-9
    assert distance(ours, gradient(s, execution=VMAP)) <= 1e-9


def test_every_step_has_its_own_norms() -> None:
    """φ_k has row k of the norms: φ_0 has row 0, and the query set is predicted with row K."""
    s = build_setting(PLUS, "conv4")
    algorithm = s.problem.algorithm
    key = "model.blocks.1.1.bias"
    theta = add_noise(s.theta, prefix="norm.")
    x, y = (leaf[0] for leaf in s.episodes.support)
    support = type(s.episodes.support)(x, y)
    phi = algorithm.begin(theta, support)
    for k in range(STEPS + 2):  # two steps more than trained, which use the last row
        assert torch.equal(phi[key], theta["norm.blocks.1.1.bias"][min(k, STEPS)])
        assert set(phi) == set(s.problem.model.adaptable)
        phi = algorithm.step(theta, phi, support, k)


def run_conv4_of_the_authors(phi, norms, statistics, k: int, x):
    """Compute conv4 by hand with the authors' batch norm (MetaBatchNormLayer), which keeps statistics for each step."""
    for n in range(4):
        x = nn.functional.conv2d(x, phi[f"model.blocks.{n}.0.weight"], stride=2, padding=1)
        mean, variance = statistics[n]
        weight = norms[f"norm.blocks.{n}.1.weight"][k]
        bias = norms[f"norm.blocks.{n}.1.bias"][k]
        x = nn.functional.batch_norm(
            x, mean[k], variance[k], weight, bias, training=True, momentum=0.1
        ).relu()
    return nn.functional.linear(x.mean((2, 3)), phi["model.head.weight"], phi["model.head.bias"])


def test_gradient_equals_batch_norm_with_running_statistics_per_step() -> None:
    """BNRS: the authors' layers collect statistics for each step, and normalise by those of the batch."""
    s = build_setting(PLUS | {"msl_steps": 0}, "conv4")
    s = s._replace(theta=add_noise(s.theta, prefix="norm."))
    theta = {name: value.clone().requires_grad_() for name, value in s.theta.items()}
    norms = {name: value for name, value in theta.items() if name.startswith("norm.")}
    rows = (STEPS + 1, 8)
    statistics = [
        (torch.zeros(rows, dtype=torch.float64), torch.ones(rows, dtype=torch.float64)) for _ in range(4)
    ]
    for x_s, y_s, x_q, y_q in iterate_tasks(s.episodes):
        phi = {name: value for name, value in theta.items() if name.startswith("model.")}
        for k in range(STEPS):
            support_loss = loss(run_conv4_of_the_authors(phi, norms, statistics, k, x_s), y_s)
            found = torch.autograd.grad(support_loss, list(phi.values()), create_graph=True)
            rates = [theta[name.replace("model.", "inner_lr.", 1)][k] for name in phi]
            phi = {
                name: value - rate * g
                for (name, value), rate, g in zip(phi.items(), rates, found, strict=True)
            }
        loss(run_conv4_of_the_authors(phi, norms, statistics, STEPS, x_q), y_q).backward()
    assert all(bool((mean != 0).all()) for mean, _ in statistics)  # all steps collected statistics
    theirs = {name: value.grad for name, value in theta.items()}
    assert distance(gradient(s), theirs) <= 1e-9


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("kind", ["mlp", "conv4"])
def test_gradient_equals_higher(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """Learned rates per tensor and step, and the multi-step loss half way through its annealing."""
    higher = pytest.importorskip("higher")
    s = build_setting(PLUS, kind, dtype, **({"norm": "none"} if kind == "conv4" else {}))
    s = s._replace(theta=add_noise(s.theta, 0.05, prefix="inner_lr."))
    algorithm = s.problem.algorithm.at(50)
    weights = (1 / 6, 1 / 6, 2 / 3)
    assert algorithm.scheduled.tolist() == pytest.approx(weights)
    net = s.problem.model.module
    names = [name for name, _ in net.named_parameters()]
    rates = [s.theta["inner_lr." + name].clone().requires_grad_() for name in names]
    inner = torch.optim.SGD([{"params": [p]} for p in net.parameters()], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from higher
        for x_s, y_s, x_q, y_q in iterate_tasks(s.episodes):
            with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, optimizer):
                total = 0.0
                for k, weight in enumerate(weights):
                    optimizer.step(loss(fnet(x_s), y_s), override={"lr": [rate[k] for rate in rates]})
                    total = total + weight * loss(fnet(x_q), y_q)
                total.backward()
    theirs = {"model." + name: p.grad for name, p in net.named_parameters()}
    theirs |= {"inner_lr." + name: rate.grad for name, rate in zip(names, rates, strict=True)}
    assert distance(gradient(s, algorithm), theirs) <= tolerance


@pytest.mark.parametrize("step", [0, 60, 1000])
def test_gradient_equals_finite_differences(step: int) -> None:
    s = build_setting(PLUS)
    algorithm = s.problem.algorithm.at(step)
    slope, exact = compute_slopes(s, algorithm)
    assert slope == pytest.approx(exact, rel=1e-6)
    assert distance(gradient(s, algorithm), gradient(s, algorithm, VMAP)) <= 1e-9


def test_step_weights_equal_those_of_the_authors_code() -> None:
    """get_per_step_loss_importance_vector of their few_shot_learning_system.py, at 5 steps and 10 epochs."""
    epoch = {e: compute_step_weights(500 * e, 5, 5000).tolist() for e in range(11)}
    assert epoch[0] == pytest.approx([0.2] * 5)
    assert epoch[1] == pytest.approx([0.18] * 4 + [0.28])
    assert epoch[5] == pytest.approx([0.1] * 4 + [0.6])
    late = compute_step_weights(4900, 5, 5000).tolist()
    assert late == pytest.approx([0.006] * 4 + [0.976])  # not less than 0.03 / 5
    assert epoch[10] == [0, 0, 0, 0, 1]
    for steps in (1, 2, 5):
        for step in range(0, 120, 7):
            weights = compute_step_weights(step, steps, 100).tolist()
            decay = step / 100 / steps
            least = 0.03 / steps
            assert weights[:-1] == pytest.approx([max(1 / steps - decay, least)] * (steps - 1)) or step >= 100
            assert weights[-1] == pytest.approx(
                min(1 / steps + decay * (steps - 1), 1 - (steps - 1) * least) if step < 100 else 1
            )
            assert sum(weights) == pytest.approx(1)


def test_derivative_order_is_annealed() -> None:
    s = build_setting(PLUS | {"first_order_steps": 10, "msl_steps": 0})
    algorithm = s.problem.algorithm
    first = maml_gradient(inner_lr=0.125, inner_steps=STEPS, first_order=True)
    second = maml_gradient(inner_lr=0.125, inner_steps=STEPS)
    assert distance(gradient(s, algorithm.at(9)), first) <= 1e-12
    assert distance(gradient(s, algorithm.at(10)), second) <= 1e-12
    assert distance(first, second) > 0.01


def test_at_does_not_change_the_algorithm() -> None:
    s = build_setting(PLUS | {"first_order_steps": 10})
    algorithm = s.problem.algorithm
    before = vars(algorithm) | {"scheduled": algorithm.scheduled.tolist()}
    other = algorithm.at(3)
    assert vars(algorithm) | {"scheduled": algorithm.scheduled.tolist()} == before
    assert other.first_order
    assert not algorithm.first_order
    assert algorithm.scheduled.tolist() == [0, 0, 1]
    again = pickle.loads(pickle.dumps(algorithm)).at(3)
    assert torch.equal(again.scheduled, other.scheduled)
    assert (again.multi_step, again.first_order) == (other.multi_step, other.first_order)
    assert other.at(1000).scheduled.tolist() == [0, 0, 1]


def test_evaluation_may_have_more_steps_than_training() -> None:
    s = build_setting(PLUS, "conv4")
    args = (s.problem.algorithm, s.problem.score("test"), s.theta, s.episodes, s.ids, LOOP)
    long = score_tasks(*args, steps=6)
    short = score_tasks(*args, steps=2)
    assert long.metrics["loss"].shape == (4, 7)
    np.testing.assert_array_equal(long.metrics["loss"][:, :3], short.metrics["loss"])


@pytest.mark.parametrize("head", ["shared", "prototype"])
def test_head_with_free_ways_has_one_rate_per_step(head: str) -> None:
    s = build_setting(PLUS, "conv4", head=head)
    assert s.theta["inner_lr.head.weight"].shape == (STEPS,)
    assert distance(gradient(s), gradient(s, execution=VMAP)) <= 1e-9
