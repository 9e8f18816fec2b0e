"""Errors that a user sees, and the text in them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence


class InputError(ValueError):
    """A mistake of the user's: `field: got …, expected …`. The command line prints it and exits with 2."""

    def __str__(self) -> str:
        """One line, whatever the input that it quotes."""
        return " ".join(super().__str__().splitlines())


class NumericsError(ArithmeticError):
    """A job that asked to stop at a non-finite meta-gradient (`run.on_nonfinite: stop`) met one."""


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """ " — did you mean 'x'?", or the known names when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    listed = sorted(known)
    return "known: " + ", ".join(listed[:12]) + (", …" if len(listed) > 12 else "")


def redact(text: str) -> str:
    """`text` without user:password in its addresses, and without credentials in their query strings."""
    text = re.sub(r"://\S*@", "://", text)
    secret = r"(?i)([?&](?:user|password|passwd|pwd|token|secret|[\w-]*key)=)[^&\s'\")]*"
    return re.sub(secret, r"\1***", text)
