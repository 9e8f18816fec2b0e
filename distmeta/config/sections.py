"""The sections of a job: the parts that it names, how a run computes them, and where the results go.

The docstring below a field is its description in `docs/reference/job.md`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from distmeta.config.catalog import ALGORITHMS, MODELS, STRATEGIES, TASKS, TRACKERS
from distmeta.config.parts import check_options, import_part
from distmeta.config.workers import Elastic, Workers
from distmeta.errors import InputError, did_you_mean
from distmeta.seeding import MOST_STEPS, MOST_TASKS

Positive = Annotated[int, Field(ge=1)]
Tasks = Annotated[int, Field(ge=1, le=MOST_TASKS)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]

SMALLEST_GPU_SHARE = 1e-4
"""The smallest fraction of a resource that Ray can place."""

OPTIMIZER_OPTIONS = {
    "sgd": ("momentum", "nesterov", "weight_decay"),
    "adam": ("betas", "eps", "weight_decay"),
    "adamw": ("betas", "eps", "weight_decay"),
    "rmsprop": ("momentum", "eps", "weight_decay"),
}
"""Which keys of `outer` each optimizer takes."""
OPTIMIZER_KEYS = ("momentum", "nesterov", "betas", "eps", "weight_decay")
SHAPES = ("constant", "linear", "cosine", "exponential")
"""Schedules of the outer learning rate that are formulas of ours."""


class Section(BaseModel):
    """A part of a job with a fixed set of keys: unknown keys and wrong types are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


class PartSection(Section):
    """A section that names a part by `type`. All other keys are options of that part, checked against its signature."""

    model_config = ConfigDict(
        extra="allow", frozen=True, strict=True, protected_namespaces=(), use_attribute_docstrings=True
    )
    section: ClassVar[str]
    table: ClassVar[Mapping[str, str]]
    given: ClassVar[tuple[str, ...]] = ()
    """Constructor arguments that distmeta supplies."""
    given_only_by_distmeta: ClassVar[bool] = False
    """Whether a job may not set the arguments in `given`."""
    default_type: ClassVar[str | None] = None
    """The type if a job does not name one."""

    type: str
    """A shipped part's name, or `package.module:Name` for your own."""

    @model_validator(mode="before")
    @classmethod
    def _check_options(cls, data: Any) -> Any:
        if isinstance(data, dict) and cls.default_type is not None:
            data = {"type": cls.default_type, **data}
        if not isinstance(data, dict) or not isinstance(data.get("type"), str):
            raise InputError(
                f"{cls.section}.type: missing, expected one of {', '.join(cls.table)} or package.module:Name"
            )
        own = {key: value for key, value in data.items() if key in cls.model_fields}
        options = {key: value for key, value in data.items() if key not in cls.model_fields}
        for key in cls.given:
            if key in options and cls.given_only_by_distmeta:
                raise InputError(f"{cls.section}.{key}: distmeta supplies this argument, a job cannot set it")
        part = import_part(f"{cls.section}.type", data["type"], cls.table)
        return own | check_options(cls.section, part, options, cls.given, cls.table)

    @property
    def part(self) -> Any:
        """The class or function that `type` names."""
        return import_part(f"{self.section}.type", self.type, self.table)

    @property
    def options(self) -> dict[str, Any]:
        """The part's keyword arguments, with defaults filled in."""
        return dict(self.model_extra or {})


class ModelSection(PartSection):
    """The network: a `torch.nn.Module` and how it starts."""

    section = "model"
    table = MODELS
    given = ("in_shape", "out_features")

    freeze: str | list[str] | None = None
    """Glob over parameter names, or a list of globs. Matching parameters are not trained."""
    init_from: str | None = None
    """File with weights to start from (safetensors; `.pt`, `.pth`, `.bin` or `.ckpt` with tensors only), or a run
    folder. Tensors whose name and shape fit are taken; the run says which ones were not."""
    init_prefix: str | None = None
    """Prefix that is removed from the names in `init_from`; null: the one with which most tensors fit."""
    init_strict: bool = False
    """Refuse `init_from` unless all tensors of the file and of the model fit."""
    train_mode: Literal["keep", "train"] = "keep"
    """`keep` leaves layers in the mode that the constructor left them in: `from_pretrained` leaves evaluation mode, so
    dropout does nothing. `train` puts layers into training mode, except norms with fixed statistics."""
    head_module: str | None = None
    """Name of the submodule that is the head, for `adapt: head`, `model.head` and features; null: the module's own
    `head_module`, else its submodule `head`, else its only linear layer with as many outputs as the tasks need."""
    head: Literal["linear", "shared", "prototype"] = "linear"
    """How the last linear layer of a task starts: `linear` uses theta's own, `shared` copies one row to every class,
    and `prototype` computes it from the class means. The last two work with any number of ways."""


class TasksSection(PartSection):
    """The distribution of tasks."""

    section = "tasks"
    table = TASKS


class AlgorithmSection(PartSection):
    """The meta-learner."""

    section = "algorithm"
    table = ALGORITHMS
    given = ("model", "score")
    given_only_by_distmeta = True


class StrategySection(PartSection):
    """How the shards' meta-gradients become the next theta: who holds theta and the optimizer state."""

    section = "strategy"
    table = STRATEGIES
    default_type = "driver"
    given = ("problem", "outer", "state", "report")
    given_only_by_distmeta = True

    @property
    def compress(self) -> str:
        """How gradients travel: `none`, `bf16` or `int8`; `none` if the strategy has no such option."""
        return self.options.get("compress", "none")


class TrackerSection(PartSection):
    """A tracker: where the history of a run goes besides its folder."""

    section = "tracking"
    table = TRACKERS
    default_type = "mlflow"
    given = ("run",)
    given_only_by_distmeta = True


class ScheduleSection(Section):
    """The outer learning rate over the steps. After the schedule's length the rate stays constant."""

    type: str = "constant"
    """Shape of the schedule: constant, linear, cosine or exponential; or `package.module:Name` of a scheduler that only
    depends on the number of steps, such as `torch.optim.lr_scheduler:OneCycleLR`. Only rates change, not momenta."""
    options: dict[str, Any] = {}
    """Keyword arguments of a scheduler given as `package.module:Name`, besides the optimizer."""
    steps: Positive | None = None
    """Length of a shape in steps of the outer optimizer; null: all steps of the run."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Rate at the end of a shape as a fraction of the first (linear, cosine; exponential needs more than 0)."""
    warmup: Count = 0
    """First steps in which the rate rises linearly, from 1/warmup of it to the whole. The schedule follows."""

    @model_validator(mode="after")
    def _check(self) -> ScheduleSection:
        is_own = ":" in self.type
        if not is_own and self.type not in SHAPES:
            raise InputError(
                f"outer.schedule.type: got {self.type!r}, expected one of {', '.join(SHAPES)} or package.module:Name; "
                f"{did_you_mean(self.type, list(SHAPES))}"
            )
        if self.options and not is_own:
            raise InputError(
                f"outer.schedule.options: got {self.options}, expected them as keys of outer.schedule: {self.type} has "
                "its own"
            )
        if is_own and self.final:
            raise InputError(
                f"outer.schedule.final: got {self.final} with a scheduler of torch, expected it in "
                "outer.schedule.options"
            )
        if self.type == "exponential" and self.final == 0:
            raise InputError(
                "outer.schedule.final: got 0.0, expected more than 0 for an exponential schedule"
            )
        if self.steps is not None and self.warmup >= self.steps:
            raise InputError(
                f"outer.schedule.warmup: got {self.warmup}, expected fewer than outer.schedule.steps = {self.steps}"
            )
        return self


class OptimizerSection(Section):
    """Options of the outer optimizer, for all of theta or for one group."""

    momentum: DecayRate | None = None
    """Momentum (sgd, rmsprop); null: torch's default."""
    nesterov: bool | None = None
    """Nesterov momentum (sgd); null: torch's default."""
    betas: Annotated[list[DecayRate], Field(min_length=2, max_length=2)] | None = None
    """Decay rates of Adam's two moments; null: torch's default."""
    eps: Rate | None = None
    """Term added to the denominator (adam, adamw, rmsprop); null: torch's default."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay; null: torch's default."""
    options: dict[str, Any] = {}
    """Keyword arguments of an optimizer given as `package.module:Name`, besides the learning rate."""

    def check_keys(self, field: str, optimizer: str) -> None:
        """Raise `InputError` if the optimizer does not have an option that is set here."""
        is_own = ":" in optimizer
        if self.options and not is_own:
            raise InputError(
                f"{field}.options: got {self.options}, expected them as keys of {field}: {optimizer} has its own"
            )
        allowed = () if is_own else OPTIMIZER_OPTIONS[optimizer]
        for key in OPTIMIZER_KEYS:
            if getattr(self, key) is not None and key not in allowed:
                raise InputError(
                    f"{field}.{key}: not an option of {optimizer}, which has {', '.join(allowed) or field + '.options'}"
                )


class GroupSection(OptimizerSection):
    """Options for some tensors of theta. What is not given is that of all of theta."""

    lr: Rate | None = None
    """Outer learning rate of these tensors."""


class OuterSection(OptimizerSection):
    """The outer optimizer, one of `torch.optim` or your own. Options that the optimizer does not have are refused."""

    optimizer: str = "adam"
    """sgd, adam, adamw or rmsprop, which see theta as one vector; or `package.module:Name` of another
    `torch.optim.Optimizer`, such as `torch.optim:Adafactor`, which sees each tensor in its own shape."""
    lr: Rate = 1e-3
    """Outer learning rate."""
    groups: dict[str, GroupSection] = {}
    """Other options for some entries of theta, by glob over their names: `{"*.bias": {weight_decay: 0}}`. The first
    match counts."""
    clip_norm: Rate | None = None
    """Largest norm of the meta-gradient; null: not clipped."""
    schedule: ScheduleSection = ScheduleSection()
    """How the learning rate changes over the run."""
    ema: DecayRate | None = None
    """Decay of an exponential moving average of theta, which is then validated, evaluated and used instead of theta;
    null: none. `distmeta evaluate RUN outer.ema=null` uses theta itself."""

    @model_validator(mode="after")
    def _check(self) -> OuterSection:
        if ":" not in self.optimizer and self.optimizer not in OPTIMIZER_OPTIONS:
            raise InputError(
                f"outer.optimizer: got {self.optimizer!r}, expected one of {', '.join(OPTIMIZER_OPTIONS)} or "
                f"package.module:Name; {did_you_mean(self.optimizer, list(OPTIMIZER_OPTIONS))}"
            )
        self.check_keys("outer", self.optimizer)
        self._check_nesterov("outer", self.nesterov, self.momentum)
        for glob, group in self.groups.items():
            field = f"outer.groups.{glob}"
            group.check_keys(field, self.optimizer)
            nesterov = self.nesterov if group.nesterov is None else group.nesterov
            momentum = self.momentum if group.momentum is None else group.momentum
            self._check_nesterov(field, nesterov, momentum)
        return self

    @staticmethod
    def _check_nesterov(field: str, nesterov: bool | None, momentum: float | None) -> None:
        if nesterov and not momentum:
            raise InputError(
                f"{field}.nesterov: got true without {field}.momentum, expected a momentum above 0"
            )


class RunSection(Section):
    """Length, workers, evaluation and checkpoints of a run."""

    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 1000
    """Outer steps."""
    tasks_per_step: Tasks = 32
    """Tasks whose meta-gradients are averaged in one outer step."""
    shards: Positive | None = None
    """Fixed pieces that a step's tasks are cut into; null: min(8, groups of tasks). The bits depend on it."""
    workers: Workers = 0
    """Ray actors that compute; 0: this process computes, without Ray. {min: 2, max: 16}: as many as
    the cluster has room for, between these bounds."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """CPUs that Ray reserves for each worker. Only placement depends on it."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    """GPUs of each worker; a fraction below 1 shares one. Above 0 the worker computes on its first GPU."""
    address: str | None = None
    """Ray cluster to join; null: RAY_ADDRESS if it is set, else a local cluster started for this run."""
    start_timeout: Rate = 300.0
    """Seconds to wait until the workers are placed and ready."""
    shard_timeout: Rate = 1800.0
    """Longest time in seconds that a worker may take for one shard. A slower worker counts as hung and is replaced.
    Once shards have been timed, the limit is 20 times the slowest and at least a minute, if that is less."""
    max_shard_failures: Positive = 3
    """Workers that one shard may lose before the run stops."""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """What happens if a task's meta-gradient is not finite: leave the task out of the mean, or stop the run."""
    name: str | None = None
    """Fixed name of the run folder; null: NAME-ID."""
    before_every: Count = 1
    """Every how many steps tasks are also scored before adaptation, which costs one forward pass; 0: never."""
    eval_every: Count = 200
    """Steps between evaluations on validation tasks; 0: never."""
    eval_tasks: Tasks = 600
    """Tasks in each evaluation."""
    eval_inner_steps: Count | None = None
    """Inner steps in evaluations; null: the algorithm's own."""
    patience: Positive | None = None
    """Stop after so many evaluations in a row without a better one; null: never."""
    checkpoint_every: Count = 200
    """Steps between checkpoints; 0: only at the end."""
    keep: Positive = 3
    """Latest checkpoints to keep, besides the best."""

    @property
    def min_workers(self) -> int:
        """Workers that training starts with."""
        return self.workers.min if isinstance(self.workers, Elastic) else self.workers

    @property
    def max_workers(self) -> int:
        """Workers that the run uses at most; 0: this process computes."""
        return self.workers.max if isinstance(self.workers, Elastic) else self.workers

    @field_validator("gpus_per_worker")
    @classmethod
    def _check_gpus(cls, gpus: float) -> float:
        is_fraction_of_several = gpus > 1 and gpus != int(gpus)
        if is_fraction_of_several or 0 < gpus < SMALLEST_GPU_SHARE:
            raise InputError(
                f"run.gpus_per_worker: got {gpus:g}, expected a whole number, or a fraction from "
                f"{SMALLEST_GPU_SHARE:g} to 1"
            )
        return gpus

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str | None) -> str | None:
        return name if name is None else check_folder_name("run.name", name)

    @model_validator(mode="after")
    def _check_counts(self) -> RunSection:
        if self.shards is not None and self.shards > self.tasks_per_step:
            raise InputError(
                f"run.shards: got {self.shards}, expected at most run.tasks_per_step = {self.tasks_per_step}"
            )
        if self.patience is not None and self.eval_every == 0:
            raise InputError(
                "run.patience: got a number with run.eval_every: 0, expected evaluations to wait for"
            )
        return self


class ComputeSection(Section):
    """How a shard's gradient is computed. What is `auto` or null here is decided before step 0 and written into the
    run's job.yaml."""

    execution: Literal["auto", "loop", "vmap", "measure"] = "auto"
    """Task after task (`loop`) or vectorised (`vmap`). `auto` decides by a fixed rule. `measure` times both, so two
    runs of one job may decide differently and have different bits."""
    chunk: Positive | None = None
    """Groups of tasks that are vectorised at once; null: a whole shard."""
    threads: Positive = 1
    """Threads of each worker's operations. The bits of the result depend on it."""
    deterministic: bool = False
    """Use only deterministic kernels (GPUs). torch names an operation that has none."""
    draw_ahead: bool | None = None
    """Whether a Ray worker draws the tasks of its next shard on a second thread; null: only on GPUs."""
    differentiation: Literal["auto", "reverse", "constant-memory"] = "auto"
    """Through the whole graph of the inner loop (`reverse`), or step by step. Both give the same gradient."""
    compile: bool = False
    """Compile a shard's gradient with torch.compile. Every worker checks it on the first shard of each shape."""
    precision: Literal["float32", "bf16", "tf32"] = "float32"
    """Of matrix products and convolutions. Theta, the optimizer and sums over tasks are float32. tf32 needs GPUs."""

    @model_validator(mode="after")
    def _check_chunk(self) -> ComputeSection:
        if self.chunk is not None and self.execution == "loop":
            raise InputError(
                f"compute.chunk: got {self.chunk} with compute.execution: loop, which computes one task at a time: "
                "leave it out, or use vmap"
            )
        return self


class Change(Section):
    """Values that take over during a run."""

    step: Count
    """Completed steps after which the values hold."""
    set: Annotated[dict[str, Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1)]
    """By dotted key: outer.lr, momentum, weight_decay, clip_norm, and the algorithm's floats, such as inner_lr."""


def check_folder_name(field: str, name: str) -> str:
    """Return the name. Raises InputError if it cannot name a folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(
            f"{field}: got {name!r}, expected letters, digits, '.', '_' and '-' (it names a folder)"
        )
    return name
