"""Peak memory and time of one meta-gradient against the number of inner steps K, by both kinds of differentiation.

    python benchmarks/memory.py [--quick] [--store data/omniglot.arrow]
    python benchmarks/memory.py hvp [--quick]      (see hessian.py)

One task of conv4-64 with max pooling, 5-way 5-shot Omniglot with 15 queries, MAML. Each row of the first table is a
process of its own: its peak over what it had before its first gradient, without the φ_k that constant memory keeps,
which are counted apart. Times are medians of ratios in one process, the two in turn; their gradients are compared too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hessian
import report
import torch

from distmeta.compute.episodes import to_device
from distmeta.compute.gradient import Execution, shard_gradient
from distmeta.config.job import Job
from distmeta.runtime.problem import build, numerics_of
from distmeta.seeding import task_ids

KINDS = ("reverse", "constant-memory")
STEPS = {"reverse": (5, 20, 50), "constant-memory": (5, 20, 50, 200)}
RATIO_AT = (1, 5, 20)


class Gradient:
    """The meta-gradient of one task, with any number of inner steps; `overrides` of its job."""

    def __init__(self, store: str, *overrides: str):
        self.job = Job.load(
            report.ROOT / "jobs" / "omniglot-maml.yaml",
            [
                f"tasks.path={store}",
                "tasks.shots=5",
                "algorithm.inner_lr=0.01",
                "model.pool=max",
                "run.workers=0",
                *overrides,
            ],
        )
        ids, problem = task_ids(0, "train", 0, 1), build(self.job)
        self.device = problem.device
        self.episodes = to_device(problem.family.draw("train", ids), self.device), ids

    def __call__(self, inner_steps: int, differentiation: str) -> torch.Tensor:
        return self.prepared(inner_steps, differentiation)()

    def prepared(self, inner_steps: int, differentiation: str) -> Callable[[], torch.Tensor]:
        """What computes it as often as it is called."""
        problem = build(self.job.replace(algorithm={"inner_steps": inner_steps}))
        theta = to_device(problem.init(), self.device)

        def call() -> torch.Tensor:
            with numerics_of(self.job, self.device):
                result = shard_gradient(
                    problem.algorithm, problem.score("train"), theta, *self.episodes,
                    Execution("loop", 1, differentiation),
                )  # fmt: skip
            return torch.cat([value.flatten() for value in result.gradient.values()])

        return call


def peak_mb() -> float:
    """Of this program alone: getrusage counts what the process it was forked from had, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def one(store: str, inner_steps: int, differentiation: str) -> dict[str, float]:
    """What a process of its own needs at its peak, and what of it the states are."""
    gradient = Gradient(store)
    start = peak_mb()
    kept = inner_steps if differentiation == "constant-memory" else 0
    phi_mb = 4 * kept * gradient(inner_steps, differentiation).numel() / 2**20
    return {"peak_mb": peak_mb() - start - phi_mb, "phi_mb": phi_mb}


def ratios(store: str, rounds: int) -> dict[int, dict[str, float]]:
    """Seconds of constant memory over seconds of the whole graph, and how far their gradients are apart."""
    gradient, found = Gradient(store), {}
    for inner_steps in RATIO_AT:
        exact, near = (gradient(inner_steps, kind) for kind in KINDS)
        times: list[list[float]] = []
        for _ in range(rounds):
            row = []
            for kind in KINDS:
                started = time.perf_counter()
                gradient(inner_steps, kind)
                row.append(time.perf_counter() - started)
            times.append(row)
        found[inner_steps] = {
            "seconds_reverse": statistics.median(row[0] for row in times),
            "ratio": statistics.median(row[1] / row[0] for row in times),
            "apart": float((exact - near).norm() / exact.norm()),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("hvp",), help="Hessian-vector products instead")
    parser.add_argument("--store", default="data/omniglot.arrow", help="built by `distmeta data omniglot`")
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    parser.add_argument("--one", nargs=2, metavar=("K", "KIND"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.what == "hvp":
        hessian.main(given.quick, given.one)
        return
    if not Path(given.store).is_file():
        parser.error(f"--store: {given.store} does not exist: see benchmarks/README.md")
    if given.one:
        print(json.dumps(one(given.store, int(given.one[0]), given.one[1])))
        return
    start, rows = report.environment(), []
    for kind in KINDS:
        for inner_steps in STEPS[kind][: 2 if given.quick else None]:
            command = [sys.executable, __file__, "--store", given.store, "--one", str(inner_steps), kind]
            env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed blocks go back at once
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
            rows.append({"kind": kind, "steps": inner_steps, **json.loads(done.stdout.splitlines()[-1])})
    times = ratios(given.store, 1 if given.quick else 5)
    cells = [
        [
            row["kind"],
            str(row["steps"]),
            f"{row['peak_mb']:.0f}",
            f"{row['phi_mb']:.0f}",
        ]
        for row in rows
    ]
    print(report.table(["differentiation", "K", "peak, MB", "φ_k, MB"], cells), "\n")
    cells = [
        [str(k), f"{row['seconds_reverse']:.3f}", f"{row['ratio']:.2f}", f"{row['apart']:.0e}"]
        for k, row in times.items()
    ]
    header = ["K", "whole graph, s", "constant memory / whole graph", "∆ of the gradients"]
    print(report.table(header, cells))
    result: dict[str, Any] = {"peaks": rows, "times": times}
    report.write("memory", start, result, quick=given.quick)


if __name__ == "__main__":
    main()
