"""Training in bfloat16 (on a GPU also TF32) against the same training in float32: same weights, tasks and steps.

    python benchmarks/precision.py [--only digits-0 ...] [--set model.width=32 ...] [--steps 1000]

Besides, float32 with sums that are rounded differently shows how far only rounding moves such a training.
`--only` replaces single runs in the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from typing import Any, NamedTuple

import numpy as np
import torch
from raw_results import ROOT, describe_environment, interval, load_study, save_section
from training import StepTimes, note, relative_distance, score_tasks, train_job

from distmeta.config.job import Job
from distmeta.protocols import Theta

JOBS = ROOT / "jobs"


class Study(NamedTuple):
    """What is trained, and which metric is compared after the inner steps of the job's evaluation."""

    steps: int
    overrides: list[str]
    seeds: tuple[int, ...]
    metric: str


STUDIES = {
    "sinusoid": Study(1000, [], (0, 1, 2), "loss"),
    "digits": Study(400, ["model.width=16", "run.tasks_per_step=8"], (0, 1, 2, 3, 4, 5), "accuracy"),
}
RUNS = [f"{name}-{seed}" for name, study in STUDIES.items() for seed in study.seeds]
CONTROL = "float32 again"
"""The same tasks in two shards instead of one, so that sums are rounded differently."""


class Trained(NamedTuple):
    theta: Theta
    metric: dict[str, np.ndarray]
    """The metric of each test task, by the precision in which it is scored. The first is that of the training."""
    seconds_per_step: float
    """Processor time."""


def compare(given: argparse.Namespace, name: str, seed: int) -> list[dict[str, Any]]:
    """Return one row for each reduced precision and one for the control."""
    study = STUDIES[name]
    kinds = ["bf16", CONTROL]
    gpus = 0
    if torch.cuda.is_available():
        kinds = ["tf32", *kinds]
        gpus = 1
    overrides = [
        f"seed={seed}",
        f"run.steps={given.steps or study.steps}",
        "run.shards=1",
        *study.overrides,
        "run.workers=0",
        f"run.gpus_per_worker={gpus}",
        *given.set,
    ]
    job = Job.load(JOBS / f"{name}-maml.yaml", overrides)
    exact = train_in_precision(given, study, job, "float32")
    return [compare_precision(given, name, seed, job, exact, kind) for kind in kinds]


def compare_precision(
    given: argparse.Namespace, name: str, seed: int, job: Job, exact: Trained, kind: str
) -> dict[str, Any]:
    other = train_in_precision(given, STUDIES[name], job, kind)
    own_metric = next(iter(other.metric.values()))
    return {
        "study": name,
        "seed": seed,
        "precision": kind,
        "metric": STUDIES[name].metric,
        "float32": interval(exact.metric["float32"]),
        "other": interval(own_metric),
        "difference": interval(own_metric - exact.metric["float32"]),
        "difference_scored_in_float32": interval(other.metric["float32"] - exact.metric["float32"]),
        "relative_distance_of_theta": relative_distance(other.theta, exact.theta),
        "processor_seconds_a_step": {"float32": exact.seconds_per_step, "other": other.seconds_per_step},
        "test_tasks": given.tasks,
    }


def train_in_precision(given: argparse.Namespace, study: Study, job: Job, kind: str) -> Trained:
    """Train, and score in the precision of the training and in float32."""
    note(f"{job.name}, seed {job.seed}: {kind}")
    changed = job.replace(run={"shards": 2}) if kind == CONTROL else job.replace(compute={"precision": kind})
    times = StepTimes()
    problem, theta, _ = train_job(changed, times)
    metric = {}
    for precision in dict.fromkeys((changed.compute.precision, "float32")):
        scored_job = problem.job.replace(compute={"precision": precision})
        scored = dataclasses.replace(problem, job=scored_job)
        curve = score_tasks(scored, theta, study.metric, "test", given.tasks, problem.eval_steps)
        metric[precision] = curve[:, -1]
    return Trained(theta, metric, statistics.fmean(times.processor_seconds))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    parser.add_argument("--tasks", type=int, default=600, help="test tasks")
    parser.add_argument("--steps", type=int, help="default: the study's")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=RUNS, metavar="STUDY-SEED")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the jobs")
    given = parser.parse_args()
    if given.quick:
        given.steps = 3
        given.tasks = 25
    environment = describe_environment()
    device = "gpu" if torch.cuda.is_available() else "cpu"
    rows = load_study("precision").get(device, {"rows": []})["rows"]
    if given.only == RUNS or given.quick:
        rows = []
    for run in given.only:
        name, _, seed = run.rpartition("-")
        rows = [row for row in rows if (row["study"], row["seed"]) != (name, int(seed))]
        rows += [row | {"command": environment["command"]} for row in compare(given, name, int(seed))]
        save_section("precision", device, environment, rows, given.quick)


if __name__ == "__main__":
    main()
