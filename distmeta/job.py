"""The job: YAML and overrides, checked once into a frozen tree (DESIGN.md section 6)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from distmeta.algorithms import ALGORITHMS
from distmeta.components import check_options, describe, locate
from distmeta.core import InputError, nearest
from distmeta.jobfile import dump_yaml, override, parse_yaml
from distmeta.models import MODELS
from distmeta.tasks import TASKS

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class Component(Section):
    """`type`, keys of distmeta's own, and the options of the part that the type names."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, protected_namespaces=())
    section: ClassVar[str]
    table: ClassVar[Mapping[str, str]]
    given: ClassVar[tuple[str, ...]] = ()
    """Arguments that distmeta fills in."""
    given_for_good: ClassVar[bool] = False

    type: str

    @model_validator(mode="before")
    @classmethod
    def _check(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("type"), str):
            raise InputError(
                f"{cls.section}.type: missing, expected one of {', '.join(cls.table)} or package.module:Name"
            )
        own = {key: value for key, value in data.items() if key in cls.model_fields}
        options = {key: value for key, value in data.items() if key not in cls.model_fields}
        for key in cls.given:
            if key in options and cls.given_for_good:
                raise InputError(f"{cls.section}.{key}: distmeta gives this argument, a job cannot")
        part = locate(f"{cls.section}.type", data["type"], cls.table)
        return own | check_options(cls.section, part, options, cls.given)

    @property
    def part(self) -> Any:
        return locate(f"{self.section}.type", self.type, self.table)

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ModelSection(Component):
    section = "model"
    table = MODELS
    given = ("in_shape", "out_features")
    freeze: str | None = None
    """Glob over parameter names: what it matches is not trained."""
    init_from: str | None = None
    """safetensors file of parameters and buffers to start from."""
    head: Literal["linear", "shared", "prototype"] = "linear"
    """How a task's last linear layer starts: theta's own, one row copied to every class, or the classes' prototypes;
    the last two leave the number of ways free."""


class TasksSection(Component):
    section = "tasks"
    table = TASKS


class AlgorithmSection(Component):
    section = "algorithm"
    table = ALGORITHMS
    given = ("model", "score")
    given_for_good = True


class Schedule(Section):
    """The outer rate over the steps, by torch.optim.lr_scheduler; past its length the rate stays."""

    type: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    steps: Positive | None = None
    """Length of the schedule in steps of the outer optimizer; null: the run's, as it starts."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Rate at the end, as a fraction of the first (linear, cosine; exponential needs more than 0)."""

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        if self.type == "exponential" and self.final == 0:
            raise InputError(
                "outer.schedule.final: got 0.0, expected more than 0 for an exponential schedule"
            )
        return self


class Outer(Section):
    """The outer optimizer, one of torch.optim's; options that an optimizer lacks are refused."""

    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "adam"
    lr: Rate = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    nesterov: bool | None = None
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] | None = (
        None
    )
    eps: Rate | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    clip_norm: Rate | None = None
    """Largest norm of the meta-gradient; null: not clipped."""
    rates: dict[str, Rate] = {}
    """Rates of named parts of theta, by glob over its keys; the first that matches counts."""
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def _check(self) -> Outer:
        allowed = {
            "sgd": ("momentum", "nesterov", "weight_decay"),
            "adam": ("betas", "eps", "weight_decay"),
            "adamw": ("betas", "eps", "weight_decay"),
            "rmsprop": ("momentum", "eps", "weight_decay"),
        }[self.optimizer]
        for key in ("momentum", "nesterov", "betas", "eps", "weight_decay"):
            if getattr(self, key) is not None and key not in allowed:
                raise InputError(
                    f"outer.{key}: not an option of {self.optimizer}, which has {', '.join(allowed)}"
                )
        if self.nesterov and not self.momentum:
            raise InputError("outer.nesterov: got true without outer.momentum, expected a momentum above 0")
        return self


class Run(Section):
    steps: Positive = 1000
    tasks_per_step: Positive = 32
    shards: Positive | None = None
    """Fixed pieces that a step's tasks are cut into; null: min(8, groups of tasks). The bits depend on it."""
    workers: Count = 0
    """Ray actors; 0 computes in this process, without Ray."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    """May be a fraction; above 0 the worker computes on its GPU."""
    address: str | None = None
    """Ray cluster to use; null: RAY_ADDRESS, else a local one started for this run."""
    start_timeout: Rate = 300.0
    """Seconds to wait for the workers to be placed and ready."""
    max_shard_failures: Positive = 3
    """Workers that one shard may lose before the run stops."""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    name: str | None = None
    """Fixed name of the run folder; null: NAME-ID."""
    eval_every: Count = 200
    """Steps between evaluations on validation tasks; 0: never."""
    eval_tasks: Positive = 600
    eval_inner_steps: Count | None = None
    """Inner steps at evaluation; null: the algorithm's own."""
    patience: Positive | None = None
    """Evaluations without a better one after which the run stops; null: never."""
    checkpoint_every: Count = 200
    """Steps between checkpoints; 0: only at the end."""
    keep: Positive = 3
    """Latest checkpoints that are kept, besides the best."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str | None) -> str | None:
        return name if name is None else _plain_name("run.name", name)

    @model_validator(mode="after")
    def _check(self) -> Run:
        if self.shards is not None and self.shards > self.tasks_per_step:
            raise InputError(
                f"run.shards: got {self.shards}, expected at most run.tasks_per_step = {self.tasks_per_step}"
            )
        if self.patience is not None and self.eval_every == 0:
            raise InputError(
                "run.patience: got a number with run.eval_every: 0, expected evaluations to wait for"
            )
        return self


class Compute(Section):
    execution: Literal["auto", "loop", "vmap", "measure"] = "auto"
    """Task after task, or vectorised. Settled before step 0: auto by a fixed rule; measure by trying both, so that two
    runs of one job may differ in it, and in their bits. The run's job.yaml has what was settled."""
    chunk: Positive | None = None
    """Groups of tasks vectorised at once; null: a whole shard."""
    threads: Positive = 1
    """Threads of one worker's operations. The bits depend on it."""
    deterministic: bool = False
    differentiation: Literal["auto", "reverse", "constant-memory"] = "auto"
    """Through the whole graph of the inner loop, or step by step; the same gradient. auto is settled before step 0."""
    compile: bool = False
    """torch.compile of a shard's gradient; every worker checks it on the first shard of each shape."""
    precision: Literal["float32", "bf16", "tf32"] = "float32"
    """Of products and convolutions; theta, the optimizer and sums over tasks are float32. tf32 is for GPUs."""

    @model_validator(mode="after")
    def _check(self) -> Compute:
        if self.chunk is not None and self.execution == "loop":
            raise InputError(
                f"compute.chunk: got {self.chunk} with compute.execution: loop, which takes one task after the other: "
                "leave it out, or use vmap"
            )
        return self


class Tracking(Section):
    type: Literal["mlflow", "none"] = "mlflow"
    experiment: str | None = None
    """MLflow experiment; null: MLFLOW_EXPERIMENT_NAME, else the job's name."""


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

    @model_validator(mode="after")
    def _check(self) -> Job:
        if self.compute.precision == "tf32" and self.run.gpus_per_worker == 0:
            raise InputError(
                "compute.precision: got tf32 without GPUs (run.gpus_per_worker: 0), expected float32 or bf16"
            )
        return self

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return _plain_name("name", name)

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
            raise InputError(message if message.startswith(str(path)) else f"{path}: {message}") from None

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


def _refuse_unknown(tree: Mapping[str, Any], section: type[BaseModel], prefix: str) -> None:
    for key, value in tree.items():
        field = section.model_fields.get(key) if isinstance(key, str) else None
        if field is None:
            raise InputError(f"{prefix}{key}: unknown key; {nearest(str(key), list(section.model_fields))}")
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section) and not issubclass(kind, Component):
            if not isinstance(value, dict):
                raise InputError(f"{prefix}{key}: got {value!r}, expected a section of keys")
            _refuse_unknown(value, kind, f"{prefix}{key}.")


def _plain_name(field: str, name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(
            f"{field}: got {name!r}, expected letters, digits, '.', '_' and '-' (it names a folder)"
        )
    return name
