"""A cluster and a strategy simulated: seconds a step, what bounds it, what failures take of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from distmeta.simulation.actors import Node, Site, Work
from distmeta.simulation.cluster import STRATEGIES, Cluster, Stragglers
from distmeta.simulation.costs import JobCosts, Machine
from distmeta.simulation.strategies import ACTORS

SHARDS = 4_096
"""Shards that are simulated where stragglers make steps differ: as many steps as that gives, within `STEPS`."""
STEPS = (1, 64)
SETTLED = 256
"""Shards of `async` that are simulated at least."""
SAME_STEPS = ("driver", "sharded", "all-reduce")
"""To the bit, or within rounding."""
WORTH = {"sharded": 1.1, "all-reduce": 1.1, "async": 1.5, "local": 1.5}
"""How many times the tasks a second of the best one before it a strategy must do to be recommended: `sharded` has more
to go wrong than `driver`, `all-reduce` gives other bits, `async` and `local` take other steps."""


@dataclass(frozen=True)
class Outcome:
    """One strategy on one cluster."""

    strategy: str
    workers: int
    working: int
    """Workers that have something to do in a step."""
    tasks_per_step: int
    shards: int
    seconds_step: float
    """Mean, without failures."""
    tasks_per_second: float
    """Useful ones: without those dropped as too old, and after failures."""
    efficiency: float
    """tasks_per_second over W times what one process with nothing else to do computes."""
    bytes_step: float
    """From one process to another."""
    bytes_busiest: float
    """Through the card that has most, both directions."""
    busiest: str
    """Whose card that is."""
    bottleneck: str
    share: float
    """Of the step that the bottleneck takes."""
    dropped: float
    """Fraction of the computed tasks."""
    lost: float
    """Fraction of the time that failures take."""

    @property
    def idle(self) -> int:
        return self.workers - self.working


def work_of(tasks: int, shards: int, workers: int, scale: bool) -> Work:
    """A step's tasks and shards: the job's; with `scale`, shards of the same size, as many as workers at least."""
    if not scale or workers <= shards:
        return Work(tasks, shards)
    return Work(round(tasks * workers / shards), workers)


def simulate(
    strategy: str, cluster: Cluster, machine: Machine, job: JobCosts, work: Work, checkpoint_every: int = 0
) -> Outcome:
    """Simulates some steps of a strategy.

    Args:
        checkpoint_every: steps between the checkpoints that a strategy which cannot mend itself goes back to.
    """
    site, seconds = _run(strategy, cluster, machine, job, work)
    calm = None
    if cluster.stragglers.sigma:
        calm = _run(strategy, replace(cluster, stragglers=Stragglers()), machine, job, work)
    bottleneck, share = _bottleneck(site, seconds, calm)
    steps = len(site.ends)
    computed = steps * work.tasks + site.dropped
    lasting = _failure(strategy, cluster, machine, job, work, seconds, checkpoint_every)
    lost = min(cluster.failures_per_hour / 3600 * lasting, 1.0)
    rate = work.tasks / seconds * (1 - lost)
    cards = _cards(site)
    busiest = max(cards, key=lambda name: cards[name].bytes)
    return Outcome(
        strategy,
        cluster.workers,
        site.active,
        work.tasks,
        work.shards,
        seconds,
        rate,
        rate * job.compute(work.shard) / work.shard / cluster.workers,
        site.bytes / steps,
        cards[busiest].bytes / steps,
        busiest,
        bottleneck,
        share,
        site.dropped / computed,
        lost,
    )


def recommended(outcomes: Mapping[str, Outcome]) -> str:
    """The first of `STRATEGIES` that none after it beats by its `WORTH`."""
    best = None
    for name in STRATEGIES:
        if name in outcomes and (
            best is None or outcomes[name].tasks_per_second > WORTH[name] * outcomes[best].tasks_per_second
        ):
            best = name
    assert best is not None
    return best


def _run(
    strategy: str, cluster: Cluster, machine: Machine, job: JobCosts, work: Work, lost: bool = False
) -> tuple[Site, float]:
    """The site after some steps, and the mean seconds of one."""
    site = Site(cluster, machine, job, work)
    least, most = STEPS
    steps = min(max(SHARDS // max(work.shards, cluster.workers), least), most)
    steps = steps if cluster.stragglers.sigma else 1
    warm = 0
    if strategy == "async":  # until workers no longer move in step
        warm = 2 + min(-(-cluster.workers // work.shards), cluster.max_staleness + 1)
        steps = warm + max(steps, warm, SETTLED // max(work.shards, cluster.workers))
    elif strategy == "local":
        steps = max(1, steps // cluster.local_steps) * cluster.local_steps
    site.env.run(site.env.process(ACTORS[strategy](site, steps, lost)))
    began = site.ends[warm - 1] if warm else 0.0
    return site, (site.ends[-1] - began) / (len(site.ends) - warm)


def _bottleneck(site: Site, seconds: float, calm: tuple[Site, float] | None) -> tuple[str, float]:
    """What takes most of a step, and the fraction; `calm`: the same without stragglers, whose part is the rest."""
    causes = _causes(site)
    if calm is not None and calm[1] < seconds:  # workers out of step may also share a card better
        even = calm[1] / seconds
        causes = {name: share * even for name, share in _causes(calm[0]).items()} | {"stragglers": 1 - even}
    name = max(causes, key=causes.__getitem__)
    idle, shards = site.cluster.workers - site.active, site.work.shards
    if name == "compute" and idle > site.active:
        return f"{shards} shard{'s' * (shards > 1)}: {idle} workers idle", causes[name]
    return name, causes[name]


def _causes(site: Site) -> dict[str, float]:
    """Fractions of the time: what a working worker does on average, how busy the busiest cards and processors are."""
    workers, seconds = site.active, site.ends[-1]
    causes = {name: spent / workers / seconds for name, spent in site.spent.items()}
    causes["driver's card"] = site.driver.card / seconds
    causes["driver's processor"] = site.driver.processor.busy / seconds
    if site.servers:
        causes["servers' cards"] = max(server.card for server in site.servers) / seconds
        causes["servers' processors"] = max(server.processor.busy for server in site.servers) / seconds
    return causes


def _cards(site: Site) -> dict[str, Node]:
    """The busiest of each kind."""
    cards = {"driver": site.driver, "worker": max(site.nodes, key=lambda node: node.bytes)}
    if site.servers:
        cards["server"] = max(site.servers, key=lambda node: node.bytes)
    return cards


def _failure(
    strategy: str,
    cluster: Cluster,
    machine: Machine,
    job: JobCosts,
    work: Work,
    seconds: float,
    checkpoint_every: int,
) -> float:
    """Seconds that one lost process takes, T a step's seconds with W workers, R = machine.start until it is replaced.

    driver:      D + (R − D)·(1 − T_W / T_{W−1}),  D = T(with a worker lost half way through a shard) − T; its shard is
                 computed again, then the others do its work
    sharded:     a worker as above; a server (S of W + S processes): back to the checkpoint, R + T·checkpoint_every / 2
    all-reduce:  R + T·checkpoint_every / 2: the group starts again from the checkpoint
    async:       R·(1 − T_W / T_{W−1})
    local:       R + T·H / 2: the average waits for its worker, which starts again from the last one
    """
    if not cluster.failures_per_hour:
        return 0.0
    restart, back = machine.start, seconds * checkpoint_every / 2
    if strategy == "all-reduce":
        return restart + back
    if strategy == "local":
        return restart + seconds * cluster.local_steps / 2
    even = replace(cluster, stragglers=Stragglers())
    _, calm = _run(strategy, even, machine, job, work)
    if cluster.workers == 1:
        return restart + calm / 2
    _, fewer = _run(strategy, replace(even, workers=cluster.workers - 1), machine, job, work)
    share = max(1 - calm / fewer, 0.0)
    if strategy == "async":
        return restart * share
    _, hit = _run(strategy, even, machine, job, work, lost=True)
    worker = hit - calm + max(restart - (hit - calm), 0.0) * share
    if strategy == "driver":
        return worker
    servers = cluster.servers / (cluster.servers + cluster.workers)
    return (1 - servers) * worker + servers * (restart + back)
