"""Parts that a job names: `type: maml` from the catalog, or a user's own `type: package.module:Name`.

A part is a class or a function. The other keys of its section are keyword arguments, checked strictly against the
part's signature: no type is converted silently.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from distmeta.errors import InputError, did_you_mean

Part = Callable[..., Any]

FIELD_PREFIX = "field_"
"""Put before a parameter's name in the pydantic model, because pydantic uses names such as `copy` and `json`."""
UNION_BRANCH = re.compile(r"(str|int|float|bool|list|literal|constrained.*)(\[.*)?$")
"""What pydantic calls a type of a union in a job, such as a glob or a list of globs."""
LONGEST_SHOWN = 200
"""Characters of a user's value that a message repeats."""


class Signature(NamedTuple):
    """What a part accepts."""

    fields: dict[str, Any]
    """(annotation, pydantic field) by parameter name."""
    accepts_any: bool
    """Whether it has a `**keywords` parameter."""
    schema: type[BaseModel]
    """A pydantic model that checks options."""


def import_part(field: str, kind: str, table: Mapping[str, str]) -> Part:
    """Import the class or function behind a `type`. Modules in the working folder can be imported.

    Args:
        field: the job's key, for messages.
        kind: a name in the table, or `package.module:Name`.
        table: name -> "package.module:Name".

    Raises:
        InputError: no such name, module, class or function, or the import failed.
    """
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
    part = getattr(module, name, None)  # the module may define it lazily
    if not callable(part):
        names = [known for known, value in vars(module).items() if callable(value) and known[0] != "_"]
        raise InputError(
            f"{field}: {module_name!r} has no class or function {name!r}; {did_you_mean(name, names)}"
        )
    return part


def check_options(
    section: str,
    part: Part,
    options: Mapping[str, Any],
    given: Collection[str],
    table: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the options with the part's defaults filled in.

    Args:
        section: the job's section, for messages.
        given: parameters that distmeta supplies.
        table: the shipped parts of this section. An unknown key's message names those that have it.

    Raises:
        InputError: an unknown key, a missing one, or a wrong type.
    """
    signature = _read_signature(part, tuple(given))
    for key in options:
        if key not in signature.fields and not signature.accepts_any:
            known = [name for name in signature.fields if name not in given]
            owners = _find_owners(str(key), table or {})
            hint = (
                f"it is a key of {', '.join(owners)}" if owners else did_you_mean(str(key), known or ["type"])
            )
            raise InputError(f"{section}.{key}: unknown key of {section} type {_name_part(part)}; {hint}")
    try:
        checked = signature.schema.model_validate(
            {f"{FIELD_PREFIX}{name}": value for name, value in options.items()}
        )
    except ValidationError as error:
        raise InputError(describe_validation_error(error, section + ".")) from None
    pairs = [*checked, *(checked.model_extra or {}).items()]
    values = {name.removeprefix(FIELD_PREFIX): value for name, value in pairs}
    return {name: value for name, value in values.items() if name not in given or name in options}


def _find_owners(key: str, table: Mapping[str, str]) -> list[str]:
    """Return the names in the table whose part has this option."""
    owners = []
    for name in table:
        try:
            part = import_part("type", name, table)
        except InputError:  # it needs a package that is not installed
            continue
        if key in inspect.signature(part).parameters:
            owners.append(name)
    return owners


def list_default_options(part: Part) -> dict[str, Any]:
    """Return the options of a part that have a default, with these defaults."""
    parameters = inspect.signature(part).parameters
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


def build_part(part: Part, options: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """Call a part with its options, and with those arguments of `given` that it accepts."""
    parameters = inspect.signature(part).parameters
    accepted = {name: value for name, value in given.items() if name in parameters and name not in options}
    return part(**options, **accepted)


def describe_validation_error(error: ValidationError, prefix: str = "") -> str:
    """Return one line for a pydantic error: key, value, what was expected, and the number of further errors."""
    errors = error.errors()
    first = errors[0]
    cause = first.get("ctx", {}).get("error")
    path = [str(part).removeprefix(FIELD_PREFIX) for part in first["loc"]]
    alternatives = [error for error in errors if error["loc"][:-1] == first["loc"][:-1]]
    if path and UNION_BRANCH.match(path[-1]):  # pydantic names each type of a union
        path = path[:-1]
        errors = errors[len(alternatives) - 1 :]
    field = prefix + ".".join(path)
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
        text = f"{field}: got {show_value(first['input'])}, expected {_describe_expected(first['msg'])}"
    more = len(errors) - 1
    return f"{text} (and {more} more)" if more else text


def show_value(value: Any) -> str:
    """Return a user's value as text of at most a line."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a very large number"
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def _describe_expected(message: str) -> str:
    """Return `a value greater than 0` for pydantic's `Input should be greater than 0`."""
    text = message.removeprefix("Input should be ").removeprefix("a valid ")
    return f"a value {text}" if text.startswith(("greater", "less")) else text


@lru_cache
def _read_signature(part: Part, given: tuple[str, ...]) -> Signature:
    """Read what a part accepts. Cached, because building a pydantic model takes milliseconds."""
    function = part.__init__ if inspect.isclass(part) else part
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):  # annotations that cannot be evaluated are not checked
        hints = {}
    fields: dict[str, Any] = {}
    accepts_any = False
    for name, parameter in inspect.signature(part).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            accepts_any = True
        elif parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY):
            fields[name] = _make_field(parameter, hints.get(name, Any), is_given=name in given)
    schema = create_model(
        _name_part(part),
        __config__=ConfigDict(
            extra="allow", strict=True, arbitrary_types_allowed=True, protected_namespaces=()
        ),
        **{FIELD_PREFIX + name: field for name, field in fields.items()},
    )
    return Signature(fields, accepts_any, schema)


def _make_field(parameter: inspect.Parameter, annotation: Any, is_given: bool) -> tuple[Any, Any]:
    """Return the (annotation, field) of one parameter for `create_model`."""
    has_default = parameter.default is not inspect.Parameter.empty
    if has_default:
        field = Field(default=parameter.default)
    elif is_given:
        field = Field(default=None)
    else:
        field = Field(...)
    return (Any if is_given else annotation), field


def _name_part(part: Part) -> str:
    return part.__name__ if inspect.isclass(part) or inspect.isfunction(part) else str(part)
