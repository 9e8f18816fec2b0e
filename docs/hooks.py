"""Generates the reference pages from the code while the site is built, so that they cannot be out of date."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from distmeta.cli.main import app
from distmeta.config import catalog
from distmeta.config.job import Job
from distmeta.config.parts import import_part
from distmeta.config.search_space import Domain, SchedulerSection, SweepSection
from distmeta.config.sections import (
    AlgorithmSection,
    Change,
    ComputeSection,
    GroupSection,
    ModelSection,
    OuterSection,
    PartSection,
    RunSection,
    ScheduleSection,
    Section,
    StrategySection,
    TasksSection,
    TrackerSection,
)
from distmeta.errors import InputError

SECTIONS: dict[str, type[Section]] = {
    "": Job,
    "model": ModelSection,
    "tasks": TasksSection,
    "algorithm": AlgorithmSection,
    "outer": OuterSection,
    "outer.groups": GroupSection,
    "outer.schedule": ScheduleSection,
    "strategy": StrategySection,
    "run": RunSection,
    "compute": ComputeSection,
    "tracking": TrackerSection,
    "changes": Change,
    "sweep": SweepSection,
    "sweep.space": Domain,
    "sweep.scheduler": SchedulerSection,
}
"""Every section of a job, by the key under which it stands."""

READABLE_TYPES: dict[type, str] = {str: "text", int: "integer", float: "number", bool: "true or false"}

TABLES: dict[str, tuple[type[PartSection], Mapping[str, str]]] = {
    "Models": (ModelSection, catalog.MODELS),
    "Tasks": (TasksSection, catalog.TASKS),
    "Algorithms": (AlgorithmSection, catalog.ALGORITHMS),
    "Strategies": (StrategySection, catalog.STRATEGIES),
    "Trackers": (TrackerSection, catalog.TRACKERS),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages (an event of mkdocs)."""
    pages = {
        "reference/job.md": describe_job,
        "reference/parts.md": describe_parts,
        "reference/commands.md": describe_commands,
    }
    for path, describe in pages.items():
        files.append(File.generated(config, path, content="\n".join(describe())))
    return files


def describe_job() -> Iterator[str]:
    yield "# The job file\n"
    yield (
        "A job is YAML. Every key is checked when it is read: an unknown key, a wrong type or an impossible "
        "combination is an error that names the key, its value and what was expected. The command line changes keys "
        "with `key=value`, such as `run.workers=4`. This page is generated from the code.\n"
    )
    for name, section in SECTIONS.items():
        yield f"## `{name}`\n" if name else "## Sections\n"
        yield f"{clean(section.__doc__)}\n"
        if issubclass(section, PartSection):
            yield f"Types and their options: [{name}](parts.md#{PART_ANCHORS[name]}).\n"
        yield "| key | type | default | meaning |"
        yield "|---|---|---|---|"
        for key, field in section.model_fields.items():
            default = (
                "required"
                if field.is_required()
                else show_default(field.get_default(call_default_factory=True))
            )
            yield f"| `{key}` | {show_type(field.annotation)} | {default} | {cell(field.description)} |"
        yield ""


def show_field_default(section: type[Section], key: str, field: FieldInfo) -> str:
    if key == "type" and issubclass(section, PartSection) and section.default_type is not None:
        return f"`{section.default_type}`"
    return "required" if field.is_required() else show_default(field.get_default(call_default_factory=True))


PART_ANCHORS = {
    "model": "models",
    "tasks": "tasks",
    "algorithm": "algorithms",
    "strategy": "strategies",
    "tracking": "trackers",
}


def describe_parts() -> Iterator[str]:
    yield "# Parts\n"
    yield (
        "The parts that come with distmeta, with the options that a job can set. Your own part is named "
        "`package.module:Name`; see [Extending](../extending.md). This page is generated from the code.\n"
    )
    for title, (section, table) in TABLES.items():
        yield f"## {title}\n"
        for name, target in table.items():
            try:
                part = import_part("type", name, table)
            except InputError as error:  # an extra that is not installed
                yield f"### `{name}`\n\n{error}\n"
                continue
            yield f"### `{name}`\n"
            yield f"`{target}`\n"
            yield f"{indent_equations(inspect.getdoc(part) or '')}\n"
            yield from describe_options(part, section.given)


def describe_options(part: Any, given: tuple[str, ...]) -> Iterator[str]:
    function = part.__init__ if inspect.isclass(part) else part
    hints = typing.get_type_hints(function, include_extras=True)
    rows = []
    for name, parameter in inspect.signature(part).parameters.items():
        if name in given or parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        has_default = parameter.default is not inspect.Parameter.empty
        default = show_default(parameter.default) if has_default else "required"
        rows.append(f"| `{name}` | {show_type(hints.get(name, Any))} | {default} |")
    if rows:
        yield "| option | type | default |"
        yield "|---|---|---|"
        yield from rows
    yield ""


def describe_commands() -> Iterator[str]:
    yield "# Commands\n"
    yield (
        "Exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted with a checkpoint saved. With `--json` stdout "
        "holds one line of JSON and nothing else. This page is generated from the code.\n"
    )
    command = typer.main.get_command(app)
    yield from describe_group(command, "distmeta")


def describe_group(command: Any, path: str) -> Iterator[str]:
    children = getattr(command, "commands", None)  # click's groups have it
    if children is not None:
        for name, child in sorted(children.items()):
            yield from describe_group(child, f"{path} {name}")
        return
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join(argument.metavar or argument.name.upper() for argument in arguments)
    yield f"## `{path}`\n"
    yield f"{clean(command.help)}\n"
    yield f"```\n{path} {usage} [options]\n```\n"
    yield "| option | default | meaning |"
    yield "|---|---|---|"
    for parameter in command.params:
        if parameter.param_type_name != "option" or parameter.name == "help":
            continue
        names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
        yield f"| {names} | {show_default(parameter.default)} | {cell(parameter.help)} |"
    yield ""


def clean(text: str | None) -> str:
    return inspect.cleandoc(text or "")


def cell(text: str | None) -> str:
    """Return a description as one line for a table."""
    return " ".join((text or "").split()).replace("|", "\\|")


def show_type(annotation: Any) -> str:
    """Return a type as a reader of YAML would name it."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return show_type(typing.get_args(annotation)[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        options = [show_type(option) for option in typing.get_args(annotation)]
        return " or ".join(dict.fromkeys(options))
    if origin is list:
        return f"list of {show_type(typing.get_args(annotation)[0])}"
    if origin is dict:
        return f"mapping to {show_type(typing.get_args(annotation)[1])}"
    if annotation is type(None):
        return "null"
    if annotation is Any:
        return "any"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if isinstance(annotation, type):
        return READABLE_TYPES.get(annotation, annotation.__name__)
    return cell(str(annotation))


def show_default(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None or callable(value) or "Sentinel" in type(value).__name__:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{cell(str(value))}`"


def indent_equations(text: str) -> str:
    """Return a docstring as Markdown: its Args section as a list, its indented equations as code blocks."""
    lines = []
    in_arguments = False
    for line in text.splitlines():
        if line.strip() in ("Args:", "Raises:", "Returns:"):
            in_arguments = True
            lines += [f"**{line.strip()}**", ""]
        elif in_arguments and line.startswith("    ") and not line.startswith("        "):
            name, _, meaning = line.strip().partition(": ")
            lines.append(f"- `{name}`: {meaning}" if meaning else f"- {line.strip()}")
        elif in_arguments and line.startswith("        "):
            lines.append(f"  {line.strip()}")
        else:
            in_arguments = in_arguments and not line.strip()
            lines.append(line)
    return "\n".join(lines)
