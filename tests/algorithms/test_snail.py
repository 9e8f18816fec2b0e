"""SNAIL: compared with a network on whole sequences; causality, padding, other ways."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from conftest import CLASSES, tree
from torch import Tensor

from distmeta.algorithms.snail import SNAIL, convolve
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.protocols import Algorithm, Batch, Episode, Theta
from distmeta.runtime.problem import Problem, build_problem, with_score
from distmeta.seeding import task_ids
from distmeta.tasks.few_shot import ClassificationScore
from distmeta.trees import tree_map

SMALL = {"length": 8, "filters": 5, "attention": [[6, 4], [7, 3], [5, 2]], "embedding": 6}
REGRESSION = {
    "model": {"type": "mlp", "hidden": [12], "activation": "tanh"},
    "tasks": {"type": "sinusoid", "shots": 9, "queries": 4},
}


def build_setting(changes: dict[str, Any] = CLASSES, **options: Any) -> tuple[Problem, SNAIL, Theta, Episode]:
    problem = build_problem(Job.parse(tree({"type": "snail"} | SMALL | options, **changes)))
    theta = {name: value.double() for name, value in problem.init().items()}
    problem.model.to(dtype=torch.float64)
    episode = tree_map(lambda leaf: leaf[0], problem.family.draw("train", task_ids(0, "train", 0, 1)))
    episode = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, episode)
    assert isinstance(problem.algorithm, SNAIL)
    return problem, problem.algorithm, theta, episode


def predict(algorithm: Algorithm, theta: Theta, support: Batch, x: Tensor) -> Tensor:
    return algorithm.predict(theta, algorithm.begin(theta, support), x)


def run_reference(problem: Problem, theta: Theta, support: Batch, x: Tensor, labels: Tensor) -> Tensor:
    """Run the paper's network on one whole sequence per query. Return [Q, S + 1, outputs]."""

    def linear(name: str, value: Tensor) -> Tensor:
        return functional.linear(value, theta[f"{name}.weight"].T, theta[f"{name}.bias"])

    rows = []
    for row in x:
        e = linear("snail.embedding", problem.model.features(theta, torch.cat([support.x, row[None]])))
        rows.append(torch.cat([e, torch.cat([labels, torch.zeros_like(labels[:1])])], 1))
    X = torch.stack(rows)
    T = X.shape[1]
    for i in range(len(SMALL["attention"])):
        for layer in range(3 if i > 0 else 0):
            C = X.shape[2]
            weight = theta[f"snail.tc.{i}.{layer}.weight"]
            kernel = torch.stack([weight[:C].T, weight[C:].T], 2)  # [outputs, C, taps]
            padded = functional.pad(X.transpose(1, 2), (2**layer, 0))
            both = functional.conv1d(padded, kernel, theta[f"snail.tc.{i}.{layer}.bias"], dilation=2**layer)
            content, gate = both.transpose(1, 2).chunk(2, 2)
            X = torch.cat([X, torch.tanh(content) * torch.sigmoid(gate)], 2)
        query, key, value = (linear(f"snail.attention.{i}.{p}", X) for p in ("query", "key", "value"))
        read = torch.zeros_like(value)
        for t in range(T):  # a softmax by hand over the rows so far
            scores = (query[:, t : t + 1] * key[:, : t + 1]).sum(2) / math.sqrt(key.shape[2])
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            read[:, t] = (weights[..., None] * value[:, : t + 1]).sum(1)
        X = torch.cat([X, read], 2)
    return linear("snail.out", X)


@pytest.mark.parametrize("length", [8])
@pytest.mark.parametrize("changes", [CLASSES, REGRESSION], ids=["classes", "regression"])
def test_outputs_equal_the_network_on_whole_sequences(changes: dict[str, Any], length: int) -> None:
    problem, algorithm, theta, (support, query) = build_setting(changes)
    labels = support.y if changes is REGRESSION else functional.one_hot(support.y, 3).double()
    expected = run_reference(problem, theta, support, query.x, labels)[:, -1]
    torch.testing.assert_close(predict(algorithm, theta, support, query.x), expected, rtol=1e-12, atol=1e-13)


def test_earlier_rows_do_not_see_later_ones() -> None:
    _, algorithm, theta, _ = build_setting()
    generator = torch.Generator().manual_seed(0)
    s_SC = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    q_QC = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    real = torch.ones(9, dtype=torch.bool)
    changed = s_SC.clone()
    changed[5] += 1
    support, query = algorithm.read_sequences(theta, s_SC, q_QC, real)
    changed_support, changed_query = algorithm.read_sequences(theta, changed, q_QC, real)
    assert torch.equal(support[:5], changed_support[:5])
    assert all(not torch.equal(support[t], changed_support[t]) for t in range(5, 9))
    assert not torch.equal(query, changed_query)


def test_block_of_three_convolutions_sees_eight_rows() -> None:
    _, algorithm, theta, _ = build_setting()
    assert algorithm.layers == 3
    channels = theta["snail.tc.1.0.weight"].shape[0] // 2
    generator = torch.Generator().manual_seed(0)
    s_SC = torch.randn(12, channels, generator=generator, dtype=torch.float64)
    real = torch.ones(12, dtype=torch.bool)

    def sum_query(s: Tensor) -> Tensor:
        q = s.new_ones(1, channels)
        for layer in range(3):
            s, q = convolve(theta, f"snail.tc.1.{layer}", 2**layer, s, q, real)
        return q[:, channels:].sum()

    is_seen = torch.func.grad(sum_query)(s_SC).abs().sum(1) > 0
    assert is_seen.tolist() == [False] * 5 + [True] * 7  # 8 with the query itself


@pytest.mark.parametrize(("length", "layers"), [(2, 1), (6, 3), (8, 3), (9, 4), (26, 5), (101, 7)])
def test_number_of_layers_follows_from_length(length: int, layers: int) -> None:
    assert build_setting(length=length)[1].layers == layers


def test_default_is_the_papers_omniglot_network() -> None:
    """5-way 1-shot: 64 + 5 channels, + 32, + 3·128, + 128, + 3·128, + 256."""
    job = tree({"type": "snail", "length": 6}, **CLASSES)
    job["tasks"] = job["tasks"] | {"ways": 5, "shots": 1}
    theta = build_problem(Job.parse(job)).init()
    assert theta["snail.embedding.weight"].shape == (12, 64)
    assert theta["snail.tc.1.0.weight"].shape == (2 * (69 + 32), 2 * 128)
    assert theta["snail.attention.1.key.weight"].shape == (69 + 32 + 3 * 128, 256)
    assert theta["snail.out.weight"].shape == (69 + 32 + 384 + 128 + 384 + 256, 5)
    assert "model.4.weight" not in theta  # the head is not used


def test_padding_is_ignored_wherever_it_is() -> None:
    _, algorithm, theta, (support, query) = build_setting()
    noise = torch.randn(3, *support.x.shape[1:], dtype=torch.float64)
    pad = torch.tensor([-1])
    filled = Batch(
        torch.cat([noise[:1], support.x[:2], noise[1:2], support.x[2:], noise[2:]]),
        torch.cat([pad, support.y[:2], pad, support.y[2:], pad]),
    )
    expected = predict(algorithm, theta, support, query.x)
    torch.testing.assert_close(predict(algorithm, theta, filled, query.x), expected, rtol=1e-12, atol=1e-13)
    predict_each = torch.func.vmap(lambda s, x: predict(algorithm, theta, s, x))
    two = Batch(torch.stack([filled.x, filled.x.flip(0)]), torch.stack([filled.y, filled.y.flip(0)]))
    torch.testing.assert_close(
        predict_each(two, torch.stack([query.x] * 2))[0], expected, rtol=1e-12, atol=1e-13
    )


def test_padding_has_a_finite_gradient() -> None:
    problem, algorithm, theta, (support, query) = build_setting()
    filled = Batch(support.x, torch.cat([torch.full((2,), -1), support.y[2:]]))

    def loss(theta: Theta) -> Tensor:
        return problem.score("train")(predict(algorithm, theta, filled, query.x), query)[0]

    gradient = torch.func.grad(loss)(theta)
    assert all(bool(torch.isfinite(g).all()) and bool(g.any()) for g in gradient.values())


def test_queries_do_not_see_each_other() -> None:
    _, algorithm, theta, (support, query) = build_setting()
    together = predict(algorithm, theta, support, query.x)
    alone = torch.cat([predict(algorithm, theta, support, row[None]) for row in query.x])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-13)


def test_order_of_the_support_matters() -> None:
    _, algorithm, theta, (support, query) = build_setting()
    flipped = Batch(support.x.flip(0), support.y.flip(0))
    assert not torch.allclose(
        predict(algorithm, theta, support, query.x), predict(algorithm, theta, flipped, query.x)
    )


def test_evaluation_may_have_fewer_ways_but_not_more() -> None:
    _, algorithm, theta, (support, query) = build_setting()
    score = ClassificationScore(2)
    two = with_score(algorithm, score)
    rows = [Batch(part.x[part.y < 2], part.y[part.y < 2]) for part in (support, query)]
    loss, metrics = score(predict(two, theta, rows[0], rows[1].x), rows[1])
    assert bool(torch.isfinite(loss))
    assert 0 <= float(metrics["accuracy"]) <= 1
    with pytest.raises(InputError, match="ways: got 4, expected at most 3"):
        ClassificationScore(4)(predict(two, theta, rows[0], rows[1].x), rows[1])


def test_model_without_a_last_layer_is_an_error() -> None:
    job = Job.parse(tree({"type": "snail"}, **(CLASSES | {"model": {"type": "torch.nn:Flatten"}})))
    with pytest.raises(InputError, match=r"model\.type: got Flatten, which has no last linear layer"):
        build_problem(job)


def test_wrong_attention_is_an_error() -> None:
    with pytest.raises(InputError, match=r"algorithm\.attention"):
        build_setting(attention=[[64]])
