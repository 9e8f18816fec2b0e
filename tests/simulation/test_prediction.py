"""Simulated steps compared with formulas, and what must hold for any simulation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from costs_by_hand import JOB, MACHINE
from hypothesis import given, settings
from hypothesis import strategies as st

from distmeta.simulation.costs import CostCurve, JobCosts, MachineCosts
from distmeta.simulation.prediction import Prediction, Scenario, choose_step_size, predict, recommend
from distmeta.simulation.settings import STRATEGIES, ClusterSettings, Link, Stragglers

B = JOB.bytes
RATE = 1.25e8
LATENCY = 1e-4
CLUSTER = ClusterSettings(1, Link(RATE), LATENCY)
SIZE = choose_step_size(32, 8, 1, scale=False)
C = JOB.compute_seconds(4)
"""Seconds of a shard."""
SENT = B / RATE + LATENCY
UNLIMITED = Link(1e18)
FREE = CostCurve(((0.0, 0.0),))


def run(strategy: str, workers: int = 1, **changes: object) -> Prediction:
    cluster = replace(CLUSTER, workers=workers, **changes)  # pyright: ignore[reportArgumentType]
    return simulate(strategy, cluster)


def simulate(
    strategy: str,
    cluster: ClusterSettings,
    machine: MachineCosts = MACHINE,
    job: JobCosts = JOB,
    checkpoint_every: int = 0,
) -> Prediction:
    return predict(Scenario(strategy, cluster, machine, job, SIZE), checkpoint_every)


def driver_step_seconds() -> float:
    """One worker of the driver: transfer and compute, one after the other."""
    start = MACHINE.step + MACHINE.put(B) + SENT + MACHINE.receive(B)
    shard = MACHINE.call + LATENCY + C + MACHINE.reply(B) + SENT
    return start + 8 * shard + 7 * MACHINE.add(B) + JOB.outer


def test_driver_with_one_worker() -> None:
    assert run("driver").seconds_step == pytest.approx(driver_step_seconds(), rel=1e-12)


def test_driver_on_a_slow_link_is_limited_by_its_card() -> None:
    """With as many workers as shards, theta leaves the card W times, and only then W sums arrive."""
    found = run("driver", 8, link=Link(1e6))
    assert found.seconds_step == pytest.approx(16 * B / 1e6, rel=0.01)
    assert found.bottleneck == "driver's card"
    assert found.bytes_step == found.bytes_busiest == 16 * B
    assert found.busiest == "driver"


def test_sharded_with_one_worker_without_a_network() -> None:
    servers = 4
    fetched = MACHINE.step + 2 * MACHINE.receive(B)
    computed = 8 * (MACHINE.call + C + MACHINE.reply(B) + servers * MACHINE.message_driver)
    pieces = MACHINE.message + MACHINE.message_driver
    called = 2 * (servers * MACHINE.message_driver + MACHINE.message)
    stepped = 7 * MACHINE.add(B / servers) + JOB.outer / servers + MACHINE.put(B / servers)
    found = run("sharded", latency=0.0, link=UNLIMITED, servers=servers)
    assert found.seconds_step == pytest.approx(fetched + computed + pieces + called + stepped, rel=1e-6)


def test_sharded_on_a_slow_link_is_limited_by_its_servers_cards() -> None:
    """Each of four servers sends a quarter of theta to 8 workers and receives a quarter of 8 sums."""
    found = run("sharded", 8, link=Link(1e6), servers=4)
    assert found.seconds_step == pytest.approx(16 * B / 4 / 1e6, rel=0.05)
    assert found.bytes_busiest == pytest.approx(16 * B / 4)
    assert found.bottleneck == "servers' cards"
    more = run("sharded", 8, link=Link(1e6), servers=100)  # theta has 16 blocks
    assert more.seconds_step == run("sharded", 8, link=Link(1e6), servers=16).seconds_step


@pytest.mark.parametrize("workers", [1, 2, 8, 64])
def test_all_reduce(workers: int) -> None:
    shards = -(-8 // workers)
    computed = shards * C + (shards - 1) * MACHINE.add(B) + JOB.outer
    rounds = max(B / workers / RATE, MACHINE.ring(2 * B / workers) / 2) + LATENCY
    found = run("all-reduce", workers)
    assert found.seconds_step == pytest.approx(computed + 2 * (workers - 1) * rounds, rel=1e-12)
    assert found.bytes_step == pytest.approx(2 * (workers - 1) * B)
    assert found.bytes_busiest == pytest.approx(2 * 2 * (workers - 1) / workers * B)


def test_async_with_one_worker_is_the_driver_without_its_barrier() -> None:
    """The driver adds between shards what it otherwise adds at the end. A step's own work is the same."""
    expected = driver_step_seconds() + MACHINE.add(B)
    assert run("async").seconds_step == pytest.approx(expected, rel=1e-9)


def test_async_does_not_wait_for_stragglers() -> None:
    uneven = Stragglers(0.8)
    found = {name: run(name, 8, stragglers=uneven, link=UNLIMITED) for name in ("driver", "async")}
    assert found["async"].tasks_per_second > 1.3 * found["driver"].tasks_per_second
    assert found["driver"].bottleneck == "stragglers"


def test_async_drops_stale_gradients() -> None:
    fresh = run("async", 24, max_staleness=4)
    stale = run("async", 24, max_staleness=0)
    assert (fresh.working, stale.working) == (24, 8)
    assert fresh.dropped == 0
    assert stale.tasks_per_second <= fresh.tasks_per_second


def test_local_with_one_worker() -> None:
    steps = 5
    computed = 8 * C + 7 * MACHINE.add(B) + JOB.outer
    around = MACHINE.step + MACHINE.put(B) + MACHINE.call + LATENCY + SENT + MACHINE.receive(B)
    around += MACHINE.reply(B) + SENT + JOB.outer
    found = run("local", local_steps=steps)
    assert found.seconds_step == pytest.approx(computed + around / steps, rel=1e-12)


def test_one_machine_has_no_network_and_few_cores() -> None:
    one = run("driver", 1, link=Link(None))
    two = run("driver", 2, link=Link(None))
    four = run("driver", 4, link=Link(None))
    network_seconds = 17 * LATENCY + 9 * B / RATE
    assert one.seconds_step == pytest.approx(driver_step_seconds() - network_seconds, rel=1e-9)
    assert two.seconds_step > 4 * C * MACHINE.slowdown[1]
    assert four.seconds_step > 4 * C * MACHINE.slowdown[1]  # two cores, whatever the number of workers
    assert two.seconds_step < one.seconds_step


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "async"])
@settings(max_examples=15, deadline=None)
@given(
    rate=st.floats(1e5, 1e10),
    faster=st.floats(1, 100),
    latency=st.floats(0, 1e-2),
    workers=st.integers(1, 20),
)
def test_a_faster_link_is_not_slower(
    strategy: str, rate: float, faster: float, latency: float, workers: int
) -> None:
    """This does not hold for `async`: with another link, other gradients meet at a card, again and again."""
    slow = run(strategy, workers, link=Link(rate), latency=latency)
    fast = run(strategy, workers, link=Link(rate * faster), latency=latency)
    most = slow.seconds_step * (1 + 1e-9)
    assert fast.seconds_step <= most
    assert run(strategy, workers, link=Link(rate), latency=0.0).seconds_step <= most
    assert 0 < slow.efficiency <= 1
    assert 0 < slow.share <= 1 + 1e-9


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_failures_cost_time(strategy: str) -> None:
    """More failures cost more, and never more than everything.

    If the driver is the limit, losing a worker costs nothing. So here the driver is free.
    """
    machine = replace(MACHINE, call_driver=0.0, step=0.0, add=FREE, put=FREE)
    job = replace(JOB, outer=0.0)
    cluster = replace(CLUSTER, workers=8, link=UNLIMITED)

    def simulate_failures(per_hour: float) -> Prediction:
        return simulate(strategy, replace(cluster, failures_per_hour=per_hour), machine, job)

    none = simulate_failures(0)
    few = simulate_failures(2)
    many = simulate_failures(200)
    too_many = simulate_failures(1e6)
    assert none.lost == 0
    assert none.tasks_per_second > few.tasks_per_second > many.tasks_per_second
    assert many.lost == pytest.approx(min(100 * few.lost, 1.0))
    assert 0 <= too_many.tasks_per_second < many.tasks_per_second
    assert none.seconds_step == too_many.seconds_step


def test_failures_cost_more_with_rare_checkpoints() -> None:
    cluster = replace(CLUSTER, workers=8, failures_per_hour=2.0)
    often = simulate("all-reduce", cluster, checkpoint_every=10)
    rarely = simulate("all-reduce", cluster, checkpoint_every=1000)
    step = often.seconds_step
    assert often.lost == pytest.approx(2 / 3600 * (MACHINE.start + 5 * step))
    assert rarely.lost == pytest.approx(2 / 3600 * (MACHINE.start + 500 * step))
    driver = simulate("driver", cluster).lost
    for every in (10, 1000):
        assert simulate("driver", cluster, checkpoint_every=every).lost == driver


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_seed_gives_the_same_prediction(strategy: str) -> None:
    uneven = Stragglers(0.3)
    # on a slow link, workers that do not move together would share the driver's card better
    first = run(strategy, 4, link=UNLIMITED, stragglers=uneven, seed=0)
    again = run(strategy, 4, link=UNLIMITED, stragglers=uneven, seed=0)
    other = run(strategy, 4, link=UNLIMITED, stragglers=uneven, seed=1)
    assert first == again
    assert first.seconds_step != other.seconds_step
    if strategy != "async":
        assert first.seconds_step > run(strategy, 4, link=UNLIMITED).seconds_step


def test_computations_on_one_machine_slow_each_other_down() -> None:
    """They are as slow as measured with so many at the same time; beyond that, as slow as the last measured."""
    free = replace(MACHINE, call=0.0, call_driver=0.0, put=FREE, receive=FREE, reply=FREE, add=FREE)
    machine = replace(free, step=0.0, cores=16, slowdown=(1.0, 1.2, 1.5))
    job = replace(JOB, outer=0.0)
    for workers, slowdown in ((1, 1.0), (2, 1.2), (4, 1.5), (8, 1.5), (16, 1.5)):
        found = simulate("driver", ClusterSettings(workers, Link(None)), machine, job)
        assert found.seconds_step == pytest.approx(max(8 // workers, 1) * C * slowdown)
    shared = replace(CLUSTER, workers=8, workers_per_node=2, link=UNLIMITED, latency=0.0)
    found = simulate("driver", shared, machine, job)
    assert found.seconds_step == pytest.approx(C * 1.2, rel=1e-6)


def test_workers_without_a_shard_are_idle() -> None:
    found = run("driver", 4096, link=UNLIMITED, latency=0.0)
    assert (found.working, found.idle) == (8, 4088)
    assert found.bottleneck == "8 shards: 4088 workers idle"
    cluster = replace(CLUSTER, workers=512, link=UNLIMITED, latency=0.0)
    size = choose_step_size(32, 8, 512, scale=True)
    scaled = predict(Scenario("all-reduce", cluster, MACHINE, JOB, size))
    assert (scaled.tasks_per_step, scaled.shards, scaled.idle) == (2048, 512, 0)
    assert scaled.bottleneck == "ring"
    assert scaled.tasks_per_second > 4 * found.tasks_per_second


def test_recommendation() -> None:
    found = {name: run(name, 8) for name in STRATEGIES}

    def recommend_with_rates(*rates: float) -> str:
        pairs = zip(STRATEGIES, rates, strict=True)
        return recommend({name: replace(found[name], tasks_per_second=rate) for name, rate in pairs})

    assert recommend_with_rates(100, 105, 109, 149, 149) == "driver"
    assert recommend_with_rates(100, 115, 120, 149, 149) == "sharded"
    assert recommend_with_rates(100, 115, 130, 149, 190) == "all-reduce"
    assert recommend_with_rates(100, 100, 100, 160, 200) == "async"
    assert recommend_with_rates(100, 100, 100, 160, 300) == "local"
