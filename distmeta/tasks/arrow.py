"""Few-shot classification over a task store (`distmeta data …` builds one)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from distmeta.errors import InputError, did_you_mean
from distmeta.protocols import SPLITS
from distmeta.tasks.domains import facing
from distmeta.tasks.few_shot import Count, FewShot, Order, Ways
from distmeta.tasks.jitter import Jitter, JitterOptions
from distmeta.tasks.sampling import ClassEntry
from distmeta.tasks.store import Store

Side = tuple[str, str]
"""The option that names the domain of a part of an episode, and the domain."""
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
    min_ways: Ways | None = None,
    min_shots: Count | None = None,
    unbalanced: bool = False,
    order: Order = "shots",
    split_by: Literal["class", "group"] = "class",
    test: float | int | list[str] | None = 0.2,
    val: float | int | list[str] | None = 0.1,
    within_group: bool = False,
    rotations: bool = False,
    jitter: JitterOptions | None = None,
    support_domain: str | None = None,
    query_domain: str | None = None,
    eval_support_domain: str | None = None,
    eval_query_domain: str | None = None,
) -> FewShot:
    """Classes of a store in three disjoint splits, x float32 [C, H, W] in 0..1.

    test: a fraction or number of the classes (with `split_by: group`: of the groups), or their names.
    val: a fraction or number of the classes that remain (in both modes), or names (with `split_by: group`:
    of groups). A class is named "GROUP/CLASS" where the store has groups, otherwise "CLASS". Numbers take
    evenly spaced ones in the store's order, so the splits do not depend on the seed. null holds nothing out: to
    train on all there is, with `run.eval_every: 0` or evaluation's own `--episodes`.

    rotations: quarter turns of the training classes are classes of their own (Santoro et al. 2016,
    "Meta-Learning with Memory-Augmented Neural Networks"). Deviation: they turn test classes as well; here,
    as in MAML's code, val and test stay upright.

    jitter: `{rotate: degrees, scale: part, shear: part, shift: pixels}`, the largest affine warp of each training
    image (`tasks.jitter`); what is left out is 0. val and test stay as they are.

    support_domain, query_domain: in a store with domains, the domains that the support and the query of a training task
    are drawn from; eval_*: those of val and test (default: the training ones). Two domains of a class are cut to
    the smaller number of rows, and no drawing is in both parts of an episode (`facing`). Without them a class is all
    its rows, whatever their domain; then a drawing that has been put in two domains may be in both parts.
    """
    store = Store.open(path)
    names = [
        f"{group}/{name}" if group else name for group, name in zip(store.groups, store.classes, strict=True)
    ]
    assigned = _assign(names, store.groups, split_by, test, val)
    starts = np.cumsum(store.counts) - store.counts
    number = {group: i for i, group in enumerate(dict.fromkeys(store.groups))}
    asked = {
        "support_domain": support_domain, "query_domain": query_domain,
        "eval_support_domain": eval_support_domain, "eval_query_domain": eval_query_domain,
    }  # fmt: skip
    sides = {split: _sides(store, asked, split) for split in SPLITS}
    splits: dict[str, list[ClassEntry]] = {"train": [], "val": [], "test": []}
    for k, split in enumerate(assigned):
        rows = np.arange(starts[k], starts[k] + store.counts[k])
        support, query = _parts(store, rows, names[k], sides[split])
        for turns in range(4 if rotations and split == "train" else 1):
            name = f"{names[k]}@{90 * turns}" if turns else names[k]
            splits[split].append(ClassEntry(support, turns, number[store.groups[k]], name, query))
    held_out = {"train": True, "val": val is not None, "test": test is not None}
    splits = {split: entries for split, entries in splits.items() if held_out[split]}
    return FewShot(
        store.images, splits, ways=ways, shots=shots, queries=queries, eval_ways=eval_ways,
        eval_shots=eval_shots, eval_queries=eval_queries, min_ways=min_ways, min_shots=min_shots,
        unbalanced=unbalanced, order=order, within_group=within_group,
        jitter=None if jitter is None else Jitter(**jitter),
        scale=store.preparation.scale, preparation=store.preparation, check=store.check_unchanged,
        fingerprint=store.digest,
    )  # fmt: skip


def _sides(store: Store, asked: Mapping[str, str | None], split: str) -> tuple[Side, Side] | None:
    """What the support and the query of a split's tasks are drawn from; None: all rows."""
    given = []
    for option in ("support_domain", "query_domain"):
        own = f"eval_{option}"
        field = own if split != "train" and (asked[own] is not None or asked[option] is None) else option
        given.append((f"tasks.{field}", asked[field]))
    for field, domain in given:
        if domain is None:
            continue
        if store.domains is None:
            raise InputError(
                f"{field}: got {domain!r}, but this store has no domains: build one with them "
                "(`distmeta data images --domains`)"
            )
        if domain not in store.domains.names:
            known = store.domains.names
            raise InputError(
                f"{field}: got {domain!r}, expected a domain of the store: {_near(domain, known)}"
            )
    named = [(field, domain) for field, domain in given if domain is not None]
    if len(named) == 1:
        missing = next(field for field, domain in given if domain is None)
        other, domain = named[0]
        raise InputError(
            f"{missing}: got null with {other} {domain!r}, expected a domain for both or neither"
        )
    return (named[0], named[1]) if named else None


def _parts(
    store: Store, rows: np.ndarray, name: str, sides: tuple[Side, Side] | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """A class's rows for the support, and those for the query where they are others."""
    if sides is None:
        return rows, None
    assert store.domains is not None, sides
    parts = []
    for field, domain in sides:
        of_row = store.domains.of_row[rows]
        part = rows[of_row == store.domains.names.index(domain)]
        if not len(part):
            has = [store.domains.names[d] for d in np.unique(of_row)]
            raise InputError(
                f"{field}: got {domain!r}, which class {name!r} has no images of, expected a domain that all classes "
                f"have: {_near(domain, has)}"
            )
        parts.append(part)
    same = sides[0][1] == sides[1][1]
    return (parts[0], None) if same else facing(parts[0], parts[1], store.domains.drawing)


def _assign(
    names: list[str], groups: list[str], split_by: str, test: Part | None, val: Part | None
) -> list[str]:
    """The split of each class."""
    if split_by == "group" and not any(groups):
        raise InputError("tasks.split_by: got 'group', expected 'class' (this store has no groups)")
    units = groups if split_by == "group" else names
    known = list(dict.fromkeys(units))
    test_units = set() if test is None else _choose("tasks.test", test, known, split_by)
    remaining = [k for k, unit in enumerate(units) if unit not in test_units]
    if val is None:
        val_classes = set[int]()
    elif isinstance(val, list):
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
    hint = did_you_mean(name, names)
    return hint if len(hint) < 120 else f"it has {len(names)}, such as {names[0]!r}"
