"""Few-shot classes made of scikit-learn's digits: 1,797 drawings, 8×8, that come with the library."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from distmeta.core import InputError
from distmeta.tasks.fewshot import ClassEntry, Count, FewShot, Ways
from distmeta.tasks.images import Preparation

Digit = Annotated[int, Field(ge=0, le=9)]

TEST_DIGITS = [7, 8, 9]
HELD_OUT = 0.2
"""The part of each training digit's drawings (its last) that only val sees."""

PREPARATION = Preparation(size=8, filter="box", ink="light", channels=1)
"""For images given from outside; box is how the data set was made (counts in 4×4 blocks of 32×32 bitmaps)."""


def digits(
    ways: Ways = 5,
    shots: Count = 1,
    queries: Count = 15,
    eval_ways: Ways | None = None,
    eval_shots: Count | None = None,
    eval_queries: Count | None = None,
    test_digits: list[Digit] = TEST_DIGITS,
    rotations: bool = True,
) -> FewShot:
    """Digits and their quarter turns as classes; x [1, 8, 8] in 0..1, out_features = ways.

    test: the test digits upright and turned by 90° (six classes by default). train: the other digits in all
    four turns, without classes that look like one already there or like a test class (`appearance`). val: the
    training classes, from the last fifth of each digit's drawings, which train does not see. Without
    `rotations` every digit is one class. The idea of rotated classes: Santoro et al. 2016.
    """
    if not test_digits or len(set(test_digits)) < len(test_digits) or not set(test_digits) < set(range(10)):
        raise InputError(f"tasks.test_digits: got {test_digits}, expected one to nine different digits")
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    images = np.asarray(pixels).reshape(-1, 1, 8, 8).astype(np.uint8)
    rows = {digit: np.flatnonzero(np.asarray(target) == digit) for digit in range(10)}
    train, test = class_turns(test_digits, rotations)

    def entries(classes: list[tuple[int, int]], low: float, high: float) -> list[ClassEntry]:
        return [
            ClassEntry(_part(rows[digit], low, high), turns, digit, f"{digit}@{90 * turns}")
            for digit, turns in classes
        ]

    splits = {
        "train": entries(train, 0, 1 - HELD_OUT),
        "val": entries(train, 1 - HELD_OUT, 1),
        "test": entries(test, 0, 1),
    }
    return FewShot(
        images, splits, ways=ways, shots=shots, queries=queries, eval_ways=eval_ways, eval_shots=eval_shots,
        eval_queries=eval_queries, scale=1 / 16, preparation=PREPARATION,
    )  # fmt: skip


def appearance(digit: int, quarter_turns: int) -> tuple[int, int]:
    """What a turned digit looks like; two that look alike have one appearance.

    0, 1 and 8 look the same turned by 180°, and a 9 is a 6 turned by 180°.
    """
    if digit in (0, 1, 8):
        return digit, quarter_turns % 2
    if digit == 9:
        return 6, (quarter_turns + 2) % 4
    return digit, quarter_turns % 4


def class_turns(
    test_digits: list[int], rotations: bool = True
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(digit, quarter turns) of the classes of train and of test, no two of the same appearance."""
    test = [(digit, turns) for digit in test_digits for turns in (range(2) if rotations else range(1))]
    seen = {appearance(*turned) for turned in test}
    train = []
    for digit in range(10):
        for turns in range(4) if rotations else range(1):
            if digit not in test_digits and appearance(digit, turns) not in seen:
                seen.add(appearance(digit, turns))
                train.append((digit, turns))
    return train, test


def _part(rows: np.ndarray, low: float, high: float) -> np.ndarray:
    """The rows between two fractions of the list."""
    return rows[round(low * len(rows)) : round(high * len(rows))]
