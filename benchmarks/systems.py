"""What `throughput.py` times: the peers' loops and distmeta's ways, each as a call that does one step's work."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import peers
import report
import torch
from torch.utils._pytree import tree_map

from distmeta.compute.compiler import Compiler
from distmeta.compute.compression import decode
from distmeta.compute.episodes import to_device
from distmeta.compute.gradient import shard_gradient
from distmeta.compute.vectors import mean_of
from distmeta.config.job import Job
from distmeta.protocols import Theta
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.pool import Pool, open_pool
from distmeta.runtime.problem import Problem, build, numerics_of
from distmeta.runtime.resolve import resolve
from distmeta.runtime.scores import mean_metrics
from distmeta.runtime.worker import shards_of
from distmeta.seeding import task_ids, torch_generator

NEAR = 5e-3
"""The same in float32, where a ReLU may fall on the other side of zero: moving theta by 1e-6 of itself moves the
meta-gradient of one of conv4-64's tasks by 2e-3 of its norm."""
ROUNDED = 0.5
"""The same in bfloat16: its rounding alone moves this meta-gradient by a third at the initialisation."""


@dataclass(frozen=True)
class Workload:
    title: str
    tree: dict[str, Any]
    """The job."""
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    threads: int = 1
    """Of TorchOpt, in a row of its own; above 1 where operations are large enough to gain."""
    bf16: bool = False
    """Whether a row is computed in bfloat16: without instructions for it, that is slower than float32."""
    compiled: bool = True
    """Whether rows are compiled."""


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
        device: torch.device | None = None,
    ):
        self.name, self.call, self.threads, self.near = name, call, threads, near
        self.device = device or torch.device("cpu")
        self.gradient = gradient
        """Its mean meta-gradient of the first step's tasks, float32."""
        self.exact = exact
        """The same in float64, where the system can compute in it."""

    def seconds(self, calls: int) -> float:
        """Time of one call, over `calls` in a row."""
        torch.set_num_threads(self.threads)
        synchronise(self.device)
        started = time.perf_counter()
        for _ in range(calls):
            self.call()
        synchronise(self.device)
        return (time.perf_counter() - started) / calls


def synchronise(device: torch.device) -> None:
    """Waits until a GPU has done what it was told; a CPU has when it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def job_of(workload: Workload, **run: Any) -> Job:
    return Job.parse(workload.tree).replace(run=run)


def in_float64(problem: Problem) -> Problem:
    problem.model.to(dtype=torch.float64)
    return problem


def first_episodes(problem: Problem, dtype: torch.dtype = torch.float32) -> tuple[Any, np.ndarray]:
    """The episodes of step 0 where the problem is computed, and their ids."""
    ids = task_ids(problem.job.seed, "train", 0, problem.job.run.tasks_per_step)
    episodes = to_device(problem.family.draw("train", ids), problem.device)
    return tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, episodes), ids


def peer_gradient(
    name: str,
    title: str,
    workload: Workload,
    within: Callable[[Problem], AbstractContextManager[Any]] = nullcontext,
) -> System:
    """A peer's meta-gradient of the episodes of step 0, computed `within` settings of its own."""

    def made(problem: Problem, dtype: torch.dtype) -> Callable[[], Theta]:
        module = peers.peer_module(problem)
        peer = peers.PEERS[name](module, peers.inner_of(problem, workload.loss))
        episodes, _ = first_episodes(problem, dtype)

        def call() -> Theta:
            with within(problem):
                return peers.gradient_of(peer, module, episodes)

        return call

    problem = build(job_of(workload))
    call, exact = made(problem, torch.float32), None
    if problem.job.compute.precision == "float32":
        exact = made(in_float64(build(job_of(workload))), torch.float64)()
    return System(f"{title}, gradient", call, call(), exact, device=problem.device)


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

    def mode_in(precision: str) -> str:
        return resolve(build(job_of(workload).replace(compute={"precision": precision}))).execution.mode

    mode = mode_in("float32")
    plain = [Way(name, {"execution": name}) for name in ("loop", "vmap")]
    own = next(way for way in plain if way.name == mode)
    usual, others = [Way(f"{mode} compiled", {"execution": mode, "compile": True})], []
    if workload.bf16:
        in_bf16 = {
            name: Way(
                f"{name} compiled in bf16",
                {"execution": name, "compile": True, "precision": "bf16"},
                near=ROUNDED,
            )
            for name in ("loop", "vmap")
        }
        usual.append(in_bf16.pop(mode_in("bf16")))
        others += in_bf16.values()
    if mode == "vmap":
        two = {"execution": mode, "compile": True, "threads": report.cores()}
        others.append(Way(f"{mode} compiled, {report.cores()} threads", two))
    if not workload.compiled:
        usual, others = [], []
    return [*plain, *usual, *others], [own, *usual]


def distmeta_gradient(way: Way, workload: Workload) -> System:
    """`shard_gradient` of the episodes of step 0 as one shard."""

    def made(problem: Problem, dtype: torch.dtype) -> Callable[[], Theta]:
        compute = problem.job.compute
        episodes, ids = first_episodes(problem, dtype)
        theta = to_device(problem.algorithm.init(torch.Generator()), problem.device)
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
                    before=problem.scores_before(0),
                )
            return {name: total / result.tasks for name, total in result.gradient.items()}

        return call

    problem = build(job_of(workload).replace(compute=way.compute))
    compute, call, exact = problem.job.compute, made(problem, torch.float32), None
    on_gpu = problem.device.type == "cuda"
    if compute.precision == "float32" and not (on_gpu and compute.compile):
        # of a GPU: float64 needs twice the memory, kernels that its libraries may lack, and minutes of a compiler's
        with suppress(RuntimeError) if on_gpu else nullcontext():
            exact = made(in_float64(build(problem.job)), torch.float64)()
    name = f"distmeta {way.name}, gradient"
    return System(name, call, call(), exact, near=way.near, device=problem.device)


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


def distmeta_step(way: Way, workers: int, workload: Workload, stack: ExitStack, **run: Any) -> System:
    """A whole step as the driver makes it: plan, map over the pool, add by the tree, means, outer step."""
    # a fraction of a core each, so that all pools have their places at once; a worker has one thread all the same
    run |= {"workers": workers, "shards": max(workers, 1), "cpus_per_worker": 0.25}
    gradient, call = _step(job_of(workload, **run).replace(compute=way.compute), stack)
    where = "in-process" if workers == 0 else f"{workers} Ray workers"
    scored = ", scores before too" if run.get("before_every") else ""
    return System(f"distmeta {way.name}, step, {where}{scored}", call, gradient, None, near=way.near)


def in_process_step(way: Way, workload: Workload, tasks: int) -> tuple[Theta, Callable[[], None]]:
    """The meta-gradient of step 0, and what takes a step of so many tasks."""
    return _step(job_of(workload, tasks_per_step=tasks, shards=1).replace(compute=way.compute), ExitStack())


def _step(job: Job, stack: ExitStack) -> tuple[Theta, Callable[[], None]]:
    settled = resolve(build(job))
    server = ParameterServer(settled.init(), settled.job.outer)
    pool = open_pool(settled, server.layout, print)
    stack.callback(pool.close)
    first = mean_gradient(settled, pool, server, 0)
    gradient = {name: view.clone() for name, view in server.layout.views(torch.from_numpy(first)).items()}
    steps = iter(range(10**9))

    def call() -> None:
        server.step(mean_gradient(settled, pool, server, next(steps)))

    return gradient, call


def mean_gradient(problem: Problem, pool: Pool, server: ParameterServer, step: int) -> np.ndarray:
    run = problem.job.run
    assert run.shards is not None, "resolved"
    steps = problem.algorithm.inner_steps
    plan = shards_of(problem, "train", step, run.tasks_per_step, run.shards, steps)
    results = pool.map(server.vector(), plan, lambda: None)
    mean_metrics(results)
    return mean_of([decode(r.gradient) for r in results if r.gradient is not None], run.tasks_per_step)


def systems_of(workload: Workload, stack: ExitStack) -> list[System]:
    """All that are timed on a workload, made and run once."""
    from processes import as_it_comes, independent, torchopt_distributed  # whose processes import this module

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
    made.append(as_it_comes("torchopt", "TorchOpt", workload, workload.threads, stack))
    made.append(torchopt_distributed(workload, stack))
    made.append(distmeta_step(steps[0], 0, workload, stack, before_every=1))
    for way in steps:
        made += [distmeta_step(way, workers, workload, stack) for workers in (0, 2)]
        made.append(independent(way, workload, stack))
    return made
