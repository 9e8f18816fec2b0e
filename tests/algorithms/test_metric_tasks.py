"""ProtoNet, matching networks, relation networks and IMP: other ways, padding, absent classes, learning."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALGORITHMS, tree
from torch import Tensor

import distmeta
from distmeta.compute.execution import Execution, shard_gradient
from distmeta.compute.gradient import query_loss, unroll
from distmeta.compute.scoring import score_tasks
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.protocols import PADDING, Batch, Episode, HasMetaLoss, Theta
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.problem import build_problem, with_score
from distmeta.seeding import task_ids
from distmeta.tasks.few_shot import ClassificationScore

LOOP = Execution("loop", 1)
VMAP = Execution("vmap", 2**31)
METHODS: dict[str, dict[str, Any]] = {
    name: ALGORITHMS[name] for name in ("protonet", "matching", "matching-fce", "relation", "imp")
} | {
    "protonet-cosine": {"type": "protonet", "distance": "cosine", "scale": 10.0, "learn_scale": True},
    "relation-mean": {"type": "relation", "hidden": [8], "combine": "mean", "loss": "cross-entropy"},
    "imp-many": {"type": "imp", "sigma": 0.05, "learn_sigma": False, "concentration": 5.0},  # opens clusters
}


def predict(algorithm: Any, theta: Theta, episode: Episode) -> Tensor:
    return algorithm.predict(theta, algorithm.begin(theta, episode.support), episode.query.x)


def build_job(method: str, **tasks: Any) -> Job:
    sizes = {"ways": 3, "shots": 2, "queries": 4, "order": "random"} | tasks
    return Job.parse(
        tree(
            METHODS[method],
            model={"type": "mlp", "hidden": [16], "activation": "tanh"},
            tasks={"type": "digits", **sizes},
        )
    )


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_may_have_other_ways(method: str) -> None:
    for ways in (2, 6):
        problem = build_problem(build_job(method, eval_ways=ways))
        theta = problem.init()
        ids = task_ids(0, "test", 0, 3)
        assert not set(problem.model.head) & set(theta)
        drawn = problem.family.draw("test", ids)
        args = (problem.adapting("test"), problem.score("test"), theta, drawn, ids)
        loop = score_tasks(*args, LOOP, outputs=True)
        vmap = score_tasks(*args, VMAP, outputs=True)
        assert loop.outputs.shape == (3, 4 * ways, ways)
        torch.testing.assert_close(loop.outputs, vmap.outputs, rtol=1e-4, atol=1e-4)
        assert loop.metrics["loss"].shape == (3, 1)


def train(method: str) -> Path:
    run = {"steps": 3, "eval_every": 3, "eval_tasks": 4}
    return distmeta.train(build_job(method).replace(run=run, outer={"lr": 0.001})).run


@pytest.mark.parametrize("method", ["protonet", "matching-fce", "imp-many"])
def test_run_is_evaluated_with_other_ways(method: str, workplace: Path) -> None:
    run = train(method)
    for ways in (2, 6):
        figures = distmeta.evaluate(run, [f"tasks.ways={ways}", "run.eval_tasks=40"]).figures
        assert figures["accuracy_before"] is None
        assert (figures["accuracy_after"] or 0) > 1.3 / ways


def test_loaded_learner_adapts_to_other_ways(workplace: Path) -> None:
    drawn = build_problem(build_job("protonet", ways=6)).family.draw("test", task_ids(0, "test", 0, 1))
    adapted = distmeta.load(train("protonet")).adapt(drawn.support.x[0], drawn.support.y[0] + 10)
    assert adapted(drawn.support.x[0]).shape == (12, 6)
    assert set(adapted.predict(drawn.query.x[0]).tolist()) <= set(range(10, 16))


@pytest.mark.parametrize("method", METHODS)
def test_class_without_support_is_never_predicted(method: str) -> None:
    problem = build_problem(build_job(method))
    theta = problem.init()
    drawn = problem.family.draw("train", task_ids(0, "train", 0, 1))
    support = Batch(drawn.support.x[0], torch.where(drawn.support.y[0] == 1, PADDING, drawn.support.y[0]))
    query = Batch(drawn.query.x[0], torch.where(drawn.query.y[0] == 1, PADDING, drawn.query.y[0]))
    algorithm = problem.algorithm
    score = problem.score("train")
    meta_loss = algorithm.meta_loss if isinstance(algorithm, HasMetaLoss) else partial(query_loss, algorithm)
    gradient, (loss, _) = torch.func.grad_and_value(
        lambda t: meta_loss(t, Episode(support, query), unroll, score), has_aux=True
    )(theta)
    found = predict(algorithm, theta, Episode(support, query))
    assert bool((found[:, 1] < -1e30).all())
    assert bool(torch.isfinite(found).all())
    assert bool(torch.isfinite(loss))
    assert all(bool(torch.isfinite(g).all()) for g in gradient.values())


@pytest.mark.parametrize("method", METHODS)
def test_padding_is_ignored(method: str) -> None:
    """The loss and the gradient of a padded task are those of the smaller task."""
    problem = build_problem(build_job(method, ways=4, shots=3, min_ways=2, min_shots=1, unbalanced=True))
    theta = {name: value.double() for name, value in problem.init().items()}
    problem.model.to(dtype=torch.float64)
    algorithm = problem.algorithm
    ids = task_ids(0, "train", 0, 6)
    drawn = to_float64(problem.family.draw("train", ids))
    args = (algorithm, problem.score("train"), theta, drawn, ids)
    loop = shard_gradient(*args, LOOP)
    vmap = shard_gradient(*args, VMAP)
    total = {name: torch.zeros_like(value) for name, value in theta.items()}
    for t in range(len(ids)):
        small = Episode(*(Batch(b.x[t : t + 1, keep], b.y[t : t + 1, keep])
                          for b in drawn for keep in [b.y[t] != PADDING]))  # fmt: skip
        score = ClassificationScore(int(small.support.y.max()) + 1)
        alone = shard_gradient(with_score(algorithm, score), score, theta, small, ids[:1], LOOP)
        for name in ("loss_after", "accuracy_after"):
            assert loop.metrics[name][t] == pytest.approx(alone.metrics[name][0], rel=1e-9)
        total = {name: total[name] + alone.gradient[name] for name in total}
    for result in (loop, vmap):
        for name in total:
            torch.testing.assert_close(result.gradient[name], total[name], rtol=1e-8, atol=1e-12)


def to_float64(episode: Episode) -> Episode:
    return Episode(*(Batch(batch.x.double(), batch.y) for batch in episode))


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in ("matching-fce", "relation-mean", "imp-many")))
        for name in METHODS
    ],
)
def test_method_learns_digits(method: str) -> None:
    """60 small steps reduce the loss on unseen drawings, with an accuracy well above chance (1/3)."""
    problem = build_problem(build_job(method, shots=1, eval_queries=10))
    server = ParameterServer(problem.init(), problem.job.outer)
    ids = task_ids(1, "val", 0, 60)
    drawn = problem.family.draw("val", ids)

    def evaluate() -> tuple[float, float]:
        metrics = score_tasks(
            problem.adapting("val"), problem.score("val"), server.theta(), drawn, ids, VMAP
        ).metrics
        return float(metrics["loss"].mean()), float(metrics["accuracy"].mean())

    first_loss, _ = evaluate()
    for step in range(60):
        train = task_ids(1, "train", step, 8)
        episodes = problem.family.draw("train", train)
        args = (problem.algorithm, problem.score("train"), server.theta(), episodes, train, VMAP)
        server.step(server.layout.flatten(shard_gradient(*args).gradient) / 8)
    loss, accuracy = evaluate()
    assert loss < first_loss
    assert accuracy > 0.6


@pytest.mark.parametrize("method", ["protonet", "relation", "imp"])
def test_tasks_without_classes_are_an_error(method: str) -> None:
    problem = build_problem(Job.parse(tree(ALGORITHMS[method])))
    drawn = problem.family.draw("train", task_ids(0, "train", 0, 1))
    episode = Episode(*(Batch(batch.x[0], batch.y[0]) for batch in drawn))
    with pytest.raises(InputError, match=rf"algorithm\.type: got {method} for tasks without classes"):
        predict(problem.algorithm, problem.init(), episode)


def test_impossible_options_are_errors() -> None:
    for options, message in (
        ({"type": "protonet", "distance": "manhattan"}, r"algorithm\.distance: got 'manhattan'"),
        ({"type": "relation", "hidden": 8}, r"algorithm\.hidden: got 8"),
        ({"type": "matching", "scale": 0.0}, r"algorithm\.scale: got 0\.0"),
        ({"type": "imp", "clusters": 0}, r"algorithm\.clusters: got 0"),
        ({"type": "imp", "lam": 1.0}, r"algorithm\.lam: unknown key"),
    ):
        with pytest.raises(InputError, match=message):
            Job.parse(tree(options))
    with pytest.raises(InputError, match=r"model\.head: got shared for a method without a linear head"):
        build_problem(Job.parse(tree("protonet", model={"head": "shared"}))).init()
