"""Systems of two processes: distmeta twice with nothing between them, and TorchOpt's own distributed MAML.

A process is made once, does as many steps as it is told through a pipe, and says when it is done.
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
from systems import NEAR, System, Way, Workload, first_episodes, in_process_step, job_of, peer_step
from torch import Tensor, nn
from torch.distributed import rpc

from distmeta.protocols import Episode, Theta
from distmeta.runtime.problem import build
from distmeta.seeding import task_ids

PROCESSES = 2
START_SECONDS = 300.0
"""Longest wait for a process to be ready: it may compile."""


class Outside(System):
    """Steps that other processes take: a round ends when all of them are done."""

    def __init__(self, name: str, pipes: list[Connection], near: float):
        for pipe in pipes:
            assert pipe.poll(START_SECONDS), f"{name}: a process was not ready in time"
        self._pipes, gradients = pipes, [pipe.recv() for pipe in pipes]
        super().__init__(name, lambda: self.seconds(1), gradients[0], None, near=near)

    def seconds(self, calls: int) -> float:
        started = time.perf_counter()
        for pipe in self._pipes:
            pipe.send(calls)
        for pipe in self._pipes:
            pipe.recv()
        return (time.perf_counter() - started) / calls


def serve(pipe: Connection, gradient: Theta, call: Callable[[], object]) -> None:
    """In a process: gives the gradient, then does as many calls as it is told; 0 ends it."""
    pipe.send({name: value.detach().clone() for name, value in gradient.items()})
    while calls := pipe.recv():
        for _ in range(calls):
            call()
        pipe.send(calls)


def started(
    target: Callable[..., None], arguments: list[tuple[Any, ...]], stack: ExitStack
) -> list[Connection]:
    """Processes, one for each row of arguments after the pipe; they end with the stack."""
    context, pipes, processes = multiprocessing.get_context("spawn"), [], []
    for rank, row in enumerate(arguments):
        here, there = context.Pipe()
        process = context.Process(target=target, args=(there, *row))
        with environment(RANK=rank, WORLD_SIZE=len(arguments), LOCAL_RANK=rank, OMP_NUM_THREADS=1):
            process.start()
        pipes.append(here)
        processes.append(process)
    for process in processes:
        stack.callback(process.join, 30.0)
    for pipe in pipes:  # before any is waited for
        stack.callback(pipe.send, 0)
    return pipes


@contextmanager
def environment(**variables: object) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def independent(way: Way, workload: Workload, stack: ExitStack) -> System:
    """distmeta's in-process step in two processes that share nothing, each with half of the tasks: what two workers
    would do if nothing had to travel."""
    tasks = workload.tree["run"]["tasks_per_step"]
    halves = [len(range(rank, tasks, PROCESSES)) for rank in range(PROCESSES)]
    pipes = started(alone, [(way, workload, half) for half in halves], stack)
    return Outside(f"distmeta {way.name}, step, {PROCESSES} independent processes", pipes, near=float("inf"))


def alone(pipe: Connection, way: Way, workload: Workload, tasks: int) -> None:
    torch.set_num_threads(1)
    gradient, call = in_process_step(way, workload, tasks)
    serve(pipe, gradient, call)


def as_it_comes(name: str, title: str, workload: Workload, threads: int, stack: ExitStack) -> System:
    """A peer's step in a process of its own, with the system's memory as it comes."""
    pipes = started(peer_alone, [(name, title, workload, threads)], stack)
    suffix = "" if threads == 1 else f", {threads} threads"
    return Outside(f"{title}, step{suffix}, own process", pipes, near=NEAR)


def peer_alone(pipe: Connection, name: str, title: str, workload: Workload, threads: int) -> None:
    torch.set_num_threads(threads)
    system = peer_step(name, title, workload, threads)
    serve(pipe, system.gradient, system.call)


def torchopt_distributed(workload: Workload, stack: ExitStack) -> System:
    """TorchOpt's MAML over RPC: rank 0 draws the tasks, both ranks adapt to half of them, the gradient comes back
    through torch's distributed autograd, rank 0 steps."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with environment(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo", TP_SOCKET_IFNAME="lo"
    ):
        pipes = started(rank_of, [(workload,)] * PROCESSES, stack)
    return Outside(f"TorchOpt distributed, step, {PROCESSES} RPC workers", pipes[:1], near=NEAR)


class _Rank(NamedTuple):
    module: nn.Module
    inner: peers.Inner


RANK: list[_Rank] = []
"""In a process of `torchopt_distributed`: its model and inner loop."""


class Weights:
    """The meta-parameters on their way: opaque to TorchOpt, which would cut a plain list of tensors into batches."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors


@todist.parallelize(partitioner=todist.batch_partitioner, reducer=todist.sum_reducer)
def sum_of_losses(weights: Weights, x_s: Tensor, y_s: Tensor, x_q: Tensor, y_q: Tensor) -> Tensor:
    """On each rank: the sum of its tasks' query losses after adaptation, differentiable in the weights."""
    module, inner = RANK[0]
    for name, value in weights.tensors.items():
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = value  # type: ignore[assignment] - as MetaSGD itself does
    optimizer = torchopt.MetaSGD(module, lr=inner.lr)
    initial = torchopt.extract_state_dict(module, by="reference", detach_buffers=True)
    first = torchopt.extract_state_dict(optimizer, by="reference")
    total = torch.zeros(())
    for one in zip(x_s, y_s, x_q, y_q, strict=True):
        for _ in range(inner.steps):
            optimizer.step(inner.loss(module(one[0]), one[1]))
        total = total + inner.loss(module(one[2]), one[3])
        torchopt.recover_state_dict(module, initial)
        torchopt.recover_state_dict(optimizer, first)
    return total


def rank_of(pipe: Connection, workload: Workload) -> None:
    torch.set_num_threads(1)
    rank = todist.get_rank()
    problem = build(job_of(workload))
    RANK.append(_Rank(peers.peer_module(problem), peers.inner_of(problem, workload.loss)))
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=todist.get_world_size())
    if rank == 0:
        module = peers.peer_module(problem)  # the one that is trained
        optimizer, steps = torch.optim.Adam(module.parameters(), lr=1e-3), iter(range(10**9))

        def accumulate(episodes: Episode) -> None:
            weights = Weights({name: value.view_as(value) for name, value in module.named_parameters()})
            with todist.autograd.context() as context:
                data = [leaf for batch in episodes for leaf in batch]
                loss = sum_of_losses(weights, *data) / len(episodes.query.y)
                todist.autograd.backward(context, loss)

        def call() -> None:
            ids = task_ids(problem.job.seed, "train", next(steps), problem.job.run.tasks_per_step)
            optimizer.zero_grad()
            accumulate(problem.family.draw("train", ids))
            optimizer.step()

        accumulate(first_episodes(problem)[0])
        found = {peers.PREFIX + name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        serve(pipe, found, call)
    else:
        pipe.recv()
    rpc.shutdown()
