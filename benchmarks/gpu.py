"""MAML on one GPU: throughput in float32, TF32 and bfloat16 beside its peers, and memory against the inner steps.

    python benchmarks/gpu.py [--device cuda|cpu] [--quick] [--only conv4-16 memory …] [--precisions bf16 …] [--eager]

It has not been run on a GPU yet, so the report has no table of it; it prints its own. One process, one GPU, random
images (their content does not change the time). For each workload and precision: the meta-gradients of higher, TorchOpt
and torch.func (loops over tasks) and of distmeta's loop and vmap, eager and compiled, compared and then timed in turn
as in throughput.py. The GPU is synchronised before and after each measurement. All compute in their row's precision.

A system that computes in float64 must give torch.func's meta-gradient there within 1e-9. In the precision of its row
its distance to that may be twice that of torch.func in that precision (in float32 up to 5e-3).
TFLOP/s: operations of one task's meta-gradient (torch.utils.flop_counter, eager loop) × tasks/s. share: of the fastest
of several large square matrix products in that precision.

`--quick` is a smoke run with tiny sizes, also on a CPU (`--device cpu`, which has no TF32).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from memory import KINDS, STEPS, MetaGradient, peak_mb
from raw_results import describe_environment, save_section
from systems import NEAR, System, Way, Workload, distmeta_gradient, peer_gradient, synchronise
from throughput import SAME, image_store, measure_rates
from torch.utils.flop_counter import FlopCounterMode
from training import relative_distance

from distmeta.compute.numerics import apply_numerics
from distmeta.errors import InputError
from distmeta.protocols import Theta
from distmeta.runtime.problem import Problem, apply_job_numerics
from distmeta.tasks.image_preparation import Preparation

PRECISIONS = ("float32", "tf32", "bf16")
SIDES = (2048, 4096, 8192, 16384)
"""Sides of the square matrices whose product measures the GPU's rate."""
PEERS = {"higher": "higher", "torchopt": "TorchOpt", "torch.func": "torch.func"}
BASELINES = ("torch.func, gradient", *(f"{title}, gradient" for title in PEERS.values()))

Rows = list[dict[str, Any]]


class Case(NamedTuple):
    title: str
    model: dict[str, Any]
    inner_lr: float
    images: Preparation
    queries: int
    counts: tuple[int, ...]
    """Tasks of a meta-gradient."""


CASES = {
    "conv4": Case(
        "28×28 images, strided conv4-64, 5-way 1-shot, 15 queries, 1 inner step",
        {"type": "conv4", "width": 64, "pool": "stride"},
        0.4,
        Preparation(),
        15,
        (4, 16, 64),
    ),
    "resnet12": Case(
        "84×84×3 images, resnet12, 5-way 1-shot, 15 queries, 1 inner step",
        {"type": "resnet12"},
        0.01,
        Preparation(size=84, channels=3),
        15,
        (2, 8),
    ),
}
TINY_CASES = {
    "conv4": CASES["conv4"]._replace(
        title="tiny conv4", model={"type": "conv4", "width": 4, "pool": "stride"}, queries=1, counts=(4,)
    ),
    "resnet12": CASES["resnet12"]._replace(
        title="tiny resnet12",
        model={"type": "resnet12", "widths": [4, 4, 4, 4]},
        images=Preparation(size=12, channels=3),
        queries=1,
        counts=(2,),
    ),
}


def make_workload(case: Case, store: str, count: int, precision: str, device: torch.device) -> Workload:
    run = {"tasks_per_step": count, "before_every": 0, "workers": 0, "gpus_per_worker": count_gpus(device)}
    tree = {
        "name": "gpu",
        "model": case.model,
        "tasks": {"type": "arrow", "path": store, "ways": 5, "shots": 1, "queries": case.queries},
        "algorithm": {"type": "maml", "inner_lr": case.inner_lr, "inner_steps": 1},
        "run": run,
        "compute": {"precision": precision},
        "tracking": {"type": "none"},
    }
    return Workload(f"{case.title}, {count} tasks, {precision}", tree, F.cross_entropy)


def count_gpus(device: torch.device) -> int:
    return int(device.type == "cuda")


# --- Throughput ---------------------------------------------------------------------------------------------------


def make_systems(workload: Workload, compiled: bool) -> tuple[list[System], Rows]:
    """Make all systems and compute each once. Return those that work, and a row with the reason for each other one."""
    precision = workload.tree["compute"]["precision"]

    @contextmanager
    def apply_numerics(problem: Problem) -> Iterator[None]:
        """The settings of the job. In bfloat16 a peer computes under autocast, as its users would write it."""
        device = problem.device
        autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
        )
        with apply_job_numerics(problem.job, device), autocast:
            yield

    makers: dict[str, Callable[[], System]] = {}
    for name, title in PEERS.items():
        makers[f"{title}, gradient"] = lambda name=name, title=title: peer_gradient(
            name, title, workload, apply_numerics
        )
    for compiles in (False, True) if compiled else (False,):
        for mode in ("loop", "vmap"):
            suffix = " compiled" if compiles else ""
            way = Way(mode + suffix, {"execution": mode, "compile": compiles, "precision": precision})
            makers[f"distmeta {way.name}, gradient"] = lambda way=way: distmeta_gradient(way, workload)
    systems: list[System] = []
    failed: Rows = []
    for name, make in makers.items():
        try:
            systems.append(make())
        except (ImportError, RuntimeError, InputError) as error:  # running out of memory is a RuntimeError
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            failed.append({"system": name, "failed": reason})
        torch.cuda.empty_cache()
    return systems, failed


def compare_gradients(systems: Sequence[System], reference: Theta) -> Rows:
    """Return how far each meta-gradient is from float64's, and whether only rounding separates them."""
    rounded = {system.name: relative_distance(system.gradient, reference) for system in systems}
    baseline = next((rounded[name] for name in BASELINES if name in rounded), 0.0)
    limit = max(NEAR, 2 * baseline)
    rows = []
    for system in systems:
        exact = None if system.exact is None else relative_distance(system.exact, reference)
        same = rounded[system.name] <= limit and (exact is None or exact < SAME)
        rows.append(
            {"system": system.name, "float64": exact, "in_its_precision": rounded[system.name], "same": same}
        )
    return rows


def measure_workload(
    workload: Workload, reference: Theta, matrix_rate: float, given: argparse.Namespace
) -> Rows:
    """Compare and time the systems of one workload in one precision.

    Args:
        reference: the meta-gradient in float64.
        matrix_rate: operations per second of the fastest matrix product.
    """
    systems, failed = make_systems(workload, compiled=not given.eager)
    rows = compare_gradients(systems, reference)
    flops = count_flops_per_task(workload)
    timed = [system for system, row in zip(systems, rows, strict=True) if row["same"]]
    rates = measure_rates(timed, workload.tree["run"]["tasks_per_step"], given.rounds, given.seconds)
    by_system = {rate["system"]: rate for rate in rates}
    for row in rows:
        if row["system"] in by_system:
            row |= by_system[row["system"]]
            row["flops_per_second"] = flops * row["tasks_per_second"]
            row["share_of_matrix_rate"] = row["flops_per_second"] / matrix_rate
    return rows + failed


def compute_exact_gradient(workload: Workload) -> Theta:
    """Return torch.func's meta-gradient in float64. The workload is in float32."""
    exact = peer_gradient("torch.func", "torch.func", workload).exact
    assert exact is not None, "a float32 peer also computes in float64"
    return exact


def count_flops_per_task(workload: Workload) -> int:
    """Count the operations of one task's meta-gradient by the eager loop. A multiply-add counts two."""
    tree = workload.tree | {"run": workload.tree["run"] | {"tasks_per_step": 1}}
    one_task = Workload(workload.title, tree, workload.loss)
    system = distmeta_gradient(Way("loop", {"execution": "loop", "precision": "float32"}), one_task)
    with FlopCounterMode(display=False) as counter:
        system.call()
    return counter.get_total_flops()


def print_rows(rows: Rows) -> None:
    for row in rows:
        if "failed" in row:
            print(f"{row['system']:<40} failed: {row['failed']}", flush=True)
        elif not row["same"]:
            print(
                f"{row['system']:<40} ANOTHER META-GRADIENT ({row['in_its_precision']:.1e}): not timed",
                flush=True,
            )
        else:
            print(
                f"{row['system']:<40} {row['tasks_per_second']:>10,.1f} tasks/s "
                f"({row['lowest']:,.1f}–{row['highest']:,.1f}) {row['times_torchopt_gradient']:>7.2f} × TorchOpt "
                f"{row['flops_per_second'] / 1e12:>8.3g} TFLOP/s {row['share_of_matrix_rate']:>6.1%}",
                flush=True,
            )


# --- The GPU's rate -----------------------------------------------------------------------------------------------


def measure_matrix_rates(
    device: torch.device, precision: str, sides: Sequence[int], seconds: float
) -> dict[int, float]:
    """Return operations per second of products of square matrices, by side."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rates = {}
    with apply_numerics(1, deterministic=False, precision="tf32" if precision == "tf32" else "float32"):
        for side in sides:
            a = torch.randn(side, side, device=device).to(dtype)
            b = torch.randn(side, side, device=device).to(dtype)

            def multiply(a: torch.Tensor = a, b: torch.Tensor = b) -> torch.Tensor:
                return a @ b

            calls = max(1, round(seconds / time_calls(device, multiply, 1)))
            rates[side] = 2 * side**3 / time_calls(device, multiply, calls)
    return rates


def time_calls(device: torch.device, call: Callable[[], object], calls: int) -> float:
    """Return the seconds of a call: the median of three times `calls` in a row, after one that does not count."""
    call()
    found = []
    for _ in range(3):
        synchronise(device)
        started = time.perf_counter()
        for _ in range(calls):
            call()
        synchronise(device)
        found.append((time.perf_counter() - started) / calls)
    return statistics.median(found)


# --- Memory -------------------------------------------------------------------------------------------------------


def measure_memory(device: torch.device, store: str, precisions: Sequence[str], quick: bool) -> Rows:
    """Measure peak memory and time of one task's meta-gradient, by both kinds of differentiation (see memory.py)."""
    overrides = ["tasks.split_by=class", "tasks.test=null", f"run.gpus_per_worker={count_gpus(device)}"]
    if quick:
        overrides += ["model.width=4", "tasks.queries=1"]
    rows = []
    for precision in precisions:
        if precision == "tf32":  # needs as much as float32
            continue
        gradient = MetaGradient(store, *overrides, f"compute.precision={precision}")
        gradient.compute(1, KINDS[0])  # loads libraries and their workspaces
        for kind in KINDS:
            for steps in (1, *STEPS[kind])[: 2 if quick else None]:
                row = {"precision": precision, "differentiation": kind, "inner_steps": steps}
                call = gradient.prepare(steps, kind)
                with suppress(torch.OutOfMemoryError):
                    row["peak_mb"] = measure_peak(device, call)
                    row["seconds"] = time_calls(device, call, 1)
                rows.append(row)
                print(row, flush=True)
    return rows


def measure_peak(device: torch.device, call: Callable[[], object]) -> float:
    """Return the MB that a call adds at its peak: on the GPU, or to the peak of the process, which never falls."""
    if device.type != "cuda":
        before = peak_mb()
        call()
        return peak_mb() - before
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronise(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*(f"{name}-{count}" for name, case in CASES.items() for count in case.counts), "memory"]
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a smoke run with tiny sizes; writes nothing")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the workloads")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--eager", action="store_true", help="without compiled systems")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one system in one round, at least")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "--device: got cuda, but torch sees no GPU here, expected cpu (with --quick)\n")
    if given.quick:
        given.rounds = 1
        given.seconds = 0.01
    return given


def main() -> None:
    """Measure workload after workload. Each is saved at once, since a borrowed GPU may be taken back."""
    given = parse_arguments()
    device = torch.device(given.device)
    environment = describe_environment()
    torch.set_num_threads(1)
    cases = TINY_CASES if given.quick else CASES
    sides = (64, 128) if given.quick else SIDES
    precisions = [name for name in given.precisions if name != "tf32" or device.type == "cuda"]
    rates = {}
    for name in precisions:
        rates[name] = max(measure_matrix_rates(device, name, sides, given.seconds).values())
        print(f"matrix products in {name}: {rates[name] / 1e12:.3g} TFLOP/s", flush=True)
    settings = {"rounds": given.rounds, "seconds_a_round": given.seconds, "matrix_rates": rates}
    for name, case in cases.items():
        with image_store("", case.images) as (store, _):
            for count in case.counts:
                asked = [one for one in given.only if one.startswith(f"{name}-")]
                if not asked or (f"{name}-{count}" not in asked and not given.quick):
                    continue
                reference = compute_exact_gradient(make_workload(case, store, count, "float32", device))
                for precision in precisions:
                    workload = make_workload(case, store, count, precision, device)
                    print(f"\n{workload.title}", flush=True)
                    try:
                        rows = measure_workload(workload, reference, rates[precision], given)
                    except torch.OutOfMemoryError:  # each fits, but not all of them together
                        rows = [{"system": "all", "failed": "out of memory"}]
                    print_rows(rows)
                    part = f"{name}-{count}-{precision}"
                    save_section(
                        "gpu", part, environment, rows, given.quick, title=workload.title, **settings
                    )
    if "memory" in given.only:
        with image_store("") as (store, _):
            rows = measure_memory(device, store, precisions, given.quick)
        save_section("gpu", "memory", environment, rows, given.quick)


if __name__ == "__main__":
    main()
