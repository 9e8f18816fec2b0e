"""Kills the checkpoint writer before each of its system calls that write: `python crash_points.py FOLDER`.

A child process is forked for every point, stopped, taken over by strace and let go on: strace kills it as it enters
the n-th rename, say, so that all calls before it were done. Whatever is then on disk has to be a whole state, the one
before or the one that was being written, and the next save has to work on it. Prints the number of points.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.checkpoint import Checkpoint, Progress

CALLS = (
    "write,pwrite64,writev,pwritev,rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,rmdir,"
    "fsync,fdatasync,ftruncate,fallocate,copy_file_range,sendfile,link,linkat,symlink"
)
"""What changes a disk; an empty file that `open` makes is on it before the first of these that follows."""
PR_SET_PTRACER = 0x59616D61
ANYBODY = ctypes.c_ulong(-1)


def state(step: int, mark: float) -> Checkpoint:
    theta = {"model.w": torch.full((5000,), mark), "model.b": torch.full((3,), mark)}
    moments = {"model.w/exp_avg": torch.full((5000,), mark)}
    return Checkpoint(
        {"name": "x"},
        theta,
        {"mean": torch.zeros(2)},
        moments,
        {"mark": mark},
        Progress(step, best_step=step),
    )


def prepared(folder: Path, again: bool) -> Checkpoint:
    """A run with three checkpoints of two that are kept, and the one to be written: a new step, or the last one's."""
    shutil.rmtree(folder, ignore_errors=True)
    for step in (1, 2, 3):
        checkpoints.save(folder, state(step, float(step)), keep=2)
    return state(3, 3.5) if again else state(4, 4.0)


def crash(folder: Path, again: bool, call: str, number: int) -> bool:
    """Writes a checkpoint in a process that is killed at the n-th such call; whether it ended before it came there."""
    new = prepared(folder, again)
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANYBODY, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        checkpoints.save(folder, new, keep=2)
        os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    inject = f"inject={call}:signal=SIGKILL:when={number}"
    with subprocess.Popen(
        ["strace", "-qq", "-p", str(child), "-e", f"trace={CALLS}", "-e", inject, "-o", f"{folder}.trace"],
        stderr=subprocess.PIPE, text=True,
    ) as tracer:  # fmt: skip
        while "TracerPid:\t0" in Path(f"/proc/{child}/status").read_text():
            assert tracer.poll() is None, tracer.stderr and tracer.stderr.read()
            time.sleep(0.002)
        os.kill(child, signal.SIGCONT)
        _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGKILL, status
    return os.WIFEXITED(status)


def check(folder: Path, again: bool) -> bool:
    """The state on disk is one or the other, whole; the next save works. Whether it is the new one."""
    said: list[str] = []
    _, found = checkpoints.load_whole(folder, said.append)
    mark = found.outer["mark"]
    assert mark in (3.0, 3.5 if again else 4.0), (mark, said)
    assert all(bool((value == mark).all()) for value in [*found.theta.values(), *found.optimizer.values()])
    checkpoints.clear(folder)
    checkpoints.rewind(folder, found.progress.step, found.progress.best_step)
    assert checkpoints.load(folder).outer["mark"] == mark, "cleared up, it is where it is looked for"
    assert checkpoints.load(folder / "checkpoints" / "best").outer["mark"] == mark
    checkpoints.save(folder, state(5, 5.0), keep=2)
    assert checkpoints.load(folder).outer["mark"] == 5.0
    left = {path.name for path in (folder / "checkpoints").iterdir()}
    assert not [name for name in left if name.startswith(".")], left
    return mark != 3.0


def main() -> None:
    run = Path(sys.argv[1]) / "run"
    for again in (False, True):
        assert crash(run, again, "rename", 60_000), "nothing kills it"
        assert check(run, again)
        made = Counter(re.findall(r"^(\w+)\(", Path(f"{run}.trace").read_text(), re.MULTILINE))
        outcomes = []
        for call, count in made.items():
            for number in range(1, count + 1):
                assert not crash(run, again, call, number), (call, number)
                outcomes.append(check(run, again))
        assert {*outcomes} == {False, True}, "some points come before the new state counts, some after"
        print(sum(made.values()), dict(made))


if __name__ == "__main__":
    main()
