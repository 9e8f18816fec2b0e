"""Algorithms that change from one outer step to the next, in compiled code.

Values in the attribute `scheduled` enter a program as arguments. A difference in any other attribute needs another
program.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any

from distmeta.protocols import Algorithm, ChangesOverTraining, ScheduledValues

PLAIN_TYPES = (bool, int, float, str, bytes, type(None))


def get_scheduled_values(algorithm: Algorithm) -> Any:
    """Return the algorithm's scheduled values, a pytree of tensors; () if it has none."""
    return algorithm.scheduled if isinstance(algorithm, ScheduledValues) else ()


def replace_scheduled_values(algorithm: Algorithm, values: Any) -> Algorithm:
    """Return the algorithm with other scheduled values, if it has any."""
    if not isinstance(algorithm, ScheduledValues):
        return algorithm
    changed = copy.copy(algorithm)
    object.__setattr__(changed, "scheduled", values)  # works for frozen dataclasses too
    return changed


def describe_structure(algorithm: Algorithm) -> Hashable:
    """Return a key that is equal for algorithms that one program can serve.

    Their classes and attributes are equal, except for `scheduled`. Plain values are compared by value, other objects by
    identity. Keep the algorithm as long as the key, because Python may reuse the id of a deleted object.
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
