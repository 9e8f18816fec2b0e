"""`distmeta evaluate`."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from distmeta.cli.options import Json, Overrides
from distmeta.cli.output import print_json, print_note


def evaluate(
    checkpoint: Annotated[str, typer.Argument(metavar="RUN_OR_CHECKPOINT")],
    overrides: Overrides = None,
    episodes: Annotated[str | None, typer.Option(help="Parquet file of fixed episodes.")] = None,
    predictions: Annotated[
        str | None, typer.Option(help="Parquet file to write: episode, row, label, prediction.")
    ] = None,
    figures: Annotated[
        str | None, typer.Option(help="Folder to write: scores, plots. The run's tracker gets them too.")
    ] = None,
    video: Annotated[
        str | None, typer.Option(help=".gif or .mp4 to write: a gym task before and after adaptation.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Adapt to unseen tasks and score before and after each inner step, with 95 % intervals."""
    from rich.console import Console

    from distmeta.cli.tables import build_evaluation_table
    from distmeta.evaluation import evaluate as evaluation

    with contextlib.redirect_stdout(sys.stderr):  # Ray prints on stdout when workers die
        result = evaluation.evaluate(
            checkpoint, overrides or [], episodes, predictions, figures, video, report=print_note
        )
    if as_json:
        curves = {"curve": result.curve, "curve_ci95": result.curve_ci95}
        print_json({"tasks": result.tasks, **result.figures, "ci95": result.ci95, **curves})
    else:
        Console(highlight=False).print(build_evaluation_table(result))
