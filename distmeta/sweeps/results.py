"""What a sweep found: its trials as a table, the best one as a job, and two figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distmeta.config.job import Job
from distmeta.config.yaml_text import parse_yaml
from distmeta.runtime import checkpoint as checkpoints
from distmeta.sweeps.trial import RUN, STEP, failure_path, find_score, read_evaluations, trial_name

DPI = 120
ERROR_LENGTH = 300
"""Characters of an error of Tune's that the table has."""
BEST_COLOR = "C3"
OTHER_COLOR = "0.6"


class TrialResult(NamedTuple):
    """One trial, as far as it is."""

    name: str
    status: str
    """finished, stopped (by the scheduler or the budget), failed, unfinished."""
    reason: str
    """Why it failed; else empty."""
    values: dict[str, Any]
    """The values of the searched keys; if they changed during the trial, those of its last step."""
    steps: int
    """Steps taken."""
    metric: str
    value: float | None
    """The best value of the metric among its evaluations; None before the first."""
    sign: int
    """1: more is better; -1: less is better."""
    best_step: int | None
    run: Path | None
    """The run folder; None: there is none."""
    tracking_ids: Mapping[str, str]
    """The run's id in each tracker's store, by the tracker's name."""
    curve: tuple[tuple[int, float], ...]
    """(step, value) of each evaluation."""


def collect_trials(results: Any, folder: Path, job: Job) -> list[TrialResult]:
    """Return the trials of Tune's result grid, sorted by name."""
    trials = [_read_trial(result, folder, job) for result in results]
    return sorted(trials, key=lambda trial: trial.name)


def _read_trial(result: Any, folder: Path, job: Job) -> TrialResult:
    assert job.sweep is not None
    name = trial_name(Path(result.path).name)
    last = result.metrics or {}
    run = Path(last.get(RUN, ""))
    if run.name.removeprefix(name)[:1] not in ("", "-"):
        last = {}  # the trial took over another one's checkpoint: the last report is that trial's
    if RUN not in last:
        run = folder / "trials" / name
    step = int(last.get(STEP, 0))
    tracking_ids: Mapping[str, str] = {}
    if (run / "checkpoints" / "latest").exists():
        tracking_ids = checkpoints.load(run).progress.tracking_ids
    rows = [row for row in read_evaluations(run) if row["step"] <= step]
    scores = [(row["step"], find_score(row, job.sweep.metric, job.sweep.mode)) for row in rows]
    best_step, best = max(
        scores, key=lambda item: (item[1].sign * item[1].value, -item[0]), default=(None, None)
    )
    reason = _read_failure(result, folder, name)
    if reason:
        status = "failed"
    elif step >= job.trial_steps:
        status = "finished"
    else:
        status = "stopped" if last.get("done") else "unfinished"
    return TrialResult(
        name=name,
        status=status,
        reason=reason,
        values=dict(result.config["values"]),
        steps=step,
        metric=best.metric if best else "",
        value=best.value if best else None,
        sign=best.sign if best else 0,
        best_step=best_step,
        run=run if run.exists() else None,
        tracking_ids=tracking_ids,
        curve=tuple((step, score.value) for step, score in scores),
    )


def _read_failure(result: Any, folder: Path, name: str) -> str:
    """Return why a trial failed, as one line; empty if it did not."""
    path = failure_path(folder, name)
    if path.exists():
        return path.read_text(encoding="utf-8").partition("\n")[0]
    if result.error is None:
        return ""
    return " ".join(str(result.error).split())[-ERROR_LENGTH:] or type(result.error).__name__


def find_best(trials: Sequence[TrialResult]) -> TrialResult | None:
    """Return the trial with the best value, the first of equals. A failed trial counts with what it reached."""
    scored = [trial for trial in trials if trial.value is not None and trial.run is not None]
    return max(scored, key=lambda trial: trial.sign * (trial.value or 0.0), default=None)


def build_best_job(trial: TrialResult, job: Job) -> Job:
    """Return the job that trains the best trial again, at full length. Its evaluations equal the trial's to the bit."""
    assert trial.run is not None
    tree = parse_yaml((trial.run / "job.yaml").read_text(encoding="utf-8"), str(trial.run))
    asked = job.to_dict()
    for key in ("steps", "checkpoint_every", "keep", "address"):
        tree["run"][key] = asked["run"][key]
    tree["run"]["name"] = None  # the job's own name is taken by the sweep's folder
    return Job.parse(tree | {"output": asked["output"], "tracking": asked["tracking"], "sweep": None})


def write_table(trials: Sequence[TrialResult], path: Path) -> None:
    """Write trials.parquet, with a row per trial and a column per key of the space; and trials.json, the same table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = list(trials[0].values) if trials else []
    trackers = sorted({name for trial in trials for name in trial.tracking_ids})
    rows = [
        {
            "trial": trial.name,
            "status": trial.status,
            **{key: trial.values[key] for key in keys},
            "metric": trial.metric,
            "value": trial.value,
            "step": trial.best_step,
            "steps": trial.steps,
            "run": str(trial.run or ""),
            **{f"{name}_run": trial.tracking_ids.get(name) for name in trackers},
            "reason": trial.reason,
        }
        for trial in trials
    ]
    names = list(rows[0]) if rows else []
    columns = {name: _to_column([row[name] for row in rows]) for name in names}
    pq.write_table(pa.table(columns), path)
    table = {"columns": names, "data": [list(row.values()) for row in rows]}
    path.with_suffix(".json").write_text(json.dumps(table), encoding="utf-8")


def _to_column(values: list[Any]) -> list[Any]:
    """Return the values unchanged if they have one simple type, else as JSON texts. A `choice` may mix anything."""
    types = {type(value) for value in values if value is not None}
    is_simple = len(types) <= 1 and types <= {int, float, str, bool}
    return values if is_simple else [json.dumps(value) for value in values]


def draw_figures(trials: Sequence[TrialResult], job: Job, folder: Path) -> list[Path]:
    """Draw curves.png, the metric against steps with a line per trial; and values.png, the metric against the values.

    values.png shows the first two searched keys that are numbers. It is not drawn if there are none.
    """
    assert job.sweep is not None
    best = find_best(trials)
    if best is None:
        return []
    scored = [trial for trial in trials if trial.value is not None]
    paths = [folder / "curves.png"]
    _draw_curves(scored, best, job.name, paths[0])
    numeric_keys = [key for key in job.sweep.space if all(_is_number(trial.values[key]) for trial in scored)]
    if numeric_keys:
        paths.append(folder / "values.png")
        _draw_values(scored, best, numeric_keys[:2], job.sweep.space, paths[1])
    return paths


def _draw_curves(trials: Sequence[TrialResult], best: TrialResult, title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for trial in trials:
        steps, values = zip(*trial.curve, strict=True)
        if trial is best:
            axes.plot(steps, values, color=BEST_COLOR, linewidth=2.0, marker=".", zorder=3)
        else:
            axes.plot(steps, values, color=OTHER_COLOR, linewidth=0.9, marker=".", zorder=2)
    axes.set(xlabel="step", ylabel=best.metric, title=f"{title}: {len(trials)} trials, best {best.name}")
    all_positive = all(value > 0 for trial in trials for _, value in trial.curve)
    if all_positive and best.sign < 0:
        axes.set_yscale("log")
    figure.savefig(path, dpi=DPI)


def _draw_values(
    trials: Sequence[TrialResult], best: TrialResult, keys: list[str], space: Mapping[str, Any], path: Path
) -> None:
    """Draw the metric against one searched key, or as the color of points over two."""
    from matplotlib.figure import Figure

    assert best.value is not None
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    scores = [trial.value for trial in trials if trial.value is not None]
    xs = [trial.values[keys[0]] for trial in trials]
    if len(keys) == 2:
        ys = [trial.values[keys[1]] for trial in trials]
        most_steps = max(trial.steps for trial in trials)
        sizes = [20 + 60 * trial.steps / most_steps for trial in trials]
        points = axes.scatter(xs, ys, c=scores, s=sizes, cmap="viridis", edgecolors="k", linewidths=0.4)
        figure.colorbar(points, label=best.metric)
        axes.plot(best.values[keys[0]], best.values[keys[1]], "r*", markersize=14, label=f"best: {best.name}")
        axes.legend()
        axes.set(xlabel=keys[0], ylabel=keys[1], title="larger: trained for longer")
        axes.set_yscale(_choose_scale(space[keys[1]]))
    else:
        axes.plot(xs, scores, "o")
        axes.plot(best.values[keys[0]], best.value, "r*", markersize=14)
        axes.set(xlabel=keys[0], ylabel=best.metric)
    axes.set_xscale(_choose_scale(space[keys[0]]))
    figure.savefig(path, dpi=DPI)


def _choose_scale(domain: Any) -> str:
    return "log" if domain.kind == "loguniform" else "linear"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
