"""Decide which parts that a checkpoint names may be imported and called.

A job file names Python parts and is trusted like a script. A checkpoint that is evaluated or loaded is data, perhaps
from somebody else. So, for every part outside distmeta:

- The user is told before its module is imported.
- It must be a class of the kind that its section expects. Nothing else of the module is called.
- Options that name a function are refused.
- Strategies and trackers are not imported at all. Evaluation does not need them.

What the user names (`model.type=…`, `load(…, model=Class)`) is trusted.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from distmeta.config.catalog import TRACKERS
from distmeta.config.job import Job
from distmeta.config.parts import import_part
from distmeta.config.yaml_text import apply_overrides, get_value
from distmeta.errors import InputError

SECTIONS = ("model", "tasks", "algorithm")
REQUIRED_METHODS = {
    "tasks": (("draw", "collect"),),
    "algorithm": (("init",), ("begin",), ("step",), ("predict",)),
}
"""A class of the kind has at least one method of each group. A model is a torch.nn.Module."""
NAME_OF_A_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def read_stored_job(
    tree: Any, overrides: Sequence[str], parts: Mapping[str, Any], report: Callable[[str], None]
) -> dict[str, Any]:
    """Check the job in a checkpoint as a job file is checked, and import its parts by the rules above.

    Args:
        tree: what the checkpoint contains as its job.
        overrides: `key=value` texts of the user. Only those that name a part are applied.
        parts: by section, the user's class or function to use instead of the stored one, or None.
        report: is told of each module before it is imported.

    Returns:
        The whole job, with defaults.

    Raises:
        InputError: there is no job, or it names something that it may not.
    """
    if not isinstance(tree, Mapping) or not all(isinstance(tree.get(name), Mapping) for name in SECTIONS):
        raise InputError("checkpoint: it contains no job")
    asked = apply_overrides({}, overrides)
    overridden = {section for section in SECTIONS if get_value(asked, f"{section}.type") is not None}
    replaced = {section for section, part in parts.items() if part is not None}
    tree = _replace_parts(tree, parts)
    tracking = _without_unknown_trackers(tree.get("tracking", {"type": "none"}), report)
    tree = {**tree, "strategy": {"type": "driver"}, "tracking": tracking}
    _check_parts(tree, overridden | replaced, report)
    _check_options(tree, asked)
    part_keys = {*overridden, *(f"{section}.type" for section in overridden)}
    kept = [text for text in overrides if text.partition("=")[0] in part_keys]
    return Job.parse(tree, kept).to_dict()


def _replace_parts(tree: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the job with the user's parts in place of the stored ones. Their options stay.

    Raises:
        InputError: a part that a worker could not import by its name.
    """
    result = dict(tree)
    for section, part in parts.items():
        if part is None:
            continue
        is_part = inspect.isclass(part) or inspect.isroutine(part)
        if not is_part or not part.__module__ or "." in part.__qualname__:
            raise InputError(f"{section}: got {part!r}, expected a class or function at the top of a module")
        result[section] = {**tree[section], "type": f"{part.__module__}:{part.__qualname__}"}
    return result


def _without_unknown_trackers(tracking: Any, report: Callable[[str], None]) -> Any:
    """Return a job's `tracking` with only those sections that name one of distmeta's trackers."""
    if not isinstance(tracking, list):
        known = _without_unknown_trackers([tracking], report)
        return known[0] if known else {"type": "none"}
    known = []
    for section in tracking:
        kind = section.get("type") if isinstance(section, Mapping) else None
        if isinstance(kind, str) and kind in {*TRACKERS, "none"}:
            known.append(section)
        else:
            report(f"tracking: the tracker {kind!r} that the checkpoint names is not used")
    return known


def _check_parts(tree: Mapping[str, Any], trusted: Collection[str], report: Callable[[str], None]) -> None:
    """Import the parts that a checkpoint names, after reporting it, and check their kind.

    Args:
        trusted: sections whose type the user gave.

    Raises:
        InputError: a part is a function or a class of another kind, or its module cannot be imported.
    """
    for section in SECTIONS:
        kind = tree[section].get("type")
        if not isinstance(kind, str) or ":" not in kind or section in trusted:
            continue
        module = kind.partition(":")[0]
        report(f"importing {module}, which the checkpoint names for its {section}")
        part = import_part(f"{section}.type", kind, {})
        if not _is_of_kind(section, part):
            raise InputError(
                f"{section}.type: the checkpoint names {kind!r}, expected {_describe_kind(section)}; if you trained "
                f"with it, add {section}.type={kind} (load: {section}=…)"
            )


def _check_options(tree: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse options that name a function to be called (`tasks.make` of gym), unless the user gave them too."""
    for section in SECTIONS:
        for key, value in tree[section].items():
            if key == "type" or not isinstance(value, str) or not NAME_OF_A_FUNCTION.fullmatch(value):
                continue
            if get_value(asked, f"{section}.{key}") is None:
                raise InputError(
                    f"{section}.{key}: the checkpoint names {value!r}, which would be called; if you trained with it, "
                    f"add {section}.{key}={value}"
                )


def _is_of_kind(section: str, part: Any) -> bool:
    if not inspect.isclass(part):
        return False
    if section == "model":
        return issubclass(part, torch.nn.Module)
    methods = {name for name, _ in inspect.getmembers(part, callable)}
    return all(methods.intersection(group) for group in REQUIRED_METHODS[section])


def _describe_kind(section: str) -> str:
    if section == "model":
        return "a torch.nn.Module"
    methods = ", ".join(" or ".join(group) for group in REQUIRED_METHODS[section])
    return f"a class with {methods}"
