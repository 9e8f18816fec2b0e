"""Every algorithm takes inputs of every structure: the gradient is that of the same numbers as one tensor.

Shapes: T tasks, N rows, 4 features.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import ALGORITHMS, CLASSES, SETTINGS, tree
from torch import Tensor, nn

import distmeta
from distmeta.compute.compiler import Compiler
from distmeta.compute.conversion import convert_episodes
from distmeta.compute.execution import Execution, shard_gradient
from distmeta.compute.scoring import score_tasks
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.protocols import PADDING, Batch, Episode
from distmeta.runtime.problem import build_problem
from distmeta.runtime.resolve import resolve
from distmeta.seeding import draw_uniforms, task_ids
from distmeta.tasks.few_shot import ClassificationScore
from distmeta.trees import tree_leaves, tree_map


class Views(NamedTuple):
    left: Tensor
    right: Tensor


class Labelled(NamedTuple):
    """A support or query set of a user's own type, with a further field."""

    x: Any
    y: Any
    weight: Tensor


STRUCTURES: dict[str, Any] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x[..., :2], x[..., 2:]),
    "NamedTuple": lambda x: Views(x[..., :2], x[..., 2:]),
    "dict": lambda x: {"left": x[..., :2], "right": x[..., 2:]},
    "nested": lambda x: {"a": Views(x[..., :1], x[..., 1:2]), "b": (x[..., 2:],)},
}


class JoiningNet(nn.Module):
    """Joins the leaves of its input."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, out_features)

    def forward(self, x: Any) -> Tensor:
        return self.head(torch.tanh(self.body(torch.cat(tree_leaves(x), -1))))


class Structured:
    """Classes or targets of random vectors, in one of the structures."""

    in_shape = (4,)

    def __init__(self, structure: str, classes: bool = True, own_type: bool = False):
        self.build = STRUCTURES[structure]
        self.own_type = own_type
        self.classes = classes
        self.out_features = 2 if classes else 1
        self.score: Any = ClassificationScore(2) if classes else self.score_targets

    def draw(self, split: str, ids: Any) -> Episode:
        x = torch.from_numpy(draw_uniforms(ids, 40)).float().view(len(ids), 10, 4)
        labels = torch.tensor([0, 1] * 5).expand(len(ids), 10)
        x[..., 0] += labels
        y = labels if self.classes else x.square().sum(-1, keepdim=True)
        return Episode(self.build_batch(x[:, :4], y[:, :4]), self.build_batch(x[:, 4:], y[:, 4:]))

    def build_batch(self, x: Tensor, y: Tensor) -> Any:
        inputs = self.build(x)
        return Labelled(inputs, y, torch.ones(y.shape[:2])) if self.own_type else Batch(inputs, y)

    @staticmethod
    def score_targets(outputs: Tensor, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return (outputs - batch.y).square().mean(), {}


POLICIES = ("maml-rl", "e-maml", "meta-sgd-policy", "reptile-policy", "rl2")
"""Their data are trajectories that a policy collects."""
NAMES = [name for name in ALGORITHMS if name not in POLICIES]


@pytest.fixture(autouse=True)
def path_of_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def build_job(name: str, structure: str, own_type: bool = False, **run: Any) -> Job:
    uses_classes = SETTINGS.get(name) is CLASSES
    tasks = {
        "type": "test_data_shapes:Structured",
        "structure": structure,
        "classes": uses_classes,
        "own_type": own_type,
    }
    settings = {"tasks_per_step": 4, "shards": 2, "eval_every": 0} | run
    return Job.parse(tree(name, model={"type": "test_data_shapes:JoiningNet"}, tasks=tasks, run=settings))


def compute_gradient(name: str, structure: str, execution: Execution, own_type: bool = False) -> Tensor:
    """Return the meta-gradient of four tasks, in float64."""
    problem = build_problem(build_job(name, structure, own_type))
    theta = {key: value.double() for key, value in problem.init().items()}
    problem.model.to(dtype=torch.float64)
    ids = task_ids(0, "train", 0, 4)
    drawn = convert_episodes(problem.family.draw("train", ids))
    episodes = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, drawn)
    algorithm = problem.training_at(0)
    result = shard_gradient(algorithm, problem.family.score, theta, episodes, ids, execution)
    scores = score_tasks(problem.algorithm, problem.family.score, theta, episodes, ids, execution)
    assert all(np.isfinite(column).all() for column in scores.metrics.values())
    return torch.cat([result.gradient[key].flatten() for key in theta])


gradient_of_one_tensor = cache(partial(compute_gradient, structure="tensor", execution=Execution("loop", 1)))


@pytest.mark.parametrize(
    ("structure", "mode", "own_type"),
    [
        ("tuple", "loop", False),
        ("NamedTuple", "loop", False),
        ("dict", "vmap", False),
        ("nested", "vmap", False),
        ("nested", "loop", True),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_does_not_depend_on_the_structure(
    name: str, structure: str, mode: str, own_type: bool
) -> None:
    expected = gradient_of_one_tensor(name)
    assert bool(expected.any())
    found = compute_gradient(name, structure, Execution(mode, 4), own_type)
    assert float((found - expected).norm() / expected.norm()) <= 1e-9


@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile", "meta-sgd", "anil", "protonet", "hypernet"])
def test_method_trains_validates_and_evaluates_on_a_nested_structure(name: str, workplace: Path) -> None:
    job = build_job(name, "nested", steps=2, eval_every=1, eval_tasks=4)
    finished = distmeta.train(job)
    figures = distmeta.evaluate(finished.run, ["run.eval_tasks=4"], predictions="p.parquet").figures
    assert figures["loss_after"] is not None
    learner = distmeta.load(finished.run)
    support = learner.problem.example.support
    assert len(learner.adapt(support.x, support.y).predict(support.x)) == 4


def relative_distance(found: Any, expected: Any) -> float:
    """Return the distance of two gradients, relative to the second one."""
    distance = sum(float((found[name] - value).square().sum()) for name, value in expected.items())
    return float((distance / sum(float(value.square().sum()) for value in expected.values())) ** 0.5)


def draw_doubles(structure: str, ids: Any, classes: bool) -> Episode:
    """Draw tasks in float64, stacked."""
    drawn = Structured(structure, classes).draw("train", ids)
    return tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, drawn)


IDS = task_ids(0, "train", 0, 4)
SIZES = [2, 4, 2, 3]
"""Support rows of the tasks in a list of unequal tasks."""


@pytest.mark.parametrize("mode", ["loop", "vmap"])
@pytest.mark.parametrize("name", ["maml", "protonet", "hypernet", "matching"])
def test_unequal_tasks_have_the_gradient_of_one_tensor(name: str, mode: str) -> None:
    gradients = []
    for structure in ("nested", "tensor"):
        problem = build_problem(build_job(name, structure))
        theta = {key: value.double() for key, value in problem.init().items()}
        problem.model.to(dtype=torch.float64)
        stacked = draw_doubles(structure, IDS, SETTINGS.get(name) is CLASSES)
        episodes = [tree_map(lambda leaf, t=t: leaf[t], stacked) for t in range(4)]
        episodes = [
            episode._replace(support=tree_map(lambda leaf, n=n: leaf[:n], episode.support))
            for episode, n in zip(episodes, SIZES, strict=True)
        ]
        score = problem.family.score
        way = Execution(mode, 4) if structure == "nested" else Execution("loop", 1)
        gradients.append(shard_gradient(problem.algorithm, score, theta, episodes, IDS, way).gradient)
    assert relative_distance(*gradients) <= 1e-9


@pytest.mark.parametrize("mode", ["loop", "vmap"])
@pytest.mark.parametrize("name", [name for name in NAMES if SETTINGS.get(name) is CLASSES])
def test_rows_of_padding_in_a_tree_have_no_effect(name: str, mode: str) -> None:
    problem = build_problem(build_job(name, "nested"))
    theta = {key: value.double() for key, value in problem.init().items()}
    problem.model.to(dtype=torch.float64)
    plain = draw_doubles("nested", IDS, classes=True)

    def pad(batch: Batch) -> Batch:
        x = tree_map(lambda leaf: torch.cat([leaf, torch.full_like(leaf[:, :2], 9.0)], 1), batch.x)
        return Batch(x, torch.cat([batch.y, torch.full_like(batch.y[:, :2], PADDING)], 1))

    padded = Episode(pad(plain.support), pad(plain.query))
    way = Execution(mode, 4)
    gradients = [
        shard_gradient(problem.algorithm, problem.family.score, theta, episodes, IDS, way).gradient
        for episodes in (padded, plain)
    ]
    assert relative_distance(*gradients) <= 1e-9


@pytest.mark.parametrize("name", ["maml", "protonet"])
def test_traced_program_takes_a_tree(name: str) -> None:
    problem = build_problem(build_job(name, "nested"))
    theta = problem.init()
    episodes = convert_episodes(problem.family.draw("train", IDS))
    given = (problem.training_at(0), problem.family.score, theta, episodes, IDS, Execution("vmap", 4))
    compiler = Compiler("float32", trace_only=True)
    assert (
        relative_distance(shard_gradient(*given, compiler).gradient, shard_gradient(*given).gradient) <= 1e-5
    )


class TargetTrees(Structured):
    """Several targets."""

    def __init__(self, structure: str = "dict"):
        super().__init__(structure, classes=False)

    def build_batch(self, x: Tensor, y: Tensor) -> Batch:
        return Batch(self.build(x), {"value": y, "is_large": (y > 1).long()})

    @staticmethod
    def score_targets(outputs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (outputs - batch.y["value"]).square().mean()
        return loss + nn.functional.softplus(-outputs * batch.y["is_large"]).mean(), {}


READS_TARGETS = {
    "matching": r"got matching with dict as targets, expected one tensor \[N, D\]",
    "matching-fce": r"got matching with dict as targets",
    "snail": r"got snail with dict as targets",
    "mann": r"got mann with dict as targets",
    "mann-ntm": r"got mann with dict as targets",
    "mann-dnc": r"got mann with dict as targets",
    "hypernet": r"got hypernet with dict as targets",
    "hypernet-regression": r"got hypernet with dict as targets",
    "protonet": r"got protonet for tasks without classes",
    "relation": r"got relation for tasks without classes",
    "imp": r"got imp for tasks without classes",
    "bilevel": r"algorithm.problem: got learned-loss with dict as targets, expected one tensor \[N, 1\]",
    "bilevel-implicit": r"algorithm.problem: got reweighting with dict as targets, expected class indices \[N\]",
}
"""Methods that read the targets themselves, and what they say of several targets."""


@pytest.mark.parametrize("name", NAMES)
def test_targets_may_be_a_tree_unless_the_method_reads_them(name: str) -> None:
    run = {"tasks_per_step": 2, "shards": 1, "eval_every": 0}
    model = {"type": "test_data_shapes:JoiningNet"}
    job = Job.parse(tree(name, model=model, tasks={"type": "test_data_shapes:TargetTrees"}, run=run))
    if name in READS_TARGETS:
        with pytest.raises(InputError, match=READS_TARGETS[name]):
            resolve(build_problem(job))
    else:
        assert resolve(build_problem(job)).execution.mode == "vmap"
