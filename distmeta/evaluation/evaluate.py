"""Evaluation on unseen tasks: scores before adaptation and after each inner step, pictures, a film."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distmeta.compute.gradient import Execution
from distmeta.compute.scoring import score_tasks
from distmeta.compute.vectors import Layout
from distmeta.errors import InputError
from distmeta.evaluation.figures import check_video, draw_curve, draw_tasks, film, send
from distmeta.evaluation.learner import Learner, load
from distmeta.evaluation.predictions import write_predictions
from distmeta.files import to_json_value
from distmeta.protocols import Batch, Episode
from distmeta.runtime.pool import open_pool
from distmeta.runtime.problem import with_score
from distmeta.runtime.scores import evaluate_tasks, mean_metrics, primary


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
    curve_ci95: dict[str, list[float | None]]
    """The interval of each number in `curve`."""


def evaluate(
    checkpoint: str | Path,
    overrides: Sequence[str] = (),
    episodes: str | Path | None = None,
    predictions: str | Path | None = None,
    figures: str | Path | None = None,
    video: str | Path | None = None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> Evaluation:
    """Adapts to unseen tasks of the test split, or to fixed episodes, and scores before and after.

    Args:
        checkpoint: a run folder (its latest checkpoint), RUN/checkpoints/best, or a checkpoint.
        overrides: `key=value` on the run's job: `tasks.shots=5`, `algorithm.inner_steps=10`, `run.eval_tasks=1000`.
            Evaluation runs in this process unless `run.workers` is among them.
        episodes: Parquet file of fixed episodes (see `tasks.episodes`).
        predictions: Parquet file to write: episode, row, label, prediction.
        figures: folder to write: evaluation.json, curve.png, the task family's own figures. They go to the run's
            artifacts in MLflow too, as the video does; an MLflow that is away is said, and is no error.
        video: .gif or .mp4 to write of one test task before adaptation and after each inner step.

    Raises:
        InputError: no such checkpoint, impossible overrides, a file of another schema, tasks that cannot be filmed.
    """
    learner = load(checkpoint, overrides, say=say)
    if predictions is not None and not Path(predictions).absolute().parent.is_dir():
        raise InputError(f"--predictions: the folder of {str(predictions)!r} does not exist")
    if video is not None:
        check_video(learner, Path(video))
    if figures is not None:
        _make_folder(Path(figures))
    if episodes is not None:
        found = _fixed_episodes(learner, episodes, predictions)
    else:
        found = _unseen_tasks(learner, predictions)
    drawn = [] if figures is None else _draw(learner, found, episodes is None, overrides, Path(figures))
    if video is not None:
        film(learner, Path(video))
        drawn.append(Path(video))
    if drawn:
        send(learner, drawn, say)
    return found


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--figures: got {str(folder)!r}, where no folder can be made ({error})") from None


def _draw(
    learner: Learner, found: Evaluation, drawn_tasks: bool, overrides: Sequence[str], folder: Path
) -> list[Path]:
    """evaluation.json, curve.png where there is a curve, and the family's figures where its own tasks were scored."""
    record = {"step": learner.checkpoint.progress.step, "overrides": list(overrides), **asdict(found)}
    paths = [folder / "evaluation.json"]
    paths[0].write_text(
        json.dumps(to_json_value(record), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    metric = found.main.removesuffix("_after")
    if len(found.curve[metric]) > 1:
        paths.append(folder / "curve.png")
        draw_curve(metric, found.curve[metric], found.curve_ci95[metric], found.tasks, paths[-1])
    return paths + (draw_tasks(learner, folder) if drawn_tasks else [])


def _unseen_tasks(learner: Learner, predictions: str | Path | None) -> Evaluation:
    """Scores the first tasks of the test split, in the job's pool."""
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
        rows = [pair for r in results if r.predictions is not None for pair in r.predictions]
        write_predictions(predictions, list(range(len(rows))), rows)
    return _evaluation(columns, mean_metrics(results, every=True))


def _fixed_episodes(learner: Learner, path: str | Path, predictions: str | Path | None) -> Evaluation:
    """Scores the episodes of a file one by one: each may have its own ways and shots."""
    from distmeta.tasks.few_shot import ClassificationScore
    from distmeta.tasks.fixed_episodes import read_episodes

    problem = learner.problem
    columns: dict[str, list[np.ndarray]] = {}
    numbers, rows = [], []
    adapts = problem.algorithm.inner_steps > 0
    for fixed in read_episodes(str(path), tuple(problem.family.in_shape), _preparation(learner)):
        ways = len(fixed.labels)
        scorer = ClassificationScore(ways)
        episode = Episode(_stacked(fixed.support, problem.device), _stacked(fixed.query, problem.device))
        algorithm = with_score(problem.algorithm, scorer)
        with learner.ready():
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
        write_predictions(predictions, numbers, rows)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    means: dict[str, float | None] = {"loss_before": None}
    means |= {name: float(np.mean(column)) for name, column in joined.items() if column.ndim == 1}
    return _evaluation(joined, means)


def _preparation(learner: Learner) -> Any:
    from distmeta.tasks.image_preparation import Preparation

    stored = (learner.checkpoint.examples or {}).get("preparation")
    return None if stored is None else Preparation.from_dict(stored)


def _stacked(batch: Batch, device: torch.device) -> Batch:
    return Batch(batch.x[None].to(device), batch.y[None].to(device))


def _evaluation(columns: Mapping[str, np.ndarray], means: dict[str, float | None]) -> Evaluation:
    main = primary(means)[0]
    curves = {
        name.removesuffix("_curve"): column for name, column in columns.items() if name.endswith("_curve")
    }
    for name in list(means):
        if name.endswith("_after"):
            means.setdefault(name.removesuffix("_after") + "_before", None)
    order = sorted(
        means,
        key=lambda name: (name.partition("_")[0] != "loss", name.partition("_")[0], name.endswith("after")),
    )
    return Evaluation(
        len(columns[main]),
        {name: means[name] for name in order},
        _interval(columns[main]),
        main,
        {name: [float(v) for v in column.mean(0)] for name, column in curves.items()},
        {name: [_interval(values) for values in column.T] for name, column in curves.items()},
    )


def _interval(values: np.ndarray) -> float | None:
    """1.96·s/√tasks; None for fewer than two, NaN where a task diverged."""
    if len(values) < 2:
        return None
    with np.errstate(invalid="ignore"):
        return 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
