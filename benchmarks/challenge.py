"""The Omniglot one-shot challenge on alphabets never seen: 20-way 1-shot within an alphabet (Lake et al. 2015).

    python benchmarks/challenge.py                      jobs/omniglot-challenge.yaml as it is, a training a fold
    python benchmarks/challenge.py --folds 7 --minutes 10 --tasks 400

The alphabets with at least 20 characters are dealt out to `--folds` folds. For each fold the job is trained on all
other alphabets (those with fewer characters among them) and scored on episodes of each held-out alphabet: 20 of its
characters, one drawing of each to learn from, another of each to name. `--minutes` sets the number of steps, from
the seconds a step that a short probe takes; else it is the job's.

Against it: the label of the nearest support image (Euclidean, on pixels), on the same episodes. People err on 4.5 % of
the published trials, which are of other alphabets and have all drawings of a set from one person.

`±` is 1.96·s/√n over the n episodes of an alphabet: it holds the choice of episodes, not the choice of a seed or of an
alphabet. The last step's theta is scored, so nothing is chosen on held-out alphabets. It can be stopped and started
again: a fold that is done is a file in results/challenge/ and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import report
from training import Progress, nearest_neighbour, said, scores, trained

from distmeta.compute.numerics import numerics
from distmeta.config.job import Job
from distmeta.runtime.problem import build
from distmeta.tasks.store import Store

JOB = report.ROOT / "jobs" / "omniglot-challenge.yaml"
FOLDER = report.RESULTS / "challenge"
WAYS = 20
PROBE_STEPS = 30


def folds_of(store: str, count: int) -> list[list[str]]:
    """The alphabets that can give an episode, dealt out by their number of characters."""
    groups = Store.open(store).groups
    sizes = {group: groups.count(group) for group in dict.fromkeys(groups)}
    usable = sorted((group for group in sizes if sizes[group] >= WAYS), key=lambda g: (-sizes[g], g))
    if not 2 <= count <= len(usable):
        raise SystemExit(
            f"--folds: got {count}, expected 2 to {len(usable)} (alphabets of {WAYS} characters or more)"
        )
    return [usable[k::count] for k in range(count)]


def job_of(given: argparse.Namespace, held_out: Sequence[str]) -> Job:
    """The job, with alphabets held out for the test alone."""
    return Job.load(
        JOB,
        [
            f"tasks.path={given.store}", f"seed={given.seed}", f"run.workers={given.workers}",
            "tasks.split_by=group", f"tasks.test={json.dumps(list(held_out))}", "tasks.val=null",
            f"tasks.eval_ways={WAYS}", "tasks.eval_shots=1", "tasks.eval_queries=1",
            "run.eval_every=0", "run.checkpoint_every=0", "tracking.type=none", *given.overrides,
        ],
    )  # fmt: skip


def one_fold(given: argparse.Namespace, held_out: Sequence[str]) -> dict[str, Any]:
    """Trains without the alphabets and scores each of them."""
    job = job_of(given, held_out)
    if given.minutes is not None:
        probe = Progress()
        trained(job.replace(run={"steps": PROBE_STEPS}), probe)
        steps = max(2, int(60 * given.minutes / statistics.median(probe.seconds[PROBE_STEPS // 3 :])))
        job = job.replace(run={"steps": steps})
    progress = Progress()
    _, theta, seconds = trained(job, progress)
    rows = []
    for alphabet in held_out:
        problem = build(job_of(given, [alphabet]))
        with numerics(job.compute.threads, deterministic=False):
            accuracies = scores(problem, theta, "accuracy", "test", given.tasks, 0)[:, -1]
            nearest = nearest_neighbour(problem, given.tasks)
        rows.append(
            {
                "alphabet": alphabet,
                "error": report.interval(1 - accuracies),
                "nearest_neighbour": report.interval(1 - nearest),
            }
        )
        said(f"{alphabet}: {report.percent(rows[-1]['error'])}")
    return {
        "rows": rows,
        "steps": job.run.steps,
        "seconds_training": seconds,
        "seconds_a_step": statistics.median(progress.seconds),
        "job": job.tree(),
    }


def fold_result(given: argparse.Namespace, number: int, held_out: list[str]) -> dict[str, Any]:
    """A fold's result: the file's if it answers the same question, else measured now and written."""
    path = FOLDER / f"fold-{number + 1}-of-{given.folds}.json"
    asked = {
        "held_out": held_out,
        "tasks": given.tasks,
        "minutes": given.minutes,
        "job": job_of(given, held_out).tree(),
    }
    asked["job"]["tasks"].pop("path")
    asked["job"]["run"].pop("workers")  # theta does not depend on it
    if path.is_file() and not given.quick:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["asked"] == asked:
            return found
        said(f"{path.name} is of another job or budget: measured again")
    said(f"fold {number + 1} of {given.folds}: {', '.join(held_out)} held out")
    start = report.environment()
    result = {"asked": asked, **one_fold(given, held_out)}
    if not given.quick:
        FOLDER.mkdir(parents=True, exist_ok=True)
        record = {"environment": start, **result}
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def mean_of(rows: Sequence[dict[str, Any]], column: str) -> dict[str, float]:
    """The mean over alphabets; its interval from theirs, as those of independent figures."""
    figures = [row[column] for row in rows]
    spread = float(np.sqrt(sum(figure["ci95"] ** 2 for figure in figures))) / len(figures)
    return {"mean": float(np.mean([figure["mean"] for figure in figures])), "ci95": spread}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", default="data/omniglot.arrow", help="built by `distmeta data omniglot`")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="these folds alone (from 1)")
    parser.add_argument("--minutes", type=float, help="of training a fold; default: the job's steps")
    parser.add_argument("--tasks", type=int, default=400, help="episodes an alphabet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=report.cores(), help="the figures do not depend on it")
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the job")
    given = parser.parse_args()
    if not Path(given.store).is_file():
        parser.error(f"--store: {given.store} does not exist: see benchmarks/README.md")
    given.store = str(Path(given.store).absolute())
    if given.quick:
        given.tasks, given.minutes = 5, None
        given.overrides = ["run.steps=2", *given.overrides]
    folds = list(enumerate(folds_of(given.store, given.folds)))
    chosen = [fold for fold in folds if given.only is None or fold[0] + 1 in given.only]
    results = [fold_result(given, k, held) for k, held in chosen]
    rows = sorted((row for result in results for row in result["rows"]), key=lambda row: row["alphabet"])
    columns = ("nearest_neighbour", "error")
    rows.append({"alphabet": "mean"} | {column: mean_of(rows, column) for column in columns})
    cells = [[row["alphabet"], *(report.percent(row[column]) for column in columns)] for row in rows]
    print(report.table(["error on a held-out alphabet", "1-NN on pixels", "omniglot-challenge"], cells))
    minutes = [result["seconds_training"] / 60 for result in results]
    print(
        f"\ntrainings of {min(minutes):.1f} to {max(minutes):.1f} minutes, {given.tasks} episodes an alphabet"
    )


if __name__ == "__main__":
    main()
