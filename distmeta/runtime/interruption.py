"""Ctrl-C and SIGTERM: the run abandons the step in progress and saves the last completed state.

A second signal exits at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class InterruptedRun(KeyboardInterrupt):
    """The run was stopped by a signal, and saved."""

    def __init__(self, folder: str, step: int):
        super().__init__(folder, step)
        self.folder = folder
        self.step = step


class StopRequested(Exception):  # noqa: N818 - control flow within the driver
    """Raised between shards after a signal, to abandon the step."""


@contextmanager
def catch_signals() -> Iterator[threading.Event]:
    """Catch SIGINT and SIGTERM in the block; yield the event that the first one sets.

    Outside the main thread, where Python allows no handlers, nothing sets it.
    """
    stop = threading.Event()

    def handle(signum: int, frame: Any) -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handlers = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
