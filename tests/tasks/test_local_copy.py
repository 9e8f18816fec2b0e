"""The cache of remote files: one copy per machine, fetched again when the file changes."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from distmeta.errors import InputError
from distmeta.tasks.image_preparation import Preparation
from distmeta.tasks.local_copy import find_local_copy
from distmeta.tasks.store import TaskStore, write_store

PREPARATION = Preparation(size=4)
IMAGES = np.random.default_rng(0).integers(0, 256, (9, 1, 4, 4), dtype=np.uint8)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "made" / "store.arrow"
    write_store(file, IMAGES, ["a", "b", "c"], ["g", "g", "h"], [3, 2, 4], PREPARATION)
    return file


def test_uri_is_copied_once_and_again_after_a_change(path, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = find_local_copy(path.as_uri(), "tasks.path")
    assert first.is_relative_to(tmp_path / "cache" / "distmeta")
    assert first.name == "store.arrow"
    inode = first.stat().st_ino
    assert find_local_copy(path.as_uri(), "tasks.path").stat().st_ino == inode
    assert np.array_equal(TaskStore.open(path.as_uri()).images, IMAGES)
    other = dataclasses.replace(PREPARATION, ink="light")
    write_store(path, IMAGES[:4], ["a"], [""], [4], other)
    assert TaskStore.open(path.as_uri()).preparation == other


def test_wrong_uris_are_refused(tmp_path):
    for wrong in (f"file://{tmp_path}/absent.arrow", "nowhere://host/x", tmp_path.as_uri(), "file://"):
        with pytest.raises(InputError, match=r"^tasks.path: got ") as caught:
            TaskStore.open(wrong)
        assert "\n" not in str(caught.value)


def test_processes_that_start_together_share_one_copy(path, tmp_path):
    script = (
        "import sys\n"
        "from distmeta.tasks.local_copy import find_local_copy\n"
        "from distmeta.tasks.store import TaskStore\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "file = find_local_copy(sys.argv[1], 'tasks.path')\n"
        "print(file.stat().st_ino, int(TaskStore.open(sys.argv[1]).images.sum()))\n"
    )
    cache = tmp_path / "cache"
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, path.as_uri()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(3)
    ]
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
    kept = [file.name for file in cache.rglob("*") if file.is_file()]
    assert sorted(kept) == [".lock", "store.arrow"]
