"""The hypernetwork: the layer it generates, gradient steps after it, and its invariances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import CLASSES, tree
from torch import Tensor

from distmeta.algorithms.hypernet import Hypernet
from distmeta.compute.execution import Execution
from distmeta.compute.gradient import unroll
from distmeta.compute.scoring import score_tasks
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.protocols import Algorithm, Batch, Episode, Theta
from distmeta.runtime.problem import Problem, build_problem, with_score
from distmeta.seeding import task_ids
from distmeta.tasks.few_shot import ClassificationScore
from distmeta.trees import tree_map

WEIGHT = "model.3.weight"
BIAS = "model.3.bias"


def build_setting(
    changes: dict[str, Any] = CLASSES, **options: Any
) -> tuple[Problem, Hypernet, Theta, Episode]:
    problem = build_problem(Job.parse(tree({"type": "hypernet"} | options, **changes)))
    theta = {name: value.double() for name, value in problem.init().items()}
    problem.model.to(dtype=torch.float64)
    episode = tree_map(lambda leaf: leaf[0], problem.family.draw("train", task_ids(0, "train", 0, 1)))
    episode = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, episode)
    assert isinstance(problem.algorithm, Hypernet)
    return problem, problem.algorithm, theta, episode


REGRESSION = {
    "model": {"type": "mlp", "hidden": [12], "activation": "tanh"},
    "tasks": {"type": "sinusoid", "shots": 9, "queries": 4},
}


def predict(algorithm: Algorithm, theta: Theta, support: Batch, x: Tensor) -> Tensor:
    return algorithm.predict(theta, unroll(algorithm, theta, support), x)


def set_linear_network(theta: Theta, matrix: Tensor) -> Theta:
    """Return theta with a network that computes matrixᵀ(μ_c, μ̄): its biases move ELU into its linear part."""
    far = 10.0
    size = len(matrix)
    eye = torch.eye(size, dtype=torch.float64)
    return theta | {
        "hypernet.0.weight": eye,
        "hypernet.0.bias": eye.new_full((size,), far),
        "hypernet.1.weight": eye,
        "hypernet.1.bias": eye.new_zeros(size),
        "hypernet.2.weight": matrix,
        "hypernet.2.bias": -far * matrix.sum(0),
    }


def compute_means(problem: Problem, theta: Theta, support: Batch) -> Tensor:
    features = problem.model.features(theta, support.x)
    return torch.stack([features[support.y == c].mean(0) for c in range(3)])


def test_network_of_zeros_compares_with_class_means() -> None:
    problem, algorithm, theta, (support, query) = build_setting()
    theta |= {name: torch.zeros_like(value) for name, value in theta.items() if name.startswith("hypernet.")}
    expected = problem.model.features(theta, query.x) @ compute_means(problem, theta, support).T
    torch.testing.assert_close(predict(algorithm, theta, support, query.x), expected, rtol=1e-12, atol=1e-14)


def test_linear_network_generates_the_expected_layer() -> None:
    """w_c = 2 μ_c − μ̄ and b_c = −⟨a, μ_c⟩ + ⟨a, μ̄⟩."""
    problem, algorithm, theta, (support, query) = build_setting(hidden=24)
    a = torch.linspace(-1, 1, 12, dtype=torch.float64)[:, None]
    eye = torch.eye(12, dtype=torch.float64)  # μ_c is added to the network's output
    theta = set_linear_network(theta, torch.cat([torch.cat([eye, -a], 1), torch.cat([-eye, a], 1)]))
    state = algorithm.begin(theta, support)
    means = compute_means(problem, theta, support)
    torch.testing.assert_close(state.phi[WEIGHT], 2 * means - means.mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state.phi[BIAS], ((means.mean(0) - means) @ a)[:, 0], rtol=1e-10, atol=1e-12)
    expected = problem.model.features(theta, query.x) @ state.phi[WEIGHT].T + state.phi[BIAS]
    torch.testing.assert_close(predict(algorithm, theta, support, query.x), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(problem.model(state.phi, query.x), expected, rtol=1e-12, atol=1e-14)


def test_layer_of_a_regression_matches_computation_by_hand() -> None:
    problem, algorithm, theta, (support, query) = build_setting(REGRESSION, hidden=5)
    elu = torch.nn.functional.elu
    w = [theta[f"hypernet.{i}.weight"] for i in range(4)]
    b = [theta[f"hypernet.{i}.bias"] for i in range(4)]
    features = problem.model.features(theta, support.x)
    rows = [
        elu(elu(torch.cat([f, y]) @ w[0] + b[0]) @ w[1] + b[1])
        for f, y in zip(features, support.y, strict=True)
    ]
    generated = elu(torch.stack(rows).mean(0) @ w[2] + b[2]) @ w[3] + b[3]
    expected = problem.model.features(theta, query.x) @ generated[:12, None] + generated[12]
    torch.testing.assert_close(predict(algorithm, theta, support, query.x), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("changes", [CLASSES, REGRESSION], ids=["classes", "regression"])
@pytest.mark.parametrize("adapt", ["head", "all", "body"])
def test_inner_steps_are_gradient_descent_from_the_generated_layer(
    adapt: str, changes: dict[str, Any]
) -> None:
    problem, algorithm, theta, (support, _) = build_setting(
        changes, inner_steps=3, inner_lr=0.05, adapt=adapt
    )
    phi = algorithm.begin(theta, support).phi
    assert set(phi) == set(problem.model.adaptable)
    names = [name for name in phi if adapt == "all" or (name in (WEIGHT, BIAS)) == (adapt == "head")]
    for _ in range(3):
        leaves = {name: phi[name].detach().requires_grad_() for name in names}
        loss = problem.score("train")(problem.model(phi | leaves, support.x), support)[0]
        parts = torch.autograd.grad(loss, list(leaves.values()))
        phi = phi | {name: phi[name] - 0.05 * part for name, part in zip(names, parts, strict=True)}
    state = unroll(algorithm, theta, support)
    for name, value in phi.items():
        torch.testing.assert_close(state.phi[name], value, rtol=1e-12, atol=1e-14)


def test_evaluation_without_inner_steps_has_one_score_per_task() -> None:
    problem, algorithm, theta, episode = build_setting()
    assert algorithm.inner_steps == 0
    one = tree_map(lambda leaf: leaf[None], episode)
    scores = score_tasks(
        algorithm, problem.score("val"), theta, one, task_ids(0, "val", 0, 1), Execution("loop", 1)
    )
    assert scores.metrics["loss"].shape == (1, 1)


@pytest.mark.parametrize("steps", [0, 2])
def test_renaming_classes_renames_outputs(steps: int) -> None:
    _, algorithm, theta, (support, query) = build_setting(inner_steps=steps)
    new = torch.tensor([2, 0, 1])
    renamed = predict(algorithm, theta, Batch(support.x, new[support.y]), query.x)
    torch.testing.assert_close(
        renamed[:, new], predict(algorithm, theta, support, query.x), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("changes", [CLASSES, REGRESSION], ids=["classes", "regression"])
def test_order_of_the_support_does_not_matter(changes: dict[str, Any]) -> None:
    _, algorithm, theta, (support, query) = build_setting(changes, inner_steps=2)
    order = torch.randperm(len(support.x), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        predict(algorithm, theta, Batch(support.x[order], support.y[order]), query.x),
        predict(algorithm, theta, support, query.x),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("steps", [0, 2])
def test_padding_is_ignored_and_absent_classes_are_never_predicted(steps: int) -> None:
    """A class without support rows is never predicted, and the other classes do not depend on it."""
    _, algorithm, theta, (support, query) = build_setting(inner_steps=steps)
    absent = Batch(support.x, torch.where(support.y == 2, -1, support.y))
    two = with_score(algorithm, ClassificationScore(2))
    rows = Batch(support.x[support.y < 2], support.y[support.y < 2])
    filled = predict(algorithm, theta, absent, query.x)
    torch.testing.assert_close(filled[:, :2], predict(two, theta, rows, query.x), rtol=1e-10, atol=1e-12)
    assert bool((filled[:, 2] < -1e300).all())


def test_evaluation_may_have_more_ways() -> None:
    problem, _, theta, _ = build_setting(inner_steps=1)
    job = tree({"type": "hypernet", "inner_steps": 1}, **CLASSES)
    job["tasks"] = job["tasks"] | {"eval_ways": 6}
    wide = build_problem(Job.parse(job))
    ids = task_ids(0, "test", 0, 2)
    theta = {name: value.float() for name, value in theta.items()}
    scores = score_tasks(
        wide.adapting("test"),
        wide.score("test"),
        theta,
        wide.family.draw("test", ids),
        ids,
        Execution("vmap", 2),
        outputs=True,
    )
    assert scores.outputs.shape[-1] == 6
    assert problem.model.head == (WEIGHT, BIAS)


def test_theta_has_no_head() -> None:
    _, _, theta, _ = build_setting()
    assert WEIGHT not in theta
    assert BIAS not in theta
    assert theta["hypernet.2.weight"].shape == (12, 13)


def test_model_without_a_last_layer_is_an_error() -> None:
    job = Job.parse(tree({"type": "hypernet"}, **(CLASSES | {"model": {"type": "torch.nn:Flatten"}})))
    with pytest.raises(InputError, match=r"model\.type: got Flatten, which has no last linear layer"):
        build_problem(job)


def test_adapt_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match=r"algorithm\.adapt: got 'nothing'"):
        build_setting(inner_steps=1, adapt="nothing")
