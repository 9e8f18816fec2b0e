"""What `throughput.py` times: peers and ways of distmeta, each as a function that does one step's work."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import peers
import torch
from raw_results import count_cores

from distmeta.compute.compiler import Compiler
from distmeta.compute.compression import decode
from distmeta.compute.episodes import to_device
from distmeta.compute.execution import shard_gradient
from distmeta.config.job import Job
from distmeta.protocols import Theta
from distmeta.runtime.parameter_server import ParameterServer, mean_metrics, mean_vector
from distmeta.runtime.pool import Pool, open_pool
from distmeta.runtime.problem import Problem, apply_job_numerics, build_problem
from distmeta.runtime.resolve import resolve
from distmeta.runtime.worker import plan_shards
from distmeta.seeding import task_ids, torch_generator
from distmeta.trees import tree_map

NEAR = 5e-3
"""Relative distance below which two float32 meta-gradients are the same. A ReLU may be on the other side of zero:
moving theta by 1e-6 of itself moves the meta-gradient of one task of conv4-64 by 2e-3 of its norm."""
NEAR_IN_BF16 = 0.5
"""The same in bfloat16. Its rounding moves the meta-gradient of conv4-64 by a third at the initialisation."""


@dataclass(frozen=True)
class Workload:
    title: str
    tree: dict[str, Any]
    """The job."""
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    threads: int = 1
    """If above 1, TorchOpt is timed with so many threads, too."""
    bf16: bool = False
    """Whether to time bfloat16. Without instructions for it, it is slower than float32."""
    compiled: bool = True
    """Whether to time compiled systems."""


class System:
    """Something that is timed. `call` does the work of one step once."""

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
        self.name = name
        self.call = call
        self.gradient = gradient
        """Mean meta-gradient of the tasks of step 0."""
        self.exact = exact
        """The same computed in float64; None if the system cannot."""
        self.threads = threads
        self.near = near
        self.device = device or torch.device("cpu")

    def seconds(self, calls: int) -> float:
        """Return the time of one call, over several in a row."""
        torch.set_num_threads(self.threads)
        synchronise(self.device)
        started = time.perf_counter()
        for _ in range(calls):
            self.call()
        synchronise(self.device)
        return (time.perf_counter() - started) / calls


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_job(workload: Workload, **run: Any) -> Job:
    return Job.parse(workload.tree).replace(run=run)


def convert_to_float64(problem: Problem) -> Problem:
    problem.model.to(dtype=torch.float64)
    return problem


def draw_first_episodes(problem: Problem, dtype: torch.dtype = torch.float32) -> tuple[Any, np.ndarray]:
    """Return the episodes of step 0 on the problem's device, and their ids."""
    ids = task_ids(problem.job.seed, "train", 0, problem.job.run.tasks_per_step)
    episodes = to_device(problem.family.draw("train", ids), problem.device)
    return tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, episodes), ids


# --- Peers --------------------------------------------------------------------------------------------------------


def peer_gradient(
    name: str,
    title: str,
    workload: Workload,
    within: Callable[[Problem], AbstractContextManager[Any]] = nullcontext,
) -> System:
    """A peer's meta-gradient of the episodes of step 0.

    Args:
        within: returns a context with numerical settings, in which the peer computes.
    """

    def prepare(problem: Problem, dtype: torch.dtype) -> Callable[[], Theta]:
        module = peers.peer_module(problem)
        peer = peers.PEERS[name](module, peers.inner_loop(problem, workload.loss))
        episodes, _ = draw_first_episodes(problem, dtype)

        def call() -> Theta:
            with within(problem):
                return peers.compute_gradient(peer, module, episodes)

        return call

    problem = build_problem(make_job(workload))
    call = prepare(problem, torch.float32)
    exact = None
    if problem.job.compute.precision == "float32":
        exact = prepare(convert_to_float64(build_problem(make_job(workload))), torch.float64)()
    return System(f"{title}, gradient", call, call(), exact, device=problem.device)


def jax_gradient(workload: Workload) -> list[System]:
    """JAX's meta-gradient of the episodes of step 0; empty if JAX is not installed or the model is no MLP."""
    if find_spec("jax") is None or workload.tree["model"]["type"] != "mlp":
        return []
    from peers_jax import meta_gradient

    problem = build_problem(make_job(workload))
    theta = problem.algorithm.init(torch_generator(problem.job.seed, "init"))
    episodes, _ = draw_first_episodes(problem)
    call, gradient = meta_gradient(theta, episodes, peers.inner_loop(problem, workload.loss))
    return [System(f"JAX jit+vmap, gradient, {count_cores()} cores", call, gradient, None)]


def peer_step(name: str, title: str, workload: Workload, threads: int = 1) -> System:
    """A peer's whole step. It draws its tasks with the job's task family."""
    problem = build_problem(make_job(workload))
    module = peers.peer_module(problem)
    peer = peers.PEERS[name](module, peers.inner_loop(problem, workload.loss))
    gradient = peers.compute_gradient(peer, module, draw_first_episodes(problem)[0])
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    steps = iter(range(10**9))

    def call() -> None:
        ids = task_ids(problem.job.seed, "train", next(steps), problem.job.run.tasks_per_step)
        peers.train_step(peer, optimizer, problem.family.draw("train", ids))

    suffix = "" if threads == 1 else f", {threads} threads"
    return System(f"{title}, step{suffix}", call, gradient, None, threads)


# --- distmeta -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way in which distmeta can compute."""

    name: str
    compute: dict[str, Any]
    """The job's `compute` section."""
    near: float = NEAR
    """How far its meta-gradient may be from float64's."""


def list_ways(workload: Workload) -> tuple[list[Way], list[Way]]:
    """Return the ways whose gradient is timed, and those whose whole step is timed, too."""

    def resolve_mode(precision: str) -> str:
        return resolve(
            build_problem(make_job(workload).replace(compute={"precision": precision}))
        ).execution.mode

    mode = resolve_mode("float32")
    eager = {name: Way(name, {"execution": name}) for name in ("loop", "vmap")}
    for_steps = [eager[mode]]
    for_gradients: list[Way] = []
    if workload.compiled:
        for_steps.append(Way(f"{mode} compiled", {"execution": mode, "compile": True}))
        if workload.bf16:
            in_bf16 = {name: compiled_in_bf16(name) for name in ("loop", "vmap")}
            for_steps.append(in_bf16.pop(resolve_mode("bf16")))
            for_gradients += in_bf16.values()
        if mode == "vmap":
            threads = count_cores()
            compute = {"execution": mode, "compile": True, "threads": threads}
            for_gradients.append(Way(f"{mode} compiled, {threads} threads", compute))
    return [*eager.values(), *for_steps[1:], *for_gradients], for_steps


def compiled_in_bf16(mode: str) -> Way:
    compute = {"execution": mode, "compile": True, "precision": "bf16"}
    return Way(f"{mode} compiled in bf16", compute, near=NEAR_IN_BF16)


def distmeta_gradient(way: Way, workload: Workload) -> System:
    """`shard_gradient` of the episodes of step 0 as one shard."""

    def prepare(problem: Problem, dtype: torch.dtype) -> Callable[[], Theta]:
        compute = problem.job.compute
        episodes, ids = draw_first_episodes(problem, dtype)
        theta = to_device(problem.algorithm.init(torch.Generator()), problem.device)
        compiler = Compiler(compute.precision) if compute.compile else None
        score = problem.score("train")

        def call() -> Theta:
            with apply_job_numerics(problem.job, problem.device):
                result = shard_gradient(
                    problem.algorithm, score, theta, episodes, ids, problem.execution, compiler, before=False
                )
            return {name: total / result.tasks for name, total in result.gradient.items()}

        return call

    problem = build_problem(make_job(workload).replace(compute=way.compute))
    compute = problem.job.compute
    call = prepare(problem, torch.float32)
    on_gpu = problem.device.type == "cuda"
    exact = None
    if compute.precision == "float32" and not (on_gpu and compute.compile):
        # a GPU may lack the memory or a kernel for float64, and compiling for it takes minutes
        with suppress(RuntimeError) if on_gpu else nullcontext():
            exact = prepare(convert_to_float64(build_problem(problem.job)), torch.float64)()
    name = f"distmeta {way.name}, gradient"
    return System(name, call, call(), exact, near=way.near, device=problem.device)


def distmeta_step(way: Way, workers: int, workload: Workload, stack: ExitStack, **run: Any) -> System:
    """A whole step as the driver takes it. The pool is closed with the stack."""
    # a fraction of a core per worker, so that several pools fit on the machine; a worker has one thread anyway
    run |= {"workers": workers, "shards": max(workers, 1), "cpus_per_worker": 0.25}
    gradient, call = prepare_step(make_job(workload, **run).replace(compute=way.compute), stack)
    where = "in-process" if workers == 0 else f"{workers} Ray workers"
    scored = ", scores before too" if run.get("before_every") else ""
    return System(f"distmeta {way.name}, step, {where}{scored}", call, gradient, None, near=way.near)


def prepare_step(job: Job, stack: ExitStack) -> tuple[Theta, Callable[[], None]]:
    """Return the meta-gradient of step 0, and a function that takes one step per call."""
    problem = resolve(build_problem(job))
    server = ParameterServer(problem.init(), problem.job.outer)
    pool = open_pool(problem, server.layout, print)
    stack.callback(pool.close)
    first = compute_mean_gradient(problem, pool, server, 0)
    gradient = {name: view.clone() for name, view in server.layout.views(torch.from_numpy(first)).items()}
    steps = iter(range(10**9))

    def call() -> None:
        server.step(compute_mean_gradient(problem, pool, server, next(steps)))

    return gradient, call


def compute_mean_gradient(problem: Problem, pool: Pool, server: ParameterServer, step: int) -> np.ndarray:
    run = problem.job.run
    assert run.shards is not None, "resolved"
    plan = plan_shards(problem, "train", step, run.tasks_per_step, run.shards, problem.algorithm.inner_steps)
    results = pool.map(server.vector(), plan, lambda: None)
    mean_metrics(results)
    gradients = [decode(result.gradient) for result in results if result.gradient is not None]
    return mean_vector(gradients, run.tasks_per_step)
