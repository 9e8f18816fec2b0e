"""Files written whole or not at all, locks, and values as JSON has them."""

from __future__ import annotations

import fcntl
import math
import os
from pathlib import Path
from typing import IO, Any

from distmeta.errors import InputError


def write_atomically(path: Path, text: str) -> None:
    """A text file that is there as a whole or not at all, also where the machine dies."""
    part = path.with_name(f".writing-{path.name}")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Makes a file or a folder's entries durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class FolderInUseError(InputError):
    """Another process writes there."""


def lock_folder(folder: Path, place: Path) -> IO[str]:
    """A lock on a run folder for as long as the file is open; the kernel gives it back however a process ends.

    Args:
        place: the folder that holds the lock's file: the run folder itself, or what lasts when it is replaced.

    Raises:
        FolderInUseError: another process has it.
    """
    file = (place / ".lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise FolderInUseError(f"run.name: the run folder {folder} is in use by another process") from None
    except OSError:
        pass  # a file system without locks
    return file


def to_json_value(value: Any) -> Any:
    """The value with null for numbers that JSON has not: NaN, infinities."""
    if isinstance(value, dict):
        return {key: to_json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
