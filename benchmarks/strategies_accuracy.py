"""Whether `async` and `local` learn what `driver` learns, at the same number of tasks: sinusoid regression.

    python benchmarks/strategies_accuracy.py [--only driver-0] [--quick]

jobs/sinusoid-maml.yaml at STEPS steps of 24 tasks, a rate of 0.003 and three seeds; mean squared error on 600 unseen
waves after ten gradient steps; tasks until the query loss, its mean over 20 steps, is below 2. All in one process:
async has three workers that take 3, 4 and 7 ticks for a shard by a script (tests/scripted.py), so that the figures are
those of everybody. `--only` adds one run to the results that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from functools import partial
from typing import Any

import report

STEPS, TASKS, WINDOW, GOAL, SEEDS = 300, 24, 20, 2.0, (0, 1, 2)
CASES = {
    "driver": ["run.strategy=driver"],
    "int8": ["run.strategy=driver", "run.compress=int8"],
    "async": ["run.strategy=async", "run.workers=3", "run.max_staleness=2"],
    "async-aware": ["run.strategy=async", "run.workers=3", "run.max_staleness=2", "run.staleness_aware=true"],
    "local": ["run.strategy=local", "run.local_steps=10"],
    "local-int8": ["run.strategy=local", "run.local_steps=10", "run.compress=int8"],
}
TICKS = (3, 4, 7)


def trained(case: str, seed: int, steps: int) -> dict[str, Any]:
    sys.path.insert(0, str(report.ROOT / "tests"))
    from scripted import ScriptedPool

    import distmeta
    from distmeta.job import Job
    from distmeta.runtime.strategies import asynchronous

    setattr(asynchronous, "RayPool", partial(ScriptedPool, TICKS))  # noqa: B010 - a pool by a script
    fixed = [
        f"run.steps={steps}",
        f"run.tasks_per_step={TASKS}",
        "run.shards=4",
        "outer.lr=0.003",
        f"seed={seed}",
    ]
    quiet = ["run.eval_every=0", "run.checkpoint_every=0", "tracking.type=none"]
    with tempfile.TemporaryDirectory() as folder:
        job = Job.load(
            report.ROOT / "jobs" / "sinusoid-maml.yaml", [*fixed, *quiet, f"output={folder}", *CASES[case]]
        )
        run = distmeta.train(job).run
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found = distmeta.evaluate(run)
    losses = [row["loss_after"] for row in rows]
    means = [statistics.mean(losses[i - WINDOW : i]) for i in range(WINDOW, len(losses) + 1)]
    below = next((WINDOW + i for i, mean in enumerate(means) if mean < GOAL), None)
    return {
        "loss": found.figures["loss_after"],
        "ci95": found.ci95,
        "tasks_to_goal": None if below is None else below * TASKS,
        "staleness": statistics.mean(row.get("staleness", 0.0) for row in rows),
        "tasks_stale": sum(row.get("tasks_stale", 0) for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    parser.add_argument("--only", help="one run, CASE-SEED, beside the results that are there")
    given = parser.parse_args()
    start = report.environment()
    path = report.RESULTS / "strategies-accuracy.json"
    known = json.loads(path.read_text())["runs"] if given.only and path.exists() else {}
    names = [given.only] if given.only else [f"{case}-{seed}" for seed in SEEDS for case in CASES]
    for name in names:
        case, _, seed = name.rpartition("-")
        known[name] = trained(case, int(seed), 30 if given.quick else STEPS)
        print(name, json.dumps(known[name]), flush=True)
    cells = []
    for case in CASES:
        rows = [known[name] for seed in SEEDS if (name := f"{case}-{seed}") in known]
        if rows:
            losses = [f"{row['loss']:.2f} ± {row['ci95']:.2f}" for row in rows]
            goals = [f"{row['tasks_to_goal']:,}" if row["tasks_to_goal"] else "never" for row in rows]
            cells.append(
                [
                    case,
                    f"{statistics.mean(row['loss'] for row in rows):.2f}",
                    "; ".join(losses),
                    "; ".join(goals),
                ]
            )
    print(report.table(["strategy", "error", "of each seed", f"tasks to a loss of {GOAL:g}"], cells))
    report.write(
        "strategies-accuracy",
        start,
        {"steps": STEPS, "tasks_per_step": TASKS, "runs": known},
        quick=given.quick,
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
