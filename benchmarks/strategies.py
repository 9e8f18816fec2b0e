"""What a step of each strategy costs that computes nothing, against the same bytes moved by hand; and on slow links.

    python benchmarks/strategies.py steps
    python benchmarks/strategies.py links     needs root: network namespaces and `tc tbf`

steps: two workers, four shards, an algorithm whose gradient is 0, SGD. By hand, in turn with it, medians of rounds:
driver, async: one `put` of theta, one call per shard to two actors that return a vector of the same size, one `get` of
all, the sum, the step. sharded: the same calls return two pieces each, which go to two more actors that add and step.
all-reduce: one call to two actors that add their two vectors, all-reduce them with gloo and step. local: one `put`, one
call per replica that returns a vector, their mean, the step; divided by the steps between two averages.

links: the driver and two workers in network namespaces, joined by links that `tc tbf` limits in both directions.
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
from typing import Any, NamedTuple

import numpy as np
from raw_results import ROOT, describe_environment, load_study, save_section

SHARDS = 4
WORKERS = 2
LOCAL_STEPS = 10
ROUNDS = {100_000: 30, 10_000_000: 7, 100_000_000: 3}
"""Measured rounds by number of parameters."""


class LinkCase(NamedTuple):
    mbit: int
    parameters: int
    strategies: tuple[str, ...]
    rounds: int


LINKS = [
    LinkCase(1_000, 10_000_000, ("driver", "sharded", "all-reduce"), 2),
    LinkCase(200, 10_000_000, ("driver", "sharded", "all-reduce"), 2),
    LinkCase(100, 1_000_000, ("driver", "local"), 1),
    LinkCase(10, 250_000, ("driver", "local", "local int8"), 1),
]
OPTIONS: dict[str, dict[str, Any]] = {"local": {"local_steps": LOCAL_STEPS}, "sharded": {"servers": 2}}


def start_strategy(name: str, size: int) -> tuple[Any, Any]:
    """Return a problem that computes nothing, and its strategy with workers. "local int8" compresses."""
    from distmeta.config.job import Job
    from distmeta.runtime.problem import build_problem
    from distmeta.runtime.resolve import resolve
    from distmeta.runtime.startup import build_strategy

    kind, _, compress = name.partition(" ")
    options = OPTIONS.get(kind, {})
    if compress:
        options = options | {"compress": compress}
    tree = {
        "name": "zero-gradient",
        "model": {"type": "mlp", "hidden": []},
        "tasks": {"type": "linear", "shots": 1, "queries": 1},
        "algorithm": {"type": "driver:ZeroGradient", "size": size},
        "outer": {"optimizer": "sgd", "lr": 0.1},
        "strategy": {"type": kind, **options},
        "run": {
            "steps": 10**6,
            "tasks_per_step": SHARDS,
            "shards": SHARDS,
            "workers": WORKERS,
            "cpus_per_worker": 1,
            "eval_every": 0,
            "checkpoint_every": 0,
        },
        "tracking": {"type": "none"},
    }
    problem = resolve(build_problem(Job.parse(tree)))
    return problem, build_strategy(problem, problem.job.outer, None, lambda text: None)


def time_steps(
    name: str, size: int, rounds: int, by_hand: Callable[[int], object] | None = None
) -> tuple[list[float], list[float]]:
    """Return the seconds per step of each round, of the strategy and of `by_hand`. The first round does not count."""
    problem, strategy = start_strategy(name, size)
    times: list[float] = []
    times_by_hand: list[float] = []
    step = 0
    try:
        for _ in range(rounds + 1):
            started = time.perf_counter()
            records = strategy.advance(problem, step, lambda: None)
            times.append((time.perf_counter() - started) / len(records))
            step += len(records)
            if by_hand is not None:
                started = time.perf_counter()
                by_hand(len(records))
                times_by_hand.append((time.perf_counter() - started) / len(records))
    finally:
        strategy.close()
    return times[1:], times_by_hand[1:]


# --- The same bytes by hand ---------------------------------------------------------------------------------------


class EchoWorker:
    """A worker that returns vectors it has."""

    def __init__(self, size: int):
        self.gradient = np.zeros(size, np.float32)

    def compute(self, *theta: np.ndarray) -> np.ndarray:
        return self.gradient

    def compute_halves(self, *theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        half = len(self.gradient) // 2
        return self.gradient[:half], self.gradient[half:]


class HalfServer:
    """A parameter server of half of theta."""

    def __init__(self, size: int):
        self.theta = np.zeros(size, np.float32)
        self.vectors: list[np.ndarray] = []

    def add(self, vector: np.ndarray) -> None:
        self.vectors.append(vector)

    def step(self) -> tuple[None, np.ndarray]:
        total = self.vectors[0] + self.vectors[1]
        for vector in self.vectors[2:]:
            total += vector
        self.vectors = []
        self.theta -= 0.1 * total
        return None, self.theta


class RingWorker:
    """A rank of an all-reduce."""

    def __init__(self, size: int, rank: int, meeting: str):
        from torch import distributed

        distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORKERS)
        self.theta = np.zeros(size, np.float32)
        self.gradients = [np.zeros(size, np.float32) for _ in range(2)]

    def steps(self, count: int) -> None:
        import torch
        from torch import distributed

        for _ in range(count):
            total = self.gradients[0] + self.gradients[1]
            distributed.all_reduce(torch.from_numpy(total))
            self.theta -= 0.1 * total


def start_by_hand(size: int) -> tuple[dict[str, Callable[[int], object]], Callable[[], None]]:
    """Return for each strategy a function that moves its bytes for some steps, and one that ends the actors."""
    import ray

    echoes = [ray.remote(EchoWorker).options(num_cpus=0).remote(size) for _ in range(WORKERS)]
    servers = [ray.remote(HalfServer).options(num_cpus=0).remote(size // 2) for _ in range(2)]
    meeting = str(Path(tempfile.mkdtemp()) / "meeting")
    ranks = [ray.remote(RingWorker).options(num_cpus=0).remote(size, i, meeting) for i in range(WORKERS)]
    theta = np.zeros(size, np.float32)
    slices = [ray.put(theta[: size // 2]), ray.put(theta[size // 2 :])]

    def step_through_driver(calls: int) -> None:
        sent = ray.put(theta)
        vectors = ray.get([echoes[i % WORKERS].compute.remote(sent) for i in range(calls)])
        total = vectors[0] + vectors[1]
        for vector in vectors[2:]:
            total += vector
        np.subtract(theta, 0.1 * total, out=theta)

    def step_through_servers() -> None:
        for i in range(SHARDS):
            pieces = echoes[i % WORKERS].compute_halves.options(num_returns=2).remote(*slices)
            for server, piece in zip(servers, pieces, strict=True):
                server.add.remote(piece)
        calls = [server.step.options(num_returns=2).remote() for server in servers]
        ray.get([done for done, _ in calls])
        slices[:] = [new for _, new in calls]

    def end() -> None:
        for actor in [*echoes, *servers, *ranks]:
            ray.kill(actor)

    by_hand = {
        "driver": lambda steps: step_through_driver(SHARDS),
        "sharded": lambda steps: step_through_servers(),
        "all-reduce": lambda steps: ray.get([rank.steps.remote(steps) for rank in ranks]),
        "async": lambda steps: step_through_driver(SHARDS),
        "local": lambda steps: step_through_driver(WORKERS),
    }
    return by_hand, end


def measure_steps(rounds_by_size: dict[int, int], quick: bool) -> None:
    import ray

    environment = describe_environment()
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    rows: list[dict[str, Any]] = []
    for size, rounds in rounds_by_size.items():
        by_hand, end = start_by_hand(size)
        for name, step_by_hand in by_hand.items():
            times, times_by_hand = time_steps(name, size, rounds, step_by_hand)
            ratios = [ours / by_hand for ours, by_hand in zip(times, times_by_hand, strict=True)]
            rows.append(
                {
                    "parameters": size,
                    "strategy": name,
                    "step_ms": 1e3 * statistics.median(times),
                    "by_hand_ms": 1e3 * statistics.median(times_by_hand),
                    "ratio": statistics.median(ratios),
                    "rounds": rounds,
                }
            )
            save_section("strategies", "steps", environment, rows, quick, local_steps=LOCAL_STEPS)
        end()
    ray.shutdown()


# --- Slow links ---------------------------------------------------------------------------------------------------


def measure_links(cases: list[LinkCase], quick: bool) -> None:
    environment = describe_environment()
    home = Path(tempfile.mkdtemp(prefix="dm-", dir="/tmp"))  # short: Ray's socket paths have a limit
    tests = str(ROOT / "tests")
    sys.path.insert(0, tests)
    os.environ |= {
        "HOME": str(home),
        "RAY_TMPDIR": str(home),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), tests]),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": home.name * 4,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    from support.network import network

    section = load_study("strategies").get("links", {"rows": []})
    asked = {(case.mbit, case.parameters, name) for case in cases for name in case.strategies}
    rows = [row for row in section["rows"] if (row["mbit"], row["parameters"], row["strategy"]) not in asked]
    folder = home / "net"
    folder.mkdir()
    with network(folder) as hosts:
        driver = hosts.add(cpus=0)
        for _ in range(WORKERS):
            hosts.add(cpus=1)
        # the driver's host sees its own folder at the place of the cluster's, as if it were its own disk
        bind = f'mount --bind "{folder / driver}" "{folder}" && exec "$@"'
        script = [sys.executable, str(Path(__file__).absolute()), "inside"]
        addresses = ["--address", hosts.address, "--own", hosts.ip_of(driver)]
        command = hosts.run(driver, ["sh", "-c", bind, "sh", *script, *addresses])
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as inside:
            assert inside.stdin is not None
            assert inside.stdout is not None
            for case in cases:
                hosts.limit(f"{case.mbit}mbit")
                for name in case.strategies:
                    print(json.dumps([name, case.parameters, case.rounds]), file=inside.stdin, flush=True)
                    seconds = json.loads(inside.stdout.readline())
                    row = {"mbit": case.mbit, "parameters": case.parameters, "strategy": name}
                    rows.append(row | {"step_s": statistics.median(seconds), "all_s": seconds})
                    save_section("strategies", "links", environment, rows, quick, local_steps=LOCAL_STEPS)
            inside.stdin.close()


def answer_requests(address: str, own: str) -> None:
    """On the driver's host: read what to measure line by line, and answer with the seconds of each round."""
    import ray

    # without a route to the outside Ray takes 127.0.0.1 for its own address, and others cannot reach its objects
    ray.init(address=address, _node_ip_address=own, log_to_driver=False, logging_level=logging.ERROR)
    for line in sys.stdin:
        name, size, rounds = json.loads(line)
        times, _ = time_steps(name, size, rounds)
        print(json.dumps(times), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["steps", "links", "inside"], help="`inside` is started by links")
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    parser.add_argument("--mbit", type=int, help="links: only this rate; keep the other results")
    parser.add_argument("--most", type=int, default=10**9, help="steps: leave out larger models")
    parser.add_argument("--address", help="inside: address of the cluster")
    parser.add_argument("--own", help="inside: address of this host")
    given = parser.parse_args()
    os.chdir(Path(__file__).parent)  # workers find `driver:ZeroGradient` in the working folder
    if given.what == "inside":
        answer_requests(given.address, given.own)
    elif given.what == "links":
        cases = [LinkCase(1_000, 1_000_000, ("driver", "sharded"), 1)] if given.quick else LINKS
        measure_links([case for case in cases if given.mbit in (None, case.mbit)], given.quick)
    elif given.quick:
        measure_steps({100_000: 3}, quick=True)
    else:
        measure_steps({size: rounds for size, rounds in ROUNDS.items() if size <= given.most}, quick=False)


if __name__ == "__main__":
    main()
