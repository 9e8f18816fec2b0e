"""Few-shot classes from scikit-learn's digits: 1,797 drawings of 8×8 pixels that come with the library."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from distmeta.errors import InputError
from distmeta.tasks.domains import Domain, shift_images
from distmeta.tasks.few_shot import FewShot, Order
from distmeta.tasks.image_preparation import Preparation
from distmeta.tasks.options import Positive, Ways
from distmeta.tasks.sampling import ClassEntry

Digit = Annotated[int, Field(ge=0, le=9)]
TurnedDigit = tuple[int, int]
"""A class: (digit, quarter turns counter-clockwise)."""
DomainPair = tuple[Domain, Domain]
"""The domains of an episode's support and query set."""

TEST_DIGITS = [7, 8, 9]
HELD_OUT = 0.2
"""The part of each training digit's drawings (its last ones) that only val sees."""

INK = 16
"""The value of a pixel that is all ink."""
PREPARATION = Preparation(size=8, filter="box", ink="light", channels=1)
"""For a user's images. The data set was made by a box filter too: counts in 4×4 blocks of 32×32 bitmaps."""


def digits(
    ways: Ways = 5,
    shots: Positive = 1,
    queries: Positive = 15,
    eval_ways: Ways | None = None,
    eval_shots: Positive | None = None,
    eval_queries: Positive | None = None,
    min_ways: Ways | None = None,
    min_shots: Positive | None = None,
    unbalanced: bool = False,
    order: Order = "shots",
    test_digits: list[Digit] = TEST_DIGITS,
    rotations: bool = True,
    support_domain: Domain = "original",
    query_domain: Domain = "original",
    eval_support_domain: Domain | None = None,
    eval_query_domain: Domain | None = None,
) -> FewShot:
    """Build tasks whose classes are digits and their quarter turns; x [1, 8, 8] from 0 to 1, out_features = ways.

    - test: the test digits upright and turned by 90° (six classes by default).
    - train: the other digits in all four turns, without classes that look like another class (`canonicalize_digit`).
    - val: the training classes, from the last fifth of each digit's drawings. train does not see these drawings.

    The idea of rotated classes: Santoro et al. 2016.

    Args:
        rotations: without them, every digit is one class.
        support_domain, query_domain: how the two parts of a training task are shown (`domains.shift_images`). No
            drawing is in both parts of an episode. A class is turned after the shift, so that a slanted drawing that is
            turned by 90° leans downwards.
        eval_support_domain, eval_query_domain: the same for val and test (default: the training ones).
        ways, shots, …: see `tasks.few_shot.FewShot`.
    """
    if not test_digits or len(set(test_digits)) < len(test_digits) or not set(test_digits) < set(range(10)):
        raise InputError(f"tasks.test_digits: got {test_digits}, expected one to nine different digits")
    images, target = load_digit_images()
    rows = {digit: np.flatnonzero(target == digit) for digit in range(10)}
    train, test = choose_classes(test_digits, rotations)
    train_pair: DomainPair = (support_domain, query_domain)
    eval_pair: DomainPair = (eval_support_domain or support_domain, eval_query_domain or query_domain)
    domains: list[Domain] = list(dict.fromkeys(train_pair + eval_pair))
    start = {domain: i * len(images) for i, domain in enumerate(domains)}

    def list_entries(
        classes: list[TurnedDigit], low: float, high: float, pair: DomainPair
    ) -> list[ClassEntry]:
        """Return the classes with their drawings from a fraction `low` to a fraction `high` of each digit."""
        entries = []
        for digit, turns in classes:
            drawings = rows[digit]
            drawings = drawings[round(low * len(drawings)) : round(high * len(drawings))]
            support = start[pair[0]] + drawings
            query = start[pair[1]] + drawings if pair[0] != pair[1] else None
            entries.append(ClassEntry(support, turns, digit, f"{digit}@{90 * turns}", query))
        return entries

    splits = {
        "train": list_entries(train, 0, 1 - HELD_OUT, train_pair),
        "val": list_entries(train, 1 - HELD_OUT, 1, eval_pair),
        "test": list_entries(test, 0, 1, eval_pair),
    }
    return FewShot(
        np.concatenate([shift_images(images, domain, INK) for domain in domains]),
        splits,
        ways=ways,
        shots=shots,
        queries=queries,
        eval_ways=eval_ways,
        eval_shots=eval_shots,
        eval_queries=eval_queries,
        min_ways=min_ways,
        min_shots=min_shots,
        unbalanced=unbalanced,
        order=order,
        scale=1 / INK,
        preparation=PREPARATION,
    )


def canonicalize_digit(digit: int, quarter_turns: int) -> TurnedDigit:
    """Return the same (digit, quarter turns) for all turned digits that look alike.

    0, 1 and 8 look the same after a turn by 180°, and a 9 is a 6 turned by 180°.
    """
    if digit in (0, 1, 8):
        return digit, quarter_turns % 2
    if digit == 9:
        return 6, (quarter_turns + 2) % 4
    return digit, quarter_turns % 4


def choose_classes(
    test_digits: list[int], rotations: bool = True
) -> tuple[list[TurnedDigit], list[TurnedDigit]]:
    """Return the classes of train and of test. No two of them look alike."""
    train_turns = range(4) if rotations else range(1)
    test_turns = range(2) if rotations else range(1)
    test = [(digit, turns) for digit in test_digits for turns in test_turns]
    seen = {canonicalize_digit(*turned) for turned in test}
    train = []
    for digit in range(10):
        for turns in train_turns:
            look = canonicalize_digit(digit, turns)
            if digit not in test_digits and look not in seen:
                seen.add(look)
                train.append((digit, turns))
    return train, test


def load_digit_images() -> tuple[np.ndarray, np.ndarray]:
    """Return the images, uint8 [1797, 1, 8, 8] from 0 to `INK`, and their digits [1797]."""
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    images = np.asarray(pixels).reshape(-1, 1, 8, 8).astype(np.uint8)
    return images, np.asarray(target)
