"""Data of a user's `draw` in other types: converted if the meaning is clear, else refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import tree

from distmeta.compute.conversion import check_episodes, convert_episodes, describe_missing_numbers
from distmeta.compute.episodes import collect_episodes
from distmeta.compute.execution import shard_gradient
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.protocols import Batch, Episode
from distmeta.runtime.problem import build_problem
from distmeta.runtime.resolve import resolve
from distmeta.tasks.few_shot import ClassificationScore
from distmeta.trees import tree_leaves, tree_map


class Weighted(NamedTuple):
    x: Any
    y: Any
    weight: Any


def squared_error(outputs: Any, batch: Any) -> Any:
    return (outputs - batch.y).square().mean(), {}


def convert(drawn: Any, score: Any = None) -> Any:
    return convert_episodes(drawn, score)


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
        {"support": (X, Y), "query": {"x": X, "y": Y}},
        Episode(Batch(X.flip(1).numpy()[:, ::-1], Y.numpy().astype(">f4")), Batch(X, Y)),
    ],
    ids=["float64", "numpy", "lists", "pairs", "no Episode", "dicts", "memory layouts"],
)
def test_clear_types_are_converted(drawn: Any) -> None:
    converted = convert(drawn, squared_error)
    pairs = list(zip(tree_leaves(converted), tree_leaves(EXPECTED), strict=True))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    assert isinstance(converted, Episode)
    assert isinstance(converted.support, Batch)


def test_other_types_of_numbers() -> None:
    batch = Weighted({"a": X.half(), "b": (np.int32(1), [True, False])}, Y.bfloat16(), X.to(torch.uint8))
    converted = convert(Episode(batch, batch), squared_error).support
    assert isinstance(converted, Weighted)
    dtypes = [leaf.dtype for leaf in tree_leaves(converted)]
    assert dtypes == [torch.float32, torch.int64, torch.bool, torch.float32, torch.uint8]
    labels = torch.tensor([[True, False]])
    classes = convert(Episode(Batch(X, labels), Batch(X, labels)), ClassificationScore(2))
    assert classes.support.y.tolist() == [[1, 0]]
    byte_labels = Weighted(X, labels.to(torch.uint8), X)
    own_type = convert(Episode(byte_labels, byte_labels), ClassificationScore(2)).support
    assert isinstance(own_type, Weighted)
    assert own_type.y.dtype == torch.int64
    tags = convert(Episode(Batch(X, labels), Batch(X, labels)), squared_error)
    assert tags.support.y.dtype == torch.bool


def test_usual_episodes_are_not_copied() -> None:
    assert convert(EXPECTED, squared_error).support.x is X


def test_a_tensor_never_shares_memory_that_is_read_only() -> None:
    array = X.numpy().copy()
    array.flags.writeable = False
    converted = convert(Episode(Batch(array, Y), Batch(X, Y))).support.x
    converted += 1
    assert np.array_equal(array, X.numpy())


def replace_support(**changes: Any) -> Episode:
    return EXPECTED._replace(support=EXPECTED.support._replace(**changes))


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (None, r"draw returned NoneType, expected an Episode"),
        (EXPECTED.support, r"draw returned Batch, expected an Episode"),
        (Episode(X, Y), r"draw returned query as Tensor, expected a Batch of x and y"),
        (replace_support(y=["a", "b"]), r"draw returned support.y.0 as str, expected tensors"),
        (replace_support(y={"mask": None}), r"draw returned support.y.mask as NoneType, expected tensors"),
        (
            replace_support(x=np.array([["a"]])),
            r"draw returned support.x as an array of <U1, expected numbers",
        ),
        (
            replace_support(x=Weighted([[1, 2], [3]], Y, Y)),
            r"draw returned support.x.x as lists of different lengths, expected equal lengths: pad them, or return",
        ),
        (
            EXPECTED._replace(query={"x": X, "y": Y, "weight": Y}),
            r"draw returned query as a dict of x, y, weight, expected a Batch, or a NamedTuple of your own with these",
        ),
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
        check_episodes(convert(drawn, squared_error), 2, squared_error)


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
        check_episodes(convert(drawn), 2, ClassificationScore(3))


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
        episodes = convert(problem.family.draw("train", ids))
        score = problem.score("train")
        result = shard_gradient(problem.algorithm, score, problem.init(), episodes, ids, problem.execution)
        gradients.append(result.gradient)
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


class OtherQuery(Pixels):
    """The query set differs from the support set."""

    def __init__(self, difference: str):
        self.difference = difference

    def draw(self, split: str, ids: Any) -> Any:
        x = X[: len(ids)]
        others = {"structure": {"a": x}, "dtype": (10 * x).long(), "shape": x[..., :2]}
        return Episode(Batch(x, Y[: len(ids)]), Batch(others[self.difference], Y[: len(ids)]))


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ("structure", r"support.x as one tensor and query.x as the fields a, expected the same structure"),
        ("dtype", r"support.x as float32 and query.x as int64, expected the same dtype"),
        ("shape", r"support.x of shape \[5, 3\] and query.x of shape \[5, 2\], expected equal shapes except"),
    ],
)
def test_a_failure_is_explained_by_different_inputs(difference: str, message: str) -> None:
    tasks = {"type": "test_conversion:OtherQuery", "difference": difference}
    run = {"eval_every": 0, "tasks_per_step": 2, "shards": 1}
    with pytest.raises(
        InputError, match=rf"tasks.type: draw returned {message}.* \(the computation failed: "
    ):
        resolve(build_problem(Job.parse(tree("maml", tasks=tasks, run=run))))


class BadValidation(Pixels):
    """The validation tasks have more classes than the score."""

    out_features = 3
    score = ClassificationScore(3)  # pyright: ignore[reportAssignmentType]

    def draw(self, split: str, ids: Any) -> Any:
        y = torch.arange(5).expand(len(ids), 5) % (5 if split == "val" else 3)
        return Episode(Batch(X[: len(ids)], y), Batch(X[: len(ids)], y))


def test_validation_tasks_are_checked_before_step_0() -> None:
    job = build_job("BadValidation").replace(run={"eval_every": 1})
    message = (
        r"draw of split val returned support.y with classes from 0 to 4, expected 0 to 2 \(score.ways = 3\)"
    )
    with pytest.raises(InputError, match=f"tasks.type: {message}"):
        resolve(build_problem(job))


def test_numbers_that_are_not_finite_are_reported() -> None:
    notes: list[str] = []
    job = Job.parse(tree("maml", tasks={"type": "hard_cases:AllTasksWithNaN"}))
    resolve(build_problem(job), notes.append)
    assert any(
        note.startswith("tasks.type: draw returned NaN in support.y, expected finite") for note in notes
    )
    infinite = EXPECTED._replace(query=Batch(X, Y / 0))
    assert "infinity in query.y" in str(describe_missing_numbers(infinite))
    assert describe_missing_numbers(EXPECTED) is None


class NumpyNavigation:
    """Collects the trajectories of navigation as float64 arrays."""

    def __init__(self) -> None:
        self.family: Any = build_problem(Job.parse(tree("maml-rl"))).family
        self.in_shape = self.family.in_shape
        self.out_features = self.family.out_features
        self.draw = None
        self.score = self.family.score

    def collect(self, split: str, ids: Any, k: int, policy: Any) -> Any:
        def policy_of_arrays(x: torch.Tensor) -> Any:
            return policy(x.numpy().astype(np.float64))

        batch = self.family.collect(split, ids, k, policy_of_arrays)
        return tree_map(
            lambda leaf: leaf.double().numpy() if leaf.is_floating_point() else leaf.numpy(), batch
        )


def test_collected_arrays_are_converted() -> None:
    problem = build_problem(Job.parse(tree("maml-rl")))
    ids = np.arange(2, dtype=np.uint64)
    given = (problem.algorithm, problem.init(), "train", ids, 1)
    expected = tree_leaves(collect_episodes(problem.family, *given))  # pyright: ignore[reportArgumentType]
    found = tree_leaves(collect_episodes(NumpyNavigation(), *given))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
