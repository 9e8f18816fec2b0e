"""The task store: one Arrow IPC file of images sorted by class, memory-mapped and never copied whole.

Columns: `image` fixed_size_binary(C·H·W), uint8 pixels in C, H, W order; `label` int32, the class. One record
batch, so that the images are one numpy view of the mapped file. The schema's metadata hold, under `distmeta`,
a JSON object: version, shape, classes, groups, counts, preparation, and digest: SHA-256 of all the others and of the
columns, by which a run knows its store again on other machines and on resume.

A store with domains has two more columns: `domain` int32, an index into the metadata's `domains`; `drawing` int32, what
is shown: rows of a class in two domains that show the same thing have the same number. Without both it is as valid.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs

from distmeta.errors import InputError
from distmeta.tasks.image_preparation import Preparation

VERSION = 2
_KEY = b"distmeta"
_CHUNK = 1 << 22


class Domains(NamedTuple):
    """Which domain each row is of, and which drawing it shows."""

    names: list[str]
    of_row: np.ndarray
    """int32 [N], an index into `names`."""
    drawing: np.ndarray
    """int32 [N], at least 0; counted within a class. A class has a drawing at most once in a domain."""


@dataclass(frozen=True)
class Store:
    """An opened store. Rows of a class are consecutive: class k starts at sum(counts[:k])."""

    images: np.ndarray
    """uint8 [N, C, H, W], a read-only view of the mapped file."""
    classes: list[str]
    groups: list[str]
    """The group of each class; all "" where there are none."""
    counts: list[int]
    preparation: Preparation
    digest: str
    """Of all that it holds, as its writer found it."""
    domains: Domains | None = None
    file: Path | None = None
    """The file that is mapped."""
    identity: tuple[int, ...] = ()
    """Its device, number, size and time of change when it was opened."""

    def check_unchanged(self) -> None:
        """Raises InputError where the file is not what was opened: numbers drawn from it would be neither run's."""
        if self.file is not None and _identity(self.file) != self.identity:
            raise InputError(
                f"tasks.path: {str(self.file)!r} changed on disk while it was in use, expected a store that stays "
                "as it is: write a new one under another name"
            )

    @staticmethod
    def open(path: str, field: str = "tasks.path") -> Store:
        """Maps a store: a path, or a URI (s3, gs, file, …) which is copied to this node once.

        Raises InputError, naming `field`, for anything that is not a complete store of this version.
        """
        file = local_copy(path, field)
        identity = _identity(file)
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(file), "r"))
            schema, names = reader.schema, reader.schema.names
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            for batch in batches:
                batch.validate()
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last: of a column's name
            raise _bad(field, path, f"no readable Arrow file ({_line(error)})") from None
        metadata = _metadata(schema, field, path)
        shape = tuple(metadata["shape"])
        columns = {"image": pa.binary(math.prod(shape)), "label": pa.int32()}
        domain_names = metadata.get("domains")
        if domain_names is not None:
            columns |= {"domain": pa.int32(), "drawing": pa.int32()}
        for name, wanted in columns.items():
            got = schema.field(name).type if name in names else "no such column"
            if got != wanted:
                raise _bad(field, path, f"column {name!r}: {got}, not {wanted}")
        if len(batches) != 1 or batches[0].num_rows == 0:
            raise _bad(field, path, f"{len(batches)} record batches, not one with rows in it")
        batch, counts = batches[0], metadata["counts"]
        if batch.num_rows != sum(counts):
            raise _bad(field, path, f"{batch.num_rows} rows where its counts add up to {sum(counts)}")
        if any(batch.column(name).null_count for name in columns):
            raise _bad(field, path, "null values")
        labels = batch.column("label").to_numpy()
        if not np.array_equal(labels, np.repeat(np.arange(len(counts)), counts)):
            raise _bad(field, path, "rows that are not sorted by class as its counts say")
        domains = None
        if domain_names is not None:
            domains = Domains(
                domain_names, *(batch.column(name).to_numpy() for name in ("domain", "drawing"))
            )
            if wrong := _wrong(domains, labels):
                raise _bad(field, path, wrong)
        images = _view(batch.column("image"), shape)
        described = (
            metadata["classes"],
            metadata["groups"],
            counts,
            metadata["preparation"],
            metadata["digest"],
        )
        return Store(images, *described, domains, file, identity)


def write_store(
    path: str | os.PathLike[str],
    images: np.ndarray | Iterable[np.ndarray],
    classes: Sequence[str],
    groups: Sequence[str],
    counts: Sequence[int],
    preparation: Preparation,
    domains: Domains | None = None,
) -> None:
    """Writes a store whole or not at all.

    images: uint8 [N, C, H, W], or that many [C, H, W] one by one, sorted by class. classes, groups, counts:
    one of each a class. domains: of rows in the same order. Raises InputError where the path cannot be written.
    """
    shape = preparation.shape
    pixels = images if isinstance(images, np.ndarray) else np.stack(list(images))
    assert pixels.dtype == np.uint8, pixels.dtype
    assert pixels.shape == (sum(counts), *shape), (pixels.shape, sum(counts), shape)
    assert len(classes) == len(groups) == len(counts), (len(classes), len(groups), len(counts))
    assert min(counts) > 0, counts
    metadata = {
        "version": VERSION, "shape": list(shape), "classes": list(classes), "groups": list(groups),
        "counts": [int(count) for count in counts], "preparation": preparation.to_dict(),
    }  # fmt: skip
    width = pa.binary(math.prod(shape))
    column = pa.FixedSizeBinaryArray.from_buffers(
        width, len(pixels), [None, pa.py_buffer(np.ascontiguousarray(pixels))]
    )
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    columns: dict[str, Any] = {"image": column, "label": pa.array(labels)}
    if domains is not None:
        wrong = _wrong(domains, labels)
        assert not wrong, wrong
        metadata["domains"] = list(domains.names)
        for name, values in (("domain", domains.of_row), ("drawing", domains.drawing)):
            columns[name] = pa.array(np.asarray(values, np.int32))
    metadata["digest"] = _digest(metadata, columns)
    schema = pa.schema(
        [pa.field(name, values.type, nullable=False) for name, values in columns.items()],
        metadata={_KEY: json.dumps(metadata).encode()},
    )
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(target) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
            writer.write_batch(pa.record_batch(list(columns.values()), schema=schema))
    except OSError as error:
        raise InputError(f"--out: got {str(path)!r}, expected a file that can be written: {error}") from None


def local_copy(path: str, field: str) -> Path:
    """The local file of a path or URI. What a URI names is copied once a node, to the user's cache.

    The cache is ${XDG_CACHE_HOME:-~/.cache}/distmeta/HASH/NAME, with HASH of the URI, its size and its time
    of change, so a store that is replaced is fetched again. Nothing is evicted.
    """
    if "://" not in path:
        file = Path(path).expanduser()
        if not file.is_file():
            raise _unreachable(field, path, "no such file" if not file.exists() else "not a file")
        return file
    try:
        filesystem, inner = pyarrow.fs.FileSystem.from_uri(path)
        info = filesystem.get_file_info(inner)
        if info.type != pyarrow.fs.FileType.File:
            raise _unreachable(field, path, "no such file")
        return _cached(filesystem, info, path, field)
    except (OSError, pa.ArrowException) as error:
        raise _unreachable(field, path, f"cannot be fetched ({_line(error)})") from None


def _cached(filesystem: Any, info: Any, uri: str, field: str) -> Path:
    """The cached copy, made by the first process that gets the lock."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distmeta"
    digest = hashlib.sha256(f"{uri}\n{info.size}\n{info.mtime_ns}".encode()).hexdigest()[:32]
    target = cache / digest / info.base_name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # closing the file lets it go, also when this process is killed
        if target.is_file():
            return target
        with _replacing(target) as temporary:
            with filesystem.open_input_stream(info.path) as source, open(temporary, "wb") as copy:
                while chunk := source.read(_CHUNK):
                    copy.write(chunk)
            size = temporary.stat().st_size
            if size != info.size:
                raise _unreachable(field, uri, f"{size} bytes arrived of {info.size}")
    return target


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A temporary file beside `target`, which takes its place when the block ends well, else is removed."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _metadata(schema: pa.Schema, field: str, path: str) -> dict[str, Any]:
    """The checked metadata, with `preparation` as a Preparation."""
    raw = (schema.metadata or {}).get(_KEY)
    if raw is None:
        raise _bad(field, path, "an Arrow file without distmeta's metadata")
    try:
        found = json.loads(raw)
        version = found["version"]
        if version != VERSION:
            raise _bad(field, path, f"a store of version {version}, where this distmeta reads {VERSION}")
        shape, classes, groups, counts = (found[key] for key in ("shape", "classes", "groups", "counts"))
        whole = [*shape, *counts]
        good = len(shape) == 3 and all(type(n) is int and n > 0 for n in whole) and all(
            isinstance(name, str) for name in [*classes, *groups]
        )  # fmt: skip
        if not good or not len(classes) == len(groups) == len(counts):
            raise ValueError("shape, classes, groups and counts do not fit together")
        if not isinstance(found["digest"], str):
            raise ValueError("digest is not a text")
        preparation = Preparation.from_dict(found["preparation"])
        if preparation.shape != tuple(shape):
            raise ValueError("shape and preparation do not fit together")
        return {**found, "preparation": preparation}
    except InputError as error:
        if str(error).startswith(field):
            raise
        raise _bad(field, path, f"damaged metadata ({error})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _bad(field, path, f"damaged metadata ({_line(error)})") from None


def _digest(metadata: dict[str, Any], columns: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(metadata).encode())
    for name, values in columns.items():
        digest.update(name.encode())
        digest.update(values.buffers()[1])
    return digest.hexdigest()


def _wrong(domains: Domains, labels_N: np.ndarray) -> str:
    """What is wrong with the domains; "" where nothing is."""
    names, of_row, drawing = domains
    known = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    if not known or not names or len(set(names)) < len(names):
        return f"domains named {names}, not by different words"
    if not len(of_row) == len(drawing) == len(labels_N):
        return f"{len(of_row)} domains and {len(drawing)} drawings for {len(labels_N)} rows"
    if of_row.min() < 0 or of_row.max() >= len(names) or drawing.min() < 0:
        return "a domain or drawing out of range"
    rows = np.stack([labels_N, of_row, drawing], axis=1)
    return "a drawing twice in one class and domain" if len(np.unique(rows, axis=0)) < len(rows) else ""


def _view(column: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The column's bytes as [N, C, H, W], without a copy."""
    size = math.prod(shape)
    pixels = np.frombuffer(column.buffers()[1], np.uint8, len(column) * size, column.offset * size)
    return pixels.reshape(len(column), *shape)


def _identity(file: Path) -> tuple[int, ...]:
    """Nothing where the file is gone."""
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].strip()


def _bad(field: str, path: str, what: str) -> InputError:
    return InputError(f"{field}: got {path!r}: {what}; expected a task store (see `distmeta data`)")


def _unreachable(field: str, path: str, what: str) -> InputError:
    return InputError(f"{field}: got {path!r}: {what}; expected a file, or a URI such as s3://BUCKET/FILE")
