"""ProtoNet, matching, relation networks, IMP on tasks of every size: ways, padding, absent classes, learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALGORITHMS, tree
from torch import Tensor

import distmeta
from distmeta.compute.execution import Execution, shard_gradient
from distmeta.compute.scoring import score_tasks
from distmeta.compute.gradient import unroll
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.compute.gradient import query_loss
from distmeta.protocols import PADDING, Batch, Episode, Theta
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.problem import build_problem, with_score
from distmeta.seeding import task_ids
from distmeta.tasks.few_shot import ClassificationScore

LOOP, VMAP = Execution("loop", 1), Execution("vmap", 2**31)
METHODS: dict[str, dict[str, Any]] = {
    name: ALGORITHMS[name] for name in ("protonet", "matching", "matching-fce", "relation", "imp")
} | {
    "protonet-cosine": {"type": "protonet", "distance": "cosine", "scale": 10.0, "learn_scale": True},
    "relation-mean": {"type": "relation", "hidden": [8], "combine": "mean", "loss": "cross-entropy"},
    "imp-many": {"type": "imp", "sigma": 0.05, "learn_sigma": False, "concentration": 5.0},  # opens clusters
}


def outputs(algorithm: Any, theta: Theta, episode: Episode) -> Tensor:
    return algorithm.predict(theta, algorithm.begin(theta, episode.support), episode.query.x)


def job(method: str, **tasks: Any) -> Job:
    sizes = {"ways": 3, "shots": 2, "queries": 4, "order": "random"} | tasks
    return Job.parse(
        tree(
            METHODS[method],
            model={"type": "mlp", "hidden": [16], "activation": "tanh"},
            tasks={"type": "digits", **sizes},
        )
    )


@pytest.mark.parametrize("method", METHODS)
def test_any_ways_in_evaluation(method: str) -> None:
    for ways in (2, 6):
        problem = build_problem(job(method, eval_ways=ways))
        theta, ids = problem.init(), task_ids(0, "test", 0, 3)
        assert not set(problem.model.head) & set(theta)
        drawn = problem.family.draw("test", ids)
        args = (problem.adapting("test"), problem.score("test"), theta, drawn, ids)
        loop, vmap = (score_tasks(*args, execution, outputs=True) for execution in (LOOP, VMAP))
        assert loop.outputs.shape == (3, 4 * ways, ways)
        torch.testing.assert_close(loop.outputs, vmap.outputs, rtol=1e-4, atol=1e-4)
        assert loop.metrics["loss"].shape == (3, 1)


def trained(method: str) -> Path:
    run = {"steps": 3, "eval_every": 3, "eval_tasks": 4}
    return distmeta.train(job(method).replace(run=run, outer={"lr": 0.001})).run


@pytest.mark.parametrize("method", ["protonet", "matching-fce", "imp-many"])
def test_a_run_is_evaluated_at_other_ways(method: str, workplace: Path) -> None:
    run = trained(method)
    for ways in (2, 6):
        figures = distmeta.evaluate(run, [f"tasks.ways={ways}", "run.eval_tasks=40"]).figures
        assert figures["accuracy_before"] is None
        assert (figures["accuracy_after"] or 0) > 1.3 / ways


def test_a_run_is_deployed_at_other_ways(workplace: Path) -> None:
    drawn = build_problem(job("protonet", ways=6)).family.draw("test", task_ids(0, "test", 0, 1))
    adapted = distmeta.load(trained("protonet")).adapt(drawn.support.x[0], drawn.support.y[0] + 10)
    assert adapted(drawn.support.x[0]).shape == (12, 6)
    assert set(adapted.predict(drawn.query.x[0]).tolist()) <= set(range(10, 16))


@pytest.mark.parametrize("method", METHODS)
def test_a_class_without_support_is_never_chosen(method: str) -> None:
    problem = build_problem(job(method))
    theta, drawn = problem.init(), problem.family.draw("train", task_ids(0, "train", 0, 1))
    support = Batch(drawn.support.x[0], torch.where(drawn.support.y[0] == 1, PADDING, drawn.support.y[0]))
    query = Batch(drawn.query.x[0], torch.where(drawn.query.y[0] == 1, PADDING, drawn.query.y[0]))
    algorithm, score = problem.algorithm, problem.score("train")
    meta_loss = getattr(algorithm, "meta_loss", None) or (lambda *args: query_loss(algorithm, *args))
    gradient, (loss, _) = torch.func.grad_and_value(
        lambda t: meta_loss(t, Episode(support, query), unroll, score), has_aux=True
    )(theta)
    found = outputs(algorithm, theta, Episode(support, query))
    assert bool((found[:, 1] < -1e30).all())
    assert bool(torch.isfinite(found).all())
    assert bool(torch.isfinite(loss))
    assert all(bool(torch.isfinite(g).all()) for g in gradient.values())


@pytest.mark.parametrize("method", METHODS)
def test_padding_counts_nowhere(method: str) -> None:
    """The loss and the gradient of a filled-up task are those of the smaller task itself."""
    problem = build_problem(job(method, ways=4, shots=3, min_ways=2, min_shots=1, unbalanced=True))
    theta = {name: value.double() for name, value in problem.init().items()}
    problem.model.to(dtype=torch.float64)
    algorithm, ids = problem.algorithm, task_ids(0, "train", 0, 6)
    drawn = problem.family.draw("train", ids)
    whole, vmapped = (
        shard_gradient(algorithm, problem.score("train"), theta, doubled(drawn), ids, execution)
        for execution in (LOOP, VMAP)
    )
    total = {name: torch.zeros_like(value) for name, value in theta.items()}
    for t in range(len(ids)):
        small = Episode(*(Batch(b.x[t : t + 1, keep], b.y[t : t + 1, keep])
                          for b in doubled(drawn) for keep in [b.y[t] != PADDING]))  # fmt: skip
        own = ClassificationScore(int(small.support.y.max()) + 1)
        alone = shard_gradient(with_score(algorithm, own), own, theta, small, ids[:1], LOOP)
        for name in ("loss_after", "accuracy_after"):
            assert whole.metrics[name][t] == pytest.approx(alone.metrics[name][0], rel=1e-9)
        total = {name: total[name] + alone.gradient[name] for name in total}
    for result in (whole, vmapped):
        for name in total:
            torch.testing.assert_close(result.gradient[name], total[name], rtol=1e-8, atol=1e-12)


def doubled(episode: Episode) -> Episode:
    return Episode(*(Batch(batch.x.double(), batch.y) for batch in episode))


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in ("matching-fce", "relation-mean", "imp-many")))
        for name in METHODS
    ],
)
def test_learns_digits(method: str) -> None:
    """Sixty small steps bring the loss on unseen drawings down, and the accuracy well above chance (1/3)."""
    problem = build_problem(job(method, shots=1, eval_queries=10))
    server, ids = ParameterServer(problem.init(), problem.job.outer), task_ids(1, "val", 0, 60)
    drawn = problem.family.draw("val", ids)

    def scores() -> tuple[float, float]:
        found = score_tasks(
            problem.adapting("val"), problem.score("val"), server.theta(), drawn, ids, VMAP
        ).metrics
        return float(found["loss"].mean()), float(found["accuracy"].mean())

    first = scores()[0]
    for step in range(60):
        train = task_ids(1, "train", step, 8)
        episodes = problem.family.draw("train", train)
        args = (problem.algorithm, problem.score("train"), server.theta(), episodes, train, VMAP)
        server.step(server.layout.flatten(shard_gradient(*args).gradient) / 8)
    loss, accuracy = scores()
    assert loss < first
    assert accuracy > 0.6


@pytest.mark.parametrize("method", ["protonet", "relation", "imp"])
def test_classes_are_needed(method: str) -> None:
    problem = build_problem(Job.parse(tree(ALGORITHMS[method])))
    drawn = problem.family.draw("train", task_ids(0, "train", 0, 1))
    episode = Episode(*(Batch(batch.x[0], batch.y[0]) for batch in drawn))
    with pytest.raises(InputError, match=rf"algorithm\.type: got {method} for tasks without classes"):
        outputs(problem.algorithm, problem.init(), episode)


def test_options_are_checked() -> None:
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
