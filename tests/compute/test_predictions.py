"""What outputs predict, for every shape of labels; and the Parquet file of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tree
from torch import Tensor, nn
from torch.nn import functional

import distmeta
from distmeta.compute.predictions import choose_predictions
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.protocols import Batch, Episode


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("labels", "outputs", "axis"),
    [
        ((5,), (5, 3), 1),
        ((5, 4, 6), (5, 2, 4, 6), 1),  # masks
        ((5, 4, 6), (5, 4, 6, 2), 3),
        ((5, 7), (5, 3, 7), 1),  # tags, as torch's cross entropy takes them
        ((5, 7), (5, 7, 3), 2),
    ],
)
def test_class_axis_is_found(labels: tuple[int, ...], outputs: tuple[int, ...], axis: int) -> None:
    logits = draw(*outputs)
    found = choose_predictions(torch.zeros(labels, dtype=torch.long), logits)
    assert torch.equal(found, logits.argmax(axis))


def test_only_the_first_ways_count() -> None:
    logits = torch.tensor([[0.0, 1.0, 9.0]])
    assert choose_predictions(torch.zeros(1, dtype=torch.long), logits, ways=2).tolist() == [1]


def test_independent_labels_are_positive_logits() -> None:
    logits = torch.tensor([[0.5, -0.5], [-1.0, 2.0]])
    found = choose_predictions(torch.zeros(2, 2, dtype=torch.long), logits)
    assert found.tolist() == [[1, 0], [0, 1]]


def test_ignored_labels_do_not_make_independent_labels_unclear() -> None:
    labels = torch.tensor([[0, -100], [1, -100]])
    assert choose_predictions(labels, torch.tensor([[0.5, -0.5], [-1.0, 2.0]])).tolist() == [[1, 0], [0, 1]]


def test_numbers_are_predicted_by_the_outputs() -> None:
    assert choose_predictions(torch.zeros(3), torch.ones(3, 1)).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("labels", "outputs"),
    [
        (torch.zeros(5, 4, dtype=torch.long), draw(5, 4, 4)),  # both axes have the right size
        (torch.zeros(5, dtype=torch.long), draw(5, 2, 2)),
        (torch.ones(5, dtype=torch.long), draw(5, 1)),  # a logit, or a count
        (torch.ones(5, 4, 6, dtype=torch.long), draw(5, 1, 4, 6)),
        (torch.full((5, 2), 7), draw(5, 2)),  # counts
        (torch.zeros(5, 2), draw(5, 3)),
        ({"a": torch.zeros(5), "b": torch.zeros(5)}, draw(5, 1)),
    ],
)
def test_unclear_outputs_are_refused_with_the_capability(labels: Any, outputs: Tensor) -> None:
    with pytest.raises(
        InputError, match=r"--predictions: got .*: give the task family a method predict_labels"
    ):
        choose_predictions(labels, outputs)


class Labels(NamedTuple):
    mask: Tensor
    size: Tensor


class PixelNet(nn.Module):
    """Masks and their size, as a NamedTuple."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__()
        self.pixels = nn.Conv2d(1, 2, 1)
        self.size = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Labels:
        return Labels(self.pixels(x), self.size(x.mean((2, 3))))


class MaskTasks:
    in_shape = (1, 4, 6)
    out_features = 2

    def draw(self, split: str, ids: Any) -> list[Episode]:
        return [Episode(self.draw_batch(int(i)), self.draw_batch(int(i) + 1)) for i in ids]

    def draw_batch(self, seed: int) -> Batch:
        x = torch.randn(3, 1, 4, 6, generator=torch.Generator().manual_seed(seed % 2**31))
        mask = (x[:, 0] > 0).long()
        return Batch(x, Labels(mask, mask.float().mean((1, 2))[:, None]))

    def score(self, outputs: Labels, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = functional.cross_entropy(outputs.mask, batch.y.mask)
        loss = loss + (outputs.size - batch.y.size).square().mean()
        return loss, {"accuracy": (outputs.mask.argmax(1) == batch.y.mask).float().mean()}


class TasksThatSayIt(MaskTasks):
    def predict_labels(self, outputs: Labels, batch: Batch) -> Labels:
        return Labels(1 - outputs.mask.argmax(1), outputs.size)


class SeveralLabels:
    """Two labels for each row: tags of three classes, outputs [N, 3, 2]; or independent ones, outputs [N, 2]."""

    in_shape = (4,)

    def __init__(self, are_tags: bool):
        self.are_tags = are_tags
        self.out_features = 6 if are_tags else 2

    def draw(self, split: str, ids: Any) -> list[Episode]:
        return [Episode(self.draw_batch(int(i)), self.draw_batch(int(i) + 1)) for i in ids]

    def draw_batch(self, seed: int) -> Batch:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed % 2**31))
        return Batch(x, (x[:, :2] > 0).long() + self.are_tags * (x[:, 2:] > 0).long())

    def score(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.are_tags:
            loss = functional.cross_entropy(outputs, batch.y)
            predicted = outputs.argmax(1)
        else:
            loss = functional.binary_cross_entropy_with_logits(outputs, batch.y.to(outputs.dtype))
            predicted = outputs.sigmoid().round().long()
        return loss, {"accuracy": (predicted == batch.y).float().mean()}


class LabelNet(nn.Module):
    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, out_features))

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.body(x)
        return outputs.unflatten(1, (3, 2)) if outputs.shape[1] == 6 else outputs


@pytest.mark.parametrize("are_tags", [True, False])
def test_file_of_several_labels_agrees_with_the_accuracy(
    are_tags: bool, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    job = tree(
        "maml",
        model={"type": "test_predictions:LabelNet"},
        tasks={"type": "test_predictions:SeveralLabels", "are_tags": are_tags},
        run={"steps": 1, "eval_tasks": 4},
    )
    run = distmeta.train(Job.parse(job)).run
    figures = distmeta.evaluate(run, ["run.eval_tasks=4"], predictions="predictions.parquet").figures
    table = pq.read_table("predictions.parquet").to_pydict()
    labels = np.array(table["label"])
    assert labels.shape == (20, 2)
    assert (labels == np.array(table["prediction"])).mean() == pytest.approx(
        figures["accuracy_after"], abs=1e-6
    )


@pytest.fixture
def run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def train(tasks: str) -> Path:
        job = tree(
            "maml",
            model={"type": "test_predictions:PixelNet"},
            tasks={"type": f"test_predictions:{tasks}"},
            run={"steps": 1, "eval_tasks": 4},
        )
        return distmeta.train(Job.parse(job)).run

    return train


@pytest.mark.parametrize(("tasks", "is_inverted"), [("MaskTasks", False), ("TasksThatSayIt", True)])
def test_file_has_every_label_and_agrees_with_the_accuracy(
    run: Any, tasks: str, is_inverted: bool, tmp_path: Path
) -> None:
    path = tmp_path / "predictions.parquet"
    evaluation = distmeta.evaluate(run(tasks), ["run.eval_tasks=4"], predictions=path)
    table = pq.read_table(path).to_pydict()
    labels = np.array(table["label.mask"])
    predictions = np.array(table["prediction.mask"])
    assert labels.shape == predictions.shape == (12, 4, 6)
    accuracy = (labels == predictions).mean()
    expected = evaluation.figures["accuracy_after"]
    assert (1 - accuracy if is_inverted else accuracy) == pytest.approx(expected, abs=1e-6)
    assert labels.mean((1, 2)) == pytest.approx(np.array(table["label.size"]))
    assert len(table["prediction.size"]) == 12
