"""What `distmeta simulate` shows: a table, what was assumed, a plot, a line of JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from distmeta.compute.vectors import BLOCK
from distmeta.config.parts import show_value
from distmeta.errors import InputError
from distmeta.simulation.cluster import LOCAL
from distmeta.simulation.model import WORTH, Outcome
from distmeta.simulation.study import Study

COLORS = {"driver": "C0", "sharded": "C2", "all-reduce": "C3", "async": "C1", "local": "C4"}


def show(study: Study, console: Console) -> None:
    own, shards = study.own, _of(study.own.shards, "shard")
    console.print(
        f"{study.job.name}: {own.parameters:,} parameters, {study.job.run.tasks_per_step} tasks a step in {shards}; "
        f"one process computes {_alone(study):,.4g} tasks/s",
        soft_wrap=True,
    )
    console.print(_table(study))
    for workers, name in study.recommended.items():
        found = study.outcomes[workers][name]
        same = study.same_steps[workers]
        console.print(
            f"{_of(workers, 'worker')}: {name}, bound by {found.bottleneck} ({found.share:.0%}); the busiest card is a "
            f"{found.busiest}'s: {found.bytes_busiest / 1e6:,.4g} MB a step"
            + (f"; of those that take the same steps: {same}" if same not in (None, name) else ""),
            soft_wrap=True,
        )
    console.print("\nassumed:")
    for line in assumptions(study):
        console.print(f"- {line}", soft_wrap=True)


def _alone(study: Study) -> float:
    """Tasks a second of one process that does nothing else."""
    shard = study.job.run.tasks_per_step / study.own.shards
    return shard / study.own.compute(shard)


def _table(study: Study) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("workers", justify="right", no_wrap=True)
    table.add_column("strategy", no_wrap=True)
    for column in ("s/step", "tasks/s", "efficient", "MB/step"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("bottleneck")
    for workers, found in study.outcomes.items():
        best = study.recommended[workers]
        for name, outcome in found.items():
            table.add_row(
                f"{workers:,}", f"{name} ←" if name == best else name, *_cells(outcome),
                style="bold" if name == best else "", end_section=name == list(found)[-1],
            )  # fmt: skip
    return table


def _of(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _cells(outcome: Outcome) -> list[str]:
    notes = [f"{outcome.bottleneck} {outcome.share:.0%}"]
    if outcome.dropped:
        notes.append(f"{outcome.dropped:.0%} dropped")
    if outcome.lost:
        notes.append(f"{outcome.lost:.2%} lost to failures")
    return [
        f"{outcome.seconds_step:.3g}",
        f"{outcome.tasks_per_second:,.4g}",
        f"{outcome.efficiency:.1%}",
        f"{outcome.bytes_step / 1e6:,.4g}",
        ", ".join(notes),
    ]


def assumptions(study: Study) -> Iterator[str]:
    """A line each."""
    cluster, own, machine, about = study.cluster, study.own, study.costs.machine, study.costs.about
    measured = f"{about.get('machine', 'a machine')}, {about.get('date', 'at some time')}"
    yield f"costs: measured on {measured}; workers, driver and servers are all as fast as that"
    if str(cluster.link) == LOCAL:
        yield (
            f"link: {LOCAL}: everything on one machine of {machine.cores} cores, through its object store, no network; "
            "computations share the cores and slow each other as measured"
        )
    else:
        yield (
            f"link: {cluster.link} in each direction of each network card, both at once, and "
            f"{1e6 * cluster.latency:g} us for a message; messages share a card evenly; no switch is ever full"
        )
        yield f"nodes: {_of(cluster.per_node, 'worker')} on each; the driver and every server have a node of their own"
    if study.scaled:
        yield "tasks: as many shards as workers at least, of the job's size: larger steps than the job's"
    else:
        yield (
            f"tasks: the job's {study.job.run.tasks_per_step} a step in {_of(own.shards, 'shard')}: more workers than "
            "that have nothing to do (--scale-tasks grows both)"
        )
    yield "driver: theta leaves its card once for each node, as all ask at once; each shard's sum comes back by itself"
    yield (
        f"sharded: {_of(cluster.servers, 'server')} (no more than theta has blocks of {BLOCK:,}); each shard's sum "
        "travels to them in slices, while the worker goes on; the driver sends integers"
    )
    yield "all-reduce: shards are dealt out, not taken; a ring over all workers, with work or without"
    yield (
        f"async: a step after every {_of(own.shards, 'shard')} that came; what is more than {cluster.max_staleness} "
        "steps old is dropped; tasks/s does not tell how much less a stale gradient teaches"
    )
    yield (
        f"local: as many replicas as workers, {_of(cluster.local_steps, 'step')} between averages, through the driver; "
        "tasks/s does not tell how much less they teach"
    )
    if cluster.stragglers.sigma:
        yield f"stragglers: {cluster.stragglers}, drawn anew for each shard; no shard is computed twice to save time"
    else:
        yield "stragglers: none"
    if cluster.failures_per_hour:
        every = study.job.run.checkpoint_every or study.job.run.steps
        yield (
            f"failures: {cluster.failures_per_hour:g} processes an hour in the whole cluster, whatever its size; the "
            f"next is ready after {machine.start:.1f} s; all-reduce, and sharded where it was a server, go back to the "
            f"last checkpoint (every {every} steps)"
        )
    yield "a step: one outer epoch, gradients in float32 (no run.compress); no evaluation, checkpoints, tracking"
    worth = ", ".join(f"{name} {times:g} times" for name, times in WORTH.items())
    yield f"recommended: the first in the table that none below it beats by enough in tasks/s: {worth}"


def as_json(study: Study) -> dict[str, Any]:
    """One line's worth: plain data, all numbers finite."""
    return {
        "job": study.job.name,
        "parameters": study.own.parameters,
        "link": str(study.cluster.link),
        "latency": study.cluster.latency,
        "recommended": {str(workers): name for workers, name in study.recommended.items()},
        "recommended_same_steps": {str(workers): name for workers, name in study.same_steps.items()},
        "outcomes": [asdict(one) for found in study.outcomes.values() for one in found.values()],
        "assumptions": list(assumptions(study)),
    }


def plot(study: Study, path: Path) -> None:
    """Tasks a second over the workers, a line a strategy, and what perfect scaling would give.

    Raises:
        InputError: matplotlib knows no such format, or the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    workers = list(study.outcomes)
    ideal = [count * _alone(study) for count in workers]
    axes.plot(workers, ideal, color="0.6", linestyle=":", label="nothing but computing")
    for name in study.outcomes[workers[0]]:
        rates = [study.outcomes[count][name].tasks_per_second for count in workers]
        axes.plot(workers, rates, marker="o", color=COLORS[name], label=name)
    best = [study.outcomes[count][name].tasks_per_second for count, name in study.recommended.items()]
    axes.plot(workers, best, "k*", markersize=11, linestyle="none", label="recommended", zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="workers", ylabel="tasks/s")
    axes.set_xticks(workers, [f"{count:,}" for count in workers])
    axes.minorticks_off()
    axes.set_title(f"{study.job.name}, {study.own.parameters:,} parameters, link {study.cluster.link}")
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot: got {show_value(str(path))}, which cannot be written ({error})") from None
    finally:
        pyplot.close(figure)
