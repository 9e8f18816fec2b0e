"""Few-shot classes made of scikit-learn's digits: 1,797 drawings, 8×8, that come with the library."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from distmeta.errors import InputError
from distmeta.tasks.domains import Domain, shifted
from distmeta.tasks.few_shot import Count, FewShot, Order, Ways
from distmeta.tasks.image_preparation import Preparation
from distmeta.tasks.sampling import ClassEntry

Digit = Annotated[int, Field(ge=0, le=9)]
Shown = tuple[Domain, Domain]
"""The domains of an episode's support and query."""

TEST_DIGITS = [7, 8, 9]
HELD_OUT = 0.2
"""The part of each training digit's drawings (its last) that only val sees."""

INK = 16
"""The value of a pixel that is all ink."""
PREPARATION = Preparation(size=8, filter="box", ink="light", channels=1)
"""For images given from outside; box is how the data set was made (counts in 4×4 blocks of 32×32 bitmaps)."""


def digits(
    ways: Ways = 5,
    shots: Count = 1,
    queries: Count = 15,
    eval_ways: Ways | None = None,
    eval_shots: Count | None = None,
    eval_queries: Count | None = None,
    min_ways: Ways | None = None,
    min_shots: Count | None = None,
    unbalanced: bool = False,
    order: Order = "shots",
    test_digits: list[Digit] = TEST_DIGITS,
    rotations: bool = True,
    support_domain: Domain = "original",
    query_domain: Domain = "original",
    eval_support_domain: Domain | None = None,
    eval_query_domain: Domain | None = None,
) -> FewShot:
    """Digits and their quarter turns as classes; x [1, 8, 8] in 0..1, out_features = ways.

    test: the test digits upright and turned by 90° (six classes by default). train: the other digits in all
    four turns, without classes that look like one already there or like a test class (`appearance`). val: the
    training classes, from the last fifth of each digit's drawings, which train does not see. Without
    `rotations` every digit is one class. The idea of rotated classes: Santoro et al. 2016.

    support_domain, query_domain: how the drawings of a training task's two parts are shown (`domains.shifted`);
    eval_*: of val's and test's (default: the training ones). No drawing is in both parts of an episode, in whatever
    domain. A turned class is turned after the shift, so that a slanted drawing that is turned by 90° leans downwards.
    """
    if not test_digits or len(set(test_digits)) < len(test_digits) or not set(test_digits) < set(range(10)):
        raise InputError(f"tasks.test_digits: got {test_digits}, expected one to nine different digits")
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    images = np.asarray(pixels).reshape(-1, 1, 8, 8).astype(np.uint8)
    rows = {digit: np.flatnonzero(np.asarray(target) == digit) for digit in range(10)}
    train, test = class_turns(test_digits, rotations)
    trained: Shown = (support_domain, query_domain)
    evaluated: Shown = (eval_support_domain or support_domain, eval_query_domain or query_domain)
    domains: list[Domain] = list(dict.fromkeys(trained + evaluated))
    start = {domain: i * len(images) for i, domain in enumerate(domains)}

    def entries(classes: list[tuple[int, int]], low: float, high: float, shown: Shown) -> list[ClassEntry]:
        found = []
        for digit, turns in classes:
            support, query = (start[domain] + _part(rows[digit], low, high) for domain in shown)
            other = query if shown[0] != shown[1] else None
            found.append(ClassEntry(support, turns, digit, f"{digit}@{90 * turns}", other))
        return found

    splits = {
        "train": entries(train, 0, 1 - HELD_OUT, trained),
        "val": entries(train, 1 - HELD_OUT, 1, evaluated),
        "test": entries(test, 0, 1, evaluated),
    }
    images = np.concatenate([shifted(images, domain, INK) for domain in domains])
    return FewShot(
        images, splits, ways=ways, shots=shots, queries=queries, eval_ways=eval_ways, eval_shots=eval_shots,
        eval_queries=eval_queries, min_ways=min_ways, min_shots=min_shots,
        unbalanced=unbalanced, order=order, scale=1 / INK, preparation=PREPARATION,
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
