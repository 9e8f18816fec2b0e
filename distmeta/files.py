"""Atomic writes, the lock on a run folder, and values for JSON."""

from __future__ import annotations

import fcntl
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from distmeta.errors import InputError


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that appears as a whole or not at all, even if the machine loses power."""
    part = path.with_name(f".writing-{path.name}")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    flush_to_disk(path.parent)


@contextmanager
def replace_when_complete(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`. Its file replaces `target` if the block succeeds, else it is removed."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class FolderInUseError(InputError):
    """Another process writes to the folder."""


def lock_folder(folder: Path, lock_dir: Path) -> IO[str]:
    """Lock a run folder until the returned file is closed. The kernel releases the lock however the process ends.

    On a file system without locks nothing is locked.

    Args:
        folder: the run folder; the error names it.
        lock_dir: folder of the lock file: the run folder itself, or its parent if the run folder may be replaced.

    Raises:
        FolderInUseError: another process holds the lock.
    """
    file = (lock_dir / ".lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise FolderInUseError(f"run.name: the run folder {folder} is in use by another process") from None
    except OSError:
        pass  # a file system without locks
    return file


def to_json_value(value: Any) -> Any:
    """Return the value with None in place of numbers that JSON does not have (NaN, infinities)."""
    if isinstance(value, dict):
        return {key: to_json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


PACKAGE = "package:"
"""Begins the name of a folder inside an installed Python package."""


def find_model_files(field: str, name: str) -> str:
    """Return the folder that a name means, or the name itself if it is one on the hub.

    Raises:
        InputError: there is no such package or folder.
    """
    if name.startswith(PACKAGE):
        package, _, inside = name.removeprefix(PACKAGE).partition("/")
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise InputError(f"{field}: got {name!r}, expected an installed package: pip install {package}")
        folder = Path(spec.origin).parent / inside
    elif name.startswith((".", "/", "~")):
        folder = Path(name).expanduser()
    else:
        return name if not Path(name).is_dir() else str(Path(name))
    if not folder.is_dir():
        raise InputError(f"{field}: got {name!r}, expected an existing folder ({folder})")
    return str(folder)
