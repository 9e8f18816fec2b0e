"""Affine jitter: what a warp does, that it is drawn with the task, and that only training images are warped."""

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
from distmeta.tasks.jitter import WARP_NUMBERS, JitterLimits, draw_warps, warp_images
from distmeta.tasks.sampling import ClassEntry
from distmeta.tasks.store import write_store

LIMITS = JitterLimits(rotate=10, scale=0.1, shear=0.1, shift=2)
CLASSES = 9
DRAWINGS = 4
SIDE = 12
IMAGES = np.random.default_rng(0).integers(0, 256, (CLASSES * DRAWINGS, 1, SIDE, SIDE), np.uint8)
SPLITS = {
    split: [ClassEntry(range(k * DRAWINGS, (k + 1) * DRAWINGS)) for k in range(3 * i, 3 * i + 3)]
    for i, split in enumerate(("train", "val", "test"))
}


def build_family(jitter=LIMITS, **options):
    return FewShot(IMAGES, SPLITS, **{"ways": 3, "shots": 1, "queries": 2, "jitter": jitter, **options})


def make_images(count=5, channels=2, height=9, width=9):
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0))


def make_warps(count=5, **numbers):
    names = ["angle", "width", "height", "shear", "right", "down"]
    assert len(names) == WARP_NUMBERS
    return np.tile([float(numbers.get(name, 0)) for name in names], (count, 1))


def is_close(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-6)


def test_zero_warp_keeps_the_image():
    assert is_close(warp_images(make_images(), make_warps()), make_images())
    oblong = make_images(height=6, width=11)
    assert is_close(warp_images(oblong, make_warps()), oblong)


def test_shift_by_whole_pixels_fills_with_zeros():
    moved = warp_images(make_images(), make_warps(right=2, down=-3))
    assert is_close(moved[..., :-3, 2:], make_images()[..., 3:, :-2])
    assert is_close(moved[..., -3:, :], torch.zeros(5, 2, 3, 9))
    assert is_close(moved[..., :2], torch.zeros(5, 2, 9, 2))


def test_quarter_turn_is_counter_clockwise():
    turned = warp_images(make_images(), make_warps(angle=math.pi / 2))
    assert is_close(turned, torch.rot90(make_images(), 1, (2, 3)))


@pytest.mark.parametrize("side", [9, 10])
def test_image_is_stretched_from_its_centre(side):
    """At twice the width, the place at distance d from the middle shows what was at d / 2."""
    x = make_images(height=side, width=side).double()
    wide = warp_images(x, make_warps(width=1.0))
    middle = (side - 1) / 2
    for column in range(side):
        source = middle + (column - middle) / 2
        left = math.floor(source)
        part = source - left
        expected = (1 - part) * x[..., left]
        if part:
            expected = expected + part * x[..., left + 1]
        assert torch.allclose(wide[..., column], expected, atol=1e-6)


def test_shear_moves_each_row_by_its_distance_from_the_middle():
    slanted = warp_images(make_images(), make_warps(shear=1.0))
    for row in range(9):
        offset = row - 4
        expected = torch.zeros(5, 2, 9)
        for column in range(9):
            if 0 <= column - offset < 9:
                expected[..., column] = make_images()[:, :, row, column - offset]
        assert is_close(slanted[:, :, row], expected)


def test_image_does_not_depend_on_the_others():
    x = make_images(50)
    warps = draw_warps(LIMITS, [7], 50)[0]
    for part in (slice(0, 1), slice(3, 20), slice(49, 50)):
        assert torch.equal(warp_images(x, warps)[part], warp_images(x[part], warps[part]))


def test_warps_depend_on_the_task_and_fill_their_limits():
    ids = task_ids(0, "train", 0, 200)
    warps = draw_warps(LIMITS, ids, 30)
    assert np.array_equal(warps[5:9], draw_warps(LIMITS, ids[5:9], 30))
    limits = np.array([math.radians(10), 0.1, 0.1, 0.1, 2, 2])
    assert (np.abs(warps) <= limits).all()
    assert (np.abs(warps.mean((0, 1))) < 0.03 * limits).all()
    assert np.allclose(warps.std((0, 1)), limits / math.sqrt(3), rtol=0.02)
    correlation = np.corrcoef(warps.reshape(-1, WARP_NUMBERS).T)
    assert np.abs(correlation - np.eye(WARP_NUMBERS)).max() < 0.05
    assert len(np.unique(warps)) == warps.size


def test_task_does_not_depend_on_the_others():
    ids = task_ids(0, "train", 0, 6)
    together = build_family().draw("train", ids)
    for part in (slice(0, 1), slice(2, 5), slice(5, 6)):
        for alone, whole in zip(build_family().draw("train", ids[part]), together, strict=True):
            assert torch.equal(alone.x, whole.x[part])
            assert torch.equal(alone.y, whole.y[part])


@pytest.mark.parametrize("order", ["shots", "random"])
def test_only_training_images_are_warped(order):
    ids = task_ids(3, "train", 0, 8)
    plain = build_family(None, order=order)
    jittered = build_family(LIMITS, order=order)
    for split in ("val", "test"):
        for a, b in zip(plain.draw(split, ids), jittered.draw(split, ids), strict=True):
            assert torch.equal(a.x, b.x)
            assert torch.equal(a.y, b.y)
    before = plain.draw("train", ids)
    after = jittered.draw("train", ids)
    assert torch.equal(before.support.y, after.support.y)
    assert torch.equal(before.query.y, after.query.y)
    warps = draw_warps(LIMITS, ids, 9)
    for t in range(8):  # warps are for the support rows first, then for the query rows
        images = torch.cat([before.support.x[t], before.query.x[t]])
        warped = torch.cat([after.support.x[t], after.query.x[t]])
        assert torch.equal(warped, warp_images(images, warps[t]))
    zero = build_family(JitterLimits(), order=order).draw("train", ids)
    assert is_close(zero.support.x, before.support.x)
    assert is_close(zero.query.x, before.query.x)


def test_store_is_jittered_as_its_option_says(tmp_path):
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
def test_wrong_options_are_refused(jitter, message):
    with pytest.raises(InputError) as caught:
        check_options("tasks", arrow, {"path": "x", "jitter": jitter}, [])
    assert str(caught.value) == message


def test_options_are_kept_unchanged():
    options = {"rotate": 10, "shift": 2.5}
    assert check_options("tasks", arrow, {"path": "x", "jitter": options}, [])["jitter"] == options


def test_warps_are_fast():
    """A thousand images of 28×28 take far less time than a forward pass over them."""
    x = make_images(1000, 1, 28, 28)
    ids = task_ids(0, "train", 0, 10)
    started = time.perf_counter()
    warp_images(x, draw_warps(LIMITS, ids, 100).reshape(-1, WARP_NUMBERS))
    assert time.perf_counter() - started < 1.0  # 15 ms on a slow core
