"""Peak memory and time of one meta-gradient against the number of inner steps, by both kinds of differentiation.

    python benchmarks/memory.py [--store data/omniglot.arrow]
    python benchmarks/memory.py hvp          Hessian-vector products (hessian.py)

One task of conv4-64 with max pooling, 5-way 5-shot Omniglot with 15 queries, MAML. A peak is that of a separate
process, beyond what it had before its first gradient, without the φ_k that constant memory stores; those are counted
separately. Times are medians of ratios in one process, in turn. The two gradients are compared, too.
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

import hessian
import torch
from raw_results import ROOT, describe_environment, save_section

from distmeta.compute.episodes import to_device
from distmeta.compute.execution import Execution, shard_gradient
from distmeta.config.job import Job
from distmeta.runtime.problem import apply_job_numerics, build_problem
from distmeta.seeding import task_ids

KINDS = ("reverse", "constant-memory")
STEPS = {"reverse": (5, 20, 50), "constant-memory": (5, 20, 50, 200)}
TIMED_STEPS = (1, 5, 20)


class MetaGradient:
    """The meta-gradient of one task with any number of inner steps."""

    def __init__(self, store: str, *overrides: str):
        fixed = [
            f"tasks.path={store}",
            "tasks.shots=5",
            "algorithm.inner_lr=0.01",
            "model.pool=max",
            "run.workers=0",
        ]
        self.job = Job.load(ROOT / "jobs" / "omniglot-maml.yaml", [*fixed, *overrides])
        problem = build_problem(self.job)
        self.device = problem.device
        self.ids = task_ids(0, "train", 0, 1)
        self.episodes = to_device(problem.family.draw("train", self.ids), self.device)

    def compute(self, inner_steps: int, differentiation: str) -> torch.Tensor:
        return self.prepare(inner_steps, differentiation)()

    def prepare(self, inner_steps: int, differentiation: str) -> Callable[[], torch.Tensor]:
        """Return a function that computes it, flat."""
        problem = build_problem(self.job.replace(algorithm={"inner_steps": inner_steps}))
        theta = to_device(problem.init(), self.device)
        execution = Execution("loop", 1, differentiation)
        score = problem.score("train")

        def compute() -> torch.Tensor:
            with apply_job_numerics(self.job, self.device):
                result = shard_gradient(problem.algorithm, score, theta, self.episodes, self.ids, execution)
            return torch.cat([value.flatten() for value in result.gradient.values()])

        return compute


def peak_mb() -> float:
    """Return the peak memory of this program. getrusage would also count the process that started it."""
    return hessian.read_status_kb("VmHWM") / 1024


def measure_peak(store: str, inner_steps: int, differentiation: str) -> dict[str, float]:
    """Return the peak of this process, and the memory of the stored φ_k."""
    gradient = MetaGradient(store)
    before = peak_mb()
    elements = gradient.compute(inner_steps, differentiation).numel()
    stored = inner_steps if differentiation == "constant-memory" else 0
    phi_mb = 4 * stored * elements / 2**20
    return {"peak_mb": peak_mb() - before - phi_mb, "phi_mb": phi_mb}


def measure_peak_in_process(store: str, inner_steps: int, differentiation: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--store", store, "--one", str(inner_steps), differentiation]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed blocks are returned at once
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure_times(store: str, inner_steps: int, rounds: int) -> dict[str, float]:
    """Return the seconds of constant memory over those of reverse, and the distance of their gradients."""
    gradient = MetaGradient(store)
    exact = gradient.compute(inner_steps, "reverse")
    other = gradient.compute(inner_steps, "constant-memory")
    rows = []
    for _ in range(rounds):
        seconds = {}
        for kind in KINDS:
            started = time.perf_counter()
            gradient.compute(inner_steps, kind)
            seconds[kind] = time.perf_counter() - started
        rows.append(seconds)
    return {
        "inner_steps": inner_steps,
        "seconds_reverse": statistics.median(row["reverse"] for row in rows),
        "ratio": statistics.median(row["constant-memory"] / row["reverse"] for row in rows),
        "apart": float((exact - other).norm() / exact.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("hvp",), help="Hessian-vector products instead")
    parser.add_argument("--store", default="data/omniglot.arrow", help="built by `distmeta data omniglot`")
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.what == "hvp" and given.one:
        print(json.dumps(hessian.measure_peak(*given.one)))
        return
    if given.what == "hvp":
        hessian.measure_products(given.quick)
        return
    if not Path(given.store).is_file():
        parser.error(f"--store: {given.store} does not exist: see benchmarks/README.md")
    if given.one:
        print(json.dumps(measure_peak(given.store, int(given.one[0]), given.one[1])))
        return
    environment = describe_environment()
    peaks = []
    for kind in KINDS:
        for steps in STEPS[kind][: 2 if given.quick else None]:
            figures = measure_peak_in_process(given.store, steps, kind)
            peaks.append({"differentiation": kind, "inner_steps": steps, **figures})
    save_section("memory", "peaks", environment, peaks, given.quick)
    rounds = 1 if given.quick else 5
    times = [measure_times(given.store, steps, rounds) for steps in TIMED_STEPS]
    save_section("memory", "times", environment, times, given.quick)


if __name__ == "__main__":
    main()
