"""Predict one strategy on one cluster: seconds per step, what limits it, and what failures cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from distmeta.simulation.costs import JobCosts, MachineCosts
from distmeta.simulation.hardware import Node, SimulatedCluster, StepSize
from distmeta.simulation.settings import STRATEGIES, ClusterSettings, Stragglers
from distmeta.simulation.strategies import SIMULATIONS

SHARDS = 4_096
"""With stragglers, steps differ. Then so many shards are simulated, in `MIN_STEPS` to `MAX_STEPS` steps."""
MIN_STEPS = 1
MAX_STEPS = 64
MIN_ASYNC_SHARDS = 256
SAME_STEPS = ("driver", "sharded", "all-reduce")
"""Strategies that take the driver's steps, to the bit or within rounding."""
REQUIRED_GAIN = {"sharded": 1.1, "all-reduce": 1.1, "async": 1.5, "local": 1.5}
"""By how much a strategy must beat the best one before it, in tasks per second, to be recommended. `sharded` has more
parts that can fail than `driver`, `all-reduce` gives other bits, `async` and `local` take other steps."""


@dataclass(frozen=True)
class Prediction:
    """What the simulation says about one strategy on one cluster."""

    strategy: str
    workers: int
    working: int
    """Workers that have something to do in a step."""
    tasks_per_step: int
    shards: int
    seconds_step: float
    """Mean, without failures."""
    tasks_per_second: float
    """Useful tasks: without those dropped as too old, and after failures."""
    efficiency: float
    """tasks_per_second over W times what one process computes that does nothing else."""
    bytes_step: float
    """Sent between processes, per step."""
    bytes_busiest: float
    """Through the busiest network card in both directions, per step."""
    busiest: str
    """Whose card that is: driver, worker or server."""
    bottleneck: str
    share: float
    """Fraction of the step that the bottleneck takes."""
    dropped: float
    """Fraction of the computed tasks that is dropped."""
    lost: float
    """Fraction of the time that failures take."""

    @property
    def idle(self) -> int:
        return self.workers - self.working


@dataclass(frozen=True)
class Scenario:
    """What is simulated: a strategy for a job on a cluster of such machines."""

    strategy: str
    settings: ClusterSettings
    machine: MachineCosts
    job: JobCosts
    size: StepSize

    def with_settings(self, **changes: object) -> Scenario:
        return replace(self, settings=replace(self.settings, **changes))  # pyright: ignore[reportArgumentType]


class SimulatedSteps(NamedTuple):
    cluster: SimulatedCluster
    """Its state after the last step."""
    seconds: float
    """Mean seconds per step."""


def choose_step_size(tasks: int, shards: int, workers: int, scale: bool) -> StepSize:
    """Return the job's tasks and shards per step.

    With `scale` there are at least as many shards as workers, and the shards keep their size.
    """
    if not scale or workers <= shards:
        return StepSize(tasks, shards)
    return StepSize(round(tasks * workers / shards), workers)


def predict(scenario: Scenario, checkpoint_every: int = 0) -> Prediction:
    """Simulate some steps of a strategy and say how fast they are and why.

    Args:
        checkpoint_every: steps between the checkpoints to which a strategy goes back if it loses its state.
    """
    size = scenario.size
    settings = scenario.settings
    cluster, seconds = run_steps(scenario)
    without_stragglers = None
    if settings.stragglers.sigma:
        without_stragglers = run_steps(scenario.with_settings(stragglers=Stragglers()))
    bottleneck, share = find_bottleneck(SimulatedSteps(cluster, seconds), without_stragglers)
    seconds_lost = predict_seconds_per_failure(scenario, seconds, checkpoint_every)
    lost = min(settings.failures_per_hour / 3600 * seconds_lost, 1.0)
    rate = size.tasks / seconds * (1 - lost)
    cards = find_busiest_nodes(cluster)
    busiest = max(cards, key=lambda name: cards[name].bytes)
    steps = len(cluster.step_ends)
    tasks_computed = steps * size.tasks + cluster.tasks_dropped
    shard_seconds = scenario.job.compute_seconds(size.tasks_per_shard)
    return Prediction(
        strategy=scenario.strategy,
        workers=settings.workers,
        working=cluster.active_workers,
        tasks_per_step=size.tasks,
        shards=size.shards,
        seconds_step=seconds,
        tasks_per_second=rate,
        efficiency=rate * shard_seconds / size.tasks_per_shard / settings.workers,
        bytes_step=cluster.bytes / steps,
        bytes_busiest=cards[busiest].bytes / steps,
        busiest=busiest,
        bottleneck=bottleneck,
        share=share,
        dropped=cluster.tasks_dropped / tasks_computed,
        lost=lost,
    )


def recommend(predictions: Mapping[str, Prediction]) -> str:
    """Return the first of `STRATEGIES` that no later one beats by its `REQUIRED_GAIN`."""
    best: str | None = None
    for name in STRATEGIES:
        if name not in predictions:
            continue
        if (
            best is None
            or predictions[name].tasks_per_second > REQUIRED_GAIN[name] * predictions[best].tasks_per_second
        ):
            best = name
    assert best is not None, "at least one strategy"
    return best


def run_steps(scenario: Scenario, lose_worker: bool = False) -> SimulatedSteps:
    """Simulate as many steps as a mean needs."""
    settings = scenario.settings
    size = scenario.size
    cluster = SimulatedCluster(settings, scenario.machine, scenario.job, size)
    largest = max(size.shards, settings.workers)
    steps = 1
    if settings.stragglers.sigma:
        steps = min(max(SHARDS // largest, MIN_STEPS), MAX_STEPS)
    skipped = 0
    if scenario.strategy == "async":  # skip the steps in which all workers still move together
        skipped = 2 + min(math.ceil(settings.workers / size.shards), settings.max_staleness + 1)
        steps = skipped + max(steps, skipped, MIN_ASYNC_SHARDS // largest)
    elif scenario.strategy == "local":
        steps = max(1, steps // settings.local_steps) * settings.local_steps
    simulation = SIMULATIONS[scenario.strategy](cluster, steps, lose_worker)
    cluster.env.run(cluster.env.process(simulation))
    started = cluster.step_ends[skipped - 1] if skipped else 0.0
    seconds = (cluster.step_ends[-1] - started) / (len(cluster.step_ends) - skipped)
    return SimulatedSteps(cluster, seconds)


def find_bottleneck(found: SimulatedSteps, without_stragglers: SimulatedSteps | None) -> tuple[str, float]:
    """Return what takes most of a step, and its fraction."""
    cluster = found.cluster
    shares = measure_shares(cluster)
    # with stragglers a step may also be faster, if workers that do not move together share a card better
    if without_stragglers is not None and without_stragglers.seconds < found.seconds:
        even = without_stragglers.seconds / found.seconds
        shares = {name: share * even for name, share in measure_shares(without_stragglers.cluster).items()}
        shares["stragglers"] = 1 - even
    name = max(shares, key=shares.__getitem__)
    idle = cluster.settings.workers - cluster.active_workers
    shards = cluster.size.shards
    if name == "compute" and idle > cluster.active_workers:
        return f"{shards} shard{'s' * (shards > 1)}: {idle} workers idle", shares[name]
    return name, shares[name]


def measure_shares(cluster: SimulatedCluster) -> dict[str, float]:
    """Return fractions of the time: what a working worker does on average, and how busy the busiest cards and
    processors are."""
    seconds = cluster.step_ends[-1]
    shares = {name: spent / cluster.active_workers / seconds for name, spent in cluster.spent.items()}
    shares["driver's card"] = cluster.driver.card_busy / seconds
    shares["driver's processor"] = cluster.driver.processor.busy / seconds
    if cluster.servers:
        shares["servers' cards"] = max(server.card_busy for server in cluster.servers) / seconds
        shares["servers' processors"] = max(server.processor.busy for server in cluster.servers) / seconds
    return shares


def find_busiest_nodes(cluster: SimulatedCluster) -> dict[str, Node]:
    """Return the busiest node of each kind."""
    nodes = {"driver": cluster.driver, "worker": max(cluster.nodes, key=lambda node: node.bytes)}
    if cluster.servers:
        nodes["server"] = max(cluster.servers, key=lambda node: node.bytes)
    return nodes


def predict_seconds_per_failure(scenario: Scenario, seconds: float, checkpoint_every: int) -> float:
    """Return the seconds that one lost process costs.

    T is the seconds of a step with W workers, R = machine.start the time until the process is replaced.

    driver:      D + (R − D)·(1 − T_W / T_{W−1}),  D = T(with a worker lost half way through a shard) − T; its shard is
                 computed again, then the other workers do its work
    sharded:     a worker as above; a server (S of W + S processes): back to the checkpoint, R + T·checkpoint_every / 2
    all-reduce:  R + T·checkpoint_every / 2: the group starts again from the checkpoint
    async:       R·(1 − T_W / T_{W−1})
    local:       R + T·H / 2: the average waits for its worker, which starts again from the last average
    """
    settings = scenario.settings
    strategy = scenario.strategy
    if not settings.failures_per_hour:
        return 0.0
    restart = scenario.machine.start
    back_to_checkpoint = seconds * checkpoint_every / 2
    if strategy == "all-reduce":
        return restart + back_to_checkpoint
    if strategy == "local":
        return restart + seconds * settings.local_steps / 2
    even = scenario.with_settings(stragglers=Stragglers())
    calm = run_steps(even).seconds
    if settings.workers == 1:
        return restart + calm / 2
    fewer = run_steps(even.with_settings(workers=settings.workers - 1)).seconds
    share = max(1 - calm / fewer, 0.0)
    if strategy == "async":
        return restart * share
    delay = run_steps(even, lose_worker=True).seconds - calm
    worker = delay + max(restart - delay, 0.0) * share
    if strategy == "driver":
        return worker
    servers = settings.servers / (settings.servers + settings.workers)
    return (1 - servers) * worker + servers * (restart + back_to_checkpoint)
