"""The driver dies: while it writes a checkpoint, at any moment of a run, or because the disk is full."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import tree
from support.outcomes import read_rows, read_theta
from support.processes import (
    ENVIRONMENT,
    find_descendants,
    find_listening_addresses,
    find_shared_files,
    find_workers,
    read_command,
    read_environment,
    send_signal,
    wait_until_gone,
)

import distmeta
from distmeta.config.job import Job
from distmeta.runtime import checkpoint as checkpoints


def test_writer_killed_at_any_system_call_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: the writer cannot be killed between two system calls")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("crash_points.py")), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
    )
    if "Operation not permitted" in done.stderr:
        pytest.skip("strace may not attach here: the writer cannot be killed between two system calls")
    assert done.returncode == 0, done.stderr
    numbers_of_calls = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert len(numbers_of_calls) == 2
    assert min(numbers_of_calls) > 30, numbers_of_calls


def test_full_disk_is_one_line_and_the_last_checkpoint_is_complete(workplace: Path) -> None:
    """On a real full disk: a file system of one megabyte, mounted in its own namespace."""
    job = tree("maml", run={"steps": 500, "checkpoint_every": 1, "keep": 999})
    (workplace / "job.yaml").write_text(yaml.safe_dump(job))
    (workplace / "small").mkdir()
    train = f"{sys.executable} -m distmeta.cli.main train"
    script = f"""
        mount -t tmpfs -o size=1m none {workplace}/small || exit 77
        {train} job.yaml run.name=full output=small --json
        code=$?
        cp -r small/full copied
        rm -rf small/full/checkpoints/step-0000000[1-9]
        {train} --resume small/full run.steps=9 >/dev/null 2>&1; echo resumed $?
        exit $code
    """
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "--user", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
    )
    if done.returncode in (77, 127) or "unshare" in done.stderr:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()[:200]}")
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert "make room, then distmeta train --resume small/full" in done.stdout
    assert "No space left on device" in done.stdout
    assert checkpoints.load(workplace / "copied").progress.step > 3
    assert not list((workplace / "copied" / "checkpoints").glob(".writing-step*"))
    assert "resumed 0" in done.stdout


def test_killed_driver_leaves_no_processes_and_is_resumed(workplace: Path) -> None:
    """One worker is computing, one was stopped and cannot end by itself.

    No RAY_AUTH_ variable is set, as for most users: the local Ray asks for a token and listens on loopback only.
    """
    job = tree("maml", run={"steps": 100_000, "workers": 2, "name": "killed", "checkpoint_every": 3})
    (workplace / "job.yaml").write_text(yaml.safe_dump(job))
    environment = {key: value for key, value in ENVIRONMENT.items() if not key.startswith("RAY_AUTH_")}
    output = workplace / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "distmeta.cli.main", "train", "job.yaml"],
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )
    run = workplace / "runs" / "killed"
    deadline = time.monotonic() + 180
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 7:
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    descendants = find_descendants(process.pid)
    shared_files = find_shared_files(descendants)
    workers = find_workers(process.pid)
    assert len(workers) == 2
    assert any("RAY_AUTH_MODE=token" in read_environment(pid) for pid in descendants)
    addresses = find_listening_addresses([process.pid, *descendants])
    assert len(addresses) > 4, "a raylet, its agents, the control store"
    assert {address.rpartition(":")[0] for address in addresses} <= {"127.0.0.1", "::1"}
    for text in (output.read_text(), (run / "job.yaml").read_text()):
        assert not re.search("RAY_AUTH_TOKEN|[0-9a-f]{64}", text)
    send_signal(workers[:1], signal.SIGSTOP)
    send_signal([process.pid], signal.SIGKILL)
    process.wait(30)
    left = wait_until_gone(descendants, 30)
    assert not left, [read_command(pid) for pid in left]
    assert not [path for path in shared_files if path.exists()]

    step = checkpoints.load(run).progress.step + 4
    distmeta.train(Job.load(run / "job.yaml", [f"run.steps={step}", "run.workers=0"]), resume=run)
    undisturbed = distmeta.train(Job.parse(tree("maml", run={"steps": step}))).run
    assert read_theta(run) == read_theta(undisturbed)
    assert [row["step"] for row in read_rows(run)] == list(range(1, step + 1))
