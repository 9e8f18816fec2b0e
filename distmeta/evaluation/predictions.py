"""What an evaluation predicted, as a Parquet file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distmeta.compute.predictions import Predictions


def write_predictions(path: str | Path, numbers: Sequence[int], rows: Sequence[Predictions]) -> None:
    """Write a Parquet file with the columns episode, row, label and prediction, one line per query row.

    A label or prediction of several numbers is a list, of lists if it has several axes. If `y` is not one tensor, each
    of its leaves has the columns `label.NAME` and `prediction.NAME`.

    Args:
        numbers: the number of each episode.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(rows[0].labels)
    sizes = [len(row.labels[names[0]]) for row in rows]
    columns = {
        "episode": np.repeat(np.asarray(numbers, np.int64), sizes),
        "row": np.concatenate([np.arange(size) for size in sizes]),
    }
    for name in names:
        suffix = f".{name}" if name else ""
        columns[f"label{suffix}"] = _build_column([row.labels[name] for row in rows])
        columns[f"prediction{suffix}"] = _build_column([row.predictions[name] for row in rows])
    pq.write_table(pa.table(columns), path)


def _build_column(parts: Sequence[np.ndarray]) -> np.ndarray | list:
    """Return one number per row, or a (nested) list per row. Tasks may have labels of different shapes."""
    if all(part.ndim == 1 or part[0].size == 1 for part in parts):
        return np.concatenate([part.reshape(len(part)) for part in parts])
    return [row for part in parts for row in part.tolist()]
