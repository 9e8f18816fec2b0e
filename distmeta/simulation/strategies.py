"""One function per strategy. Each simulates some steps of a job and records when they end.

Symbols of the formulas: B = 4 · parameters bytes; W workers, one per node; K shards; n tasks; c = compute(n/K);
S servers; H steps between averages; b the link's rate, l the latency; put, receive, reply, add, call, step and outer as
in `costs`. The formulas hold without stragglers, and tests compare with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import simpy

from distmeta.compute.vectors import choose_edges
from distmeta.simulation.hardware import Events, Node, SimulatedCluster, ThetaCopies


def simulate_driver(cluster: SimulatedCluster, steps: int, lose_worker: bool = False) -> Events:
    """Theta is put once and goes to each working node once. Every shard's sum returns; the driver adds and steps.

    W = 1:  step + put + B/b + l + receive + K·(call + l + c + reply + B/b + l) + (K−1)·add + outer
    W = K and a link so slow that nothing else counts:  W·B/b out of the driver's card, then W·B/b into it

    A worker takes the next shard when the driver has its last.

    Args:
        lose_worker: lose a worker in the first step; see `take_shards`.
    """
    machine = cluster.machine
    job = cluster.job
    copies = ThetaCopies(cluster, [cluster.driver])
    shards = simpy.Store(cluster.env)

    def return_gradient(worker: int) -> Events:
        yield from cluster.send_gradient(worker, cluster.driver, job.bytes)
        yield from cluster.driver.processor.use(machine.call_driver / 2)

    start_shard_takers(cluster, shards, copies, return_gradient, lose_worker)
    for step in range(steps):
        yield from cluster.driver.processor.use(machine.step + machine.put(job.bytes))
        yield offer_shards(cluster, shards, step)
        adding = (cluster.size.shards - 1) * machine.add(job.bytes) + job.outer
        yield from cluster.driver.processor.use(adding)
        cluster.step_ends.append(cluster.env.now)


def simulate_sharded(cluster: SimulatedCluster, steps: int, lose_worker: bool = False) -> Events:
    """Each server owns a slice of B/S bytes. The driver sends integers and names objects.

    Workers fetch S slices and leave every shard's gradient in their node's store, cut into S pieces. As an answer
    arrives, the driver calls each server to fetch its piece; the worker does not wait for that. After the last answer
    the servers are called twice: to add and compute the norm, then to step. With l = 0 and unlimited b, W = 1:

        step + 2·receive + K·(call + c + reply(B) + S·message_driver) + message + message_driver
        + 2·(S·message_driver + message) + (K−1)·add(B/S) + outer/S + put(B/S)
    """
    machine = cluster.machine
    job = cluster.job
    count = len(choose_edges(job.parameters, cluster.settings.servers)) - 1
    cluster.servers = [cluster.add_node() for _ in range(count)]
    size = job.bytes / count
    copies = ThetaCopies(cluster, cluster.servers)
    shards = simpy.Store(cluster.env)
    pieces: list[simpy.Event] = []

    def return_gradient(worker: int) -> Events:
        yield from cluster.store_gradient(job.bytes)
        yield cluster.env.timeout(cluster.latency)
        yield from cluster.driver.processor.use(machine.call_driver / 2 + count * machine.message_driver)
        pieces.extend(cluster.env.process(fetch_piece(worker, server)) for server in cluster.servers)

    def fetch_piece(worker: int, server: Node) -> Events:
        yield cluster.env.timeout(machine.message + cluster.latency)
        yield from cluster.send(cluster.worker_node(worker), server, size)
        yield from cluster.serve(server, machine.message_driver)

    def call_server(server: Node, seconds: float) -> Events:
        yield cluster.env.timeout(machine.message + 2 * cluster.latency)
        yield from cluster.serve(server, seconds)

    start_shard_takers(cluster, shards, copies, return_gradient, lose_worker)
    for step in range(steps):
        yield from cluster.driver.processor.use(machine.step)
        yield offer_shards(cluster, shards, step)
        yield cluster.env.all_of(pieces)
        pieces.clear()
        adding = (cluster.size.shards - 1) * machine.add(size)
        stepping = job.outer / count + machine.put(size)
        for seconds in (adding, stepping):
            yield from cluster.driver.processor.use(count * machine.message_driver)
            yield cluster.start_all([call_server(server, seconds) for server in cluster.servers])
        cluster.step_ends.append(cluster.env.now)


def simulate_all_reduce(cluster: SimulatedCluster, steps: int, lose_worker: bool = False) -> Events:
    """Shards are dealt out, each worker adds its own, a ring sums over the workers, each takes the same outer step.

    The maximum over workers of (k·c + (k−1)·add), with k = ⌈K/W⌉ or ⌊K/W⌋ shards, + ring(B) + outer.
    Workers without a shard join the ring.
    """
    for _ in range(steps):
        workers = range(cluster.active_workers)
        yield cluster.start_all([compute_dealt_shards(cluster, worker) for worker in workers])
        yield from cluster.sum_over_ring(cluster.job.bytes)
        yield cluster.env.timeout(cluster.job.outer)
        cluster.step_ends.append(cluster.env.now)


def simulate_async(cluster: SimulatedCluster, steps: int, lose_worker: bool = False) -> Events:
    """No worker waits for another: it fetches the newest theta, computes a shard, sends it, and repeats.

    The driver adds what arrives and takes an outer step after every K gradients. A gradient that was computed on a
    theta more than `max_staleness` steps old is dropped, and its tasks do not count. So at most K·(max_staleness + 1)
    workers are used. W = 1: as `driver`, but theta is fetched as often as it changes, before every K-th shard.
    """
    machine = cluster.machine
    job = cluster.job
    size = cluster.size
    copies = ThetaCopies(cluster, [cluster.driver])
    finished = cluster.env.event()
    version = 0
    fresh = 0  # gradients since the last outer step

    def run_worker(worker: int) -> Events:
        nonlocal version, fresh
        while not finished.triggered:
            yield from cluster.driver.processor.use(machine.call_driver / 2)
            yield from cluster.call_worker()
            computed_on = version
            yield from copies.fetch(worker, computed_on)
            yield from cluster.compute(size.tasks_per_shard)
            yield from cluster.send_gradient(worker, cluster.driver, job.bytes)
            yield from cluster.driver.processor.use(machine.call_driver / 2 + machine.add(job.bytes))
            if version - computed_on > cluster.settings.max_staleness:
                cluster.tasks_dropped += size.tasks_per_shard
                continue
            fresh += 1
            if fresh == size.shards:
                fresh = 0
                yield from cluster.driver.processor.use(job.outer + machine.put(job.bytes) + machine.step)
                version += 1
                cluster.step_ends.append(cluster.env.now)
                if version == steps:
                    finished.succeed()

    most = size.shards * (cluster.settings.max_staleness + 1)
    cluster.active_workers = min(cluster.settings.workers, most)
    for worker in range(cluster.active_workers):
        cluster.env.process(run_worker(worker))
    yield finished


def simulate_local(cluster: SimulatedCluster, steps: int, lose_worker: bool = False) -> Events:
    """Each worker takes H outer steps on its own shards. Then the driver averages the deltas and sends theta back.

    W = 1, and a step is an H-th part of:
        step + put + call + l + B/b + l + receive + H·(K·c + (K−1)·add + outer) + reply + B/b + l + outer
    More workers share the shards, ⌈K/W⌉ or ⌊K/W⌋ each, and wait for each other at the driver's card.
    """
    machine = cluster.machine
    job = cluster.job
    local_steps = cluster.settings.local_steps
    copies = ThetaCopies(cluster, [cluster.driver])

    def run_local_steps(worker: int, version: int) -> Events:
        yield from cluster.driver.processor.use(machine.call_driver / 2)
        yield from cluster.call_worker()
        yield from copies.fetch(worker, version)
        for _ in range(local_steps):
            yield from compute_dealt_shards(cluster, worker)
            yield cluster.env.timeout(job.outer)
        yield from cluster.send_gradient(worker, cluster.driver, job.bytes)
        yield from cluster.driver.processor.use(machine.call_driver / 2)

    for version in range(math.ceil(steps / local_steps)):
        started = cluster.env.now
        workers = range(cluster.active_workers)
        yield from cluster.driver.processor.use(machine.step + machine.put(job.bytes))
        yield cluster.start_all([run_local_steps(worker, version) for worker in workers])
        averaging = (cluster.active_workers - 1) * machine.add(job.bytes) + job.outer
        yield from cluster.driver.processor.use(averaging)
        seconds_per_step = (cluster.env.now - started) / local_steps
        cluster.step_ends += [started + seconds_per_step * (k + 1) for k in range(local_steps)]


SIMULATIONS: dict[str, Callable[..., Events]] = {
    "driver": simulate_driver,
    "sharded": simulate_sharded,
    "all-reduce": simulate_all_reduce,
    "async": simulate_async,
    "local": simulate_local,
}
"""By `strategy.type`."""


@dataclass
class OfferedShards:
    """The shards of one step that wait for whoever is free."""

    step: int
    unfinished: int
    finished: simpy.Event
    """Happens when the driver has all answers."""

    def finish_one(self) -> None:
        self.unfinished -= 1
        if not self.unfinished:
            self.finished.succeed()


def offer_shards(cluster: SimulatedCluster, shards: simpy.Store, step: int) -> simpy.Event:
    """Offer a step's shards. The event happens when the driver has all answers."""
    offered = OfferedShards(step, cluster.size.shards, cluster.env.event())
    for _ in range(cluster.size.shards):
        shards.put(offered)
    return offered.finished


def start_shard_takers(
    cluster: SimulatedCluster,
    shards: simpy.Store,
    copies: ThetaCopies,
    return_gradient: Callable[[int], Events],
    lose_worker: bool,
) -> None:
    for worker in range(cluster.active_workers):
        dies = lose_worker and worker == 0
        cluster.env.process(take_shards(cluster, worker, shards, copies, return_gradient, dies))


def take_shards(
    cluster: SimulatedCluster,
    worker: int,
    shards: simpy.Store,
    copies: ThetaCopies,
    return_gradient: Callable[[int], Events],
    dies: bool,
) -> Events:
    """Act as a worker of `driver` or `sharded`: take a shard, fetch theta once per step, compute, answer.

    Args:
        dies: the worker is lost half way through its first shard. The shard goes to whoever is free, and the worker
            returns, without theta, after `machine.start` seconds.
    """
    tasks = cluster.size.tasks_per_shard
    while True:
        offered = yield shards.get()
        yield from cluster.driver.processor.use(cluster.machine.call_driver / 2)
        yield from cluster.call_worker()
        yield from copies.fetch(worker, offered.step)
        if dies:
            dies = False
            copies.forget(worker)
            yield cluster.env.timeout(cluster.job.compute_seconds(tasks) / 2)
            yield shards.put(offered)
            yield cluster.env.timeout(cluster.machine.start)
            continue
        yield from cluster.compute(tasks)
        yield from return_gradient(worker)
        offered.finish_one()


def compute_dealt_shards(cluster: SimulatedCluster, worker: int) -> Events:
    """Compute a worker's own shards of a step one after the other, and their sum."""
    own = cluster.size.count_shards(worker, cluster.settings.workers)
    for _ in range(own):
        yield from cluster.compute(cluster.size.tasks_per_shard)
    yield cluster.env.timeout(max(own - 1, 0) * cluster.machine.add(cluster.job.bytes))
