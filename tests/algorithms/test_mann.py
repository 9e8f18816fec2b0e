"""MANN: its meta-gradient, what a prediction depends on, its metrics, and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, tree
from torch import Tensor

import distmeta
from distmeta.algorithms.memory.mann import MANN, measure_accuracy_by_instance
from distmeta.compute.execution import Execution, shard_gradient
from distmeta.compute.gradient import unroll
from distmeta.compute.scoring import score_tasks
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.models.functional import FunctionalModel
from distmeta.protocols import PADDING, Batch, Episode
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.problem import build_problem
from distmeta.seeding import task_ids
from distmeta.tasks.few_shot import ClassificationScore
from distmeta.trees import tree_map

KINDS = ("lrua", "ntm", "dnc")
DOUBLE = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def build_learner(classes: bool = True, **options: Any) -> tuple[MANN, dict[str, Tensor], Episode]:
    """Build a small MANN in float64, and an episode of two classes or of a regression: 4 support and 6 query rows."""
    small = {"controller": 5, "slots": 4, "width": 3, "reads": 2}
    score = ClassificationScore(2) if classes else SquaredError()
    outputs = 3 if classes else 2
    model = FunctionalModel(
        lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, outputs)),
        torch.Generator().manual_seed(0),
        out_features=outputs,
    ).to(dtype=DOUBLE)
    algorithm = MANN(model, score, **(small | options))
    theta = {
        name: value.to(DOUBLE) for name, value in algorithm.init(torch.Generator().manual_seed(1)).items()
    }
    x = random(10, 3)
    y = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0, 1, 1]) if classes else random(10, 2, seed=5)
    return algorithm, theta, Episode(Batch(x[:4], y[:4]), Batch(x[4:], y[4:]))


class SquaredError:
    def __call__(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return (outputs - batch.y).square().mean(), {}


@pytest.mark.parametrize(
    "options", [{"memory": kind} for kind in KINDS] + [{"sequential": True}, {"sequence": 2}]
)
@pytest.mark.parametrize("classes", [True, False])
def test_meta_gradient_equals_finite_differences(options: dict[str, Any], classes: bool) -> None:
    algorithm, theta, episode = build_learner(classes, **options)
    direction = {k: random(*v.shape, seed=n) for n, (k, v) in enumerate(theta.items())}

    def loss(at: dict[str, Tensor]) -> Tensor:
        return algorithm.meta_loss(at, episode, unroll, algorithm.score)[0]

    gradient = torch.func.grad(loss)(theta)
    exact = sum(float((gradient[k] * direction[k]).sum()) for k in theta)
    h = 1e-5
    high = float(loss({k: v + h * direction[k] for k, v in theta.items()}))
    low = float(loss({k: v - h * direction[k] for k, v in theta.items()}))
    assert (high - low) / (2 * h) == pytest.approx(exact, rel=1e-6, abs=1e-8)
    assert all(bool(g.any()) for g in gradient.values())


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_does_not_depend_on_other_queries(kind: str) -> None:
    algorithm, theta, (support, query) = build_learner(memory=kind)
    state = algorithm.begin(theta, support)
    together = algorithm.predict(theta, state, query.x)
    alone = torch.cat([algorithm.predict(theta, state, row[None]) for row in query.x])
    torch.testing.assert_close(together, alone)


def test_sequential_prediction_depends_only_on_earlier_queries() -> None:
    algorithm, theta, (support, query) = build_learner(sequential=True)
    state = algorithm.begin(theta, support)
    whole = algorithm.predict(theta, state, query.x)
    first = algorithm.predict(theta, state, query.x[:3])
    torch.testing.assert_close(whole[:3], first)
    alone = algorithm.predict(theta, state, query.x[3:4])
    assert not torch.allclose(whole[3:4], alone)


@pytest.mark.parametrize("classes", [True, False])
def test_label_is_seen_one_row_late(classes: bool) -> None:
    algorithm, theta, (support, query) = build_learner(classes)
    changed = support.y.clone()
    changed[2] = 1 - changed[2]
    features = algorithm.model.features(theta, support.x)
    _, outputs = algorithm._read_sequence(theta, algorithm._start(theta), features, support.y)
    _, others = algorithm._read_sequence(theta, algorithm._start(theta), features, changed)
    torch.testing.assert_close(outputs[:3], others[:3], rtol=0, atol=0)
    assert not torch.allclose(outputs[3], others[3])
    last = support.y.clone()
    last[3] = 1 - last[3]
    outputs = algorithm.predict(theta, algorithm.begin(theta, support), query.x)
    others = algorithm.predict(theta, algorithm.begin(theta, Batch(support.x, last)), query.x)
    assert not torch.allclose(outputs, others), "queries must depend on the last support label"


def test_rows_of_padding_change_nothing() -> None:
    algorithm, theta, (support, query) = build_learner()
    rows = torch.tensor([0, 3, 1, 2, 0, 3])
    filled = Batch(support.x[rows], support.y[rows].where(torch.tensor([1, 0, 1, 1, 0, 1]) > 0, PADDING))
    plain = Batch(support.x, support.y)
    expected = algorithm.predict(theta, algorithm.begin(theta, plain), query.x)
    torch.testing.assert_close(algorithm.predict(theta, algorithm.begin(theta, filled), query.x), expected)
    whole = algorithm.meta_loss(theta, Episode(plain, query), unroll, algorithm.score)
    padded = algorithm.meta_loss(theta, Episode(filled, query), unroll, algorithm.score)
    torch.testing.assert_close(padded[0], whole[0])
    for name in ("loss", "accuracy", "accuracy_1st", "accuracy_2nd"):
        torch.testing.assert_close(padded[1][name], whole[1][name])


def test_training_reads_one_sequence_and_reports_the_query_loss() -> None:
    algorithm, theta, episode = build_learner()
    support, query = episode
    whole = Batch(torch.cat([support.x, query.x]), torch.cat([support.y, query.y]))
    features = algorithm.model.features(theta, whole.x)
    _, outputs = algorithm._read_sequence(theta, algorithm._start(theta), features, whole.y)
    loss, metrics = algorithm.meta_loss(theta, episode, unroll, algorithm.score)
    torch.testing.assert_close(loss, algorithm.score(outputs, whole)[0])
    predicted = algorithm.predict(theta, algorithm.begin(theta, support), query.x)
    value, own = algorithm.score(predicted, query)
    torch.testing.assert_close(metrics["loss"], value)
    assert metrics["accuracy"] == own["accuracy"]
    assert set(metrics) == {"loss", "accuracy", "accuracy_1st", "accuracy_2nd", "accuracy_5th"}
    shorter, *_ = build_learner(sequence=2)
    loss, metrics = shorter.meta_loss(theta, episode, unroll, algorithm.score)
    torch.testing.assert_close(loss, algorithm.score(outputs[:6], Batch(whole.x[:6], whole.y[:6]))[0])
    torch.testing.assert_close(metrics["loss"], value)


def test_accuracy_is_counted_by_instance_of_a_class() -> None:
    y = torch.tensor([0, 1, PADDING, 0, 0, 1, 1])
    outputs = torch.nn.functional.one_hot(torch.tensor([1, 1, 0, 0, 0, 0, 1]), 3).float()
    outputs[:, 2] = 9.0  # an output beyond the task's ways
    result = {name: float(value) for name, value in measure_accuracy_by_instance(outputs, y, 2).items()}
    assert result == {"accuracy_1st": 0.5, "accuracy_2nd": 0.5}
    assert measure_accuracy_by_instance(outputs, y, None) == {}


def test_evaluation_may_have_fewer_ways_but_not_more() -> None:
    algorithm, theta, (support, _) = build_learner()  # three outputs, two ways
    algorithm.score = ClassificationScore(3)
    algorithm.begin(theta, support)
    algorithm.score = ClassificationScore(4)
    with pytest.raises(InputError, match=r"^ways: got 4, expected at most 3 .* mann .* tasks.ways"):
        algorithm.begin(theta, support)


def test_loaded_learner_adapts_and_predicts(workplace: Path) -> None:
    run = distmeta.train(Job.parse(tree("mann", run={"steps": 1}))).run
    learner = distmeta.load(run)
    x = torch.rand(8, 1, 8, 8)
    adapted = learner.adapt(x[:4], [7, 3, 3, 7])
    assert adapted(x[4:]).shape == (4, 2)
    assert set(adapted.predict(x[4:]).tolist()) <= {3, 7}
    with pytest.raises(InputError, match=r"^ways: got 4, expected at most 3"):
        learner.adapt(x[:4], [0, 1, 2, 3])


def test_impossible_options_are_errors() -> None:
    with pytest.raises(InputError, match=r"^algorithm\.reads: got 5, expected at most algorithm\.slots = 4$"):
        build_learner(reads=5)
    with pytest.raises(InputError, match=r"^algorithm\.sequence: got 2 with algorithm\.sequential: true"):
        build_learner(sequence=2, sequential=True)
    flat = FunctionalModel(torch.nn.Flatten, torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match=r"^model\.type: got Flatten, .* mann"):
        MANN(flat, SquaredError())
    with pytest.raises(InputError, match=r"^algorithm\.memory: got 'tape', expected 'lrua', 'ntm' or 'dnc'"):
        Job.parse(tree({"type": "mann", "memory": "tape"}))


COPY: dict[str, Any] = {
    "model": {"type": "mlp", "hidden": []},
    "tasks": {"type": "copy", "bits": 3, "length": 3, "min_length": 3},
    "algorithm": {
        "type": "mann", "memory": "ntm", "controller": 24, "slots": 8, "width": 6, "reads": 1, "sequential": True,
    },
    "outer": {"lr": 0.03, "clip_norm": 10.0},
    "run": {"steps": 80, "tasks_per_step": 16, "shards": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_sequential_vmap_equals_loop(kind: str) -> None:
    changes = {"algorithm": COPY["algorithm"] | {"memory": kind}, "tasks": COPY["tasks"] | {"min_length": 1}}
    problem = build_problem(Job.parse(tree(**(COPY | changes))))
    theta = problem.init()
    ids = task_ids(0, "train", 0, 4)
    problem.model.to(dtype=DOUBLE)
    theta = {name: value.double() for name, value in theta.items()}
    episodes = tree_map(lambda leaf: leaf.double(), problem.family.draw("train", ids))
    args = (problem.algorithm, problem.score("train"), theta, episodes, ids)
    loop = shard_gradient(*args, Execution("loop", 1))
    vmap = shard_gradient(*args, Execution("vmap", 4))
    for name in theta:
        torch.testing.assert_close(loop.gradient[name], vmap.gradient[name], rtol=1e-9, atol=1e-12)
    assert set(loop.metrics) == {"loss_after", "accuracy_after", "accuracy_sequence_after"}


def train_and_score(job: dict[str, Any]) -> dict[str, np.ndarray]:
    """Train with one vectorised shard per step, and return the scores of 100 validation tasks."""
    problem = build_problem(Job.parse(job))
    server = ParameterServer(problem.init(), problem.job.outer)
    run = problem.job.run
    execution = Execution("vmap", run.tasks_per_step)
    for step in range(run.steps):
        ids = task_ids(0, "train", step, run.tasks_per_step)
        episodes = problem.family.draw("train", ids)
        result = shard_gradient(
            problem.algorithm, problem.score("train"), server.theta(), episodes, ids, execution
        )
        server.step(server.layout.flatten(result.gradient) / run.tasks_per_step)
    ids = task_ids(0, "val", 0, 100)
    episodes = problem.family.draw("val", ids)
    scores = score_tasks(
        problem.adapting("val"), problem.score("val"), server.theta(), episodes, ids, execution
    )
    return {name: column[:, -1] for name, column in scores.metrics.items()}


@pytest.mark.slow
def test_ntm_begins_to_learn_to_copy() -> None:
    scores = train_and_score(tree(**COPY))
    assert scores["loss"].mean() < 0.5, "guessing gives 0.69"
    assert scores["accuracy"].mean() > 0.7


@pytest.mark.slow
def test_ntm_learns_to_copy(workplace: Path) -> None:
    job = Job.load(REPOSITORY / "jobs" / "copy-ntm.yaml", ["tracking.type=none"])
    figures = distmeta.evaluate(distmeta.train(job).run).figures
    assert (figures["accuracy_after"] or 0) > 0.99


@pytest.mark.slow
def test_lrua_learns_new_digits() -> None:
    job = tree(
        {"type": "mann", "controller": 48, "slots": 16, "width": 16, "reads": 2},
        model={"type": "mlp", "hidden": []},
        tasks={"type": "digits", "ways": 3, "shots": 1, "queries": 3, "order": "random"},
        outer={"lr": 0.003},
        run={"steps": 1000, "tasks_per_step": 32, "shards": 1},
    )
    assert train_and_score(job)["accuracy"].mean() > 0.65, "guessing gives 0.33"
