"""The parameters that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="Changes to the job.")]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON on stdout and nothing else.")]


def separate_job(job: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """Return the job's name and the overrides.

    With `--resume` the job may be left out. Then typer takes the first `key=value` for the job.
    """
    given = list(overrides or [])
    if job is not None and "=" in job:
        return None, [job, *given]
    return job, given
