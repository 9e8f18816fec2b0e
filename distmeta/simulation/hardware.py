"""The hardware that strategies are simulated on: network cards, processors, nodes. Each is a SimPy resource."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from random import Random
from typing import Any

import simpy

from distmeta.simulation.costs import JobCosts, MachineCosts
from distmeta.simulation.settings import ClusterSettings

Events = Generator[simpy.Event, Any, None]


class Processor:
    """Serves one request at a time, first come first served."""

    def __init__(self, env: simpy.Environment):
        self._env = env
        self._resource = simpy.Resource(env, capacity=1)
        self.busy = 0.0
        """Seconds during which it served."""

    def use(self, seconds: float) -> Events:
        with self._resource.request() as request:
            yield request
            yield self._env.timeout(seconds)
        self.busy += seconds


class CardDirection:
    """One direction of a network card. The messages on it share its rate evenly, as connections do.

    With n messages each has rate / n. `_sent_each` counts the bytes of an endless message that began at time 0. A
    message of `size` bytes that begins now ends when `_sent_each` has grown by `size`.
    """

    def __init__(self, env: simpy.Environment, rate: float):
        self._env = env
        self._rate = rate  # bytes per second
        self._ends: list[tuple[float, int, simpy.Event]] = []
        """A heap: where the message ends in bytes of `_sent_each`, order, event."""
        self._sent_each = 0.0
        self._updated_at = 0.0
        self._changes = 0

    def send(self, size: float) -> simpy.Event:
        """Start a message. The event happens when its last byte is through."""
        self._update()
        through = self._env.event()
        heappush(self._ends, (self._sent_each + size, self._changes, through))
        self._schedule_next_end()
        return through

    def _update(self) -> None:
        if self._ends:
            self._sent_each += (self._env.now - self._updated_at) * self._rate / len(self._ends)
        self._updated_at = self._env.now

    def _schedule_next_end(self) -> None:
        """Schedule the next end. It does not count if another message begins before it."""
        self._changes += 1
        if self._ends:
            left = max(self._ends[0][0] - self._sent_each, 0.0) * len(self._ends) / self._rate
            timeout = simpy.Timeout(self._env, left, self._changes)
            timeout.callbacks.append(self._end_message)

    def _end_message(self, event: simpy.Event) -> None:
        if event.value != self._changes:
            return
        self._updated_at = self._env.now
        self._sent_each = self._ends[0][0]
        while self._ends and self._ends[0][0] <= self._sent_each * (1 + 1e-12):
            heappop(self._ends)[2].succeed()
        self._schedule_next_end()


class Node:
    """A machine of the cluster: both directions of its network card, and the processor that serves others."""

    def __init__(self, env: simpy.Environment, rate: float):
        self.outgoing = CardDirection(env, rate)
        self.incoming = CardDirection(env, rate)
        self.processor = Processor(env)
        self.bytes = 0.0
        """Through its card, both directions together."""
        self._env = env
        self._messages = 0  # on the card now
        self._busy_since = 0.0
        self._busy = 0.0

    @property
    def card_busy(self) -> float:
        """Seconds during which its card was busy, in either direction."""
        return self._busy + (self._env.now - self._busy_since if self._messages else 0.0)

    def count_message(self, change: int) -> None:
        """Note that a message begins (1) or ends (−1) on the card."""
        if not self._messages:
            self._busy_since = self._env.now
        self._messages += change
        if not self._messages:
            self._busy += self._env.now - self._busy_since


@dataclass(frozen=True)
class StepSize:
    """The tasks of a step, cut into shards."""

    tasks: int
    shards: int

    @property
    def tasks_per_shard(self) -> float:
        return self.tasks / self.shards

    def count_shards(self, worker: int, workers: int) -> int:
        """Return the shards of one worker if they are dealt out before the step."""
        return self.shards // workers + (worker < self.shards % workers)


class SimulatedCluster:
    """The nodes of the driver, the workers and the servers, the actions that take time on them, and what they did."""

    def __init__(self, settings: ClusterSettings, machine: MachineCosts, job: JobCosts, size: StepSize):
        self.settings = settings
        self.machine = machine
        self.job = job
        self.size = size
        self.env = simpy.Environment()
        self.driver = self.add_node()
        self.nodes = [self.add_node() for _ in range(settings.nodes)]
        self.servers: list[Node] = []
        self.spent: defaultdict[str, float] = defaultdict(float)
        """Seconds of all workers together: compute, calls, object store, ring."""
        self.bytes = 0.0
        """Sent between processes."""
        self.step_ends: list[float] = []
        """When each step ended, in seconds."""
        self.tasks_dropped = 0.0
        """Tasks whose gradient arrived too late to be used."""
        self.active_workers = min(settings.workers, size.shards)
        """Workers that have something to do."""
        self._random = Random(f"{settings.seed}/{settings.workers}")
        self._one_machine = settings.link.bytes_per_second is None
        self._store = Processor(self.env)  # the object store of the one machine
        self._cores = simpy.Resource(self.env, machine.cores)  # of the one machine

    def add_node(self) -> Node:
        return Node(self.env, self.settings.link.bytes_per_second or math.inf)

    def worker_node(self, worker: int) -> Node:
        return self.nodes[worker // self.settings.workers_per_node]

    def start_all(self, processes: Sequence[Events]) -> simpy.Event:
        """Start processes. The event happens when the last is done."""
        return self.env.all_of([self.env.process(process) for process in processes])

    def spend(self, what: str, seconds: float) -> simpy.Event:
        self.spent[what] += seconds
        return self.env.timeout(seconds)

    def send(self, source: Node, target: Node, size: float) -> Events:
        """Send a message: its bytes pass both cards at the same time, then comes the latency.

        If nobody else uses the two cards: seconds = size / link + latency. On one machine it takes no time.
        """
        self.bytes += size
        source.bytes += size
        target.bytes += size
        if self._one_machine:
            return
        source.count_message(1)
        target.count_message(1)
        yield source.outgoing.send(size) & target.incoming.send(size)
        source.count_message(-1)
        target.count_message(-1)
        yield self.env.timeout(self.settings.latency)

    def serve(self, server: Node, seconds: float) -> Events:
        """Use a server's processor; on one machine also one of its cores."""
        if not self._one_machine:
            yield from server.processor.use(seconds)
            return
        with self._cores.request() as core:
            yield core
            yield from server.processor.use(seconds)

    @property
    def slowdown(self) -> float:
        """By how much the computations of other workers on the same machine slow one down."""
        measured = self.machine.slowdown
        together = self.settings.workers_per_node
        if self._one_machine:
            together = min(self.active_workers, self.machine.cores)
        return measured[min(together, len(measured)) - 1]

    @property
    def latency(self) -> float:
        return 0.0 if self._one_machine else self.settings.latency

    def call_worker(self) -> Events:
        """Spend what a call takes besides the driver's own work: (call − call_driver) + latency."""
        yield self.spend("calls", self.machine.call - self.machine.call_driver + self.latency)

    def compute(self, tasks: float) -> Events:
        """Compute a shard: (shard + task · tasks) · slowdown · straggler factor; on one machine on one of its cores."""
        factor = self.settings.stragglers.draw_factor(self._random)
        seconds = self.job.compute_seconds(tasks) * self.slowdown * factor
        if not self._one_machine:
            yield self.spend("compute", seconds)
            return
        with self._cores.request() as core:
            yield core
            yield self.spend("compute", seconds)

    def store_gradient(self, size: float) -> Events:
        """Put a gradient into its node's object store: reply(size). On one machine, part of it is one at a time."""
        seconds = self.machine.reply(size)
        shared = seconds * self.machine.reply_shared if self._one_machine else 0.0
        if shared:
            yield from self._store.use(shared)
            self.spent["object store"] += shared
        yield self.spend("object store", seconds - shared)

    def send_gradient(self, worker: int, target: Node, size: float) -> Events:
        """Store a gradient and send it to another node: reply(size) + size / link + latency."""
        yield from self.store_gradient(size)
        yield from self.send(self.worker_node(worker), target, size)

    def sum_over_ring(self, size: float) -> Events:
        """Sum a vector over all workers with a ring of 2·(W−1) rounds.

        In each round every card sends and receives 1/W of the vector at the same time, so nobody waits for a card:

            seconds = 2·(W−1) · (latency + max(size / (W·link), ring(2·size / W) / 2))

        `machine.ring` is two rounds between two processes of one machine: the processors' part.
        """
        workers = self.settings.workers
        rate = self.settings.link.bytes_per_second
        sending = 0.0 if rate is None else size / workers / rate
        rounds = 2 * (workers - 1)
        seconds = rounds * (self.latency + max(sending, self.machine.ring(2 * size / workers) / 2))
        if not rounds:
            return
        for node in self.nodes:
            node.bytes += 2 * rounds * size / workers
        self.bytes += rounds * size
        self.spent["ring"] += seconds * self.active_workers
        yield self.env.timeout(seconds)


class ThetaCopies:
    """The copies of theta on the nodes.

    The first worker of a node that asks has theta sent; the node's other workers wait for that. A worker that has the
    version already does not ask. The sources hold slices of theta, and each sends its own.
    """

    def __init__(self, cluster: SimulatedCluster, sources: Sequence[Node]):
        self._cluster = cluster
        self._sources = sources
        self._sent: dict[int, tuple[int, simpy.Event]] = {}  # by node: the version, and when it has arrived
        self._versions: dict[int, int] = {}  # by worker

    def fetch(self, worker: int, version: int) -> Events:
        """Fetch theta in S messages of B/S bytes; then receive(B), twice if S > 1 (slices are joined, then cut)."""
        cluster = self._cluster
        count = len(self._sources)
        node = worker // cluster.settings.workers_per_node
        if self._versions.get(worker, -1) >= version:
            return
        self._versions[worker] = version
        if self._sent.get(node, (-1,))[0] < version:
            size = cluster.job.bytes / count
            messages = [cluster.send(source, cluster.nodes[node], size) for source in self._sources]
            self._sent[node] = (version, cluster.start_all(messages))
        yield self._sent[node][1]
        copies = 1 if count == 1 else 2
        yield cluster.spend("object store", copies * cluster.machine.receive(cluster.job.bytes))

    def forget(self, worker: int) -> None:
        """Note that a worker was replaced by a new process."""
        self._versions.pop(worker, None)
