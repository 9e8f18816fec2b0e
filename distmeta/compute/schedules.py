"""What an algorithm changes from one outer step to the next, seen by compiled code: numbers and structure apart.

Numbers are in its attribute `scheduled` and enter a program as arguments; anything else that differs makes another.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any

from distmeta.protocols import Algorithm

PLAIN = (bool, int, float, str, bytes, type(None))


def scheduled_of(algorithm: Algorithm) -> Any:
    """Its scheduled numbers, a pytree of tensors; without any, ()."""
    return getattr(algorithm, "scheduled", ())


def with_scheduled(algorithm: Algorithm, numbers: Any) -> Algorithm:
    """The algorithm with these in their place."""
    if not hasattr(algorithm, "scheduled"):
        return algorithm
    now = copy.copy(algorithm)
    object.__setattr__(now, "scheduled", numbers)  # a frozen dataclass too
    return now


def structure_of(algorithm: Algorithm) -> Hashable:
    """Equal for algorithms that one program serves: those that `at` gave with equal attributes but for `scheduled`.

    Plain values are equal by themselves, anything else where it is the same object: who keeps this keeps the algorithm
    with it, for an id is an object's own only as long as that lives.
    """
    attributes = getattr(algorithm, "__dict__", None)
    if attributes is None or not hasattr(algorithm, "at"):
        return id(algorithm)
    structure = {name: value for name, value in attributes.items() if name != "scheduled"}
    return algorithm.__class__, _key(structure)


def _key(value: Any) -> Hashable:
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, tuple | list):
        return type(value), *(_key(part) for part in value)
    if isinstance(value, dict):
        return dict, *((name, _key(part)) for name, part in value.items())
    return id(value)
