"""`distmeta sweep`."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distmeta.cli.options import Json, Overrides, separate_job
from distmeta.cli.output import INTERRUPTED, fail, print_json, print_note

if TYPE_CHECKING:
    from distmeta.config.job import Job
    from distmeta.sweeps.run import SweepSummary


def sweep(
    job: Annotated[
        str | None,
        typer.Argument(metavar="JOB", help="Job file with a sweep section; not needed with --resume."),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(help="Folder of a sweep to resume.")] = None,
    as_json: Json = False,
) -> None:
    """Search the space of a job's sweep section with Ray Tune and print the sweep's folder."""
    from distmeta.cli.tables import SweepTable
    from distmeta.runtime.interruption import InterruptedRun
    from distmeta.sweeps import run as sweeps

    loaded = _load_job(job, overrides, resume)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints on stdout when workers die
            summary = sweeps.sweep(loaded, resume, SweepTable())
    except InterruptedRun as interruption:  # typer would turn it into an exit code without a message
        print_note("interrupted: finished trials and checkpoints are kept; resume with:")
        print_note(f"  distmeta sweep --resume {interruption.folder}")
        fail("interrupted", as_json, INTERRUPTED, {"sweep": interruption.folder}, quiet=True)
    if as_json:
        best_run = str(summary.best_run)
        print_json({"best_run": best_run, "best": summary.best, "trials": len(summary.trials)})
    else:
        _print_summary(summary)


def _load_job(job: str | None, overrides: list[str] | None, resume: str | None) -> Job:
    from distmeta.config.job import Job
    from distmeta.errors import InputError

    path, changes = separate_job(job, overrides)
    if path is not None:
        return Job.load(path, changes)
    if resume is None:
        raise InputError("JOB: missing, expected a job file (it is optional only with --resume FOLDER)")
    return Job.load(Path(resume) / "job.yaml", changes)


def _print_summary(summary: SweepSummary) -> None:
    """Print the sweep's folder on stdout; the result and the next command on stderr."""
    counts = Counter(trial.status for trial in summary.trials)
    ends = ", ".join(f"{count} {status}" for status, count in counts.items())
    steps = sum(trial.steps for trial in summary.trials)
    values = ", ".join(f"{key}={value}" for key, value in summary.best.items())
    print_note(f"done: {ends}; {steps} steps")
    print_note(f"best: {summary.metric} {summary.value:.4f} with {values} ({summary.best_run})")
    print_note(f"next: distmeta train {summary.folder}/sweep/best.yaml")
    print(summary.folder)
