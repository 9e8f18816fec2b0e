"""The job: YAML and overrides, checked once into a frozen tree (DESIGN.md section 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from distmeta.config.parts import describe
from distmeta.config.search_space import Sweep
from distmeta.config.sections import (
    AlgorithmSection,
    Change,
    Component,
    Compute,
    Count,
    ModelSection,
    Outer,
    Run,
    Section,
    TasksSection,
    Tracking,
    plain_name,
)
from distmeta.config.yaml_text import dump_yaml, line_of, override, parse_yaml, put, value_at
from distmeta.errors import InputError, did_you_mean

CHANGING = ("outer.lr", "outer.momentum", "outer.weight_decay", "outer.clip_norm")
"""Keys whose values may take over during a run, besides the algorithm's floats."""
NOT_SEARCHED = (
    "name", "output", "tracking", "sweep", "changes", "run.steps", "run.workers", "run.cpus", "run.gpus", "run.address",
    "run.start", "run.name", "run.eval", "run.checkpoint", "run.keep", "run.patience", "run.strategy", "run.servers",
)  # fmt: skip
"""Beginnings of keys that say where, how long and against what a trial runs."""


class Job(Section):
    """One description of a training; `Job.load` reads it."""

    name: str
    seed: Count = 0
    model: ModelSection
    tasks: TasksSection
    algorithm: AlgorithmSection
    outer: Outer = Outer()
    run: Run = Run()
    compute: Compute = Compute()
    tracking: Tracking = Tracking()
    output: str = "runs"
    changes: list[Change] = Field(default=[])
    """In the order of their steps. A run of population based training is one job, with its changes."""
    sweep: Sweep | None = None
    """What `distmeta sweep` searches; a training does not look at it."""

    @model_validator(mode="after")
    def _check(self) -> Job:
        self._check_changes()
        if self.sweep is not None:
            self._check_sweep(self.sweep)
        if self.compute.precision == "tf32" and self.run.gpus_per_worker == 0:
            raise InputError(
                "compute.precision: got tf32 without GPUs (run.gpus_per_worker: 0), expected float32 or bf16"
            )
        return self

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return plain_name("name", name)

    def _check_changes(self) -> None:
        for i, change in enumerate(self.changes):
            if i and change.step <= self.changes[i - 1].step:
                before = self.changes[i - 1].step
                raise InputError(f"changes.{i}.step: got {change.step}, expected more than {before}")
            for key in change.set:
                if not self.may_change(key):
                    raise InputError(
                        f"changes.{i}.set: {key} cannot change during a run, expected {', '.join(CHANGING)} or "
                        f"an option of {self.algorithm.type} that is a float"
                    )
            try:
                self.at(change.step)
            except InputError as error:
                raise InputError(f"changes.{i}.set: {error}") from None

    def _check_sweep(self, sweep: Sweep) -> None:
        """Every key is the job's, and takes every value (of a range: its bounds)."""
        if self.run.eval_every == 0:
            raise InputError("sweep: got run.eval_every: 0, expected evaluations to compare trials by")
        if self.changes:
            raise InputError("sweep: got a job with changes, expected one without")
        for key, domain in sweep.space.items():
            field = f"sweep.space.{key}"
            if key.startswith(NOT_SEARCHED):
                raise InputError(f"{field}: this key is not a trial's to choose")
            if sweep.scheduler.type == "pbt" and not (
                self.may_change(key) and domain.kind in ("uniform", "loguniform")
            ):
                raise InputError(
                    f"{field}: pbt changes it during a run, expected a range of {', '.join(CHANGING)} or "
                    f"of an option of {self.algorithm.type} that is a float"
                )
            for value in domain.values:
                try:
                    self.with_values({key: value})
                except InputError as error:
                    raise InputError(f"{field}: {domain.kind} gives {value!r}: {error}") from None

    def may_change(self, key: str) -> bool:
        """Whether a key's value may take over during a run."""
        section, _, name = key.partition(".")
        return key in CHANGING or (section == "algorithm" and type(self.algorithm.options.get(name)) is float)

    def with_values(self, values: Mapping[str, Any], **top: Any) -> Job:
        """The job of a trial: without `sweep`, other values at dotted keys; `top`: other sections as a whole."""
        tree = self.tree() | {"sweep": None} | top
        for key, value in values.items():
            put(tree, key, value, key)
        return Job.parse(tree)

    @property
    def trial_steps(self) -> int:
        """Steps of one of the sweep's trials: no more than the job's."""
        asked = self.sweep.steps if self.sweep is not None else None
        return min(asked or self.run.steps, self.run.steps)

    def value(self, key: str) -> Any:
        """The value at a dotted key."""
        return value_at(self.tree(), key)

    def phase(self, step: int) -> int:
        """How many of the changes hold in the step after `step` completed ones."""
        return sum(change.step <= step for change in self.changes)

    def at(self, step: int) -> Job:
        """The job as it is in the step after `step` completed ones: with the values that hold then, without changes."""
        values = {key: v for change in self.changes[: self.phase(step)] for key, v in change.set.items()}
        return self.with_values(values, changes=[]) if self.changes else self

    def changing(self, step: int) -> dict[str, float]:
        """The values that hold in that step, of the keys that change at any time."""
        keys = {key for change in self.changes for key in change.set}
        now = self.at(step)
        return {key: now.value(key) for key in sorted(keys)}

    @staticmethod
    def load(path: str | Path, overrides: Sequence[str] = ()) -> Job:
        """Reads a YAML file, applies `key=value` overrides, checks all of it.

        Raises:
            InputError: one line that names the file, the key, what it got and what was expected.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from None
        try:
            return Job.parse(parse_yaml(text, str(path)), overrides)
        except InputError as error:
            message = str(error)
            raise InputError(
                message
                if message.startswith(str(path))
                else f"{path}: {_line(text, message, overrides)}{message}"
            ) from None

    @staticmethod
    def parse(tree: Any, overrides: Sequence[str] = ()) -> Job:
        """Checks a plain tree, as YAML gives it."""
        if not isinstance(tree, dict):
            raise InputError(f"got {type(tree).__name__}, expected a mapping with the keys of a job")
        try:
            tree = override(tree, overrides)
        except RecursionError:
            raise InputError("got keys nested without end, expected a tree (an alias in itself?)") from None
        _refuse_unknown(tree, Job, "")
        try:
            return Job.model_validate(tree)
        except ValidationError as error:
            raise InputError(describe(error)) from None

    def tree(self) -> dict[str, Any]:
        """The job as plain data, every default written out."""
        return self.model_dump(mode="json")

    def dump(self) -> str:
        """The job as YAML."""
        return dump_yaml(self.tree())

    def replace(self, **sections: Mapping[str, Any]) -> Job:
        """A copy with some keys of some sections changed, checked again."""
        tree = self.tree()
        for section, changes in sections.items():
            tree[section] = tree[section] | dict(changes)
        return Job.parse(tree)


def _line(text: str, message: str, overrides: Sequence[str]) -> str:
    """`line 12: ` where a message begins with a key of the file."""
    key = message.partition(": ")[0]
    if any(text.partition("=")[0] in key for text in overrides):
        return ""
    line = line_of(text, key)
    return "" if line is None else f"line {line}: "


def _refuse_unknown(tree: Mapping[str, Any], section: type[BaseModel], prefix: str) -> None:
    for key, value in tree.items():
        field = section.model_fields.get(key) if isinstance(key, str) else None
        if field is None:
            raise InputError(
                f"{prefix}{key}: unknown key; {did_you_mean(str(key), list(section.model_fields))}"
            )
        kind = field.annotation
        if kind == Sweep | None and value is not None:
            kind = Sweep
        if isinstance(kind, type) and issubclass(kind, Section) and not issubclass(kind, Component):
            if not isinstance(value, dict):
                raise InputError(f"{prefix}{key}: got {value!r}, expected a section of keys")
            _refuse_unknown(value, kind, f"{prefix}{key}.")
