"""What `distmeta simulate` shows: a table, the assumptions, a plot, one line of JSON."""

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
from distmeta.simulation.comparison import StrategyComparison
from distmeta.simulation.prediction import REQUIRED_GAIN, Prediction
from distmeta.simulation.settings import LOCAL

COLORS = {"driver": "C0", "sharded": "C2", "all-reduce": "C3", "async": "C1", "local": "C4"}


def print_comparison(comparison: StrategyComparison, console: Console) -> None:
    """Print the table, the recommendations and the assumptions."""
    costs = comparison.job_costs
    tasks = comparison.job.run.tasks_per_step
    console.print(
        f"{comparison.job.name}: {costs.parameters:,} parameters, {tasks} tasks per step in "
        f"{count_things(costs.shards, 'shard')}; "
        f"one process computes {compute_single_rate(comparison):,.4g} tasks/s",
        soft_wrap=True,
    )
    console.print(build_table(comparison))
    for workers in comparison.recommended:
        console.print(describe_recommendation(comparison, workers), soft_wrap=True)
    console.print("\nassumptions:")
    for line in list_assumptions(comparison):
        console.print(f"- {line}", soft_wrap=True)


def describe_recommendation(comparison: StrategyComparison, workers: int) -> str:
    name = comparison.recommended[workers]
    found = comparison.predictions[workers][name]
    text = (
        f"{count_things(workers, 'worker')}: {name}, limited by {found.bottleneck} ({found.share:.0%}); the busiest "
        f"network card is a {found.busiest}'s: {found.bytes_busiest / 1e6:,.4g} MB per step"
    )
    same_steps = comparison.recommended_same_steps[workers]
    if same_steps not in (None, name):
        text += f"; of the strategies that take the same steps: {same_steps}"
    return text


def compute_single_rate(comparison: StrategyComparison) -> float:
    """Return the tasks per second of a single process that does nothing else."""
    tasks = comparison.job.run.tasks_per_step / comparison.job_costs.shards
    return tasks / comparison.job_costs.compute_seconds(tasks)


def build_table(comparison: StrategyComparison) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("workers", justify="right", no_wrap=True)
    table.add_column("strategy", no_wrap=True)
    for column in ("s/step", "tasks/s", "efficient", "MB/step"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("bottleneck")
    for workers, predictions in comparison.predictions.items():
        recommended = comparison.recommended[workers]
        last = list(predictions)[-1]
        for name, prediction in predictions.items():
            is_best = name == recommended
            title = f"{name} ←" if is_best else name
            style = "bold" if is_best else ""
            cells = format_cells(prediction)
            table.add_row(f"{workers:,}", title, *cells, style=style, end_section=name == last)
    return table


def count_things(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def format_cells(prediction: Prediction) -> list[str]:
    notes = [f"{prediction.bottleneck} {prediction.share:.0%}"]
    if prediction.dropped:
        notes.append(f"{prediction.dropped:.0%} dropped")
    if prediction.lost:
        notes.append(f"{prediction.lost:.2%} lost to failures")
    return [
        f"{prediction.seconds_step:.3g}",
        f"{prediction.tasks_per_second:,.4g}",
        f"{prediction.efficiency:.1%}",
        f"{prediction.bytes_step / 1e6:,.4g}",
        ", ".join(notes),
    ]


def list_assumptions(comparison: StrategyComparison) -> Iterator[str]:
    """Yield one line per assumption."""
    settings = comparison.settings
    costs = comparison.job_costs
    about = comparison.costs.about
    measured = f"{about.get('machine', 'a machine')}, {about.get('date', 'at an unknown time')}"
    yield f"costs: measured on {measured}; workers, driver and servers are all as fast as that"
    yield from _list_network_assumptions(comparison)
    if comparison.scaled:
        yield "tasks: at least as many shards as workers, of the job's size: the steps are larger than the job's"
    else:
        yield (
            f"tasks: the job's {comparison.job.run.tasks_per_step} per step in {count_things(costs.shards, 'shard')}: "
            "further workers have nothing to do (--scale-tasks increases both)"
        )
    yield "driver: theta leaves its card once per node, to all at the same time; each shard's sum returns separately"
    yield (
        f"sharded: {count_things(settings.servers, 'server')} (at most one per block of {BLOCK:,} elements of theta); "
        "each shard's sum goes to them in slices while the worker continues; the driver sends integers"
    )
    yield "all-reduce: shards are dealt out before the step; a ring over all workers, also those without a shard"
    yield (
        f"async: a step after every {count_things(costs.shards, 'shard')} that arrive; gradients that are more than "
        f"{settings.max_staleness} steps old are dropped; tasks/s does not show how much less a stale gradient teaches"
    )
    yield (
        f"local: as many replicas as workers, {count_things(settings.local_steps, 'step')} between averages, through "
        "the driver; tasks/s does not show how much less they teach"
    )
    if settings.stragglers.sigma:
        yield f"stragglers: {settings.stragglers}, drawn for each shard; no shard is computed twice to save time"
    else:
        yield "stragglers: none"
    if settings.failures_per_hour:
        yield _describe_failures(comparison)
    yield "a step: one outer epoch, gradients in float32 (no strategy.compress); no evaluation, checkpoints, tracking"
    gains = ", ".join(f"{name} {gain:g} times" for name, gain in REQUIRED_GAIN.items())
    yield f"recommended: the first in the table that none below it beats by enough in tasks/s: {gains}"


def _list_network_assumptions(comparison: StrategyComparison) -> Iterator[str]:
    settings = comparison.settings
    if str(settings.link) == LOCAL:
        yield (
            f"link: {LOCAL}: everything on one machine of {comparison.costs.machine.cores} cores, through its object "
            "store, without a network; computations share the cores and slow each other down as measured"
        )
        return
    yield (
        f"link: {settings.link} in each direction of each network card, both at the same time, and "
        f"{1e6 * settings.latency:g} us per message; messages share a card evenly; switches are never full"
    )
    yield (
        f"nodes: {count_things(settings.workers_per_node, 'worker')} on each; the driver and every server have "
        "separate nodes"
    )


def _describe_failures(comparison: StrategyComparison) -> str:
    run = comparison.job.run
    every = run.checkpoint_every or run.steps
    return (
        f"failures: {comparison.settings.failures_per_hour:g} processes per hour in the whole cluster, whatever its "
        f"size; a new one is ready after {comparison.costs.machine.start:.1f} s; all-reduce, and sharded if it lost a "
        f"server, go back to the last checkpoint (every {every} steps)"
    )


def to_json(comparison: StrategyComparison) -> dict[str, Any]:
    """Return the comparison as plain data. All numbers are finite."""
    same_steps = comparison.recommended_same_steps
    rows = [prediction for found in comparison.predictions.values() for prediction in found.values()]
    return {
        "job": comparison.job.name,
        "parameters": comparison.job_costs.parameters,
        "link": str(comparison.settings.link),
        "latency": comparison.settings.latency,
        "recommended": {str(workers): name for workers, name in comparison.recommended.items()},
        "recommended_same_steps": {str(workers): name for workers, name in same_steps.items()},
        "outcomes": [asdict(row) for row in rows],
        "assumptions": list(list_assumptions(comparison)),
    }


def save_plot(comparison: StrategyComparison, path: Path) -> None:
    """Plot tasks per second against workers, one line per strategy, and perfect scaling.

    Raises:
        InputError: matplotlib does not know the format, or the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    predictions = comparison.predictions
    workers = list(predictions)
    ideal = [count * compute_single_rate(comparison) for count in workers]
    axes.plot(workers, ideal, color="0.6", linestyle=":", label="perfect scaling")
    for name in predictions[workers[0]]:
        rates = [predictions[count][name].tasks_per_second for count in workers]
        axes.plot(workers, rates, marker="o", color=COLORS[name], label=name)
    best = [predictions[count][name].tasks_per_second for count, name in comparison.recommended.items()]
    axes.plot(workers, best, "k*", markersize=11, linestyle="none", label="recommended", zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="workers", ylabel="tasks/s")
    axes.set_xticks(workers, [f"{count:,}" for count in workers])
    axes.minorticks_off()
    parameters = comparison.job_costs.parameters
    axes.set_title(f"{comparison.job.name}, {parameters:,} parameters, link {comparison.settings.link}")
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot: got {show_value(str(path))}, which cannot be written ({error})") from None
