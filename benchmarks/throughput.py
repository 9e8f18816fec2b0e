"""Tasks per second of MAML's meta-gradient and of a whole outer step: higher, TorchOpt, torch.func, JAX, distmeta.

    python benchmarks/throughput.py [--quick] [--only WORKLOAD ...] [--store data/omniglot.arrow]
    python benchmarks/throughput.py curve        # tasks/s against tasks a step, sine waves: results/throughput.png

JAX is there where it is installed (`pip install jax`), on sine waves; XLA takes all cores that this process may use.

One process, one run, the same model at the same weights, the same tasks. First every system's meta-gradient
is compared with one in float64; a system that computes something else is not timed. Then they are timed in
turn (A B C … A B C …), so that whatever else the machine does falls on all alike; the table has the median
over the rounds, and the median of each round's ratio to TorchOpt.

"gradient": episodes in memory -> the mean meta-gradient. "step": draw the episodes, gradient, Adam.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
import torch.nn.functional as F
from systems import System, Workload, systems_of

from distmeta.protocols import Theta
from distmeta.tasks.image_preparation import Preparation
from distmeta.tasks.store import write_store

REFERENCE = "TorchOpt, gradient"
SAME = 1e-9
"""Largest relative difference in float64 between systems that compute the same thing."""
NOTE = (
    "distmeta's rows have run.before_every=0, where they do not say otherwise: the peers' loops do not score tasks "
    "before adaptation either. This process keeps the memory it frees (distmeta.compute.memory), for the peers in it "
    "too; `own process`: one with memory as it comes. One thread each, where a row does not say otherwise; two Ray "
    "workers are two processes of one thread. Independent processes: distmeta's step on half of the tasks in each, "
    "with nothing between them. ∆: relative norm of the meta-gradient's difference from torch.func's in float64."
)


def workloads(store: str, tasks: int | None = None) -> dict[str, Workload]:
    """What is timed, with `tasks` tasks where it is given. The store's images do not matter to the time."""
    sinusoid = {
        "name": "throughput",
        "model": {"type": "mlp", "hidden": [40, 40]},
        "tasks": {"type": "sinusoid", "shots": 10, "queries": 10},
        "algorithm": {"type": "maml", "inner_lr": 0.01, "inner_steps": 5},
        "tracking": {"type": "none"},
    }
    conv4 = sinusoid | {
        "model": {"type": "conv4", "width": 64, "pool": "stride"},
        "tasks": {"type": "arrow", "path": store, "ways": 5, "shots": 1, "queries": 15},
        "algorithm": {"type": "maml", "inner_lr": 0.4, "inner_steps": 1},
    }

    def of(title: str, tree: dict[str, Any], count: int, loss: Any, *more: Any) -> Workload:
        count = tasks or count
        return Workload(
            f"{title}, {count} tasks",
            tree | {"run": {"tasks_per_step": count, "before_every": 0}},
            loss,
            *more,
        )

    regression = "sinusoid, MLP 40-40, 10-shot, 5 inner steps"
    images = "28×28 images, strided conv4-64, 5-way 1-shot, 15 queries, 1 inner step"
    return {
        "sinusoid-25": of(regression, sinusoid, 25, F.mse_loss),
        "sinusoid-256": of(regression, sinusoid, 256, F.mse_loss),
        "conv4-16": of(images, conv4, 16, F.cross_entropy, report.cores(), report.has_bf16()),
    }


def verify(systems: Sequence[System]) -> list[dict[str, Any]]:
    """The relative norm of each meta-gradient's difference from torch.func's in float64.

    In float64, where rounding hides nothing, it must be less than `SAME`; where a system cannot compute in
    float64, less than `NEAR` in float32.
    """
    reference = next(system.exact for system in systems if system.name == "torch.func, gradient")
    assert reference is not None
    rows = []
    for system in systems:
        exact = None if system.exact is None else distance(system.exact, reference)
        rounded = distance(system.gradient, reference)
        same = rounded < system.near if exact is None else exact < SAME
        rows.append({"system": system.name, "float64": exact, "float32": rounded, "same": same})
        if not same:
            off = exact or rounded
            print(f"{system.name}: ANOTHER META-GRADIENT (off by {off:.1e}): not timed", flush=True)
    return rows


def distance(gradient: Theta, reference: Theta) -> float:
    """‖g − r‖ / ‖r‖ over the whole gradient."""
    assert gradient.keys() == reference.keys(), "gradients of the same parameters"
    squares = [float((gradient[n].double() - reference[n]).square().sum()) for n in reference]
    return math.sqrt(sum(squares) / sum(float(value.square().sum()) for value in reference.values()))


def measure(systems: Sequence[System], tasks: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Times the systems in turn; each gets `seconds` a round."""
    calls = [max(1, round(seconds / system.seconds(1))) for system in systems]
    rates = np.array(
        [[tasks / s.seconds(n) for s, n in zip(systems, calls, strict=True)] for _ in range(rounds)]
    )
    torch.set_num_threads(1)
    names = [system.name for system in systems]
    base = rates[:, names.index(REFERENCE)] if REFERENCE in names else math.nan
    return [
        {
            "system": system.name,
            "tasks_per_second": statistics.median(rates[:, i]),
            "lowest": min(rates[:, i]),
            "highest": max(rates[:, i]),
            "times_torchopt_gradient": statistics.median(rates[:, i] / base),
            "calls_a_round": calls[i],
        }
        for i, system in enumerate(systems)
    ]


def shown(verified: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> str:
    """The two in one table."""
    rates = {row["system"]: row for row in measured}
    rows = []
    for check in verified:
        exact = "" if check["float64"] is None else f"{check['float64']:.0e}"
        row = rates.get(check["system"])
        cells = ["not timed", "", ""] if row is None else rate_cells(row)
        rows.append([check["system"], *cells, exact, f"{check['float32']:.0e}"])
    return report.table(["system", "tasks/s", "range", "× TorchOpt gradient", "∆ float64", "∆ float32"], rows)


def rate_cells(row: dict[str, Any]) -> list[str]:
    rate, low, high = (row[key] for key in ("tasks_per_second", "lowest", "highest"))
    digits = 0 if rate >= 100 else 1
    span = f"{low:,.{digits}f}–{high:,.{digits}f}"
    return [f"{rate:,.{digits}f}", span, f"{row['times_torchopt_gradient']:.2f}"]


@contextmanager
def image_store(path: str, prepared: Preparation = Preparation()) -> Iterator[tuple[str, str]]:  # noqa: B008 - frozen
    """The store at `path`, or one of random images; and which it is."""
    if Path(path).is_file():
        yield path, "Omniglot"
        return
    with tempfile.TemporaryDirectory() as folder:
        drawn = str(Path(folder) / "random.arrow")
        pixels = np.random.default_rng(0).integers(0, 256, (60 * 20, *prepared.shape), dtype=np.uint8)
        names = [str(k) for k in range(60)]
        write_store(drawn, pixels, names, [""] * 60, [20] * 60, prepared)
        yield drawn, "random images"


def run(workload: Workload, rounds: int, seconds: float) -> dict[str, Any]:
    """Verifies and times the systems of one workload, and prints its table."""
    print(f"\n{workload.title}\n", flush=True)
    with ExitStack() as stack:
        systems = systems_of(workload, stack)
        verified = verify(systems)
        timed = [system for system, check in zip(systems, verified, strict=True) if check["same"]]
        measured = measure(timed, workload.tree["run"]["tasks_per_step"], rounds, seconds)
    print(shown(verified, measured), flush=True)
    return {"title": workload.title, "meta_gradient": verified, "throughput": measured}


CURVE = (5, 25, 100, 256)
"""Tasks a step."""


def curve(rounds: int, seconds: float, counts: Sequence[int], start: dict[str, Any], quick: bool) -> None:
    """Sine waves with other numbers of tasks, and their plot."""
    found = {count: run(workloads("", count)["sinusoid-25"], rounds, seconds) for count in counts}
    settings = {"rounds": rounds, "seconds_a_round": seconds}
    report.write("throughput-curve", start, {"settings": settings, "tasks": found}, quick)
    if not quick:
        plot({n: {r["system"]: r["tasks_per_second"] for r in of["throughput"]} for n, of in found.items()})


def plot(rates: dict[int, dict[str, float]]) -> None:
    """tasks/s by tasks a step and system: meta-gradients beside whole steps, `results/throughput.png`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    counts = list(rates)
    titles = {"gradient": "meta-gradient of episodes in memory", "step": "whole step"}
    kinds = [kind for kind in titles if any(f", {kind}" in system for system in rates[counts[-1]])]
    figure, grid = pyplot.subplots(
        1, len(kinds), figsize=(6.5 * len(kinds), 8), layout="constrained", sharey=True, squeeze=False
    )
    panels = grid[0]
    for axes, kind in zip(panels, kinds, strict=True):
        for system in rates[counts[-1]]:
            name, _, rest = system.partition(f", {kind}")
            if name == system:
                continue
            style = "o-" if name.startswith("distmeta") else "s--"
            points = [rates[count].get(system, math.nan) for count in counts]
            axes.plot(counts, points, style, label=name + rest)
        axes.set(xscale="log", yscale="log", xlabel="tasks a step", xticks=counts, title=titles[kind])
        axes.set_xticklabels(counts)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.09))
    panels[0].set_ylabel("tasks/s")
    figure.savefig(report.RESULTS / "throughput.png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(workloads(""))
    parser.add_argument("what", nargs="?", choices=["workloads", "curve"], default="workloads")
    parser.add_argument("--quick", action="store_true", help="a smoke run with 4 tasks; writes nothing")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the workloads")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one system in one round, at least")
    parser.add_argument("--store", default="data/omniglot.arrow", help="random images where there is none")
    parser.add_argument("--eager", action="store_true", help="without what is compiled, which takes minutes")
    given = parser.parse_args()
    rounds, seconds, tasks = given.rounds, given.seconds, None
    if given.quick:
        rounds, seconds, tasks = 1, 0.01, 4
    torch.set_num_threads(1)
    start = report.environment()
    if given.what == "curve":
        curve(rounds, seconds, (4,) if given.quick else CURVE, start, given.quick)
        return
    with image_store(given.store) as (store, images):
        chosen = workloads(str(Path(store).absolute()), tasks)
        chosen = {name: replace(one, compiled=not given.eager) for name, one in chosen.items()}
        results = {name: run(chosen[name], rounds, seconds) for name in given.only}
    print(f"\n{NOTE}")
    settings = {"rounds": rounds, "seconds_a_round": seconds, "images": images, "note": NOTE}
    name = "throughput" if given.only == names else "throughput-" + "-".join(given.only)
    name += "-eager" if given.eager else ""
    report.write(name, start, {"settings": settings, "workloads": results}, given.quick)


if __name__ == "__main__":
    main()
