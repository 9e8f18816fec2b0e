"""Few-shot classification of short texts, as tokens of a transformer.

Shapes: T tasks, N rows, L tokens.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from distmeta.errors import InputError, did_you_mean, first_line
from distmeta.files import find_model_files
from distmeta.protocols import SPLITS, Batch, Episode, Score
from distmeta.tasks.arrow import Selection, assign_splits
from distmeta.tasks.few_shot import ClassificationScore, Order
from distmeta.tasks.options import Positive, Ways
from distmeta.tasks.sampling import ClassEntry, EpisodeSettings, build_class_table, draw_rows

TABLES = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SEPARATOR = "%"
"""A line that stands between two texts of a file, as in Debian's fortunes."""


class Texts:
    """N-way K-shot tasks of classes of texts; x {input_ids, attention_mask} int64 [N, L], y int64 [N].

    The classes of training, validation and test are disjoint. A text that is in two classes is left out, and so is a
    repeated one. Texts are tokenised once. A class with fewer texts than an episode takes of it is left out, and
    `skipped_classes` names it.

    Args:
        path: a folder with one file per class (files without an ending, or `.txt`); or a `.csv`, `.jsonl` or `.parquet`
            file. In a file of a folder each line is a text; if there are lines with only `%`, the texts stand between
            these.
        tokenizer: a folder, `package:PACKAGE/FOLDER`, or a name on the hub (see `models.hf.HuggingFace`).
        text_column, label_column: of a table.
        max_length: L; longer texts are cut.
        test, val: a fraction or number of the classes, or their names.
        order: see `tasks.few_shot.FewShot`.

    Raises:
        InputError: transformers is not installed, the texts or the tokenizer cannot be read, or there are too few
            classes.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str,
        ways: Ways = 5,
        shots: Positive = 5,
        queries: Positive = 10,
        eval_ways: Ways | None = None,
        eval_shots: Positive | None = None,
        eval_queries: Positive | None = None,
        text_column: str = "text",
        label_column: str = "label",
        max_length: Annotated[int, Field(ge=2)] = 32,
        test: Selection = 0.25,
        val: Selection = 0.2,
        order: Order = "shots",
    ):
        sizes = {
            "train": (ways, shots, queries),
            "val": (eval_ways or ways, eval_shots or shots, eval_queries or queries),
        }
        sizes["test"] = sizes["val"]
        needed = max(shots + queries for _, shots, queries in sizes.values())
        found = read_texts(path, text_column, label_column)
        self.skipped_classes = sorted(name for name, texts in found.items() if len(texts) < needed)
        """Classes with too few texts."""
        classes = {name: texts for name, texts in sorted(found.items()) if len(texts) >= needed}
        if not classes:
            raise InputError(f"tasks.path: got {path!r}, where no class has {needed} texts (shots + queries)")
        names = list(classes)
        self.tokens = tokenize(tokenizer, [text for texts in classes.values() for text in texts], max_length)
        counts = [len(texts) for texts in classes.values()]
        starts = np.cumsum(counts) - counts
        split_of_class = assign_splits(names, [""] * len(names), "class", test, val)
        self._settings = {
            split: EpisodeSettings(*size, min_ways=size[0], min_shots=size[1])
            for split, size in sizes.items()
        }
        entries: dict[str, list[ClassEntry]] = {split: [] for split in SPLITS}
        for name, start, count, split in zip(names, starts, counts, split_of_class, strict=True):
            entries[split].append(ClassEntry(np.arange(start, start + count), name=name))
        self._tables = {
            split: build_class_table(split, entries[split], self._settings[split], "ways", False)
            for split in SPLITS
        }
        self._shuffle = order == "random"
        self.class_names = {split: [entry.name for entry in entries[split]] for split in SPLITS}
        self.in_shape: tuple[int, ...] = (max_length,)
        self.out_features = ways
        self.eval_ways = sizes["test"][0]
        self.score: Score = self.scorer("train")
        self.fingerprint = compute_fingerprint(names, counts, self.tokens)

    def draw(self, split: str, ids: Any) -> Episode:
        selection = draw_rows(self._tables[split], ids, self._shuffle, False)
        parts = []
        for rows_TN, labels_TN in zip(selection.rows, selection.labels, strict=True):
            x = {name: torch.from_numpy(value[rows_TN]) for name, value in self.tokens.items()}
            parts.append(Batch(x, torch.from_numpy(labels_TN)))
        return Episode(*parts)

    def scorer(self, split: str) -> Score:
        return ClassificationScore(self._settings[split].ways)


def compute_fingerprint(names: Sequence[str], counts: Sequence[int], tokens: Mapping[str, np.ndarray]) -> str:
    """Return a digest of the classes, in order, and of the tokens of their texts."""
    digest = hashlib.sha256(repr(list(zip(names, counts, strict=True))).encode())
    for value in tokens.values():
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def tokenize(tokenizer: str, texts: Sequence[str], max_length: int) -> dict[str, np.ndarray]:
    """Return `input_ids` and `attention_mask` of the texts, int64 [N, L]."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise InputError(
            f"tasks.type: got texts, which needs a package that is missing ({first_line(error)}): "
            "pip install 'distmeta[hf]'"
        ) from None
    try:
        encode: Any = AutoTokenizer.from_pretrained(find_model_files("tasks.tokenizer", tokenizer))
        if encode.pad_token is None:
            encode.pad_token = encode.eos_token
        encoded = encode(
            list(texts), padding="max_length", truncation=True, max_length=max_length, return_tensors="np"
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"tasks.tokenizer: got {tokenizer!r} ({first_line(error)}), expected a tokenizer"
        ) from None
    return {name: encoded[name].astype(np.int64) for name in ("input_ids", "attention_mask")}


def read_texts(path: str, text_column: str, label_column: str) -> Mapping[str, list[str]]:
    """Return the different texts of each class, in the order of the files, without those that are in two classes.

    Raises:
        InputError: there is no such folder or file, or a column is missing.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        found = {file.stem: _read_file(file) for file in sorted(place.iterdir()) if _is_text(file)}
        if not found:
            raise InputError(f"tasks.path: got {path!r}, expected a folder with a text file for each class")
    elif place.is_file() and place.suffix in TABLES:
        found = _read_table(place, text_column, label_column)
    else:
        raise InputError(
            f"tasks.path: got {path!r}, expected a folder with a text file for each class, or a file ending in "
            f"{', '.join(TABLES)}"
        )
    different = {name: list(dict.fromkeys(texts)) for name, texts in found.items()}
    classes_with = Counter(text for texts in different.values() for text in texts)
    return {name: [text for text in texts if classes_with[text] == 1] for name, texts in different.items()}


def _is_text(file: Path) -> bool:
    return file.is_file() and file.suffix in ("", ".txt") and not file.name.startswith(".")


def _read_file(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(
            f"tasks.path: {file} is not a text in UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    texts = lines if SEPARATOR not in lines else _join_lines(lines)
    return [text.strip() for text in texts if text.strip()]


def _join_lines(lines: Sequence[str]) -> list[str]:
    """Return the texts that stand between lines with only `%`, each on one line."""
    texts: list[list[str]] = [[]]
    for line in lines:
        if line == SEPARATOR:
            texts.append([])
        else:
            texts[-1].append(line.strip())
    return [" ".join(parts) for parts in texts]


def _read_table(file: Path, text_column: str, label_column: str) -> dict[str, list[str]]:
    import pyarrow as pa
    from pyarrow import csv, json, parquet

    columns = {text_column: pa.string(), label_column: pa.string()}

    def read_csv(path: Path) -> Any:
        return csv.read_csv(
            path,
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types=columns),
        )

    readers = {"csv": read_csv, "json": json.read_json, "parquet": parquet.read_table}
    try:
        table = readers[TABLES[file.suffix]](file)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"tasks.path: {file} cannot be read: {first_line(error)}") from None
    for field, name in (("text_column", text_column), ("label_column", label_column)):
        if name not in table.column_names:
            raise InputError(
                f"tasks.{field}: got {name!r}, expected a column of {file.name}; "
                f"{did_you_mean(name, table.column_names)}"
            )
    found: dict[str, list[str]] = {}
    rows = zip(table[label_column].to_pylist(), table[text_column].to_pylist(), strict=True)
    for number, (label, text) in enumerate(rows):
        if label is None or not isinstance(text, str):
            raise InputError(
                f"tasks.path: {file}, row {number}: got {text!r} of class {label!r}, expected both"
            )
        found.setdefault(str(label), []).append(text)
    return found
