"""The Arrow store: round trip without a copy, damaged files, and the node's cache of remote ones."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from distmeta.errors import InputError
from distmeta.tasks.image_preparation import Preparation
from distmeta.tasks.store import Domains, Store, local_copy, write_store

PREPARATION = Preparation(size=4)
COUNTS = [3, 2, 4]
IMAGES = np.random.default_rng(0).integers(0, 256, (9, 1, 4, 4), dtype=np.uint8)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "made" / "store.arrow"
    write_store(file, IMAGES, ["a", "b", "c"], ["g", "g", "h"], COUNTS, PREPARATION)
    return file


def test_round_trip(path):
    store = Store.open(str(path))
    assert np.array_equal(store.images, IMAGES)
    assert (store.classes, store.groups, store.counts) == (["a", "b", "c"], ["g", "g", "h"], COUNTS)
    assert store.preparation == PREPARATION
    assert [file.name for file in path.parent.iterdir()] == ["store.arrow"]
    write_store(path, list(IMAGES[::-1]), ["a", "b", "c"], ["g", "g", "h"], COUNTS, PREPARATION)
    assert np.array_equal(store.images, IMAGES)  # an open store outlives its replacement
    assert np.array_equal(Store.open(str(path)).images, IMAGES[::-1])


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc/self/maps")
def test_images_are_the_mapped_file(tmp_path):
    file = tmp_path / "large.arrow"
    preparation = Preparation(size=64)
    write_store(file, np.ones((2000, 1, 64, 64), np.uint8), ["a"], [""], [2000], preparation)
    before = pa.total_allocated_bytes()
    images = Store.open(str(file)).images
    assert pa.total_allocated_bytes() - before < 100_000
    address = images.__array_interface__["data"][0]
    with open("/proc/self/maps") as maps:
        spans = [line.split() for line in maps if str(file) in line]
    assert any(int(s[0].split("-")[0], 16) <= address < int(s[0].split("-")[1], 16) for s in spans)
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def rewritten(path, *, columns=None, metadata=None, batches=1, **changes):
    """The store again with something wrong in it."""
    table = pa.ipc.open_file(str(path)).read_all()
    found = json.loads(table.schema.metadata[b"distmeta"]) | changes
    found = {key: value for key, value in found.items() if value is not None}
    for name, column in (columns or {}).items():
        table = table.set_column(table.column_names.index(name), name, column)
    table = table.replace_schema_metadata({b"distmeta": json.dumps(found)} if metadata is None else metadata)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        for part in table.to_batches(max_chunksize=-(-len(table) // batches)):
            writer.write_batch(part)


LABELS = np.repeat([0, 1, 2], COUNTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"metadata": {}}, "without distmeta's metadata"),
        ({"metadata": {b"distmeta": b"{"}}, "damaged metadata"),
        ({"metadata": {b"distmeta": b"[1]"}}, "damaged metadata"),
        ({"metadata": {b"distmeta": b"\xff"}}, "damaged metadata"),
        ({"version": 1}, "a store of version 1, where this distmeta reads 2"),
        ({"counts": None}, "damaged metadata"),
        ({"digest": 3}, "damaged metadata .digest is not a text"),
        ({"counts": [3, 2, 5]}, "9 rows where its counts add up to 10"),
        ({"counts": [2, 3, 4]}, "not sorted by class"),
        ({"counts": [3, 6]}, "do not fit together"),
        ({"counts": [3, 2.0, 4]}, "do not fit together"),
        ({"classes": ["a", "b", 3]}, "do not fit together"),
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
def test_damaged_stores(path, damage, message):
    rewritten(path, **damage)
    with pytest.raises(InputError, match=f"^tasks.path: got .*{message}") as caught:
        Store.open(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"domains": ["x"]}, "a domain or drawing out of range"),
        ({"domains": []}, "domains named"),
        ({"domains": ["x", "x"]}, r"domains named \['x', 'x'\], not by different words"),
        ({"domains": ["x", 3]}, "domains named"),
        ({"domains": "xy"}, "domains named"),
        ({"columns": {"domain": pa.array([0] * 9)}}, "column 'domain': int64, not int32"),
        ({"columns": {"domain": pa.array([None] + [1] * 8, pa.int32())}}, "null values"),
        ({"columns": {"drawing": pa.array([-1] * 9, pa.int32())}}, "out of range"),
        ({"columns": {"drawing": pa.array([0] * 9, pa.int32())}}, "a drawing twice in one class and domain"),
    ],
)
def test_damaged_domains(path, damage, message):
    domains = Domains(["x", "y"], np.array([0, 1] * 4 + [0]), np.arange(9))
    write_store(path, IMAGES, ["a", "b", "c"], ["g", "g", "h"], COUNTS, PREPARATION, domains)
    opened = Store.open(str(path)).domains
    assert opened is not None
    assert opened.of_row.tolist() == domains.of_row.tolist()
    rewritten(path, **damage)
    with pytest.raises(InputError, match=f"^tasks.path: got .*{message}") as caught:
        Store.open(str(path))
    assert "\n" not in str(caught.value)


def test_a_store_may_lack_the_columns_that_it_promises(path):
    rewritten(path, domains=["x", "y"])
    with pytest.raises(InputError, match="column 'domain': no such column"):
        Store.open(str(path))


def test_files_that_are_no_stores(path, tmp_path):
    data = path.read_bytes()
    for cut in (
        b"",
        b"hello",
        data[: len(data) // 2],
        data[:-1],
        data[:8],
        b"\0" * len(data),
        data[8:],
        data.replace(b"label", b"\xffabel"),
    ):
        path.write_bytes(cut)
        with pytest.raises(InputError, match=r"^tasks.path: got .*no readable Arrow file") as caught:
            Store.open(str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"^tasks.path: got .*no such file"):
        Store.open(str(tmp_path / "absent.arrow"))
    with pytest.raises(InputError, match="not a file"):
        Store.open(str(tmp_path))


def test_a_write_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--out"):
        write_store(tmp_path / "file" / "x.arrow", IMAGES, ["a"], [""], [9], PREPARATION)
    with pytest.raises(AssertionError):
        write_store(tmp_path / "x.arrow", IMAGES, ["a"], [""], [8], PREPARATION)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_uris(path, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = local_copy(path.as_uri(), "tasks.path")
    assert first.is_relative_to(tmp_path / "cache" / "distmeta")
    assert first.name == "store.arrow"
    inode = first.stat().st_ino
    assert local_copy(path.as_uri(), "tasks.path").stat().st_ino == inode  # fetched once
    assert np.array_equal(Store.open(path.as_uri()).images, IMAGES)
    other = dataclasses.replace(PREPARATION, ink="light")
    write_store(path, IMAGES[:4], ["a"], [""], [4], other)
    assert Store.open(path.as_uri()).preparation == other  # a store that changed is fetched again
    for bad in (f"file://{tmp_path}/absent.arrow", "nowhere://host/x", tmp_path.as_uri(), "file://"):
        with pytest.raises(InputError, match=r"^tasks.path: got ") as caught:
            Store.open(bad)
        assert "\n" not in str(caught.value)


def test_processes_that_start_together_share_one_copy(path, tmp_path):
    script = (
        "import sys; from distmeta.tasks.store import Store, local_copy\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "file = local_copy(sys.argv[1], 'tasks.path')\n"
        "print(file.stat().st_ino, int(Store.open(sys.argv[1]).images.sum()))\n"
    )
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, path.as_uri()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for _ in range(3)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(answers) == 1
    assert answers.pop().split()[1] == str(int(IMAGES.sum()))
    kept = [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert sorted(kept) == [".lock", "store.arrow"]
