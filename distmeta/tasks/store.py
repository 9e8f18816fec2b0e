"""The task store: one Arrow IPC file of images sorted by class, memory-mapped and never copied as a whole.

Columns: `image` fixed_size_binary(C·H·W), uint8 pixels in C, H, W order; `label` int32, the class. There is one record
batch, so the images are one numpy view of the mapped file. The schema's metadata has a JSON object under `distmeta`:
version, shape, classes, groups, counts, preparation and digest. The digest is the SHA-256 of everything else and of the
columns; by it a run recognises its store on other machines and on resume.

A store with domains has two more columns: `domain` int32, an index into the metadata's `domains`; and `drawing` int32,
what the row shows: rows of a class in two domains have the same number if they show the same thing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from distmeta.errors import InputError, first_line
from distmeta.files import replace_when_complete
from distmeta.tasks.image_preparation import Preparation
from distmeta.tasks.local_copy import find_local_copy

VERSION = 2
_METADATA_KEY = b"distmeta"


class DomainColumns(NamedTuple):
    """The domain of each row, and the drawing that it shows."""

    names: list[str]
    domain: np.ndarray
    """int32 [N], an index into `names`."""
    drawing: np.ndarray
    """int32 [N], from 0 within each class. A class has a drawing at most once per domain."""


class StoreMetadata(NamedTuple):
    """The checked metadata of a store's schema."""

    shape: tuple[int, int, int]
    classes: list[str]
    groups: list[str]
    counts: list[int]
    preparation: Preparation
    digest: str
    domain_names: list[str] | None


@dataclass(frozen=True)
class TaskStore:
    """An open store. The rows of a class are consecutive: class k starts at sum(counts[:k])."""

    images: np.ndarray
    """uint8 [N, C, H, W], a read-only view of the mapped file."""
    classes: list[str]
    groups: list[str]
    """The group of each class; all "" if there are no groups."""
    counts: list[int]
    """Rows of each class."""
    preparation: Preparation
    digest: str
    """Digest of the content, as computed when the store was written."""
    domains: DomainColumns | None = None
    file: Path | None = None
    """The mapped file."""
    file_state: tuple[int, ...] = ()
    """Its device, inode, size and time of change when it was opened."""

    def check_unchanged(self) -> None:
        """Raise InputError if the file has changed since it was opened: its numbers would belong to no run."""
        if self.file is not None and _stat_file(self.file) != self.file_state:
            raise InputError(
                f"tasks.path: {str(self.file)!r} changed on disk while it was in use, expected a store that does not "
                "change: write a new one under another name"
            )

    @staticmethod
    def open(path: str, field: str = "tasks.path") -> TaskStore:
        """Map a store.

        Args:
            path: a path, or a URI (s3, gs, file, …) that is copied to this machine once.
            field: names the option in errors.

        Raises:
            InputError: not a complete store of this version.
        """
        file = find_local_copy(path, field)
        file_state = _stat_file(file)
        schema, batches = _map_file(file, field, path)
        metadata = _read_metadata(schema, field, path)
        columns = _check_columns(schema, metadata, field, path)
        if len(batches) != 1 or batches[0].num_rows == 0:
            raise _store_error(field, path, f"{len(batches)} record batches, expected one with rows")
        batch = batches[0]
        labels = _read_labels(batch, columns, metadata.counts, field, path)
        domains = None
        if metadata.domain_names is not None:
            domains = DomainColumns(
                metadata.domain_names,
                batch.column("domain").to_numpy(),
                batch.column("drawing").to_numpy(),
            )
            if fault := _find_domain_fault(domains, labels):
                raise _store_error(field, path, fault)
        return TaskStore(
            images=_view_images(batch.column("image"), metadata.shape),
            classes=metadata.classes,
            groups=metadata.groups,
            counts=metadata.counts,
            preparation=metadata.preparation,
            digest=metadata.digest,
            domains=domains,
            file=file,
            file_state=file_state,
        )


def write_store(
    path: str | os.PathLike[str],
    images: np.ndarray | Iterable[np.ndarray],
    classes: Sequence[str],
    groups: Sequence[str],
    counts: Sequence[int],
    preparation: Preparation,
    domains: DomainColumns | None = None,
) -> None:
    """Write a store as a whole or not at all.

    Args:
        images: uint8 [N, C, H, W], or N arrays [C, H, W]; sorted by class.
        classes, groups, counts: one entry per class.
        domains: of the rows, in the same order.

    Raises:
        InputError: the path cannot be written.
    """
    shape = preparation.shape
    pixels = images if isinstance(images, np.ndarray) else np.stack(list(images))
    assert pixels.dtype == np.uint8, pixels.dtype
    assert pixels.shape == (sum(counts), *shape), (pixels.shape, sum(counts), shape)
    assert len(classes) == len(groups) == len(counts), (len(classes), len(groups), len(counts))
    assert min(counts) > 0, counts
    metadata = {
        "version": VERSION,
        "shape": list(shape),
        "classes": list(classes),
        "groups": list(groups),
        "counts": [int(count) for count in counts],
        "preparation": preparation.to_dict(),
    }
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    columns: dict[str, Any] = {"image": _pack_images(pixels), "label": pa.array(labels)}
    if domains is not None:
        fault = _find_domain_fault(domains, labels)
        assert not fault, fault
        metadata["domains"] = list(domains.names)
        columns["domain"] = pa.array(np.asarray(domains.domain, np.int32))
        columns["drawing"] = pa.array(np.asarray(domains.drawing, np.int32))
    metadata["digest"] = _compute_digest(metadata, columns)
    schema = pa.schema(
        [pa.field(name, values.type, nullable=False) for name, values in columns.items()],
        metadata={_METADATA_KEY: json.dumps(metadata).encode()},
    )
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            replace_when_complete(target) as temporary,
            pa.ipc.new_file(str(temporary), schema) as writer,
        ):
            writer.write_batch(pa.record_batch(list(columns.values()), schema=schema))
    except OSError as error:
        raise InputError(f"--out: got {str(path)!r}, expected a file that can be written: {error}") from None


def _map_file(file: Path, field: str, path: str) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(file), "r"))
        _ = reader.schema.names  # decodes them, so that damaged names raise here
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise _store_error(field, path, f"no readable Arrow file ({first_line(error)})") from None
    return reader.schema, batches


def _read_metadata(schema: pa.Schema, field: str, path: str) -> StoreMetadata:
    raw = (schema.metadata or {}).get(_METADATA_KEY)
    if raw is None:
        raise _store_error(field, path, "an Arrow file without distmeta's metadata")
    try:
        fields = json.loads(raw)
        version = fields["version"]
        if version == VERSION:
            return _parse_metadata(fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _store_error(field, path, f"damaged metadata ({first_line(error)})") from None
    raise _store_error(
        field, path, f"a store of version {version}, but this distmeta reads version {VERSION}"
    )


def _parse_metadata(fields: dict[str, Any]) -> StoreMetadata:
    """Raises ValueError, KeyError, TypeError or AttributeError if something is missing or wrong."""
    shape = fields["shape"]
    classes = fields["classes"]
    groups = fields["groups"]
    counts = fields["counts"]
    sizes_valid = len(shape) == 3 and all(type(n) is int and n > 0 for n in [*shape, *counts])
    names_valid = all(isinstance(name, str) for name in [*classes, *groups])
    if not sizes_valid or not names_valid or not len(classes) == len(groups) == len(counts):
        raise ValueError("shape, classes, groups and counts do not match")
    if not isinstance(fields["digest"], str):
        raise ValueError("digest is not a string")
    preparation = Preparation.from_dict(fields["preparation"])
    if preparation.shape != tuple(shape):
        raise ValueError("shape and preparation do not match")
    return StoreMetadata(
        preparation.shape, classes, groups, counts, preparation, fields["digest"], fields.get("domains")
    )


def _check_columns(schema: pa.Schema, metadata: StoreMetadata, field: str, path: str) -> list[str]:
    """Return the names of the columns that the store must have."""
    expected_types = {"image": pa.binary(math.prod(metadata.shape)), "label": pa.int32()}
    if metadata.domain_names is not None:
        expected_types |= {"domain": pa.int32(), "drawing": pa.int32()}
    for name, expected in expected_types.items():
        found = schema.field(name).type if name in schema.names else "no such column"
        if found != expected:
            raise _store_error(field, path, f"column {name!r}: {found}, not {expected}")
    return list(expected_types)


def _read_labels(
    batch: pa.RecordBatch, columns: list[str], counts: list[int], field: str, path: str
) -> np.ndarray:
    """Return the class of each row, int32 [N]."""
    if batch.num_rows != sum(counts):
        raise _store_error(field, path, f"{batch.num_rows} rows, but its counts add up to {sum(counts)}")
    if any(batch.column(name).null_count for name in columns):
        raise _store_error(field, path, "null values")
    labels = batch.column("label").to_numpy()
    if not np.array_equal(labels, np.repeat(np.arange(len(counts)), counts)):
        raise _store_error(field, path, "rows that are not sorted by class according to its counts")
    return labels


def _compute_digest(metadata: dict[str, Any], columns: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(metadata).encode())
    for name, values in columns.items():
        digest.update(name.encode())
        digest.update(values.buffers()[1])
    return digest.hexdigest()


def _find_domain_fault(domains: DomainColumns, labels_N: np.ndarray) -> str:
    """Return what is wrong with the domains; "" if nothing is."""
    names, domain_N, drawing_N = domains
    valid = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    if not valid or not names or len(set(names)) < len(names):
        return f"domains named {names}, expected different words"
    if not len(domain_N) == len(drawing_N) == len(labels_N):
        return f"{len(domain_N)} domains and {len(drawing_N)} drawings for {len(labels_N)} rows"
    if domain_N.min() < 0 or domain_N.max() >= len(names) or drawing_N.min() < 0:
        return "a domain or drawing out of range"
    rows = np.stack([labels_N, domain_N, drawing_N], axis=1)
    if len(np.unique(rows, axis=0)) < len(rows):
        return "a drawing twice in one class and domain"
    return ""


def _pack_images(pixels_NCHW: np.ndarray) -> pa.FixedSizeBinaryArray:
    width = pa.binary(math.prod(pixels_NCHW.shape[1:]))
    buffer = pa.py_buffer(np.ascontiguousarray(pixels_NCHW))
    return pa.FixedSizeBinaryArray.from_buffers(width, len(pixels_NCHW), [None, buffer])


def _view_images(column: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return the column's bytes as [N, C, H, W] without a copy."""
    size = math.prod(shape)
    pixels = np.frombuffer(column.buffers()[1], np.uint8, len(column) * size, column.offset * size)
    return pixels.reshape(len(column), *shape)


def _stat_file(file: Path) -> tuple[int, ...]:
    """Return what changes if the file is replaced or written to; nothing if it does not exist."""
    try:
        state = file.stat()
    except OSError:
        return ()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def _store_error(field: str, path: str, problem: str) -> InputError:
    return InputError(f"{field}: got {path!r}: {problem}; expected a task store (see `distmeta data`)")
