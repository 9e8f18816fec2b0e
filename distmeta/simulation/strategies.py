"""A function a strategy, a process an actor: each simulates some steps of a job.

B = 4 · parameters bytes, W workers (one a node in the formulas), K shards, n tasks, c = compute(n/K), S servers, H
steps between averages; b the link, l the latency; put, receive, reply, add, call, step, outer as `costs` has them. The
formulas hold without stragglers; tests compare.
"""

from __future__ import annotations

from collections.abc import Callable

import simpy

from distmeta.compute.vectors import edges_of
from distmeta.simulation.actors import Copies, Events, Node, Site
from distmeta.simulation.cluster import STRATEGIES


def driver(site: Site, steps: int, lost: bool = False) -> Events:
    """theta is put once, goes to each working node once, every shard's sum comes back, the driver adds and steps.

    W = 1:  step + put + B/b + l + receive + K·(call + l + c + reply + B/b + l) + (K−1)·add + outer
    W = K and a link so slow that nothing else counts:  W·B/b out of the driver's card, then W·B/b into it

    A worker takes the next shard once the driver has its last. `lost`: see `taking`.
    """
    copies = Copies(site, [site.driver])
    shards = simpy.Store(site.env)

    def answer(worker: int) -> Events:
        yield from site.reply(worker, site.driver, site.job.bytes)
        yield from site.driver.processor.use(site.machine.call_driver / 2)

    workers = [
        taking(site, worker, shards, copies, answer, lost and worker == 0) for worker in range(site.active)
    ]
    for worker in workers:
        site.env.process(worker)
    for step in range(steps):
        yield from site.driver.processor.use(site.machine.step + site.machine.put(site.job.bytes))
        yield _hand_out(site, shards, step)
        adding = (site.work.shards - 1) * site.machine.add(site.job.bytes) + site.job.outer
        yield from site.driver.processor.use(adding)
        site.ends.append(site.env.now)


def sharded(site: Site, steps: int, lost: bool = False) -> Events:
    """Each server owns a slice of B/S bytes; the driver sends integers and names objects.

    Workers fetch S slices, leave every shard's gradient in their node's store, cut in S; as its answer comes, the
    driver calls each server to fetch its piece, which the worker does not wait for. After the last, servers are called
    twice: to add and for the norm, then to step. With l = 0 and b without limit, W = 1:
        step + 2·receive + K·(call + c + reply(B) + S·message_driver) + message + message_driver
        + 2·(S·message_driver + message) + (K−1)·add(B/S) + outer/S + put(B/S)
    """
    machine, job = site.machine, site.job
    count = len(edges_of(job.parameters, site.cluster.servers)) - 1
    site.servers = [site.node() for _ in range(count)]
    size = job.bytes / count
    copies = Copies(site, site.servers)
    shards = simpy.Store(site.env)
    pieces: list[simpy.Event] = []

    def answer(worker: int) -> Events:
        yield from site.keep(job.bytes)
        yield site.env.timeout(site.latency)
        yield from site.driver.processor.use(machine.call_driver / 2 + count * machine.message_driver)
        pieces.extend(site.env.process(piece(worker, server)) for server in site.servers)

    def piece(worker: int, server: Node) -> Events:
        yield site.env.timeout(machine.message + site.latency)
        yield from site.send(site.node_of(worker), server, size)
        yield from site.serve(server, machine.message_driver)

    def called(server: Node, seconds: float) -> Events:
        yield site.env.timeout(machine.message + 2 * site.latency)
        yield from site.serve(server, seconds)

    for worker in range(site.active):
        site.env.process(taking(site, worker, shards, copies, answer, lost and worker == 0))
    for step in range(steps):
        yield from site.driver.processor.use(machine.step)
        yield _hand_out(site, shards, step)
        yield site.env.all_of(pieces)
        pieces.clear()
        for work in ((site.work.shards - 1) * machine.add(size), job.outer / count + machine.put(size)):
            yield from site.driver.processor.use(count * machine.message_driver)
            yield site.all([called(server, work) for server in site.servers])
        site.ends.append(site.env.now)


def all_reduce(site: Site, steps: int, lost: bool = False) -> Events:
    """Shards are dealt out, each worker adds its own, a ring sums over the workers, each takes the same outer step.

    max over workers of (k·c + (k−1)·add), k = ⌈K/W⌉ or ⌊K/W⌋ its shards, + ring(B) + outer.
    Workers without a shard join the ring.
    """
    for _ in range(steps):
        yield site.all([_dealt(site, worker) for worker in range(site.active)])
        yield from site.ring(site.job.bytes)
        yield site.env.timeout(site.job.outer)
        site.ends.append(site.env.now)


def asynchronous(site: Site, steps: int, lost: bool = False) -> Events:
    """No worker waits for another: it fetches the newest theta, computes a shard, sends it, and so on.

    The driver adds what arrives and takes an outer step after every K gradients. One that was computed on a theta more
    than `max_staleness` steps old is dropped, and its tasks count for nothing; so K·(max_staleness + 1) workers are
    used at most. W = 1: as `driver`, but theta is fetched as often as it changes, which is before every K-th shard.
    """
    machine, job, work = site.machine, site.job, site.work
    copies = Copies(site, [site.driver])
    version, fresh, finished = [0], [0], site.env.event()

    def worker(number: int) -> Events:
        while not finished.triggered:
            yield from site.driver.processor.use(machine.call_driver / 2)
            yield from site.call()
            computed_on = version[0]
            yield from copies.fetch(number, computed_on)
            yield from site.compute(work.shard)
            yield from site.reply(number, site.driver, job.bytes)
            yield from site.driver.processor.use(machine.call_driver / 2 + machine.add(job.bytes))
            if version[0] - computed_on > site.cluster.max_staleness:
                site.dropped += work.shard
                continue
            fresh[0] += 1
            if fresh[0] == work.shards:
                fresh[0] = 0
                yield from site.driver.processor.use(job.outer + machine.put(job.bytes) + machine.step)
                version[0] += 1
                site.ends.append(site.env.now)
                if version[0] == steps:
                    finished.succeed()

    site.active = min(site.cluster.workers, work.shards * (site.cluster.max_staleness + 1))
    for number in range(site.active):
        site.env.process(worker(number))
    yield finished


def local(site: Site, steps: int, lost: bool = False) -> Events:
    """Each worker takes H outer steps on its own shards; then the driver averages the deltas and sends theta back.

    W = 1, and a step is an H-th part of it:
        step + put + call + l + B/b + l + receive + H·(K·c + (K−1)·add + outer) + reply + B/b + l + outer
    More workers share the shards, ⌈K/W⌉ or ⌊K/W⌋ each, and wait for each other at the driver's card.
    """
    machine, job, rounds = site.machine, site.job, site.cluster.local_steps
    copies = Copies(site, [site.driver])

    def alone(worker: int, version: int) -> Events:
        yield from site.driver.processor.use(machine.call_driver / 2)
        yield from site.call()
        yield from copies.fetch(worker, version)
        for _ in range(rounds):
            yield from _dealt(site, worker)
            yield site.env.timeout(job.outer)
        yield from site.reply(worker, site.driver, job.bytes)
        yield from site.driver.processor.use(machine.call_driver / 2)

    for version in range(-(-steps // rounds)):
        began = site.env.now
        yield from site.driver.processor.use(machine.step + machine.put(job.bytes))
        yield site.all([alone(worker, version) for worker in range(site.active)])
        yield from site.driver.processor.use((site.active - 1) * machine.add(job.bytes) + job.outer)
        took = (site.env.now - began) / rounds
        site.ends += [began + took * (k + 1) for k in range(rounds)]


ACTORS: dict[str, Callable[..., Events]] = dict(
    zip(STRATEGIES, (driver, sharded, all_reduce, asynchronous, local), strict=True)
)


def taking(
    site: Site,
    worker: int,
    shards: simpy.Store,
    copies: Copies,
    answer: Callable[[int], Events],
    dies: bool,
) -> Events:
    """A worker of `driver` and `sharded`: takes a shard when it is free, fetches theta with a step's first, answers.

    `dies`: half way through its first shard it is gone; the shard goes to whoever is free, and it is back, without
    theta, after `machine.start` seconds.
    """
    while True:
        shard = yield shards.get()
        step, tasks, done = shard
        yield from site.driver.processor.use(site.machine.call_driver / 2)
        yield from site.call()
        yield from copies.fetch(worker, step)
        if dies:
            dies = False
            copies.forget(worker)
            yield site.env.timeout(site.job.compute(tasks) / 2)
            yield shards.put(shard)
            yield site.env.timeout(site.machine.start)
            continue
        yield from site.compute(tasks)
        yield from answer(worker)
        done()


def _hand_out(site: Site, shards: simpy.Store, step: int) -> simpy.Event:
    """A step's shards, for whoever is free; happens when the driver has all of their answers."""
    finished, left = site.env.event(), [site.work.shards]

    def done() -> None:
        left[0] -= 1
        if not left[0]:
            finished.succeed()

    for _ in range(site.work.shards):
        shards.put((step, site.work.shard, done))
    return finished


def _dealt(site: Site, worker: int) -> Events:
    """A worker's own shards of a step, one after the other, and their sum."""
    mine = site.work.dealt(worker, site.cluster.workers)
    for _ in range(mine):
        yield from site.compute(site.work.shard)
    yield site.env.timeout(max(mine - 1, 0) * site.machine.add(site.job.bytes))
