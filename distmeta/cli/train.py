"""`distmeta train`."""

from __future__ import annotations

import contextlib
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from distmeta.cli.options import Json, Overrides, separate_job
from distmeta.cli.output import INTERRUPTED, fail, print_json, print_note

if TYPE_CHECKING:
    from distmeta.config.job import Job
    from distmeta.runtime.interruption import InterruptedRun
    from distmeta.runtime.training import Run


def train(
    job: Annotated[
        str | None, typer.Argument(metavar="JOB", help="Job file; not needed with --resume RUN.")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(help="Run folder to resume; auto: the folder of run.name, if it exists.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a job and print its run folder."""
    from distmeta.cli.progress import TerminalReporter
    from distmeta.runtime import training
    from distmeta.runtime.interruption import InterruptedRun

    loaded = _load_job(job, overrides, resume)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints on stdout when workers die
            run = training.train(loaded, resume, TerminalReporter())
    except InterruptedRun as interruption:  # typer would turn it into an exit code without a message
        _report_interruption(interruption, as_json)
    if as_json:
        print_json({"run": run.place, "step": run.step, "loss": run.loss})
    else:
        _print_result(run)


def _load_job(job: str | None, overrides: list[str] | None, resume: str | None) -> Job:
    from distmeta.config.job import Job
    from distmeta.errors import InputError
    from distmeta.runtime.resume import find_run_folder

    path, changes = separate_job(job, overrides)
    if path is not None:
        return Job.load(path, changes)
    if resume is None or resume == "auto":
        raise InputError("JOB: missing, expected a job file (it is optional only with --resume RUN)")
    return Job.load(find_run_folder(resume) / "job.yaml", changes)


def _report_interruption(interruption: InterruptedRun, as_json: bool) -> NoReturn:
    print_note(f"interrupted: the state after step {interruption.step} is saved; resume with:")
    print_note(f"  distmeta train --resume {shlex.quote(interruption.folder)}")
    fields = {"run": interruption.folder, "step": interruption.step}
    fail(f"interrupted after step {interruption.step}", as_json, INTERRUPTED, fields, quiet=True)


def _print_result(run: Run) -> None:
    """Print the run folder on stdout; the result and the next command on stderr."""
    from distmeta.runtime.remote_copy import join

    loss = "none" if run.loss is None else f"{run.loss:.4f}"
    result = f"done: step {run.step}, loss {loss}"
    checkpoint = run.place
    if run.best is not None:
        result += f"; best validation score {run.best:.4f} at step {run.best_step}"
        checkpoint = join(run.place, "checkpoints", "best")
    print_note(result)
    print_note(f"next: distmeta evaluate {shlex.quote(checkpoint)}")
    print(run.place)
