"""`distmeta simulate`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distmeta.cli.options import Json, Overrides
from distmeta.cli.output import print_json, print_note

if TYPE_CHECKING:
    from distmeta.config.job import Job


def simulate(
    job: Annotated[str, typer.Argument(metavar="JOB")],
    overrides: Overrides = None,
    workers: Annotated[str, typer.Option(help="Numbers of workers.")] = "8,64,512,4096",
    link: Annotated[
        str, typer.Option(help="Rate of a network card, or local: only this machine.")
    ] = "10Gbit",
    latency: Annotated[str, typer.Option(help="Time of a message, one way.")] = "100us",
    workers_per_node: Annotated[int, typer.Option(help="Workers that share a network card.")] = 1,
    stragglers: Annotated[str, typer.Option(help="none or lognormal:SIGMA.")] = "none",
    failures_per_hour: Annotated[float, typer.Option(help="In the whole cluster.")] = 0.0,
    strategies: Annotated[str | None, typer.Option(help="Strategies to compare; all by default.")] = None,
    servers: Annotated[int | None, typer.Option(help="Of sharded; by default as in the job.")] = None,
    max_staleness: Annotated[
        int | None, typer.Option(help="Of async, in steps; by default as in the job.")
    ] = None,
    local_steps: Annotated[
        int | None, typer.Option(help="Of local: steps between averages; by default as in the job.")
    ] = None,
    scale_tasks: Annotated[
        bool, typer.Option("--scale-tasks", help="Use as many shards as workers, and more tasks.")
    ] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine's costs and write them to --costs.")
    ] = False,
    costs: Annotated[str, typer.Option(help="File of measured costs.")] = "costs.json",
    plot: Annotated[str | None, typer.Option(help="Picture to write.")] = None,
    as_json: Json = False,
) -> None:
    """Simulate a job's steps on clusters of other sizes under each strategy, and recommend one."""
    _require_simpy()
    from distmeta.config.job import Job
    from distmeta.simulation import report, settings
    from distmeta.simulation.comparison import compare_strategies, find_costs

    counts = settings.parse_workers(workers)
    names = settings.parse_strategies(strategies)
    loaded = Job.load(job, list(overrides or []))
    given = {"servers": servers, "max_staleness": max_staleness, "local_steps": local_steps}
    cluster = settings.ClusterSettings(
        workers=counts[0],
        link=settings.Link.parse(link),
        latency=settings.parse_latency(latency),
        workers_per_node=workers_per_node,
        stragglers=settings.Stragglers.parse(stragglers),
        failures_per_hour=failures_per_hour,
        **_choose_strategy_options(loaded, given),
    )
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints on stdout when workers die
        measured, job_costs = find_costs(loaded, Path(costs), calibrate, print_note)
    comparison = compare_strategies(
        loaded, measured, job_costs, cluster, counts, names, scale_tasks, print_note
    )
    if plot is not None:
        report.save_plot(comparison, Path(plot))
    if as_json:
        print_json(report.to_json(comparison))
        return
    from rich.console import Console

    report.print_comparison(comparison, Console(highlight=False))


def _require_simpy() -> None:
    """Raise an InputError that names the extra if simpy is not installed."""
    try:
        import simpy  # noqa: F401
    except ImportError:
        from distmeta.errors import InputError

        raise InputError(
            "distmeta simulate needs simpy, which is not installed: pip install 'distmeta[simulate]'"
        ) from None


def _choose_strategy_options(job: Job, given: Mapping[str, int | None]) -> dict[str, Any]:
    """Return the options of the simulated strategies: from the command line, else the job's, else their defaults."""
    from distmeta.config.catalog import STRATEGIES
    from distmeta.config.parts import import_part, list_default_options

    options: dict[str, Any] = {}
    for name in ("sharded", "async", "local"):
        options |= list_default_options(import_part("strategy.type", name, STRATEGIES))
    options |= job.strategy.options
    options |= {key: value for key, value in given.items() if value is not None}
    return {key: options[key] for key in given}
