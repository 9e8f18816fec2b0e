"""Does what distmeta trains learn as well as it should? Three comparisons on unseen tasks.

    python benchmarks/accuracy.py omniglot   distmeta's MAML against a plain TorchOpt or higher loop
    python benchmarks/accuracy.py digits     MAML on digits never trained on, against nearest neighbour
    python benchmarks/accuracy.py sinusoid   MAML against a pre-trained network, fine-tuned at its best rate

Every system of a comparison is scored on the same test tasks; `±` is 1.96·s/√n over the n tasks, so it holds
the choice of test tasks and not the choice of a seed. It is the last step's theta that is scored: nothing is
chosen on the test tasks. `--quick` is a smoke run.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers
import report
import torch
import torch.nn.functional as F
from training import distance, nearest_neighbour, overlap, said, scores, trained

from distmeta.compute.numerics import numerics
from distmeta.config.job import Job
from distmeta.protocols import Theta
from distmeta.runtime.problem import Problem, build
from distmeta.seeding import task_ids

JOBS = report.ROOT / "jobs"
TEST_DIGITS = ([7, 8, 9], [0, 1, 2], [3, 4, 5])
"""The splits of `digits`, set down before the first run."""
FINE_TUNING_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""The grid that the pre-trained network's rate is chosen from, on validation tasks."""


# omniglot


def omniglot(given: argparse.Namespace) -> dict[str, Any]:
    """The same MAML by distmeta and by a loop on a peer: same weights, tasks, steps and Adam."""
    rows = [one_seed(given, seed) for seed in given.seeds]
    name = {"torchopt": "TorchOpt", "higher": "higher"}[given.peer]
    cells = [
        [
            str(row["seed"]),
            report.percent(row["untrained"]),
            report.percent(row["distmeta"]),
            report.percent(row["peer"]),
            report.percent(row["difference"]),
            "yes" if row["agree"] else "NO",
        ]
        for row in rows
    ]
    print(
        report.table(["seed", "untrained", "distmeta", f"{name} loop", "difference, paired", "agree"], cells)
    )
    print("\nagree: the two intervals overlap.")
    return {"rows": rows, "job": rows[0].pop("job")} | {"peer": given.peer}


def one_seed(given: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Trains both and scores them."""
    job = Job.load(
        JOBS / "omniglot-maml.yaml",
        [
            f"seed={seed}",
            f"tasks.path={given.store}",
            f"model.width={given.width}",
            f"run.steps={given.steps}",
            f"run.tasks_per_step={given.tasks_per_step}",
            f"run.workers={given.workers}",
        ],
    )
    said(f"seed {seed}: distmeta, {given.workers} workers")
    problem, theta, seconds = trained(job)
    said(f"  {seconds:.0f} s\nseed {seed}: {given.peer}")
    other, peer_seconds = peer_trained(job, given.peer)
    said(f"  {peer_seconds:.0f} s")
    steps = problem.eval_steps

    def tested(theta: Theta) -> np.ndarray:
        return scores(problem, theta, "accuracy", "test", given.tasks, steps)[:, -1]

    ours, theirs = tested(theta), tested(other)
    figures = {"distmeta": report.interval(ours), "peer": report.interval(theirs)}
    figures |= {
        "untrained": report.interval(tested(problem.init())),
        "difference": report.interval(ours - theirs),
    }
    return figures | {
        "seed": seed,
        "agree": overlap(figures["distmeta"], figures["peer"]),
        "eval_inner_steps": steps,
        "test_tasks": given.tasks,
        "relative_distance_of_theta": distance(other, theta),
        "seconds_training": {"distmeta": seconds, "peer": peer_seconds},
        "job": job.tree(),
    }


def peer_trained(job: Job, name: str) -> tuple[Theta, float]:
    """The plain loop: draw the job's tasks, a peer's meta-gradient, torch.optim.Adam."""
    problem = build(job)
    module = peers.peer_module(problem)
    peer = peers.PEERS[name](module, peers.inner_of(problem, F.cross_entropy))
    optimizer = torch.optim.Adam(module.parameters(), lr=job.outer.lr)
    started = time.perf_counter()
    with numerics(job.compute.threads, deterministic=False):
        for step in range(job.run.steps):
            ids = task_ids(job.seed, "train", step, job.run.tasks_per_step)
            loss = peers.train_step(peer, optimizer, problem.family.draw("train", ids))
            if (step + 1) % 100 == 0:
                said(f"  step {step + 1}: loss {float(loss):.4f}")
    return peers.theta_of(module), time.perf_counter() - started


# digits


def digits(given: argparse.Namespace) -> dict[str, Any]:
    """MAML on the digits of each split, trained on the others."""
    rows = [one_split(given, held_out) for held_out in TEST_DIGITS]
    systems = ("unadapted", "nearest_neighbour", "maml")
    rows.append({"test_digits": "mean"} | {name: mean_of([row[name] for row in rows]) for name in systems})
    cells = [[str(row["test_digits"]), *(report.percent(row[name]) for name in systems)] for row in rows]
    print(report.table(["test digits", "MAML before adaptation", "1-NN on pixels", "MAML"], cells))
    return {"rows": rows, "job": rows[0].pop("job")}


def one_split(given: argparse.Namespace, held_out: Sequence[int]) -> dict[str, Any]:
    overrides = [f"tasks.test_digits={list(held_out)}", f"run.workers={given.workers}", f"seed={given.seed}"]
    steps = [f"run.steps={given.steps}"] if given.steps else []
    job = Job.load(JOBS / "digits-maml.yaml", overrides + steps)
    said(f"test digits {list(held_out)}")
    problem, theta, seconds = trained(job)
    curve = scores(problem, theta, "accuracy", "test", given.tasks, problem.eval_steps)
    return {
        "test_digits": list(held_out),
        "unadapted": report.interval(curve[:, 0]),
        "nearest_neighbour": report.interval(nearest_neighbour(problem, given.tasks)),
        "maml": report.interval(curve[:, -1]),
        "eval_inner_steps": problem.eval_steps,
        "test_tasks": given.tasks,
        "seconds_training": seconds,
        "job": job.tree(),
    }


def mean_of(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over splits; its interval from theirs, as those of independent figures."""
    spread = math.sqrt(sum(figure["ci95"] ** 2 for figure in figures)) / len(figures)
    return {"mean": math.fsum(figure["mean"] for figure in figures) / len(figures), "ci95": spread}


# sinusoid


def sinusoid(given: argparse.Namespace) -> dict[str, Any]:
    """MAML, and the same network trained on all tasks at once and then fine-tuned (MAML paper, §5.1)."""
    steps = [f"run.steps={given.steps}"] if given.steps else []
    job = Job.load(JOBS / "sinusoid-maml.yaml", [f"seed={given.seed}", *steps])
    said("MAML")
    problem, theta, _ = trained(job)
    said("the pre-trained network")
    pretrained = pretrain(job)
    after = (1, 10)
    meta = scores(problem, theta, "loss", "test", given.tasks, max(after))
    rows = [row_of("MAML", meta, dict.fromkeys(after, problem.algorithm.inner_lr), (0, *after))]
    grid = {rate: fine_tuned(problem, pretrained, rate, "val", given.tasks) for rate in FINE_TUNING_RATES}
    best = {k: min(grid, key=lambda rate, k=k: finite_mean(grid[rate][:, k])) for k in after}
    tested = {k: fine_tuned(problem, pretrained, best[k], "test", given.tasks) for k in after}
    tuned = np.stack([tested[after[0]][:, 0], *(tested[k][:, k] for k in after)], axis=1)
    rows.append(row_of("pre-trained, fine-tuned", tuned, best, (0, *after), columns=(0, 1, 2)))
    cells = [[row["system"], *(shown_step(row, k) for k in (0, *after))] for row in rows]
    print(report.table(["mean squared error", "before", "after 1 step", "after 10 steps"], cells))
    validation = {str(rate): {k: finite_mean(curve[:, k]) for k in after} for rate, curve in grid.items()}
    return {
        "rows": rows,
        "fine_tuning_on_validation": validation,
        "test_tasks": given.tasks,
        "job": job.tree(),
    }


def pretrain(job: Job) -> Theta:
    """Adam on the pooled support and query data of the very tasks that MAML sees, for as many steps."""
    problem = build(job)
    module = peers.peer_module(problem)
    optimizer = torch.optim.Adam(module.parameters(), lr=job.outer.lr)
    with numerics(job.compute.threads, deterministic=False):
        for step in range(job.run.steps):
            ids = task_ids(job.seed, "train", step, job.run.tasks_per_step)
            support, query = problem.family.draw("train", ids)
            x, y = (torch.cat(pair, dim=1).flatten(0, 1) for pair in zip(support, query, strict=True))
            optimizer.zero_grad()
            F.mse_loss(module(x), y).backward()
            optimizer.step()
    return peers.theta_of(module)


def fine_tuned(problem: Problem, theta: Theta, rate: float, split: str, tasks: int) -> np.ndarray:
    """Losses after 0 … 10 gradient steps at another rate."""
    algorithm: Any = copy.copy(problem.algorithm)
    algorithm.inner_lr = rate
    return scores(dataclasses.replace(problem, algorithm=algorithm), theta, "loss", split, tasks, 10)


def finite_mean(values: np.ndarray) -> float:
    """The mean; infinite where fine-tuning diverged."""
    return float(values.mean()) if np.isfinite(values).all() else math.inf


def row_of(
    system: str,
    losses: np.ndarray,
    rates: Mapping[int, float],
    after: Sequence[int],
    columns: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Intervals after each number of steps; `columns`: where each is in `losses`, if not at its number."""
    figures = {
        k: report.interval(losses[:, column]) for k, column in zip(after, columns or after, strict=True)
    }
    return {"system": system, "after_steps": figures, "rate": dict(rates)}


def shown_step(row: Mapping[str, Any], k: int) -> str:
    figure = report.plain(row["after_steps"][k])
    return figure if k == 0 else f"{figure} (rate {row['rate'][k]:g})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    common.add_argument("--tasks", type=int, default=600, help="test tasks")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("omniglot", parents=[common], help=omniglot.__doc__)
    verb.add_argument("--steps", type=int, default=500)
    verb.add_argument("--width", type=int, default=32)
    verb.add_argument("--tasks-per-step", type=int, default=16)
    verb.add_argument("--peer", choices=["torchopt", "higher"], default="torchopt")
    verb.add_argument("--seeds", type=int, nargs="+", default=[0])
    verb.add_argument("--workers", type=int, default=2, help="of distmeta; the figures do not depend on it")
    verb.add_argument("--store", default="data/omniglot.arrow", help="built by `distmeta data omniglot`")
    verb = verbs.add_parser("digits", parents=[common], help=digits.__doc__)
    verb.add_argument("--steps", type=int, help="default: the job's")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--workers", type=int, default=2, help="the figures do not depend on it")
    verb = verbs.add_parser("sinusoid", parents=[common], help=sinusoid.__doc__)
    verb.add_argument("--steps", type=int, help="default: the job's")
    verb.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.quick:
        given.steps, given.tasks = 3, 25
    if given.verb == "omniglot" and not Path(given.store).is_file():
        parser.error(f"--store: {given.store} does not exist: see benchmarks/README.md")
    start = report.environment()
    verb_of = {"omniglot": omniglot, "digits": digits, "sinusoid": sinusoid}
    report.write(f"accuracy-{given.verb}", start, verb_of[given.verb](given), given.quick)


if __name__ == "__main__":
    main()
