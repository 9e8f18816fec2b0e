"""The sections of a job: the parts that it names, how they are run and computed, and where that is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from distmeta.algorithms import ALGORITHMS
from distmeta.config import combining
from distmeta.config.combining import Strategy
from distmeta.config.parts import check_options, locate
from distmeta.config.workers import Elastic, Workers
from distmeta.errors import InputError
from distmeta.models import MODELS
from distmeta.seeding import MOST_STEPS, MOST_TASKS
from distmeta.tasks import TASKS

Positive = Annotated[int, Field(ge=1)]
Tasks = Annotated[int, Field(ge=1, le=MOST_TASKS)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LEAST_GPU = 1e-4
"""The smallest fraction of a resource that Ray can place."""


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
    """The outer rate over the steps; past its length the rate stays."""

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
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 1000
    tasks_per_step: Tasks = 32
    shards: Positive | None = None
    """Fixed pieces that a step's tasks are cut into; null: min(8, groups of tasks). The bits depend on it."""
    workers: Workers = 0
    """Ray actors; 0 computes in this process, without Ray. {min: 2, max: 16}: as many of them as find room."""
    strategy: Strategy = "driver"
    """Who holds theta, adds the meta-gradients and steps: a line of runtime.strategies' table."""
    servers: Positive | None = None
    """sharded: Ray actors that own a slice of theta each; fewer where theta has fewer blocks of 65,536."""
    max_staleness: Count | None = None
    """async: steps that a gradient may be older than the theta it is applied to; 0 is `driver`."""
    staleness_aware: bool | None = None
    """async: gradients count 1 / (1 + staleness), and so does the step's rate."""
    replicas: Positive | None = None
    """local: copies of theta that step on their own. The bits depend on it, on the number of workers they do not."""
    local_steps: Positive | None = None
    """local: outer steps between two averages."""
    local_lr: Rate | None = None
    """local: rate of the step on the averaged delta."""
    local_momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """local: its Nesterov momentum. With 0, and a rate of 1, parameters are averaged."""
    compress: Literal["none", "bf16", "int8"] = "none"
    """Of gradients on their way from workers (theta goes to them as it is). The bits depend on it, on workers' number
    they do not."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    """May be a fraction below 1; above 0 the worker computes on its GPU, the first where it has several."""
    address: str | None = None
    """Ray cluster to use; null: RAY_ADDRESS, else a local one started for this run."""
    start_timeout: Rate = 300.0
    """Seconds to wait for the workers to be placed and ready."""
    shard_timeout: Rate = 1800.0
    """Longest that one worker may take for one shard: past it the worker counts as hung and is replaced. Sooner once
    shards were timed: 20 times the slowest of them, a minute at least."""
    max_shard_failures: Positive = 3
    """Workers that one shard may lose before the run stops."""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    name: str | None = None
    """Fixed name of the run folder; null: NAME-ID."""
    before_every: Count = 1
    """Steps between those whose tasks are scored before adaptation too: a forward pass of the query more. 0: never."""
    eval_every: Count = 200
    """Steps between evaluations on validation tasks; 0: never."""
    eval_tasks: Tasks = 600
    eval_inner_steps: Count | None = None
    """Inner steps at evaluation; null: the algorithm's own."""
    patience: Positive | None = None
    """Evaluations without a better one after which the run stops; null: never."""
    checkpoint_every: Count = 200
    """Steps between checkpoints; 0: only at the end."""
    keep: Positive = 3
    """Latest checkpoints that are kept, besides the best."""

    @property
    def min_workers(self) -> int:
        """Workers that training starts with."""
        return self.workers.min if isinstance(self.workers, Elastic) else self.workers

    @property
    def max_workers(self) -> int:
        """Workers that the run has a use for; 0: this process computes."""
        return self.workers.max if isinstance(self.workers, Elastic) else self.workers

    @field_validator("gpus_per_worker")
    @classmethod
    def _check_gpus(cls, gpus: float) -> float:
        if (gpus > 1 and gpus != int(gpus)) or 0 < gpus < LEAST_GPU:  # as Ray has it
            raise InputError(
                f"run.gpus_per_worker: got {gpus:g}, expected a whole number, or a fraction from {LEAST_GPU:g} to 1"
            )
        return gpus

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str | None) -> str | None:
        return name if name is None else plain_name("run.name", name)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        return combining.filled(data)

    @model_validator(mode="after")
    def _check(self) -> Run:
        combining.check(self)
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
    draw_ahead: bool | None = None
    """Whether a Ray worker draws its next shard's tasks on a second thread while it computes one; null: on GPUs."""
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
    parent: str | None = None
    """MLflow run that this one is shown under; a sweep's trials have the sweep's."""


class Change(Section):
    """Values that take over during a run."""

    step: Count
    """Completed steps after which they hold."""
    set: Annotated[dict[str, Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1)]
    """By dotted key: outer.lr, momentum, weight_decay, clip_norm, and the algorithm's floats, such as inner_lr."""


def plain_name(field: str, name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(
            f"{field}: got {name!r}, expected letters, digits, '.', '_' and '-' (it names a folder)"
        )
    return name
