"""A trained learner adapts to a task and predicts: the same numbers as evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import tree
from support.digit_episodes import (
    Images,
    load_images,
    make_rows,
    prepare,
    read_preparation,
    read_table,
    train_on_digits,
    train_on_waves,
    write_episodes,
)

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.evaluation.learner import Learner, make_evaluation_job
from distmeta.protocols import Batch
from distmeta.runtime import checkpoint as checkpoints
from distmeta.seeding import task_ids
from distmeta.tasks.image_preparation import Preparation
from distmeta.tasks.store import write_store


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_on_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def waves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_on_waves(tmp_path_factory.mktemp("waves"))


@pytest.fixture(scope="module")
def images() -> Images:
    return load_images()


class DrawnTask(NamedTuple):
    """A learner and one test task, without a task axis."""

    learner: Learner
    support: Batch
    query: Batch


def draw_task(run: Path) -> DrawnTask:
    learner = distmeta.load(run)
    episode: Any = learner.problem.family.draw("test", task_ids(0, "test", 0, 1))
    support = Batch(episode.support.x[0], episode.support.y[0])
    query = Batch(episode.query.x[0], episode.query.y[0])
    return DrawnTask(learner, support, query)


@pytest.mark.parametrize("labels", [{3: 7, 9: 8, 7: 9}, {-1: 4, 5: 5, 1000: 6, 8: 8, 2: 7}])
def test_adapting_gives_what_evaluation_gives(
    run: Path, images: Images, tmp_path: Path, labels: dict[int, int]
) -> None:
    """The outputs are bit-identical, also with fewer ways than the head has. So are the loss and the predictions."""
    rows = make_rows(images, 0, labels, 2, 3)
    episodes = write_episodes(tmp_path / "e.parquet", rows)
    written = tmp_path / "p.parquet"
    result = distmeta.evaluate(run, episodes=episodes, predictions=written)

    preparation = read_preparation(run)
    x = {}
    y = {}
    for split in ("support", "query"):
        x[split] = np.stack([prepare(row.image, preparation) for row in rows if row.split == split])
        y[split] = np.array([row.label for row in rows if row.split == split])
    adapted = distmeta.load(run).adapt(x["support"], y["support"])
    outputs = adapted(x["query"])
    assert outputs.shape == (len(x["query"]), len(labels))
    assert adapted.predict(x["query"]).tolist() == read_table(written)["prediction"].tolist()
    target = torch.from_numpy(np.searchsorted(sorted(labels), y["query"]))
    assert float(torch.nn.functional.cross_entropy(outputs, target)) == result.figures["loss_after"]


def test_adapting_to_a_drawn_task_gives_what_evaluation_gives(run: Path, tmp_path: Path) -> None:
    learner, support, query = draw_task(run)
    path = tmp_path / "p.parquet"
    distmeta.evaluate(run, ["run.eval_tasks=1", "compute.execution=loop"], predictions=path)
    assert learner.adapt(*support).predict(query.x).tolist() == read_table(path)["prediction"].tolist()


def test_numpy_torch_and_lists_give_the_same_outputs(run: Path) -> None:
    learner, support, query = draw_task(run)
    expected = learner.adapt(support.x, support.y)(query.x)
    read_only = support.x.numpy().copy()
    read_only.flags.writeable = False
    for x, y, x_query in (
        (support.x.numpy(), support.y.numpy(), query.x.numpy()),
        (support.x.double(), support.y.to(torch.int32), query.x.numpy().astype(np.float64)),
        (read_only, support.y.numpy().astype(np.uint8), query.x.clone().requires_grad_()),
        (support.x.tolist(), support.y.tolist(), query.x.tolist()),
    ):
        outputs = learner.adapt(x, y)(x_query)
        assert torch.equal(outputs, expected)
        assert not outputs.requires_grad
    one_row = learner.adapt(support.x, support.y)(query.x[:1])
    assert torch.allclose(one_row, expected[:1], atol=1e-6)


def test_renamed_labels_give_the_same_outputs(run: Path) -> None:
    learner, support, query = draw_task(run)
    expected = learner.adapt(support.x, support.y)(query.x)
    renamed = learner.adapt(support.x, support.y * 10 - 7)
    assert torch.equal(renamed(query.x), expected)
    assert torch.equal(renamed.predict(query.x), expected.argmax(-1) * 10 - 7)


def test_predictions_are_the_users_labels(run: Path, images: Images) -> None:
    preparation = read_preparation(run)
    rows = [row for digit in (9, 3, 7) for row in np.flatnonzero(images.digits == digit)[:6]]
    x = np.stack([prepare(images.pixels[row], preparation) for row in rows])
    y = np.repeat([9, 3, 7], 6)
    adapted = distmeta.load(run, ["algorithm.inner_steps=60"]).adapt(x, y)
    assert adapted.classes is not None
    assert adapted.classes.tolist() == [3, 7, 9]
    assert (adapted.predict(x).numpy() == y).all()


def test_number_of_inner_steps(run: Path) -> None:
    learner, support, query = draw_task(run)
    unadapted = learner.problem.model(learner.theta, query.x)
    assert torch.equal(learner.adapt(*support, steps=0)(query.x), unadapted)
    assert torch.equal(learner.adapt(*support, steps=2)(query.x), learner.adapt(*support)(query.x))
    longer = distmeta.load(run, ["algorithm.inner_steps=5"])
    assert torch.equal(longer.adapt(*support)(query.x), learner.adapt(*support, steps=5)(query.x))


def test_regression(waves: Path, tmp_path: Path) -> None:
    learner, support, query = draw_task(waves)
    adapted = learner.adapt(support.x, support.y)
    assert adapted.classes is None
    outputs = adapted(query.x)
    assert outputs.shape == (5, 1)
    assert torch.equal(adapted.predict(query.x), outputs)
    assert torch.equal(learner.adapt(support.x.numpy(), support.y.double().numpy())(query.x), outputs)
    path = tmp_path / "p.parquet"
    distmeta.evaluate(waves, ["run.eval_tasks=1", "compute.execution=loop"], predictions=path)
    assert np.array_equal(outputs[:, 0].numpy(), read_table(path)["prediction"])


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (np.zeros((5, 64)), range(5), r"x: got examples of shape \(64,\), expected \(1, 8, 8\)"),
        (np.zeros((1, 8, 8)), [0], r"x: got examples of shape \(8, 8\), expected"),
        (np.float32(3), [0], r"x: got examples of shape \(\), expected"),
        ([["a"]], [0], "x: got list .* expected an array of numbers"),
        ([[1], [1, 2]], [0, 1], "x: got list .* expected an array of numbers"),
        (np.zeros((5, 1, 8, 8)), range(4), r"y: got labels of shape \(4,\), expected one for each of the 5"),
        (np.zeros((5, 1, 8, 8)), np.eye(5, dtype=int), r"y: got labels of shape \(5, 5\), expected one for"),
        (np.zeros((5, 1, 8, 8)), np.zeros(5), r"y: got numbers of shape \(5,\), expected integer labels of"),
        (np.zeros((3, 1, 8, 8)), ["a", "b", "c"], "y: got list .* expected an array of numbers"),
        (
            np.zeros((6, 1, 8, 8)),
            range(6),
            r"ways: got 6, expected at most 5 .* train with model.head=shared",
        ),
    ],
)
def test_wrong_support_sets_are_refused(run: Path, x: Any, y: Any, expected: str) -> None:
    labels = list(y) if isinstance(y, range) else y
    with pytest.raises(InputError, match=expected):
        distmeta.load(run).adapt(x, labels)


def test_wrong_support_sets_of_a_regression_are_refused(waves: Path) -> None:
    learner, support, query = draw_task(waves)
    with pytest.raises(
        InputError, match=r"y: got numbers of shape \(5,\), expected targets of shape \(5, 1\)"
    ):
        learner.adapt(support.x, support.y[:, 0])
    with pytest.raises(InputError, match=r"x: got examples of shape \(\), expected \(1,\)"):
        learner.adapt(*support)(query.x[:, 0])


def test_loading_and_adapting_leave_torchs_generator_as_it_was(run: Path) -> None:
    state = torch.get_rng_state()
    learner, support, query = draw_task(run)
    learner.adapt(*support)(query.x)
    distmeta.evaluate(run, ["run.eval_tasks=2"])
    assert torch.equal(torch.get_rng_state(), state)


def test_learner_adapts_without_the_task_store(workplace: Path) -> None:
    """Only drawing tasks needs the store that the learner was trained from."""
    images = np.random.default_rng(0).integers(0, 255, (60, 1, 8, 8), dtype=np.uint8)
    classes = [f"c{i}" for i in range(10)]
    write_store("small.arrow", images, classes, [""] * 10, [6] * 10, Preparation(size=8))
    tasks = {
        "type": "arrow", "path": "small.arrow", "ways": 2, "shots": 1, "queries": 2, "test": 3, "val": 3,
    }  # fmt: skip
    run = distmeta.train(Job.parse(tree("maml", tasks=tasks, run={"steps": 2}))).run
    x = images[[0, 6]] / np.float32(255)
    with_store = distmeta.load(run).adapt(x, [4, 7])(x)
    (workplace / "small.arrow").unlink()
    assert torch.equal(distmeta.load(run).adapt(x, [4, 7])(x), with_store)
    with pytest.raises(InputError, match=r"tasks\.path"):
        distmeta.evaluate(run)


def test_evaluation_uses_gpus_only_if_there_are_any(waves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of the workers that the user asks for, or of this process."""
    stored = json.loads((checkpoints.find(waves) / "state.json").read_text())["job"]
    run = {**stored["run"], "gpus_per_worker": 0.5}
    compute = {**stored["compute"], "precision": "tf32"}
    trained = {**stored, "run": run, "compute": compute}

    def choose(*overrides: str) -> tuple[float, str]:
        job, _ = make_evaluation_job(trained, overrides)
        return job.run.gpus_per_worker, job.compute.precision

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose() == (0, "float32")
    assert choose("run.workers=2") == (0.5, "tf32")
    problem = distmeta.load(waves, ["run.workers=2", "run.gpus_per_worker=1"]).problem
    assert problem.device.type == "cpu"
    assert problem.job.run.gpus_per_worker == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose() == (0.5, "tf32")
    assert choose("run.gpus_per_worker=0") == (0, "float32")
