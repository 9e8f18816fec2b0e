"""Does distmeta learn as well as it should? Three comparisons on unseen tasks.

    python benchmarks/accuracy.py omniglot   MAML of distmeta against a plain TorchOpt or higher loop
    python benchmarks/accuracy.py digits     MAML on digits it never trained on, against nearest neighbour
    python benchmarks/accuracy.py sinusoid   MAML against a pre-trained network that is fine-tuned (MAML paper, §5.1)

Every system is scored on the same test tasks, with the theta of the last step.
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
import torch
import torch.nn.functional as F
from raw_results import ROOT, describe_environment, interval, save_section
from training import note, relative_distance, score_nearest_neighbour, score_tasks, train_job

from distmeta.compute.numerics import apply_numerics
from distmeta.config.job import Job
from distmeta.protocols import Theta
from distmeta.runtime.problem import Problem, build_problem
from distmeta.seeding import task_ids

JOBS = ROOT / "jobs"
TEST_DIGITS = ([7, 8, 9], [0, 1, 2], [3, 4, 5])
"""The splits of `digits`, chosen before the first run."""
FINE_TUNING_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Rates for the pre-trained network. The best on validation tasks is used."""
FINE_TUNING_STEPS = (1, 10)

Rows = list[dict[str, Any]]


# --- Omniglot -----------------------------------------------------------------------------------------------------


def compare_on_omniglot(given: argparse.Namespace) -> Rows:
    """Train the same MAML with distmeta and with a peer's loop: same weights, tasks, steps and Adam."""
    return [compare_one_seed(given, seed) for seed in given.seeds]


def compare_one_seed(given: argparse.Namespace, seed: int) -> dict[str, Any]:
    overrides = [
        f"seed={seed}",
        f"tasks.path={given.store}",
        f"model.width={given.width}",
        f"run.steps={given.steps}",
        f"run.tasks_per_step={given.tasks_per_step}",
        f"run.workers={given.workers}",
    ]
    job = Job.load(JOBS / "omniglot-maml.yaml", overrides)
    note(f"seed {seed}: distmeta, {given.workers} workers")
    problem, theta, seconds = train_job(job)
    note(f"  {seconds:.0f} s\nseed {seed}: {given.peer}")
    peer_theta, peer_seconds = train_peer(job, given.peer)
    note(f"  {peer_seconds:.0f} s")

    def score(theta: Theta) -> np.ndarray:
        return score_tasks(problem, theta, "accuracy", "test", given.tasks, problem.eval_steps)[:, -1]

    accuracies = score(theta)
    peer_accuracies = score(peer_theta)
    return {
        "distmeta": interval(accuracies),
        "peer": interval(peer_accuracies),
        "untrained": interval(score(problem.init())),
        "difference": interval(accuracies - peer_accuracies),
        "seed": seed,
        "eval_inner_steps": problem.eval_steps,
        "test_tasks": given.tasks,
        "relative_distance_of_theta": relative_distance(peer_theta, theta),
        "seconds_training": {"distmeta": seconds, "peer": peer_seconds},
        "peer_name": given.peer,
    }


def train_peer(job: Job, name: str) -> tuple[Theta, float]:
    """Train with a plain loop: draw the job's tasks, the peer's meta-gradient, torch.optim.Adam."""
    problem = build_problem(job)
    module = peers.peer_module(problem)
    peer = peers.PEERS[name](module, peers.inner_loop(problem, F.cross_entropy))
    optimizer = torch.optim.Adam(module.parameters(), lr=job.outer.lr)
    started = time.perf_counter()
    with apply_numerics(job.compute.threads, deterministic=False):
        for step in range(job.run.steps):
            ids = task_ids(job.seed, "train", step, job.run.tasks_per_step)
            loss = peers.train_step(peer, optimizer, problem.family.draw("train", ids))
            if (step + 1) % 100 == 0:
                note(f"  step {step + 1}: loss {float(loss):.4f}")
    return peers.read_theta(module), time.perf_counter() - started


# --- Digits -------------------------------------------------------------------------------------------------------


def compare_on_digits(given: argparse.Namespace) -> Rows:
    """Train MAML on some digits and test it on the others, for each split."""
    return [compare_one_split(given, held_out) for held_out in TEST_DIGITS]


def compare_one_split(given: argparse.Namespace, held_out: Sequence[int]) -> dict[str, Any]:
    overrides = [f"tasks.test_digits={list(held_out)}", f"run.workers={given.workers}", f"seed={given.seed}"]
    if given.steps:
        overrides.append(f"run.steps={given.steps}")
    note(f"test digits {list(held_out)}")
    problem, theta, seconds = train_job(Job.load(JOBS / "digits-maml.yaml", overrides))
    curve = score_tasks(problem, theta, "accuracy", "test", given.tasks, problem.eval_steps)
    return {
        "test_digits": list(held_out),
        "unadapted": interval(curve[:, 0]),
        "nearest_neighbour": interval(score_nearest_neighbour(problem, given.tasks)),
        "maml": interval(curve[:, -1]),
        "eval_inner_steps": problem.eval_steps,
        "test_tasks": given.tasks,
        "seconds_training": seconds,
    }


# --- Sine waves ---------------------------------------------------------------------------------------------------


def compare_on_sinusoid(given: argparse.Namespace) -> Rows:
    """Compare MAML with the same network trained on all tasks at once and then fine-tuned at its best rate."""
    overrides = [f"seed={given.seed}"]
    if given.steps:
        overrides.append(f"run.steps={given.steps}")
    job = Job.load(JOBS / "sinusoid-maml.yaml", overrides)
    note("MAML")
    problem, theta, _ = train_job(job)
    losses = score_tasks(problem, theta, "loss", "test", given.tasks, max(FINE_TUNING_STEPS))
    algorithm: Any = problem.algorithm
    maml = describe_system("MAML", losses, dict.fromkeys(FINE_TUNING_STEPS, algorithm.inner_lr))
    note("the pre-trained network")
    pretrained = pretrain(job)
    validation = {
        rate: fine_tune(problem, pretrained, rate, "val", given.tasks) for rate in FINE_TUNING_RATES
    }
    best_rates: dict[int, float] = {}
    tuned = np.empty_like(losses)
    for steps in FINE_TUNING_STEPS:
        best = min(validation, key=lambda rate: finite_mean(validation[rate][:, steps]))
        best_rates[steps] = best
        tested = fine_tune(problem, pretrained, best, "test", given.tasks)
        tuned[:, 0] = tested[:, 0]
        tuned[:, steps] = tested[:, steps]
    return [maml, describe_system("pre-trained, fine-tuned", tuned, best_rates)]


def pretrain(job: Job) -> Theta:
    """Train with Adam on the support and query data of MAML's own tasks, for as many steps."""
    problem = build_problem(job)
    module = peers.peer_module(problem)
    optimizer = torch.optim.Adam(module.parameters(), lr=job.outer.lr)
    with apply_numerics(job.compute.threads, deterministic=False):
        for step in range(job.run.steps):
            ids = task_ids(job.seed, "train", step, job.run.tasks_per_step)
            episodes: Any = problem.family.draw("train", ids)
            x = torch.cat([episodes.support.x, episodes.query.x], dim=1).flatten(0, 1)
            y = torch.cat([episodes.support.y, episodes.query.y], dim=1).flatten(0, 1)
            optimizer.zero_grad()
            F.mse_loss(module(x), y).backward()
            optimizer.step()
    return peers.read_theta(module)


def fine_tune(problem: Problem, theta: Theta, rate: float, split: str, tasks: int) -> np.ndarray:
    """Return the losses after 0 … 10 gradient steps at another rate, [tasks, 11]."""
    algorithm: Any = copy.copy(problem.algorithm)
    algorithm.inner_lr = rate
    changed = dataclasses.replace(problem, algorithm=algorithm)
    return score_tasks(changed, theta, "loss", split, tasks, max(FINE_TUNING_STEPS))


def finite_mean(values: np.ndarray) -> float:
    """Return the mean; infinity if fine-tuning diverged."""
    return float(values.mean()) if np.isfinite(values).all() else math.inf


def describe_system(system: str, losses: np.ndarray, rates: Mapping[int, float]) -> dict[str, Any]:
    after_steps = {str(k): interval(losses[:, k]) for k in (0, *FINE_TUNING_STEPS)}
    rates_by_steps = {str(k): rate for k, rate in rates.items()}
    return {"system": system, "after_steps": after_steps, "rate": rates_by_steps, "test_tasks": len(losses)}


COMPARISONS = {"omniglot": compare_on_omniglot, "digits": compare_on_digits, "sinusoid": compare_on_sinusoid}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    common.add_argument("--tasks", type=int, default=600, help="test tasks")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("omniglot", parents=[common], help=compare_on_omniglot.__doc__)
    verb.add_argument("--steps", type=int, default=500)
    verb.add_argument("--width", type=int, default=32)
    verb.add_argument("--tasks-per-step", type=int, default=16)
    verb.add_argument("--peer", choices=["torchopt", "higher"], default="torchopt")
    verb.add_argument("--seeds", type=int, nargs="+", default=[0])
    verb.add_argument("--workers", type=int, default=2, help="of distmeta; does not change the result")
    verb.add_argument("--store", default="data/omniglot.arrow", help="built by `distmeta data omniglot`")
    verb = verbs.add_parser("digits", parents=[common], help=compare_on_digits.__doc__)
    verb.add_argument("--steps", type=int, help="default: the job's")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--workers", type=int, default=2, help="does not change the result")
    verb = verbs.add_parser("sinusoid", parents=[common], help=compare_on_sinusoid.__doc__)
    verb.add_argument("--steps", type=int, help="default: the job's")
    verb.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.quick:
        given.steps = 3
        given.tasks = 25
    if given.verb == "omniglot" and not Path(given.store).is_file():
        parser.error(f"--store: {given.store} does not exist: see benchmarks/README.md")
    environment = describe_environment()
    save_section("accuracy", given.verb, environment, COMPARISONS[given.verb](given), given.quick)


if __name__ == "__main__":
    main()
