"""Ctrl-C and SIGTERM: the step in flight is abandoned, the last completed state saved. A second one exits at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class InterruptedRun(KeyboardInterrupt):
    """The run was stopped from outside, and saved."""

    def __init__(self, folder: str, step: int):
        super().__init__(folder, step)
        self.folder, self.step = folder, step


class StopRequested(Exception):  # noqa: N818 - control flow inside the driver
    """Raised by `check` between shards once a signal came."""


@contextmanager
def interruptions() -> Iterator[Callable[[], None]]:
    """Catches SIGINT and SIGTERM within the block; yields `check`, which raises `StopRequested` after one.

    Outside the main thread, where Python allows no handlers, `check` does nothing.
    """
    asked = False

    def handle(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            os._exit(130)
        asked = True

    def check() -> None:
        if asked:
            raise StopRequested

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
