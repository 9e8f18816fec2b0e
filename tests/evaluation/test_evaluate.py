"""Evaluation on unseen tasks and on fixed episodes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import tree
from support.digit_episodes import (
    DIGITS,
    MAML,
    Images,
    Row,
    load_images,
    make_rows,
    read_preparation,
    read_table,
    train_on_digits,
    train_on_waves,
    write_episodes,
)
from support.outcomes import ActingReporter

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime.scores import describe_harm
from distmeta.seeding import task_ids


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_on_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def waves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_on_waves(tmp_path_factory.mktemp("waves"))


@pytest.fixture(scope="module")
def images() -> Images:
    return load_images()


def test_figures_interval_and_predictions_agree(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    result = distmeta.evaluate(run, predictions=path)
    assert result.tasks == 30
    assert list(result.figures) == ["loss_before", "loss_after", "accuracy_before", "accuracy_after"]
    assert result.main == "accuracy_after"
    rows = read_table(path)
    assert list(rows) == ["episode", "row", "label", "prediction"]
    assert rows["episode"].tolist() == [episode for episode in range(30) for _ in range(25)]
    assert rows["row"].tolist() == list(range(25)) * 30
    accuracies = (rows["label"] == rows["prediction"]).reshape(30, 25).mean(1)
    assert result.figures["accuracy_after"] == pytest.approx(accuracies.mean(), rel=1e-6)
    assert result.ci95 == pytest.approx(1.96 * accuracies.std(ddof=1) / math.sqrt(30), rel=1e-6)


def test_curve_begins_before_adaptation_and_ends_after_it(run: Path) -> None:
    result = distmeta.evaluate(run)
    assert set(result.curve) == {"loss", "accuracy"}
    for name, curve in result.curve.items():
        assert len(curve) == 3
        assert len(result.curve_ci95[name]) == 3
        assert curve[0] == pytest.approx(result.figures[f"{name}_before"])
        assert curve[-1] == pytest.approx(result.figures[f"{name}_after"])
    assert result.curve_ci95["accuracy"][-1] == result.ci95
    unadapted = distmeta.evaluate(run, ["algorithm.inner_steps=0"])
    assert unadapted.ci95 == result.curve_ci95["accuracy"][0]


def test_evaluation_repeats_to_the_bit(run: Path) -> None:
    first = distmeta.evaluate(run)
    assert first == distmeta.evaluate(run, ["run.workers=0"])
    assert distmeta.evaluate(run, ["seed=1"]).figures != first.figures


def test_checkpoint_is_chosen_by_its_path(run: Path) -> None:
    folder = run / "checkpoints"
    assert distmeta.evaluate(folder / "latest") == distmeta.evaluate(folder / "step-00000005")
    assert distmeta.evaluate(folder / "step-00000000").figures != distmeta.evaluate(run).figures


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_inner_steps_can_be_overridden(run: Path, steps: int) -> None:
    result = distmeta.evaluate(run, [f"algorithm.inner_steps={steps}", "run.eval_tasks=4"])
    assert len(result.curve["loss"]) == steps + 1
    longest = distmeta.evaluate(run, ["algorithm.inner_steps=7", "run.eval_tasks=4"])
    assert result.curve["loss"] == longest.curve["loss"][: steps + 1]


def test_shots_and_ways_can_be_overridden(run: Path) -> None:
    one_shot = distmeta.evaluate(run, ["tasks.shots=1"])
    twenty_shots = distmeta.evaluate(run, ["tasks.shots=20"])
    assert twenty_shots.figures["loss_after"] < one_shot.figures["loss_after"]
    three_ways = distmeta.evaluate(run, ["tasks.eval_ways=3"])
    assert three_ways.figures["accuracy_after"] > one_shot.figures["accuracy_after"]
    family = distmeta.load(run, ["tasks.shots=3"]).problem.family
    assert len(family.draw("test", [1]).support.y[0]) == 15


def test_test_classes_are_unseen(run: Path) -> None:
    """Every image of a test episode shows a digit that training never had."""
    family = distmeta.load(run).problem.family
    images = {}
    for split in ("train", "test"):
        episode = family.draw(split, task_ids(0, split, 0, 20))
        images[split] = {image.numpy().tobytes() for batch in episode for image in batch.x.flatten(0, 1)}
    assert not images["train"] & images["test"]


def test_regression(waves: Path, tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    result = distmeta.evaluate(waves, predictions=path)
    assert list(result.figures) == ["loss_before", "loss_after"]
    assert result.main == "loss_after"
    rows = read_table(path)
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
def test_impossible_overrides_are_refused(run: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        distmeta.evaluate(run, overrides)


def test_evaluation_has_its_own_shots(tmp_path: Path) -> None:
    tasks = {**DIGITS, "eval_shots": 3}
    job = tree(MAML, tasks=tasks, run={"steps": 1, "eval_tasks": 2}, output=str(tmp_path))
    run = distmeta.train(Job.parse(job)).run
    five_shots = distmeta.evaluate(run, ["tasks.shots=5"]).figures
    assert five_shots == distmeta.evaluate(run, ["tasks.eval_shots=5"]).figures
    assert five_shots != distmeta.evaluate(run).figures


def test_predictions_stay_within_the_scored_ways(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    evaluation = distmeta.evaluate(run, ["tasks.ways=3"], predictions=path)
    rows = read_table(path)
    assert set(rows["prediction"].tolist()) <= {0, 1, 2}
    hits = np.mean(rows["label"] == rows["prediction"])
    assert hits == pytest.approx(evaluation.figures["accuracy_after"])


def test_diverged_task_makes_the_mean_null(waves: Path) -> None:
    evaluation = distmeta.evaluate(waves, ["algorithm.inner_lr=1.0e+30"])
    assert evaluation.figures["loss_after"] is None
    assert evaluation.figures["loss_before"] is not None


def test_algorithm_without_inner_loop(tmp_path: Path) -> None:
    job = tree(
        {"type": "hard_cases:MemoryRegressor"}, run={"steps": 1, "eval_tasks": 3}, output=str(tmp_path)
    )
    run = distmeta.train(Job.parse(job)).run
    result = distmeta.evaluate(run)
    assert result.figures["loss_before"] is None
    assert len(result.curve["loss"]) == 1
    with pytest.raises(
        InputError, match=r"algorithm.inner_steps: got 2, but hard_cases:MemoryRegressor has no inner"
    ):
        distmeta.evaluate(run, ["algorithm.inner_steps=2"])


def test_missing_checkpoint_or_folder_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got no checkpoint"):
        distmeta.evaluate(tmp_path)
    with pytest.raises(InputError, match=r"--predictions: the folder of .* does not exist"):
        distmeta.evaluate(run, predictions=tmp_path / "nowhere" / "p.parquet")


def test_fixed_episodes(run: Path, images: Images, tmp_path: Path) -> None:
    """Episodes may have their own ways, shots and labels. PNG images and floats give the same figures."""
    rows = make_rows(images, 40, {7: 7, 8: 8, 9: 9}, 2, 4)
    rows += make_rows(images, 3, {900: 7, -5: 9}, 1, 3)
    rows += make_rows(images, 17, {11: 5, 12: 6, 13: 7, 14: 8, 10: 9}, 3, 2)
    pngs = write_episodes(tmp_path / "images.parquet", rows)
    floats = write_episodes(tmp_path / "floats.parquet", rows, read_preparation(run))
    written = tmp_path / "predictions.parquet"
    result = distmeta.evaluate(run, episodes=pngs, predictions=written)
    assert result.tasks == 3
    assert result == distmeta.evaluate(run, episodes=floats)
    assert len(distmeta.evaluate(run, ["algorithm.inner_steps=4"], episodes=pngs).curve["loss"]) == 5

    predicted = read_table(written)
    assert predicted["episode"].tolist() == [40] * 12 + [3] * 6 + [17] * 10
    assert predicted["label"].tolist() == [row.label for row in rows if row.split == "query"]
    accuracies = []
    for episode in (40, 3, 17):
        in_episode = predicted["episode"] == episode
        labels = {row.label for row in rows if row.episode == episode}
        assert set(predicted["prediction"][in_episode]) <= labels
        hits = predicted["label"][in_episode] == predicted["prediction"][in_episode]
        accuracies.append(hits.mean())
    assert result.figures["accuracy_after"] == pytest.approx(np.mean(accuracies))
    assert result.ci95 == pytest.approx(1.96 * np.std(accuracies, ddof=1) / math.sqrt(3))


def test_labels_map_to_outputs_in_sorted_order(run: Path, images: Images, tmp_path: Path) -> None:
    """Labels that are renamed in an increasing way give the same figures; another order gives others."""
    results = {}
    for name, labels in (
        ("small", {0: 7, 1: 8, 2: 9}),
        ("increasing", {-70: 7, 8: 8, 99: 9}),
        ("reversed", {2: 7, 1: 8, 0: 9}),
    ):
        path = write_episodes(tmp_path / f"{name}.parquet", make_rows(images, 0, labels, 2, 5))
        results[name] = distmeta.evaluate(run, episodes=path)
    assert results["small"] == results["increasing"]
    assert results["small"].figures["loss_after"] != results["reversed"].figures["loss_after"]


def test_more_ways_than_the_head_has_are_refused(run: Path, images: Images, tmp_path: Path) -> None:
    rows = make_rows(images, 0, {digit: digit for digit in range(6)}, 1, 1)
    path = write_episodes(tmp_path / "e.parquet", rows)
    expected = r"ways: got 6, expected at most 5 .* train with model.head=shared or a metric method"
    with pytest.raises(InputError, match=expected):
        distmeta.evaluate(run, episodes=path)


def test_query_label_that_the_support_lacks_is_refused(run: Path, images: Images, tmp_path: Path) -> None:
    rows = make_rows(images, 0, {7: 7, 8: 8}, 1, 1)
    rows.append(Row(0, "query", 3, rows[0].image))
    path = write_episodes(tmp_path / "e.parquet", rows)
    with pytest.raises(InputError, match=r"--episodes: got label 3 in the query of episode 0"):
        distmeta.evaluate(run, episodes=path)


def test_images_for_a_model_of_numbers_are_refused(waves: Path, images: Images, tmp_path: Path) -> None:
    path = write_episodes(tmp_path / "e.parquet", make_rows(images, 0, {7: 7, 8: 8}, 1, 1))
    with pytest.raises(InputError, match=r"--episodes: got a column 'image', expected 'x'"):
        distmeta.evaluate(waves, episodes=path)


def test_evaluation_is_plain_data(run: Path) -> None:
    result: Any = distmeta.evaluate(run, ["run.eval_tasks=2"])
    data = [result.figures, result.ci95, result.curve]
    assert json.loads(json.dumps(data)) == data


def test_predictions_of_several_targets_are_lists(tmp_path: Path) -> None:
    from distmeta.compute.predictions import Predictions
    from distmeta.evaluation.predictions import write_predictions

    labels = np.zeros((2, 3), np.float32)
    predictions = np.ones((2, 3), np.float32)
    write_predictions(tmp_path / "p.parquet", [5], [Predictions({"": labels}, {"": predictions})])
    table = pq.read_table(tmp_path / "p.parquet").to_pydict()
    assert table == {
        "episode": [5, 5],
        "row": [0, 1],
        "label": [[0.0] * 3] * 2,
        "prediction": [[1.0] * 3] * 2,
    }


def test_tested_classes_that_were_trained_on_are_reported(run: Path) -> None:
    notes: list[str] = []
    result = distmeta.evaluate(run, ["tasks.test_digits=[0,8,9]", "run.eval_tasks=2"], report=notes.append)
    assert result.seen_classes == 2
    expected = "tasks.test: 2 of 6 tested classes were trained on (0@0, 0@90), so these are not scores of unseen tasks"
    assert notes == [expected]
    assert (
        distmeta.evaluate(run, ["tasks.shots=2", "run.eval_tasks=2"], report=notes.append).seen_classes == 0
    )
    assert len(notes) == 1


def test_adaptation_that_does_harm_is_reported(tmp_path: Path) -> None:
    """A large inner rate makes every task worse; training and evaluation say so, and a small rate is not reported."""
    section = {"type": "maml", "inner_lr": 0.4}
    run = {"steps": 1, "eval_every": 1, "eval_tasks": 20}
    job = Job.parse(tree(section, run=run) | {"output": str(tmp_path)})
    reporter = ActingReporter({})
    folder = distmeta.train(job, reporter=reporter).run
    assert [text for text in reporter.reports if "worse" in text] == [
        text
        for text in reporter.reports
        if text.startswith("adapting makes the loss of validation tasks worse: ")
    ]
    assert len([text for text in reporter.reports if "try a smaller algorithm.inner_lr" in text]) == 1
    lines: list[str] = []
    found = distmeta.evaluate(folder, report=lines.append)
    assert found.warning is not None
    assert found.warning in lines
    assert distmeta.evaluate(folder, ["algorithm.inner_lr=0.001"]).warning is None


@pytest.mark.parametrize(
    ("before", "after", "is_harm"),
    [
        ([1.0] * 12, [1.2] * 12, True),
        ([1.0] * 12, [0.8] * 12, False),
        ([1.0] * 12, [1.2, 0.9] * 6, False),  # within the noise
        ([1.0] * 5, [1.2] * 5, False),  # too few tasks
        ([1.0] * 12, [math.nan] * 12, False),
    ],
)
def test_harm_is_more_than_noise(before: list[float], after: list[float], is_harm: bool) -> None:
    loss = {"loss_before": np.array(before), "loss_after": np.array(after)}
    assert (describe_harm(loss, "tasks") is not None) == is_harm
    accuracy = {"accuracy_before": np.array(after), "accuracy_after": np.array(before)}
    assert (describe_harm(accuracy, "tasks") is not None) == is_harm
    assert describe_harm({"loss_after": np.array(after)}, "tasks") is None
