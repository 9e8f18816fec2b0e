"""Evaluation on unseen tasks and on fixed episodes, and deployment: the same numbers by every way."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tree
from PIL import Image

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.evaluation.learner import Learner, _evaluation_job
from distmeta.runtime import checkpoint as checkpoints
from distmeta.seeding import task_ids
from distmeta.tasks.image_preparation import Preparation, prepare, unit

DIGITS = {"type": "digits", "ways": 5, "shots": 1, "queries": 5}
MAML = {"type": "maml", "inner_lr": 0.4, "inner_steps": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training of 5-way 1-shot digits."""
    job = tree(
        MAML, tasks=DIGITS, run={"steps": 5, "eval_tasks": 30}, output=str(tmp_path_factory.mktemp("d"))
    )
    return distmeta.train(Job.parse(job)).run


@pytest.fixture(scope="module")
def waves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training on sine waves."""
    job = tree(run={"steps": 3, "eval_tasks": 10}, output=str(tmp_path_factory.mktemp("w")))
    return distmeta.train(Job.parse(job)).run


@pytest.fixture(scope="module")
def images() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits, uint8 [N, 8, 8] with ink at 240, and what they show."""
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    return (np.asarray(pixels).reshape(-1, 8, 8) * 15).astype(np.uint8), np.asarray(target)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def learner(run: Path) -> Learner:
    return distmeta.load(run)


def preparation(run: Path) -> Preparation:
    stored = learner(run).checkpoint.examples["preparation"]
    assert stored is not None
    return Preparation.from_dict(stored)


Rows = list[tuple[int, str, int, np.ndarray]]


def episode_rows(
    images: tuple[np.ndarray, np.ndarray], number: int, labels: dict[int, int], shots: int, queries: int
) -> Rows:
    """Rows of one episode: `labels` maps the label in the file to the digit that is shown."""
    pixels, target = images
    rows: Rows = []
    for label, digit in labels.items():
        drawings = pixels[target == digit][number : number + shots + queries]
        rows += [
            (number, "support" if i < shots else "query", label, image) for i, image in enumerate(drawings)
        ]
    return rows


def write_episodes(path: Path, rows: Rows, prepared: Preparation | None = None) -> Path:
    """As PNG images; or, with `prepared`, as the floats that the model would see."""
    columns: dict[str, Any] = {
        "episode": [row[0] for row in rows],
        "split": [row[1] for row in rows],
        "label": [row[2] for row in rows],
    }
    if prepared is None:
        columns["image"] = [png(row[3]) for row in rows]
    else:
        columns["x"] = [inputs(row[3], prepared).ravel().tolist() for row in rows]
    pq.write_table(pa.table(columns), path)
    return path


def inputs(image: np.ndarray, prepared: Preparation) -> np.ndarray:
    return unit(prepare(png(image), prepared), prepared.scale)


def table(path: Path) -> dict[str, np.ndarray]:
    return {name: column.to_numpy() for name, column in zip(*_columns(path), strict=True)}


def _columns(path: Path) -> tuple[list[str], list[Any]]:
    read = pq.read_table(path)
    return read.column_names, read.columns


def test_figures_interval_and_predictions(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    result = distmeta.evaluate(run, predictions=path)
    assert result.tasks == 30
    assert list(result.figures) == ["loss_before", "loss_after", "accuracy_before", "accuracy_after"]
    assert result.main == "accuracy_after"
    rows = table(path)
    assert list(rows) == ["episode", "row", "label", "prediction"]
    assert rows["episode"].tolist() == [e for e in range(30) for _ in range(25)]
    assert rows["row"].tolist() == list(range(25)) * 30
    accuracies = (rows["label"] == rows["prediction"]).reshape(30, 25).mean(1)
    assert result.figures["accuracy_after"] == pytest.approx(accuracies.mean(), rel=1e-6)
    assert result.ci95 == pytest.approx(1.96 * accuracies.std(ddof=1) / math.sqrt(30), rel=1e-6)
    assert set(result.curve) == {"loss", "accuracy"}
    for name, curve in result.curve.items():
        assert len(curve) == 3
        assert curve[0] == pytest.approx(result.figures[f"{name}_before"])
        assert curve[-1] == pytest.approx(result.figures[f"{name}_after"])
        assert len(result.curve_ci95[name]) == 3
    assert result.curve_ci95["accuracy"][-1] == result.ci95
    none = distmeta.evaluate(run, ["algorithm.inner_steps=0"])  # unadapted: the first of the others
    assert none.ci95 == result.curve_ci95["accuracy"][0]


def test_evaluation_repeats_to_the_bit(run: Path) -> None:
    first, again = distmeta.evaluate(run), distmeta.evaluate(run, ["run.workers=0"])
    assert first == again
    assert distmeta.evaluate(run, ["seed=1"]).figures != first.figures


def test_checkpoints_of_a_run(run: Path) -> None:
    folder = run / "checkpoints"
    assert distmeta.evaluate(folder / "latest") == distmeta.evaluate(folder / "step-00000005")
    assert distmeta.evaluate(folder / "step-00000000").figures != distmeta.evaluate(run).figures


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_inner_steps_are_asked_for(run: Path, steps: int) -> None:
    result = distmeta.evaluate(run, [f"algorithm.inner_steps={steps}", "run.eval_tasks=4"])
    assert len(result.curve["loss"]) == steps + 1
    whole = distmeta.evaluate(run, ["algorithm.inner_steps=7", "run.eval_tasks=4"])
    assert result.curve["loss"] == whole.curve["loss"][: steps + 1]


def test_shots_are_overridden(run: Path) -> None:
    few, many = (distmeta.evaluate(run, [f"tasks.shots={shots}"]) for shots in (1, 20))
    assert many.figures["loss_after"] < few.figures["loss_after"]
    three = distmeta.evaluate(run, ["tasks.eval_ways=3"])
    assert three.figures["accuracy_after"] > few.figures["accuracy_after"]
    assert len(distmeta.load(run, ["tasks.shots=3"]).problem.family.draw("test", [1]).support.y[0]) == 15


def test_classes_are_unseen(run: Path) -> None:
    """Every image of a test episode shows a digit that training never had."""
    problem = learner(run).problem
    train, test = (problem.family.draw(split, task_ids(0, split, 0, 20)) for split in ("train", "test"))
    seen = {image.numpy().tobytes() for batch in train for image in batch.x.flatten(0, 1)}
    unseen = {image.numpy().tobytes() for batch in test for image in batch.x.flatten(0, 1)}
    assert not seen & unseen


def test_a_regression(waves: Path, tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    result = distmeta.evaluate(waves, predictions=path)
    assert list(result.figures) == ["loss_before", "loss_after"]
    assert result.main == "loss_after"
    rows = table(path)
    losses = np.square(rows["label"] - rows["prediction"]).reshape(10, 5).mean(1)
    assert result.figures["loss_after"] == pytest.approx(losses.mean(), rel=1e-5)
    assert result.ci95 == pytest.approx(1.96 * losses.std(ddof=1) / math.sqrt(10), rel=1e-5)
    assert distmeta.evaluate(waves, ["run.eval_tasks=1"]).ci95 is None


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["tasks.ways=6"], r"ways: got 6, expected at most 5 .* model.head=shared or a metric method"),
        (["model.hidden=[3]"], "checkpoint: its theta has other names or shapes"),
        (["tasks.shots=1000"], r"tasks.eval_shots \+ tasks.eval_queries: got 1005"),
        (["tasks.shtos=2"], "tasks.shtos: unknown key"),
        (["tasks=3"], "tasks.type: missing"),
        (["algorithm=3"], "algorithm.type: missing"),
        (["algorithm.inner_steps=-1"], "algorithm.inner_steps: got -1, expected an integer of at least 0"),
        (["algorithm.inner_steps=true"], "algorithm.inner_steps: got True, expected an integer"),
        (["shots"], "override: got 'shots'"),
    ],
)
def test_impossible_overrides(run: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        distmeta.evaluate(run, overrides)


def test_what_was_trained_on_gpus_is_evaluated_where_they_are(
    waves: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the workers that are asked for, which need none here."""
    tree = json.loads((checkpoints.find(waves) / "state.json").read_text())["job"]
    trained = tree | {
        "run": tree["run"] | {"gpus_per_worker": 0.5},
        "compute": tree["compute"] | {"precision": "tf32"},
    }

    def settled(*overrides: str) -> tuple[float, str]:
        job, _ = _evaluation_job(trained, overrides)
        return job.run.gpus_per_worker, job.compute.precision

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert settled() == (0, "float32")
    assert settled("run.workers=2") == (0.5, "tf32")
    beside = distmeta.load(waves, ["run.workers=2", "run.gpus_per_worker=1"]).problem
    assert (beside.device.type, beside.job.run.gpus_per_worker) == ("cpu", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert settled() == (0.5, "tf32")
    assert settled("run.gpus_per_worker=0") == (0, "float32")


def test_shots_of_an_evaluation_are_its_own(tmp_path: Path) -> None:
    tasks = {**DIGITS, "eval_shots": 3}
    job = tree(MAML, tasks=tasks, run={"steps": 1, "eval_tasks": 2}, output=str(tmp_path))
    run = distmeta.train(Job.parse(job)).run
    five = distmeta.evaluate(run, ["tasks.shots=5"]).figures
    assert five == distmeta.evaluate(run, ["tasks.eval_shots=5"]).figures
    assert five != distmeta.evaluate(run).figures


def test_predictions_stay_within_the_ways_that_are_scored(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    evaluation = distmeta.evaluate(run, ["tasks.ways=3"], predictions=path)
    table = pq.read_table(path).to_pydict()
    assert set(table["prediction"]) <= {0, 1, 2}
    hits = np.mean([a == b for a, b in zip(table["label"], table["prediction"], strict=True)])
    assert hits == pytest.approx(evaluation.figures["accuracy_after"])


def test_a_diverged_task_is_not_left_out_of_the_figures(waves: Path) -> None:
    evaluation = distmeta.evaluate(waves, ["algorithm.inner_lr=1.0e+30"])
    assert evaluation.figures["loss_after"] is None
    assert evaluation.figures["loss_before"] is not None


def test_an_algorithm_without_inner_loop(tmp_path: Path) -> None:
    job = tree({"type": "hard_cases:Memory"}, run={"steps": 1, "eval_tasks": 3}, output=str(tmp_path))
    run = distmeta.train(Job.parse(job)).run
    result = distmeta.evaluate(run)
    assert result.figures["loss_before"] is None
    assert len(result.curve["loss"]) == 1
    with pytest.raises(InputError, match=r"algorithm.inner_steps: got 2, but hard_cases:Memory has no inner"):
        distmeta.evaluate(run, ["algorithm.inner_steps=2"])


def test_what_is_no_checkpoint_and_no_folder(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got no checkpoint"):
        distmeta.evaluate(tmp_path)
    with pytest.raises(InputError, match=r"--predictions: the folder of .* does not exist"):
        distmeta.evaluate(run, predictions=tmp_path / "nowhere" / "p.parquet")


def test_fixed_episodes(run: Path, images: Any, tmp_path: Path) -> None:
    """Other ways and shots in each episode, any labels; PNG and floats give the same numbers."""
    rows = episode_rows(images, 40, {7: 7, 8: 8, 9: 9}, 2, 4)
    rows += episode_rows(images, 3, {900: 7, -5: 9}, 1, 3)
    rows += episode_rows(images, 17, {11: 5, 12: 6, 13: 7, 14: 8, 10: 9}, 3, 2)
    pngs = write_episodes(tmp_path / "images.parquet", rows)
    floats = write_episodes(tmp_path / "floats.parquet", rows, preparation(run))
    written = tmp_path / "predictions.parquet"
    result = distmeta.evaluate(run, episodes=pngs, predictions=written)
    assert result.tasks == 3
    assert result == distmeta.evaluate(run, episodes=floats)
    got = table(written)
    assert got["episode"].tolist() == [40] * 12 + [3] * 6 + [17] * 10
    assert got["label"].tolist() == [row[2] for row in rows if row[1] == "query"]
    for number in (40, 3, 17):
        labels = {row[2] for row in rows if row[0] == number}
        assert set(got["prediction"][got["episode"] == number]) <= labels
    right = [(got["label"] == got["prediction"])[got["episode"] == number].mean() for number in (40, 3, 17)]
    assert result.figures["accuracy_after"] == pytest.approx(np.mean(right))
    assert result.ci95 == pytest.approx(1.96 * np.std(right, ddof=1) / math.sqrt(3))
    assert len(distmeta.evaluate(run, ["algorithm.inner_steps=4"], episodes=pngs).curve["loss"]) == 5


def test_labels_stand_for_outputs_in_sorted_order(run: Path, images: Any, tmp_path: Path) -> None:
    """Any increasing renaming of the labels gives the same numbers; another order gives others."""
    results = []
    for name, labels in [("a", {0: 7, 1: 8, 2: 9}), ("b", {-70: 7, 8: 8, 99: 9}), ("c", {2: 7, 1: 8, 0: 9})]:
        path = write_episodes(tmp_path / f"{name}.parquet", episode_rows(images, 0, labels, 2, 5))
        results.append(distmeta.evaluate(run, episodes=path))
    assert results[0] == results[1]
    assert results[0].figures["loss_after"] != results[2].figures["loss_after"]


def test_more_ways_than_the_head_has(run: Path, images: Any, tmp_path: Path) -> None:
    path = write_episodes(tmp_path / "e.parquet", episode_rows(images, 0, {k: k for k in range(6)}, 1, 1))
    with pytest.raises(
        InputError,
        match=r"ways: got 6, expected at most 5 .* train with model.head=shared or a metric method",
    ):
        distmeta.evaluate(run, episodes=path)


def test_a_query_label_that_the_support_lacks(run: Path, images: Any, tmp_path: Path) -> None:
    rows = episode_rows(images, 0, {7: 7, 8: 8}, 1, 1)
    path = write_episodes(tmp_path / "e.parquet", [*rows, (0, "query", 3, rows[0][3])])
    with pytest.raises(InputError, match=r"--episodes: got label 3 in the query of episode 0"):
        distmeta.evaluate(run, episodes=path)


def test_images_for_a_model_without_any(waves: Path, images: Any, tmp_path: Path) -> None:
    path = write_episodes(tmp_path / "e.parquet", episode_rows(images, 0, {7: 7, 8: 8}, 1, 1))
    with pytest.raises(InputError, match=r"--episodes: got a column 'image', expected 'x'"):
        distmeta.evaluate(waves, episodes=path)


@pytest.mark.parametrize("labels", [{3: 7, 9: 8, 7: 9}, {-1: 4, 5: 5, 1000: 6, 8: 8, 2: 7}])
def test_adapting_gives_what_evaluation_gives(
    run: Path, images: Any, tmp_path: Path, labels: dict[int, int]
) -> None:
    """To the bit: the same outputs, hence the same loss and predictions, with fewer ways than the head too."""
    rows, prepared = episode_rows(images, 0, labels, 2, 3), preparation(run)
    written = tmp_path / "p.parquet"
    result = distmeta.evaluate(
        run, episodes=write_episodes(tmp_path / "e.parquet", rows), predictions=written
    )
    x, y = (
        {split: np.stack([make(row) for row in rows if row[1] == split]) for split in ("support", "query")}
        for make in (lambda row: inputs(row[3], prepared), lambda row: np.int64(row[2]))
    )
    adapted = learner(run).adapt(x["support"], y["support"])
    outputs = adapted(x["query"])
    assert outputs.shape == (len(x["query"]), len(labels))
    assert adapted.predict(x["query"]).tolist() == table(written)["prediction"].tolist()
    target = torch.from_numpy(np.searchsorted(sorted(labels), y["query"]))
    assert float(torch.nn.functional.cross_entropy(outputs, target)) == result.figures["loss_after"]


def task(run: Path) -> Any:
    """One test task, without its task axis."""
    made = learner(run)
    episode = made.problem.family.draw("test", task_ids(0, "test", 0, 1))
    return made, *(batch._replace(x=batch.x[0], y=batch.y[0]) for batch in episode)


def test_adapting_to_a_drawn_task(run: Path, tmp_path: Path) -> None:
    made, support, query = task(run)
    path = tmp_path / "p.parquet"
    distmeta.evaluate(run, ["run.eval_tasks=1", "compute.execution=loop"], predictions=path)
    assert made.adapt(*support).predict(query.x).tolist() == table(path)["prediction"].tolist()


def test_numpy_and_torch_and_lists(run: Path) -> None:
    made, support, query = task(run)
    expected = made.adapt(support.x, support.y)(query.x)
    read_only = support.x.numpy().copy()
    read_only.flags.writeable = False
    for x, y, q in [
        (support.x.numpy(), support.y.numpy(), query.x.numpy()),
        (support.x.double(), support.y.to(torch.int32), query.x.numpy().astype(np.float64)),
        (read_only, support.y.numpy().astype(np.uint8), query.x.clone().requires_grad_()),
        (support.x.tolist(), support.y.tolist(), query.x.tolist()),
    ]:
        outputs = made.adapt(x, y)(q)
        assert torch.equal(outputs, expected)
        assert not outputs.requires_grad
    renamed = made.adapt(support.x, support.y * 10 - 7)
    assert torch.equal(renamed(query.x), expected)
    assert torch.equal(renamed.predict(query.x), expected.argmax(-1) * 10 - 7)
    assert torch.allclose(made.adapt(support.x, support.y)(query.x[:1]), expected[:1], atol=1e-6)


def test_labels_come_back(run: Path, images: Any) -> None:
    pixels, target = images
    prepared = preparation(run)
    chosen = [np.flatnonzero(target == digit)[:6] for digit in (9, 3, 7)]
    x = np.stack([inputs(pixels[i], prepared) for rows in chosen for i in rows])
    y = np.repeat([9, 3, 7], 6)
    adapted = distmeta.load(run, ["algorithm.inner_steps=60"]).adapt(x, y)
    assert adapted.classes is not None
    assert adapted.classes.tolist() == [3, 7, 9]
    assert (adapted.predict(x).numpy() == y).mean() == 1


def test_steps_of_adapt(run: Path) -> None:
    made, support, query = task(run)
    unadapted = made.problem.model(made.theta, query.x)
    assert torch.equal(made.adapt(*support, steps=0)(query.x), unadapted)
    assert torch.equal(made.adapt(*support, steps=2)(query.x), made.adapt(*support)(query.x))
    longer = distmeta.load(run, ["algorithm.inner_steps=5"])
    assert torch.equal(longer.adapt(*support)(query.x), made.adapt(*support, steps=5)(query.x))


def test_adapting_a_regression(waves: Path, tmp_path: Path) -> None:
    made, support, query = task(waves)
    adapted = made.adapt(support.x, support.y)
    assert adapted.classes is None
    outputs = adapted(query.x)
    assert outputs.shape == (5, 1)
    assert torch.equal(adapted.predict(query.x), outputs)
    assert torch.equal(made.adapt(support.x.numpy(), support.y.double().numpy())(query.x), outputs)
    path = tmp_path / "p.parquet"
    distmeta.evaluate(waves, ["run.eval_tasks=1", "compute.execution=loop"], predictions=path)
    assert np.array_equal(outputs[:, 0].numpy(), table(path)["prediction"])


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
def test_what_cannot_be_adapted_to(run: Path, x: Any, y: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        learner(run).adapt(x, list(y) if isinstance(y, range) else y)


def test_what_a_regression_cannot_be_adapted_to(waves: Path) -> None:
    made, support, query = task(waves)
    with pytest.raises(InputError, match=r"y: got numbers of shape \(5,\), .* or targets of shape \(5, 1\)"):
        made.adapt(support.x, support.y[:, 0])
    with pytest.raises(InputError, match=r"y: got 5 classes, expected at most 1 .* or targets as floats"):
        made.adapt(support.x, range(5))
    with pytest.raises(InputError, match=r"x: got examples of shape \(\), expected \(1,\)"):
        made.adapt(*support)(query.x[:, 0])


def test_loading_leaves_the_generators_alone(run: Path) -> None:
    state = torch.get_rng_state()
    made, support, query = task(run)
    made.adapt(*support)(query.x)
    distmeta.evaluate(run, ["run.eval_tasks=2"])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_evaluation_is_plain_data(run: Path) -> None:
    result = distmeta.evaluate(run, ["run.eval_tasks=2"])
    assert json.loads(json.dumps([result.figures, result.ci95, result.curve]))[0] == result.figures


def test_a_checkpoint_works_without_its_tasks_data(workplace: Path) -> None:
    """A learner trained from a store adapts where the store is not; only drawing its tasks needs it."""
    from distmeta.tasks.image_preparation import Preparation
    from distmeta.tasks.store import write_store

    images = np.random.default_rng(0).integers(0, 255, (60, 1, 8, 8), dtype=np.uint8)
    classes = [f"c{i}" for i in range(10)]
    write_store("small.arrow", images, classes, [""] * 10, [6] * 10, Preparation(size=8))
    tasks = {
        "type": "arrow", "path": "small.arrow", "ways": 2, "shots": 1, "queries": 2, "test": 3, "val": 3,
    }  # fmt: skip
    run = distmeta.train(Job.parse(tree("maml", tasks=tasks, run={"steps": 2}))).run
    x = images[[0, 6]] / np.float32(255)
    here = distmeta.load(run).adapt(x, [4, 7])(x)
    (workplace / "small.arrow").unlink()
    assert torch.equal(distmeta.load(run).adapt(x, [4, 7])(x), here)
    with pytest.raises(InputError, match=r"tasks\.path"):
        distmeta.evaluate(run)
