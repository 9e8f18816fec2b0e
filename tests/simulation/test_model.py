"""The simulated step against its formula, and what must hold of any simulation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from costs_by_hand import JOB, MACHINE
from hypothesis import given, settings
from hypothesis import strategies as st

from distmeta.simulation.cluster import STRATEGIES, Cluster, Link, Stragglers
from distmeta.simulation.costs import Curve
from distmeta.simulation.model import Outcome, recommended, simulate, work_of

B = JOB.bytes
RATE, LATENCY = 1.25e8, 1e-4
CLUSTER = Cluster(1, Link(RATE), LATENCY)
WORK = work_of(32, 8, 1, scale=False)
C = JOB.compute(4)
"""Seconds of a shard."""
SENT = B / RATE + LATENCY
NOTHING = Curve(((0.0, 0.0),))


def run(strategy: str, workers: int = 1, **changes: object) -> Outcome:
    cluster = replace(CLUSTER, workers=workers, **changes)  # pyright: ignore[reportArgumentType]
    return simulate(strategy, cluster, MACHINE, JOB, WORK)


def one_driver_step() -> float:
    sent = MACHINE.step + MACHINE.put(B) + SENT + MACHINE.receive(B)
    return sent + 8 * (MACHINE.call + LATENCY + C + MACHINE.reply(B) + SENT) + 7 * MACHINE.add(B) + JOB.outer


def test_one_worker_of_the_driver() -> None:
    """Transfer and compute, one after the other."""
    assert run("driver").seconds_step == pytest.approx(one_driver_step(), rel=1e-12)


def test_driver_on_a_slow_link_is_its_card() -> None:
    """As many workers as shards: theta leaves the card W times, and only then W sums enter it."""
    link = Link(1e6)
    found = run("driver", 8, link=link)
    assert found.seconds_step == pytest.approx(16 * B / 1e6, rel=0.01)
    assert found.bottleneck == "driver's card"
    assert found.bytes_step == found.bytes_busiest == 16 * B
    assert found.busiest == "driver"


def test_one_worker_of_sharded_without_a_network() -> None:
    servers = 4
    fetched = MACHINE.step + 2 * MACHINE.receive(B)
    computed = 8 * (MACHINE.call + C + MACHINE.reply(B) + servers * MACHINE.message_driver)
    pieces = MACHINE.message + MACHINE.message_driver
    called = 2 * (servers * MACHINE.message_driver + MACHINE.message)
    stepped = 7 * MACHINE.add(B / servers) + JOB.outer / servers + MACHINE.put(B / servers)
    found = run("sharded", latency=0.0, link=Link(1e18), servers=servers)
    assert found.seconds_step == pytest.approx(fetched + computed + pieces + called + stepped, rel=1e-6)


def test_sharded_on_a_slow_link_is_its_servers_cards() -> None:
    """Each of four servers sends a quarter of theta to 8 workers and receives a quarter of 8 sums."""
    found = run("sharded", 8, link=Link(1e6), servers=4)
    assert found.seconds_step == pytest.approx(16 * B / 4 / 1e6, rel=0.05)
    assert found.bytes_busiest == pytest.approx(16 * B / 4)
    assert found.bottleneck == "servers' cards"
    more = run("sharded", 8, link=Link(1e6), servers=100)  # theta has 16 blocks
    assert more.seconds_step == run("sharded", 8, link=Link(1e6), servers=16).seconds_step


@pytest.mark.parametrize("workers", [1, 2, 8, 64])
def test_all_reduce(workers: int) -> None:
    mine = -(-8 // workers)
    alone = mine * C + (mine - 1) * MACHINE.add(B) + JOB.outer
    rounds = max(B / workers / RATE, MACHINE.ring(2 * B / workers) / 2) + LATENCY
    found = run("all-reduce", workers)
    assert found.seconds_step == pytest.approx(alone + 2 * (workers - 1) * rounds, rel=1e-12)
    assert found.bytes_step == pytest.approx(2 * (workers - 1) * B)
    assert found.bytes_busiest == pytest.approx(2 * 2 * (workers - 1) / workers * B)


def test_one_worker_of_async_is_the_driver_without_its_barrier() -> None:
    """The driver adds between shards what it else adds at the end, and a step's own work is the same."""
    expected = one_driver_step() + MACHINE.add(B)
    assert run("async").seconds_step == pytest.approx(expected, rel=1e-9)


def test_async_does_not_wait() -> None:
    uneven = Stragglers(0.8)
    found = {name: run(name, 8, stragglers=uneven, link=Link(1e18)) for name in ("driver", "async")}
    assert found["async"].tasks_per_second > 1.3 * found["driver"].tasks_per_second
    assert found["driver"].bottleneck == "stragglers"


def test_async_drops_what_is_too_old() -> None:
    fresh, stale = run("async", 24, max_staleness=4), run("async", 24, max_staleness=0)
    assert (fresh.working, stale.working) == (24, 8)
    assert fresh.dropped == 0
    assert stale.tasks_per_second <= fresh.tasks_per_second


def test_one_worker_of_local() -> None:
    steps = 5
    alone = 8 * C + 7 * MACHINE.add(B) + JOB.outer
    around = MACHINE.step + MACHINE.put(B) + MACHINE.call + LATENCY + SENT + MACHINE.receive(B)
    around += MACHINE.reply(B) + SENT + JOB.outer
    found = run("local", local_steps=steps)
    assert found.seconds_step == pytest.approx(alone + around / steps, rel=1e-12)


def test_one_machine_has_no_network_and_few_cores() -> None:
    here = Link(None)
    alone, two, four = (run("driver", workers, link=here) for workers in (1, 2, 4))
    assert alone.seconds_step == pytest.approx(one_driver_step() - 17 * LATENCY - 9 * B / RATE, rel=1e-9)
    assert two.seconds_step > 4 * C * MACHINE.slowdown[1]
    assert four.seconds_step > 4 * C * MACHINE.slowdown[1]  # two cores, whatever the workers
    assert two.seconds_step < alone.seconds_step


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "async"])
@settings(max_examples=15, deadline=None)
@given(
    rate=st.floats(1e5, 1e10),
    faster=st.floats(1, 100),
    latency=st.floats(0, 1e-2),
    workers=st.integers(1, 20),
)
def test_more_link_is_not_slower(
    strategy: str, rate: float, faster: float, latency: float, workers: int
) -> None:
    """Not of `async`, where gradients that meet at a card do so again and again: another link, other meetings."""
    slow, fast = (run(strategy, workers, link=Link(r), latency=latency) for r in (rate, rate * faster))
    most = slow.seconds_step * (1 + 1e-9)
    assert fast.seconds_step <= most
    assert run(strategy, workers, link=Link(rate), latency=0.0).seconds_step <= most
    assert 0 < slow.efficiency <= 1
    assert 0 < slow.share <= 1 + 1e-9


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_failures_cost(strategy: str) -> None:
    """More than nothing, the more the more there are; never more than everything. Where the driver is the limit, one
    worker less is no loss to it: here it is not."""
    free = replace(MACHINE, call_driver=0.0, step=0.0, add=NOTHING, put=NOTHING)
    job = replace(JOB, outer=0.0)
    rates = [
        simulate(
            strategy,
            replace(CLUSTER, workers=8, link=Link(1e18), failures_per_hour=failures),
            free,
            job,
            WORK,
        )
        for failures in (0, 2, 200, 1e6)
    ]
    assert rates[0].lost == 0
    assert rates[0].tasks_per_second > rates[1].tasks_per_second > rates[2].tasks_per_second
    assert rates[2].lost == pytest.approx(min(100 * rates[1].lost, 1.0))
    assert 0 <= rates[3].tasks_per_second < rates[2].tasks_per_second
    assert rates[0].seconds_step == rates[3].seconds_step


def test_going_back_costs_more_the_rarer_checkpoints_are() -> None:
    cluster = replace(CLUSTER, workers=8, failures_per_hour=2.0)
    often, rarely = (simulate("all-reduce", cluster, MACHINE, JOB, WORK, every) for every in (10, 1000))
    step = often.seconds_step
    assert often.lost == pytest.approx(2 / 3600 * (MACHINE.start + 5 * step))
    assert rarely.lost == pytest.approx(2 / 3600 * (MACHINE.start + 500 * step))
    assert [simulate("driver", cluster, MACHINE, JOB, WORK, every).lost for every in (10, 1000)] == [
        simulate("driver", cluster, MACHINE, JOB, WORK).lost
    ] * 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_seed_is_the_same_simulation(strategy: str) -> None:
    uneven = Stragglers(0.3)
    fast = Link(1e18)  # on a slow one, workers out of step share the driver's card better
    first, again, other = (run(strategy, 4, link=fast, stragglers=uneven, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first.seconds_step != other.seconds_step
    if strategy != "async":
        assert first.seconds_step > run(strategy, 4, link=fast).seconds_step


def test_computations_of_one_machine_slow_each_other() -> None:
    """As measured with so many at once; more than were measured are as slow as those."""
    free = replace(
        MACHINE, call=0.0, call_driver=0.0, put=NOTHING, receive=NOTHING, reply=NOTHING, add=NOTHING
    )
    large = replace(free, step=0.0, cores=16, slowdown=(1.0, 1.2, 1.5))
    job = replace(JOB, outer=0.0)
    for workers, slowdown in ((1, 1.0), (2, 1.2), (4, 1.5), (8, 1.5), (16, 1.5)):
        found = simulate("driver", Cluster(workers, Link(None)), large, job, WORK)
        assert found.seconds_step == pytest.approx(max(8 // workers, 1) * C * slowdown)
    shared = replace(CLUSTER, workers=8, per_node=2, link=Link(1e18), latency=0.0)
    assert simulate("driver", shared, large, job, WORK).seconds_step == pytest.approx(C * 1.2, rel=1e-6)


def test_workers_without_a_shard() -> None:
    found = run("driver", 4096, link=Link(1e18), latency=0.0)
    assert (found.working, found.idle) == (8, 4088)
    assert found.bottleneck == "8 shards: 4088 workers idle"
    cluster = replace(CLUSTER, workers=512, link=Link(1e18), latency=0.0)
    scaled = simulate("all-reduce", cluster, MACHINE, JOB, work_of(32, 8, 512, scale=True))
    assert (scaled.tasks_per_step, scaled.shards, scaled.idle) == (2048, 512, 0)
    assert scaled.bottleneck == "ring"
    assert scaled.tasks_per_second > 4 * found.tasks_per_second


def test_what_is_recommended() -> None:
    found = {name: run(name, 8) for name in STRATEGIES}

    def with_rates(*rates: float) -> str:
        pairs = zip(STRATEGIES, rates, strict=True)
        return recommended({name: replace(found[name], tasks_per_second=rate) for name, rate in pairs})

    assert with_rates(100, 105, 109, 149, 149) == "driver"
    assert with_rates(100, 115, 120, 149, 149) == "sharded"
    assert with_rates(100, 115, 130, 149, 190) == "all-reduce"
    assert with_rates(100, 100, 100, 160, 200) == "async"
    assert with_rates(100, 100, 100, 160, 300) == "local"
