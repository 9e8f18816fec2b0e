"""The parts of a job, built: the same on the driver, on every worker and in evaluation."""

from __future__ import annotations

import copy
import socket
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from distmeta.compute.episodes import draw_episodes
from distmeta.compute.execution import WHOLE_SHARD, Execution
from distmeta.compute.numerics import apply_numerics
from distmeta.config.job import Job
from distmeta.config.parts import build_part
from distmeta.errors import InputError
from distmeta.models.functional import FunctionalModel
from distmeta.protocols import (
    Algorithm,
    Batch,
    ChangesOverTraining,
    CollectsData,
    Episode,
    HasFingerprint,
    HasPreparation,
    RepeatsOuterStep,
    Score,
    ScoresPerSplit,
    ScoresSupport,
    TaskFamily,
    Theta,
)
from distmeta.runtime.checkpoint import Checkpoint, Progress, TrainingState
from distmeta.seeding import task_ids, torch_generator
from distmeta.tasks.few_shot import ClassificationScore
from distmeta.trees import tree_map


@dataclass(frozen=True)
class Problem:
    """What is trained. A resolved job (`runtime.resolve`) leaves nothing open, for workers and for a resume."""

    job: Job
    family: TaskFamily
    model: FunctionalModel
    algorithm: Algorithm
    device: torch.device
    execution: Execution = field(default_factory=lambda: Execution("loop", 1))
    phase: int = 0
    """How many of the job's changes the algorithm is built with."""

    def at(self, phase: int) -> Problem:
        """Return the problem after so many of the job's changes."""
        if phase == self.phase:
            return self
        job = self.job.at(self.job.changes[phase - 1].step if phase else -1)
        return replace(self, algorithm=_build_algorithm(job, self.model, self.family), phase=phase)

    def score(self, split: str) -> Score:
        """Return the family's score. Evaluation may have other ways than training."""
        if isinstance(self.family, ScoresPerSplit):
            return self.family.scorer(split)
        return self.family.score

    def adapting(self, split: str) -> Algorithm:
        """Return the algorithm with the split's score as its support loss."""
        return self.algorithm if split == "train" else with_score(self.algorithm, self.score(split))

    def training_at(self, step: int) -> Algorithm:
        """Return the algorithm as it trains in an outer step, counted from 0."""
        algorithm = self.algorithm
        return algorithm.at(step) if isinstance(algorithm, ChangesOverTraining) else algorithm

    @property
    def draws_ahead(self) -> bool:
        """Whether a worker draws the next shard's tasks while it computes. Impossible if tasks depend on theta."""
        asked = self.job.compute.draw_ahead
        wanted = self.device.type != "cpu" if asked is None else asked
        return wanted and not isinstance(self.family, CollectsData)

    @cached_property
    def outer_epochs(self) -> int:
        """Outer steps on the same episodes."""
        return int(self.algorithm.outer_epochs) if isinstance(self.algorithm, RepeatsOuterStep) else 1

    def init(self) -> Theta:
        """Return theta at step 0."""
        theta = self.algorithm.init(torch_generator(self.job.seed, "init"))
        for name, value in theta.items():
            if value.dtype != torch.float32:
                raise InputError(f"algorithm: theta[{name!r}] is {value.dtype}, expected torch.float32")
        return theta

    @cached_property
    def example(self) -> Episode:
        """The episode of one task, without a task axis: the types, structure and dtypes of the family's data.

        Few-shot classes whose data are not here have an episode of zeros.
        """
        if isinstance(self.family, AbsentTasks):
            batch = Batch(torch.zeros(1, *self.family.in_shape), torch.zeros(1, dtype=torch.int64))
            return Episode(batch, batch)
        ids = task_ids(self.job.seed, "probe", 0, 1)
        try:
            episodes = draw_episodes(self.family, "test", ids)
        except InputError:  # there is no test split
            episodes = draw_episodes(self.family, "train", ids)
        return tree_map(lambda leaf: leaf[0], episodes)

    @property
    def eval_steps(self) -> int:
        """Inner steps in evaluation."""
        asked = self.job.run.eval_inner_steps
        return self.algorithm.inner_steps if asked is None or self.algorithm.inner_steps == 0 else asked


def build_problem(
    job: Job,
    constants: dict[str, np.ndarray] | None = None,
    device: torch.device | None = None,
    examples: Mapping[str, Any] | None = None,
) -> Problem:
    """Build the job's task family, model and algorithm.

    Args:
        constants: the model's frozen parameters and buffers from the driver or a checkpoint, so that the file in
            `model.init_from` is not needed.
        device: where tasks are computed; None: this process's GPU if the job asks for GPUs, else the CPU.
        examples: what `describe_examples` returned. It replaces a family that cannot be built here (no store).
    """
    device = device or choose_device(job)
    try:
        family = build_part(job.tasks.part, job.tasks.options, {})
    except InputError as error:
        if examples is None:
            raise
        family = AbsentTasks(examples, str(error))
    shape = {"in_shape": tuple(family.in_shape), "out_features": family.out_features}
    model = FunctionalModel(
        lambda: build_part(job.model.part, job.model.options, shape),
        torch_generator(job.seed, "model"),
        freeze=job.model.freeze,
        init_from=job.model.init_from if constants is None else None,
        init_prefix=job.model.init_prefix,
        init_strict=job.model.init_strict,
        train_mode=job.model.train_mode,
        head=job.model.head,
        head_module=job.model.head_module,
        out_features=family.out_features,
        make_inputs=lambda: make_example_inputs(family, job.seed),
    )
    if constants is not None:
        model.constants = {name: torch.from_numpy(np.array(value)) for name, value in constants.items()}
    model.to(device)
    algorithm = _build_algorithm(job, model, family)
    if job.run.tasks_per_step % algorithm.group_size:
        raise InputError(
            f"run.tasks_per_step: got {job.run.tasks_per_step}, expected a multiple of {algorithm.group_size}: "
            f"{job.algorithm.type} compares {algorithm.group_size} tasks at a time"
        )
    return Problem(job, family, model, algorithm, device, read_execution(job))


def make_example_inputs(family: TaskFamily, seed: int) -> Any:
    """Return the query inputs of one training task, or zeros if the data are collected or not here."""
    if isinstance(family, CollectsData | AbsentTasks):
        return torch.zeros(1, *family.in_shape)
    episodes = draw_episodes(family, "train", task_ids(seed, "probe", 0, 1))
    return tree_map(lambda leaf: leaf[0], episodes).query.x


def _build_algorithm(job: Job, model: FunctionalModel, family: TaskFamily) -> Algorithm:
    return build_part(job.algorithm.part, job.algorithm.options, {"model": model, "score": family.score})


def read_execution(job: Job) -> Execution:
    """Return how a resolved job computes its tasks; for a job that is not resolved yet, one after the other."""
    compute = job.compute
    differentiation = "reverse" if compute.differentiation == "auto" else compute.differentiation
    if compute.execution == "vmap":
        return Execution("vmap", compute.chunk or WHOLE_SHARD, differentiation)
    return Execution("loop", 1, differentiation)


def apply_job_numerics(job: Job, device: torch.device) -> AbstractContextManager[None]:
    """Return a context with the job's numerical settings."""
    compute = job.compute
    return apply_numerics(compute.threads, compute.deterministic, compute.precision, device.type)


def choose_device(job: Job) -> torch.device:
    """Return the device that the job computes on in this process."""
    if job.run.gpus_per_worker == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(
            f"run.gpus_per_worker: got {job.run.gpus_per_worker:g}, but torch sees no GPU here: use 0"
        )
    return torch.device("cuda")


def with_score(algorithm: Algorithm, score: Score) -> Algorithm:
    """Return the algorithm with another support loss, if it has one: evaluation may have fewer ways than training."""
    changed = copy.copy(algorithm)
    if isinstance(changed, ScoresSupport):
        changed.score = score
    return changed


def export_constants(model: FunctionalModel) -> dict[str, Any]:
    """Return the model's frozen parameters and buffers as numpy, for workers and checkpoints."""
    return {name: value.detach().cpu().numpy() for name, value in model.constants.items()}


# --- Data and checkpoints -----------------------------------------------------------------------------------------


class AbsentTasks:
    """Replaces a family of few-shot classes whose data are not here. It suffices to adapt and to predict."""

    def __init__(self, examples: Mapping[str, Any], reason: str):
        self.in_shape = tuple(examples["in_shape"])
        self.out_features = int(examples["out_features"])
        self.reason = reason
        self.score = ClassificationScore(self.out_features)

    def draw(self, split: str, ids: Any) -> Episode:
        raise InputError(self.reason)

    def scorer(self, split: str) -> Score:
        return self.score


def describe_examples(family: TaskFamily) -> dict[str, Any] | None:
    """Return shapes, outputs and image preparation of few-shot classes as plain data; None for other families."""
    if not isinstance(family, ScoresPerSplit):
        return None
    preparation = family.preparation if isinstance(family, HasPreparation) else None
    return {
        "in_shape": list(family.in_shape),
        "out_features": family.out_features,
        "preparation": None if preparation is None else preparation.to_dict(),
    }


def read_fingerprint(family: TaskFamily) -> str | None:
    """Return what identifies the family's data, or None if it does not say."""
    fingerprint = family.fingerprint if isinstance(family, HasFingerprint) else None
    return None if fingerprint is None else str(fingerprint)


def build_checkpoint(problem: Problem, state: TrainingState, progress: Progress) -> Checkpoint:
    """Return what a checkpoint stores of a run: enough to continue it, and to use theta without the data."""
    return Checkpoint(
        job=problem.job.to_dict(),
        theta=state.theta,
        constants={name: value.cpu() for name, value in problem.model.constants.items()},
        optimizer=state.optimizer,
        outer=state.outer,
        progress=progress,
        examples=describe_examples(problem.family),
        data=read_fingerprint(problem.family),
    )


def check_data(problem: Problem, fingerprint: str | None) -> None:
    """Raise `InputError` if the data have another fingerprint: the results would belong to neither run."""
    found = read_fingerprint(problem.family)
    if fingerprint not in (None, found):
        raise InputError(
            f"tasks: got data with the fingerprint {found} on {socket.gethostname()}, expected {fingerprint}, "
            "with which the run began: give this machine the same data, or begin another run"
        )
