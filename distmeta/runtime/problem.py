"""A job's parts, built: the same on the driver, on every worker and in evaluation."""

from __future__ import annotations

import copy
import math
import socket
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from distmeta.compute.buckets import buckets, drawn
from distmeta.compute.gradient import WHOLE_SHARD, Execution
from distmeta.compute.numerics import numerics
from distmeta.config.job import Job
from distmeta.config.parts import build_part
from distmeta.errors import InputError
from distmeta.models.functional import Functional
from distmeta.protocols import Algorithm, Episode, Score, TaskFamily, Theta
from distmeta.seeding import task_ids, torch_generator
from distmeta.tasks.few_shot import ClassificationScore


@dataclass(frozen=True)
class Problem:
    """What is trained. `job` is resolved: obeyed as it is by every worker and on resume."""

    job: Job
    family: TaskFamily
    model: Functional
    algorithm: Algorithm
    device: torch.device
    execution: Execution = field(default_factory=lambda: Execution("loop", 1))
    phase: int = 0
    """How many of the job's changes the algorithm is made with."""

    def at(self, phase: int) -> Problem:
        """The problem after so many of the job's changes."""
        if phase == self.phase:
            return self
        job = self.job.at(self.job.changes[phase - 1].step if phase else -1)
        return replace(self, algorithm=_algorithm(job, self.model, self.family), phase=phase)

    def score(self, split: str) -> Score:
        """The family's loss and metrics; evaluation may have other ways than training."""
        scorer = getattr(self.family, "scorer", None)
        return self.family.score if scorer is None else scorer(split)

    def adapting(self, split: str) -> Algorithm:
        """The algorithm, its support loss scored as the split is."""
        return self.algorithm if split == "train" else with_score(self.algorithm, self.score(split))

    def training_at(self, step: int) -> Algorithm:
        """The algorithm as it trains in an outer step."""
        at = getattr(self.algorithm, "at", None)
        return self.algorithm if at is None else at(step)

    @property
    def draws_ahead(self) -> bool:
        """Whether a worker draws its next shard's tasks while it computes; only those that do not depend on theta."""
        asked = self.job.compute.draw_ahead
        return not hasattr(self.family, "collect") and (self.device.type != "cpu" if asked is None else asked)

    def scores_before(self, step: int) -> bool:
        """Whether the tasks of an outer step are also scored before adaptation."""
        every = self.job.run.before_every
        return every > 0 and step % every == 0

    @property
    def outer_epochs(self) -> int:
        """Steps of the outer optimizer on one step's episodes."""
        return int(getattr(self.algorithm, "outer_epochs", 1))

    def init(self) -> Theta:
        """theta at step 0."""
        theta = self.algorithm.init(torch_generator(self.job.seed, "init"))
        for name, value in theta.items():
            if value.dtype != torch.float32:
                raise InputError(f"algorithm: theta[{name!r}] is {value.dtype}, expected torch.float32")
        return theta

    @cached_property
    def input_dtype(self) -> torch.dtype:
        """The dtype of the inputs that the task family draws: integers for tokens; float32 where it cannot tell."""
        try:
            (bucket,) = buckets(drawn(self.family, "test", task_ids(self.job.seed, "probe", 0, 1)))
            return bucket.episodes.query.x.dtype
        except (InputError, AttributeError):
            return torch.float32

    @property
    def eval_steps(self) -> int:
        asked = self.job.run.eval_inner_steps
        return self.algorithm.inner_steps if asked is None or self.algorithm.inner_steps == 0 else asked


def build(
    job: Job,
    constants: dict[str, np.ndarray] | None = None,
    device: torch.device | None = None,
    examples: Mapping[str, Any] | None = None,
) -> Problem:
    """Makes the job's task family, model and algorithm.

    Args:
        examples: what `examples_of` gave: stands in for the tasks where they cannot be made here (no store).
        device: where tasks are computed; None: this process's GPU where the job asks for GPUs, else the CPU.
        constants: the model's frozen parameters and buffers as the driver has them; a worker need not have the
            file that `model.init_from` names.
    """
    device = device or device_of(job)
    try:
        family = build_part(job.tasks.part, job.tasks.options, {})
    except InputError as error:
        if examples is None:
            raise
        family = AbsentTasks(examples, str(error))
    shape = {"in_shape": tuple(family.in_shape), "out_features": family.out_features}
    model = Functional(
        lambda: build_part(job.model.part, job.model.options, shape),
        torch_generator(job.seed, "model"),
        freeze=job.model.freeze,
        init_from=job.model.init_from if constants is None else None,
        head=job.model.head,
        out_features=family.out_features,
    )
    if constants is not None:
        model.constants = {name: torch.from_numpy(np.array(value)) for name, value in constants.items()}
    model.to(device)
    algorithm = _algorithm(job, model, family)
    if job.run.tasks_per_step % algorithm.group_size:
        raise InputError(
            f"run.tasks_per_step: got {job.run.tasks_per_step}, expected a multiple of {algorithm.group_size}: "
            f"{job.algorithm.type} compares {algorithm.group_size} tasks at a time"
        )
    return Problem(job, family, model, algorithm, device, _execution(job))


def _algorithm(job: Job, model: Functional, family: TaskFamily) -> Algorithm:
    return build_part(job.algorithm.part, job.algorithm.options, {"model": model, "score": family.score})


class AbsentTasks:
    """Stands in for few-shot classes whose data are not here: enough to adapt and predict, and for fixed episodes."""

    def __init__(self, examples: Mapping[str, Any], reason: str):
        self.in_shape = tuple(examples["in_shape"])
        self.out_features = int(examples["out_features"])
        self.reason = reason
        self.score = ClassificationScore(self.out_features)

    def draw(self, split: str, ids: Any) -> Episode:
        raise InputError(self.reason)

    def scorer(self, split: str) -> Score:
        return self.score


def examples_of(family: TaskFamily) -> dict[str, Any] | None:
    """Shapes, outputs and image preparation of few-shot classes, as plain data; None for other families."""
    if not hasattr(family, "scorer"):
        return None
    preparation = getattr(family, "preparation", None)
    return {
        "in_shape": list(family.in_shape),
        "out_features": family.out_features,
        "preparation": None if preparation is None else preparation.to_dict(),
    }


def fingerprint_of(family: TaskFamily) -> str | None:
    """Which data the family's tasks are drawn from; None where it does not tell."""
    found = getattr(family, "fingerprint", None)
    return None if found is None else str(found)


def check_data(problem: Problem, fingerprint: str | None) -> None:
    """Raises InputError where the tasks' data are not those of this fingerprint: numbers would be neither run's."""
    found = fingerprint_of(problem.family)
    if fingerprint not in (None, found):
        raise InputError(
            f"tasks: got data with the fingerprint {found} on {socket.gethostname()}, expected {fingerprint}, "
            "with which the run began: give this machine the same data, or begin another run"
        )


def with_score(algorithm: Algorithm, score: Score) -> Algorithm:
    """The algorithm with another support loss, where it has one: evaluation may have fewer ways than training."""
    other = copy.copy(algorithm)
    if hasattr(other, "score"):
        setattr(other, "score", score)  # noqa: B010 - not part of the protocol
    return other


def _execution(job: Job) -> Execution:
    """What a resolved job says; the loop, and the whole graph, where it is not resolved yet."""
    compute = job.compute
    differentiation = "reverse" if compute.differentiation == "auto" else compute.differentiation
    if compute.execution == "vmap":
        return Execution("vmap", compute.chunk or WHOLE_SHARD, differentiation)
    return Execution("loop", 1, differentiation)


def shard_slices(tasks: int, shards: int, group_size: int) -> list[slice]:
    """Cuts a step's tasks into fixed shards of whole groups, as even as can be."""
    groups = tasks // group_size
    edges = [math.floor(groups * s / shards) * group_size for s in range(shards + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def numerics_of(job: Job, device: torch.device) -> AbstractContextManager[None]:
    """The settings of the job's computations on a device."""
    compute = job.compute
    return numerics(compute.threads, compute.deterministic, compute.precision, device.type)


def device_of(job: Job) -> torch.device:
    if job.run.gpus_per_worker == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(
            f"run.gpus_per_worker: got {job.run.gpus_per_worker:g}, but torch sees no GPU here: use 0"
        )
    return torch.device("cuda")


def constants_of(model: Functional) -> dict[str, Any]:
    """The model's constants as numpy, for the wire and for checkpoints."""
    return {name: value.detach().cpu().numpy() for name, value in model.constants.items()}
