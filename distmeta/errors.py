"""Errors that a user sees, and helpers for the text in them."""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Sequence
from pathlib import Path

LONGEST_LINE = 300
"""Characters of another program's error message that we repeat."""
PACKAGE = str(Path(__file__).parent)
"""The folder of distmeta's own code."""
MOST_NAMES = 12
"""Known names that an error message lists."""


class InputError(ValueError):
    """A mistake in what the user gave us: `field: got …, expected …`. The command line prints it and exits with 2."""

    def __str__(self) -> str:
        """Return the message as one line, even if it quotes an input with line breaks."""
        return " ".join(super().__str__().splitlines())


class NumericsError(ArithmeticError):
    """A meta-gradient was not finite, and the job asks to stop then (`run.on_nonfinite: stop`)."""


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return "did you mean 'x'?", or the list of known names if none is similar."""
    close = difflib.get_close_matches(name, list(known), n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + shorten_list(sorted(known))


def shorten_list(names: Sequence[str]) -> str:
    """Return the first names, and … if there are more."""
    return ", ".join(names[:MOST_NAMES]) + (", …" if len(names) > MOST_NAMES else "")


def redact(text: str) -> str:
    """Return the text without user:password in addresses and without credentials in query strings."""
    text = re.sub(r"://\S*@", "://", text)
    secret = r"(?i)([?&](?:user|password|passwd|pwd|token|secret|[\w-]*key)=)[^&\s'\")]*"
    return re.sub(secret, r"\1***", text)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most `LONGEST_LINE` characters and without credentials.

    An error without a message is named by its type.
    """
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return redact(lines[0].strip())[:LONGEST_LINE]


def describe_failure(error: BaseException) -> str:
    """Return `Type: first line of the message (file:line)`, with the innermost line of the user's own code.

    Lines of installed packages and of distmeta are passed over. Without a line of the user's, there is no place.
    """
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if "site-packages" not in frame.filename and not frame.filename.startswith((PACKAGE, "<frozen")):
            place = f" ({frame.filename}:{frame.lineno})"
    return summarize_error(error) + place


def summarize_error(error: BaseException) -> str:
    """Return `Type: first line of the message`, for logs and for errors that name another one as their cause."""
    name = type(error).__name__
    line = first_line(error)
    return name if line == name else f"{name}: {line}"
