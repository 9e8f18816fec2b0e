"""The Omniglot one-shot challenge on unseen alphabets: 20-way 1-shot within an alphabet (Lake et al. 2015).

    python benchmarks/challenge.py                      jobs/omniglot-challenge.yaml, one training per fold
    python benchmarks/challenge.py --only 3 --minutes 10

The alphabets with at least 20 characters are split into folds. For each fold the job trains on all other alphabets and
is scored on episodes of each held-out alphabet: one drawing of each of 20 characters to learn from, another to name.
`--minutes` sets the number of steps from the time per step of a short trial. The comparison is the label of the nearest
support image (Euclidean, on pixels). The theta of the last step is scored, so nothing is chosen on held-out alphabets.
Each fold is one part of the results and can be run separately.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raw_results import ROOT, count_cores, describe_environment, interval, save_section
from training import StepTimes, note, score_nearest_neighbour, score_tasks, train_job

from distmeta.compute.numerics import apply_numerics
from distmeta.config.job import Job
from distmeta.runtime.problem import build_problem
from distmeta.tasks.store import TaskStore

JOB = ROOT / "jobs" / "omniglot-challenge.yaml"
WAYS = 20
TRIAL_STEPS = 30


def split_alphabets(store: str, count: int) -> list[list[str]]:
    """Return the alphabets of each fold, dealt out by their number of characters."""
    groups = TaskStore.open(store).groups
    sizes = {group: groups.count(group) for group in dict.fromkeys(groups)}
    large_enough = [group for group in sizes if sizes[group] >= WAYS]
    usable = sorted(large_enough, key=lambda group: (-sizes[group], group))
    if not 2 <= count <= len(usable):
        raise SystemExit(
            f"--folds: got {count}, expected 2 to {len(usable)} (alphabets of {WAYS} characters or more)"
        )
    return [usable[k::count] for k in range(count)]


def load_job(given: argparse.Namespace, held_out: Sequence[str]) -> Job:
    """Return the job with some alphabets held out for the test."""
    overrides = [
        f"tasks.path={given.store}",
        f"seed={given.seed}",
        f"run.workers={given.workers}",
        "tasks.split_by=group",
        f"tasks.test={json.dumps(list(held_out))}",
        "tasks.val=null",
        f"tasks.eval_ways={WAYS}",
        "tasks.eval_shots=1",
        "tasks.eval_queries=1",
        "run.eval_every=0",
        "run.checkpoint_every=0",
        "tracking.type=none",
    ]
    return Job.load(JOB, [*overrides, *given.overrides])


def run_fold(given: argparse.Namespace, number: int, held_out: list[str]) -> None:
    """Train without some alphabets, score each of them, and save the rows."""
    note(f"fold {number} of {given.folds}: {', '.join(held_out)} held out")
    environment = describe_environment()
    job = load_job(given, held_out)
    if given.minutes is not None:
        trial = StepTimes()
        train_job(job.replace(run={"steps": TRIAL_STEPS}), trial)
        seconds = statistics.median(trial.seconds[TRIAL_STEPS // 3 :])
        job = job.replace(run={"steps": max(2, int(60 * given.minutes / seconds))})
    times = StepTimes()
    _, theta, seconds = train_job(job, times)
    rows: list[dict[str, Any]] = []
    for alphabet in held_out:
        problem = build_problem(load_job(given, [alphabet]))
        with apply_numerics(job.compute.threads, deterministic=False):
            accuracies = score_tasks(problem, theta, "accuracy", "test", given.tasks, 0)[:, -1]
            nearest = score_nearest_neighbour(problem, given.tasks)
        error = interval(1 - accuracies)
        rows.append({"alphabet": alphabet, "error": error, "nearest_neighbour": interval(1 - nearest)})
    save_section(
        "challenge",
        f"fold {number} of {given.folds}",
        environment,
        rows,
        given.quick,
        held_out=held_out,
        tasks=given.tasks,
        steps=job.run.steps,
        seconds_training=seconds,
        seconds_per_step=statistics.median(times.seconds),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", default="data/omniglot.arrow", help="built by `distmeta data omniglot`")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="only these folds (from 1)")
    parser.add_argument("--minutes", type=float, help="length of a training; default: the job's steps")
    parser.add_argument("--tasks", type=int, default=400, help="episodes per alphabet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=count_cores(), help="does not change the result")
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the job")
    given = parser.parse_args()
    if not Path(given.store).is_file():
        parser.error(f"--store: {given.store} does not exist: see benchmarks/README.md")
    given.store = str(Path(given.store).absolute())
    if given.quick:
        given.tasks = 5
        given.minutes = None
        given.overrides = ["run.steps=2", *given.overrides]
    for number, held_out in enumerate(split_alphabets(given.store, given.folds), start=1):
        if given.only is None or number in given.only:
            run_fold(given, number, held_out)


if __name__ == "__main__":
    main()
