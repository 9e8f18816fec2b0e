"""A user's own task family is one file outside the package. The job names it as `module:Class`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import tree

import distmeta
from distmeta.errors import InputError

ARRAYS = '''
"""Classification of classes that are arrays in a dictionary."""

import numpy as np
import torch

from distmeta.protocols import Batch, Episode
from distmeta.seeding import task_generator
from distmeta.tasks.few_shot import ClassificationScore


def load_classes() -> dict[str, np.ndarray]:
    """Return the examples of each class [examples, features]. Here they are made up."""
    random = np.random.default_rng(0)
    return {f"class {k}": random.normal(random.uniform(-2, 2, 4), 0.5, (30, 4)) for k in range(20)}


class ArrayTasks:
    in_shape = (4,)

    def __init__(self, ways: int = 3, shots: int = 2, queries: int = 5):
        self.ways = ways
        self.shots = shots
        self.queries = queries
        self.out_features = ways
        self.score = ClassificationScore(ways)
        classes = load_classes()
        names = sorted(classes)
        self.splits = {
            "train": [classes[name] for name in names[:12]],
            "val": [classes[name] for name in names[12:16]],
            "test": [classes[name] for name in names[16:]],
        }

    def draw(self, split, ids):
        return [self.draw_task(self.splits[split], task_generator(task_id)) for task_id in ids]

    def draw_task(self, classes, random):
        chosen = random.choice(len(classes), self.ways, replace=False)
        examples = [random.permutation(classes[k])[: self.shots + self.queries] for k in chosen]
        x = torch.tensor(np.stack(examples), dtype=torch.float32)  # [ways, shots + queries, features]
        y = torch.arange(self.ways)[:, None].expand(x.shape[:2])
        support = Batch(x[:, : self.shots].flatten(0, 1), y[:, : self.shots].flatten())
        query = Batch(x[:, self.shots :].flatten(0, 1), y[:, self.shots :].flatten())
        return Episode(support, query)
'''

UNEQUAL = '''
"""Patients with different numbers of measurements."""

import torch

from distmeta.protocols import Batch, Episode
from distmeta.seeding import task_generator


class Patients:
    """A noisy line per patient; 3 to 6 measurements to adapt on and 4 to predict."""

    in_shape = (1,)
    out_features = 1

    def draw(self, split, ids):
        return [self.draw_patient(task_generator(task_id)) for task_id in ids]

    def draw_patient(self, random):
        measurements = int(random.integers(3, 7))
        x = random.uniform(-1, 1, (measurements + 4, 1))
        y = random.normal() * x + random.normal(scale=0.1, size=x.shape)
        x = torch.tensor(x, dtype=torch.float32)
        y = torch.tensor(y, dtype=torch.float32)
        return Episode(Batch(x[:measurements], y[:measurements]), Batch(x[measurements:], y[measurements:]))

    def score(self, outputs, batch):
        return (outputs - batch.y).square().mean(), {}
'''

RUN = {"steps": 2, "tasks_per_step": 8, "workers": 0, "eval_tasks": 8}


@pytest.mark.parametrize("algorithm", [{"type": "protonet"}, {"type": "maml", "inner_lr": 0.1}])
def test_classes_of_a_dictionary_train_and_evaluate(workplace: Path, algorithm: dict[str, object]) -> None:
    (workplace / "array_tasks.py").write_text(ARRAYS)
    tasks = {"type": "array_tasks:ArrayTasks", "ways": 3}
    job = distmeta.Job.parse(tree(algorithm, tasks=tasks, run=RUN, output="runs"))

    run = distmeta.train(job).run
    scores = distmeta.evaluate(run)

    records = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    assert all(record["accuracy_after"] is not None for record in records)
    assert scores.tasks == 8
    assert scores.figures["accuracy_after"] > 1 / 3  # better than chance


def test_tasks_of_unequal_sizes_train_and_evaluate(workplace: Path) -> None:
    (workplace / "patients.py").write_text(UNEQUAL)
    algorithm = {"type": "maml", "inner_lr": 0.05, "inner_steps": 2}
    job = distmeta.Job.parse(tree(algorithm, tasks={"type": "patients:Patients"}, run=RUN, output="runs"))

    run = distmeta.train(job).run
    scores = distmeta.evaluate(run)

    records = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    assert [record["tasks"] for record in records] == [8, 8]
    assert scores.tasks == 8
    assert scores.figures["loss_after"] != scores.figures["loss_before"]


def test_wrong_option_of_own_tasks_is_an_error(workplace: Path) -> None:
    (workplace / "array_tasks_options.py").write_text(ARRAYS)
    tasks = {"type": "array_tasks_options:ArrayTasks", "way": 3}
    with pytest.raises(InputError, match=r"tasks\.way: .*did you mean 'ways'"):
        distmeta.Job.parse(tree({"type": "protonet"}, tasks=tasks))
