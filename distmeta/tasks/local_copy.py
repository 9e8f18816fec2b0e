"""Data files on this machine: paths as they are, URIs copied once to the user's cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs

from distmeta.errors import InputError, first_line
from distmeta.files import replace_when_complete

_CHUNK = 1 << 22
"""Bytes that are copied at once."""


def find_local_copy(path: str, field: str) -> Path:
    """Return the local file of a path or URI. What a URI names is copied once per machine.

    The copy is ${XDG_CACHE_HOME:-~/.cache}/distmeta/HASH/NAME. HASH depends on the URI, its size and its time of
    change, so a file that was replaced is fetched again. Nothing is ever removed from the cache.

    Args:
        field: names the option in errors.

    Raises:
        InputError: there is no such file, or it cannot be fetched.
    """
    if "://" not in path:
        file = Path(path).expanduser()
        if not file.is_file():
            raise _path_error(field, path, "not a file" if file.exists() else "no such file")
        return file
    try:
        filesystem, inner_path = pyarrow.fs.FileSystem.from_uri(path)
        info = filesystem.get_file_info(inner_path)
        if info.type != pyarrow.fs.FileType.File:
            raise _path_error(field, path, "no such file")
        return _fetch_to_cache(filesystem, info, path, field)
    except (OSError, pa.ArrowException) as error:
        raise _path_error(field, path, f"cannot be fetched ({first_line(error)})") from None


def _fetch_to_cache(filesystem: Any, info: Any, uri: str, field: str) -> Path:
    """Return the cached copy. Of processes that start together, the first to get the lock makes it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distmeta"
    digest = hashlib.sha256(f"{uri}\n{info.size}\n{info.mtime_ns}".encode()).hexdigest()[:32]
    target = cache / digest / info.base_name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also if this process is killed
        if target.is_file():
            return target
        with replace_when_complete(target) as temporary:
            with filesystem.open_input_stream(info.path) as source, open(temporary, "wb") as copy:
                while chunk := source.read(_CHUNK):
                    copy.write(chunk)
            size = temporary.stat().st_size
            if size != info.size:
                raise _path_error(field, uri, f"got {size} bytes of {info.size}")
    return target


def _path_error(field: str, path: str, problem: str) -> InputError:
    return InputError(f"{field}: got {path!r}: {problem}; expected a file, or a URI such as s3://BUCKET/FILE")
