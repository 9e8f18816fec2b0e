"""Whether `async` and `local` learn what `driver` learns, at the same number of tasks: sine waves, and real digits.

    python benchmarks/strategies_accuracy.py [sinusoid|digits] [--only driver-0 …] [--quick]

sinusoid: jobs/sinusoid-maml.yaml, 300 steps of 24 tasks, a rate of 0.003, three seeds; mean squared error on 600 unseen
waves after ten gradient steps; tasks until the query loss, its mean over 20 steps, is below 2.
digits: jobs/digits-maml.yaml with a width of 32, 200 steps of 16 tasks, two seeds; accuracy on 600 tasks of digits that
were never trained on; tasks until the query loss is below 0.5.

All in one process: async has three workers that take 3, 4 and 7 ticks for a shard by a script (tests/scripted.py), so
that the figures are those of everybody. `--only` adds runs to the results that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from functools import partial
from typing import Any, NamedTuple

import report

WINDOW = 20


class Study(NamedTuple):
    """A job, what is changed in it, and what is looked at."""

    steps: int
    tasks: int
    overrides: list[str]
    seeds: tuple[int, ...]
    figure: str
    goal: float
    """A query loss."""


STUDIES = {
    "sinusoid": Study(300, 24, ["outer.lr=0.003"], (0, 1, 2), "loss_after", 2.0),
    "digits": Study(200, 16, ["model.width=32"], (0, 1), "accuracy_after", 0.5),
}
CASES = {
    "driver": ["run.strategy=driver"],
    "int8": ["run.strategy=driver", "run.compress=int8"],
    "async": ["run.strategy=async", "run.workers=3", "run.max_staleness=2"],
    "async-aware": ["run.strategy=async", "run.workers=3", "run.max_staleness=2", "run.staleness_aware=true"],
    "local": ["run.strategy=local", "run.local_steps=10"],
    "local-int8": ["run.strategy=local", "run.local_steps=10", "run.compress=int8"],
}
TICKS = (3, 4, 7)


def trained(name: str, case: str, seed: int, quick: bool) -> dict[str, Any]:
    sys.path.insert(0, str(report.ROOT / "tests"))
    from scripted import ScriptedPool

    import distmeta
    from distmeta.config.job import Job
    from distmeta.strategies import asynchronous

    setattr(asynchronous, "RayPool", partial(ScriptedPool, TICKS))  # noqa: B010 - a pool by a script
    study = STUDIES[name]
    fixed = [
        f"run.steps={30 if quick else study.steps}",
        f"run.tasks_per_step={study.tasks}",
        "run.shards=4",
        "run.workers=0",
        f"seed={seed}",
        *study.overrides,
    ]
    quiet = ["run.eval_every=0", "run.checkpoint_every=0", "tracking.type=none"]
    with tempfile.TemporaryDirectory() as folder:
        job = Job.load(
            report.ROOT / "jobs" / f"{name}-maml.yaml", [*fixed, *quiet, f"output={folder}", *CASES[case]]
        )
        run = distmeta.train(job).run
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found = distmeta.evaluate(run)
    losses = [row["loss_after"] for row in rows]
    means = [statistics.mean(losses[i - WINDOW : i]) for i in range(WINDOW, len(losses) + 1)]
    below = next((WINDOW + i for i, mean in enumerate(means) if mean < study.goal), None)
    return {
        study.figure: found.figures[study.figure],
        "ci95": found.ci95,
        "tasks_to_goal": None if below is None else below * study.tasks,
        "staleness": statistics.mean(row.get("staleness", 0.0) for row in rows),
        "tasks_stale": sum(row.get("tasks_stale", 0) for row in rows),
    }


def table(study: Study, known: dict[str, Any]) -> str:
    cells = []
    for case in CASES:
        rows = [known[name] for seed in study.seeds if (name := f"{case}-{seed}") in known]
        if not rows:
            continue
        each = [f"{row[study.figure]:.3f} ± {row['ci95']:.3f}" for row in rows]
        goals = [f"{row['tasks_to_goal']:,}" if row["tasks_to_goal"] else "never" for row in rows]
        mean = f"{statistics.mean(row[study.figure] for row in rows):.3f}"
        cells.append([case, mean, "; ".join(each), "; ".join(goals)])
    return report.table(
        ["strategy", study.figure, "of each seed", f"tasks to a loss of {study.goal:g}"], cells
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", nargs="?", choices=STUDIES, default="sinusoid")
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    parser.add_argument("--only", nargs="+", help="runs, CASE-SEED each, beside the results that are there")
    given = parser.parse_args()
    start, study, written = report.environment(), STUDIES[given.study], f"strategies-accuracy-{given.study}"
    path = report.RESULTS / f"{written}.json"
    known = json.loads(path.read_text())["runs"] if given.only and path.exists() else {}
    for name in given.only or [f"{case}-{seed}" for seed in study.seeds for case in CASES]:
        case, _, seed = name.rpartition("-")
        known[name] = trained(given.study, case, int(seed), given.quick)
        print(name, json.dumps(known[name]), flush=True)
        found = {"steps": study.steps, "tasks_per_step": study.tasks, "runs": known}
        report.write(written, start, found, quick=given.quick)
    print(table(study, known))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
