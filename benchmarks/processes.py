"""Systems that run in two processes: distmeta twice with nothing exchanged, and TorchOpt's own distributed MAML.

A process is started once. It then takes as many steps as it is told through a pipe, and answers when they are done.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import peers
import torch
import torchopt
import torchopt.distributed as todist
from systems import NEAR, System, Way, Workload, draw_first_episodes, make_job, peer_step, prepare_step
from torch import Tensor, nn
from torch.distributed import rpc

from distmeta.protocols import Theta
from distmeta.runtime.problem import build_problem
from distmeta.seeding import task_ids

PROCESSES = 2
START_SECONDS = 300.0
"""Longest wait for a process to be ready. It may compile first."""


class RemoteSystem(System):
    """Steps that other processes take. A round ends when all of them are done."""

    def __init__(self, name: str, pipes: list[Connection], near: float):
        for pipe in pipes:
            assert pipe.poll(START_SECONDS), f"{name}: a process was not ready in time"
        gradients = [pipe.recv() for pipe in pipes]
        self._pipes = pipes
        super().__init__(name, lambda: self.seconds(1), gradients[0], None, near=near)

    def seconds(self, calls: int) -> float:
        started = time.perf_counter()
        for pipe in self._pipes:
            pipe.send(calls)
        for pipe in self._pipes:
            pipe.recv()
        return (time.perf_counter() - started) / calls


def serve(pipe: Connection, gradient: Theta, call: Callable[[], object]) -> None:
    """In a process: send the gradient, then make as many calls as told, until told 0."""
    pipe.send({name: value.detach().clone() for name, value in gradient.items()})
    while calls := pipe.recv():
        for _ in range(calls):
            call()
        pipe.send(calls)


def start_processes(
    target: Callable[..., None], arguments: list[tuple[Any, ...]], stack: ExitStack
) -> list[Connection]:
    """Start one process per row of arguments, which `target` receives after its pipe. They end with the stack."""
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes = []
    for rank, row in enumerate(arguments):
        here, there = context.Pipe()
        process = context.Process(target=target, args=(there, *row))
        with environment_variables(RANK=rank, WORLD_SIZE=len(arguments), LOCAL_RANK=rank, OMP_NUM_THREADS=1):
            process.start()
        pipes.append(here)
        processes.append(process)
    for process in processes:
        stack.callback(process.join, 30.0)
    for pipe in pipes:  # told to end before any is waited for
        stack.callback(pipe.send, 0)
    return pipes


@contextmanager
def environment_variables(**variables: object) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# --- distmeta in two processes ------------------------------------------------------------------------------------


def step_in_two_processes(way: Way, workload: Workload, stack: ExitStack) -> System:
    """distmeta's in-process step in two processes that exchange nothing, with half of the tasks each.

    It shows what two workers could do if communication were free. Its meta-gradient is another one.
    """
    tasks = workload.tree["run"]["tasks_per_step"]
    halves = [len(range(rank, tasks, PROCESSES)) for rank in range(PROCESSES)]
    pipes = start_processes(serve_half, [(way, workload, half) for half in halves], stack)
    return RemoteSystem(
        f"distmeta {way.name}, step, {PROCESSES} independent processes", pipes, near=float("inf")
    )


def serve_half(pipe: Connection, way: Way, workload: Workload, tasks: int) -> None:
    torch.set_num_threads(1)
    job = make_job(workload, tasks_per_step=tasks, shards=1).replace(compute=way.compute)
    gradient, call = prepare_step(job, ExitStack())
    serve(pipe, gradient, call)


# --- A peer in its own process ------------------------------------------------------------------------------------


def peer_step_in_own_process(
    name: str, title: str, workload: Workload, threads: int, stack: ExitStack
) -> System:
    """A peer's step in its own process, with torch's usual handling of freed memory."""
    pipes = start_processes(serve_peer, [(name, title, workload, threads)], stack)
    suffix = "" if threads == 1 else f", {threads} threads"
    return RemoteSystem(f"{title}, step{suffix}, own process", pipes, near=NEAR)


def serve_peer(pipe: Connection, name: str, title: str, workload: Workload, threads: int) -> None:
    torch.set_num_threads(threads)
    system = peer_step(name, title, workload, threads)
    serve(pipe, system.gradient, system.call)


# --- TorchOpt distributed -----------------------------------------------------------------------------------------


def torchopt_distributed(workload: Workload, stack: ExitStack) -> System:
    """TorchOpt's MAML over RPC.

    Rank 0 draws the tasks, both ranks adapt to half of them, the gradient returns through torch's distributed autograd,
    and rank 0 takes the outer step.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with environment_variables(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo", TP_SOCKET_IFNAME="lo"
    ):
        pipes = start_processes(serve_rank, [(workload,)] * PROCESSES, stack)
    return RemoteSystem(f"TorchOpt distributed, step, {PROCESSES} RPC workers", pipes[:1], near=NEAR)


class _Rank(NamedTuple):
    module: nn.Module
    inner: peers.Inner


RANK: list[_Rank] = []
"""In a process of `torchopt_distributed`: its model and inner loop."""


class Weights:
    """The meta-parameters as one object. TorchOpt would split a plain list of tensors into batches."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors


@todist.parallelize(partitioner=todist.batch_partitioner, reducer=todist.sum_reducer)
def sum_losses(weights: Weights, x_s: Tensor, y_s: Tensor, x_q: Tensor, y_q: Tensor) -> Tensor:
    """On each rank: return the sum of its tasks' query losses after adaptation, differentiable in the weights."""
    module, inner = RANK[0]
    for name, value in weights.tensors.items():
        owner, _, leaf = name.rpartition(".")
        # TorchOpt 0.7.3 needs non-leaf tensors as parameters, which register_parameter refuses; MetaSGD does the same
        module.get_submodule(owner)._parameters[leaf] = value  # type: ignore[assignment]
    optimizer = torchopt.MetaSGD(module, lr=inner.lr)
    initial = torchopt.extract_state_dict(module, by="reference", detach_buffers=True)
    initial_optimizer = torchopt.extract_state_dict(optimizer, by="reference")
    total = torch.zeros(())
    for task_x_s, task_y_s, task_x_q, task_y_q in zip(x_s, y_s, x_q, y_q, strict=True):
        for _ in range(inner.steps):
            optimizer.step(inner.loss(module(task_x_s), task_y_s))
        total = total + inner.loss(module(task_x_q), task_y_q)
        torchopt.recover_state_dict(module, initial)
        torchopt.recover_state_dict(optimizer, initial_optimizer)
    return total


def serve_rank(pipe: Connection, workload: Workload) -> None:
    torch.set_num_threads(1)
    rank = todist.get_rank()
    problem = build_problem(make_job(workload))
    RANK.append(_Rank(peers.peer_module(problem), peers.inner_loop(problem, workload.loss)))
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=todist.get_world_size())
    if rank > 0:
        pipe.recv()
        rpc.shutdown()
        return
    module = peers.peer_module(problem)  # the one that is trained
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    steps = iter(range(10**9))

    def accumulate(episodes: Any) -> None:
        weights = Weights({name: value.view_as(value) for name, value in module.named_parameters()})
        with todist.autograd.context() as context:
            data = [*episodes.support, *episodes.query]
            total: Any = sum_losses(weights, *data)
            todist.autograd.backward(context, total / len(episodes.query.y))

    def step() -> None:
        ids = task_ids(problem.job.seed, "train", next(steps), problem.job.run.tasks_per_step)
        optimizer.zero_grad()
        accumulate(problem.family.draw("train", ids))
        optimizer.step()

    accumulate(draw_first_episodes(problem)[0])
    gradient = {peers.PREFIX + name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    serve(pipe, gradient, step)
    rpc.shutdown()
