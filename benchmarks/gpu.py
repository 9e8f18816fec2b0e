"""MAML on one GPU: throughput in float32, TF32 and bfloat16 beside its peers', the share of the card's measured matrix
rate, memory against the number of inner steps K.

    python benchmarks/gpu.py [--device cuda|cpu] [--quick] [--only conv4-16 memory …] [--precisions bf16 …] [--eager]

One process, one card, random images (their content does not matter to time). For each workload and precision: the
meta-gradients of higher, TorchOpt and torch.func (a Python loop over tasks) and of distmeta's loop and vmap, as they
are and compiled, verified and then timed in turn as in throughput.py, each between two synchronisations with the card.
All compute in the precision of their row: the peers' loops have TF32 off or on and autocast as distmeta has.

Verified: a system that computes in float64 must give torch.func's meta-gradient there, within 1e-9; in the precision of
its row each must be as near to it as torch.func in that precision is, but for a factor of 2 (in float32 within 5e-3).
TFLOP/s: operations of one task's meta-gradient (torch.utils.flop_counter, on the eager loop: those that are needed, not
those that a system does) × tasks/s. share: of the fastest of some large square matrix products in that precision.

`--quick` is a smoke run with tiny sizes, for a CPU too (`--device cpu`, which has no TF32).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import report
import torch
import torch.nn.functional as F
from memory import KINDS, STEPS, Gradient, peak_mb
from systems import NEAR, System, Way, Workload, distmeta_gradient, peer_gradient, synchronise
from throughput import REFERENCE, SAME, distance, image_store, measure, rate_cells
from torch.utils.flop_counter import FlopCounterMode

from distmeta.compute.numerics import numerics
from distmeta.errors import InputError
from distmeta.protocols import Theta
from distmeta.runtime.problem import Problem, numerics_of
from distmeta.tasks.image_preparation import Preparation

PRECISIONS = ("float32", "tf32", "bf16")
SIDES = (2048, 4096, 8192, 16384)
"""Of the matrices whose product tells the card's rate."""
PEERS = {"higher": "higher", "torchopt": "TorchOpt", "torch.func": "torch.func"}
BASELINE = "torch.func, gradient"


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
TINY = {
    "conv4": CASES["conv4"]._replace(
        title="quick conv4", model={"type": "conv4", "width": 4, "pool": "stride"}, queries=1, counts=(4,)
    ),
    "resnet12": CASES["resnet12"]._replace(
        title="quick resnet12",
        model={"type": "resnet12", "widths": [4, 4, 4, 4]},
        images=Preparation(size=12, channels=3),
        queries=1,
        counts=(2,),
    ),
}


def workload_of(case: Case, store: str, count: int, precision: str, device: torch.device) -> Workload:
    tree = {
        "name": "gpu",
        "model": case.model,
        "tasks": {"type": "arrow", "path": store, "ways": 5, "shots": 1, "queries": case.queries},
        "algorithm": {"type": "maml", "inner_lr": case.inner_lr, "inner_steps": 1},
        "run": {"tasks_per_step": count, "before_every": 0, "workers": 0, "gpus_per_worker": gpus(device)},
        "compute": {"precision": precision},
        "tracking": {"type": "none"},
    }
    return Workload(f"{case.title}, {count} tasks, {precision}", tree, F.cross_entropy)


def gpus(device: torch.device) -> int:
    return int(device.type == "cuda")


# throughput


class Tried(NamedTuple):
    """The systems that there are, and why others are not."""

    systems: list[System]
    failed: dict[str, str]


def tried(workload: Workload, compiling: bool) -> Tried:
    """Makes all systems, each computed once; one that cannot (not installed, no memory, no compiler) is left out."""
    precision = workload.tree["compute"]["precision"]
    ways = [
        Way(mode + " compiled" * compiled, {"execution": mode, "compile": compiled, "precision": precision})
        for compiled in ((False, True) if compiling else (False,))
        for mode in ("loop", "vmap")
    ]

    def settings(problem: Problem) -> Any:
        return numerics_of(problem.job, problem.device)

    makers: dict[str, Callable[[], System]] = {
        f"{title}, gradient": lambda name=name, title=title: peer_gradient(name, title, workload, settings)
        for name, title in PEERS.items()
    }
    makers |= {
        f"distmeta {way.name}, gradient": lambda way=way: distmeta_gradient(way, workload) for way in ways
    }
    found = Tried([], {})
    for name, make in makers.items():
        try:
            found.systems.append(make())
        except (ImportError, RuntimeError, InputError) as error:  # no memory is a RuntimeError
            found.failed[name] = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"{name}: {found.failed[name]}", flush=True)
        torch.cuda.empty_cache()  # nothing where there is no card
    return found


def verified(systems: Sequence[System], reference: Theta) -> list[dict[str, Any]]:
    """How far each meta-gradient is from float64's, and whether it is the same but for rounding."""
    rounded = {system.name: distance(system.gradient, reference) for system in systems}
    peers = [BASELINE, *(f"{title}, gradient" for title in PEERS.values())]
    base = next((rounded[name] for name in peers if name in rounded), 0.0)
    limit, rows = max(NEAR, 2 * base), []
    for system in systems:
        exact = None if system.exact is None else distance(system.exact, reference)
        near = rounded[system.name] <= limit
        same = near and (exact is None or exact < SAME)
        rows.append(
            {"system": system.name, "float64": exact, "in_its_precision": rounded[system.name], "same": same}
        )
        if not same:
            off = rounded[system.name] if exact is None or not near else exact
            print(f"{system.name}: ANOTHER META-GRADIENT (off by {off:.1e}): not timed", flush=True)
    return rows


def timed(
    workload: Workload, reference: Theta, matrix_rate: float, given: argparse.Namespace
) -> dict[str, Any]:
    """One workload in one precision, its table printed. `reference`: its meta-gradient in float64."""
    print(f"\n{workload.title}\n", flush=True)
    systems, failed = tried(workload, not given.eager)
    checks, flops = verified(systems, reference), flops_a_task(workload)
    timing = [system for system, check in zip(systems, checks, strict=True) if check["same"]]
    rates = measure(timing, workload.tree["run"]["tasks_per_step"], given.rounds, given.seconds)
    for row in rates:
        row["flops_per_second"] = flops * row["tasks_per_second"]
        row["share_of_matrix_rate"] = row["flops_per_second"] / matrix_rate
    print(shown(checks, rates, failed), flush=True)
    found = {"title": workload.title, "flops_a_task": flops, "failed": failed}
    return found | {"meta_gradient": checks, "throughput": rates}


def exact_gradient(workload: Workload) -> Theta:
    """torch.func's meta-gradient in float64. The workload is in float32."""
    found = peer_gradient("torch.func", "torch.func", workload).exact
    assert found is not None, "float32 comes with float64"
    return found


def flops_a_task(workload: Workload) -> int:
    """Of one task's meta-gradient by the eager loop; a multiplication with its addition counts two."""
    tree = workload.tree | {"run": workload.tree["run"] | {"tasks_per_step": 1}}
    one = Workload(workload.title, tree, workload.loss)
    system = distmeta_gradient(Way("loop", {"execution": "loop", "precision": "float32"}), one)
    with FlopCounterMode(display=False) as counter:
        system.call()
    return counter.get_total_flops()


def shown(checks: Sequence[dict[str, Any]], rates: Sequence[dict[str, Any]], failed: dict[str, str]) -> str:
    of = {row["system"]: row for row in rates}
    rows = []
    for check in checks:
        cells, row = ["not timed", "", "", "", ""], of.get(check["system"])
        if row is not None:
            tera = f"{row['flops_per_second'] / 1e12:.3g}"
            cells = [*rate_cells(row), tera, f"{100 * row['share_of_matrix_rate']:.1f} %"]
        exact = "" if check["float64"] is None else f"{check['float64']:.0e}"
        rows.append([check["system"], *cells, exact, f"{check['in_its_precision']:.0e}"])
    rows += [[name, "failed", "", "", "", "", "", ""] for name in failed]
    header = ["system", "tasks/s", "range", f"× {REFERENCE}", "TFLOP/s", "share", "∆ float64", "∆"]
    return report.table(header, rows)


# the card


def matrix_rates(
    device: torch.device, precision: str, sides: Sequence[int], seconds: float
) -> dict[int, float]:
    """Operations per second of products of square matrices, by their side."""
    dtype, found = torch.bfloat16 if precision == "bf16" else torch.float32, {}
    with numerics(1, deterministic=False, precision="tf32" if precision == "tf32" else "float32"):
        for side in sides:
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            took = seconds_of(device, lambda a=a, b=b: a @ b, 1)
            found[side] = (
                2 * side**3 / seconds_of(device, lambda a=a, b=b: a @ b, max(1, round(seconds / took)))
            )
    return found


def seconds_of(device: torch.device, call: Callable[[], object], calls: int) -> float:
    """Seconds of a call, the median of three times `calls` in a row, after one that does not count."""
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


# memory


def memory_rows(
    device: torch.device, store: str, precisions: Sequence[str], quick: bool
) -> list[dict[str, Any]]:
    """Peak memory and time of one task's meta-gradient against K, whole graph and constant memory (memory.py's)."""
    overrides = [
        "tasks.split_by=class",  # random images have no alphabets
        "tasks.test=null",
        f"run.gpus_per_worker={gpus(device)}",
        *(["model.width=4", "tasks.queries=1"] if quick else []),
    ]
    rows = []
    for precision in precisions:
        if precision == "tf32":  # takes what float32 takes
            continue
        gradient = Gradient(store, *overrides, f"compute.precision={precision}")
        gradient(1, KINDS[0])  # libraries and their workspaces
        for kind in KINDS:
            for steps in (1, *STEPS[kind])[: 2 if quick else None]:
                call, figures = gradient.prepared(steps, kind), {"peak_mb": None, "seconds": None}
                with suppress(torch.OutOfMemoryError):
                    figures = {"peak_mb": peak_of(device, call), "seconds": seconds_of(device, call, 1)}
                rows.append({"precision": precision, "differentiation": kind, "inner_steps": steps} | figures)
    return rows


def peak_of(device: torch.device, call: Callable[[], object]) -> float:
    """MB that a call adds at its peak: on the card; on a CPU to the peak of the process, which never falls."""
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


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        figures = ["out of memory", ""]
        if row["peak_mb"] is not None:
            figures = [f"{row['peak_mb']:.0f}", f"{1e3 * row['seconds']:.1f}"]
        cells.append([row["precision"], row["differentiation"], str(row["inner_steps"]), *figures])
    return report.table(["in", "differentiation", "K", "peak, MB", "ms"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*(f"{name}-{count}" for name, case in CASES.items() for count in case.counts), "memory"]
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run with tiny sizes of its own; writes nothing"
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the workloads")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--eager", action="store_true", help="without what is compiled")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one system in one round, at least")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "--device: got cuda, but torch sees no GPU here, expected cpu (with --quick)\n")
    device, start, cases, sides = torch.device(given.device), report.environment(), CASES, SIDES
    if given.quick:
        given.rounds, given.seconds, cases, sides = 1, 0.01, TINY, (64, 128)
    torch.set_num_threads(1)
    precisions = [name for name in given.precisions if name != "tf32" or gpus(device)]
    rates = {name: matrix_rates(device, name, sides, given.seconds) for name in precisions}
    for name, found in rates.items():
        print(f"matrix products in {name}: {max(found.values()) / 1e12:.3g} TFLOP/s", flush=True)
    workloads: dict[str, Any] = {}
    memory: list[dict[str, Any]] = []
    settings = {"rounds": given.rounds, "seconds_a_round": given.seconds}
    parts = [part for part in given.only if given.only != names]
    parts += [part for part in given.precisions if given.precisions != list(PRECISIONS)]

    def keep() -> None:
        """After every workload: a lent card may be called back before the last."""
        result = {"settings": settings, "matrix_rates": rates, "workloads": workloads, "memory": memory}
        report.write("-".join(["gpu" if gpus(device) else "gpu-on-cpu", *parts]), start, result, given.quick)

    for name, case in cases.items():
        with image_store("", case.images) as (store, _):
            for count in case.counts:
                asked = [one for one in given.only if one.startswith(f"{name}-")]
                if not asked or (f"{name}-{count}" not in asked and not given.quick):
                    continue
                plain = workload_of(case, store, count, "float32", device)
                reference = exact_gradient(plain)
                for precision in precisions:
                    workload = workload_of(case, store, count, precision, device)
                    best = max(rates[precision].values())
                    try:
                        found = timed(workload, reference, best, given)
                    except torch.OutOfMemoryError:  # all of them together
                        found = {"title": workload.title, "failed": {"all": "out of memory"}}
                    workloads[f"{name}-{count}-{precision}"] = found
                    keep()
    if "memory" in given.only:
        with image_store("") as (store, _):
            memory += memory_rows(device, store, precisions, given.quick)
        print(f"\n{memory_table(memory)}", flush=True)
        keep()


if __name__ == "__main__":
    main()
