"""Tasks of unequal shapes are computed shape by shape. The results are those of single tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tree
from test_execution import LOOP, VMAP

import distmeta
from distmeta.compute.buckets import group_by_shape
from distmeta.compute.compiler import Compiler
from distmeta.compute.episodes import draw_episodes, make_episodes
from distmeta.compute.execution import Execution, shard_gradient
from distmeta.compute.scoring import score_tasks
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.evaluation.one_task import run_one_task
from distmeta.protocols import Episode
from distmeta.runtime.problem import build_problem
from distmeta.runtime.resolve import resolve
from distmeta.trees import tree_map

UNEQUAL = {"type": "hard_cases:UnequalTasks"}
IDS = np.array([4, 0, 1, 6, 2, 10, 3, 5], np.uint64)
"""Tasks with these support and query rows: 4 3, 3 2, 4 2, 3 2, 5 2, 4 3, 3 3, 5 3."""
POSITIONS = [[0, 5], [1, 3], [2], [4], [6], [7]]


def parts(algorithm: Any = "maml", dtype: torch.dtype = torch.float64, **tasks: Any) -> tuple[Any, ...]:
    """Return the algorithm, the score, theta and the episodes of the tasks IDS."""
    problem = build_problem(Job.parse(tree(algorithm, tasks=UNEQUAL | tasks)))
    episodes = draw_episodes(problem.family, "train", IDS)
    episodes = tree_map(lambda leaf: leaf.to(dtype), episodes)
    theta = {name: value.to(dtype) for name, value in problem.init().items()}
    return problem.algorithm, problem.score("train"), theta, episodes


def relative_distance(one: Any, other: Any) -> float:
    a, b = (torch.cat([value.flatten() for value in gradient.values()]) for gradient in (one, other))
    return float((a - b).norm() / a.norm())


def test_buckets_are_in_the_order_of_their_first_tasks() -> None:
    *_, episodes = parts()
    found = group_by_shape(episodes, 1)
    assert [list(bucket.positions) for bucket in found] == POSITIONS
    assert found[0].episodes.support.x.shape == (2, 4, 1)
    assert torch.equal(found[0].episodes.query.y[1], episodes[5].query.y)


def test_equal_tasks_are_stacked_and_wrong_length_is_refused() -> None:
    family = build_problem(Job.parse(tree(tasks=UNEQUAL))).family
    assert isinstance(draw_episodes(family, "train", IDS[1:4:2]), Episode)
    assert isinstance(draw_episodes(family, "train", IDS[:2]), list)

    class Short:
        score = family.score

        def draw(self, split: str, ids: Any) -> Any:
            return family.draw(split, ids)[1:]

    with pytest.raises(
        InputError, match=r"tasks.type: draw returned 7 episodes, expected one for each of 8 tasks"
    ):
        draw_episodes(Short(), "train", IDS)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("differentiation", ["reverse", "constant-memory"])
@pytest.mark.parametrize("execution", [LOOP, VMAP, Execution("vmap", 1)], ids=["loop", "vmap", "chunks"])
def test_gradient_is_the_sum_of_single_tasks(execution: Execution, differentiation: str) -> None:
    algorithm, score, theta, episodes = parts()
    way = execution._replace(differentiation=differentiation)
    result = shard_gradient(algorithm, score, theta, episodes, IDS, way)
    alone = [
        shard_gradient(algorithm, score, theta, [one], IDS[t : t + 1], LOOP) for t, one in enumerate(episodes)
    ]
    total = {name: torch.stack([one.gradient[name] for one in alone]).sum(0) for name in theta}
    assert relative_distance(total, result.gradient) <= 1e-9
    assert result.tasks == 8
    for name, column in result.metrics.items():
        np.testing.assert_allclose(column, np.concatenate([one.metrics[name] for one in alone]), rtol=1e-9)


def test_one_program_is_compiled_per_shape() -> None:
    algorithm, score, theta, episodes = parts({"type": "maml", "inner_lr": 0.05, "first_order": True})
    compiler = Compiler("float32", trace_only=True)
    for some in ([0, 1, 5], [5, 1, 0, 3, 3]):
        given = (algorithm, score, theta, [episodes[t] for t in some], IDS[some], VMAP)
        assert (
            relative_distance(shard_gradient(*given).gradient, shard_gradient(*given, compiler).gradient)
            <= 1e-9
        )
    assert len(compiler._programs) == 2


@pytest.mark.parametrize("execution", [LOOP, VMAP], ids=["loop", "vmap"])
def test_dropped_tasks_are_named_by_their_positions(execution: Execution) -> None:
    algorithm, score, theta, episodes = parts(bad=4)
    result = shard_gradient(algorithm, score, theta, episodes, IDS, execution)
    assert (result.dropped, result.tasks) == ((0, 2, 5), 5)
    assert np.isnan(result.metrics["loss_after"]).nonzero()[0].tolist() == [0, 2, 5]


@pytest.mark.parametrize("execution", [LOOP, VMAP], ids=["loop", "vmap"])
def test_scores_and_outputs_are_in_the_order_of_the_tasks(execution: Execution) -> None:
    algorithm, score, theta, episodes = parts()
    found = score_tasks(algorithm, score, theta, episodes, IDS, execution, outputs=True)
    for t, one in enumerate(episodes):
        alone = score_tasks(algorithm, score, theta, [one], IDS[t : t + 1], LOOP, outputs=True)
        np.testing.assert_allclose(found.metrics["loss"][t], alone.metrics["loss"][0], rtol=1e-9)
        torch.testing.assert_close(found.outputs[t], alone.outputs[0], rtol=1e-9, atol=1e-12)


def test_tasks_of_a_group_must_have_equal_shapes() -> None:
    pairwise = {"type": "hard_cases:PairwiseMAML"}
    algorithm, score, theta, episodes = parts(pairwise, pairs=True)
    loop, vmap = (shard_gradient(algorithm, score, theta, episodes, IDS, way) for way in (LOOP, VMAP))
    assert relative_distance(loop.gradient, vmap.gradient) <= 1e-9
    np.testing.assert_allclose(loop.metrics["loss_after"], vmap.metrics["loss_after"], rtol=1e-9)
    with pytest.raises(
        InputError, match=r"tasks.type: got unequal shapes for tasks 0 and 1 .* 2 tasks at a time"
    ):
        shard_gradient(algorithm, score, theta, parts(pairwise)[-1], IDS, LOOP)


@pytest.mark.parametrize("execution", ["auto", "loop", "measure"])
def test_unequal_tasks_are_resolved(execution: str) -> None:
    problem = resolve(build_problem(Job.parse(tree(tasks=UNEQUAL, compute={"execution": execution}))))
    assert problem.execution.mode in ("loop", "vmap")
    assert problem.example.query.x.dtype == torch.float32
    assert isinstance(make_episodes(problem.family, problem.algorithm, {}, "train", IDS, 2), list)


def test_unequal_tasks_are_trained_and_evaluated(workplace: Path) -> None:
    run = distmeta.train(
        Job.parse(tree(tasks=UNEQUAL, run={"steps": 3, "eval_every": 2, "eval_tasks": 30}))
    ).run
    found = distmeta.evaluate(run, ["run.eval_tasks=30"], predictions=workplace / "predicted.parquet")
    table = pq.read_table(workplace / "predicted.parquet").to_pydict()
    rows = [table["episode"].count(t) for t in range(30)]
    assert set(rows) == {2, 3}
    errors: dict[int, list[float]] = {}
    for t, label, prediction in zip(table["episode"], table["label"], table["prediction"], strict=True):
        errors.setdefault(t, []).append((label - prediction) ** 2)
    mean = np.mean([np.mean(errors[t]) for t in range(30)])
    assert found.figures["loss_after"] == pytest.approx(mean, rel=1e-5)
    assert any("episode: " in line for line in run_one_task(Job.parse(tree(tasks=UNEQUAL))))
