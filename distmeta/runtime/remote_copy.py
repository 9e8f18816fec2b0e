"""Runs behind a URI (`output: s3://BUCKET/PREFIX`): written on this machine, copied after each save, fetched to resume.

The copy has the layout of a run folder. A checkpoint is copied before `latest` or `best` names it, and deleted after
they name another one, so what they name is always complete. The file `writer` says which process copies. A process
that finds another one there stops copying. A URI's query (`?endpoint_override=…`) holds options of the file system.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import socket
from pathlib import Path
from typing import Any

from distmeta.errors import InputError, first_line, redact
from distmeta.files import lock_folder


def is_uri(path: str | Path) -> bool:
    """Return whether the path is the address of a store, not a path on this machine."""
    return "://" in str(path)


def join(uri: str, *names: str) -> str:
    """Return the URI of something below another URI."""
    base, query_mark, query = uri.partition("?")
    return "/".join([base.rstrip("/"), *names]) + query_mark + query


def run_uri(uri: str) -> str:
    """Return the URI of the run that a URI names, either directly or through one of its checkpoints."""
    base, query_mark, query = uri.partition("?")
    return base.partition("/checkpoints")[0].rstrip("/") + query_mark + query


def path_in_run(uri: str) -> str:
    """Return what a URI names within its run: "", "checkpoints/best", …"""
    base = uri.partition("?")[0].rstrip("/")
    run = run_uri(uri).partition("?")[0]
    return base[len(run) :].lstrip("/")


def local_folder(run: str) -> Path:
    """Return where a run is written on this machine: ${XDG_CACHE_HOME:-~/.cache}/distmeta/runs/HASH/NAME."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distmeta" / "runs"
    digest = hashlib.sha256(run.encode()).hexdigest()[:16]
    name = run.partition("?")[0].rsplit("/", 1)[-1]
    return cache / digest / name


def lock_dir(folder: Path, uri: str | None) -> Path:
    """Return where the lock of a run folder is: in the folder, or beside it if fetching replaces the whole folder."""
    return folder if uri is None else folder.parent


def read_pointer(run: str, name: str) -> str | None:
    """Return the name of the checkpoint that RUN/checkpoints/`name` points to, or None if there is no such file.

    Args:
        name: "latest" or "best".

    Raises:
        InputError: the store cannot be reached.
    """
    try:
        files, path = _open_store(join(run, "checkpoints", name))
        with files.open_input_stream(path) as stream:
            return stream.read().decode().strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{redact(run)}: cannot be read ({first_line(error)})") from None


def fetch_run(uri: str) -> Path:
    """Copy the run that a URI names to this machine, and return its folder.

    If the copy on this machine is ahead, because the last upload failed, it is kept.

    Raises:
        InputError: there is no such run, it cannot be read, or a process on this machine writes to it.
    """
    run = run_uri(uri)
    folder = local_folder(run)
    latest = read_pointer(run, "latest")
    if latest is None:
        raise _no_checkpoint(uri)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder, lock_dir(folder, run)):
        local_latest = folder / "checkpoints" / "latest"
        if local_latest.is_file() and local_latest.read_text().strip() > latest:
            return folder
        part = folder.with_name(f".fetching-{folder.name}-{os.getpid()}")
        shutil.rmtree(part, ignore_errors=True)
        _download(run, part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    return folder


def fetch_checkpoint(uri: str, target: Path) -> Path:
    """Copy the one checkpoint that a URI names (as in `checkpoint.find`) to a folder in `target`; return the folder.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    run = run_uri(uri)
    last_part = uri.partition("?")[0].rstrip("/").rsplit("/", 1)[-1]
    if last_part.startswith("step-"):
        name: str | None = last_part
    else:
        name = read_pointer(run, "best" if last_part == "best" else "latest")
    if name is None or "/" in name:
        raise _no_checkpoint(uri)
    return _download(join(run, "checkpoints", name), target / name)


class RemoteCopy:
    """Keeps the copy of one run up to date. It remembers which checkpoints it has uploaded."""

    def __init__(self, run: str, folder: Path):
        self.run = run
        self.failure = ""
        """Why the last upload failed; empty if it did not."""
        self._folder = folder
        self._writer_id = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
        self._is_writer = False
        self._uploaded: dict[str, int] = {}
        """Name of a checkpoint -> modification time of its state file when it was uploaded, in nanoseconds."""

    def update(self) -> bool:
        """Upload what is new. Return whether everything arrived; what did not is tried again by the next call."""
        try:
            self._update()
            self.failure = ""
        except OSError as error:
            self.failure = (
                f"{redact(self.run)} cannot be written ({first_line(error)}); the run is in {self._folder}"
            )
        return not self.failure

    def _claim(self) -> None:
        """Become the run's writer, or check that this process still is.

        Raises:
            OSError: another process has resumed the run in the meantime, or the store cannot be reached.
        """
        files, path = _open_store(join(self.run, "writer"))
        if self._is_writer and files.get_file_info(path).is_file:
            with files.open_input_stream(path) as stream:
                writer = stream.read().decode()
            if writer != self._writer_id:
                host = writer.split(" ")[0]
                raise OSError(f"another process has resumed the run since, on {host}")
            return
        _make_parent(files, path)
        with files.open_output_stream(path) as stream:
            stream.write(self._writer_id.encode())
        self._is_writer = True

    def _update(self) -> None:
        self._claim()
        checkpoints = self._folder / "checkpoints"
        modified = {
            path.parent.name: path.stat().st_mtime_ns for path in checkpoints.glob("step-*/state.json")
        }
        for name, time_ns in modified.items():
            if self._uploaded.get(name) != time_ns:
                _upload(checkpoints / name, join(self.run, "checkpoints", name))
                self._uploaded[name] = time_ns
        pointers = [path for path in (checkpoints / "latest", checkpoints / "best") if path.exists()]
        for path in (self._folder / "metrics.jsonl", self._folder / "job.yaml", *pointers):
            if path.exists():
                _upload(path, join(self.run, str(path.relative_to(self._folder))))
        self._delete_others(set(modified) | {path.name for path in pointers})

    def _delete_others(self, kept: set[str]) -> None:
        """Delete what is in the copy's checkpoint folder, except these names."""
        from pyarrow.fs import FileSelector, FileType

        files, path = _open_store(join(self.run, "checkpoints"))
        for info in files.get_file_info(FileSelector(path, allow_not_found=True)):
            if info.base_name in kept:
                continue
            if info.type == FileType.Directory:
                files.delete_dir(info.path)
                self._uploaded.pop(info.base_name, None)
            else:
                files.delete_file(info.path)


def _no_checkpoint(uri: str) -> InputError:
    return InputError(f"{redact(uri)}: got no checkpoint, expected a run folder or RUN/checkpoints/step-…")


def _open_store(uri: str) -> tuple[Any, str]:
    """Return the file system that a URI is in, and the path within it.

    Raises:
        InputError: the URI is not one of a file system that pyarrow knows.
    """
    import pyarrow
    from pyarrow.fs import FileSystem

    try:
        return FileSystem.from_uri(uri)
    except (ValueError, pyarrow.ArrowException) as error:
        raise InputError(
            f"{redact(uri)}: {first_line(error)}; expected a URI such as s3://BUCKET/PREFIX or gs://…"
        ) from None


def _upload(source: Path, uri: str) -> None:
    from pyarrow.fs import LocalFileSystem, copy_files

    files, path = _open_store(uri)
    _make_parent(files, f"{path}/." if source.is_dir() else path)
    copy_files(str(source), path, source_filesystem=LocalFileSystem(), destination_filesystem=files)


def _make_parent(files: Any, path: str) -> None:
    """Make the folder that a file is to be in. Object stores have no folders."""
    from pyarrow.fs import LocalFileSystem

    if isinstance(files, LocalFileSystem):
        files.create_dir(path.rpartition("/")[0], recursive=True)


def _download(uri: str, target: Path) -> Path:
    from pyarrow.fs import LocalFileSystem, copy_files

    target.mkdir(parents=True)
    files, path = _open_store(uri)
    try:
        copy_files(path, str(target), source_filesystem=files, destination_filesystem=LocalFileSystem())
    except FileNotFoundError:
        raise _no_checkpoint(uri) from None
    except OSError as error:
        raise InputError(f"{redact(uri)}: cannot be read ({first_line(error)})") from None
    return target
