"""Runs behind a URI (`output: s3://BUCKET/PREFIX`): written here, copied there after each save, fetched to go on.

The copy has the layout of a run folder. A checkpoint is copied before `latest` or `best` names it, and deleted after
they name another: what they name is always whole. RUN/writer says which process copies; one that finds another there
stops copying. A URI's query (`?endpoint_override=…`) is the file system's.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import socket
from pathlib import Path
from typing import Any

from distmeta.errors import InputError, redact
from distmeta.files import lock_folder


def is_uri(path: str | Path) -> bool:
    return "://" in str(path)


def join(uri: str, *names: str) -> str:
    """The URI of something below another."""
    base, query, rest = uri.partition("?")
    return "/".join([base.rstrip("/"), *names]) + query + rest


def run_of(uri: str) -> str:
    """The run that a URI names, itself or by one of its checkpoints."""
    base, query, rest = uri.partition("?")
    return base.partition("/checkpoints")[0].rstrip("/") + query + rest


def below_run(uri: str) -> str:
    """What of its run a URI names: "", "checkpoints/best", …"""
    base = uri.partition("?")[0].rstrip("/")
    return base[len(run_of(uri).partition("?")[0]) :].lstrip("/")


def local_folder(run: str) -> Path:
    """Where a run is written on this machine: ${XDG_CACHE_HOME:-~/.cache}/distmeta/runs/HASH/NAME."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distmeta" / "runs"
    digest = hashlib.sha256(run.encode()).hexdigest()[:16]
    return cache / digest / run.partition("?")[0].rsplit("/", 1)[-1]


def lock_place(folder: Path, uri: str | None) -> Path:
    """Where the lock on a run folder is: in it, or beside it where fetching replaces it."""
    return folder if uri is None else folder.parent


def pointed(run: str, name: str) -> str | None:
    """The checkpoint's name in RUN/checkpoints/NAME; None if there is none.

    Raises:
        InputError: the store cannot be reached.
    """
    try:
        files, inner = _opened(join(run, "checkpoints", name))
        with files.open_input_stream(inner) as stream:
            return stream.read().decode().strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{redact(run)}: cannot be read ({_line(error)})") from None


def fetch_run(uri: str) -> Path:
    """Copies the run that a URI names to this machine, unless the copy here is ahead; its folder.

    Raises:
        InputError: no run there, it cannot be read, or a process on this machine is at work on it.
    """
    run = run_of(uri)
    folder, latest = local_folder(run), pointed(run, "latest")
    if latest is None:
        raise InputError(f"{redact(uri)}: got no checkpoint, expected a run folder or RUN/checkpoints/step-…")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder, lock_place(folder, run)):
        here = folder / "checkpoints" / "latest"
        if here.is_file() and here.read_text().strip() > latest:
            return folder  # a copy that failed: what is here is newer
        part = folder.with_name(f".fetching-{folder.name}-{os.getpid()}")
        shutil.rmtree(part, ignore_errors=True)
        _download(run, part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    return folder


def fetch_checkpoint(uri: str, scratch: Path) -> Path:
    """Copies the one checkpoint that a URI means (see `checkpoint.find`) into `scratch`; its folder.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    run, base = run_of(uri), uri.partition("?")[0].rstrip("/")
    last = base.rsplit("/", 1)[-1]
    name = last if last.startswith("step-") else pointed(run, "best" if last == "best" else "latest")
    if name is None or "/" in name:
        raise InputError(f"{redact(uri)}: got no checkpoint, expected a run folder or RUN/checkpoints/step-…")
    return _download(join(run, "checkpoints", name), scratch / name)


class Mirror:
    """The copy of one run behind a URI; knows what of it is there already."""

    def __init__(self, run: str, folder: Path):
        self.run, self._folder = run, folder
        self._me = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
        self._mine = False
        self._there: dict[str, int] = {}  # a checkpoint's name -> when its state was written here
        self.failure = ""
        """Why the last copy failed."""

    def push(self) -> bool:
        """Copies what is new; whether it all arrived. What did not is tried again with the next push."""
        try:
            self._push()
            self.failure = ""
        except OSError as error:
            self.failure = (
                f"{redact(self.run)} cannot be written ({_line(error)}); the run is in {self._folder}"
            )
        return not self.failure

    def _claim(self) -> None:
        """Says who writes the run; whoever said so last does.

        Raises:
            OSError: another process took the run up meanwhile, or the store cannot be reached.
        """
        files, inner = _opened(join(self.run, "writer"))
        if self._mine and files.get_file_info(inner).is_file:
            with files.open_input_stream(inner) as stream:
                writer = stream.read().decode()
            if writer != self._me:
                raise OSError(f"another process has taken the run up since, on {writer.split(' ')[0]}")
            return
        _parent(files, inner)
        with files.open_output_stream(inner) as stream:
            stream.write(self._me.encode())
        self._mine = True

    def _push(self) -> None:
        self._claim()
        here = self._folder / "checkpoints"
        states = {path.parent.name: path.stat().st_mtime_ns for path in here.glob("step-*/state.json")}
        for name, written in states.items():
            if self._there.get(name) != written:
                _upload(here / name, join(self.run, "checkpoints", name))
                self._there[name] = written
        pointers = [path for path in (here / "latest", here / "best") if path.exists()]
        for path in (self._folder / "metrics.jsonl", self._folder / "job.yaml", *pointers):
            if path.exists():
                _upload(path, join(self.run, str(path.relative_to(self._folder))))
        self._prune(set(states) | {path.name for path in pointers})

    def _prune(self, kept: set[str]) -> None:
        from pyarrow.fs import FileSelector, FileType

        files, inner = _opened(join(self.run, "checkpoints"))
        for info in files.get_file_info(FileSelector(inner, allow_not_found=True)):
            if info.base_name in kept:
                continue
            if info.type == FileType.Directory:
                files.delete_dir(info.path)
                self._there.pop(info.base_name, None)
            else:
                files.delete_file(info.path)


def _opened(uri: str) -> tuple[Any, str]:
    """The file system and the path in it.

    Raises:
        InputError: no URI of a file system that pyarrow has.
    """
    import pyarrow
    from pyarrow.fs import FileSystem

    try:
        return FileSystem.from_uri(uri)
    except (ValueError, pyarrow.ArrowException) as error:
        raise InputError(
            f"{redact(uri)}: {_line(error)}; expected a URI such as s3://BUCKET/PREFIX or gs://…"
        ) from None


def _upload(source: Path, uri: str) -> None:
    from pyarrow.fs import LocalFileSystem, copy_files

    files, inner = _opened(uri)
    _parent(files, f"{inner}/." if source.is_dir() else inner)
    copy_files(str(source), inner, source_filesystem=LocalFileSystem(), destination_filesystem=files)


def _parent(files: Any, path: str) -> None:
    """Makes the folder that a file is to be in; object stores have none to make."""
    from pyarrow.fs import LocalFileSystem

    if isinstance(files, LocalFileSystem):
        files.create_dir(path.rpartition("/")[0], recursive=True)


def _download(uri: str, target: Path) -> Path:
    from pyarrow.fs import LocalFileSystem, copy_files

    target.mkdir(parents=True)
    files, inner = _opened(uri)
    try:
        copy_files(inner, str(target), source_filesystem=files, destination_filesystem=LocalFileSystem())
    except FileNotFoundError:
        raise InputError(
            f"{redact(uri)}: got no checkpoint, expected a run folder or RUN/checkpoints/step-…"
        ) from None
    except OSError as error:
        raise InputError(f"{redact(uri)}: cannot be read ({_line(error)})") from None
    return target


def _line(error: BaseException) -> str:
    return redact((str(error).splitlines() or [""])[0].strip())[:300] or type(error).__name__
