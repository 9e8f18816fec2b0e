"""Splits of a store by class, by group and by name; rotations of training classes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distmeta.errors import InputError
from distmeta.seeding import task_ids
from distmeta.tasks.arrow import arrow, space_evenly
from distmeta.tasks.image_preparation import Preparation
from distmeta.tasks.store import write_store

PREPARATION = Preparation(size=3)
CLASSES = 20
DRAWINGS = 4
GROUPS = 5
SMALL = {"ways": 2, "shots": 1, "queries": 2}


def write_numbered_store(path, has_groups):
    """Write a store whose images have the number of their class + 1 in their first pixel."""
    images = np.zeros((CLASSES * DRAWINGS, 1, 3, 3), np.uint8)
    images[:, 0, 0, 0] = np.repeat(np.arange(CLASSES), DRAWINGS) + 1
    names = [f"c{k}" for k in range(CLASSES)]
    groups = [f"g{k * GROUPS // CLASSES}" if has_groups else "" for k in range(CLASSES)]
    write_store(path, images, names, groups, [DRAWINGS] * CLASSES, PREPARATION)
    return str(path)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_numbered_store(tmp_path_factory.mktemp("store") / "grouped.arrow", True)


def read_classes(x):
    return (x.amax((-3, -2, -1)) * 255).round().long() - 1


def find_classes(family, split, tasks=300):
    """Return the classes that occur in a split's episodes."""
    x = family.draw(split, task_ids(0, split, 0, tasks)).query.x
    return set(read_classes(x).flatten().tolist())


@given(st.integers(1, 500), st.integers(0, 500))
def test_positions_are_spaced_evenly(count, more):
    positions = space_evenly(count, count + more)
    assert len(set(positions)) == count
    assert positions == sorted(positions)
    assert positions[0] >= 0
    assert positions[-1] < count + more
    assert count == 1 or np.ptp(np.diff(positions)) <= 1


def test_classes_are_split_evenly(path):
    family = arrow(path, **SMALL)
    splits = {split: find_classes(family, split) for split in ("train", "val", "test")}
    assert splits["test"] == {2, 7, 12, 17}
    assert splits["val"] == {5, 15}  # the fifth and the thirteenth of the sixteen that remain
    assert set.union(*splits.values()) == set(range(CLASSES))
    assert sum(map(len, splits.values())) == CLASSES
    assert family.preparation == PREPARATION
    assert family.in_shape == (1, 3, 3)
    assert find_classes(arrow(path, **SMALL, test=4, val=2), "test") == splits["test"]


def test_groups_are_split(path):
    family = arrow(path, **SMALL, split_by="group", test=2, val=4, within_group=False)
    assert find_classes(family, "test") == {4, 5, 6, 7, 12, 13, 14, 15}
    assert find_classes(family, "val") == {1, 8, 11, 18}
    named = arrow(path, **SMALL, split_by="group", test=["g0"], val=["g4"], within_group=True)
    assert find_classes(named, "test") == {0, 1, 2, 3}
    assert find_classes(named, "val") == {16, 17, 18, 19}
    classes = read_classes(named.draw("train", task_ids(0, "train", 0, 50)).support.x)
    assert torch.equal(classes[:, 0] // 4, classes[:, 1] // 4)


def test_names_choose_the_splits(path, tmp_path):
    family = arrow(path, **SMALL, test=["g0/c3", "g4/c19"], val=["g1/c4", "g1/c5"])
    assert find_classes(family, "test") == {3, 19}
    assert find_classes(family, "val") == {4, 5}
    plain = write_numbered_store(tmp_path / "plain.arrow", False)
    assert find_classes(arrow(plain, **SMALL, test=["c3", "c19"]), "test") == {3, 19}
    with pytest.raises(InputError, match=r"tasks\.split_by: got 'group'"):
        arrow(plain, split_by="group")


def test_only_training_classes_are_rotated(path):
    family = arrow(path, rotations=True, ways=56, shots=1, queries=1, eval_ways=2)
    x = family.draw("train", task_ids(0, "train", 0, 1)).support.x[0, :, 0]
    corners = torch.stack([x[:, 0, 0], x[:, 2, 0], x[:, 2, 2], x[:, 0, 2]], 1)  # turned by 0, 90, 180, 270
    assert ((corners > 0).sum(0) == 14).all()
    for split in ("val", "test"):
        x = family.draw(split, task_ids(0, split, 0, 50)).query.x
        assert (x[..., 0, 0, 0] > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"test": ["g0/c33"]},
            r"tasks.test: got 'g0/c33', expected a class of the store: did you mean 'g0/c3'",
        ),
        ({"test": ["zzzzzzzz"]}, r"tasks.test: got 'zzzzzzzz', expected a class of the store"),
        ({"test": ["g44"], "split_by": "group"}, r"expected a group of the store: did you mean 'g"),
        (
            {"test": ["g0/c1"], "val": ["g0/c1"]},
            r"tasks.val: got 'g0/c1', expected names that are not in tasks.test",
        ),
        ({"test": []}, r"tasks.test: got \[\]"),
        ({"test": ["g0/c1", "g0/c1"]}, r"expected different names"),
        ({"test": 0}, r"tasks.test: got 0, expected a fraction"),
        ({"test": 20}, r"tasks.test: got 20"),
        ({"test": 1.0}, r"tasks.test: got 1.0"),
        ({"test": -0.5}, r"tasks.test: got -0.5"),
        ({"test": 0.99}, r"tasks.test: got 0.99"),
        ({"val": 16}, r"tasks.val: got 16"),
        (
            {"split_by": "group", "test": ["g0"], "val": ["g1", "g2", "g3", "g4"]},
            r"tasks.val: got every class",
        ),
        ({"ways": 5, "test": 4}, r"tasks.ways: got 5, expected at most"),
        ({"within_group": True}, r"with tasks.within_group, the largest group of the"),
    ],
)
def test_wrong_options_are_refused(path, options, message):
    with pytest.raises(InputError, match=message) as caught:
        arrow(path, **{**SMALL, **options})
    assert len(str(caught.value)) < 250


def test_null_holds_nothing_out(path):
    everything = arrow(path, **SMALL, test=None, val=None)
    assert find_classes(everything, "train") == set(range(CLASSES))
    for split in ("val", "test"):
        with pytest.raises(InputError, match=f"tasks.{split}: got null, expected classes held out to draw"):
            everything.draw(split, task_ids(0, split, 0, 1))
        assert everything.scorer(split) == everything.score
    no_val = arrow(path, **SMALL, split_by="group", test=["g0"], val=None)
    assert find_classes(no_val, "test") == {0, 1, 2, 3}
    assert find_classes(no_val, "train") == set(range(4, CLASSES))
    no_test = arrow(path, **SMALL, test=None, val=4)
    assert len(find_classes(no_test, "val")) == 4
    assert len(find_classes(no_test, "train")) == CLASSES - 4
