"""Deployment: a trained meta-learner, loaded from a checkpoint, adapts to a task, then predicts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distmeta.compute.unroll import detached, unroll
from distmeta.config.job import Job, run_in_process
from distmeta.config.yaml_text import apply_overrides
from distmeta.errors import InputError
from distmeta.evaluation.trusted_parts import stored_job
from distmeta.protocols import Algorithm, Batch, State, Theta, to_float32
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.checkpoint import Checkpoint
from distmeta.runtime.parameter_server import check_theta
from distmeta.runtime.problem import Problem, build, numerics_of, with_score
from distmeta.runtime.worker import evaluating


def load(
    checkpoint: str | Path,
    overrides: Sequence[str] = (),
    *,
    model: Any = None,
    tasks: Any = None,
    algorithm: Any = None,
    report: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> Learner:
    """A trained meta-learner, ready to adapt: `load(path).adapt(x, y)(x_query)`.

    Args:
        model, tasks, algorithm: a class to use instead of the one that the checkpoint names.
        report: told of each module of its own that the checkpoint makes us import.

    Raises:
        InputError: no such checkpoint, a damaged one, or one that names what is no class of the kind.
    """
    stored = checkpoints.load(checkpoint)
    parts = {"model": model, "tasks": tasks, "algorithm": algorithm}
    trained = stored_job(stored.job, overrides, parts, report)
    if trained.get("changes"):  # the values of the last step
        trained = Job.parse(trained).at(stored.progress.step - 1).to_dict()
    job, steps = _evaluation_job(trained, overrides)
    constants = {name: value.numpy() for name, value in stored.constants.items()}
    # beside workers this process needs no GPU
    device = torch.device("cpu") if job.run.max_workers else None
    problem = build(job, constants, device, examples=stored.examples)
    if steps and problem.algorithm.inner_steps == 0:
        raise InputError(
            f"algorithm.inner_steps: got {steps}, but {job.algorithm.type} has no inner loop: leave it out"
        )
    check_theta(stored.theta, problem.init())
    theta = {name: stored.theta[name].to(problem.device) for name in problem.init()}
    return Learner(problem, theta, problem.eval_steps if steps is None else steps, stored)


@dataclass(frozen=True)
class Learner:
    """theta and the algorithm it belongs to."""

    problem: Problem
    theta: Theta
    steps: int
    """Inner steps of `adapt`."""
    checkpoint: Checkpoint

    def adapt(self, x: Any, y: Any, steps: int | None = None) -> Adapted:
        """Learns one task from its support set: x [N, *in_shape], y [N] labels or [N, D] targets.

        Any integers serve as labels; outputs stand in their sorted order.

        Raises:
            InputError: x of another shape than the model's, y that is not one label or target an example, more
                classes than the model has outputs.
        """
        if not hasattr(self.problem.family, "draw"):
            raise InputError(
                f"adapt: {self.problem.job.tasks.type} has no x and y, its data are collected by the policy: use "
                "distmeta.evaluate, or compute.episodes.episodes_of on a family of your own"
            )
        x = _inputs(x, self.problem)
        y = _targets(y, len(x), self.problem)
        classes, algorithm = None, self.problem.algorithm
        if not y.is_floating_point():
            classes, y = torch.unique(y, return_inverse=True)
            algorithm = _with_ways(self.problem, len(classes))
        if steps and algorithm.inner_steps == 0:
            kind = self.problem.job.algorithm.type
            raise InputError(f"steps: got {steps}, but {kind} has no inner loop: leave it out")
        steps = self.steps if steps is None else steps
        with self.ready():
            state = detached(unroll(algorithm, self.theta, Batch(x, y), steps, detach=True))
        return Adapted(self, algorithm, state, classes)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The job's numerics, and dropout off: what adapting and predicting run in."""
        with numerics_of(self.problem.job, self.problem.device), evaluating(self.problem.model.module):
            yield


@dataclass(frozen=True)
class Adapted:
    """A meta-learner adapted to one task: call it with query inputs."""

    learner: Learner
    algorithm: Algorithm
    """The learner's, for this task's classes."""
    state: State
    classes: torch.Tensor | None
    """The task's labels, in the order of the outputs; None for regression."""

    def __call__(self, x: Any) -> torch.Tensor:
        """Outputs for x [Q, *in_shape]: logits [Q, classes], or targets [Q, D]."""
        problem = self.learner.problem
        with self.learner.ready(), torch.no_grad():
            outputs = to_float32(self.algorithm.predict(self.learner.theta, self.state, _inputs(x, problem)))
        return outputs if self.classes is None else outputs[..., : len(self.classes)]

    def predict(self, x: Any) -> torch.Tensor:
        """The label of each row, or its target."""
        outputs = self(x)
        return outputs if self.classes is None else self.classes[outputs.argmax(-1)]


def _inputs(x: Any, problem: Problem) -> torch.Tensor:
    tensor = _tensor("x", x).to(problem.device, problem.input_dtype)
    shape = tuple(problem.family.in_shape)
    if tuple(tensor.shape[1:]) != shape:
        raise InputError(f"x: got examples of shape {tuple(tensor.shape[1:])}, expected {shape}")
    return tensor


def _targets(y: Any, examples: int, problem: Problem) -> torch.Tensor:
    """Integer labels [N], int64, or targets [N, D], float32."""
    tensor = _tensor("y", y).to(problem.device)
    shape, outputs = tuple(tensor.shape), problem.family.out_features
    if tensor.is_floating_point() and shape != (examples, outputs):
        raise InputError(
            f"y: got numbers of shape {shape}, expected integer labels of shape {(examples,)} "
            f"or targets of shape {(examples, outputs)}"
        )
    if not tensor.is_floating_point() and shape != (examples,):
        raise InputError(f"y: got labels of shape {shape}, expected one for each of the {examples} examples")
    return tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64)


def _tensor(field: str, value: Any) -> torch.Tensor:
    """A tensor of its own: what is given may be read-only, or part of a graph."""
    try:
        return value.detach() if isinstance(value, torch.Tensor) else torch.tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{field}: got {type(value).__name__} ({error}), expected an array of numbers"
        ) from None


def _evaluation_job(tree: Mapping[str, Any], overrides: Sequence[str]) -> tuple[Job, int | None]:
    """The run's job as evaluation sees it, and the inner steps asked for.

    `algorithm.inner_steps` is not part of the job here: theta may hold a rate for every trained step.
    """
    asked = apply_overrides({}, overrides)
    kept = [text for text in overrides if not text.startswith("algorithm.inner_steps=")]
    for key in ("ways", "shots", "queries", "support_domain", "query_domain"):
        if (
            f"eval_{key}" in tree["tasks"]
        ):  # evaluation's own: the head keeps the ways that it was trained with
            kept = [text.replace(f"tasks.{key}=", f"tasks.eval_{key}=", 1) for text in kept]
    # trained on GPUs, evaluated where there may be none: here, or on the workers that are asked for
    own = asked.get("run")
    own = own if isinstance(own, Mapping) else {}
    gpus = tree["run"]["gpus_per_worker"] if own.get("workers") or torch.cuda.is_available() else 0
    compute = {**tree["compute"], "compile": False}  # evaluation takes no meta-gradient
    if own.get("gpus_per_worker", gpus) == 0 and compute["precision"] == "tf32":
        compute["precision"] = "float32"
    local = run_in_process(tree)
    run = local["run"] | {"gpus_per_worker": gpus}
    job = Job.parse({**local, "run": run, "compute": compute, "sweep": None}, kept)
    if job.compute.execution == "measure":
        raise InputError("compute.execution: got measure, which is for training, expected auto, loop or vmap")
    steps = asked.get("algorithm", {}).get("inner_steps")
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 0):
        raise InputError(f"algorithm.inner_steps: got {steps!r}, expected an integer of at least 0")
    return job, steps


def _with_ways(problem: Problem, ways: int) -> Any:
    """The algorithm for a task of so many classes: the head's other outputs are masked, as in fixed episodes."""
    from distmeta.tasks.few_shot import ClassificationScore

    if hasattr(problem.family, "scorer"):
        return with_score(problem.algorithm, ClassificationScore(ways))
    if ways > problem.family.out_features:
        raise InputError(
            f"y: got {ways} classes, expected at most {problem.family.out_features} (the model's outputs), "
            "or targets as floats"
        )
    return problem.algorithm


__all__ = ["Adapted", "Learner", "load"]
