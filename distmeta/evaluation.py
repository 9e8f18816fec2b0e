"""Evaluation on unseen tasks, and deployment: adapt to a task, then predict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distmeta.compute.flat import Layout
from distmeta.compute.shard import Execution, score_tasks
from distmeta.compute.unroll import detached, unroll
from distmeta.core import Algorithm, Batch, Episode, InputError, State, Theta, widened
from distmeta.job import Job
from distmeta.jobfile import override
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.checkpoint import Checkpoint
from distmeta.runtime.pool import open_pool
from distmeta.runtime.problem import Problem, build, numerics_of, with_score
from distmeta.runtime.scores import evaluate_tasks, mean_metrics, primary
from distmeta.runtime.server import check_theta
from distmeta.runtime.worker import evaluating


@dataclass(frozen=True)
class Evaluation:
    """Scores before and after adaptation."""

    tasks: int
    figures: dict[str, float | None]
    """`loss_before`, `loss_after`, `accuracy_*`, `return_*`: means over tasks."""
    ci95: float | None
    """1.96·s/√tasks of `main`, s the standard deviation over tasks; null for fewer than two."""
    main: str
    """The figure the interval belongs to."""
    curve: dict[str, list[float]]
    """Each metric after 0, 1, … inner steps."""


def evaluate(
    checkpoint: str | Path,
    overrides: Sequence[str] = (),
    episodes: str | Path | None = None,
    predictions: str | Path | None = None,
) -> Evaluation:
    """Adapts to unseen tasks of the test split, or to fixed episodes, and scores before and after.

    Args:
        checkpoint: a run folder (its latest checkpoint), RUN/checkpoints/best, or a checkpoint.
        overrides: `key=value` on the run's job: `tasks.shots=5`, `algorithm.inner_steps=10`, `run.eval_tasks=1000`.
            Evaluation runs in this process unless `run.workers` is among them.
        episodes: Parquet file of fixed episodes (see `tasks.episodes`).
        predictions: Parquet file to write: episode, row, label, prediction.

    Raises:
        InputError: no such checkpoint, impossible overrides, a file of another schema.
    """
    learner = load(checkpoint, overrides)
    if predictions is not None and not Path(predictions).absolute().parent.is_dir():
        raise InputError(f"--predictions: the folder of {str(predictions)!r} does not exist")
    if episodes is not None:
        return _fixed_episodes(learner, episodes, predictions)
    problem = learner.problem
    layout = Layout.of(learner.theta)
    pool = open_pool(problem, layout, lambda text: None)
    try:
        results = evaluate_tasks(
            problem,
            pool,
            layout.flatten(learner.theta),
            "test",
            problem.job.run.eval_tasks,
            lambda: None,
            learner.steps,
            outputs=predictions is not None,
        )
    finally:
        pool.close()
    columns = {name: np.concatenate([r.metrics[name] for r in results]) for name in results[0].metrics}
    if predictions is not None:
        rows = [
            pair for r in results if r.predictions is not None for pair in zip(*r.predictions, strict=True)
        ]
        _write_predictions(predictions, list(range(len(rows))), rows)
    return _evaluation(columns, mean_metrics(results, every=True))


def load(checkpoint: str | Path, overrides: Sequence[str] = ()) -> Learner:
    """A trained meta-learner, ready to adapt: `load(path).adapt(x, y)(x_query)`.

    Raises:
        InputError: no such checkpoint, or a damaged one.
    """
    stored = checkpoints.load(checkpoint)
    trained = Job.parse(stored.job).at(stored.progress.step - 1)  # with the values of the last step
    job, steps = _evaluation_job(trained.tree(), overrides)
    constants = {name: value.numpy() for name, value in stored.constants.items()}
    problem = build(job, constants, examples=stored.examples)
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
        with self._ready():
            state = detached(unroll(algorithm, self.theta, Batch(x, y), steps, detach=True))
        return Adapted(self, algorithm, state, classes)

    @contextmanager
    def _ready(self) -> Iterator[None]:
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
        with self.learner._ready(), torch.no_grad():
            outputs = widened(self.algorithm.predict(self.learner.theta, self.state, _inputs(x, problem)))
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
    asked = override({}, overrides)
    kept = [text for text in overrides if not text.startswith("algorithm.inner_steps=")]
    for key in ("ways", "shots", "queries", "support_domain", "query_domain"):
        if (
            f"eval_{key}" in tree["tasks"]
        ):  # evaluation's own: the head keeps the ways that it was trained with
            kept = [text.replace(f"tasks.{key}=", f"tasks.eval_{key}=", 1) for text in kept]
    gpus = tree["run"]["gpus_per_worker"] if torch.cuda.is_available() else 0  # trained there, evaluated here
    compute = {**tree["compute"], "compile": False}  # evaluation takes no meta-gradient
    if gpus == 0 and compute["precision"] == "tf32":
        compute["precision"] = "float32"
    run = {**tree["run"], "workers": 0, "gpus_per_worker": gpus}
    job = Job.parse({**tree, "run": run, "compute": compute, "sweep": None}, kept)
    if job.compute.execution == "measure":
        raise InputError("compute.execution: got measure, which is for training, expected auto, loop or vmap")
    steps = asked.get("algorithm", {}).get("inner_steps")
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 0):
        raise InputError(f"algorithm.inner_steps: got {steps!r}, expected an integer of at least 0")
    return job, steps


def _fixed_episodes(learner: Learner, path: str | Path, predictions: str | Path | None) -> Evaluation:
    """Scores the episodes of a file one by one: each may have its own ways and shots."""
    from distmeta.tasks.episodes import read_episodes
    from distmeta.tasks.fewshot import ClassificationScore

    problem = learner.problem
    columns: dict[str, list[np.ndarray]] = {}
    numbers, rows = [], []
    adapts = problem.algorithm.inner_steps > 0
    for fixed in read_episodes(str(path), tuple(problem.family.in_shape), _preparation(learner)):
        ways = len(fixed.labels)
        scorer = ClassificationScore(ways)
        episode = Episode(_stacked(fixed.support, problem.device), _stacked(fixed.query, problem.device))
        algorithm = with_score(problem.algorithm, scorer)
        with learner._ready():
            scores = score_tasks(
                algorithm,
                scorer,
                learner.theta,
                episode,
                np.zeros(1, np.uint64),
                Execution("loop", 1),
                learner.steps,
                True,
            )
        for name, curve in scores.metrics.items():
            columns.setdefault(f"{name}_curve", []).append(curve)
            columns.setdefault(f"{name}_after", []).append(curve[:, -1])
            if adapts:
                columns.setdefault(f"{name}_before", []).append(curve[:, 0])
        labels = np.asarray(fixed.labels)
        numbers.append(fixed.episode)
        predicted = scores.outputs[0][:, :ways].argmax(-1).cpu().numpy()
        rows.append((labels[fixed.query.y.numpy()], labels[predicted]))
    if predictions is not None:
        _write_predictions(predictions, numbers, rows)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    means: dict[str, float | None] = {"loss_before": None}
    means |= {name: float(np.mean(column)) for name, column in joined.items() if column.ndim == 1}
    return _evaluation(joined, means)


def _with_ways(problem: Problem, ways: int) -> Any:
    """The algorithm for a task of so many classes: the head's other outputs are masked, as in fixed episodes."""
    from distmeta.tasks.fewshot import ClassificationScore

    if hasattr(problem.family, "scorer"):
        return with_score(problem.algorithm, ClassificationScore(ways))
    if ways > problem.family.out_features:
        raise InputError(
            f"y: got {ways} classes, expected at most {problem.family.out_features} (the model's outputs), "
            "or targets as floats"
        )
    return problem.algorithm


def _preparation(learner: Learner) -> Any:
    from distmeta.tasks.images import Preparation

    stored = (learner.checkpoint.examples or {}).get("preparation")
    return None if stored is None else Preparation.from_dict(stored)


def _stacked(batch: Batch, device: torch.device) -> Batch:
    return Batch(batch.x[None].to(device), batch.y[None].to(device))


def _evaluation(columns: Mapping[str, np.ndarray], means: dict[str, float | None]) -> Evaluation:
    main = primary(means)[0]
    values = columns[main]
    spread = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    curve = {
        name.removesuffix("_curve"): [float(v) for v in column.mean(0)]
        for name, column in columns.items()
        if name.endswith("_curve")
    }
    for name in list(means):
        if name.endswith("_after"):
            means.setdefault(name.removesuffix("_after") + "_before", None)
    order = sorted(
        means,
        key=lambda name: (name.partition("_")[0] != "loss", name.partition("_")[0], name.endswith("after")),
    )
    return Evaluation(len(values), {name: means[name] for name in order}, spread, main, curve)


def _column(parts: Sequence[np.ndarray]) -> Any:
    """One number a row, or a list where a target has several."""
    values = np.concatenate([part.reshape(len(part), -1) for part in parts])
    return values[:, 0] if values.shape[1] == 1 else values.tolist()


def _write_predictions(
    path: str | Path, numbers: Sequence[int], rows: Sequence[tuple[np.ndarray, np.ndarray]]
) -> None:
    """A Parquet of episode, row, label, prediction: one line a query row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes = [len(label) for label, _ in rows]
    table = pa.table(
        {
            "episode": np.repeat(np.asarray(numbers, np.int64), sizes),
            "row": np.concatenate([np.arange(size) for size in sizes]),
            "label": _column([label for label, _ in rows]),
            "prediction": _column([predicted for _, predicted in rows]),
        }
    )
    pq.write_table(table, path)


__all__ = ["Adapted", "Evaluation", "Learner", "evaluate", "load"]
