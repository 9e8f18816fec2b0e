"""The contrastive loss, compared with two linear tasks by hand, with MAML and with higher."""

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

from distmeta.algorithms.contrastive import Contrastive
from distmeta.compute.execution import shard_gradient
from distmeta.compute.gradient import unroll
from distmeta.protocols import Batch, Episode

RATE = 0.1
MARGIN = 0.5
CONTRAST = {"type": "contrastive", "inner_lr": 0.1, "inner_steps": 2, "margin": 0.6, "weight": 3.0}


class Line:
    """y = w x. With one parameter, an inner step on one point gives w (1 − 2αx²) + 2αxy."""

    adaptable = ("model.w",)
    head_init = "linear"
    head = ()

    def __call__(self, phi, x):
        return phi["model.w"] * x

    def begin(self, theta, support=None, ways=None):
        return dict(theta)


def score_line(outputs, batch):
    return (outputs - batch.y).square().mean(), {"error": (outputs - batch.y).abs().mean()}


def build_pair(*points: tuple[float, float]) -> Episode:
    """Build episodes of two tasks from four points: support and query of task 1, support and query of task 2."""
    x, y = torch.tensor(points, dtype=torch.float64).reshape(2, 2, 1, 1, 2).unbind(-1)
    return Episode(Batch(x[:, 0], y[:, 0]), Batch(x[:, 1], y[:, 1]))


def compute_by_hand(w: float, points, weight: float, query_weight: float) -> tuple[float, float, dict]:
    """Return the loss, its derivative in w, and the metrics. Every φ is a w + b."""
    a = [1 - 2 * RATE * x * x for x, _ in points]
    b = [2 * RATE * x * y for x, y in points]
    phi = [a[i] * w + b[i] for i in range(4)]
    losses = [(phi[s] * points[s + 1][0] - points[s + 1][1]) ** 2 for s in (0, 2)]
    slopes = [2 * (phi[s] * points[s + 1][0] - points[s + 1][1]) * points[s + 1][0] * a[s] for s in (0, 2)]
    within = [abs(phi[s] - phi[s + 1]) for s in (0, 2)]
    value = query_weight * sum(losses) / 2 + weight * sum(within) / 2
    slope = query_weight * sum(slopes) / 2
    for s in (0, 2):
        slope += weight * (1 if phi[s] > phi[s + 1] else -1) * (a[s] - a[s + 1]) / 2
    between = []
    for i in (0, 1):
        for j in (2, 3):
            between.append(abs(phi[i] - phi[j]))
            if between[-1] < MARGIN:
                value += weight * (MARGIN - between[-1]) / 4
                slope -= weight * (1 if phi[i] > phi[j] else -1) * (a[i] - a[j]) / 4
    return value, slope, {"loss": losses, "within": within, "between": [sum(between) / 4] * 2}


@pytest.mark.parametrize(("weight", "query_weight"), [(1.0, 0.0), (0.3, 1.0), (0.0, 2.0)])
def test_two_linear_tasks_match_computation_by_hand(weight: float, query_weight: float) -> None:
    points = [(1.0, 0.4), (0.5, 1.5), (-1.5, 0.7), (2.0, -2.0)]
    algorithm = Contrastive(
        Line(), score_line, inner_lr=RATE, margin=MARGIN, weight=weight, query_weight=query_weight
    )
    theta = {"model.w": torch.tensor(0.8, dtype=torch.float64)}

    def meta_loss(theta):
        value, metrics = algorithm.meta_loss(theta, build_pair(*points), unroll, score_line)
        return value, (value, metrics)

    grad, (value, metrics) = torch.func.grad(meta_loss, has_aux=True)(theta)
    expected, slope, expected_metrics = compute_by_hand(0.8, points, weight, query_weight)
    is_within_margin = [gap < MARGIN for gap in compute_gaps(0.8, points)]
    assert any(is_within_margin)
    assert not all(is_within_margin)
    assert float(value) == pytest.approx(expected, rel=1e-12)
    assert float(grad["model.w"]) == pytest.approx(slope, rel=1e-12)
    assert set(metrics) == {"loss", "error", "within", "between"}
    for name, rows in expected_metrics.items():
        assert metrics[name].tolist() == pytest.approx(rows, rel=1e-12)


def compute_gaps(w: float, points) -> list[float]:
    phi = [(1 - 2 * RATE * x * x) * w + 2 * RATE * x * y for x, y in points]
    return [abs(phi[i] - phi[j]) for i in (0, 1) for j in (2, 3)]


@pytest.mark.parametrize("kind", ["mlp", "conv4"])
def test_weight_zero_equals_maml(kind: str) -> None:
    options = {"inner_lr": 0.1, "inner_steps": 2}
    s = build_setting({"type": "contrastive", "weight": 0.0, **options}, kind)
    assert distance(gradient(s), maml_gradient(kind, **options)) <= 1e-12


@pytest.mark.parametrize("adapt", ["all", "body"])
def test_gradient_equals_finite_differences(adapt: str) -> None:
    slope, exact = compute_slopes(build_setting(CONTRAST | {"adapt": adapt}))
    assert slope == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "conv4"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_gradient_equals_higher(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    higher = pytest.importorskip("higher")
    s = build_setting(CONTRAST, kind, dtype)
    net = s.problem.model.module
    inner = torch.optim.SGD(net.parameters(), lr=0.1)

    def adapt(x, y):
        with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, optimizer):
            for _ in range(2):
                optimizer.step(loss(fnet(x), y))
            return fnet, torch.cat([p.flatten() for p in fnet.parameters()])

    data = list(iterate_tasks(s.episodes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from higher
        for pair_of_tasks in (data[:2], data[2:]):
            total = 0.0
            adapted = []
            for x_s, y_s, x_q, y_q in pair_of_tasks:
                fnet, phi_support = adapt(x_s, y_s)
                _, phi_query = adapt(x_q, y_q)
                total = total + loss(fnet(x_q), y_q) + 3.0 * (phi_support - phi_query).norm()
                adapted.append((phi_support, phi_query))
            gaps = [(a - b).norm() for a in adapted[0] for b in adapted[1]]
            total = total + 2 * 3.0 * sum(torch.relu(0.6 - gap) for gap in gaps) / 4
            total.backward()
    theirs = {"model." + name: p.grad for name, p in net.named_parameters()}
    assert distance(gradient(s), theirs) <= tolerance


def test_vmap_equals_loop_through_convolutions() -> None:
    s = build_setting(CONTRAST, "conv4")
    assert distance(gradient(s), gradient(s, execution=VMAP)) <= 1e-9


def test_metrics_have_one_value_per_task() -> None:
    s = build_setting({"type": "contrastive", "inner_lr": 0.1})
    metrics = shard_gradient(
        s.problem.algorithm, s.problem.score("train"), s.theta, s.episodes, s.ids, LOOP
    ).metrics
    assert {name: column.shape for name, column in metrics.items()} == dict.fromkeys(
        ("loss_after", "loss_before", "within_after", "between_after"), (4,)
    )
    assert metrics["between_after"][0] == metrics["between_after"][1]


@pytest.mark.parametrize("execution", [LOOP, VMAP])
def test_equal_tasks_give_no_nan(execution) -> None:
    """The same task twice, with its support set as query set: every distance is 0."""
    s = build_setting({"type": "contrastive", "inner_lr": 0.1, "query_weight": 0.0, "weight": 1.0})
    same = Batch(*(leaf[:1].expand(4, *leaf.shape[1:]) for leaf in s.episodes.support))
    result = shard_gradient(
        s.problem.algorithm, s.problem.score("train"), s.theta, Episode(same, same), s.ids, execution
    )
    assert result.tasks == 4
    assert all(bool((value == 0).all()) for value in result.gradient.values())
