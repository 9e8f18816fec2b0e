"""Every method on the same data in the same time: what does each learn, and what does it cost?

    python benchmarks/methods.py accuracy   5-way Omniglot, two unseen alphabets, the same budget for each training
    python benchmarks/methods.py cost       time and memory of one meta-gradient, relative to MAML

`accuracy` trains each method's job, `jobs/omniglot-METHOD.yaml`, at a width that fits the machine, for `--minutes` of
one core. The number of steps is the budget divided by the processor time per step of a short trial. 1-shot with three
seeds, 5-shot with one, each run in its own process, as many at a time as there are cores. Runs that are in the results
already are not repeated.

Two baselines on the same test tasks: the label of the nearest support image (Euclidean, on pixels), and the same
network trained from scratch on each support set (Adam; rate and steps chosen on validation tasks).
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from raw_results import ROOT, count_cores, describe_environment, load_study, save_section
from training import StepTimes, note, score_nearest_neighbour, score_tasks, train_job

from distmeta.compute.episodes import make_episodes
from distmeta.compute.execution import shard_gradient
from distmeta.compute.numerics import apply_numerics
from distmeta.config.job import Job
from distmeta.runtime.problem import Problem, build_problem
from distmeta.runtime.resolve import resolve
from distmeta.seeding import task_ids, torch_seed

JOBS = ROOT / "jobs"
BASELINES = ("nearest-neighbour", "from-scratch")
QUERIES = 75
"""Query images of a test task: 5 ways × 15."""
SMALL = ["run.tasks_per_step=4", "run.shards=1", "outer.lr=2.0e-3"]
"""More and smaller outer steps than in the papers, for short trainings."""
FEW = ["run.tasks_per_step=2", "run.shards=1", "outer.lr=2.0e-3", "tasks.queries=5"]
"""Even smaller ones with fewer query images, for methods with expensive tasks."""
SETTINGS: dict[str, list[str]] = {
    "maml": SMALL,
    "fomaml": SMALL,
    "maml-plus-plus": [*SMALL, "algorithm.msl_steps=100", "algorithm.first_order_steps=50"],
    "anil": SMALL,
    "boil": SMALL,
    "cavia": [*FEW, "outer.lr=1.0e-3", "algorithm.inner_lr=4.0"],
    "reptile": [
        "tasks.queries=5",
        "run.eval_inner_steps=20",
        "run.tasks_per_step=2",
        "run.shards=1",
        "algorithm.inner_lr=3.0e-3",
    ],
    "imaml": [*FEW, "algorithm.inner_steps=8", "algorithm.cg_steps=2"],
    "meta-sgd": SMALL,
    "meta-curvature": SMALL,
    "gradient-norm": SMALL,
    "contrastive": SMALL,
    "hypernet": SMALL,
    "protonet": ["run.tasks_per_step=1", "run.shards=1", "outer.lr=2.0e-3", "tasks.ways=20"],
    "matching": ["run.tasks_per_step=4", "run.shards=1", "outer.lr=2.0e-3"],
    "relation": [*SMALL, "tasks.queries=15"],
    "imp": SMALL,
    "lstm": [*FEW, "run.tasks_per_step=1", "outer.lr=1.0e-3", "algorithm.inner_steps=5"],
    "mann": [*SMALL, "model={type: conv4, width: 32, pool: stride}"],
    "ntm": [*SMALL, "model={type: conv4, width: 32, pool: stride}"],
    "dnc": [*SMALL, "model={type: conv4, width: 32, pool: stride}"],
    "snail": [*SMALL, "tasks.queries=5", "outer.lr=1.0e-3"],
}
"""What a short training changes in the job of each method."""
OWN_SHOTS = ("reptile",)
"""Methods that train with another number of shots than they are tested with."""
TRIAL_STEPS = 6
"""Steps that are timed before a run. The first is not counted."""
SCRATCH_RATES = (1e-3, 1e-2)
SCRATCH_STEPS = (10, 50)

Run = tuple[str, int, int]
"""Method, shots, seed."""


def load_job(
    method: str, given: argparse.Namespace, shots: int, seed: int, *more: str, own_algorithm: bool = False
) -> Job:
    """Return the job of a method at the size of the benchmark.

    Args:
        own_algorithm: keep the job's `algorithm` section instead of the changes for a short training.
    """
    settings = SETTINGS[method]
    if own_algorithm:
        settings = [text for text in settings if not text.startswith("algorithm.")]
    overrides = [
        f"tasks.path={given.store}",
        f"seed={seed}",
        f"model.width={given.width}",
        "model.pool=stride",
        "run.workers=0",
        "tracking.type=none",
        "run.eval_every=0",
        "run.checkpoint_every=0",
        "run.patience=null",
        "tasks.eval_ways=5",
        f"tasks.eval_shots={shots}",
        "tasks.eval_queries=15",
    ]
    if method not in OWN_SHOTS:
        overrides.append(f"tasks.shots={shots}")
    return Job.load(JOBS / f"omniglot-{method}.yaml", [*overrides, *settings, *more])


# --- Accuracy -----------------------------------------------------------------------------------------------------


def measure_accuracy(given: argparse.Namespace) -> None:
    """Run what is missing. Save after each run."""
    environment = describe_environment()
    section = load_study("methods").get("accuracy", {"rows": []})
    rows = {(row["method"], row["shots"], row["seed"]): row for row in section["rows"]}
    first_seed, *other_seeds = given.seeds
    settings = [(1, first_seed), (5, first_seed), *((1, seed) for seed in other_seeds)]
    runs = [(method, shots, seed) for shots, seed in settings for method in [*BASELINES, *given.methods]]
    missing = [run for run in runs if run not in rows]
    note(f"{len(runs)} runs, {len(runs) - len(missing)} done already")
    with ThreadPoolExecutor(given.processes) as pool:
        for run, row in zip(missing, pool.map(lambda run: start_process(given, run), missing), strict=True):
            if row is not None:
                rows[run] = row
                save_section("methods", "accuracy", environment, [rows[run] for run in sorted(rows)])
    failed = [" ".join(map(str, run)) for run in runs if run not in rows]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def start_process(given: argparse.Namespace, run: Run) -> dict[str, Any] | None:
    """Do one run in its own process, whose peak memory is the run's. Return its row, or None if it failed."""
    options = [f"--store={given.store}", f"--minutes={given.minutes}", f"--tasks={given.tasks}"]
    command = [sys.executable, __file__, "one", *map(str, run), *options, f"--width={given.width}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        note(f"{run} failed: {done.stderr}")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def run_once(given: argparse.Namespace) -> None:
    """Do one run and print its row."""
    measured = run_baseline(given) if given.method in BASELINES else train_and_score(given)
    row = {"method": given.method, "shots": given.shots, "seed": given.seed, "peak_mb": round(peak_mb())}
    row["date"] = describe_environment()["date"]
    print(json.dumps(row | measured))


def train_and_score(given: argparse.Namespace) -> dict[str, Any]:
    """Train for the budget and score unseen tasks."""
    job = load_job(given.method, given, given.shots, given.seed)
    trial = StepTimes()
    train_job(job.replace(run={"steps": TRIAL_STEPS}), trial)
    seconds = statistics.median(trial.processor_seconds[1:])
    steps = max(2, int(60 * given.minutes / seconds))
    times = StepTimes()
    problem, theta, _ = train_job(job.replace(run={"steps": steps}), times)
    with apply_numerics(1, deterministic=False):
        curve = score_tasks(problem, theta, "accuracy", "test", given.tasks, problem.eval_steps)
    return {
        "before": float(curve[:, 0].mean()) if problem.algorithm.inner_steps else None,
        "steps": steps,
        "tasks_per_step": job.run.tasks_per_step,
        "seconds_per_step": statistics.median(times.processor_seconds),
        "correct_of_75": count_correct(curve[:, -1]),
    }


def run_baseline(given: argparse.Namespace) -> dict[str, Any]:
    problem = build_problem(load_job("maml", given, given.shots, given.seed))
    if given.method == "nearest-neighbour":
        return {"correct_of_75": count_correct(score_nearest_neighbour(problem, given.tasks))}
    validation = {
        (rate, steps): float(train_from_scratch(problem, "val", 40, rate, steps).mean())
        for rate in SCRATCH_RATES
        for steps in SCRATCH_STEPS
    }
    rate, steps = max(validation, key=lambda key: validation[key])
    accuracies = train_from_scratch(problem, "test", given.tasks, rate, steps)
    return {"rate": rate, "fit_steps": steps, "correct_of_75": count_correct(accuracies)}


def count_correct(accuracies: np.ndarray) -> list[int]:
    """Return the number of correct query images of each task."""
    return [round(QUERIES * float(accuracy)) for accuracy in accuracies]


def train_from_scratch(problem: Problem, split: str, tasks: int, rate: float, steps: int) -> np.ndarray:
    """Return the accuracy of the job's network, trained on each support set from a new initialisation."""
    ids = task_ids(problem.job.seed, split, 0, tasks)
    episodes: Any = problem.family.draw(split, ids)
    support = episodes.support
    query = episodes.query
    module = problem.model.module
    untrained = copy.deepcopy(module.state_dict())
    accuracies = []
    for t in range(tasks):
        module.load_state_dict(untrained)
        torch.manual_seed(torch_seed(ids[t]))
        for layer in module.modules():
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
                layer.reset_parameters()
        optimizer = torch.optim.Adam(module.parameters(), lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(module(support.x[t]), support.y[t]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracies.append(float((module(query.x[t]).argmax(1) == query.y[t]).float().mean()))
    return np.array(accuracies)


# --- Cost ---------------------------------------------------------------------------------------------------------


def measure_cost(given: argparse.Namespace) -> None:
    """Measure each method's meta-gradient beside MAML's: width 64, 5-way 1-shot, 15 queries."""
    environment = describe_environment()
    rows = []
    for method in given.methods:
        command = [sys.executable, __file__, "one-cost", method, f"--store={given.store}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            note(f"{method} failed: {done.stderr}")
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    save_section("methods", "cost", environment, rows)


def measure_cost_once(given: argparse.Namespace) -> None:
    """Print the median time per task, in turn with MAML, and the peak memory beyond what the process had before."""
    given.width = 64
    torch.set_num_threads(1)
    size = ["tasks.ways=5", "tasks.shots=1", "tasks.queries=15", "run.tasks_per_step=4", "run.shards=1"]
    size.append("compute.differentiation=reverse")  # with auto, a trial would count towards the memory
    compute = prepare_shard(load_job(given.method, given, 1, 0, *size, own_algorithm=True))
    before = peak_mb()
    compute()
    extra_mb = peak_mb() - before
    compute_maml = prepare_shard(load_job("maml", given, 1, 0, *size))
    pairs = [(time_call(compute), time_call(compute_maml)) for _ in range(7)]
    row = {
        "method": given.method,
        "ms_per_task": round(1e3 * statistics.median(seconds for seconds, _ in pairs) / 4, 1),
        "times_maml": round(statistics.median(seconds / maml for seconds, maml in pairs), 2),
        "extra_mb": round(extra_mb),
    }
    print(json.dumps(row))


def prepare_shard(job: Job) -> Callable[[], object]:
    """Return a function that computes the meta-gradient of one shard of four tasks."""
    problem = resolve(build_problem(job))
    algorithm = problem.algorithm
    theta = problem.init()
    ids = task_ids(0, "train", 0, 4)
    episodes = make_episodes(problem.family, algorithm, theta, "train", ids, algorithm.inner_steps)
    score = problem.score("train")
    return lambda: shard_gradient(algorithm, score, theta, episodes, ids, problem.execution)


def time_call(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--store", default="data/omniglot.arrow", help="built by `distmeta data omniglot`")
    common.add_argument(
        "--methods", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="METHOD"
    )
    common.add_argument("--minutes", type=float, default=1.0, help="of one core, per training")
    common.add_argument("--tasks", type=int, default=300, help="test tasks per run")
    common.add_argument("--width", type=int, default=32)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("accuracy", parents=[common], help=measure_accuracy.__doc__)
    verb.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    verb.add_argument("--processes", type=int, default=count_cores(), help="runs at a time")
    verbs.add_parser("cost", parents=[common], help=measure_cost.__doc__)
    verb = verbs.add_parser("one", parents=[common], help=run_once.__doc__)
    verb.add_argument("method")
    verb.add_argument("shots", type=int)
    verb.add_argument("seed", type=int)
    verbs.add_parser("one-cost", parents=[common], help=measure_cost_once.__doc__).add_argument("method")
    given = parser.parse_args()
    given.store = str(Path(given.store).absolute())
    if not Path(given.store).is_file():
        parser.error(f"--store: {given.store} does not exist: see benchmarks/README.md")
    actions = {
        "accuracy": measure_accuracy,
        "cost": measure_cost,
        "one": run_once,
        "one-cost": measure_cost_once,
    }
    actions[given.verb](given)


if __name__ == "__main__":
    main()
