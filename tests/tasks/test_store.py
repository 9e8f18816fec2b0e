"""The task store: written and mapped without a copy; damaged files are refused."""

import json
import os

import numpy as np
import pyarrow as pa
import pytest

from distmeta.errors import InputError
from distmeta.tasks.image_preparation import Preparation
from distmeta.tasks.store import DomainColumns, TaskStore, write_store

PREPARATION = Preparation(size=4)
COUNTS = [3, 2, 4]
LABELS = np.repeat([0, 1, 2], COUNTS)
IMAGES = np.random.default_rng(0).integers(0, 256, (9, 1, 4, 4), dtype=np.uint8)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "made" / "store.arrow"
    write_store(file, IMAGES, ["a", "b", "c"], ["g", "g", "h"], COUNTS, PREPARATION)
    return file


def test_store_is_read_as_it_was_written(path):
    store = TaskStore.open(str(path))
    assert np.array_equal(store.images, IMAGES)
    assert (store.classes, store.groups, store.counts) == (["a", "b", "c"], ["g", "g", "h"], COUNTS)
    assert store.preparation == PREPARATION
    assert [file.name for file in path.parent.iterdir()] == ["store.arrow"]


def test_open_store_outlives_its_replacement(path):
    store = TaskStore.open(str(path))
    write_store(path, list(IMAGES[::-1]), ["a", "b", "c"], ["g", "g", "h"], COUNTS, PREPARATION)
    assert np.array_equal(store.images, IMAGES)
    assert np.array_equal(TaskStore.open(str(path)).images, IMAGES[::-1])


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc/self/maps")
def test_images_are_a_view_of_the_mapped_file(tmp_path):
    file = tmp_path / "large.arrow"
    write_store(file, np.ones((2000, 1, 64, 64), np.uint8), ["a"], [""], [2000], Preparation(size=64))
    before = pa.total_allocated_bytes()
    images = TaskStore.open(str(file)).images
    assert pa.total_allocated_bytes() - before < 100_000
    address = images.__array_interface__["data"][0]
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps if str(file) in line]
    assert any(int(start, 16) <= address < int(end, 16) for start, end in spans)
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def rewrite_store(path, *, columns=None, metadata=None, batches=1, **changes):
    """Write the store again with other columns, other metadata, other fields of the metadata (None: without it)."""
    table = pa.ipc.open_file(str(path)).read_all()
    fields = json.loads(table.schema.metadata[b"distmeta"]) | changes
    fields = {key: value for key, value in fields.items() if value is not None}
    for name, column in (columns or {}).items():
        table = table.set_column(table.column_names.index(name), name, column)
    if metadata is None:
        metadata = {b"distmeta": json.dumps(fields)}
    table = table.replace_schema_metadata(metadata)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        for part in table.to_batches(max_chunksize=-(-len(table) // batches)):
            writer.write_batch(part)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"metadata": {}}, "without distmeta's metadata"),
        ({"metadata": {b"distmeta": b"{"}}, "damaged metadata"),
        ({"metadata": {b"distmeta": b"[1]"}}, "damaged metadata"),
        ({"metadata": {b"distmeta": b"\xff"}}, "damaged metadata"),
        ({"version": 1}, "a store of version 1, but this distmeta reads version 2"),
        ({"counts": None}, "damaged metadata"),
        ({"digest": 3}, "damaged metadata .digest is not a string"),
        ({"counts": [3, 2, 5]}, "9 rows, but its counts add up to 10"),
        ({"counts": [2, 3, 4]}, "not sorted by class"),
        ({"counts": [3, 6]}, "do not match"),
        ({"counts": [3, 2.0, 4]}, "do not match"),
        ({"classes": ["a", "b", 3]}, "do not match"),
        ({"shape": [1, 2, 8]}, "shape and preparation"),
        ({"shape": 16}, "damaged metadata"),
        ({"preparation": {"size": 4, "ink": "red"}}, "damaged metadata .preparation.ink"),
        ({"preparation": 5}, "damaged metadata"),
        ({"shape": [1, 5, 5], "preparation": {"size": 5}}, "column 'image': fixed_size_binary"),
        ({"columns": {"label": pa.array(LABELS)}}, "column 'label': int64, not int32"),
        ({"columns": {"image": pa.array([b"x"] * 9)}}, "column 'image': binary"),
        ({"columns": {"label": pa.array([None, *LABELS[1:]], pa.int32())}}, "null values"),
        ({"batches": 3}, "3 record batches"),
    ],
)
def test_damaged_store_is_refused(path, damage, message):
    rewrite_store(path, **damage)
    with pytest.raises(InputError, match=f"^tasks.path: got .*{message}") as caught:
        TaskStore.open(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"domains": ["x"]}, "a domain or drawing out of range"),
        ({"domains": []}, "domains named"),
        ({"domains": ["x", "x"]}, r"domains named \['x', 'x'\], expected different words"),
        ({"domains": ["x", 3]}, "domains named"),
        ({"domains": "xy"}, "domains named"),
        ({"columns": {"domain": pa.array([0] * 9)}}, "column 'domain': int64, not int32"),
        ({"columns": {"domain": pa.array([None] + [1] * 8, pa.int32())}}, "null values"),
        ({"columns": {"drawing": pa.array([-1] * 9, pa.int32())}}, "out of range"),
        ({"columns": {"drawing": pa.array([0] * 9, pa.int32())}}, "a drawing twice in one class and domain"),
    ],
)
def test_damaged_domains_are_refused(path, damage, message):
    domains = DomainColumns(["x", "y"], np.array([0, 1] * 4 + [0]), np.arange(9))
    write_store(path, IMAGES, ["a", "b", "c"], ["g", "g", "h"], COUNTS, PREPARATION, domains)
    opened = TaskStore.open(str(path)).domains
    assert opened is not None
    assert opened.domain.tolist() == domains.domain.tolist()
    rewrite_store(path, **damage)
    with pytest.raises(InputError, match=f"^tasks.path: got .*{message}") as caught:
        TaskStore.open(str(path))
    assert "\n" not in str(caught.value)


def test_store_without_the_columns_of_its_domains_is_refused(path):
    rewrite_store(path, domains=["x", "y"])
    with pytest.raises(InputError, match="column 'domain': no such column"):
        TaskStore.open(str(path))


def test_other_files_are_refused(path, tmp_path):
    data = path.read_bytes()
    for other in (
        b"",
        b"hello",
        data[: len(data) // 2],
        data[:-1],
        data[:8],
        b"\0" * len(data),
        data[8:],
        data.replace(b"label", b"\xffabel"),
    ):
        path.write_bytes(other)
        with pytest.raises(InputError, match=r"^tasks.path: got .*no readable Arrow file") as caught:
            TaskStore.open(str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"^tasks.path: got .*no such file"):
        TaskStore.open(str(tmp_path / "absent.arrow"))
    with pytest.raises(InputError, match="not a file"):
        TaskStore.open(str(tmp_path))


def test_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--out"):
        write_store(tmp_path / "file" / "x.arrow", IMAGES, ["a"], [""], [9], PREPARATION)
    with pytest.raises(AssertionError):
        write_store(tmp_path / "x.arrow", IMAGES, ["a"], [""], [8], PREPARATION)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
