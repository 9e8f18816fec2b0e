"""How a command answers: its result on stdout, notes and errors on stderr, and its exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

FAILED = 1
WRONG_INPUT = 2
INTERRUPTED = 130


def print_json(value: Mapping[str, Any]) -> None:
    """Print one line of JSON on stdout. NaN and infinities become null."""
    from distmeta.files import to_json_value

    print(json.dumps(to_json_value(dict(value)), default=str), flush=True)


def print_note(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_log(text: str) -> None:
    """Print a piece of a log on stderr. It contains its own line ends."""
    print(text, end="", file=sys.stderr, flush=True)


def fail(
    message: str, as_json: bool, code: int, fields: Mapping[str, Any] | None = None, quiet: bool = False
) -> NoReturn:
    """End the program with an exit code and a one-line error.

    Args:
        as_json: print `{"error": …}` on stdout instead of a line on stderr.
        code: `FAILED`, `WRONG_INPUT` or `INTERRUPTED`.
        fields: what the JSON line contains besides the error.
        quiet: do not print the line on stderr; the user has seen the reason already.
    """
    line = " ".join(message.split())
    if as_json:
        print_json({"error": line, **(fields or {})})
    elif not quiet:
        print_note(f"error: {line}")
    sys.exit(code)
