"""Short trainings on handwritten digits and sine waves, and files of fixed episodes of digits."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import tree
from PIL import Image

import distmeta
from distmeta.config.job import Job
from distmeta.tasks.image_preparation import Preparation, prepare_image, scale_pixels

DIGITS = {"type": "digits", "ways": 5, "shots": 1, "queries": 5}
MAML = {"type": "maml", "inner_lr": 0.4, "inner_steps": 2}


def train_on_digits(folder: Path) -> Path:
    """Train MAML for 5 steps on 5-way 1-shot digits. Return the run folder."""
    job = tree(MAML, tasks=DIGITS, run={"steps": 5, "eval_tasks": 30}, output=str(folder))
    return distmeta.train(Job.parse(job)).run


def train_on_waves(folder: Path) -> Path:
    """Train MAML for 3 steps on sine waves. Return the run folder."""
    job = tree(run={"steps": 3, "eval_tasks": 10}, output=str(folder))
    return distmeta.train(Job.parse(job)).run


class Images(NamedTuple):
    """scikit-learn's digits."""

    pixels: np.ndarray  # uint8 [N, 8, 8], ink at 240
    digits: np.ndarray  # what they show, [N]


def load_images() -> Images:
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    return Images((np.asarray(pixels).reshape(-1, 8, 8) * 15).astype(np.uint8), np.asarray(digits))


class Row(NamedTuple):
    """A row of a file of episodes."""

    episode: int
    split: str
    label: int
    image: np.ndarray  # uint8 [8, 8]


def make_rows(images: Images, episode: int, labels: dict[int, int], shots: int, queries: int) -> list[Row]:
    """Make the rows of one episode. `labels` maps a label in the file to the digit that it stands for."""
    rows = []
    for label, digit in labels.items():
        chosen = images.pixels[images.digits == digit][episode : episode + shots + queries]
        for i, image in enumerate(chosen):
            split = "support" if i < shots else "query"
            rows.append(Row(episode, split, label, image))
    return rows


def write_episodes(path: Path, rows: list[Row], preparation: Preparation | None = None) -> Path:
    """Write rows as PNG images; or, with a preparation, as the floats that the model would see."""
    columns: dict[str, Any] = {
        "episode": [row.episode for row in rows],
        "split": [row.split for row in rows],
        "label": [row.label for row in rows],
    }
    if preparation is None:
        columns["image"] = [encode_png(row.image) for row in rows]
    else:
        columns["x"] = [prepare(row.image, preparation).ravel().tolist() for row in rows]
    pq.write_table(pa.table(columns), path)
    return path


def encode_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def prepare(image: np.ndarray, preparation: Preparation) -> np.ndarray:
    """Return what the model sees of an image, float32 [C, H, W]."""
    return scale_pixels(prepare_image(encode_png(image), preparation), preparation.scale)


def read_preparation(run: Path) -> Preparation:
    examples = distmeta.load(run).checkpoint.examples
    assert examples is not None
    return Preparation.from_dict(examples["preparation"])


def read_table(path: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(path)
    return {name: table.column(name).to_numpy() for name in table.column_names}
