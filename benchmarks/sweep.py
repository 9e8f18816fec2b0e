"""Sweeps: what a search of the rates finds against the paper's, for how many steps; and what Tune's machinery costs.

    python benchmarks/sweep.py search     # jobs/sweep-sinusoid-maml.yaml against the same job with the default rates
    python benchmarks/sweep.py cost       # 16 one-process trials, two at a time: a sweep against a plain script

Results go to results/sweep-search.json and results/sweep-cost.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import report

import distmeta
from distmeta.config.job import Job

JOB = Path(__file__).parents[1] / "jobs" / "sweep-sinusoid-maml.yaml"
TRIALS, STEPS, ROUNDS = 16, 400, 2


def search() -> dict[str, object]:
    job = Job.load(JOB)
    started = time.perf_counter()
    found = distmeta.sweep(job)
    seconds = time.perf_counter() - started
    spent, whole = sum(trial.steps for trial in found.trials), job.run.steps * len(found.trials)
    default = distmeta.train(job.with_values({"run.name": "default"})).run
    best = distmeta.train(Job.load(found.folder / "sweep" / "best.yaml", ["run.name=best"])).run
    figures = {}
    for name, run in (("best", best), ("default", default)):
        scored = distmeta.evaluate(run)
        figures[name] = {"test_loss_after": scored.figures["loss_after"], "ci95": scored.ci95}
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        figures[name]["val_loss_after"] = [row["val_loss_after"] for row in rows if "val_loss_after" in row][
            -1
        ]
    return {
        "trials": len(found.trials),
        "best_values": found.best,
        "steps_spent": spent,
        "steps_share": spent / whole,
        "seconds": seconds,
        **figures,
    }


def cost() -> dict[str, object]:
    rounds = [(_plain(), _sweep()) for _ in range(ROUNDS)]
    ratios = [swept / plain for plain, swept in rounds]
    return {"rounds": rounds, "plain_script_s, sweep_s": "a pair a round", "ratio": statistics.median(ratios)}


def _overrides(folder: str) -> list[str]:
    return [f"run.steps={STEPS}", f"output={folder}", "sweep.scheduler.type=none", "sweep.scheduler.grace=null",
            "sweep.scheduler.reduction=null", f"sweep.trials={TRIALS}", "sweep.concurrent=2"]  # fmt: skip


def _plain() -> float:
    """`distmeta train` for every point, two processes at a time."""
    from distmeta.sweeps.search import points

    with tempfile.TemporaryDirectory() as folder:
        job = Job.load(JOB, _overrides(folder))
        assert job.sweep is not None
        commands = [
            [
                sys.executable,
                "-m",
                "distmeta.cli.main",
                "train",
                str(JOB),
                *_overrides(folder),
                f"run.name=trial-{i}",
            ]
            + [f"{key}={value!r}" for key, value in point.items()]
            for i, point in enumerate(points(job.sweep, job.seed))
        ]
        return _timed(folder, commands)


def _sweep() -> float:
    with tempfile.TemporaryDirectory() as folder:
        return _timed(
            folder, [[sys.executable, "-m", "distmeta.cli.main", "sweep", str(JOB), *_overrides(folder)]]
        )


def _timed(folder: str, commands: list[list[str]]) -> float:
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(
                lambda command: subprocess.run(command, cwd=folder, check=True, capture_output=True), commands
            )
        )
    return time.perf_counter() - started


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else "search"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    start = report.environment()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        result = {"search": search, "cost": cost}[what]()
        os.chdir("/")
    print(json.dumps(result, indent=1))
    report.write(f"sweep-{what}", start, result, quick=False)
