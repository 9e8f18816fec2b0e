"""Few-shot classification over a task store (`distmeta data …` builds one)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from distmeta.errors import InputError, did_you_mean
from distmeta.protocols import SPLITS
from distmeta.tasks.domains import pair_drawings
from distmeta.tasks.few_shot import FewShot, Order
from distmeta.tasks.jitter import JitterLimits, JitterOptions
from distmeta.tasks.options import Positive, Ways
from distmeta.tasks.sampling import ClassEntry
from distmeta.tasks.store import TaskStore

Selection = float | int | list[str]
"""A fraction of the classes or groups, a number of them, or their names."""


class DomainChoice(NamedTuple):
    """The domain of one part of an episode."""

    field: str
    """The option that chose it, for errors."""
    domain: str


DomainChoices = tuple[DomainChoice, DomainChoice]
"""For the support and the query set."""


def arrow(
    path: str,
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
    split_by: Literal["class", "group"] = "class",
    test: Selection | None = 0.2,
    val: Selection | None = 0.1,
    within_group: bool = False,
    rotations: bool = False,
    jitter: JitterOptions | None = None,
    support_domain: str | None = None,
    query_domain: str | None = None,
    eval_support_domain: str | None = None,
    eval_query_domain: str | None = None,
) -> FewShot:
    """Build tasks from the classes of a store, in three disjoint splits; x float32 [C, H, W] from 0 to 1.

    Args:
        path: a path or URI of a task store.
        test: a fraction or number of the classes (with `split_by: group`: of the groups), or their names. Fractions
            and numbers take evenly spaced ones in the store's order, so the splits do not depend on the seed. null
            holds nothing out: to train on everything, with `run.eval_every: 0` or with evaluation's `--episodes`.
        val: a fraction or number of the remaining classes (with either `split_by`), or names (with `split_by: group`:
            of groups). A class is named "GROUP/CLASS" if the store has groups, otherwise "CLASS".
        rotations: quarter turns of the training classes are classes too (Santoro et al. 2016, "Meta-Learning with
            Memory-Augmented Neural Networks"). Deviation: they turn test classes as well; here, as in MAML's code, val
            and test stay upright.
        jitter: the largest affine warp of each training image, `{rotate: degrees, scale: part, shear: part,
            shift: pixels}` (`tasks.jitter`). Missing entries are 0. val and test images are not warped.
        support_domain, query_domain: the domains of the two parts of a training task, if the store has domains. A class
            is cut to the domain with fewer rows, and no drawing is in both parts (`domains.pair_drawings`). Without
            them a class has all its rows, of any domain, and a drawing that is in two domains may be in both parts.
        eval_support_domain, eval_query_domain: the same for val and test (default: the training ones).
        ways, shots, …: see `tasks.few_shot.FewShot`.
    """
    store = TaskStore.open(path)
    names = [
        f"{group}/{name}" if group else name for group, name in zip(store.groups, store.classes, strict=True)
    ]
    split_of_class = assign_splits(names, store.groups, split_by, test, val)
    first_row = np.cumsum(store.counts) - store.counts
    group_number = {group: i for i, group in enumerate(dict.fromkeys(store.groups))}
    options = {
        "support_domain": support_domain,
        "query_domain": query_domain,
        "eval_support_domain": eval_support_domain,
        "eval_query_domain": eval_query_domain,
    }
    choices = {split: _choose_domains(store, options, split) for split in SPLITS}
    splits: dict[str, list[ClassEntry]] = {"train": []}
    if val is not None:
        splits["val"] = []
    if test is not None:
        splits["test"] = []
    for k, split in enumerate(split_of_class):
        rows = np.arange(first_row[k], first_row[k] + store.counts[k])
        support, query = _select_rows(store, rows, names[k], choices[split])
        for turns in range(4 if rotations and split == "train" else 1):
            name = f"{names[k]}@{90 * turns}" if turns else names[k]
            splits[split].append(ClassEntry(support, turns, group_number[store.groups[k]], name, query))
    return FewShot(
        store.images,
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
        within_group=within_group,
        jitter=None if jitter is None else JitterLimits(**jitter),
        scale=store.preparation.scale,
        preparation=store.preparation,
        check=store.check_unchanged,
        fingerprint=store.digest,
    )


def _choose_domains(store: TaskStore, options: Mapping[str, str | None], split: str) -> DomainChoices | None:
    """Return the domains of a split's support and query sets; None if classes have all their rows."""
    fields = [_choose_option(options, name, split) for name in ("support_domain", "query_domain")]
    choices = []
    for field in fields:
        domain = options[field]
        if domain is not None:
            _check_domain(store, f"tasks.{field}", domain)
            choices.append(DomainChoice(f"tasks.{field}", domain))
    if len(choices) == 1:
        missing = next(field for field in fields if options[field] is None)
        raise InputError(
            f"tasks.{missing}: got null with {choices[0].field} {choices[0].domain!r}, "
            "expected a domain for both or neither"
        )
    return (choices[0], choices[1]) if choices else None


def _choose_option(options: Mapping[str, str | None], name: str, split: str) -> str:
    """Return the name of the option that a split uses: `eval_…` for val and test, unless only the other is given."""
    if split == "train":
        return name
    if options[f"eval_{name}"] is None and options[name] is not None:
        return name
    return f"eval_{name}"


def _check_domain(store: TaskStore, field: str, domain: str) -> None:
    if store.domains is None:
        raise InputError(
            f"{field}: got {domain!r}, but this store has no domains: build one with them "
            "(`distmeta data images --domains`)"
        )
    known = store.domains.names
    if domain not in known:
        raise InputError(
            f"{field}: got {domain!r}, expected a domain of the store: {_suggest(domain, known)}"
        )


def _select_rows(
    store: TaskStore, rows: np.ndarray, name: str, choices: DomainChoices | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return a class's rows for the support set, and those for the query set if they differ."""
    if choices is None:
        return rows, None
    domains = store.domains
    assert domains is not None, choices
    domain_of_row = domains.domain[rows]
    parts = []
    for field, domain in choices:
        part = rows[domain_of_row == domains.names.index(domain)]
        if not len(part):
            existing = [domains.names[d] for d in np.unique(domain_of_row)]
            raise InputError(
                f"{field}: got {domain!r}, but class {name!r} has no images of it, expected a domain that all classes "
                f"have: {_suggest(domain, existing)}"
            )
        parts.append(part)
    if choices[0].domain == choices[1].domain:
        return parts[0], None
    return pair_drawings(parts[0], parts[1], domains.drawing)


def assign_splits(
    names: list[str], groups: list[str], split_by: str, test: Selection | None, val: Selection | None
) -> list[str]:
    """Return the split of each class."""
    if split_by == "group" and not any(groups):
        raise InputError("tasks.split_by: got 'group', expected 'class' (this store has no groups)")
    units = groups if split_by == "group" else names
    test_units = set[str]()
    if test is not None:
        test_units = _select_names("tasks.test", test, list(dict.fromkeys(units)), split_by)
    remaining = [k for k, unit in enumerate(units) if unit not in test_units]
    val_classes = set[int]()
    if isinstance(val, list):
        for name in val:
            if name in test_units:
                raise InputError(f"tasks.val: got {name!r}, expected names that are not in tasks.test")
        known = list(dict.fromkeys(units[k] for k in remaining))
        val_units = _select_names("tasks.val", val, known, split_by)
        val_classes = {k for k in remaining if units[k] in val_units}
    elif val is not None:
        val_names = _select_names("tasks.val", val, [names[k] for k in remaining], "class")
        val_classes = {k for k in remaining if names[k] in val_names}
    if len(val_classes) == len(remaining):
        raise InputError(
            "tasks.val: got every class that is not in tasks.test, expected some left to train on"
        )
    splits = ["test"] * len(names)
    for k in remaining:
        splits[k] = "val" if k in val_classes else "train"
    return splits


def _select_names(field: str, selection: Selection, names: Sequence[str], kind: str) -> set[str]:
    """Return the names that a fraction, a number or a list of names selects. kind: "class" or "group"."""
    if isinstance(selection, list):
        for name in selection:
            if name not in names:
                raise InputError(
                    f"{field}: got {name!r}, expected a {kind} of the store: {_suggest(name, names)}"
                )
        if not selection or len(set(selection)) < len(selection):
            raise InputError(f"{field}: got {selection}, expected different names, at least one")
        return set(selection)
    if isinstance(selection, float):
        count = max(1, round(selection * len(names)))
        valid = 0 < selection < 1
    else:
        count = selection
        valid = selection >= 1
    if not valid or count >= len(names):
        raise InputError(
            f"{field}: got {selection}, expected a fraction between 0.0 and 1.0, a number from 1 to "
            f"{len(names) - 1} (there are {len(names)} to choose from), or a list of names"
        )
    return {names[i] for i in space_evenly(count, len(names))}


def space_evenly(count: int, total: int) -> list[int]:
    """Return `count` different positions below `total`, each in the middle of an equal part."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def _suggest(name: str, names: Sequence[str]) -> str:
    """Return the most similar name; the number of names if none is similar and there are too many to list."""
    hint = did_you_mean(name, names)
    return hint if len(hint) < 120 else f"it has {len(names)}, such as {names[0]!r}"
