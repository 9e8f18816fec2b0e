"""The job: YAML and overrides, checked once into a frozen tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from distmeta.config.parts import describe_validation_error
from distmeta.config.search_space import SweepSection
from distmeta.config.sections import (
    AlgorithmSection,
    Change,
    ComputeSection,
    Count,
    ModelSection,
    OuterSection,
    PartSection,
    RunSection,
    Section,
    StrategySection,
    TasksSection,
    TrackerSection,
    check_folder_name,
)
from distmeta.config.yaml_text import apply_overrides, dump_yaml, find_line, get_value, parse_yaml, set_value
from distmeta.errors import InputError, did_you_mean
from distmeta.protocols import ChecksJob, StrategyClass

CHANGEABLE = ("outer.lr", "outer.momentum", "outer.weight_decay", "outer.clip_norm")
"""Keys whose values may change during a run, besides the algorithm's floats."""
NOT_SEARCHABLE = (
    "name",
    "output",
    "tracking",
    "sweep",
    "changes",
    "run.steps",
    "run.workers",
    "run.cpus",
    "run.gpus",
    "run.address",
    "run.start",
    "run.name",
    "run.eval",
    "run.checkpoint",
    "run.keep",
    "run.patience",
    "strategy.type",
    "strategy.servers",
)
"""Prefixes of keys that a sweep may not search: where a trial runs, for how long, and on which machines."""


def _tag_trackers(value: Any) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


OneOrSeveralTrackers = Annotated[
    Annotated[TrackerSection, Tag("one")] | Annotated[list[TrackerSection], Tag("several")],
    Discriminator(_tag_trackers),
]


class Job(Section):
    """The description of a training. `Job.load` reads a file, `Job.parse` takes Python data."""

    name: str
    """Names the run folder and the experiment."""
    seed: Count = 0
    """Every random number of the run derives from it."""
    model: ModelSection
    """The network."""
    tasks: TasksSection
    """The distribution of tasks."""
    algorithm: AlgorithmSection
    """The meta-learner."""
    outer: OuterSection = OuterSection()
    """The outer optimizer."""
    strategy: StrategySection = Field(default_factory=lambda: StrategySection.model_validate({}))
    """How meta-gradients are combined."""
    run: RunSection = RunSection()
    """Length, workers, evaluation and checkpoints."""
    compute: ComputeSection = ComputeSection()
    """How a shard's gradient is computed."""
    tracking: OneOrSeveralTrackers = Field(
        default_factory=lambda: TrackerSection.model_validate({"type": "mlflow"})
    )
    """A tracker, or a list of trackers."""
    output: str = "runs"
    """Folder or URI (`s3://`, `gs://`, `file://`) in which the run folder is made."""
    changes: list[Change] = Field(default=[])
    """Values that take over during the run, in the order of their steps. Population-based training writes them."""
    sweep: SweepSection | None = None
    """What `distmeta sweep` searches. A training ignores it."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return check_folder_name("name", name)

    @model_validator(mode="after")
    def _check(self) -> Job:
        self._check_parts()
        self._check_changes()
        if self.sweep is not None:
            self._check_sweep(self.sweep)
        if self.compute.precision == "tf32" and self.run.gpus_per_worker == 0:
            raise InputError(
                "compute.precision: got tf32 without GPUs (run.gpus_per_worker: 0), expected float32 or bf16"
            )
        return self

    def _check_parts(self) -> None:
        """Check conditions that a part has on the rest of the job."""
        strategy = self.strategy.part
        if not isinstance(strategy, StrategyClass):
            raise InputError(
                f"strategy.type: got {self.strategy.type!r}, expected a class with the attributes requires_workers and "
                "equals_driver (distmeta.runtime.strategy.Strategy)"
            )
        if strategy.requires_workers and not self.run.max_workers:
            raise InputError(
                f"strategy.type: got {self.strategy.type!r} with run.workers: 0, expected at least 1 worker"
            )
        for section in (self.model, self.tasks, self.algorithm, self.strategy, *self.trackers):
            if isinstance(section.part, ChecksJob):
                section.part.check_job(self, section.options)

    def _check_changes(self) -> None:
        for i, change in enumerate(self.changes):
            if i and change.step <= self.changes[i - 1].step:
                step_before = self.changes[i - 1].step
                raise InputError(f"changes.{i}.step: got {change.step}, expected more than {step_before}")
            for key in change.set:
                if not self.may_change(key):
                    raise InputError(
                        f"changes.{i}.set: {key} cannot change during a run, expected {', '.join(CHANGEABLE)} or "
                        f"an option of {self.algorithm.type} that is a float"
                    )
            try:
                self.at(change.step)
            except InputError as error:
                raise InputError(f"changes.{i}.set: {error}") from None

    def _check_sweep(self, sweep: SweepSection) -> None:
        """Check that the job has every key of the space, and accepts its values (of a range: its bounds)."""
        if self.run.eval_every == 0:
            raise InputError("sweep: got run.eval_every: 0, expected evaluations to compare trials by")
        if self.changes:
            raise InputError("sweep: got a job with changes, expected one without")
        for key, domain in sweep.space.items():
            field = f"sweep.space.{key}"
            if key.startswith(NOT_SEARCHABLE):
                raise InputError(f"{field}: a sweep cannot search this key")
            is_range = domain.kind in ("uniform", "loguniform")
            if sweep.scheduler.type == "pbt" and not (is_range and self.may_change(key)):
                raise InputError(
                    f"{field}: pbt changes it during a run, expected a range of {', '.join(CHANGEABLE)} or "
                    f"of an option of {self.algorithm.type} that is a float"
                )
            for value in domain.values:
                try:
                    self.with_values({key: value})
                except InputError as error:
                    raise InputError(f"{field}: {domain.kind} gives {value!r}: {error}") from None

    @property
    def trackers(self) -> list[TrackerSection]:
        """The sections of all trackers. `type: none` is no tracker."""
        sections: list[TrackerSection] = self.tracking if isinstance(self.tracking, list) else [self.tracking]
        return [section for section in sections if section.type != "none"]

    def may_change(self, key: str) -> bool:
        """Return whether a key's value may change during a run."""
        section, _, name = key.partition(".")
        is_float_of_algorithm = section == "algorithm" and type(self.algorithm.options.get(name)) is float
        return key in CHANGEABLE or is_float_of_algorithm

    def with_values(self, values: Mapping[str, Any], **sections: Any) -> Job:
        """Return the job without `sweep`, with other values at dotted keys and with whole `sections` replaced."""
        tree = self.to_dict() | {"sweep": None} | sections
        for key, value in values.items():
            set_value(tree, key, value, key)
        return Job.parse(tree)

    @property
    def trial_steps(self) -> int:
        """Steps of each of the sweep's trials, at most the job's own."""
        asked = self.sweep.steps if self.sweep is not None else None
        return min(asked or self.run.steps, self.run.steps)

    def value(self, key: str) -> Any:
        """Return the value at a dotted key."""
        return get_value(self.to_dict(), key)

    def phase(self, step: int) -> int:
        """Return how many of the changes have taken over after `step` completed steps."""
        return sum(change.step <= step for change in self.changes)

    def at(self, step: int) -> Job:
        """Return the job with the values of the step that follows `step` completed ones, and without `changes`."""
        if not self.changes:
            return self
        values: dict[str, float] = {}
        for change in self.changes[: self.phase(step)]:
            values |= change.set
        return self.with_values(values, changes=[])

    def changed_values(self, step: int) -> dict[str, float]:
        """Return the values after `step` completed steps of all keys that change at any time in the run."""
        keys = {key for change in self.changes for key in change.set}
        now = self.at(step)
        return {key: now.value(key) for key in sorted(keys)}

    @staticmethod
    def load(path: str | Path, overrides: Sequence[str] = ()) -> Job:
        """Read a YAML file, apply `key=value` overrides and check all of it.

        Raises:
            InputError: one line that names the file, the key, the value and what was expected.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from None
        try:
            return Job.parse(parse_yaml(text, str(path)), overrides)
        except InputError as error:
            message = str(error)
            if not message.startswith(str(path)):
                message = f"{path}: {_describe_line(text, message, overrides)}{message}"
            raise InputError(message) from None

    @staticmethod
    def parse(tree: Any, overrides: Sequence[str] = ()) -> Job:
        """Check a tree of Python data, as YAML gives it.

        Raises:
            InputError: names the key, the value and what was expected.
        """
        if not isinstance(tree, dict):
            raise InputError(f"got {type(tree).__name__}, expected a mapping with the keys of a job")
        try:
            tree = apply_overrides(tree, overrides)
        except RecursionError:
            raise InputError("got keys nested without end, expected a tree (an alias in itself?)") from None
        _refuse_unknown_keys(tree, Job, "")
        try:
            return Job.model_validate(tree)
        except ValidationError as error:
            raise InputError(describe_validation_error(error)) from None

    def to_dict(self) -> dict[str, Any]:
        """Return the job as plain data with every default written out."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the job as YAML."""
        return dump_yaml(self.to_dict())

    def replace(self, **sections: Mapping[str, Any]) -> Job:
        """Return a copy with some keys of some sections changed, checked again."""
        tree = self.to_dict()
        for section, changes in sections.items():
            tree[section] = tree[section] | dict(changes)
        return Job.parse(tree)


def remove_workers(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree of a job without workers: only this process computes (for an evaluation)."""
    return {**tree, "run": {**tree["run"], "workers": 0}, "strategy": {"type": "driver"}}


def _describe_line(text: str, message: str, overrides: Sequence[str]) -> str:
    """Return `line 12: ` if the message begins with a key of the file, else nothing."""
    key = message.partition(": ")[0]
    if any(override.partition("=")[0] in key for override in overrides):
        return ""
    line = find_line(text, key)
    return "" if line is None else f"line {line}: "


def _refuse_unknown_keys(tree: Mapping[str, Any], section: type[BaseModel], prefix: str) -> None:
    for key, value in tree.items():
        field = section.model_fields.get(key) if isinstance(key, str) else None
        if field is None:
            raise InputError(
                f"{prefix}{key}: unknown key; {did_you_mean(str(key), list(section.model_fields))}"
            )
        kind = field.annotation
        if kind == SweepSection | None and value is not None:
            kind = SweepSection
        if isinstance(kind, type) and issubclass(kind, Section) and not issubclass(kind, PartSection):
            if not isinstance(value, dict):
                raise InputError(f"{prefix}{key}: got {value!r}, expected a section of keys")
            _refuse_unknown_keys(value, kind, f"{prefix}{key}.")
