"""Tasks per second of MAML's meta-gradient and of a whole outer step: higher, TorchOpt, torch.func, JAX, distmeta.

    python benchmarks/throughput.py [--only WORKLOAD ...] [--store data/omniglot.arrow]

All systems have the same model at the same weights and the same tasks. First every meta-gradient is compared with
torch.func's in float64; a system that computes something else is not timed. Then the systems take turns (A B C … A B C
…), so that other work on the machine affects all alike. A row has the median rate over the rounds, and the median of
each round's ratio to TorchOpt's gradient.

"gradient": episodes in memory -> mean meta-gradient. "step": draw the episodes, gradient, Adam. distmeta's rows have
`run.before_every: 0`, unless they say "scores before too": the peers do not score tasks before adaptation either. This
process keeps the memory that it frees (`distmeta.compute.memory`), also for the peers in it; "own process" does not.
One thread each, unless a row says otherwise. JAX is timed on sine waves if it is installed; XLA uses all cores.
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
import torch
import torch.nn.functional as F
from processes import peer_step_in_own_process, step_in_two_processes, torchopt_distributed
from raw_results import count_cores, describe_environment, has_bf16_instructions, save_section
from systems import (
    System,
    Workload,
    distmeta_gradient,
    distmeta_step,
    jax_gradient,
    list_ways,
    peer_gradient,
    peer_step,
)
from training import relative_distance

from distmeta.tasks.image_preparation import Preparation
from distmeta.tasks.store import write_store

REFERENCE = "TorchOpt, gradient"
SAME = 1e-9
"""Largest relative difference in float64 between systems that compute the same thing."""


def make_workloads(store: str, tasks: int | None = None) -> dict[str, Workload]:
    """Return what is timed, by name. `tasks` replaces their numbers of tasks."""
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

    def make(title: str, tree: dict[str, Any], count: int, loss: Any, *more: Any) -> Workload:
        count = tasks or count
        run = {"tasks_per_step": count, "before_every": 0}
        return Workload(f"{title}, {count} tasks", tree | {"run": run}, loss, *more)

    regression = "sinusoid, MLP 40-40, 10-shot, 5 inner steps"
    images = "28×28 images, strided conv4-64, 5-way 1-shot, 15 queries, 1 inner step"
    return {
        "sinusoid-25": make(regression, sinusoid, 25, F.mse_loss),
        "sinusoid-256": make(regression, sinusoid, 256, F.mse_loss),
        "conv4-16": make(images, conv4, 16, F.cross_entropy, count_cores(), has_bf16_instructions()),
    }


def make_systems(workload: Workload, stack: ExitStack) -> list[System]:
    """Make all systems of a workload and compute the meta-gradient of each once."""
    gradient_ways, step_ways = list_ways(workload)
    systems = [
        peer_gradient("higher", "higher", workload),
        peer_gradient("torchopt", "TorchOpt", workload),
        peer_gradient("torch.func", "torch.func", workload),
        *jax_gradient(workload),
        *(distmeta_gradient(way, workload) for way in gradient_ways),
        peer_step("torchopt", "TorchOpt", workload),
    ]
    if workload.threads > 1:
        systems.append(peer_step("torchopt", "TorchOpt", workload, workload.threads))
    systems.append(peer_step_in_own_process("torchopt", "TorchOpt", workload, workload.threads, stack))
    systems.append(torchopt_distributed(workload, stack))
    systems.append(distmeta_step(step_ways[0], 0, workload, stack, before_every=1))
    for way in step_ways:
        systems.append(distmeta_step(way, 0, workload, stack))
        systems.append(distmeta_step(way, 2, workload, stack))
        systems.append(step_in_two_processes(way, workload, stack))
    return systems


def compare_gradients(systems: Sequence[System]) -> list[dict[str, Any]]:
    """Return for each system how far its meta-gradient is from torch.func's in float64, and whether it is the same.

    In float64 the relative distance must be below `SAME`. If a system cannot compute in float64, the float32 distance
    must be below its `near`.
    """
    reference = next(system.exact for system in systems if system.name == "torch.func, gradient")
    assert reference is not None
    rows = []
    for system in systems:
        assert system.gradient.keys() == reference.keys(), "gradients of the same parameters"
        exact = None if system.exact is None else relative_distance(system.exact, reference)
        rounded = relative_distance(system.gradient, reference)
        same = rounded < system.near if exact is None else exact < SAME
        rows.append({"system": system.name, "float64": exact, "float32": rounded, "same": same})
        if not same:
            print(
                f"{system.name}: ANOTHER META-GRADIENT (off by {exact or rounded:.1e}): not timed", flush=True
            )
    return rows


def measure_rates(systems: Sequence[System], tasks: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Time the systems in turn. Each gets about `seconds` per round."""
    calls = [max(1, round(seconds / system.seconds(1))) for system in systems]
    rates = np.empty((rounds, len(systems)))
    for k in range(rounds):
        for i, system in enumerate(systems):
            rates[k, i] = tasks / system.seconds(calls[i])
    torch.set_num_threads(1)
    names = [system.name for system in systems]
    base = rates[:, names.index(REFERENCE)] if REFERENCE in names else math.nan
    return [
        {
            "system": name,
            "tasks_per_second": statistics.median(rates[:, i]),
            "lowest": min(rates[:, i]),
            "highest": max(rates[:, i]),
            "times_torchopt_gradient": statistics.median(rates[:, i] / base),
            "calls_a_round": calls[i],
        }
        for i, name in enumerate(names)
    ]


@contextmanager
def image_store(path: str, prepared: Preparation = Preparation()) -> Iterator[tuple[str, str]]:  # noqa: B008 - frozen
    """Yield the store at `path`, or one of random images if there is none, and which of the two it is."""
    if Path(path).is_file():
        yield path, "Omniglot"
        return
    with tempfile.TemporaryDirectory() as folder:
        drawn = str(Path(folder) / "random.arrow")
        pixels = np.random.default_rng(0).integers(0, 256, (60 * 20, *prepared.shape), dtype=np.uint8)
        write_store(drawn, pixels, [str(k) for k in range(60)], [""] * 60, [20] * 60, prepared)
        yield drawn, "random images"


def measure_workload(workload: Workload, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Compare the meta-gradients, then time the systems that agree."""
    with ExitStack() as stack:
        systems = make_systems(workload, stack)
        rows = compare_gradients(systems)
        timed = [system for system, row in zip(systems, rows, strict=True) if row["same"]]
        rates = measure_rates(timed, workload.tree["run"]["tasks_per_step"], rounds, seconds)
    by_system = {row["system"]: row for row in rates}
    return [row | by_system.get(row["system"], {}) for row in rows]


def parse_arguments(description: str, rounds: int, seconds: float) -> argparse.Namespace:
    """Read the command line. `tasks` is 4 in a smoke run, else None."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(make_workloads(""))
    parser.add_argument("--quick", action="store_true", help="a smoke run with 4 tasks; writes nothing")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the workloads")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--seconds", type=float, default=seconds, help="of one system in one round, at least")
    parser.add_argument("--store", default="data/omniglot.arrow", help="random images if there is none")
    parser.add_argument("--eager", action="store_true", help="without compiled systems, which take minutes")
    given = parser.parse_args()
    given.tasks = None
    if given.quick:
        given.rounds = 1
        given.seconds = 0.01
        given.tasks = 4
    return given


def main() -> None:
    given = parse_arguments(str(__doc__), rounds=7, seconds=1.0)
    torch.set_num_threads(1)
    environment = describe_environment()
    with image_store(given.store) as (store, images):
        workloads = make_workloads(str(Path(store).absolute()), given.tasks)
        for name in given.only:
            workload = replace(workloads[name], compiled=not given.eager)
            rows = measure_workload(workload, given.rounds, given.seconds)
            settings = {"rounds": given.rounds, "seconds_a_round": given.seconds, "images": images}
            save_section("throughput", name, environment, rows, given.quick, title=workload.title, **settings)


if __name__ == "__main__":
    main()
