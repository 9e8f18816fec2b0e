"""`distmeta simulate`. Nothing heavy is imported before it runs."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

COSTS = "costs.json"


def simulate(
    job: Annotated[str, typer.Argument(metavar="JOB")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Changes to the job.")
    ] = None,
    workers: Annotated[str, typer.Option(help="Numbers of workers.")] = "8,64,512,4096",
    link: Annotated[
        str, typer.Option(help="Rate of a network card, or local: this machine's own.")
    ] = "10Gbit",
    latency: Annotated[str, typer.Option(help="Of a message, one way.")] = "100us",
    workers_per_node: Annotated[int, typer.Option(help="That share a network card.")] = 1,
    stragglers: Annotated[str, typer.Option(help="none or lognormal:SIGMA.")] = "none",
    failures_per_hour: Annotated[float, typer.Option(help="In the whole cluster.")] = 0.0,
    strategies: Annotated[str | None, typer.Option(help="Those to compare; by default all.")] = None,
    servers: Annotated[int | None, typer.Option(help="Of sharded; by default as in the job.")] = None,
    max_staleness: Annotated[int | None, typer.Option(help="Of async, in steps; as in the job.")] = None,
    local_steps: Annotated[
        int | None, typer.Option(help="Of local: steps between averages; as in the job.")
    ] = None,
    scale_tasks: Annotated[
        bool, typer.Option("--scale-tasks", help="As many shards as workers, and tasks with them.")
    ] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine's costs; writes them to --costs.")
    ] = False,
    costs: Annotated[str, typer.Option(help="File of measured costs.")] = COSTS,
    plot: Annotated[str | None, typer.Option(help="Picture to write.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One line of JSON on stdout, nothing else.")
    ] = False,
) -> None:
    """Simulate a job's steps on clusters of other sizes, under each strategy; recommends one."""
    from distmeta.config.catalog import STRATEGIES
    from distmeta.config.job import Job
    from distmeta.config.parts import default_options, import_part
    from distmeta.simulation import cluster as clusters
    from distmeta.simulation import report
    from distmeta.simulation.study import costs_of, study

    counts = clusters.parse_workers(workers)
    names = clusters.parse_strategies(strategies)
    loaded = Job.load(job, list(overrides or []))
    own: dict[str, Any] = {}
    for name in ("sharded", "async", "local"):
        own |= default_options(import_part("strategy.type", name, STRATEGIES))
    own |= loaded.strategy.options
    given = {"servers": servers, "max_staleness": max_staleness, "local_steps": local_steps}
    own |= {key: value for key, value in given.items() if value is not None}
    asked = clusters.Cluster(
        counts[0],
        clusters.Link.parse(link),
        clusters.parse_latency(latency),
        workers_per_node,
        clusters.Stragglers.parse(stragglers),
        failures_per_hour,
        own["servers"],
        own["max_staleness"],
        own["local_steps"],
    )
    with contextlib.redirect_stdout(sys.stderr):  # Ray tells there of workers that died, in its own words
        found, measured = costs_of(loaded, Path(costs), calibrate, _note)
    result = study(loaded, found, measured, asked, counts, names, scale_tasks, _note)
    if plot is not None:
        report.plot(result, Path(plot))
    if as_json:
        print(json.dumps(report.as_json(result)), flush=True)
        return
    from rich.console import Console

    report.show(result, Console(highlight=False))


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
