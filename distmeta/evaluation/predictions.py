"""What an evaluation predicted, as a Parquet file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def _column(parts: Sequence[np.ndarray]) -> Any:
    """One number a row, or a list where a target has several."""
    values = np.concatenate([part.reshape(len(part), -1) for part in parts])
    return values[:, 0] if values.shape[1] == 1 else values.tolist()


def write_predictions(
    path: str | Path, numbers: Sequence[int], rows: Sequence[tuple[np.ndarray, np.ndarray]]
) -> None:
    """A Parquet of episode, row, label, prediction: one line a query row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes = [len(label) for label, _ in rows]
    table = pa.table(
        {
            "episode": np.repeat(np.asarray(numbers, np.int64), sizes),
            "row": np.concatenate([np.arange(size) for size in sizes]),
            "label": _column([label for label, _ in rows]),
            "prediction": _column([predicted for _, predicted in rows]),
        }
    )
    pq.write_table(table, path)
