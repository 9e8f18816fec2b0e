"""A Hessian-vector product H(φ)v of the support loss, reverse over reverse and forward over reverse.

    python benchmarks/memory.py hvp

Constant memory computes one in every inner step (`compute.constant_memory`): reverse over reverse, with `reverse_vjp`
in the loop and with `torch.func.vjp` under vmap. Forward over reverse is `torch.func.jvp` of the same gradient. Times
include the gradient: processor seconds with one thread, medians of ratios with all ways in turn. A peak is that of a
separate process in its second call, beyond what it held before.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from raw_results import describe_environment, save_section
from torch import Tensor
from torch.nn import functional as F

from distmeta.compute.constant_memory import reverse_vjp
from distmeta.models.conv4 import Conv4
from distmeta.models.functional import FunctionalModel
from distmeta.models.mlp import MLP
from distmeta.protocols import Theta

REVERSE = "reverse over reverse, vjp"
LOOP = "reverse over reverse, autograd"
FORWARD = "forward over reverse"
CASES = {
    "conv4-64, max pool, 5-way 5-shot": (LOOP, REVERSE, FORWARD),
    "conv4-64, strided, 5-way 5-shot": (LOOP, REVERSE, FORWARD),
    "MLP 40-40, 10-shot, vmap over 25 tasks": (REVERSE, FORWARD),
}
"""The ways of each support loss. distmeta uses the first; the others are compared with it."""
ROUNDS = 15
SECONDS = 0.5
"""What a way takes in a round, at least."""

Product = Callable[[], Theta]


def make_product(case: str, way: str) -> Product:
    """Return a function that computes H(φ)v at random φ, v and support data."""
    generator = torch.Generator().manual_seed(0)
    if case.startswith("conv4"):
        pool: Any = "max" if "max" in case else "stride"
        return make_conv4_product(way, pool, generator)
    return make_mlp_product(way, generator)


def make_conv4_product(way: str, pool: Any, generator: torch.Generator) -> Product:
    x = torch.randn(25, 1, 28, 28, generator=generator)
    y = torch.arange(5).repeat(5)
    model = FunctionalModel(lambda: Conv4((1, 28, 28), 5, pool=pool), generator, out_features=5)
    phi = model.init(generator)
    v = {name: torch.randn(value.shape, generator=generator) for name, value in phi.items()}
    return lambda: multiply(way, lambda p: F.cross_entropy(model(p, x), y), phi, v)


def make_mlp_product(way: str, generator: torch.Generator) -> Product:
    x_TND, y_TND = torch.randn(2, 25, 10, 1, generator=generator)
    model = FunctionalModel(lambda: MLP((1,), 1, hidden=[40, 40]), generator, out_features=1)
    start = model.init(generator)
    phi = {name: p + 0.1 * torch.randn(25, *p.shape, generator=generator) for name, p in start.items()}
    v = {name: torch.randn(value.shape, generator=generator) for name, value in phi.items()}

    def multiply_one(phi: Theta, v: Theta, x: Tensor, y: Tensor) -> Theta:
        return multiply(way, lambda p: (model(p, x) - y).square().mean(), phi, v)

    return lambda: torch.func.vmap(multiply_one)(phi, v, x_TND, y_TND)


def multiply(way: str, loss: Callable[[Theta], Tensor], phi: Theta, v: Theta) -> Theta:
    gradient = torch.func.grad(loss)
    if way == FORWARD:
        return torch.func.jvp(gradient, (phi,), (v,))[1]
    vjp: Any = reverse_vjp if way == LOOP else torch.func.vjp
    _, pull_back = vjp(gradient, phi)
    return pull_back(v)[0]


def measure_peak(case: str, way: str) -> float:
    """Return the megabytes at the peak of a product beyond what the process held before it."""
    call = make_product(case, way)
    call()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is held now
    before = read_status_kb("VmRSS")
    call()
    return (read_status_kb("VmHWM") - before) / 1024


def measure_peak_in_process(case: str, way: str) -> float:
    script = str(Path(__file__).with_name("memory.py"))
    command = [sys.executable, script, "hvp", "--one", case, way]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed blocks are returned at once
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def read_status_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure_times(case: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Return for each way its milliseconds, its ratio to the first way, and how far its product is from the first's."""
    ways = CASES[case]
    calls = {way: make_product(case, way) for way in ways}
    products = {way: torch.cat([value.flatten() for value in call().values()]) for way, call in calls.items()}
    repeats = max(1, round(SECONDS / processor_seconds(calls[ways[0]], 1)))
    rows: list[dict[str, float]] = []
    for k in range(rounds):
        order = ways if k % 2 else tuple(reversed(ways))
        rows.append({way: processor_seconds(calls[way], repeats) for way in order})
    reference = products[ways[0]]
    result = {}
    for way in ways:
        ratios = sorted(row[way] / row[ways[0]] for row in rows)
        result[way] = {
            "ms": 1e3 * statistics.median(row[way] for row in rows),
            "ratio": statistics.median(ratios),
            "quartiles": [ratios[rounds // 4], ratios[-1 - rounds // 4]],
            "apart": float((products[way] - reference).norm() / reference.norm()),
        }
    return result


def processor_seconds(call: Callable[[], object], repeats: int) -> float:
    """Return the processor seconds of one call, over several in a row."""
    started = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - started) / repeats


def measure_products(quick: bool) -> None:
    torch.set_num_threads(1)
    environment = describe_environment()
    rows = []
    for case in CASES:
        for way, row in measure_times(case, 2 if quick else ROUNDS).items():
            peak_mb = measure_peak_in_process(case, way)
            rows.append({"support_loss": case, "way": way, **row, "peak_mb": peak_mb})
    save_section("memory", "products", environment, rows, quick)
