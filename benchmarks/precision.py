"""Training in bf16 (on a GPU in tf32 too) against the same in float32: same weights, tasks and steps.

    python benchmarks/precision.py [--quick] [--only digits-0 ...] [--set model.width=32 ...] [--steps 1000]

Beside them float32 again with its sums rounded otherwise: how far a rounding alone moves such a training. `--only` adds
runs to the results that are there: bfloat16 is slow on a processor without its instructions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import report
import torch
from training import Progress, distance, overlap, said, scores, trained

from distmeta.config.job import Job
from distmeta.protocols import Theta

JOBS = report.ROOT / "jobs"


class Study(NamedTuple):
    """A job, what is changed in it, and what is looked at after the inner steps of its evaluation."""

    steps: int
    overrides: list[str]
    seeds: tuple[int, ...]
    metric: str
    shown: Callable[[Mapping[str, float]], str]


STUDIES = {
    "sinusoid": Study(1000, [], (0, 1, 2), "loss", report.plain),
    "digits": Study(
        400, ["model.width=16", "run.tasks_per_step=8"], (0, 1, 2, 3, 4, 5), "accuracy", report.percent
    ),
}
RUNS = [f"{name}-{seed}" for name, study in STUDIES.items() for seed in study.seeds]
REDUCED = ("tf32", "bf16") if torch.cuda.is_available() else ("bf16",)
CONTROL = "float32 again"
"""The same tasks in two shards instead of one: sums are rounded otherwise, and nothing else is different."""


def run(given: argparse.Namespace) -> None:
    """Compares, and prints all there is."""
    start, path = report.environment(), report.RESULTS / "precision.json"
    rows = json.loads(path.read_text())["rows"] if given.only and path.exists() and not given.quick else []
    for name, seed in (run.rsplit("-", 1) for run in given.only or RUNS):
        rows = [row for row in rows if (row["study"], row["seed"]) != (name, int(seed))]
        rows += [row | {"command": start["command"]} for row in compared(given, name, int(seed))]
        report.write(path.stem, start, {"rows": rows}, given.quick)
    cells = []
    for row in rows:
        shown = STUDIES[row["study"]].shown
        figures = (row[key] for key in ("float32", "other", "difference", "difference_scored_in_float32"))
        title = [f"{row['study']}, {row['metric']}", str(row["seed"]), row["precision"]]
        cells.append([*title, *map(shown, figures), "yes" if row["agree"] else "no"])
    header = ["study", "seed", "other", "float32", "other", "difference", "both scored in float32", "overlap"]
    print(report.table(header, cells))
    print("\ndifference: paired by task. overlap: of the two intervals, which are over tasks.\n")
    print(over_seeds(rows))


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over seeds; their intervals hold the choice of a seed, and so all that a rounding can lead to."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["study"], row["precision"]), []).append(row)
    cells = []
    for (name, kind), members in groups.items():
        if len(members) > 1:
            found = [
                report.interval(np.array([row[key]["mean"] for row in members]))
                for key in ("float32", "other", "difference")
            ]
            apart = np.mean([row["relative_distance_of_theta"] for row in members])
            shown = map(STUDIES[name].shown, found)
            cells.append([name, kind, str(len(members)), *shown, f"{100 * apart:.0f} %"])
    return report.table(
        ["study", "other", "seeds", "float32", "other", "difference", "theta apart by"], cells
    )


def compared(given: argparse.Namespace, name: str, seed: int) -> list[dict[str, Any]]:
    """A row for each reduced precision, and one for the control; a theta is scored in the precision it was trained in,
    and in float32."""
    study, gpus = STUDIES[name], int(torch.cuda.is_available())
    fixed = [f"seed={seed}", f"run.steps={given.steps or study.steps}", "run.shards=1", *study.overrides]
    base = Job.load(
        JOBS / f"{name}-maml.yaml", [*fixed, "run.workers=0", f"run.gpus_per_worker={gpus}", *given.set]
    )

    def made(kind: str) -> tuple[Theta, dict[str, np.ndarray], float]:
        said(f"{name}, seed {seed}: {kind}")
        progress = Progress()
        job = (
            base.replace(run={"shards": 2}) if kind == CONTROL else base.replace(compute={"precision": kind})
        )
        problem, theta, _ = trained(job, progress)
        tested = {}
        for scored in dict.fromkeys((job.compute.precision, "float32")):
            same = dataclasses.replace(problem, job=problem.job.replace(compute={"precision": scored}))
            curve = scores(same, theta, study.metric, "test", given.tasks, problem.eval_steps)
            tested[scored] = curve[:, -1]
            said(f"  scored in {scored}: {study.shown(report.interval(tested[scored]))}")
        return theta, tested, math.fsum(progress.processor) / len(progress.processor)

    theta, exact, seconds = made("float32")
    rows = []
    for kind in (*REDUCED, CONTROL):
        other, tested, other_seconds = made(kind)
        own = next(iter(tested.values()))
        figures = {"float32": report.interval(exact["float32"]), "other": report.interval(own)}
        rows.append(
            {"study": name, "seed": seed, "precision": kind, "metric": study.metric}
            | figures
            | {
                "difference": report.interval(own - exact["float32"]),
                "difference_scored_in_float32": report.interval(tested["float32"] - exact["float32"]),
                "agree": overlap(figures["float32"], figures["other"]),
                "relative_distance_of_theta": distance(other, theta),
                "processor_seconds_a_step": {"float32": seconds, "other": other_seconds},
                "test_tasks": given.tasks,
                "job": base.tree(),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    parser.add_argument("--tasks", type=int, default=600, help="test tasks")
    parser.add_argument("--steps", type=int, help="default: the study's")
    parser.add_argument("--only", nargs="+", choices=RUNS, help="runs, beside the results that are there")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes in their jobs")
    given = parser.parse_args()
    if given.quick:
        given.steps, given.tasks = 3, 25
    run(given)


if __name__ == "__main__":
    main()
