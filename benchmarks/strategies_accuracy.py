"""Do `async`, `local` and compressed gradients learn what `driver` learns at the same number of tasks?

    python benchmarks/strategies_accuracy.py sinusoid     300 steps of 24 sine tasks, three seeds
    python benchmarks/strategies_accuracy.py digits       200 steps of 16 tasks of digits, two seeds

Scored: squared error on 600 unseen waves after ten gradient steps, or accuracy on 600 tasks of digits that were never
trained on; and the tasks until the query loss, its mean over 20 steps, is below the study's goal.

Everything runs in one process. `async` has three workers that take 3, 4 and 7 ticks for a shard by a script
(tests/support), so results can be reproduced. `--only` replaces single runs in the results.
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

from raw_results import ROOT, describe_environment, load_study, save_section

WINDOW = 20
"""Steps over which the query loss is averaged."""
TICKS = (3, 4, 7)


class Study(NamedTuple):
    """What is trained, and what is scored."""

    steps: int
    tasks_per_step: int
    overrides: list[str]
    seeds: tuple[int, ...]
    metric: str
    goal: float
    """A query loss."""


STUDIES = {
    "sinusoid": Study(300, 24, ["outer.lr=0.003"], (0, 1, 2), "loss_after", 2.0),
    "digits": Study(200, 16, ["model.width=32"], (0, 1), "accuracy_after", 0.5),
}
ASYNC = ["strategy.type=async", "run.workers=3", "strategy.max_staleness=2"]
CASES = {
    "driver": ["strategy.type=driver"],
    "int8": ["strategy.type=driver", "strategy.compress=int8"],
    "async": ASYNC,
    "async-aware": [*ASYNC, "strategy.staleness_aware=true"],
    "local": ["strategy.type=local", "strategy.local_steps=10"],
    "local-int8": ["strategy.type=local", "strategy.local_steps=10", "strategy.compress=int8"],
}


def train_and_score(name: str, case: str, seed: int, quick: bool) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "tests"))
    from support.scripted_pool import ScriptedPool

    import distmeta
    from distmeta.config.job import Job
    from distmeta.strategies import asynchronous

    setattr(asynchronous, "RayPool", partial(ScriptedPool, TICKS))  # noqa: B010 - replaces a class
    study = STUDIES[name]
    overrides = [
        f"run.steps={30 if quick else study.steps}",
        f"run.tasks_per_step={study.tasks_per_step}",
        "run.shards=4",
        "run.workers=0",
        f"seed={seed}",
        *study.overrides,
        "run.eval_every=0",
        "run.checkpoint_every=0",
        "tracking.type=none",
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = ROOT / "jobs" / f"{name}-maml.yaml"
        job = Job.load(path, [*overrides, f"output={folder}", *CASES[case]])
        run = distmeta.train(job).run
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        scored = distmeta.evaluate(run)
    return {
        "case": case,
        "seed": seed,
        study.metric: scored.figures[study.metric],
        "ci95": scored.ci95,
        "tasks_to_goal": count_tasks_to_goal(study, [record["loss_after"] for record in records]),
        "staleness": statistics.mean(record.get("staleness", 0.0) for record in records),
        "tasks_stale": sum(record.get("tasks_stale", 0) for record in records),
    }


def count_tasks_to_goal(study: Study, losses: list[float]) -> int | None:
    """Return the tasks until the mean loss of a window is below the goal; None if it never is."""
    for end in range(WINDOW, len(losses) + 1):
        if statistics.mean(losses[end - WINDOW : end]) < study.goal:
            return end * study.tasks_per_step
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", nargs="?", choices=STUDIES, default="sinusoid")
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    parser.add_argument("--only", nargs="+", metavar="CASE-SEED", help="run these; keep the other results")
    given = parser.parse_args()
    environment = describe_environment()
    study = STUDIES[given.study]
    section = load_study("strategies_accuracy").get(given.study, {"rows": []})
    rows = section["rows"] if given.only and not given.quick else []
    for name in given.only or [f"{case}-{seed}" for seed in study.seeds for case in CASES]:
        case, _, seed = name.rpartition("-")
        rows = [row for row in rows if (row["case"], row["seed"]) != (case, int(seed))]
        rows.append(train_and_score(given.study, case, int(seed), given.quick))
        settings = {"steps": study.steps, "tasks_per_step": study.tasks_per_step}
        save_section("strategies_accuracy", given.study, environment, rows, given.quick, **settings)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
