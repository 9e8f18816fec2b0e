"""Small valid files that fuzz tests damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distmeta.tasks.image_preparation import Preparation
from distmeta.tasks.store import write_store


def write_small_store(folder: Path) -> Path:
    path = folder / "whole.arrow"
    images = np.random.default_rng(0).integers(0, 256, (9, 1, 4, 4), dtype=np.uint8)
    write_store(path, images, ["a", "b", "c"], ["g", "g", "h"], [3, 2, 4], Preparation(size=4))
    return path


def write_small_episodes(folder: Path) -> Path:
    path = folder / "whole.parquet"
    columns = {
        "episode": [0] * 4,
        "split": ["support", "support", "query", "query"],
        "label": [3, 5, 3, 5],
        "x": [[0.1, 0.2]] * 4,
    }
    pq.write_table(pa.table(columns), path)
    return path
