"""Affine jitter: what a warp does, that it is drawn with the task, that only training sees it."""

import math
import time

import numpy as np
import pytest
import torch

from distmeta.config.parts import check_options
from distmeta.errors import InputError
from distmeta.seeding import task_ids
from distmeta.tasks.arrow import arrow
from distmeta.tasks.few_shot import FewShot
from distmeta.tasks.image_preparation import Preparation
from distmeta.tasks.jitter import NUMBERS, Jitter, drawn, warped
from distmeta.tasks.sampling import ClassEntry
from distmeta.tasks.store import write_store

LIMITS = Jitter(rotate=10, scale=0.1, shear=0.1, shift=2)
CLASSES, DRAWINGS, SIDE = 9, 4, 12
IMAGES = np.random.default_rng(0).integers(0, 256, (CLASSES * DRAWINGS, 1, SIDE, SIDE), np.uint8)
SPLITS = {
    split: [ClassEntry(range(k * DRAWINGS, (k + 1) * DRAWINGS)) for k in range(3 * i, 3 * i + 3)]
    for i, split in enumerate(("train", "val", "test"))
}


def family(jitter=LIMITS, **options):
    return FewShot(IMAGES, SPLITS, **{"ways": 3, "shots": 1, "queries": 2, "jitter": jitter, **options})


def images(count=5, channels=2, height=9, width=9):
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0))


def warp(count=5, **numbers):
    names = ["angle", "wider", "higher", "shear", "right", "down"]
    assert len(names) == NUMBERS
    return np.tile([float(numbers.get(name, 0)) for name in names], (count, 1))


def close(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-6)


def test_no_warp_is_the_same_image():
    assert close(warped(images(), warp()), images())
    oblong = images(height=6, width=11)
    assert close(warped(oblong, warp()), oblong)


def test_a_shift_by_whole_pixels_moves_and_fills_with_zero():
    moved = warped(images(), warp(right=2, down=-3))
    assert close(moved[..., :-3, 2:], images()[..., 3:, :-2])
    assert close(moved[..., -3:, :], torch.zeros(5, 2, 3, 9))
    assert close(moved[..., :2], torch.zeros(5, 2, 9, 2))


def test_a_quarter_turn():
    turned = warped(images(), warp(angle=math.pi / 2))
    assert close(turned, torch.rot90(images(), 1, (2, 3)))  # counter-clockwise, as the classes' turns


@pytest.mark.parametrize("side", [9, 10])
def test_doubling_from_the_centre(side):
    """Twice as wide: a place at distance d from the middle shows what was at d / 2."""
    x = images(height=side, width=side).double()
    wide = warped(x, warp(wider=1.0))
    middle = (side - 1) / 2
    for column in range(side):
        source = middle + (column - middle) / 2
        left, part = math.floor(source), source - math.floor(source)
        wanted = (1 - part) * x[..., left] + (part * x[..., left + 1] if part else 0)
        assert torch.allclose(wide[..., column], wanted, atol=1e-6)


def test_shear_moves_each_row_by_its_distance_from_the_middle():
    slanted = warped(images(), warp(shear=1.0))
    for row in range(9):
        offset = row - 4
        wanted = torch.zeros(5, 2, 9)
        for column in range(9):
            if 0 <= column - offset < 9:
                wanted[..., column] = images()[:, :, row, column - offset]
        assert close(slanted[:, :, row], wanted)


def test_an_image_does_not_depend_on_the_others():
    x, warps = images(50), drawn(LIMITS, [7], 50)[0]
    for part in (slice(0, 1), slice(3, 20), slice(49, 50)):
        assert torch.equal(warped(x, warps)[part], warped(x[part], warps[part]))


def test_warps_are_the_tasks_own_and_within_their_limits():
    ids = task_ids(0, "train", 0, 200)
    warps = drawn(LIMITS, ids, 30)
    assert np.array_equal(warps[5:9], drawn(LIMITS, ids[5:9], 30))
    limits = np.array([math.radians(10), 0.1, 0.1, 0.1, 2, 2])
    assert (np.abs(warps) <= limits).all()
    assert (np.abs(warps.mean((0, 1))) < 0.03 * limits).all()
    assert np.allclose(warps.std((0, 1)), limits / math.sqrt(3), rtol=0.02)
    correlation = np.corrcoef(warps.reshape(-1, NUMBERS).T)
    assert np.abs(correlation - np.eye(NUMBERS)).max() < 0.05
    assert len(np.unique(warps)) == warps.size


def test_a_task_draws_the_same_whoever_draws_it():
    ids = task_ids(0, "train", 0, 6)
    whole = family().draw("train", ids)
    for part in (slice(0, 1), slice(2, 5), slice(5, 6)):
        for mine, all_of_them in zip(family().draw("train", ids[part]), whole, strict=True):
            assert torch.equal(mine.x, all_of_them.x[part])
            assert torch.equal(mine.y, all_of_them.y[part])


@pytest.mark.parametrize("order", ["shots", "random"])
def test_training_images_are_those_without_jitter_warped_and_the_rest_is_as_it_was(order):
    ids = task_ids(3, "train", 0, 8)
    plain, jittered = (family(jitter, order=order) for jitter in (None, LIMITS))
    for split in ("val", "test"):
        for a, b in zip(plain.draw(split, ids), jittered.draw(split, ids), strict=True):
            assert torch.equal(a.x, b.x)
            assert torch.equal(a.y, b.y)
    before, after = plain.draw("train", ids), jittered.draw("train", ids)
    assert torch.equal(before.support.y, after.support.y)
    assert torch.equal(before.query.y, after.query.y)
    warps = drawn(LIMITS, ids, 9)
    for t in range(8):  # support rows first, then query rows, each with a warp of its own
        both = torch.cat([before.support.x[t], before.query.x[t]])
        assert torch.equal(torch.cat([after.support.x[t], after.query.x[t]]), warped(both, warps[t]))
    none = family(Jitter(), order=order).draw("train", ids)
    assert close(none.support.x, before.support.x)
    assert close(none.query.x, before.query.x)


def test_from_a_store(tmp_path):
    path = tmp_path / "store.arrow"
    names = [f"c{k}" for k in range(CLASSES)]
    write_store(path, IMAGES, names, [""] * CLASSES, [DRAWINGS] * CLASSES, Preparation(size=SIDE))
    options = {"path": str(path), "ways": 2, "queries": 2, "test": 2, "val": 2}
    ids = task_ids(0, "train", 0, 2)
    plain = arrow(**options).draw("train", ids)
    assert torch.equal(arrow(**options, jitter=None).draw("train", ids).query.x, plain.query.x)
    shifted = arrow(**options, jitter={"shift": 3.0}, rotations=True).draw("train", ids)
    assert shifted.query.x.shape == plain.query.x.shape
    assert not torch.equal(shifted.query.x, plain.query.x)
    assert shifted.query.x.min() >= 0
    assert shifted.query.x.max() <= 1


@pytest.mark.parametrize(
    ("jitter", "message"),
    [
        ({"rotat": 10}, "tasks.jitter.rotat: got an unknown key, did you mean 'rotate'?"),
        ({"rotate": -1}, "tasks.jitter.rotate: got -1.0, expected a number from 0 to 180"),
        ({"rotate": 181}, "tasks.jitter.rotate: got 181.0, expected a number from 0 to 180"),
        ({"scale": 1}, "tasks.jitter.scale: got 1.0, expected a number from 0 to 0.9"),
        ({"shift": math.inf}, "tasks.jitter.shift: got inf, expected a number of pixels, 0 or more"),
        ({"shift": math.nan}, "tasks.jitter.shift: got nan, expected a number of pixels, 0 or more"),
        ({"shear": "much"}, "tasks.jitter.shear: got 'much', expected number"),
        (3, "tasks.jitter: got 3, expected dictionary"),
    ],
)
def test_options_are_checked(jitter, message):
    with pytest.raises(InputError) as caught:
        check_options("tasks", arrow, {"path": "x", "jitter": jitter}, [])
    assert str(caught.value) == message


def test_options_are_kept_as_they_are():
    options = {"rotate": 10, "shift": 2.5}
    assert check_options("tasks", arrow, {"path": "x", "jitter": options}, [])["jitter"] == options


def test_it_is_fast():
    """A thousand images of 28×28 in well under the time of a forward pass over them."""
    x, ids = images(1000, 1, 28, 28), task_ids(0, "train", 0, 10)
    started = time.perf_counter()
    warped(x, drawn(LIMITS, ids, 100).reshape(-1, NUMBERS))
    assert time.perf_counter() - started < 1.0  # 15 ms on a slow core
