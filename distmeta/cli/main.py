"""The `distmeta` program: its commands, one module each, and its exit codes.

Exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted.

`--help` must answer at once. So these modules import torch, Ray and MLflow only inside a command.
"""

from __future__ import annotations

import sys
from typing import NoReturn, Protocol, runtime_checkable

import typer

from distmeta.cli import data
from distmeta.cli.check import check
from distmeta.cli.evaluate import evaluate
from distmeta.cli.output import FAILED, INTERRUPTED, WRONG_INPUT, fail
from distmeta.cli.simulate import simulate
from distmeta.cli.submit import submit
from distmeta.cli.sweep import sweep
from distmeta.cli.train import train

app = typer.Typer(
    help="Distributed meta-training: one job file, any number of workers, bit-identical results.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (train, evaluate, sweep, submit, simulate, check):
    app.command()(command)
app.add_typer(data.app, name="data")


@runtime_checkable
class UsageError(Protocol):
    """A wrong command line, as click raises it.

    The class itself has no fixed place: typer 0.29 contains its own click, earlier versions import the package.
    """

    def format_message(self) -> str: ...


def main() -> NoReturn:
    """Run a command and exit with its code."""
    as_json = "--json" in sys.argv[1:]
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        _handle(error, as_json)
    if code == INTERRUPTED:  # typer returns it after a Ctrl-C that the command did not handle
        fail("interrupted", as_json, INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _handle(error: Exception, as_json: bool) -> NoReturn:
    """Print an error in one line and exit. Only a failure that the user cannot have caused prints a traceback."""
    if isinstance(error, typer.Exit):
        sys.exit(error.exit_code)
    if isinstance(error, typer.Abort):
        fail("interrupted", as_json, INTERRUPTED)
    if isinstance(error, UsageError):
        message = error.format_message()
        fail(message, as_json, WRONG_INPUT, quiet=not message)  # without a message typer printed the help

    from distmeta.errors import InputError

    if isinstance(error, InputError):
        fail(str(error), as_json, WRONG_INPUT)
    if not _is_expected(error):
        import traceback

        traceback.print_exc()
    fail(f"{type(error).__name__}: {error}", as_json, FAILED)


def _is_expected(error: Exception) -> bool:
    """Return whether the error's message says everything: no traceback is needed to find the cause."""
    from distmeta.errors import NumericsError
    from distmeta.runtime.checkpoint import SaveError
    from distmeta.runtime.failure_policy import LostShardError
    from distmeta.sweeps import NothingFoundError

    return isinstance(error, (NumericsError, LostShardError, SaveError, NothingFoundError))


if __name__ == "__main__":
    main()
