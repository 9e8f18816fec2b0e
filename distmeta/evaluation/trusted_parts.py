"""What a checkpoint may name: it may be a stranger's, and the job in it is not as trusted as a job file.

A job file names Python parts and is as trusted as a script. A checkpoint that is evaluated or loaded is data: a part of
its own modules is imported only after that was said, taken only where it is a class of the kind that its section means,
and called in no other way. What the user names (`model.type=…`, `load(…, model=Class)`) is the user's word.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from distmeta.config.job import Job
from distmeta.config.parts import locate
from distmeta.config.yaml_text import override, value_at
from distmeta.errors import InputError

SECTIONS = ("model", "tasks", "algorithm")
NEEDED = {
    "tasks": (("draw", "collect"),),
    "algorithm": (("init",), ("begin",), ("step",), ("predict",)),
}
"""Methods of a class of the kind, one of each group; a model is a torch.nn.Module."""


def stored_job(
    tree: Any, overrides: Sequence[str], parts: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """The job in a checkpoint, checked as a job file is, with its parts imported as above.

    Raises:
        InputError: no job, or one that names what it may not.
    """
    if not isinstance(tree, Mapping) or not all(isinstance(tree.get(name), Mapping) for name in SECTIONS):
        raise InputError("checkpoint: it holds no job")
    asked = override({}, overrides)
    given = {section for section in SECTIONS if value_at(asked, f"{section}.type") is not None}
    tree = _with_own_parts(tree, parts)
    _check_parts(tree, given | {section for section, part in parts.items() if part is not None}, say)
    _check_options(tree, asked)
    kept = [text for text in overrides if text.partition("=")[0] in {*given, *(f"{s}.type" for s in given)}]
    return Job.parse(dict(tree), kept).tree()


def _with_own_parts(tree: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """The job of a checkpoint with classes of the user's in place of those it names; its options stay.

    Raises:
        InputError: what no worker could import.
    """
    result = dict(tree)
    for section, part in parts.items():
        if part is None:
            continue
        name, module = getattr(part, "__qualname__", ""), getattr(part, "__module__", "")
        if not callable(part) or not name or not module or "." in name:
            raise InputError(f"{section}: got {part!r}, expected a class or function at the top of a module")
        result[section] = {**tree[section], "type": f"{module}:{name}"}
    return result


def _check_parts(tree: Mapping[str, Any], own: set[str], say: Callable[[str], None]) -> None:
    """Imports the parts that a checkpoint names, which is said before, and takes only classes of the right kind.

    Args:
        own: sections whose type the user gave.

    Raises:
        InputError: a function, a class of another kind, a module that cannot be imported.
    """
    for section in SECTIONS:
        kind = tree[section].get("type")
        if not isinstance(kind, str) or ":" not in kind or section in own:
            continue
        say(f"importing {kind.partition(':')[0]}, which the checkpoint names for its {section}")
        part = locate(f"{section}.type", kind, {})
        if not _is_a(section, part):
            expected = (
                "a torch.nn.Module"
                if section == "model"
                else f"a class with {', '.join(' or '.join(names) for names in NEEDED[section])}"
            )
            raise InputError(
                f"{section}.type: the checkpoint names {kind!r}, expected {expected}; if it is what you trained with, "
                f"say so: {section}.type={kind} (load: {section}=…)"
            )


def _check_options(tree: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuses an option that names a function to be called (`tasks.make` of gym), unless the user says it as well."""
    for section in SECTIONS:
        for key, value in tree[section].items():
            names = (
                key != "type"
                and isinstance(value, str)
                and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value)
            )
            if names and value_at(asked, f"{section}.{key}") is None:
                raise InputError(
                    f"{section}.{key}: the checkpoint names {value!r}, which would be called; if it is what you "
                    f"trained with, say so: {section}.{key}={value}"
                )


def _is_a(section: str, part: Any) -> bool:
    if not inspect.isclass(part):
        return False
    if section == "model":
        return issubclass(part, torch.nn.Module)
    return all(any(callable(getattr(part, name, None)) for name in names) for names in NEEDED[section])
