"""Use a trained meta-learner: load it from a checkpoint, adapt it to a task, predict."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distmeta.compute.gradient import detach_tree, to_float32, unroll
from distmeta.compute.predictions import choose_predictions
from distmeta.compute.scoring import evaluation_mode
from distmeta.config.job import Job, remove_workers
from distmeta.config.yaml_text import apply_overrides
from distmeta.errors import InputError
from distmeta.evaluation.trusted_parts import read_stored_job
from distmeta.evaluation.user_data import (
    build_inputs,
    build_support,
    is_class_index,
    read_field,
    replace_field,
)
from distmeta.protocols import Algorithm, CollectsData, PredictsLabels, ScoresPerSplit, State, Theta
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.checkpoint import Checkpoint
from distmeta.runtime.outer_optimizer import check_theta, select_average
from distmeta.runtime.problem import Problem, apply_job_numerics, build_problem, with_score
from distmeta.tasks.few_shot import ClassificationScore
from distmeta.trees import tree_leaves, tree_map

EVALUATION_KEYS = ("ways", "shots", "queries", "support_domain", "query_domain")
"""Keys of few-shot tasks that have an `eval_` twin. `distmeta evaluate RUN tasks.ways=3` means `tasks.eval_ways=3`."""


def load(
    checkpoint: str | Path,
    overrides: Sequence[str] = (),
    *,
    model: Any = None,
    tasks: Any = None,
    algorithm: Any = None,
    report: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> Learner:
    """Load a trained meta-learner, ready to adapt: `load(path).adapt(x, y)(x_query)`.

    Args:
        checkpoint: a run folder (its latest checkpoint), RUN/checkpoints/best, or a checkpoint.
        overrides: `key=value` on the run's job.
        model, tasks, algorithm: a class to use instead of the one that the checkpoint names.
        report: is told of each module that the checkpoint names, before it is imported.

    Raises:
        InputError: there is no such checkpoint, it is damaged, or it names something other than a class of the
            expected kind.
    """
    stored = checkpoints.load(checkpoint)
    parts = {"model": model, "tasks": tasks, "algorithm": algorithm}
    trained = read_stored_job(stored.job, overrides, parts, report)
    if trained.get("changes"):
        trained = Job.parse(trained).at(stored.progress.step - 1).to_dict()  # the values of the last step
    job, steps = make_evaluation_job(trained, overrides)
    constants = {name: value.numpy() for name, value in stored.constants.items()}
    # if workers compute, this process needs no GPU
    device = torch.device("cpu") if job.run.max_workers else None
    problem = build_problem(job, constants, device, examples=stored.examples)
    if steps and problem.algorithm.inner_steps == 0:
        raise InputError(
            f"algorithm.inner_steps: got {steps}, but {job.algorithm.type} has no inner loop: leave it out"
        )
    initial = problem.init()
    check_theta(stored.theta, initial)
    chosen = stored.theta if job.outer.ema is None else select_average(stored.theta, stored.optimizer)
    theta = {name: chosen[name].to(problem.device) for name in initial}
    return Learner(problem, theta, problem.eval_steps if steps is None else steps, stored)


@dataclass(frozen=True)
class Learner:
    """A trained meta-learner."""

    problem: Problem
    theta: Theta
    steps: int
    """Inner steps of `adapt`, if it is not told otherwise."""
    checkpoint: Checkpoint

    def adapt(self, x: Any, y: Any = None, steps: int | None = None) -> Adapted:
        """Learn one task from its support set.

        The algorithm receives a support set of the same type as in training. `adapt(support)` takes a whole one, which
        is needed if the family's support sets have more than inputs and targets.

        Args:
            x: inputs, [N, *in_shape], or a pytree like those of the family.
            y: integer labels [N], targets [N, ...], or a pytree like those of the family. Integer labels [N] may be any
                integers; output i means the i-th smallest.
            steps: inner steps; None: as in the job.

        Raises:
            InputError: x or y differs in structure, shape or kind of numbers from the family's data, or there are more
                classes than outputs.
        """
        problem = self.problem
        if isinstance(problem.family, CollectsData):
            raise InputError(
                f"adapt: the tasks {problem.job.tasks.type} have no x and y, a policy collects their data: use "
                "distmeta.evaluate, or compute.episodes.make_episodes with your own family"
            )
        support = build_support(problem, x, y)
        classes = None
        algorithm = problem.algorithm
        labels = read_field(support, "y")
        if is_class_index(labels):
            classes, labels = torch.unique(labels, return_inverse=True)
            support = replace_field(support, "y", labels)
            algorithm = _restrict_ways(problem, len(classes))
        if steps and algorithm.inner_steps == 0:
            kind = problem.job.algorithm.type
            raise InputError(f"steps: got {steps}, but {kind} has no inner loop: leave it out")
        steps = self.steps if steps is None else steps
        with self.inference_settings():
            state = detach_tree(unroll(algorithm, self.theta, support, steps, detach=True))
        return Adapted(self, algorithm, state, classes)

    @contextmanager
    def inference_settings(self) -> Iterator[None]:
        """Apply the job's threads and precision, and turn dropout off."""
        with (
            apply_job_numerics(self.problem.job, self.problem.device),
            evaluation_mode(self.problem.model.module),
        ):
            yield


@dataclass(frozen=True)
class Adapted:
    """A meta-learner adapted to one task. Call it with query inputs."""

    learner: Learner
    algorithm: Algorithm
    """The learner's algorithm for the number of classes of this task."""
    state: State
    """The algorithm's state after the inner loop."""
    classes: torch.Tensor | None
    """The task's labels [classes], in the order of the outputs; None for regression."""

    def __call__(self, x: Any) -> Any:
        """Return the outputs for x [Q, *in_shape]: logits [Q, classes], targets [Q, D], or what the model returns."""
        inputs = build_inputs(self.learner.problem, x)
        with self.learner.inference_settings(), torch.no_grad():
            outputs = to_float32(self.algorithm.predict(self.learner.theta, self.state, inputs))
        return outputs if self.classes is None else outputs[..., : len(self.classes)]

    def predict(self, x: Any) -> Any:
        """Return the label of each row of x, [Q], or its target, [Q, D]; a pytree if the family's targets are one.

        Raises:
            InputError: it is not clear which prediction the outputs mean (`compute.predictions`).
        """
        outputs = self(x)
        if self.classes is not None:
            return self.classes[outputs.argmax(-1)]
        problem = self.learner.problem
        rows = len(tree_leaves(build_inputs(problem, x))[0])
        query = problem.example.query
        targets = tree_map(
            lambda leaf: leaf.new_full((rows, *leaf.shape[1:]), leaf.max().item()), read_field(query, "y")
        )  # of the family's kind: the rule looks at their shape and range
        if isinstance(problem.family, PredictsLabels):
            batch = replace_field(replace_field(query, "y", targets), "x", build_inputs(problem, x))
            return problem.family.predict_labels(outputs, batch)
        return choose_predictions(targets, outputs)


def make_evaluation_job(tree: Mapping[str, Any], overrides: Sequence[str]) -> tuple[Job, int | None]:
    """Return a run's job as evaluation uses it, and the number of inner steps that the user asked for.

    `algorithm.inner_steps` is not changed in the job: theta may hold a learned rate for every trained step.
    """
    asked = apply_overrides({}, overrides)
    asked_run = asked.get("run")
    if not isinstance(asked_run, Mapping):
        asked_run = {}
    # a run that trained on GPUs uses them again if there are any: here, or on the workers that were asked for
    has_gpus = bool(asked_run.get("workers")) or torch.cuda.is_available()
    gpus = tree["run"]["gpus_per_worker"] if has_gpus else 0
    compute = {**tree["compute"], "compile": False}  # evaluation has no meta-gradient to compile
    if compute["precision"] == "tf32" and asked_run.get("gpus_per_worker", gpus) == 0:
        compute["precision"] = "float32"
    local = remove_workers(tree)
    run = {**local["run"], "gpus_per_worker": gpus}
    kept = [_use_evaluation_key(text, tree["tasks"]) for text in overrides]
    kept = [text for text in kept if not text.startswith("algorithm.inner_steps=")]
    job = Job.parse({**local, "run": run, "compute": compute, "sweep": None}, kept)
    if job.compute.execution == "measure":
        raise InputError("compute.execution: got measure, which is for training, expected auto, loop or vmap")
    return job, _read_inner_steps(asked)


def _use_evaluation_key(override: str, tasks: Mapping[str, Any]) -> str:
    """Return `tasks.eval_ways=3` for `tasks.ways=3`: the model's head keeps the ways that it was trained with."""
    for key in EVALUATION_KEYS:
        if f"eval_{key}" in tasks and override.startswith(f"tasks.{key}="):
            return override.replace(f"tasks.{key}=", f"tasks.eval_{key}=", 1)
    return override


def _read_inner_steps(asked: Mapping[str, Any]) -> int | None:
    steps = asked.get("algorithm", {}).get("inner_steps")
    if steps is None:
        return None
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise InputError(f"algorithm.inner_steps: got {steps!r}, expected an integer of at least 0")
    return steps


def _restrict_ways(problem: Problem, ways: int) -> Algorithm:
    """Return the algorithm for a task of fewer classes than outputs. The other outputs are masked."""
    if isinstance(problem.family, ScoresPerSplit):
        return with_score(problem.algorithm, ClassificationScore(ways))
    if ways > problem.family.out_features:
        raise InputError(
            f"y: got {ways} classes, expected at most {problem.family.out_features} (the model's outputs), "
            "or targets as floats"
        )
    return problem.algorithm
