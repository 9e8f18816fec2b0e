"""Sweeps: what a search of the rates finds, for how many steps, and what Tune's machinery costs.

python benchmarks/sweep.py search     jobs/sweep-sinusoid-maml.yaml against the same job with the paper's rates
python benchmarks/sweep.py cost       16 one-process trials, two at a time: a sweep against a plain script
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from raw_results import ROOT, describe_environment, save_section

import distmeta
from distmeta.config.job import Job

JOB = ROOT / "jobs" / "sweep-sinusoid-maml.yaml"
DISTMETA = [sys.executable, "-m", "distmeta.cli.main"]
TRIALS = 16
STEPS = 400
ROUNDS = 2

Rows = list[dict[str, Any]]


def measure_search() -> tuple[Rows, dict[str, Any]]:
    """Search the rates, then score the best trial and the job with its own rates on test tasks."""
    job = Job.load(JOB)
    started = time.perf_counter()
    found = distmeta.sweep(job)
    seconds = time.perf_counter() - started
    steps = sum(trial.steps for trial in found.trials)
    best = Job.load(found.folder / "sweep" / "best.yaml", ["run.name=best"])
    default = job.with_values({"run.name": "default"})
    rows = [score_job("best of the sweep", best), score_job("the paper's", default)]
    settings = {
        "trials": len(found.trials),
        "best_values": found.best,
        "steps_spent": steps,
        "steps_share": steps / (job.run.steps * len(found.trials)),
        "seconds": seconds,
    }
    return rows, settings


def score_job(name: str, job: Job) -> dict[str, Any]:
    run = distmeta.train(job).run
    scored = distmeta.evaluate(run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validation = [record["val_loss_after"] for record in records if "val_loss_after" in record]
    return {
        "rates": name,
        "test_loss_after": scored.figures["loss_after"],
        "ci95": scored.ci95,
        "val_loss_after": validation[-1],
    }


def measure_cost() -> tuple[Rows, dict[str, Any]]:
    """Time the sweep and the plain script in turn."""
    return [{"plain_seconds": run_plain_script(), "sweep_seconds": run_sweep()} for _ in range(ROUNDS)], {}


def make_overrides(folder: str) -> list[str]:
    return [
        f"run.steps={STEPS}",
        f"output={folder}",
        "sweep.scheduler.type=none",
        "sweep.scheduler.grace=null",
        "sweep.scheduler.reduction=null",
        f"sweep.trials={TRIALS}",
        "sweep.concurrent=2",
    ]


def run_plain_script() -> float:
    """Return the seconds of `distmeta train` for every point, two processes at a time."""
    from distmeta.sweeps.search import draw_points

    with tempfile.TemporaryDirectory() as folder:
        overrides = make_overrides(folder)
        job = Job.load(JOB, overrides)
        assert job.sweep is not None
        commands = []
        for i, point in enumerate(draw_points(job.sweep, job.seed)):
            values = [f"{key}={value!r}" for key, value in point.items()]
            commands.append([*DISTMETA, "train", str(JOB), *overrides, f"run.name=trial-{i}", *values])
        return time_commands(folder, commands)


def run_sweep() -> float:
    with tempfile.TemporaryDirectory() as folder:
        return time_commands(folder, [[*DISTMETA, "sweep", str(JOB), *make_overrides(folder)]])


def time_commands(folder: str, commands: list[list[str]]) -> float:
    """Run the commands, two at a time, and return the seconds until the last ends."""

    def run(command: list[str]) -> None:
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, commands))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["search", "cost"])
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    environment = describe_environment()
    measure = {"search": measure_search, "cost": measure_cost}[given.what]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        rows, settings = measure()
        os.chdir(Path(__file__).parent)
    save_section("sweep", given.what, environment, rows, **settings)


if __name__ == "__main__":
    main()
