"""Features, heads with free ways, and tasks of different sizes, on the bundled digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tree
from torch import Tensor, nn

import distmeta
from distmeta.compute.execution import Execution, shard_gradient
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.models.functional import FunctionalModel
from distmeta.models.mlp import MLP
from distmeta.protocols import PADDING, Batch, Episode
from distmeta.runtime.problem import build_problem, with_score
from distmeta.seeding import task_ids
from distmeta.tasks.few_shot import ClassificationScore

LOOP = Execution("loop", 1)
VMAP = Execution("vmap", 2**31)


def build_job(algorithm: dict[str, Any] | None = None, head: str = "linear", **tasks: Any) -> Job:
    sizes = {"ways": 3, "shots": 2, "queries": 4} | tasks
    return Job.parse(
        tree(
            algorithm or {"type": "maml", "inner_lr": 0.3, "inner_steps": 2},
            model={"type": "mlp", "hidden": [32], "head": head},
            tasks={"type": "digits", **sizes},
            run={"steps": 4, "eval_every": 4, "eval_tasks": 8},
        )
    )


def draw_episodes(problem: Any, split: str = "train") -> tuple[Any, np.ndarray]:
    ids = task_ids(0, split, 0, 6)
    return problem.family.draw(split, ids), ids


def test_features_are_the_inputs_of_the_head() -> None:
    model = FunctionalModel(
        lambda: MLP((7,), 4, hidden=[5]), torch.Generator().manual_seed(0), out_features=4
    )
    theta = model.init()
    x = torch.randn(6, 7)
    assert model.head == ("model.3.weight", "model.3.bias")
    features = model.features(theta, x)
    torch.testing.assert_close(
        features, nn.Sequential(*list(model.module.children())[:-1])(x), rtol=0, atol=0
    )
    assert torch.equal(model.features(model.init_body(), x), features)
    assert set(model.init_body()) == {"model.1.weight", "model.1.bias"}
    embedding = FunctionalModel(lambda: nn.Linear(7, 3), torch.Generator().manual_seed(0), out_features=4)
    assert embedding.head == ()
    torch.testing.assert_close(embedding.features(embedding.init(), x), embedding(embedding.init(), x))


@pytest.mark.parametrize("head", ["shared", "prototype"])
def test_head_with_free_ways_is_evaluated_with_any_ways(head: str, workplace: Path) -> None:
    run = distmeta.train(build_job(head=head)).run
    for ways in (2, 3, 6):
        figures = distmeta.evaluate(run, [f"tasks.ways={ways}", "run.eval_tasks=60"]).figures
        assert (figures["accuracy_after"] or 0) > 1.3 / ways
    x, y = (part[0] for part in draw_episodes(build_problem(build_job(ways=6, head=head)), "test")[0].support)
    adapted = distmeta.load(run).adapt(x, y + 10)
    assert adapted(x).shape == (12, 6)
    assert set(adapted.predict(x).tolist()) <= set(range(10, 16))


def test_head_with_fixed_ways_refuses_more_ways_before_step_0(workplace: Path) -> None:
    with pytest.raises(
        InputError, match=r"ways: got 5, expected at most 3 .* model\.head=shared or a metric"
    ):
        distmeta.train(build_job(eval_ways=5))
    assert not list(workplace.glob("runs/*/metrics.jsonl"))


def test_shared_head_treats_all_classes_alike() -> None:
    """Permuting the support labels permutes the outputs (Ye & Chao 2022, §6)."""
    problem = build_problem(build_job(head="shared"))
    theta = problem.init()
    drawn, _ = draw_episodes(problem)
    assert theta["model.3.weight"].shape == (1, 32)
    support = type(drawn.support)(drawn.support.x[0], drawn.support.y[0])
    permuted = support._replace(y=(support.y + 1) % 3)

    def predict(support: Batch) -> Tensor:
        algorithm = problem.algorithm
        state = algorithm.step(theta, algorithm.begin(theta, support), support, 0)
        return algorithm.predict(theta, state, drawn.query.x[0])

    torch.testing.assert_close(predict(support), predict(permuted).roll(-1, 1))


def test_prototype_head_predicts_the_nearest_mean() -> None:
    problem = build_problem(build_job(head="prototype"))
    theta = problem.init()
    drawn, _ = draw_episodes(problem)
    assert not set(problem.model.head) & set(theta)
    support = type(drawn.support)(drawn.support.x[0], drawn.support.y[0])
    outputs = problem.algorithm.predict(theta, problem.algorithm.begin(theta, support), drawn.query.x[0])
    features_S = problem.model.features(theta, support.x)
    features_Q = problem.model.features(theta, drawn.query.x[0])
    means = torch.stack([features_S[support.y == way].mean(0) for way in range(3)])
    distance = torch.cdist(features_Q, means).square()
    torch.testing.assert_close(
        outputs - features_Q.square().sum(1, keepdim=True), -distance, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("head", ["shared", "prototype"])
@pytest.mark.parametrize("kind", ["maml", "reptile", "imaml"])
def test_vmap_equals_loop_for_heads_with_free_ways(kind: str, head: str) -> None:
    options = {"inner_optimizer": "sgd"} if kind == "reptile" else {}
    problem = build_problem(build_job({"type": kind, "inner_lr": 0.1, "inner_steps": 3, **options}, head))
    drawn, ids = draw_episodes(problem)
    args = (problem.algorithm, problem.score("train"), problem.init(), drawn, ids)
    loop = shard_gradient(*args, LOOP).gradient
    vmap = shard_gradient(*args, VMAP).gradient
    assert compute_distance(loop, vmap) <= 1e-5


def compute_distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return ‖a − b‖ / ‖b‖ over all entries."""
    flat_a = torch.cat([a[name].flatten() for name in b])
    flat_b = torch.cat([b[name].flatten() for name in b])
    return float((flat_a - flat_b).norm() / flat_b.norm())


def test_head_with_free_ways_needs_classes() -> None:
    problem = build_problem(Job.parse(tree("maml", model={"head": "shared"})))
    support = problem.family.draw("train", [1]).support
    with pytest.raises(InputError, match=r"model\.head: got shared for tasks without classes"):
        problem.algorithm.begin(problem.init(), support)


def test_shared_head_that_is_not_adapted_is_an_error() -> None:
    with pytest.raises(InputError, match=r"model\.head: got shared with algorithm\.adapt = 'body'"):
        build_problem(build_job({"type": "maml", "adapt": "body"}, head="shared"))


def test_drawn_tasks_have_different_sizes() -> None:
    problem = build_problem(build_job(ways=5, shots=4, min_ways=2, min_shots=1, unbalanced=True))
    ids = task_ids(0, "train", 0, 200)
    support, query = problem.family.draw("train", ids)
    counts_TW = torch.stack([(support.y == w).sum(1) for w in range(5)], 1)
    ways_T = (counts_TW > 0).sum(1)
    assert set(ways_T.tolist()) == {2, 3, 4, 5}
    assert set(counts_TW.flatten().tolist()) == {0, 1, 2, 3, 4}
    assert bool((counts_TW[:, 0] != counts_TW[:, 1]).any())  # unbalanced
    for t in range(200):
        real = support.y[t] != PADDING
        rows = {image.numpy().tobytes() for image in support.x[t][real]}
        padding = {image.numpy().tobytes() for image in support.x[t][~real]}
        assert padding <= rows  # padding repeats rows of the task
        assert set(query.y[t].tolist()) - {PADDING} == set(support.y[t][real].tolist())
        assert not rows & {image.numpy().tobytes() for image in query.x[t]}
    fixed = problem.family.draw("test", ids[:3])
    assert not bool((fixed.support.y == PADDING).any())
    # Tasks that may not differ in size are the same as without these options.
    equal_sizes = build_problem(build_job(ways=5, shots=4, min_ways=5, min_shots=4)).family.draw(
        "train", ids[:3]
    )
    plain = build_problem(build_job(ways=5, shots=4)).family.draw("train", ids[:3])
    assert all(torch.equal(a, b) for a, b in zip(equal_sizes.support, plain.support, strict=True))


def test_padding_is_ignored() -> None:
    """The loss and the gradient of a padded task are those of the smaller task."""
    problem = build_problem(build_job(head="shared", ways=4, shots=3, min_ways=2, min_shots=1))
    ids = task_ids(0, "train", 0, 8)
    support, query = problem.family.draw("train", ids)
    theta = problem.init()
    algorithm = problem.algorithm
    for t in range(8):
        padded_support = Batch(support.x[t : t + 1], support.y[t : t + 1])
        padded_query = Batch(query.x[t : t + 1], query.y[t : t + 1])
        task = Episode(padded_support, padded_query)
        padded = shard_gradient(algorithm, problem.score("train"), theta, task, ids[:1], LOOP)

        task = Episode(drop_padding(padded_support), drop_padding(padded_query))
        score = ClassificationScore(int(support.y[t].max()) + 1)
        small = shard_gradient(with_score(algorithm, score), score, theta, task, ids[:1], LOOP)

        assert padded.metrics["loss_after"][0] == pytest.approx(small.metrics["loss_after"][0], rel=1e-5)
        assert padded.metrics["accuracy_after"][0] == pytest.approx(small.metrics["accuracy_after"][0])
        assert compute_distance(padded.gradient, small.gradient) <= 1e-4


def drop_padding(batch: Batch) -> Batch:
    """Return the real rows of one task, [1, ...]."""
    real = batch.y[0] != PADDING
    return Batch(batch.x[:, real], batch.y[:, real])


def test_random_order_shuffles_the_same_episode() -> None:
    shots = build_problem(build_job(order="shots")).family
    shuffled = build_problem(build_job(order="random")).family
    ids = task_ids(0, "train", 0, 20)
    for a, b in zip(shots.draw("train", ids), shuffled.draw("train", ids), strict=True):
        assert not torch.equal(a.y, b.y)
        for t in range(20):
            assert sort_rows(a, t) == sort_rows(b, t)


def sort_rows(batch: Batch, t: int) -> list[tuple[bytes, int]]:
    return sorted((x.numpy().tobytes(), int(y)) for x, y in zip(batch.x[t], batch.y[t], strict=True))


def test_training_and_evaluation_with_tasks_of_different_sizes(workplace: Path) -> None:
    run = distmeta.train(
        build_job(head="shared", ways=5, shots=3, min_ways=2, min_shots=1, unbalanced=True)
    ).run
    assert distmeta.evaluate(run).figures["accuracy_after"] is not None


def test_shared_head_with_adam_in_the_inner_loop_is_an_error() -> None:
    """All classes start equal, so Adam would scale rounding noise up to full steps."""
    for kind in ("maml", "reptile"):
        with pytest.raises(
            InputError, match=r"algorithm\.inner_optimizer: got adam with model\.head: shared"
        ):
            build_problem(
                build_job({"type": kind, "inner_lr": 0.01, "inner_optimizer": "adam"}, head="shared")
            )


@pytest.mark.parametrize("kind", ["reptile", "lstm"])
def test_minibatches_skip_padding(kind: str) -> None:
    """With unbalanced shots, consecutive rows could all be padding, which would give NaN."""
    algorithm = {"type": kind, "inner_batch": 5, "inner_steps": 3}
    problem = build_problem(build_job(algorithm, ways=5, shots=3, min_shots=1))
    drawn, ids = draw_episodes(problem)
    assert bool((drawn.support.y == PADDING).any())
    args = (problem.algorithm, problem.score("train"), problem.init(), drawn, ids)
    assert shard_gradient(*args, LOOP).tasks == 6
    assert shard_gradient(*args, VMAP).tasks == 6
    with pytest.raises(
        InputError, match=r"algorithm\.inner_batch: got 5 with tasks\.min_ways, expected null"
    ):
        build_problem(build_job(algorithm, ways=5, shots=3, min_ways=2))


@pytest.mark.parametrize("kind", ["mann", "snail"])
def test_methods_with_fixed_outputs_refuse_more_classes_and_inner_steps(kind: str, workplace: Path) -> None:
    run = distmeta.train(build_job({"type": kind}, order="random")).run
    x, y = (part[0] for part in draw_episodes(build_problem(build_job(ways=6)), "test")[0].support)
    with pytest.raises(InputError, match=r"ways: got 6, expected at most 3 \(the outputs that"):
        distmeta.load(run).adapt(x, y)
    with pytest.raises(InputError, match=r"steps: got 2, but .* has no inner loop"):
        distmeta.load(run).adapt(x[:3], y[:3], steps=2)
