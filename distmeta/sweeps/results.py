"""What a sweep found: its trials as a table, the best one as a job, and two pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distmeta.config.job import Job
from distmeta.config.yaml_text import parse_yaml
from distmeta.runtime import checkpoint as checkpoints
from distmeta.sweeps.trial import RUN, STEP, evaluations_of, failure_file, figure_of, name_of


class Trial(NamedTuple):
    """One trial, as it stands."""

    name: str
    status: str
    """finished, stopped (by the scheduler or the budget), failed, unfinished."""
    reason: str
    """Why it failed; else empty."""
    values: dict[str, Any]
    """The point's; those of its last step where they were perturbed."""
    steps: int
    """Spent."""
    metric: str
    value: float | None
    """The best figure of its evaluations; None before the first."""
    sign: int
    """1: more is better; −1: less."""
    best_step: int | None
    run: Path | None
    tracking_ids: Mapping[str, str]
    """The run's id in each tracker's store, by the tracker's name."""
    curve: tuple[tuple[int, float], ...]
    """Steps and figures of its evaluations."""


def trials_of(results: Any, folder: Path, job: Job) -> list[Trial]:
    """The trials of Tune's result grid, by name."""
    found = [_trial(result, folder, job) for result in results]
    return sorted(found, key=lambda trial: trial.name)


def _trial(result: Any, folder: Path, job: Job) -> Trial:
    assert job.sweep is not None
    last = result.metrics or {}
    name = name_of(Path(result.path).name)  # after an exploit, what was reported last is the other trial's
    run = Path(last.get(RUN, ""))
    if run.name.removeprefix(name)[:1] not in ("", "-"):
        run, last = folder / "trials" / name, {}
    elif RUN not in last:
        run = folder / "trials" / name
    tracking_ids: Mapping[str, str] = {}
    if (run / "checkpoints" / "latest").exists():
        tracking_ids = checkpoints.load(run).progress.tracking_ids
    rows = [row for row in evaluations_of(run) if row["step"] <= last.get(STEP, 0)]
    figures = [(row["step"], *figure_of(row, job.sweep.metric, job.sweep.mode)) for row in rows]
    best = max(figures, key=lambda figure: (figure[3] * figure[2], -figure[0]), default=None)
    failed = failure_file(folder, name)
    reason = failed.read_text(encoding="utf-8").partition("\n")[0] if failed.exists() else ""
    if result.error is not None or reason:
        status, reason = "failed", reason or " ".join(str(result.error).split())[-300:]
    elif last.get(STEP, 0) >= job.trial_steps:
        status = "finished"
    else:
        status = "stopped" if last.get("done") else "unfinished"
    return Trial(
        name=name,
        status=status,
        reason=reason if status == "failed" else "",
        values=dict(result.config["values"]),
        steps=int(last.get(STEP, 0)),
        metric=best[1] if best else "",
        value=best[2] if best else None,
        sign=best[3] if best else 0,
        best_step=best[0] if best else None,
        run=run if run.exists() else None,
        tracking_ids=tracking_ids,
        curve=tuple((step, value) for step, _, value, _ in figures),
    )


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the best figure; the first of equals. A failed one counts for what it reached."""
    scored = [trial for trial in trials if trial.value is not None and trial.run is not None]
    return max(scored, key=lambda trial: trial.sign * (trial.value or 0.0), default=None)


def best_job(trial: Trial, job: Job) -> Job:
    """The job that trains the best trial again, at full length: its evaluations are the trial's, to the bit."""
    assert trial.run is not None
    tree = parse_yaml((trial.run / "job.yaml").read_text(encoding="utf-8"), str(trial.run))
    asked = job.to_dict()
    for key in ("steps", "checkpoint_every", "keep", "address"):
        tree["run"][key] = asked["run"][key]
    tree["run"]["name"] = None  # the sweep's own folder has the job's
    return Job.parse(tree | {"output": asked["output"], "tracking": asked["tracking"], "sweep": None})


def write_table(trials: Sequence[Trial], path: Path) -> None:
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
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}
    pq.write_table(pa.table({name: _column(values) for name, values in columns.items()}), path)
    table = {"columns": list(columns), "data": [list(row.values()) for row in rows]}
    path.with_suffix(".json").write_text(json.dumps(table), encoding="utf-8")


def _column(values: list[Any]) -> list[Any]:
    """As they are where they are of one kind, else as JSON: a choice may be among anything."""
    kinds = {type(value) for value in values if value is not None}
    plain = len(kinds) <= 1 and kinds <= {int, float, str, bool}
    return values if plain else [json.dumps(value) for value in values]


def draw(trials: Sequence[Trial], job: Job, folder: Path) -> list[Path]:
    """curves.png: the figure over the steps, a line a trial; values.png: the figure over the first two numeric keys."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    assert job.sweep is not None
    scored = [trial for trial in trials if trial.value is not None]
    best = best_of(trials)
    if best is None:
        return []
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for trial in scored:
        chosen = trial is best
        steps, values = zip(*trial.curve, strict=True)
        color, width = ("C3", 2.0) if chosen else ("0.6", 0.9)
        axes.plot(steps, values, color=color, linewidth=width, marker=".", zorder=3 if chosen else 2)
    axes.set(xlabel="step", ylabel=best.metric, title=f"{job.name}: {len(scored)} trials, best {best.name}")
    if all(value > 0 for trial in scored for _, value in trial.curve) and best.sign < 0:
        axes.set_yscale("log")
    paths = [folder / "curves.png"]
    figure.savefig(paths[0], dpi=120)
    pyplot.close(figure)
    keys = [key for key in job.sweep.space if all(_is_number(trial.values[key]) for trial in scored)][:2]
    if keys:
        paths.append(folder / "values.png")
        _draw_values(pyplot, scored, best, keys, job.sweep.space, paths[1])
    return paths


def _draw_values(
    pyplot: Any, scored: Sequence[Trial], best: Trial, keys: list[str], space: Mapping[str, Any], path: Path
) -> None:
    figure, axes = pyplot.subplots(figsize=(6.5, 4.5), layout="constrained")
    figures = [trial.value for trial in scored]
    points = [[trial.values[key] for trial in scored] for key in keys]
    if len(keys) == 2:
        sizes = [20 + 60 * trial.steps / max(t.steps for t in scored) for trial in scored]
        shown = axes.scatter(
            points[0], points[1], c=figures, s=sizes, cmap="viridis", edgecolors="k", linewidths=0.4
        )
        figure.colorbar(shown, label=best.metric)
        axes.plot(best.values[keys[0]], best.values[keys[1]], "r*", markersize=14, label=f"best: {best.name}")
        axes.legend()
        axes.set(xlabel=keys[0], ylabel=keys[1], title="larger: trained for longer")
        axes.set_yscale("log" if space[keys[1]].kind == "loguniform" else "linear")
    else:
        axes.plot(points[0], figures, "o")
        axes.plot(best.values[keys[0]], best.value, "r*", markersize=14)
        axes.set(xlabel=keys[0], ylabel=best.metric)
    axes.set_xscale("log" if space[keys[0]].kind == "loguniform" else "linear")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
