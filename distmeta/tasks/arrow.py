"""Few-shot classification over a task store (`distmeta data …` builds one)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from distmeta.core import InputError, nearest
from distmeta.tasks.fewshot import ClassEntry, Count, FewShot, Ways
from distmeta.tasks.store import Store

Part = float | int | list[str]
"""A fraction of something, a number of them, or their names."""


def arrow(
    path: str,
    ways: Ways = 5,
    shots: Count = 1,
    queries: Count = 15,
    eval_ways: Ways | None = None,
    eval_shots: Count | None = None,
    eval_queries: Count | None = None,
    split_by: Literal["class", "group"] = "class",
    test: float | int | list[str] = 0.2,
    val: float | int | list[str] = 0.1,
    within_group: bool = False,
    rotations: bool = False,
) -> FewShot:
    """Classes of a store in three disjoint splits, x float32 [C, H, W] in 0..1.

    test: a fraction or number of the classes (with `split_by: group`: of the groups), or their names.
    val: a fraction or number of the classes that remain (in both modes), or names (with `split_by: group`:
    of groups). A class is named "GROUP/CLASS" where the store has groups, otherwise "CLASS". Numbers take
    evenly spaced ones in the store's order, so the splits do not depend on the seed.

    rotations: quarter turns of the training classes are classes of their own (Santoro et al. 2016,
    "Meta-Learning with Memory-Augmented Neural Networks"). Deviation: they turn test classes as well; here,
    as in MAML's code, val and test stay upright.
    """
    store = Store.open(path)
    names = [
        f"{group}/{name}" if group else name for group, name in zip(store.groups, store.classes, strict=True)
    ]
    assigned = _assign(names, store.groups, split_by, test, val)
    starts = np.cumsum(store.counts) - store.counts
    number = {group: i for i, group in enumerate(dict.fromkeys(store.groups))}
    splits: dict[str, list[ClassEntry]] = {"train": [], "val": [], "test": []}
    for k, split in enumerate(assigned):
        rows = range(starts[k], starts[k] + store.counts[k])
        for turns in range(4 if rotations and split == "train" else 1):
            name = f"{names[k]}@{90 * turns}" if turns else names[k]
            splits[split].append(ClassEntry(rows, turns, number[store.groups[k]], name))
    return FewShot(
        store.images, splits, ways=ways, shots=shots, queries=queries, eval_ways=eval_ways,
        eval_shots=eval_shots, eval_queries=eval_queries, within_group=within_group,
        scale=store.preparation.scale, preparation=store.preparation,
    )  # fmt: skip


def _assign(names: list[str], groups: list[str], split_by: str, test: Part, val: Part) -> list[str]:
    """The split of each class."""
    if split_by == "group" and not any(groups):
        raise InputError("tasks.split_by: got 'group', expected 'class' (this store has no groups)")
    units = groups if split_by == "group" else names
    test_units = _choose("tasks.test", test, list(dict.fromkeys(units)), split_by)
    remaining = [k for k, unit in enumerate(units) if unit not in test_units]
    if isinstance(val, list):
        known = list(dict.fromkeys(units[k] for k in remaining))
        for name in val:
            if name in test_units:
                raise InputError(f"tasks.val: got {name!r}, expected what tasks.test does not have already")
        val_units = _choose("tasks.val", val, known, split_by)
        val_classes = {k for k in remaining if units[k] in val_units}
    else:
        val_names = _choose("tasks.val", val, [names[k] for k in remaining], "class")
        val_classes = {k for k in remaining if names[k] in val_names}
    if len(val_classes) == len(remaining):
        raise InputError("tasks.val: got every class that tasks.test leaves, expected some left to train on")
    held_out = dict.fromkeys(val_classes, "val") | {k: "train" for k in remaining if k not in val_classes}
    return [held_out.get(k, "test") for k in range(len(names))]


def _choose(field: str, part: Part, names: Sequence[str], what: str) -> set[str]:
    """The names that a fraction, a number or a list of names means."""
    if isinstance(part, list):
        for name in part:
            if name not in names:
                raise InputError(
                    f"{field}: got {name!r}, expected a {what} of the store: {_near(name, names)}"
                )
        if not part or len(set(part)) < len(part):
            raise InputError(f"{field}: got {part}, expected different names, at least one")
        return set(part)
    count = part if isinstance(part, int) else max(1, round(part * len(names)))
    if not (0 < part < 1 if isinstance(part, float) else 1 <= part < len(names)) or count >= len(names):
        raise InputError(
            f"{field}: got {part}, expected a fraction between 0.0 and 1.0, a number from 1 to "
            f"{len(names) - 1} (there are {len(names)} to choose from), or a list of names"
        )
    return {names[i] for i in evenly_spaced(count, len(names))}


def evenly_spaced(count: int, total: int) -> list[int]:
    """`count` different positions among `total`, each in the middle of its equal part."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def _near(name: str, names: Sequence[str]) -> str:
    """`core.nearest`, but a store's thousand names are not listed."""
    hint = nearest(name, names)
    return hint if len(hint) < 120 else f"it has {len(names)}, such as {names[0]!r}"
