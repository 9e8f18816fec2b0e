"""Few-shot tasks of short texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import tree
from pyarrow import csv, parquet
from support.small_texts import BERT, TOPICS, write_texts, write_tokenizer

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.seeding import task_ids
from distmeta.tasks.texts import Texts, read_texts

pytest.importorskip("transformers")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    texts = write_texts(tmp_path / "texts")
    return {"path": str(texts), "tokenizer": str(write_tokenizer(tmp_path / "tokenizer"))}


SIZES = {"ways": 2, "shots": 2, "queries": 3, "max_length": 8, "test": 3, "val": 2}


def test_episode_has_tokens_of_its_classes(files: dict[str, str]) -> None:
    family = Texts(**files, **SIZES)
    ids = task_ids(0, "train", 0, 3)
    support, query = family.draw("train", ids)
    assert support.x["input_ids"].shape == (3, 4, 8)
    assert query.y.shape == (3, 6)
    again = family.draw("train", ids)
    assert np.array_equal(again.query.x["input_ids"], query.x["input_ids"])
    # words of one topic only: rows of a class share no word with those of the other class
    for t in range(3):
        words = {0: set(), 1: set()}
        for part in (support, query):
            for row, label in zip(part.x["input_ids"][t], part.y[t], strict=True):
                words[int(label)] |= {int(token) for token in row if int(token) >= 5}
        assert words[0]
        assert not words[0] & words[1]
        rows = [tuple(row.tolist()) for part in (support, query) for row in part.x["input_ids"][t]]
        assert len(set(rows)) == len(rows)


def test_classes_of_the_splits_are_disjoint_and_named(files: dict[str, str]) -> None:
    family = Texts(**files, **SIZES)
    names = [name for split in ("train", "val", "test") for name in family.class_names[split]]
    assert sorted(names) == sorted(TOPICS)
    assert [len(family.class_names[split]) for split in ("train", "val", "test")] == [3, 2, 3]
    named = Texts(**files, **SIZES | {"test": ["food", "tools"]})
    assert named.class_names["test"] == ["food", "tools"]
    assert named.fingerprint == family.fingerprint


def test_fingerprint_changes_with_a_label(files: dict[str, str], tmp_path: Path) -> None:
    """The texts and their order stay as they are; one of them moves to the next class."""
    rows = [(label, text) for label, texts in read_texts(files["path"], "", "").items() for text in texts]
    last_of_first = max(i for i, (label, _) in enumerate(rows) if label == rows[0][0])
    relabelled = list(rows)
    relabelled[last_of_first] = (rows[last_of_first + 1][0], rows[last_of_first][1])
    families = []
    for number, table in enumerate((rows, relabelled)):
        path = tmp_path / f"{number}.csv"
        csv.write_csv(pa.table({"label": [row[0] for row in table], "text": [row[1] for row in table]}), path)
        families.append(Texts(str(path), files["tokenizer"], **SIZES))
    assert np.array_equal(families[0].tokens["input_ids"], families[1].tokens["input_ids"])
    assert families[0].fingerprint != families[1].fingerprint


def test_texts_of_files_are_read_exactly(tmp_path: Path) -> None:
    folder = tmp_path / "topics"
    folder.mkdir()
    (folder / "fortunes").write_text("%\n100 % pure\n  two lines\n%\n%\nlast\n%\n")
    (folder / "fortunes.dat").write_bytes(b"\x00\xff")
    (folder / "lines.txt").write_text("one\n\n 5 % off \none\n")
    assert read_texts(str(folder), "", "") == {
        "fortunes": ["100 % pure two lines", "last"],
        "lines": ["one", "5 % off"],
    }
    (folder / "lines.txt").write_text("one\nlast\n")
    assert read_texts(str(folder), "", "") == {"fortunes": ["100 % pure two lines"], "lines": ["one"]}


def test_csv_keeps_numbers_and_line_breaks_as_text(tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    path.write_text('text,label\n007,1\n"two\nlines",1\n1e3,2.0\n')
    assert read_texts(str(path), "text", "label") == {"1": ["007", "two\nlines"], "2.0": ["1e3"]}
    path.write_bytes(b"text,label\n\xff,1\n")
    with pytest.raises(InputError, match=r"tasks.path: .*texts.csv cannot be read: .*invalid UTF8"):
        read_texts(str(path), "text", "label")


def test_classes_with_too_few_texts_are_left_out(files: dict[str, str]) -> None:
    Path(files["path"], "few").write_text("one line\n")
    assert Texts(**files, **SIZES).skipped_classes == ["few"]
    with pytest.raises(InputError, match=r"tasks.path: got .*, where no class has 42 texts"):
        Texts(**files, **SIZES | {"queries": 40})


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_tables_and_folders_have_the_same_texts(ending: str, files: dict[str, str], tmp_path: Path) -> None:
    expected = read_texts(files["path"], "text", "label")
    rows = [(label, text) for label, texts in expected.items() for text in texts]
    table = pa.table({"topic": [label for label, _ in rows], "line": [text for _, text in rows]})
    path = tmp_path / f"texts.{ending}"
    if ending == "csv":
        csv.write_csv(table, path)
    elif ending == "parquet":
        parquet.write_table(table, path)
    else:
        import json

        path.write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    assert read_texts(str(path), "line", "topic") == expected
    with pytest.raises(InputError, match=r"tasks.label_column: got 'topics', .* did you mean 'topic'\?"):
        read_texts(str(path), "line", "topics")


def test_bad_input_is_one_line(files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tasks.path: got '/nowhere', expected a folder"):
        Texts("/nowhere", files["tokenizer"], **SIZES)
    with pytest.raises(InputError, match=r"tasks.tokenizer: got '/nowhere', expected an existing folder"):
        Texts(files["path"], "/nowhere", **SIZES)
    Path(files["path"], "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary is not a text in UTF-8"):
        Texts(**files, **SIZES)


@pytest.mark.parametrize("algorithm", ["protonet", "anil"])
def test_text_job_trains_and_evaluates(algorithm: str, files: dict[str, str], workplace: Path) -> None:
    model: dict[str, Any] = {
        "type": "hf",
        "config": BERT,
        "peft": {"lora": {"r": 2, "target_modules": ["query"]}},
    }
    run = {"steps": 2, "tasks_per_step": 2, "shards": 1, "eval_every": 1, "eval_tasks": 2}
    job = tree(algorithm, model=model, tasks={"type": "texts", **files, **SIZES}, run=run)
    finished = distmeta.train(Job.parse(job))
    figures = distmeta.evaluate(finished.run, ["run.eval_tasks=4"]).figures
    assert 0 <= (figures["accuracy_after"] or 0) <= 1
