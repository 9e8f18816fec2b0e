"""The copy task: markers, right-aligned sequences, targets, and a score that ignores padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distmeta.errors import InputError
from distmeta.protocols import PADDING, Batch, TaskFamily
from distmeta.seeding import task_ids
from distmeta.tasks.copying import Copy


def test_query_asks_for_what_the_support_shows() -> None:
    family = Copy(bits=3, length=4, min_length=4)
    support, query = family.draw("train", task_ids(0, "train", 0, 5))
    assert isinstance(family, TaskFamily)
    assert (family.in_shape, family.out_features) == ((5,), 3)
    assert support.x.shape == (5, 6, 5)
    assert support.y.shape == (5, 6, 3)
    assert query.x.shape == (5, 4, 5)
    assert all(leaf.dtype == torch.float32 for part in (support, query) for leaf in part)
    assert not query.x.any()
    assert not support.y.any()
    torch.testing.assert_close(support.x[:, 1:-1, :3], query.y)
    assert support.x[:, :, 3].tolist() == [[1, 0, 0, 0, 0, 0]] * 5
    assert support.x[:, :, 4].tolist() == [[0, 0, 0, 0, 0, 1]] * 5
    assert set(query.y.unique().tolist()) == {0, 1}


def test_shorter_sequences_also_end_with_the_support() -> None:
    support, query = Copy(bits=2, length=5).draw("train", task_ids(0, "train", 0, 400))
    lengths = (query.y[..., 0] != PADDING).sum(1)
    assert set(lengths.tolist()) == {1, 2, 3, 4, 5}
    assert 55 <= int((lengths == 5).sum()) <= 105, "all lengths are equally likely"
    for t, n in enumerate(lengths.tolist()):
        start = 5 - n
        assert not support.x[t, :start].any()
        assert support.x[t, start].tolist() == [0, 0, 1, 0]
        torch.testing.assert_close(support.x[t, start + 1 : -1, :2], query.y[t, :n])
        assert support.x[t, -1].tolist() == [0, 0, 0, 1]
        assert (query.y[t, n:] == PADDING).all()


def test_task_depends_only_on_its_id() -> None:
    family = Copy(bits=4, length=6)
    ids = task_ids(0, "train", 3, 6)
    together = family.draw("train", ids)
    alone = family.draw("train", ids[4:5])
    assert torch.equal(together.support.x[4:5], alone.support.x)
    assert torch.equal(together.query.y[4:5], alone.query.y)


def test_evaluation_has_its_own_lengths() -> None:
    family = Copy(bits=2, length=3, eval_length=9, eval_min_length=7)
    for split, (low, high) in {"train": (1, 3), "val": (7, 9), "test": (7, 9)}.items():
        query = family.draw(split, task_ids(0, split, 0, 50)).query
        lengths = (query.y[..., 0] != PADDING).sum(1)
        assert (int(lengths.min()), int(lengths.max()), query.y.shape[1]) == (low, high, high)
    short = Copy(length=8, min_length=6, eval_length=4).draw("val", np.array([1], np.uint64))
    assert short.query.y.shape == (1, 4, 8)


def test_score_ignores_padding() -> None:
    y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [PADDING, PADDING]])
    outputs = torch.tensor([[2.0, -1.0], [3.0, 0.5], [9.0, -9.0]])
    batch = Batch(torch.zeros(3, 4), y)
    loss, metrics = Copy(bits=2).score(outputs, batch)
    p = outputs[:2].double().sigmoid()
    expected = -torch.stack([p[0, 0], 1 - p[0, 1], 1 - p[1, 0], p[1, 1]]).log().mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert float(metrics["accuracy"]) == 0.75
    assert float(metrics["accuracy_sequence"]) == 0.0
    outputs[1, 0] = -3.0  # the only wrong bit
    assert float(Copy(bits=2).score(outputs, batch)[1]["accuracy_sequence"]) == 1


def test_impossible_lengths_are_refused() -> None:
    with pytest.raises(InputError, match=r"^tasks\.min_length: got 5, expected at most tasks\.length = 4$"):
        Copy(length=4, min_length=5)
    with pytest.raises(InputError, match=r"^tasks\.eval_min_length: got 7, .* tasks\.eval_length = 6$"):
        Copy(length=4, eval_length=6, eval_min_length=7)
