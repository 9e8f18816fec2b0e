"""Kill the checkpoint writer before each of its system calls that write: `python crash_points.py FOLDER`.

For every such call a child process is forked, stopped, attached to by strace, and continued. strace kills it as it
enters the n-th rename (for example), so that all calls before it are done. The folder must then hold a complete state,
the old or the new one, and the next save must work. Prints the number of calls.
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
"""System calls that change a disk. An empty file that `open` creates is there before the next of these."""
PR_SET_PTRACER = 0x59616D61
ANY_PROCESS = ctypes.c_ulong(-1)
OLD_MARK = 3.0


def make_checkpoint(step: int, mark: float) -> Checkpoint:
    """Return a checkpoint whose tensors all hold `mark`."""
    theta = {"model.w": torch.full((5000,), mark), "model.b": torch.full((3,), mark)}
    moments = {"model.w/exp_avg": torch.full((5000,), mark)}
    progress = Progress(step, best_step=step)
    return Checkpoint({"name": "x"}, theta, {"mean": torch.zeros(2)}, moments, {"mark": mark}, progress)


def prepare_run(folder: Path, same_step: bool) -> Checkpoint:
    """Make a run that has kept two of three checkpoints. Return the next one: of the same step, or of a new one."""
    shutil.rmtree(folder, ignore_errors=True)
    for step in (1, 2, 3):
        checkpoints.save(folder, make_checkpoint(step, float(step)), keep=2)
    return make_checkpoint(3, 3.5) if same_step else make_checkpoint(4, 4.0)


def save_and_crash(folder: Path, same_step: bool, call: str, number: int) -> bool:
    """Save a checkpoint in a process that is killed at the n-th such call. Return whether it finished before."""
    new = prepare_run(folder, same_step)
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY_PROCESS, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        checkpoints.save(folder, new, keep=2)
        os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    inject = f"inject={call}:signal=SIGKILL:when={number}"
    command = [
        "strace",
        "-qq",
        "-p",
        str(child),
        "-e",
        f"trace={CALLS}",
        "-e",
        inject,
        "-o",
        f"{folder}.trace",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        while "TracerPid:\t0" in Path(f"/proc/{child}/status").read_text():
            assert tracer.poll() is None, tracer.stderr and tracer.stderr.read()
            time.sleep(0.002)
        os.kill(child, signal.SIGCONT)
        _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGKILL, status
    return os.WIFEXITED(status)


def check_run(folder: Path, same_step: bool) -> bool:
    """Check that the run has a complete state and can be saved again. Return whether it is the new state."""
    reports: list[str] = []
    _, found = checkpoints.load_newest_intact(folder, reports.append)
    mark = found.outer["mark"]
    new_mark = 3.5 if same_step else 4.0
    assert mark in (OLD_MARK, new_mark), (mark, reports)
    assert all(bool((value == mark).all()) for value in [*found.theta.values(), *found.optimizer.values()])
    checkpoints.clear(folder)
    checkpoints.rewind(folder, found.progress.step, found.progress.best_step)
    assert checkpoints.load(folder).outer["mark"] == mark, "after cleaning up, `latest` names it"
    assert checkpoints.load(folder / "checkpoints" / "best").outer["mark"] == mark
    checkpoints.save(folder, make_checkpoint(5, 5.0), keep=2)
    assert checkpoints.load(folder).outer["mark"] == 5.0
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert not [name for name in names if name.startswith(".")], names
    return mark != OLD_MARK


def main() -> None:
    run = Path(sys.argv[1]) / "run"
    for same_step in (False, True):
        assert save_and_crash(run, same_step, "rename", 60_000), "nothing kills it"
        assert check_run(run, same_step)
        trace = Path(f"{run}.trace").read_text()
        calls = Counter(re.findall(r"^(\w+)\(", trace, re.MULTILINE))
        is_new = []
        for call, count in calls.items():
            for number in range(1, count + 1):
                assert not save_and_crash(run, same_step, call, number), (call, number)
                is_new.append(check_run(run, same_step))
        assert set(is_new) == {False, True}, "some calls come before the new state counts, some after"
        print(sum(calls.values()), dict(calls))


if __name__ == "__main__":
    main()
