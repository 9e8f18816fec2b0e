"""A learner adapts to data of the types that its tasks have: the support set is the same as in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import tree
from torch import Tensor, nn

import distmeta
from distmeta.compute.gradient import unroll
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.protocols import Batch, Episode
from distmeta.seeding import task_ids
from distmeta.trees import tree_leaves, tree_map


class Weighted(NamedTuple):
    """Examples with a weight for each."""

    x: Tensor
    y: Tensor
    weight: Tensor


class Pair(NamedTuple):
    """Like a `Batch`, but a loss can tell them apart."""

    x: Tensor
    y: Tensor


class Waves:
    in_shape: tuple[int, ...] = (1,)
    out_features = 1

    def draw(self, split: str, ids: Any) -> Episode:
        rows = [torch.rand(9, 1, generator=torch.Generator().manual_seed(int(i) % 2**31)) for i in ids]
        x = torch.stack(rows)
        return Episode(self.build(x[:, :5], torch.sin(x[:, :5])), self.build(x[:, 5:], torch.sin(x[:, 5:])))

    def build(self, x: Tensor, y: Tensor) -> Any:
        return Pair(x, y)

    def score(self, outputs: Tensor, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        factor = 1.0 if isinstance(batch, Batch) else 3.0  # another loss than that of a Batch
        return factor * (outputs - batch.y).square().mean(), {}


class WeightedWaves(Waves):
    def build(self, x: Tensor, y: Tensor) -> Any:
        return Weighted(x, y, 1 + x)

    def score(self, outputs: Tensor, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return (batch.weight * (outputs - batch.y).square()).mean(), {}


class DictWaves(Waves):
    """Inputs are dicts."""

    def build(self, x: Tensor, y: Tensor) -> Any:
        return Batch({"time": x, "known": (x > 0.5).long()}, y)

    def score(self, outputs: Tensor, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return (outputs - batch.y).square().mean(), {}


class TagTasks(Waves):
    """Two independent labels for each example."""

    out_features = 2

    def build(self, x: Tensor, y: Tensor) -> Any:
        return Batch(x, torch.cat([x > 0.5, x > 0.2], -1).long())

    def score(self, outputs: Tensor, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return nn.functional.binary_cross_entropy_with_logits(outputs, batch.y.float()), {}


class DictNet(nn.Module):
    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__()
        self.head = nn.Linear(2, out_features)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.head(torch.cat([x["time"], x["known"].float()], -1))


@pytest.fixture
def load_learner(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def load(tasks: str) -> Any:
        model = {"type": "test_user_data:DictNet"} if tasks == "DictWaves" else {"type": "mlp", "hidden": [4]}
        run = {"steps": 1, "eval_every": 0}
        job = tree("maml", model=model, tasks={"type": f"test_user_data:{tasks}"}, run=run)
        return distmeta.load(distmeta.train(Job.parse(job)).run)

    return load


def draw_support(learner: Any) -> Any:
    episode = learner.problem.family.draw("test", task_ids(5, "test", 0, 1))
    return tree_map(lambda leaf: leaf[0], episode.support)


def adapt_as_in_training(learner: Any, support: Any) -> Any:
    return unroll(learner.problem.algorithm, learner.theta, support, detach=True)


def assert_same_state(adapted: Any, expected: Any) -> None:
    pairs = zip(tree_leaves(adapted.state), tree_leaves(expected), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_support_has_the_type_of_training(load_learner: Any) -> None:
    learner = load_learner("Waves")
    support = draw_support(learner)
    expected = adapt_as_in_training(learner, support)
    assert_same_state(learner.adapt(support.x, support.y), expected)
    assert_same_state(learner.adapt(support), expected)
    assert_same_state(learner.adapt({"x": support.x.tolist(), "y": support.y.double().numpy()}), expected)


def test_support_with_further_fields_is_given_as_a_whole(load_learner: Any) -> None:
    learner = load_learner("WeightedWaves")
    support = draw_support(learner)
    assert_same_state(learner.adapt(support), adapt_as_in_training(learner, support))
    with pytest.raises(
        InputError, match=r"have the fields x, y, weight: expected a whole one, adapt\(support\)"
    ):
        learner.adapt(support.x, support.y)
    with pytest.raises(InputError, match=r"support: got x, y, expected x, y, weight"):
        learner.adapt({"x": support.x, "y": support.y})


def test_inputs_may_be_dicts(load_learner: Any) -> None:
    learner = load_learner("DictWaves")
    support = draw_support(learner)
    expected = adapt_as_in_training(learner, support)
    x = {"time": support.x["time"].numpy().astype(np.float64), "known": support.x["known"].tolist()}
    adapted = learner.adapt(x, support.y)
    assert_same_state(adapted, expected)
    assert adapted(x).shape == adapted.predict(x).shape == (5, 1)
    for wrong, message in (
        ({"time": x["time"]}, r"x: got time, expected time, known"),
        (support.x["time"], r"x: got Tensor, expected time, known"),
        (x | {"known": [0.5] * 5}, r"x.known: got a tensor with 1 axes, expected 2, as in training"),
        (x | {"known": [[0.5]] * 5}, r"x.known: got float64, expected int64, as in training"),
    ):
        with pytest.raises(InputError, match=message):
            learner.adapt(wrong, support.y)


def test_independent_labels_are_not_renamed(load_learner: Any) -> None:
    learner = load_learner("TagTasks")
    support = draw_support(learner)
    adapted = learner.adapt(support.x, support.y)
    assert_same_state(adapted, adapt_as_in_training(learner, support))
    assert adapted.classes is None
    assert torch.equal(adapted.predict(support.x), (adapted(support.x) > 0).long())
