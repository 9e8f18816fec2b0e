"""What the strategies are simulated with: network cards, processors, nodes, workers. Each is a SimPy resource."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from random import Random
from typing import Any

import simpy

from distmeta.simulation.cluster import Cluster
from distmeta.simulation.costs import JobCosts, Machine

Events = Generator[simpy.Event, Any, None]


class Processor:
    """Serves one at a time, first come first served."""

    def __init__(self, env: simpy.Environment):
        self._env, self._turn = env, simpy.Resource(env, capacity=1)
        self.busy = 0.0
        """Seconds it served."""

    def use(self, seconds: float) -> Events:
        with self._turn.request() as turn:
            yield turn
            yield self._env.timeout(seconds)
        self.busy += seconds


class Lane:
    """One direction of a network card, which the messages that are on it share evenly, as connections do.

    With n messages on it each gets rate / n. `_given` is what a message that was there from the beginning has had: one
    of `size` bytes that begins now is through when that has grown by `size`.
    """

    def __init__(self, env: simpy.Environment, rate: float):
        self._env, self._rate = env, rate
        self._ends: list[tuple[float, int, simpy.Event]] = []
        self._given, self._since, self._changes = 0.0, 0.0, 0

    def send(self, size: float) -> simpy.Event:
        """Happens when the last byte is through."""
        self._give()
        through = self._env.event()
        heappush(self._ends, (self._given + size, self._changes, through))
        self._expect()
        return through

    def _give(self) -> None:
        if self._ends:
            self._given += (self._env.now - self._since) * self._rate / len(self._ends)
        self._since = self._env.now

    def _expect(self) -> None:
        """The next end, unless another message begins before it."""
        self._changes += 1
        if self._ends:
            left = max(self._ends[0][0] - self._given, 0.0) * len(self._ends) / self._rate
            timeout = simpy.Timeout(self._env, left, self._changes)
            timeout.callbacks.append(self._end)

    def _end(self, event: simpy.Event) -> None:
        if event.value != self._changes:
            return
        self._since = self._env.now
        self._given = self._ends[0][0]
        while self._ends and self._ends[0][0] <= self._given * (1 + 1e-12):
            heappop(self._ends)[2].succeed()
        self._expect()


class Node:
    """A machine of the cluster: both directions of its network card, and the processor that serves others."""

    def __init__(self, env: simpy.Environment, rate: float):
        self.out, self.into, self.processor = Lane(env, rate), Lane(env, rate), Processor(env)
        self.bytes = 0.0
        """Through its card, both directions together."""
        self._env, self._flows, self._since, self._card = env, 0, 0.0, 0.0

    @property
    def card(self) -> float:
        """Seconds that its card was busy, in either direction."""
        return self._card + (self._env.now - self._since if self._flows else 0.0)

    def flows(self, change: int) -> None:
        """A message begins (1) or ends (−1) on the card."""
        if not self._flows:
            self._since = self._env.now
        self._flows += change
        if not self._flows:
            self._card += self._env.now - self._since


@dataclass(frozen=True)
class Work:
    """What a step has to do: tasks in shards, which workers take or are dealt."""

    tasks: int
    shards: int

    @property
    def shard(self) -> float:
        """Tasks of one shard: as even as the driver cuts them."""
        return self.tasks / self.shards

    def dealt(self, worker: int, workers: int) -> int:
        """Shards of one worker where they are dealt out before the step."""
        return self.shards // workers + (worker < self.shards % workers)


class Site:
    """A cluster under simulation: the driver's node, the workers' nodes, the servers' nodes, and what they did."""

    def __init__(self, cluster: Cluster, machine: Machine, job: JobCosts, work: Work):
        self.cluster, self.machine, self.job, self.work = cluster, machine, job, work
        self.env = simpy.Environment()
        self.driver = self.node()
        self.nodes = [self.node() for _ in range(cluster.nodes)]
        self.servers: list[Node] = []
        self.spent: defaultdict[str, float] = defaultdict(float)
        """Seconds of all workers together, by what they did: compute, calls, object store, ring."""
        self.bytes = 0.0
        """Sent from one process to another."""
        self.ends: list[float] = []
        """When each step ended."""
        self.dropped = 0.0
        """Tasks whose gradient came too late to be used."""
        self.active = min(cluster.workers, work.shards)
        """Workers that have something to do."""
        self._random = Random(f"{cluster.seed}/{cluster.workers}")
        self._local = cluster.link.bytes_per_second is None
        self._store = Processor(self.env)  # of the one machine, where there is no network
        self._cores = simpy.Resource(self.env, machine.cores)  # of the one machine too

    def node(self) -> Node:
        """A machine more."""
        return Node(self.env, self.cluster.link.bytes_per_second or math.inf)

    def node_of(self, worker: int) -> Node:
        return self.nodes[worker // self.cluster.per_node]

    def all(self, actors: Sequence[Events]) -> simpy.Event:
        """Begins them all; happens when the last is done."""
        return self.env.all_of([self.env.process(actor) for actor in actors])

    def spend(self, what: str, seconds: float) -> simpy.Event:
        self.spent[what] += seconds
        return self.env.timeout(seconds)

    def send(self, source: Node, target: Node, size: float) -> Events:
        """A message: its bytes through both cards at once, each of which all that are on it share, then the latency.

        seconds = size / link + latency, where nobody else uses the two cards; 0 on one machine
        """
        self.bytes += size
        source.bytes += size
        target.bytes += size
        if self._local:
            return
        source.flows(1)
        target.flows(1)
        yield source.out.send(size) & target.into.send(size)
        source.flows(-1)
        target.flows(-1)
        yield self.env.timeout(self.cluster.latency)

    def serve(self, server: Node, seconds: float) -> Events:
        """A server's processor at work; on one machine, on one of its cores."""
        if not self._local:
            yield from server.processor.use(seconds)
            return
        with self._cores.request() as core:
            yield core
            yield from server.processor.use(seconds)

    @property
    def slowdown(self) -> float:
        """Of a computation, by those of other workers on the same machine."""
        measured = self.machine.slowdown
        together = min(self.active, self.machine.cores) if self._local else self.cluster.per_node
        return measured[min(together, len(measured)) - 1]

    @property
    def latency(self) -> float:
        return 0.0 if self._local else self.cluster.latency

    def call(self) -> Events:
        """What a call takes besides the driver's own work on it: (call − call_driver) + latency, on its way there."""
        yield self.spend("calls", self.machine.call - self.machine.call_driver + self.latency)

    def compute(self, tasks: float) -> Events:
        """A shard: (shard + task · tasks) · slowdown · the straggler's factor; on one machine, on one of its cores."""
        seconds = self.job.compute(tasks) * self.slowdown * self.cluster.stragglers.factor(self._random)
        if not self._local:
            yield self.spend("compute", seconds)
            return
        with self._cores.request() as core:
            yield core
            yield self.spend("compute", seconds)

    def keep(self, size: float) -> Events:
        """A gradient goes into its node's object store: reply(size); on one machine, part of it one at a time."""
        seconds = self.machine.reply(size)
        shared = seconds * self.machine.reply_shared if self._local else 0.0
        if shared:
            yield from self._store.use(shared)
            self.spent["object store"] += shared
        yield self.spend("object store", seconds - shared)

    def reply(self, worker: int, target: Node, size: float) -> Events:
        """… and from there to another node: reply(size) + size / link + latency."""
        yield from self.keep(size)
        yield from self.send(self.node_of(worker), target, size)

    def ring(self, size: float) -> Events:
        """A vector summed over all workers by a ring: 2·(W−1) rounds, in each of which every card sends and receives
        1/W of it at once; so nobody waits for a card, and the rounds need no processes of their own.

        seconds = 2·(W−1) · (l + max(size / (W·link), ring(2·size / W) / 2))

        `machine.ring` is two rounds between two processes of one machine: the processors' part.
        """
        workers, rate = self.cluster.workers, self.cluster.link.bytes_per_second
        sending = 0.0 if rate is None else size / workers / rate
        rounds = 2 * (workers - 1)
        seconds = rounds * (self.latency + max(sending, self.machine.ring(2 * size / workers) / 2))
        if not rounds:
            return
        for node in self.nodes:
            node.bytes += 2 * rounds * size / workers
        self.bytes += rounds * size
        self.spent["ring"] += seconds * self.active
        yield self.env.timeout(seconds)


class Copies:
    """theta on the nodes. The first worker of a node that asks has it sent, the node's others wait for that; a worker
    that has the version already does not ask. Held in slices by its sources, each of which sends its own."""

    def __init__(self, site: Site, sources: Sequence[Node]):
        self._site, self._sources = site, sources
        self._sent: dict[int, tuple[int, simpy.Event]] = {}
        self._have: dict[int, int] = {}

    def fetch(self, worker: int, version: int) -> Events:
        """S messages of B/S, and receive(B), twice where S > 1."""
        site, count = self._site, len(self._sources)
        node = worker // site.cluster.per_node
        if self._have.get(worker, -1) >= version:
            return
        self._have[worker] = version
        if self._sent.get(node, (-1,))[0] < version:
            size = site.job.bytes / count
            sending = site.all([site.send(source, site.nodes[node], size) for source in self._sources])
            self._sent[node] = version, sending
        yield self._sent[node][1]
        copies = 1 if count == 1 else 2  # slices are joined, then cut into tensors
        yield site.spend("object store", copies * site.machine.receive(site.job.bytes))

    def forget(self, worker: int) -> None:
        """It is another process now."""
        self._have.pop(worker, None)
