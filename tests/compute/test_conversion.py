"""Data of a user's `draw` in other types: converted if the meaning is clear, else refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import tree

from distmeta.compute.conversion import check_episodes, convert_episodes
from distmeta.compute.execution import shard_gradient
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.protocols import Batch, Episode
from distmeta.runtime.problem import build_problem
from distmeta.runtime.resolve import resolve
from distmeta.tasks.few_shot import ClassificationScore
from distmeta.trees import tree_leaves


class Weighted(NamedTuple):
    x: Any
    y: Any
    weight: Any


def squared_error(outputs: Any, batch: Any) -> Any:
    return (outputs - batch.y).square().mean(), {}


X = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(-1, keepdim=True)
EXPECTED = Episode(Batch(X, Y), Batch(X, Y))


@pytest.mark.parametrize(
    "drawn",
    [
        Episode(Batch(X.double(), Y.double()), Batch(X, Y)),
        Episode(Batch(X.numpy(), Y.numpy().astype(np.float64)), Batch(X, Y)),
        Episode(Batch(X.tolist(), Y.tolist()), Batch(X, Y)),
        Episode((X, Y), {"x": X, "y": Y}),
        ((X, Y), (X, Y)),
    ],
    ids=["float64", "numpy", "lists", "pairs", "no Episode"],
)
def test_clear_types_are_converted(drawn: Any) -> None:
    converted = convert_episodes(drawn, squared_error)
    pairs = list(zip(tree_leaves(converted), tree_leaves(EXPECTED), strict=True))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    assert isinstance(converted, Episode)
    assert isinstance(converted.support, Batch)


def test_other_types_of_numbers() -> None:
    batch = Weighted({"a": X.half(), "b": (np.int32(1), [True, False])}, Y.bfloat16(), X.to(torch.uint8))
    converted: Any = convert_episodes(Episode(batch, batch), squared_error).support
    assert isinstance(converted, Weighted)
    dtypes = [leaf.dtype for leaf in tree_leaves(converted)]
    assert dtypes == [torch.float32, torch.int64, torch.bool, torch.float32, torch.uint8]
    labels = torch.tensor([[True, False]])
    classes = convert_episodes(Episode(Batch(X, labels), Batch(X, labels)), ClassificationScore(2))
    assert classes.support.y.tolist() == [[1, 0]]
    tags = convert_episodes(Episode(Batch(X, labels), Batch(X, labels)), squared_error)
    assert tags.support.y.dtype == torch.bool


def test_usual_episodes_are_not_copied() -> None:
    assert convert_episodes(EXPECTED, squared_error).support.x is X


def replace_support(**changes: Any) -> Episode:
    return EXPECTED._replace(support=EXPECTED.support._replace(**changes))


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (None, r"draw returned NoneType, expected an Episode"),
        (replace_support(y=["a", "b"]), r"draw returned an episode with a str, expected tensors"),
        (
            replace_support(x=X[0]),
            r"draw returned support.x of shape \[5, 3\] for 2 tasks, expected a leading",
        ),
        (
            replace_support(y=Y[:, :4]),
            r"draw returned 5 examples in support.x and 4 in support.y, expected as many",
        ),
        (replace_support(x=X[:, :0], y=Y[:, :0]), r"draw returned an empty support.x"),
        (
            replace_support(y={"mask": Y, "size": Y[:, :2]}),
            r"draw returned 5 examples in support.x and 2 in support.y.size",
        ),
    ],
)
def test_common_mistakes_are_one_line(drawn: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"tasks.type: {message}"):
        check_episodes(convert_episodes(drawn, squared_error), 2, squared_error)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(2, 5), r"support.y as float32, expected class indices \(int64\), .*: use y.long\(\)"),
        (
            torch.zeros(2, 5, 1).long(),
            r"support.y as shape \[5, 1\] of one task, expected class indices \[N\]",
        ),
        (torch.full((2, 5), 3), r"support.y with classes from 3 to 3, expected 0 to 2 \(score.ways = 3\)"),
        ({"a": torch.zeros(2, 5).long()}, r"support.y as dict of one task, expected class indices"),
    ],
)
def test_labels_of_a_classification_are_checked(y: Any, message: str) -> None:
    drawn = Episode(Batch(X, y), Batch(X, torch.zeros(2, 5).long()))
    with pytest.raises(InputError, match=message):
        check_episodes(convert_episodes(drawn), 2, ClassificationScore(3))


class Pixels:
    """Images as bytes."""

    in_shape = (3,)
    out_features = 1
    dtype: Any = torch.uint8

    def draw(self, split: str, ids: Any) -> Any:
        x = (255 * X[: len(ids)]).to(self.dtype)
        return Episode(Batch(x, Y[: len(ids)]), Batch(x, Y[: len(ids)]))

    score = staticmethod(squared_error)


class DoublePixels(Pixels):
    dtype = torch.float64


class FloatPixels(Pixels):
    dtype = torch.float32


@pytest.fixture(autouse=True)
def path_of_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def build_job(tasks: str) -> Job:
    run = {"eval_every": 0, "tasks_per_step": 2, "shards": 1}
    return Job.parse(tree("maml", tasks={"type": f"test_conversion:{tasks}"}, run=run))


def test_bytes_as_inputs_are_refused_with_the_remedy() -> None:
    with pytest.raises(
        InputError, match=r"draw returned support.x as uint8, .* pixels \(x.float\(\) / 255\)"
    ):
        resolve(build_problem(build_job("Pixels")))


def test_float64_data_give_the_gradient_of_float32_data() -> None:
    gradients = []
    for tasks in ("DoublePixels", "FloatPixels"):
        problem = resolve(build_problem(build_job(tasks)))
        ids = np.arange(2, dtype=np.uint64)
        episodes = convert_episodes(problem.family.draw("train", ids))
        score = problem.score("train")
        result = shard_gradient(problem.algorithm, score, problem.init(), episodes, ids, problem.execution)
        gradients.append(result.gradient)
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
