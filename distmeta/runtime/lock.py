"""One writer a run folder."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from distmeta.core import InputError


class FolderInUseError(InputError):
    """Another process writes there."""


def locked(folder: Path, place: Path) -> IO[str]:
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
