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
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import peers
import report
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from distmeta.compute.compiler import Compiler
from distmeta.compute.flat import tree_sum
from distmeta.compute.shard import shard_gradient
from distmeta.core import Theta
from distmeta.job import Job
from distmeta.runtime.pool import Pool, open_pool
from distmeta.runtime.problem import Problem, build, numerics_of
from distmeta.runtime.resolution import resolve
from distmeta.runtime.scores import mean_metrics
from distmeta.runtime.server import ParameterServer
from distmeta.runtime.worker import shards_of
from distmeta.seeding import task_ids, torch_generator
from distmeta.tasks.images import Preparation
from distmeta.tasks.store import write_store

REFERENCE = "TorchOpt, gradient"
SAME = 1e-9
"""Largest relative difference in float64 between systems that compute the same thing."""
NEAR = 5e-4
"""The same in float32, where a ReLU may fall on the other side of zero."""
ROUNDED = 0.5
"""The same in bfloat16: its rounding alone moves this meta-gradient by a third at the initialisation."""
NOTE = (
    "distmeta's rows also compute each task's query loss (and accuracy) before adaptation, and the accuracy "
    "after: the run's metrics. The peers' loops do not. One thread each, where a row does not say otherwise; "
    "two Ray workers are two processes of one thread. ∆: relative norm of the meta-gradient's difference "
    "from the one of torch.func in float64."
)


@dataclass(frozen=True)
class Workload:
    title: str
    tree: dict[str, Any]
    """The job."""
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    threads: int = 1
    """Of TorchOpt, in a row of its own; above 1 where operations are large enough to gain."""
    bf16: bool = False
    """Whether a row is computed in bfloat16."""


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
        return Workload(f"{title}, {count} tasks", tree | {"run": {"tasks_per_step": count}}, loss, *more)

    regression = "sinusoid, MLP 40-40, 10-shot, 5 inner steps"
    images = "28×28 images, strided conv4-64, 5-way 1-shot, 15 queries, 1 inner step"
    return {
        "sinusoid-25": of(regression, sinusoid, 25, F.mse_loss),
        "sinusoid-256": of(regression, sinusoid, 256, F.mse_loss),
        "conv4-16": of(images, conv4, 16, F.cross_entropy, report.cores(), True),
    }


class System:
    """Something that is timed: `call` does the work of one step's tasks once."""

    def __init__(
        self,
        name: str,
        call: Callable[[], Any],
        gradient: Theta,
        exact: Theta | None,
        threads: int = 1,
        near: float = NEAR,
    ):
        self.name, self.call, self.threads, self.near = name, call, threads, near
        self.gradient = gradient
        """Its mean meta-gradient of the first step's tasks, float32."""
        self.exact = exact
        """The same in float64, where the system can compute in it."""

    def seconds(self, calls: int) -> float:
        """Time of one call, over `calls` in a row."""
        torch.set_num_threads(self.threads)
        started = time.perf_counter()
        for _ in range(calls):
            self.call()
        return (time.perf_counter() - started) / calls


def job_of(workload: Workload, **run: Any) -> Job:
    return Job.parse(workload.tree).replace(run=run)


def in_float64(problem: Problem) -> Problem:
    problem.model.to(dtype=torch.float64)
    return problem


def first_episodes(problem: Problem, dtype: torch.dtype = torch.float32) -> tuple[Any, np.ndarray]:
    """The episodes of step 0, and their ids."""
    ids = task_ids(problem.job.seed, "train", 0, problem.job.run.tasks_per_step)
    episodes = problem.family.draw("train", ids)
    return tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, episodes), ids


def peer_gradient(name: str, title: str, workload: Workload) -> System:
    """A peer's meta-gradient of the episodes of step 0."""

    def made(problem: Problem, dtype: torch.dtype) -> tuple[Callable[[], Theta], Theta]:
        module = peers.peer_module(problem)
        peer = peers.PEERS[name](module, peers.inner_of(problem, workload.loss))
        episodes, _ = first_episodes(problem, dtype)
        return lambda: peers.gradient_of(peer, module, episodes), peers.gradient_of(peer, module, episodes)

    call, gradient = made(build(job_of(workload)), torch.float32)
    _, exact = made(in_float64(build(job_of(workload))), torch.float64)
    return System(f"{title}, gradient", call, gradient, exact)


@dataclass(frozen=True)
class Way:
    """How distmeta computes."""

    name: str
    compute: dict[str, Any]
    """The job's section."""
    near: float = NEAR
    """How far its meta-gradient may be from float64's."""


def ways_of(workload: Workload) -> tuple[list[Way], list[Way]]:
    """Those whose gradient is timed, and those whose whole step is: as a job finds it, and the fastest."""
    mode = resolve(build(job_of(workload))).execution.mode
    plain = [Way(name, {"execution": name}) for name in ("loop", "vmap")]
    fast = [Way(f"{mode} compiled", {"execution": mode, "compile": True})]
    if workload.bf16:
        compute = {"execution": mode, "compile": True, "precision": "bf16"}
        fast.append(Way(f"{mode} compiled in bf16", compute, near=ROUNDED))
    own = next(way for way in plain if way.name == mode)
    return [*plain, *fast], [own, fast[-1]]


def distmeta_gradient(way: Way, workload: Workload) -> System:
    """`shard_gradient` of the episodes of step 0 as one shard."""

    def made(problem: Problem, dtype: torch.dtype) -> Callable[[], Theta]:
        compute = problem.job.compute
        episodes, ids = first_episodes(problem, dtype)
        theta = problem.algorithm.init(torch.Generator())
        compiler = Compiler(compute.precision) if compute.compile else None

        def call() -> Theta:
            with numerics_of(problem.job, problem.device):
                result = shard_gradient(
                    problem.algorithm,
                    problem.score("train"),
                    theta,
                    episodes,
                    ids,
                    problem.execution,
                    compiler,
                )
            return {name: total / result.tasks for name, total in result.gradient.items()}

        return call

    job = job_of(workload).replace(compute=way.compute)
    call = made(build(job), torch.float32)
    exact = None if job.compute.compile else made(in_float64(build(job)), torch.float64)()
    return System(f"distmeta {way.name}, gradient", call, call(), exact, near=way.near)


def jax_gradient(workload: Workload) -> list[System]:
    """JAX's meta-gradient of the episodes of step 0; nothing where there is no JAX, or no MLP."""
    if find_spec("jax") is None or workload.tree["model"]["type"] != "mlp":
        return []
    from peers_jax import meta_gradient

    problem = build(job_of(workload))
    theta = problem.algorithm.init(torch_generator(problem.job.seed, "init"))
    call, gradient = meta_gradient(theta, first_episodes(problem)[0], peers.inner_of(problem, workload.loss))
    return [System(f"JAX jit+vmap, gradient, {report.cores()} cores", call, gradient, None)]


def peer_step(name: str, title: str, workload: Workload, threads: int = 1) -> System:
    """A peer's whole step; it draws its tasks with the job's task family."""
    problem = build(job_of(workload))
    module = peers.peer_module(problem)
    peer = peers.PEERS[name](module, peers.inner_of(problem, workload.loss))
    gradient = peers.gradient_of(peer, module, first_episodes(problem)[0])
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    steps = iter(range(10**9))

    def call() -> None:
        ids = task_ids(problem.job.seed, "train", next(steps), problem.job.run.tasks_per_step)
        peers.train_step(peer, optimizer, problem.family.draw("train", ids))

    suffix = "" if threads == 1 else f", {threads} threads"
    return System(f"{title}, step{suffix}", call, gradient, None, threads)


def distmeta_step(way: Way, workers: int, workload: Workload, stack: ExitStack) -> System:
    """A whole step as the driver makes it: plan, map over the pool, add by the tree, means, outer step."""
    # half a core each, so that two pools have their places at once; a worker computes with one thread all the same
    run = {"workers": workers, "shards": max(workers, 1), "cpus_per_worker": 0.5}
    job = job_of(workload, **run).replace(compute=way.compute)
    settled = resolve(build(job))
    server = ParameterServer(settled.init(), settled.job.outer)
    pool = open_pool(settled, server.layout, print)
    stack.callback(pool.close)
    first = mean_gradient(settled, pool, server, 0)
    gradient = {name: view.clone() for name, view in server.layout.views(torch.from_numpy(first)).items()}
    steps = iter(range(10**9))
    where = "in-process" if workers == 0 else f"{workers} Ray workers"
    name = f"distmeta {way.name}, step, {where}"

    def call() -> None:
        server.step(mean_gradient(settled, pool, server, next(steps)))

    return System(name, call, gradient, None, near=way.near)


def mean_gradient(problem: Problem, pool: Pool, server: ParameterServer, step: int) -> np.ndarray:
    run = problem.job.run
    assert run.shards is not None, "resolved"
    steps = problem.algorithm.inner_steps
    plan = shards_of(problem, "train", step, run.tasks_per_step, run.shards, steps)
    results = pool.map(server.flat(), plan, lambda: None)
    mean_metrics(results)
    total = tree_sum([result.gradient for result in results if result.gradient is not None])
    return total / np.float32(run.tasks_per_step)


def systems_of(workload: Workload, stack: ExitStack) -> list[System]:
    """All that are timed on a workload, made and run once."""
    gradients, steps = ways_of(workload)
    made = [
        peer_gradient("higher", "higher", workload),
        peer_gradient("torchopt", "TorchOpt", workload),
        peer_gradient("torch.func", "torch.func", workload),
        *jax_gradient(workload),
        *(distmeta_gradient(way, workload) for way in gradients),
        peer_step("torchopt", "TorchOpt", workload),
    ]
    if workload.threads > 1:
        made.append(peer_step("torchopt", "TorchOpt", workload, workload.threads))
    return [*made, *(distmeta_step(way, workers, workload, stack) for way in steps for workers in (0, 2))]


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
    base = rates[:, [system.name for system in systems].index(REFERENCE)]
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
def image_store(path: str) -> Iterator[tuple[str, str]]:
    """The store at `path`, or one of random images; and which it is."""
    if Path(path).is_file():
        yield path, "Omniglot"
        return
    with tempfile.TemporaryDirectory() as folder:
        drawn = str(Path(folder) / "random.arrow")
        pixels = np.random.default_rng(0).integers(0, 256, (60 * 20, 1, 28, 28), dtype=np.uint8)
        names = [str(k) for k in range(60)]
        write_store(drawn, pixels, names, [""] * 60, [20] * 60, Preparation())
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
    """The systems on sine waves with other numbers of tasks, and their plot."""
    found = {count: run(workloads("", count)["sinusoid-25"], rounds, seconds) for count in counts}
    report.write("throughput-curve", start, {"tasks": found}, quick)
    if quick:
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    for row in found[counts[-1]]["throughput"]:
        rates = [
            next(
                (r["tasks_per_second"] for r in found[n]["throughput"] if r["system"] == row["system"]), None
            )
            for n in counts
        ]
        style = "o-" if row["system"].startswith("distmeta") else "s--"
        axes.plot(counts, rates, style, label=row["system"])
    axes.set(xscale="log", yscale="log", xlabel="tasks a step", ylabel="tasks/s", xticks=counts)
    axes.set_xticklabels(counts)
    axes.legend(fontsize="small")
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
        results = {name: run(chosen[name], rounds, seconds) for name in given.only}
    print(f"\n{NOTE}")
    settings = {"rounds": rounds, "seconds_a_round": seconds, "images": images, "note": NOTE}
    name = "throughput" if given.only == names else "throughput-" + "-".join(given.only)
    report.write(name, start, {"settings": settings, "workloads": results}, given.quick)


if __name__ == "__main__":
    main()
