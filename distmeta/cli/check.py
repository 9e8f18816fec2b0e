"""`distmeta check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distmeta.cli.options import Json
from distmeta.cli.output import print_json, print_note


def check(
    jobs: Annotated[list[str], typer.Argument(metavar="JOB... [key=value]...")],
    run_one_task: Annotated[
        bool,
        typer.Option(
            "--run-one-task", help="Also run one task: capabilities, shapes, purity, dtype, time, memory."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Validate one or many jobs without running them."""
    from distmeta.config.job import Job
    from distmeta.errors import InputError

    overrides = [text for text in jobs if "=" in text and not Path(text).exists()]
    paths = [text for text in jobs if text not in overrides]
    if not paths:
        raise InputError("JOB: missing, expected at least one job file")
    for path in paths:
        job = Job.load(path, overrides)
        if run_one_task:
            from distmeta.evaluation import one_task

            for line in one_task.run_one_task(job):
                print_note(f"{path}: {line}")
        elif not as_json:
            print(f"{path}: ok")
    if as_json:
        print_json({"jobs": len(paths)})
