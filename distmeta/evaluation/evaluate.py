"""Evaluation on test tasks: scores before adaptation and after each inner step, figures, a video."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distmeta.compute.execution import Execution
from distmeta.compute.predictions import Predictions
from distmeta.compute.scoring import Scores, score_tasks
from distmeta.compute.vectors import Layout
from distmeta.config.job import Job
from distmeta.config.parts import build_part
from distmeta.errors import InputError, shorten_list
from distmeta.evaluation.figures import check_video, draw_curve, draw_tasks, write_video
from distmeta.evaluation.learner import Learner, load
from distmeta.evaluation.predictions import write_predictions
from distmeta.files import to_json_value
from distmeta.protocols import Batch, Episode, NamesClasses, TaskFamily
from distmeta.runtime.parameter_server import mean_metrics
from distmeta.runtime.pool import open_pool
from distmeta.runtime.problem import Problem, with_score
from distmeta.runtime.scores import (
    describe_harm,
    evaluate_tasks,
    find_primary_metric,
    join_metrics,
    split_curves,
)
from distmeta.tasks.few_shot import ClassificationScore
from distmeta.tasks.image_preparation import Preparation
from distmeta.tracking.trackers import attach_files, name_trackers

if TYPE_CHECKING:
    from distmeta.tasks.fixed_episodes import FixedEpisode


@dataclass(frozen=True)
class Evaluation:
    """Scores before and after adaptation."""

    tasks: int
    """Number of tasks that were scored."""
    figures: dict[str, float | None]
    """`loss_before`, `loss_after`, `accuracy_*`, `return_*`: means over tasks."""
    ci95: float | None
    """Half the 95 % interval of `main`: 1.96·s/√tasks, with s the standard deviation over tasks. None for one task."""
    main: str
    """The figure that the interval is about."""
    curve: dict[str, list[float]]
    """Each metric's mean after 0, 1, … inner steps."""
    curve_ci95: dict[str, list[float | None]]
    """The interval of each number in `curve`."""
    seen_classes: int = 0
    """How many of the tested classes were trained on."""
    warning: str | None = None
    """A line that says so, if adaptation makes the scores worse."""


def evaluate(
    checkpoint: str | Path,
    overrides: Sequence[str] = (),
    episodes: str | Path | None = None,
    predictions: str | Path | None = None,
    figures: str | Path | None = None,
    video: str | Path | None = None,
    report: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> Evaluation:
    """Adapt to unseen tasks of the test split, or to fixed episodes, and score before and after.

    Args:
        checkpoint: a run folder (its latest checkpoint), RUN/checkpoints/best, or a checkpoint.
        overrides: `key=value` on the run's job: `tasks.shots=5`, `algorithm.inner_steps=10`, `run.eval_tasks=1000`.
            Evaluation runs in this process unless `run.workers` is among them.
        episodes: Parquet file of fixed episodes (see `tasks.fixed_episodes`).
        predictions: Parquet file to write: episode, row, label, prediction.
        figures: folder to write: evaluation.json, curve.png, the task family's own figures. The run's trackers get them
            and the video too. If a tracker cannot be reached, that is reported and is no error.
        video: .gif or .mp4 to write: one test task before adaptation and after each inner step.
        report: is told what the user should know.

    Raises:
        InputError: there is no such checkpoint, an override is impossible, the file has another schema, or the tasks
            cannot be filmed.
    """
    learner = load(checkpoint, overrides, report=report)
    _prepare_outputs(learner, predictions, figures, video)
    seen = _find_seen_classes(learner) if episodes is None else []
    if seen:
        total = len(_list_classes(learner.problem.family, "test"))
        report(
            f"tasks.test: {len(seen)} of {total} tested classes were trained on ({shorten_list(seen)}), so these are "
            "not scores of unseen tasks"
        )
    if episodes is None:
        evaluation = replace(_score_test_tasks(learner, predictions), seen_classes=len(seen))
    else:
        evaluation = _score_fixed_episodes(learner, episodes, predictions)
    if evaluation.warning is not None:
        report(evaluation.warning)
    files: list[Path] = []
    if figures is not None:
        files += _write_record(learner, evaluation, overrides, Path(figures))
        if episodes is None:
            files += draw_tasks(learner, Path(figures))
    if video is not None:
        write_video(learner, Path(video))
        files.append(Path(video))
    if files:
        trackers = name_trackers(learner.problem.job.trackers)
        attach_files(trackers, learner.checkpoint.progress.tracking_ids, files, "evaluation", report)
    return evaluation


def _prepare_outputs(
    learner: Learner, predictions: str | Path | None, figures: str | Path | None, video: str | Path | None
) -> None:
    """Raise InputError if one of the outputs cannot be written. Make the folder of figures."""
    if predictions is not None and not Path(predictions).absolute().parent.is_dir():
        raise InputError(f"--predictions: the folder of {str(predictions)!r} does not exist")
    if video is not None:
        check_video(learner, Path(video))
    if figures is not None:
        _make_folder(Path(figures))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--figures: got {str(folder)!r}, expected a folder that can be made ({error})"
        ) from None


def _write_record(
    learner: Learner, evaluation: Evaluation, overrides: Sequence[str], folder: Path
) -> list[Path]:
    """Write evaluation.json, and curve.png if there is more than one point. Return the files."""
    record = {
        "step": learner.checkpoint.progress.step,
        "overrides": list(overrides),
        **asdict(evaluation),
    }
    text = json.dumps(to_json_value(record), indent=1, ensure_ascii=False)
    paths = [folder / "evaluation.json"]
    paths[0].write_text(text + "\n", encoding="utf-8")
    metric = evaluation.main.removesuffix("_after")
    means = evaluation.curve[metric]
    if len(means) > 1:
        path = folder / "curve.png"
        draw_curve(metric, means, evaluation.curve_ci95[metric], evaluation.tasks, path)
        paths.append(path)
    return paths


def _list_classes(family: TaskFamily, split: str) -> list[str]:
    return list(family.class_names.get(split, [])) if isinstance(family, NamesClasses) else []


def _find_seen_classes(learner: Learner) -> list[str]:
    """Return the tested classes that the run was trained on, which overrides make possible (`tasks.test=[…]`)."""
    tested = _list_classes(learner.problem.family, "test")
    stored = learner.checkpoint.job
    if not tested or stored["tasks"] == learner.problem.job.to_dict()["tasks"]:
        return []  # the splits of one family are disjoint
    section = Job.parse({**stored, "sweep": None}).tasks
    trained = set(_list_classes(build_part(section.part, section.options, {}), "train"))
    return [name for name in tested if name in trained]


def _score_test_tasks(learner: Learner, predictions: str | Path | None) -> Evaluation:
    """Score the first tasks of the test split, in the job's pool."""
    problem = learner.problem
    layout = Layout.from_theta(learner.theta)
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
    columns = join_metrics(results)
    if predictions is not None:
        rows = [row for result in results for row in result.predictions or []]
        write_predictions(predictions, list(range(len(rows))), rows)
    return _summarize(columns, mean_metrics(results, over_all=True))


def _score_fixed_episodes(learner: Learner, path: str | Path, predictions: str | Path | None) -> Evaluation:
    """Score the episodes of a file one by one, because each may have its own ways and shots."""
    from distmeta.tasks.fixed_episodes import read_episodes

    problem = learner.problem
    in_shape = tuple(problem.family.in_shape)
    adapts = problem.algorithm.inner_steps > 0
    parts: dict[str, list[np.ndarray]] = {}
    numbers: list[int] = []
    rows: list[Predictions] = []
    for fixed in read_episodes(str(path), in_shape, _read_preparation(learner)):
        scores = _score_fixed_episode(learner, fixed)
        for name, column in split_curves(scores.metrics, adapts).items():
            parts.setdefault(name, []).append(column)
        labels = np.asarray(fixed.labels)
        outputs_QW = scores.outputs[0][:, : len(labels)]
        predicted = outputs_QW.argmax(-1).cpu().numpy()
        numbers.append(fixed.episode)
        rows.append(Predictions({"": labels[fixed.query.y.numpy()]}, {"": labels[predicted]}))
    if predictions is not None:
        write_predictions(predictions, numbers, rows)
    columns = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    means: dict[str, float | None] = {"loss_before": None}
    means |= {name: float(np.mean(column)) for name, column in columns.items() if column.ndim == 1}
    return _summarize(columns, means)


def _score_fixed_episode(learner: Learner, fixed: FixedEpisode) -> Scores:
    """Adapt to one episode and score it after every inner step."""
    problem = learner.problem
    score = ClassificationScore(len(fixed.labels))
    episode = Episode(_add_task_axis(fixed.support, problem), _add_task_axis(fixed.query, problem))
    with learner.inference_settings():
        return score_tasks(
            with_score(problem.algorithm, score),
            score,
            learner.theta,
            episode,
            np.zeros(1, np.uint64),
            Execution("loop", 1),
            learner.steps,
            outputs=True,
        )


def _read_preparation(learner: Learner) -> Preparation | None:
    """Return how the checkpoint's images were prepared, or None if its tasks are not images."""
    stored = (learner.checkpoint.examples or {}).get("preparation")
    return None if stored is None else Preparation.from_dict(stored)


def _add_task_axis(batch: Batch, problem: Problem) -> Batch:
    return Batch(batch.x[None].to(problem.device), batch.y[None].to(problem.device))


def _summarize(columns: Mapping[str, np.ndarray], means: Mapping[str, float | None]) -> Evaluation:
    """Return the evaluation.

    Args:
        columns: `*_curve` [tasks, steps + 1], `*_after` [tasks] and perhaps `*_before` [tasks].
        means: of the columns with one number per task.
    """
    figures = dict(means)
    for name in means:
        if name.endswith("_after"):
            figures.setdefault(name.removesuffix("_after") + "_before", None)
    main = find_primary_metric(means)[0]
    curves = {
        name.removesuffix("_curve"): column for name, column in columns.items() if name.endswith("_curve")
    }
    return Evaluation(
        tasks=len(columns[main]),
        figures={name: figures[name] for name in sorted(figures, key=_figure_order)},
        ci95=_half_interval(columns[main]),
        main=main,
        curve={name: [float(mean) for mean in column.mean(0)] for name, column in curves.items()},
        curve_ci95={name: [_half_interval(values) for values in column.T] for name, column in curves.items()},
        warning=describe_harm(columns, "these tasks"),
    )


def _figure_order(name: str) -> tuple[bool, str, bool]:
    """Sort key: the loss first, then the other metrics by name; before adaptation, then after it."""
    metric = name.partition("_")[0]
    return metric != "loss", metric, name.endswith("after")


def _half_interval(values: np.ndarray) -> float | None:
    """Return 1.96·s/√tasks; None for fewer than two tasks, NaN if a task diverged."""
    if len(values) < 2:
        return None
    with np.errstate(invalid="ignore"):
        return 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
