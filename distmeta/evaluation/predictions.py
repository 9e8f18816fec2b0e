"""What an evaluation predicted, as a Parquet file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write_predictions(
    path: str | Path, numbers: Sequence[int], rows: Sequence[tuple[np.ndarray, np.ndarray]]
) -> None:
    """Write a Parquet file with the columns episode, row, label and prediction, one line per query row.

    Args:
        numbers: the number of each episode.
        rows: labels and predictions of each episode, [Q] or [Q, D].
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes = [len(labels) for labels, _ in rows]
    table = pa.table(
        {
            "episode": np.repeat(np.asarray(numbers, np.int64), sizes),
            "row": np.concatenate([np.arange(size) for size in sizes]),
            "label": _build_column([labels for labels, _ in rows]),
            "prediction": _build_column([predictions for _, predictions in rows]),
        }
    )
    pq.write_table(table, path)


def _build_column(parts: Sequence[np.ndarray]) -> Any:
    """Return one number per row, or a list per row if targets have several components."""
    values = np.concatenate([part.reshape(len(part), -1) for part in parts])
    return values[:, 0] if values.shape[1] == 1 else values.tolist()
