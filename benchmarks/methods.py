"""Every method on the same real data, in the same time: which learns what, and at what cost?

    python benchmarks/methods.py accuracy   5-way Omniglot, two alphabets never seen, an equal budget a run
    python benchmarks/methods.py cost       time and memory of one meta-gradient, against MAML's
    python benchmarks/methods.py table      the tables and the plot again, from results/methods/

`accuracy` trains each method's job, `jobs/omniglot-METHOD.yaml`, on a width that fits the machine for `--minutes` of
one core: its steps are the budget over the processor seconds a step, measured before the run. 1-shot with three
seeds, 5-shot with one; as many runs at a time as there are cores, each a process of its own. It can be stopped and
started again: a finished run is a file in results/methods/ and is not repeated.

Two baselines on the same test tasks: the label of the nearest support image (Euclidean, on pixels), and the same
network trained from scratch on each task's support set (Adam; its rate and number of steps chosen on validation tasks).
`±` is 1.96·s/√n over all test tasks of the seeds; the last step's theta is scored.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
import torch.nn.functional as F
from training import Progress, nearest_neighbour, said, scores, trained

from distmeta.compute.episodes import episodes_of
from distmeta.compute.gradient import shard_gradient
from distmeta.compute.numerics import numerics
from distmeta.config.job import Job
from distmeta.runtime.problem import Problem, build
from distmeta.runtime.resolve import resolve
from distmeta.seeding import task_ids, torch_seed

JOBS = report.ROOT / "jobs"
FOLDER = report.RESULTS / "methods"
BASELINES = ("nearest-neighbour", "from-scratch")
SMALL = ["run.tasks_per_step=4", "run.shards=1", "outer.lr=2.0e-3"]
"""Meta-batches for a budget of a minute: more and smaller outer steps than the papers'."""
FEW = ["run.tasks_per_step=2", "run.shards=1", "outer.lr=2.0e-3", "tasks.queries=5"]
"""Smaller ones yet, with fewer query rows: for methods whose tasks are dear."""
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
"""What a short run changes in each method's job."""
OWN_SHOTS = ("reptile",)
"""Methods that train on other shots than they are tested on."""
PROBE_STEPS = 6
"""Steps timed before a run to settle its length; the first is not counted."""
SCRATCH_RATES, SCRATCH_STEPS = (1e-3, 1e-2), (10, 50)


def job_of(
    method: str, given: argparse.Namespace, shots: int, seed: int, *more: str, own: bool = False
) -> Job:
    """The method's job at the benchmark's size; `own`: with the algorithm as the job has it, not a short run's."""
    settings = [text for text in SETTINGS[method] if not (own and text.startswith("algorithm."))]
    path = JOBS / f"omniglot-{method}.yaml"
    common = [
        f"tasks.path={given.store}", f"seed={seed}", f"model.width={given.width}", "model.pool=stride",
        "run.workers=0",
        "tracking.type=none", "run.eval_every=0", "run.checkpoint_every=0", "run.patience=null",
        "tasks.eval_ways=5", f"tasks.eval_shots={shots}", "tasks.eval_queries=15",
    ]  # fmt: skip
    if method not in OWN_SHOTS:
        common.append(f"tasks.shots={shots}")
    return Job.load(path, [*common, *settings, *more])


# accuracy


def accuracy(given: argparse.Namespace) -> None:
    """Runs what is missing, then shows the table."""
    first, *others = given.seeds
    wanted = [(1, first), (5, first), *((1, seed) for seed in others)]
    runs = [(method, shots, seed) for shots, seed in wanted for method in [*BASELINES, *given.methods]]
    missing = [run for run in runs if not result_file(*run).is_file()]
    said(f"{len(runs)} runs, {len(runs) - len(missing)} done already")
    with ThreadPoolExecutor(given.processes) as pool:
        failed = [line for line in pool.map(lambda run: in_a_process(given, *run), missing) if line]
    table(given)
    if failed:
        sys.exit("failed:\n" + "\n".join(failed))


def in_a_process(given: argparse.Namespace, method: str, shots: int, seed: int) -> str | None:
    """One run in a process of its own, whose peak memory is the run's; what went wrong, if anything did."""
    options = [
        f"--store={given.store}",
        f"--minutes={given.minutes}",
        f"--tasks={given.tasks}",
        f"--width={given.width}",
    ]
    command = [sys.executable, __file__, "one", method, str(shots), str(seed), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = (done.stderr.strip().splitlines() or [""])[-1]
    said(f"{method} {shots}-shot seed {seed}: {line}")
    return f"{method} {shots}-shot seed {seed}: {line}" if done.returncode else None


def result_file(method: str, shots: int, seed: int) -> Path:
    return FOLDER / f"{method}-{shots}shot-{seed}.json"


def one(given: argparse.Namespace) -> None:
    """One run, written to its file."""
    start = report.environment()
    method, shots, seed = given.method, given.shots, given.seed
    measured = baseline(given) if method in BASELINES else train_and_score(given)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    record = {
        "method": method,
        "shots": shots,
        "seed": seed,
        "peak_mb": round(peak),
        **measured,
        "environment": start,
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    result_file(method, shots, seed).write_text(
        json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    said(report.percent(report.interval(np.array(measured["accuracies"]))))


def train_and_score(given: argparse.Namespace) -> dict[str, Any]:
    """Trains for the budget and scores unseen tasks."""
    job = job_of(given.method, given, given.shots, given.seed)
    probe = Progress()
    trained(job.replace(run={"steps": PROBE_STEPS}), probe)
    steps = max(2, int(60 * given.minutes / statistics.median(probe.processor[1:])))
    progress = Progress()
    problem, theta, _ = trained(job.replace(run={"steps": steps}), progress)
    with numerics(1, deterministic=False):
        curve = scores(problem, theta, "accuracy", "test", given.tasks, problem.eval_steps)
    return {
        "accuracies": [round(float(value), 6) for value in curve[:, -1]],
        "before": float(curve[:, 0].mean()) if problem.algorithm.inner_steps else None,
        "steps": steps,
        "tasks_per_step": job.run.tasks_per_step,
        "seconds_a_step": statistics.median(progress.processor),
        "job": job.tree(),
    }


def baseline(given: argparse.Namespace) -> dict[str, Any]:
    problem = build(job_of("maml", given, given.shots, given.seed))
    if given.method == "nearest-neighbour":
        values, chosen = nearest_neighbour(problem, given.tasks), {}
    else:
        grid = {
            (rate, steps): float(from_scratch(problem, "val", 40, rate, steps).mean())
            for rate in SCRATCH_RATES
            for steps in SCRATCH_STEPS
        }
        rate, steps = max(grid, key=lambda key: grid[key])
        values, chosen = (
            from_scratch(problem, "test", given.tasks, rate, steps),
            {"rate": rate, "fit_steps": steps},
        )
    return {"accuracies": [round(float(value), 6) for value in values], **chosen}


def from_scratch(problem: Problem, split: str, tasks: int, rate: float, steps: int) -> np.ndarray:
    """Accuracy of the job's network, fitted to each task's support set from a new initialisation."""
    ids = task_ids(problem.job.seed, split, 0, tasks)
    support, query = problem.family.draw(split, ids)
    module, accuracies = problem.model.module, []
    for t in range(tasks):
        torch.manual_seed(torch_seed(ids[t]))
        for part in module.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
        optimizer = torch.optim.Adam(module.parameters(), lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(module(support.x[t]), support.y[t]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracies.append(float((module(query.x[t]).argmax(1) == query.y[t]).float().mean()))
    return np.array(accuracies)


# cost


def cost(given: argparse.Namespace) -> None:
    """Each method's meta-gradient beside MAML's, in a process of its own; width 64, 5-way 1-shot, 15 queries."""
    start, rows = report.environment(), {}
    for method in given.methods:
        done = subprocess.run(
            [sys.executable, __file__, "one-cost", method, f"--store={given.store}"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said(f"{method}: {(done.stderr.strip().splitlines() or [''])[-1]}")
            continue
        rows[method] = json.loads(done.stdout.splitlines()[-1])
        said(f"{method}: {rows[method]}")
    report.write("methods-cost", start, {"rows": rows}, quick=False)


def one_cost(given: argparse.Namespace) -> None:
    """Medians of seconds a task, taken in turn with MAML's; and the peak memory over what the process had before."""
    given.width = 64
    torch.set_num_threads(1)
    size = ["tasks.ways=5", "tasks.shots=1", "tasks.queries=15", "run.tasks_per_step=4", "run.shards=1"]
    size.append("compute.differentiation=reverse")  # settled, so that nothing is tried beforehand
    ours = shard_of(job_of(given.method, given, 1, 0, *size, own=True))
    own_peak = -peak_mb()
    ours()
    own_peak += peak_mb()
    maml = shard_of(job_of("maml", given, 1, 0, *size))
    pairs = [(timed(ours), timed(maml)) for _ in range(7)]
    print(
        json.dumps(
            {
                "ms_a_task": round(1e3 * statistics.median(a for a, _ in pairs) / 4, 1),
                "times_maml": round(statistics.median(a / b for a, b in pairs), 2),
                "extra_mb": round(own_peak),
            }
        )
    )


def shard_of(job: Job) -> Callable[[], object]:
    """A call that computes the meta-gradient of one shard of four tasks."""
    problem = resolve(build(job))
    theta, ids = problem.init(), task_ids(0, "train", 0, 4)
    episodes = episodes_of(
        problem.family, problem.algorithm, theta, "train", ids, problem.algorithm.inner_steps
    )
    arguments = (problem.algorithm, problem.score("train"), theta, episodes, ids, problem.execution)
    return lambda: shard_gradient(*arguments)


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# table


def table(given: argparse.Namespace) -> None:
    """One table and one plot of the runs that are there."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))]
    rows = [row for method in [*BASELINES, *SETTINGS] if (row := summary(method, found))]
    path = report.RESULTS / "methods-cost.json"
    costs = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else {}
    beaten = {name: next((row for row in rows if row["method"] == name), None) for name in BASELINES}
    cells = []
    for row in sorted(rows, key=lambda row: -(row["one"] or {"mean": 0})["mean"]):
        price = costs.get(row["method"], {})
        cells.append(
            [
                row["method"],
                *(report.percent(row[key]) if row[key] else "–" for key in ("one", "five")),
                ", ".join(name for name, other in beaten.items() if other and not above(row, other)) or "–",
                str(row["steps"] or "–"),
                f"{row['seconds']:.2f}" if row["seconds"] else "–",
                f"{row['peak_mb']:,}",
                f"{price['times_maml']}" if price else "–",
                f"{price['extra_mb']}" if price else "–",
            ]
        )
    header = [
        "method", "1-shot", "5-shot", "not above (1-shot)", "steps", "s a step", "peak MB", "time/MAML", "MB, 4 tasks",
    ]  # fmt: skip
    print(report.table(header, cells))
    plot(rows)


def summary(method: str, found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """All seeds of a method together."""
    runs = {
        shots: [run for run in found if run["method"] == method and run["shots"] == shots] for shots in (1, 5)
    }
    if not any(runs.values()):
        return None
    pooled = {
        shots: report.interval(np.concatenate([run["accuracies"] for run in part])) if part else None
        for shots, part in runs.items()
    }
    first = runs[1] or runs[5]
    seconds = [run["seconds_a_step"] for run in first if "seconds_a_step" in run]
    return {
        "method": method,
        "one": pooled[1],
        "five": pooled[5],
        "steps": round(statistics.median(run["steps"] for run in first)) if seconds else None,
        "seconds": statistics.median(seconds) if seconds else None,
        "peak_mb": max(run["peak_mb"] for run in first),
    }


def above(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the two 1-shot intervals are apart, this one higher. A system is not above itself."""
    if row is other or not row["one"] or not other["one"]:
        return row is other
    return row["one"]["mean"] - row["one"]["ci95"] > other["one"]["mean"] + other["one"]["ci95"]


def plot(rows: Sequence[Mapping[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = sorted((row for row in rows if row["one"]), key=lambda row: row["one"]["mean"])
    figure, axes = pyplot.subplots(figsize=(8, 0.3 * len(shown) + 1.2), layout="constrained")
    places = np.arange(len(shown))
    for key, colour, shift, label in (
        ("one", "tab:blue", 0.2, "1-shot"),
        ("five", "tab:orange", -0.2, "5-shot"),
    ):
        part = [(place, row[key]) for place, row in zip(places, shown, strict=True) if row[key]]
        values, errors = ([100 * figure[name] for _, figure in part] for name in ("mean", "ci95"))
        axes.barh([place + shift for place, _ in part], values, 0.38, xerr=errors, color=colour, label=label)
    axes.set_yticks(places, [row["method"] for row in shown])
    axes.axvline(20, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("accuracy on unseen 5-way tasks, % (dotted: chance)")
    axes.legend(loc="lower right")
    figure.savefig(report.RESULTS / "methods.png", dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--store", default="data/omniglot.arrow", help="built by `distmeta data omniglot`")
    common.add_argument(
        "--methods", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="METHOD"
    )
    common.add_argument("--minutes", type=float, default=1.0, help="of one core, a training")
    common.add_argument("--tasks", type=int, default=300, help="test tasks a run")
    common.add_argument("--width", type=int, default=32)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("accuracy", parents=[common], help=accuracy.__doc__)
    verb.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    verb.add_argument("--processes", type=int, default=report.cores(), help="runs at a time")
    verbs.add_parser("cost", parents=[common], help=cost.__doc__)
    verbs.add_parser("table", parents=[common], help=table.__doc__)
    verb = verbs.add_parser("one", parents=[common], help=one.__doc__)
    verb.add_argument("method")
    verb.add_argument("shots", type=int)
    verb.add_argument("seed", type=int)
    verbs.add_parser("one-cost", parents=[common], help=one_cost.__doc__).add_argument("method")
    given = parser.parse_args()
    given.store = str(Path(given.store).absolute())
    if given.verb != "table" and not Path(given.store).is_file():
        parser.error(f"--store: {given.store} does not exist: see benchmarks/README.md")
    {"accuracy": accuracy, "cost": cost, "table": table, "one": one, "one-cost": one_cost}[given.verb](given)


if __name__ == "__main__":
    main()
