"""Fixed episodes from a Parquet file (`distmeta evaluate --episodes FILE`): the exact trials of a benchmark.

Columns: `episode` int, `split` "support" or "query", `label` int, and `image` (bytes of a PNG or JPEG) or `x`
(list of float). Other columns are ignored. Each episode has its own number of ways and shots.

Shapes: S support rows, Q query rows, R rows of the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distmeta.errors import InputError, first_line
from distmeta.protocols import Batch
from distmeta.tasks.image_preparation import Preparation, prepare_image, scale_pixels
from distmeta.tasks.local_copy import find_local_copy

FIELD = "--episodes"


class FixedEpisode(NamedTuple):
    """One episode of the file. Its rows keep the file's order."""

    episode: int
    support: Batch
    query: Batch
    labels: list[int]
    """The support set's labels, sorted: output i of a model means labels[i]."""
    support_rows: np.ndarray
    """Rows of the file, int64 [S]."""
    query_rows: np.ndarray
    """Rows of the file, int64 [Q]."""


class _EpisodeRows(NamedTuple):
    """The rows of one episode, with their labels as outputs of a model."""

    episode: int
    labels: list[int]
    support: np.ndarray
    query: np.ndarray
    support_y: np.ndarray
    query_y: np.ndarray


def read_episodes(
    path: str, in_shape: tuple[int, ...], preparation: Preparation | None = None
) -> Iterator[FixedEpisode]:
    """Read the episodes in the order in which they begin in the file; x float32 [·, *in_shape], y int64 [·].

    Everything except the bytes of images is checked before this returns. Images are decoded when the iterator reaches
    them.

    Args:
        path: a path or URI of the file.
        in_shape: shape of a model's input.
        preparation: how images become inputs; None if the tasks are not images.

    Raises:
        InputError: the file is not as described above; the message names `--episodes`.
    """
    table = _read_table(path)
    column = _check_columns(table, path)
    if column == "image":
        preparation = _check_preparation(in_shape, preparation)
        read_inputs = _read_images(table, preparation)
    else:
        read_inputs = _read_vectors(table, in_shape)
    return _decode_episodes(_group_rows(table), read_inputs)


def _decode_episodes(
    episodes: list[_EpisodeRows], read_inputs: Callable[[np.ndarray], np.ndarray]
) -> Iterator[FixedEpisode]:
    for rows in episodes:
        support_x = torch.from_numpy(read_inputs(rows.support))
        query_x = torch.from_numpy(read_inputs(rows.query))
        yield FixedEpisode(
            rows.episode,
            Batch(support_x, torch.from_numpy(rows.support_y)),
            Batch(query_x, torch.from_numpy(rows.query_y)),
            rows.labels,
            rows.support,
            rows.query,
        )


def _read_table(path: str) -> pa.Table:
    try:
        with pq.ParquetFile(find_local_copy(path, FIELD)) as file:
            table = file.read()
        table.validate(full=True)
        _ = table.column_names  # decodes them, so that damaged names raise here
        return table
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{FIELD}: got {path!r}: no readable Parquet file ({first_line(error)})") from None


def _check_columns(table: pa.Table, path: str) -> str:
    """Check names, types and nulls. Return the column of inputs that the file has, "image" or "x"."""
    inputs = [name for name in ("image", "x") if name in table.column_names]
    if len(inputs) != 1:
        raise InputError(f"{FIELD}: got {' and '.join(inputs) or 'neither'}, expected column 'image' or 'x'")
    types = {
        "episode": (pa.types.is_integer, "int"),
        "split": (_is_string, "string"),
        "label": (pa.types.is_integer, "int"),
        "image": (_is_binary, "binary"),
        "x": (_is_vector, "list of float"),
    }
    for name in ("episode", "split", "label", *inputs):
        has_type, expected = types[name]
        if table.column_names.count(name) != 1:
            raise InputError(f"{FIELD}: got columns {table.column_names}, expected one {name!r}")
        column = table.column(name)
        if not has_type(column.type):
            raise InputError(f"{FIELD}: got column {name!r} of type {column.type}, expected {expected}")
        if column.null_count:
            raise InputError(f"{FIELD}: got nulls in column {name!r}, expected none")
    if table.num_rows == 0:
        raise InputError(f"{FIELD}: got no rows in {path!r}, expected episodes")
    return inputs[0]


def _is_string(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_string(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_binary(kind: Any) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_vector(kind: Any) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return False
    return pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)


def _check_preparation(in_shape: tuple[int, ...], preparation: Preparation | None) -> Preparation:
    if preparation is None:
        raise InputError(f"{FIELD}: got a column 'image', expected 'x' (these tasks are not images)")
    if preparation.shape != tuple(in_shape):
        raise InputError(
            f"{FIELD}: got images prepared to {preparation.shape}, expected {tuple(in_shape)} (the model's input)"
        )
    return preparation


def _read_images(table: pa.Table, preparation: Preparation) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that decodes rows of the `image` column, float32 [·, C, H, W]."""
    column = table.column("image")

    def read(rows: np.ndarray) -> np.ndarray:
        images = [
            prepare_image(column[row].as_py(), preparation, f"{FIELD}: row {row}") for row in rows.tolist()
        ]
        return scale_pixels(np.stack(images), preparation.scale)

    return read


def _read_vectors(table: pa.Table, in_shape: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that gives rows of the `x` column, float32 [·, *in_shape]."""
    size = math.prod(in_shape)
    lists = table.column("x").combine_chunks()
    if isinstance(lists, pa.FixedSizeListArray):
        lengths = np.full(len(lists), lists.type.list_size)
    else:
        lengths = np.array(lists.value_lengths())
    wrong = np.flatnonzero(lengths != size)
    if len(wrong):
        raise InputError(
            f"{FIELD}: got {lengths[wrong[0]]} numbers in column 'x' of row {wrong[0]}, expected {size} "
            f"(an input of shape {tuple(in_shape)})"
        )
    numbers = lists.flatten()
    if numbers.null_count:
        raise InputError(f"{FIELD}: got nulls in the lists of column 'x', expected numbers")
    with np.errstate(over="ignore"):  # numbers that float32 cannot hold become inf, which raises below
        vectors = numbers.to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, size)
    infinite = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(infinite):
        raise InputError(f"{FIELD}: got a number that is not finite in column 'x' of row {infinite[0]}")
    return lambda rows: vectors[rows].reshape(len(rows), *in_shape)


def _group_rows(table: pa.Table) -> list[_EpisodeRows]:
    """Return the rows by episode, after checking their splits and labels."""
    try:
        episode_R = table.column("episode").cast(pa.int64()).to_numpy()
        label_R = table.column("label").cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid:
        raise InputError(f"{FIELD}: got an integer beyond 64 bits, expected int64") from None
    split_R = np.asarray(table.column("split").to_pylist(), dtype=object)
    wrong = np.flatnonzero((split_R != "support") & (split_R != "query"))
    if len(wrong):
        raise InputError(
            f"{FIELD}: got split {split_R[wrong[0]]!r} (row {wrong[0]}), expected 'support' or 'query'"
        )
    _, first_row, number_R = np.unique(episode_R, return_index=True, return_inverse=True)
    begin_R = first_row[number_R]
    order = np.argsort(begin_R, kind="stable")  # episodes by their first row, rows in the file's order
    cuts = np.flatnonzero(np.diff(begin_R[order])) + 1
    return [_index_episode(rows, int(episode_R[rows[0]]), split_R, label_R) for rows in np.split(order, cuts)]


def _index_episode(rows: np.ndarray, episode: int, split_R: np.ndarray, label_R: np.ndarray) -> _EpisodeRows:
    """Check that an episode has both parts, and that the support set has every label of the query set."""
    support = rows[split_R[rows] == "support"]
    query = rows[split_R[rows] == "query"]
    for name, part in (("support", support), ("query", query)):
        if len(part) == 0:
            raise InputError(f"{FIELD}: got episode {episode} without {name} rows, expected some")
    labels = np.unique(label_R[support])
    unknown = np.setdiff1d(label_R[query], labels)
    if len(unknown):
        raise InputError(
            f"{FIELD}: got label {unknown[0]} in the query of episode {episode}, expected one of its "
            "support's labels"
        )
    support_y = np.searchsorted(labels, label_R[support])
    query_y = np.searchsorted(labels, label_R[query])
    return _EpisodeRows(episode, labels.tolist(), support, query, support_y, query_y)
