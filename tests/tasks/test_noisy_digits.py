"""Digits with wrong labels: the share of wrong ones, disjoint splits, reproducible tasks."""

from __future__ import annotations

import pytest
import torch

from distmeta.errors import InputError
from distmeta.seeding import task_ids
from distmeta.tasks.noisy_digits import NoisyDigits
from distmeta.trees import tree_leaves


def test_clean_labels_are_right_and_others_are_wrong() -> None:
    ids = task_ids(0, "train", 0, 20)
    noisy = NoisyDigits(noise=0.4).draw("train", ids).support
    clean = NoisyDigits(noise=0.0).draw("train", ids).support
    assert torch.equal(noisy.x, clean.x)
    assert torch.equal(noisy.y == clean.y, noisy.is_clean)
    assert float(noisy.is_clean.float().mean()) == pytest.approx(0.6, abs=0.03)
    assert bool(clean.is_clean.all())


def test_splits_and_sets_have_no_drawing_in_common() -> None:
    family = NoisyDigits(support=260, queries=99)
    positions = [set(family._rows[split].tolist()) for split in ("train", "val", "test")]
    assert sum(map(len, positions)) == len(set().union(*positions)) == 1797
    episode = family.draw("val", task_ids(0, "val", 0, 1))
    rows = torch.cat([episode.support.x, episode.query.x], 1)[0].flatten(1)
    assert len(rows) == 359 == len(rows.unique(dim=0))


def test_task_depends_only_on_its_id() -> None:
    ids = task_ids(0, "train", 0, 3)
    family = NoisyDigits()
    together = family.draw("train", ids)
    alone = family.draw("train", ids[1:2])
    for a, b in zip(tree_leaves(together), tree_leaves(alone), strict=True):
        assert torch.equal(a[1], b[0])


def test_too_many_examples_are_refused() -> None:
    with pytest.raises(InputError, match=r"^tasks.support: got 300 with 100 queries, expected at most 360"):
        NoisyDigits(support=300, queries=100)
