"""Parts that a job names: `type: maml` from a literal table, or the user's own `type: package.module:Name`.

A part is a class or a function; the section's other keys are its keyword arguments, checked against its
signature by pydantic (strictly: no silent conversions).
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import typing
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from distmeta.errors import InputError, did_you_mean


def locate(field: str, kind: str, table: Mapping[str, str]) -> Callable[..., Any]:
    """The class or function behind a `type`. The working folder is importable, as it is for `python -m`."""
    target = table.get(kind, kind)
    if ":" not in target:
        raise InputError(
            f"{field}: got {kind!r}, expected one of {', '.join(table)} or package.module:Name; "
            f"{did_you_mean(kind, list(table))}"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module_name, _, name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{field}: cannot import {module_name!r} ({error}): expected a module on the path or in {os.getcwd()}"
        ) from None
    except Exception as error:
        raise InputError(
            f"{field}: importing {module_name!r} failed: {type(error).__name__}: {error}"
        ) from error
    part = getattr(module, name, None)
    if not callable(part):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise InputError(
            f"{field}: {module_name!r} has no class or function {name!r}; {did_you_mean(name, names)}"
        )
    return part


def check_options(
    section: str, part: Callable[..., Any], options: Mapping[str, Any], filled: Collection[str]
) -> dict[str, Any]:
    """The options with the signature's defaults filled in; parameters named in `filled` are given by distmeta.

    Raises:
        InputError: an unknown key, a missing one, a wrong type.
    """
    fields, open_ended, schema = _schema(part, tuple(filled))
    for key in options:
        if key not in fields and not open_ended:
            known = [name for name in fields if name not in filled]
            raise InputError(
                f"{section}.{key}: unknown key of {section} type {_name(part)}; "
                f"{did_you_mean(str(key), known or ['type'])}"
            )
    try:
        checked = schema.model_validate({f"field_{name}": value for name, value in options.items()})
    except ValidationError as error:
        raise InputError(describe(error, section + ".")) from None
    values = {name.removeprefix("field_"): value for name, value in checked}
    values |= {name.removeprefix("field_"): value for name, value in (checked.model_extra or {}).items()}
    return {name: value for name, value in values.items() if name not in filled or name in options}


def construct(part: Callable[..., Any], options: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """Calls a part with its options, and with what distmeta gives where the part accepts it."""
    parameters = inspect.signature(part).parameters
    accepted = {name: value for name, value in given.items() if name in parameters and name not in options}
    return part(**options, **accepted)


def describe(error: ValidationError, prefix: str = "") -> str:
    """One line of a pydantic error: the key, what it got, what it expected; and how many more there are."""
    errors = error.errors()
    first = errors[0]
    cause = first.get("ctx", {}).get("error")
    field = prefix + ".".join(str(part).removeprefix("field_") for part in first["loc"])
    if isinstance(cause, InputError):
        text = str(cause)
    elif first["type"] == "missing":
        text = f"{field}: missing"
    elif first["type"] == "extra_forbidden":
        text = f"{field}: unknown key"
    elif first["type"] == "too_short" and not first["input"]:
        text = f"{field}: got nothing, expected at least one entry"
    elif first["type"] == "value_error":
        text = f"{field}: {cause}"
    else:
        text = f"{field}: got {shown(first['input'])}, expected {_expected(first['msg'])}"
    return text + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else "")


def shown(value: Any) -> str:
    """What the user gave, not longer than a line."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a very large number"
    return text if len(text) <= 200 else text[:197] + "..."


def _expected(message: str) -> str:
    """'Input should be greater than 0' -> 'a value greater than 0'."""
    text = message.removeprefix("Input should be ").removeprefix("a valid ")
    return f"a value {text}" if text.startswith(("greater", "less")) else text


@lru_cache
def _schema(
    part: Callable[..., Any], filled: tuple[str, ...]
) -> tuple[dict[str, Any], bool, type[BaseModel]]:
    """What `_fields` gives, and a model that checks it: made once a part, for that takes milliseconds."""
    fields, open_ended = _fields(part, filled)
    schema = create_model(
        _name(part),
        __config__=ConfigDict(
            extra="allow", strict=True, arbitrary_types_allowed=True, protected_namespaces=()
        ),
        **{f"field_{name}": value for name, value in fields.items()},
    )
    return fields, open_ended, schema


def _fields(part: Callable[..., Any], filled: Collection[str]) -> tuple[dict[str, Any], bool]:
    """Pydantic fields of a signature, and whether it takes any keyword."""
    try:
        hints = typing.get_type_hints(part.__init__ if inspect.isclass(part) else part, include_extras=True)
    except (NameError, TypeError):  # annotations that cannot be evaluated are not checked
        hints = {}
    fields: dict[str, Any] = {}
    open_ended = False
    for name, parameter in inspect.signature(part).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            open_ended = True
        elif parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY):
            default: Any = parameter.default
            if default is inspect.Parameter.empty:
                default = None if name in filled else ...
            annotation = Any if name in filled else hints.get(name, Any)
            fields[name] = (annotation, Field(default) if default is ... else Field(default=default))
    return fields, open_ended


def _name(part: Callable[..., Any]) -> str:
    return getattr(part, "__name__", str(part))
