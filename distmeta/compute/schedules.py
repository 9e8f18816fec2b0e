"""What an algorithm changes from one outer step to the next, as compiled code sees it: values and structure.

The values are in its attribute `scheduled` and enter a program as arguments. Anything else that differs needs another
program.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any

from distmeta.protocols import Algorithm, ChangesOverTraining, ScheduledValues

PLAIN_TYPES = (bool, int, float, str, bytes, type(None))


def scheduled_values(algorithm: Algorithm) -> Any:
    """Return the algorithm's scheduled values, a pytree of tensors; () if it has none."""
    return algorithm.scheduled if isinstance(algorithm, ScheduledValues) else ()


def with_scheduled(algorithm: Algorithm, values: Any) -> Algorithm:
    """Return the algorithm with other scheduled values, if it has any."""
    if not isinstance(algorithm, ScheduledValues):
        return algorithm
    changed = copy.copy(algorithm)
    object.__setattr__(changed, "scheduled", values)  # works for frozen dataclasses too
    return changed


def describe_structure(algorithm: Algorithm) -> Hashable:
    """Return a key that is equal for algorithms that one program can serve.

    These are the algorithms that `at` returned with equal attributes, except for `scheduled`. Plain values are compared
    by value, anything else by identity. Keep the algorithm as long as the key: an id may be reused later.
    """
    if not isinstance(algorithm, ChangesOverTraining):
        return id(algorithm)
    try:
        attributes = vars(algorithm)
    except TypeError:  # a class with __slots__
        return id(algorithm)
    structure = {name: value for name, value in attributes.items() if name != "scheduled"}
    return algorithm.__class__, _build_key(structure)


def _build_key(value: Any) -> Hashable:
    if isinstance(value, PLAIN_TYPES):
        return type(value), value
    if isinstance(value, tuple | list):
        return type(value), *(_build_key(part) for part in value)
    if isinstance(value, dict):
        return dict, *((name, _build_key(part)) for name, part in value.items())
    return id(value)
