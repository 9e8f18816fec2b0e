"""Heads whose number of ways is free, features, and tasks of different sizes: end to end on bundled digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tree
from torch import nn

import distmeta
from distmeta.compute.gradient import Execution, shard_gradient
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.models.functional import Functional
from distmeta.models.mlp import MLP
from distmeta.protocols import PADDING
from distmeta.runtime.problem import build
from distmeta.seeding import task_ids
from distmeta.tasks.few_shot import ClassificationScore

LOOP, VMAP = Execution("loop", 1), Execution("vmap", 2**31)


def job(algorithm: dict[str, Any] | None = None, head: str = "linear", **tasks: Any) -> Job:
    sizes = {"ways": 3, "shots": 2, "queries": 4} | tasks
    return Job.parse(
        tree(
            algorithm or {"type": "maml", "inner_lr": 0.3, "inner_steps": 2},
            model={"type": "mlp", "hidden": [32], "head": head},
            tasks={"type": "digits", **sizes},
            run={"steps": 4, "eval_every": 4, "eval_tasks": 8},
        )
    )


def episode(problem: Any, split: str = "train") -> tuple[Any, np.ndarray]:
    ids = task_ids(0, split, 0, 6)
    return problem.family.draw(split, ids), ids


def test_features_are_what_enters_the_head() -> None:
    model = Functional(lambda: MLP((7,), 4, hidden=[5]), torch.Generator().manual_seed(0), out_features=4)
    theta, x = model.init(), torch.randn(6, 7)
    assert model.head == ("model.3.weight", "model.3.bias")
    features = model.features(theta, x)
    torch.testing.assert_close(
        features, nn.Sequential(*list(model.module.children())[:-1])(x), rtol=0, atol=0
    )
    assert torch.equal(model.features(model.init_body(), x), features)
    assert set(model.init_body()) == {"model.1.weight", "model.1.bias"}
    embedding = Functional(lambda: nn.Linear(7, 3), torch.Generator().manual_seed(0), out_features=4)
    assert embedding.head == ()
    torch.testing.assert_close(embedding.features(embedding.init(), x), embedding(embedding.init(), x))


@pytest.mark.parametrize("head", ["shared", "prototype"])
def test_a_free_head_is_scored_at_any_ways(head: str, workplace: Path) -> None:
    run = distmeta.train(job(head=head)).run
    figures = {w: distmeta.evaluate(run, [f"tasks.ways={w}", "run.eval_tasks=60"]).figures for w in (2, 3, 6)}
    assert all(f["accuracy_after"] > 1.3 / w for w, f in figures.items())
    x, y = (part[0] for part in episode(build(job(ways=6, head=head)), "test")[0].support)
    adapted = distmeta.load(run).adapt(x, y + 10)
    assert adapted(x).shape == (12, 6)
    assert set(adapted.predict(x).tolist()) <= set(range(10, 16))


def test_a_fixed_head_refuses_more_ways_before_the_first_step(workplace: Path) -> None:
    with pytest.raises(
        InputError, match=r"ways: got 5, expected at most 3 .* model\.head=shared or a metric"
    ):
        distmeta.train(job(eval_ways=5))
    assert not list(workplace.glob("runs/*/metrics.jsonl"))


def test_a_shared_head_does_not_know_the_classes_apart() -> None:
    """Permuting the support's labels permutes the outputs: nothing tells one class from another (Ye & Chao, §6)."""
    problem = build(job(head="shared"))
    theta, (drawn, _) = problem.init(), episode(problem)
    assert theta["model.3.weight"].shape == (1, 32)
    support = type(drawn.support)(drawn.support.x[0], drawn.support.y[0])
    algorithm, turned = problem.algorithm, support._replace(y=(support.y + 1) % 3)
    states = [algorithm.step(theta, algorithm.begin(theta, s), s, 0) for s in (support, turned)]
    one, other = (algorithm.predict(theta, state, drawn.query.x[0]) for state in states)
    torch.testing.assert_close(one, other.roll(-1, 1))


def test_a_prototype_head_is_the_nearest_mean() -> None:
    problem = build(job(head="prototype"))
    theta, (drawn, _) = problem.init(), episode(problem)
    assert not set(problem.model.head) & set(theta)
    support = type(drawn.support)(drawn.support.x[0], drawn.support.y[0])
    outputs = problem.algorithm.predict(theta, problem.algorithm.begin(theta, support), drawn.query.x[0])
    features = [problem.model.features(theta, x) for x in (support.x, drawn.query.x[0])]
    means = torch.stack([features[0][support.y == w].mean(0) for w in range(3)])
    distance = torch.cdist(features[1], means).square()
    torch.testing.assert_close(
        outputs - features[1].square().sum(1, keepdim=True), -distance, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("head", ["shared", "prototype"])
@pytest.mark.parametrize("kind", ["maml", "reptile", "imaml"])
def test_free_heads_under_vmap_and_loop(kind: str, head: str) -> None:
    plain = {"inner_optimizer": "sgd"} if kind == "reptile" else {}
    problem = build(job({"type": kind, "inner_lr": 0.1, "inner_steps": 3, **plain}, head))
    drawn, ids = episode(problem)
    theta, score = problem.init(), problem.score("train")
    loop, vmap = (
        shard_gradient(problem.algorithm, score, theta, drawn, ids, e).gradient for e in (LOOP, VMAP)
    )
    flat = [torch.cat([g[k].flatten() for k in theta]) for g in (loop, vmap)]
    assert float((flat[0] - flat[1]).norm() / flat[0].norm()) <= 1e-5


def test_a_free_head_needs_classes() -> None:
    problem = build(Job.parse(tree("maml", model={"head": "shared"})))
    support = problem.family.draw("train", [1]).support
    with pytest.raises(InputError, match=r"model\.head: got shared for tasks without classes"):
        problem.algorithm.begin(problem.init(), support)


def test_a_shared_head_that_is_not_adapted() -> None:
    with pytest.raises(InputError, match=r"model\.head: got shared with algorithm\.adapt = 'body'"):
        build(job({"type": "maml", "adapt": "body"}, head="shared"))


def test_tasks_of_different_sizes() -> None:
    problem = build(job(ways=5, shots=4, min_ways=2, min_shots=1, unbalanced=True))
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
        assert {
            image.numpy().tobytes() for image in support.x[t][~real]
        } <= rows  # padding repeats the task's own
        assert set(query.y[t].tolist()) - {PADDING} == set(support.y[t][real].tolist())
        assert not rows & {image.numpy().tobytes() for image in query.x[t]}
    fixed = problem.family.draw("test", ids[:3])
    assert not bool((fixed.support.y == PADDING).any())
    # and what does not differ is what it was
    same = build(job(ways=5, shots=4, min_ways=5, min_shots=4)).family.draw("train", ids[:3])
    plain = build(job(ways=5, shots=4)).family.draw("train", ids[:3])
    assert all(torch.equal(a, b) for a, b in zip(same.support, plain.support, strict=True))


def test_padding_counts_nowhere() -> None:
    """The loss and gradient of a filled-up task are those of the smaller task itself."""
    problem = build(job(head="shared", ways=4, shots=3, min_ways=2, min_shots=1))
    ids = task_ids(0, "train", 0, 8)
    drawn, theta = problem.family.draw("train", ids), problem.init()
    algorithm, score = problem.algorithm, problem.score("train")
    for t in range(8):
        one = [part[t : t + 1] for batch in drawn for part in batch]
        whole = shard_gradient(
            algorithm,
            score,
            theta,
            type(drawn)(*(type(drawn.support)(*one[i : i + 2]) for i in (0, 2))),
            ids[:1],
            LOOP,
        )
        keep_s, keep_q = one[1][0] != PADDING, one[3][0] != PADDING
        ways = int(one[1].max()) + 1
        small = type(drawn)(
            type(drawn.support)(one[0][:, keep_s], one[1][:, keep_s]),
            type(drawn.support)(one[2][:, keep_q], one[3][:, keep_q]),
        )
        from distmeta.runtime.problem import with_score

        own = ClassificationScore(ways)
        alone = shard_gradient(with_score(algorithm, own), own, theta, small, ids[:1], LOOP)
        assert whole.metrics["loss_after"][0] == pytest.approx(alone.metrics["loss_after"][0], rel=1e-5)
        assert whole.metrics["accuracy_after"][0] == pytest.approx(alone.metrics["accuracy_after"][0])
        flat = [torch.cat([r.gradient[k].flatten() for k in theta]) for r in (whole, alone)]
        assert float((flat[0] - flat[1]).norm() / flat[1].norm()) <= 1e-4


def test_a_random_order_is_the_same_episode_shuffled() -> None:
    shots, shuffled = (build(job(order=order)).family for order in ("shots", "random"))
    ids = task_ids(0, "train", 0, 20)
    for a, b in zip(shots.draw("train", ids), shuffled.draw("train", ids), strict=True):
        assert not torch.equal(a.y, b.y)
        for t in range(20):
            pairs = [
                sorted((x.numpy().tobytes(), int(y)) for x, y in zip(p.x[t], p.y[t], strict=True))
                for p in (a, b)
            ]
            assert pairs[0] == pairs[1]


def test_training_on_tasks_of_different_sizes(workplace: Path) -> None:
    run = distmeta.train(job(head="shared", ways=5, shots=3, min_ways=2, min_shots=1, unbalanced=True)).run
    assert distmeta.evaluate(run).figures["accuracy_after"] is not None


def test_a_shared_head_with_adam_inside_is_refused() -> None:
    """Its classes start alike: Adam would make full steps of rounding noise."""
    for kind in ("maml", "reptile"):
        with pytest.raises(
            InputError, match=r"algorithm\.inner_optimizer: got adam with model\.head: shared"
        ):
            build(job({"type": kind, "inner_lr": 0.01, "inner_optimizer": "adam"}, head="shared"))


@pytest.mark.parametrize("kind", ["reptile", "lstm"])
def test_minibatches_leave_padding_out(kind: str) -> None:
    """With unbalanced shots a batch of rows in order could be padding alone: no loss, not a number."""
    algorithm = {"type": kind, "inner_batch": 5, "inner_steps": 3}
    problem = build(job(algorithm, ways=5, shots=3, min_shots=1))
    drawn, ids = episode(problem)
    assert bool((drawn.support.y == PADDING).any())
    theta, score = problem.init(), problem.score("train")
    results = [shard_gradient(problem.algorithm, score, theta, drawn, ids, e) for e in (LOOP, VMAP)]
    assert all(result.tasks == 6 for result in results)
    with pytest.raises(
        InputError, match=r"algorithm\.inner_batch: got 5 with tasks\.min_ways, expected null"
    ):
        build(job(algorithm, ways=5, shots=3, min_ways=2))


@pytest.mark.parametrize("kind", ["mann", "snail"])
def test_fixed_outputs_refuse_more_classes_and_steps(kind: str, workplace: Path) -> None:
    run = distmeta.train(job({"type": kind}, order="random")).run
    x, y = (part[0] for part in episode(build(job(ways=6)), "test")[0].support)
    with pytest.raises(InputError, match=r"ways: got 6, expected at most 3 \(the outputs that"):
        distmeta.load(run).adapt(x, y)
    with pytest.raises(InputError, match=r"steps: got 2, but .* has no inner loop"):
        distmeta.load(run).adapt(x[:3], y[:3], steps=2)
