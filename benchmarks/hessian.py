"""A Hessian-vector product H(φ)v of the support loss, reverse over reverse and forward over reverse.

    python benchmarks/memory.py hvp [--quick]

Constant memory takes one in every inner step (`compute.adjoint`): reverse over reverse, by `reverse_vjp` in the
loop and by `torch.func.vjp` under vmap. Forward over reverse is `torch.func.jvp` of the same gradient. Each includes
the gradient itself. One thread; processor seconds of the process, which other work on the machine disturbs little;
medians of ratios with all ways in turn. Peaks are those of a process of its own, over what it held before, in its
second call.
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

import report
import torch
from torch import Tensor
from torch.nn import functional as F

from distmeta.compute.constant_memory import reverse_vjp
from distmeta.models.conv4 import Conv4
from distmeta.models.functional import Functional
from distmeta.models.mlp import MLP
from distmeta.protocols import Theta

REVERSE, LOOP, FORWARD = "reverse over reverse, vjp", "reverse over reverse, autograd", "forward over reverse"
CASES = {
    "conv4-64, max pool, 5-way 5-shot": (LOOP, REVERSE, FORWARD),
    "conv4-64, strided, 5-way 5-shot": (LOOP, REVERSE, FORWARD),
    "MLP 40-40, 10-shot, vmap over 25 tasks": (REVERSE, FORWARD),
}
"""The first way is what distmeta takes there, and what the others are held against."""
ROUNDS, SECONDS = 15, 0.5
"""Of all ways in turn, and what a way takes in each at least."""

Product = Callable[[], Theta]


def product(case: str, way: str) -> Product:
    """H(φ)v at random φ, v and support data."""
    generator = torch.Generator().manual_seed(0)
    if case.startswith("conv4"):
        pool: Any = "max" if "max" in case else "stride"
        x, y = torch.randn(25, 1, 28, 28, generator=generator), torch.arange(5).repeat(5)
        model = Functional(lambda: Conv4((1, 28, 28), 5, pool=pool), generator, out_features=5)
        phi = model.init(generator)
        v = {name: torch.randn(value.shape, generator=generator) for name, value in phi.items()}
        return lambda: _times(way, lambda p: F.cross_entropy(model(p, x), y), phi, v)
    x, y = torch.randn(2, 25, 10, 1, generator=generator)
    model = Functional(lambda: MLP((1,), 1, hidden=[40, 40]), generator, out_features=1)
    start = model.init(generator)
    phi = {n: p + 0.1 * torch.randn(25, *p.shape, generator=generator) for n, p in start.items()}
    v = {name: torch.randn(value.shape, generator=generator) for name, value in phi.items()}

    def one(phi: Theta, v: Theta, x: Tensor, y: Tensor) -> Theta:
        return _times(way, lambda p: (model(p, x) - y).square().mean(), phi, v)

    return lambda: torch.func.vmap(one)(phi, v, x, y)


def _times(way: str, loss: Callable[[Theta], Tensor], phi: Theta, v: Theta) -> Theta:
    gradient = torch.func.grad(loss)
    if way == FORWARD:
        return torch.func.jvp(gradient, (phi,), (v,))[1]
    _, pull = (reverse_vjp if way == LOOP else torch.func.vjp)(gradient, phi)
    return pull(v)[0]


def peak(case: str, way: str) -> float:
    """Megabytes at the peak of a product over what the process held before it."""
    call = product(case, way)
    call()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def times(case: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of each way, its ratio to the first way's, and how far its product is from that one's."""
    ways = CASES[case]
    calls = {way: product(case, way) for way in ways}
    found = {way: torch.cat([value.flatten() for value in call().values()]) for way, call in calls.items()}
    started = time.process_time()
    calls[ways[0]]()
    repeats = max(1, round(SECONDS / (time.process_time() - started)))
    rows: list[dict[str, float]] = []
    for k in range(rounds):
        row = {}
        for way in ways if k % 2 else reversed(ways):
            started = time.process_time()
            for _ in range(repeats):
                calls[way]()
            row[way] = (time.process_time() - started) / repeats
        rows.append(row)
    exact = found[ways[0]]
    result = {}
    for way in ways:
        ratios = sorted(row[way] / row[ways[0]] for row in rows)
        result[way] = {
            "ms": 1e3 * statistics.median(row[way] for row in rows),
            "ratio": statistics.median(ratios),
            "quartiles": [ratios[rounds // 4], ratios[-1 - rounds // 4]],
            "apart": float((found[way] - exact).norm() / exact.norm()),
        }
    return result


def main(quick: bool, one: list[str] | None) -> None:
    torch.set_num_threads(1)
    names = list(CASES)
    if one:
        print(json.dumps(peak(names[int(one[0])], one[1])))
        return
    start, cells, result = report.environment(), [], {}
    for k, case in enumerate(names):
        result[case] = times(case, 2 if quick else ROUNDS)
        for way, row in result[case].items():
            command = [
                sys.executable,
                str(Path(__file__).with_name("memory.py")),
                "hvp",
                "--one",
                str(k),
                way,
            ]
            env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed blocks go back at once
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
            row["peak_mb"] = json.loads(done.stdout.splitlines()[-1])
            low, high = row["quartiles"]
            figures = [
                f"{row['ms']:.1f}",
                f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})",
                f"{row['peak_mb']:.0f}",
            ]
            cells.append([case, way, *figures, f"{row['apart']:.0e}"])
    header = ["support loss", "H(φ)v", "processor ms", "ratio (quartiles)", "peak, MB", "∆"]
    print(report.table(header, cells))
    report.write("hvp", start, {"products": result}, quick=quick)
