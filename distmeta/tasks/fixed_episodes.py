"""Fixed episodes from a Parquet file (`distmeta evaluate --episodes FILE`): a benchmark's exact trials.

Columns: `episode` int, `split` "support" or "query", `label` int, and `image` (bytes of a PNG or JPEG) or `x`
(list of float). Other columns are ignored. Each episode has its own ways and shots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distmeta.errors import InputError
from distmeta.protocols import Batch
from distmeta.tasks.image_preparation import Preparation, prepare, unit
from distmeta.tasks.store import local_copy

FIELD = "--episodes"


class FixedEpisode(NamedTuple):
    """One episode as the file has it. Rows keep the file's order."""

    episode: int
    support: Batch
    query: Batch
    labels: list[int]
    """The support's labels, sorted: output i means labels[i]."""
    support_rows: np.ndarray
    """Rows of the file, int64 [S]."""
    query_rows: np.ndarray


class _Rows(NamedTuple):
    """Rows of one episode, and their labels as outputs."""

    episode: int
    labels: list[int]
    support: np.ndarray
    query: np.ndarray
    support_y: np.ndarray
    query_y: np.ndarray


def read_episodes(
    path: str, in_shape: tuple[int, ...], preparation: Preparation | None = None
) -> Iterator[FixedEpisode]:
    """The file's episodes, in the order in which they begin in it; x float32 [N, *in_shape], y int64 [N].

    Everything but the images' bytes is checked before this returns; images are decoded, with `preparation`,
    as the iterator reaches them. Raises InputError naming `--episodes`.
    """
    table = _read(path)
    columns = _columns(table, path)
    if columns == "image":
        if preparation is None:
            raise InputError(f"{FIELD}: got a column 'image', expected 'x' (these tasks are no images)")
        if preparation.shape != tuple(in_shape):
            raise InputError(
                f"{FIELD}: got images prepared to {preparation.shape}, expected {tuple(in_shape)} "
                "(the model's input)"
            )
        source = table.column("image")
    else:
        source = _vectors(table.column("x"), in_shape)
    return _decode(_rows(table), source, in_shape, preparation)


def _decode(
    rows: list[_Rows], source: Any, in_shape: tuple[int, ...], preparation: Preparation | None
) -> Iterator[FixedEpisode]:
    """The episodes, one at a time."""

    def batch(which: np.ndarray, y: np.ndarray) -> Batch:
        if isinstance(source, np.ndarray):
            x = source[which].reshape(len(which), *in_shape)
        else:
            assert preparation is not None
            images = [
                prepare(source[row].as_py(), preparation, f"{FIELD}: row {row}") for row in which.tolist()
            ]
            x = unit(np.stack(images), preparation.scale)
        return Batch(torch.from_numpy(x), torch.from_numpy(y))

    for r in rows:
        support, query = batch(r.support, r.support_y), batch(r.query, r.query_y)
        yield FixedEpisode(r.episode, support, query, r.labels, r.support, r.query)


def _read(path: str) -> pa.Table:
    try:
        with pq.ParquetFile(local_copy(path, FIELD)) as file:
            table = file.read()
        table.validate(full=True)
        _ = table.column_names  # decodes them, so that damaged ones are met here
        return table
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [""])[0].strip()
        raise InputError(f"{FIELD}: got {path!r}: no readable Parquet file ({reason})") from None


def _columns(table: pa.Table, path: str) -> str:
    """Checks names, types and nulls; "image" or "x", whichever the file has."""
    t = pa.types
    inputs = [name for name in ("image", "x") if name in table.column_names]
    if len(inputs) != 1:
        raise InputError(f"{FIELD}: got {' and '.join(inputs) or 'neither'}, expected column 'image' or 'x'")

    def is_text(kind: Any) -> bool:
        return (
            t.is_string(kind)
            or t.is_large_string(kind)
            or (t.is_dictionary(kind) and is_text(kind.value_type))
        )

    def is_vector(kind: Any) -> bool:
        nested = t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind)
        return nested and (t.is_floating(kind.value_type) or t.is_integer(kind.value_type))

    wanted = {
        "episode": (t.is_integer, "int"),
        "split": (is_text, "string"),
        "label": (t.is_integer, "int"),
        "image": (lambda kind: t.is_binary(kind) or t.is_large_binary(kind), "binary"),
        "x": (is_vector, "list of float"),
    }
    for name in ("episode", "split", "label", *inputs):
        check, expected = wanted[name]
        if table.column_names.count(name) != 1:
            raise InputError(f"{FIELD}: got columns {table.column_names}, expected one {name!r}")
        column = table.column(name)
        if not check(column.type):
            raise InputError(f"{FIELD}: got column {name!r} of type {column.type}, expected {expected}")
        if column.null_count:
            raise InputError(f"{FIELD}: got nulls in column {name!r}, expected none")
    if table.num_rows == 0:
        raise InputError(f"{FIELD}: got no rows in {path!r}, expected episodes")
    return inputs[0]


def _vectors(column: pa.ChunkedArray, in_shape: tuple[int, ...]) -> np.ndarray:
    """The `x` column as float32 [rows, prod(in_shape)]."""
    size = math.prod(in_shape)
    array = column.combine_chunks()
    lengths = (
        np.array(array.value_lengths())
        if hasattr(array, "value_lengths")
        else np.array([len(v) for v in array])
    )
    wrong = np.flatnonzero(lengths != size)
    if len(wrong):
        raise InputError(
            f"{FIELD}: got {lengths[wrong[0]]} numbers in column 'x' of row {wrong[0]}, expected {size} "
            f"(an input of shape {tuple(in_shape)})"
        )
    flat = array.flatten()
    if flat.null_count:
        raise InputError(f"{FIELD}: got nulls in the lists of column 'x', expected numbers")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, and is refused below
        vectors = flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, size)
    bad = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(bad):
        raise InputError(f"{FIELD}: got a number that is not finite in column 'x' of row {bad[0]}")
    return vectors


def _rows(table: pa.Table) -> list[_Rows]:
    """Rows by episode, checked: both splits there, and every label of the query in the support."""
    try:
        episode, label = (table.column(name).cast(pa.int64()).to_numpy() for name in ("episode", "label"))
    except pa.ArrowInvalid:
        raise InputError(f"{FIELD}: got an integer beyond 64 bits, expected int64") from None
    split = np.asarray(table.column("split").to_pylist(), dtype=object)
    bad = np.flatnonzero((split != "support") & (split != "query"))
    if len(bad):
        raise InputError(
            f"{FIELD}: got split {split[bad[0]]!r} (row {bad[0]}), expected 'support' or 'query'"
        )
    _, first, inverse = np.unique(episode, return_index=True, return_inverse=True)
    order = np.argsort(first[inverse], kind="stable")  # episodes by first row, rows in the file's order
    cuts = np.flatnonzero(np.diff(first[inverse][order])) + 1
    return [_one_episode(rows, int(episode[rows[0]]), split, label) for rows in np.split(order, cuts)]


def _one_episode(rows: np.ndarray, episode: int, split: np.ndarray, label: np.ndarray) -> _Rows:
    support, query = rows[split[rows] == "support"], rows[split[rows] == "query"]
    for name, part in (("support", support), ("query", query)):
        if len(part) == 0:
            raise InputError(f"{FIELD}: got episode {episode} without {name} rows, expected some")
    labels = np.unique(label[support])
    alien = np.setdiff1d(label[query], labels)
    if len(alien):
        raise InputError(
            f"{FIELD}: got label {alien[0]} in the query of episode {episode}, expected one of its "
            "support's labels"
        )
    y_s, y_q = np.searchsorted(labels, label[support]), np.searchsorted(labels, label[query])
    return _Rows(episode, labels.tolist(), support, query, y_s, y_q)
