"""What a step of each strategy costs that computes nothing, against the same bytes moved by hand; and on slow links.

    python benchmarks/strategies.py [steps] [--quick]
    python benchmarks/strategies.py links [--quick]      # as root: network namespaces, `tc tbf`
    python benchmarks/strategies.py plot                 # results/strategies.png again, from the results of both

steps: two workers, 4 shards, an algorithm whose gradient is 0 everywhere, SGD. By hand, in turn with it, medians:
driver and async: one `put` of theta, a call a shard to two actors that give back a vector of the same size, one `get`
of all, the adds, the step. sharded: the same calls give back two pieces each, which go to two more actors that add
and step. all-reduce: a call to two actors that add their two vectors, all-reduce them by gloo and step, as many
times as steps were taken at once. local: one `put`, a call a replica that gives back a vector, their mean, the step;
divided by H.

links: the driver and two workers on hosts of their own, namespaces joined by links that `tc tbf` limits both ways.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import report

SHARDS, WORKERS, LENGTH = 4, 2, 10
STEPS = {100_000: 30, 10_000_000: 7, 100_000_000: 3}
LINKS = [
    (1_000, 10_000_000, ("driver", "sharded", "all-reduce"), 2),
    (200, 10_000_000, ("driver", "sharded", "all-reduce"), 2),
    (100, 1_000_000, ("driver", "local"), 1),
    (10, 250_000, ("driver", "local", "local int8"), 1),
]
"""Mbit/s, parameters, strategies, what is measured: as many steps, or rounds of LENGTH steps."""


def opened(named: str, size: int) -> tuple[Any, Any]:
    """The problem that computes nothing, and its strategy, ready to advance."""
    from distmeta.config.job import Job
    from distmeta.runtime.problem import build
    from distmeta.runtime.resolve import resolve
    from distmeta.strategies import open_strategy

    strategy, _, compress = named.partition(" ")
    own = {"local": {"local_steps": LENGTH}, "sharded": {"servers": 2}}.get(strategy, {})
    run = {
        "steps": 10**6,
        "tasks_per_step": SHARDS,
        "shards": SHARDS,
        "workers": WORKERS,
        "cpus_per_worker": 1,
        "eval_every": 0,
    }
    run |= {
        "strategy": strategy,
        "compress": compress or "none",
        "checkpoint_every": 0,
        **own,
    }
    tree = {
        "name": "null",
        "model": {"type": "mlp", "hidden": []},
        "tasks": {"type": "linear", "shots": 1, "queries": 1},
        "algorithm": {"type": "driver:Null", "size": size},
        "outer": {"optimizer": "sgd", "lr": 0.1},
        "run": run,
        "tracking": {"type": "none"},
    }
    problem = resolve(build(Job.parse(tree)))
    return problem, open_strategy(problem, problem.job.outer, None, lambda text: None)


def advances(named: str, size: int, count: int, floor: Callable[[int], object] | None) -> Any:
    """Seconds a step of `count` advances, each followed by its floor; the first of both is not counted."""
    problem, strategy = opened(named, size)
    ours, by_hand, step = [], [], 0
    try:
        for _ in range(count + 1):
            started = time.perf_counter()
            records = strategy.advance(problem, step, lambda: None)
            ours.append((time.perf_counter() - started) / len(records))
            step += len(records)
            if floor is not None:
                started = time.perf_counter()
                floor(len(records))
                by_hand.append((time.perf_counter() - started) / len(records))
    finally:
        strategy.close()
    return ours[1:], by_hand[1:]


class Echo:
    """By hand: a worker."""

    def __init__(self, size: int):
        self.gradient = np.zeros(size, np.float32)

    def compute(self, *theta: np.ndarray) -> np.ndarray:
        return self.gradient

    def compute_two(self, *theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        half = len(self.gradient) // 2
        return self.gradient[:half], self.gradient[half:]


class Half:
    """By hand: a parameter server of half of theta."""

    def __init__(self, size: int):
        self.theta, self.vectors = np.zeros(size, np.float32), []

    def add(self, vector: np.ndarray) -> None:
        self.vectors.append(vector)

    def step(self) -> tuple[None, np.ndarray]:
        total = self.vectors[0] + self.vectors[1]
        for vector in self.vectors[2:]:
            total += vector
        self.vectors = []
        self.theta -= 0.1 * total
        return None, self.theta


class Summing:
    """By hand: a rank."""

    def __init__(self, size: int, rank: int, meeting: str):
        from torch import distributed

        distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORKERS)
        self.theta, self.gradients = (
            np.zeros(size, np.float32),
            [np.zeros(size, np.float32) for _ in range(2)],
        )

    def steps(self, count: int) -> None:
        import torch
        from torch import distributed

        for _ in range(count):
            total = self.gradients[0] + self.gradients[1]
            distributed.all_reduce(torch.from_numpy(total))
            self.theta -= 0.1 * total


def floors(size: int) -> tuple[dict[str, Callable[[int], object]], Callable[[], None]]:
    """The bytes of each strategy moved by hand; and what ends the actors."""
    import ray

    echoes = [ray.remote(Echo).options(num_cpus=0).remote(size) for _ in range(WORKERS)]
    halves = [ray.remote(Half).options(num_cpus=0).remote(size // 2) for _ in range(2)]
    theta = np.zeros(size, np.float32)
    slices = [ray.put(theta[: size // 2]), ray.put(theta[size // 2 :])]

    meeting = tempfile.mktemp()
    ranks = [ray.remote(Summing).options(num_cpus=0).remote(size, i, meeting) for i in range(WORKERS)]

    def through_here(calls: int) -> None:
        sent = ray.put(theta)
        vectors = ray.get([echoes[i % WORKERS].compute.remote(sent) for i in range(calls)])
        total = vectors[0] + vectors[1]
        for vector in vectors[2:]:
            total += vector
        theta.__isub__(0.1 * total)

    def through_servers() -> None:
        for i in range(SHARDS):
            pieces = echoes[i % WORKERS].compute_two.options(num_returns=2).remote(*slices)
            for half, piece in zip(halves, pieces, strict=True):
                half.add.remote(piece)
        calls = [half.step.options(num_returns=2).remote() for half in halves]
        ray.get([done for done, _ in calls])
        slices[:] = [new for _, new in calls]

    def end() -> None:
        for actor in [*echoes, *halves, *ranks]:
            ray.kill(actor)

    by_hand = {
        "driver": lambda steps: through_here(SHARDS),
        "sharded": lambda steps: through_servers(),
        "all-reduce": lambda steps: ray.get([rank.steps.remote(steps) for rank in ranks]),
        "async": lambda steps: through_here(SHARDS),
        "local": lambda steps: through_here(WORKERS),
    }
    return by_hand, end


def steps(sizes: dict[int, int], quick: bool) -> None:
    import ray

    start = report.environment()
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    rows: list[dict[str, Any]] = []
    for size, count in sizes.items():
        by_hand, end = floors(size)
        for named, floor in by_hand.items():
            ours, floor_times = advances(named, size, count, floor)
            ratios = [a / b for a, b in zip(ours, floor_times, strict=True)]
            rows.append(
                {
                    "parameters": size,
                    "strategy": named,
                    "step_ms": 1e3 * statistics.median(ours),
                    "by_hand_ms": 1e3 * statistics.median(floor_times),
                    "ratio": statistics.median(ratios),
                    "rounds": count,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            report.write("strategies-steps", start, {"local_steps": LENGTH, "steps": rows}, quick=quick)
        end()
    ray.shutdown()
    header = ["parameters", "strategy", "step, ms", "by hand, ms", "ratio"]
    cells = [
        [
            f"{r['parameters']:,}",
            r["strategy"],
            f"{r['step_ms']:.1f}",
            f"{r['by_hand_ms']:.1f}",
            f"{r['ratio']:.2f}",
        ]
        for r in rows
    ]
    print(report.table(header, cells))


def links(cases: list[tuple[int, int, tuple[str, ...], int]], quick: bool) -> None:
    sys.path.insert(0, str(report.ROOT / "tests"))
    start = report.environment()
    home = Path(tempfile.mkdtemp(prefix="dm-", dir="/tmp"))  # short: Ray's socket paths have a limit
    paths = [str(report.ROOT), str(report.ROOT / "benchmarks"), str(report.ROOT / "tests")]
    os.environ |= {
        "HOME": str(home), "RAY_TMPDIR": str(home), "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": home.name * 4, "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }  # fmt: skip
    from network import network

    path = report.RESULTS / "strategies-links.json"
    measured = {(rate, size, named) for rate, size, strategies, _ in cases for named in strategies}
    rows = json.loads(path.read_text())["links"] if path.exists() else []
    rows = [row for row in rows if (row["mbit"], row["parameters"], row["strategy"]) not in measured]
    folder = home / "net"
    folder.mkdir()
    with network(folder) as hosts:
        driver = hosts.add(cpus=0)
        for _ in range(WORKERS):
            hosts.add(cpus=1)
        line = [
            "sh",
            "-c",
            f'mount --bind "{folder / driver}" "{folder}" && exec "$@"',
            "sh",
        ]  # its node's own disk
        line += [sys.executable, str(Path(__file__).absolute()), "inside", "--address", hosts.address]
        line += ["--own", hosts.ip_of(driver)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(hosts.run(driver, line), **pipes) as inside:
            assert inside.stdin is not None
            assert inside.stdout is not None
            for rate, size, strategies, count in cases:
                hosts.limit(f"{rate}mbit")
                for named in strategies:
                    print(json.dumps([named, size, count]), file=inside.stdin, flush=True)
                    seconds = json.loads(inside.stdout.readline())
                    found = {"mbit": rate, "parameters": size, "strategy": named, "date": start["date"]}
                    rows.append(found | {"step_s": statistics.median(seconds), "all_s": seconds})
                    print(json.dumps(rows[-1]), flush=True)
                    report.write(
                        "strategies-links", start, {"local_steps": LENGTH, "links": rows}, quick=quick
                    )
            inside.stdin.close()
    rows.sort(key=lambda row: -row["mbit"])
    base = {row["mbit"]: row["step_s"] for row in rows if row["strategy"] == "driver"}
    cells = [
        [
            str(row["mbit"]),
            f"{row['parameters']:,}",
            row["strategy"],
            f"{row['step_s']:.2f}",
            f"{base[row['mbit']] / row['step_s']:.1f}",
        ]
        for row in rows
    ]
    print(report.table(["Mbit/s", "parameters", "strategy", "step, s", "times driver's speed"], cells))


def inside(address: str, own: str) -> None:
    """On the driver's host: measures what it is asked for, line by line."""
    import ray

    # without a route to the outside Ray takes its own address for 127.0.0.1, and nobody finds what it owns
    ray.init(address=address, _node_ip_address=own, log_to_driver=False, logging_level=logging.ERROR)
    for line in sys.stdin:
        named, size, count = json.loads(line)
        print(json.dumps(advances(named, size, count, None)[0]), flush=True)


def plot() -> None:
    """A step's time against theta's size beside the same bytes by hand; and what each strategy gains on slow links."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    found = {name: report.RESULTS / f"strategies-{name}.json" for name in ("steps", "links")}
    rows = {name: json.loads(path.read_text())[name] for name, path in found.items() if path.exists()}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for i, named in enumerate(dict.fromkeys(row["strategy"] for row in rows.get("steps", []))):
        own = [row for row in rows["steps"] if row["strategy"] == named]
        sizes = [row["parameters"] for row in own]
        left.plot(sizes, [row["step_ms"] for row in own], "o-", color=f"C{i}", label=named)
        left.plot(sizes, [row["by_hand_ms"] for row in own], ":", color=f"C{i}")
    left.set(
        xscale="log", yscale="log", xlabel="parameters", ylabel="ms a step (dotted: the same bytes by hand)"
    )
    left.legend()
    links = rows.get("links", [])
    base = {row["mbit"]: row["step_s"] for row in links if row["strategy"] == "driver"}
    names = [f"{row['strategy']}, {row['mbit']:,} Mbit/s, {row['parameters'] / 1e6:g} M" for row in links]
    right.barh(names, [base[row["mbit"]] / row["step_s"] for row in links])
    right.axvline(1, color="black", linewidth=0.7)
    right.invert_yaxis()
    right.set(xscale="log", xlabel="times the driver's speed on that link")
    figure.savefig(report.RESULTS / "strategies.png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=["steps", "links", "plot", "inside"], default="steps")
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    parser.add_argument("--without", nargs="*", default=[], help="links: leave out strategies")
    parser.add_argument("--mbit", type=int, help="links: this rate alone, beside the results that are there")
    parser.add_argument("--most", type=int, default=10**9, help="leave out larger thetas")
    parser.add_argument("--address", help="inside: the cluster of namespaces")
    parser.add_argument("--own", help="inside: this host's address")
    given = parser.parse_args()
    os.chdir(Path(__file__).parent)  # workers find `driver:Null` in the working folder
    if given.what == "inside":
        inside(given.address, given.own)
    elif given.what == "plot":
        plot()
    elif given.what == "links":
        cases = [(1_000, 1_000_000, ("driver", "sharded"), 1)] if given.quick else LINKS
        kept = [(r, n, tuple(s for s in names if s not in given.without), k) for r, n, names, k in cases]
        links([case for case in kept if given.mbit in (None, case[0])], given.quick)
    else:
        sizes = {size: count for size, count in STEPS.items() if size <= given.most}
        steps({100_000: 3} if given.quick else sizes, given.quick)


if __name__ == "__main__":
    main()
