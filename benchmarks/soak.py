"""Memory, file descriptors, processor time and wall time of a step over a long run: nothing may grow.

    python benchmarks/soak.py [--minutes 60] [--pause 0.05]

Sine waves on two Ray workers with MLflow, an evaluation every 200 steps and a checkpoint every 50. Each draw pauses on
the workers, so that an hour holds the same work on a busy machine. Every 10 s the script reads memory (proportional set
size, which counts a page that k processes share as 1/k), open descriptors and processor time of the driver and the
workers. The table compares the median of the last tenth with that of the second tenth; the first tenth is the start.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from raw_results import ROOT, describe_environment, save_section

from distmeta.protocols import Episode
from distmeta.tasks.regression import Sinusoid

INTERVAL = 10.0
"""Seconds between two samples."""


class PausingSinusoid:
    """Sine waves whose draws take a while."""

    def __init__(self, pause: float, shots: int = 10, queries: int = 10):
        self._family = Sinusoid(shots=shots, queries=queries)
        self._pause = pause
        self.in_shape = self._family.in_shape
        self.out_features = self._family.out_features
        self.score = self._family.score

    def draw(self, split: str, ids: Any) -> Episode:
        time.sleep(self._pause)
        return self._family.draw(split, ids)


def make_job(pause: float) -> dict[str, Any]:
    return {
        "name": "soak",
        "model": {"type": "mlp", "hidden": [40, 40]},
        "tasks": {"type": "soak:PausingSinusoid", "pause": pause, "shots": 10, "queries": 10},
        "algorithm": {"type": "maml", "inner_lr": 0.01, "inner_steps": 5},
        "run": {
            "steps": 10_000_000,
            "tasks_per_step": 16,
            "shards": 4,
            "workers": 2,
            "eval_every": 200,
            "eval_tasks": 100,
            "checkpoint_every": 50,
            "name": "soak",
        },
    }


def find_descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *find_descendants(child)]
    return found


def find_processes(driver: int) -> dict[str, int]:
    """Return the process ids of the driver and its workers by name."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in find_descendants(driver)}
    workers = sorted(pid for pid, command in commands.items() if command.startswith(b"ray::WorkerProcess"))
    return {"driver": driver} | {f"worker {i}": pid for i, pid in enumerate(workers)}


def read_process(pid: int) -> dict[str, float]:
    """Return memory in MB (proportional set size), open descriptors and processor seconds so far."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return {
        "megabytes": kilobytes / 1024,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "processor": ticks / os.sysconf("SC_CLK_TCK"),
    }


class Sample(NamedTuple):
    seconds: float
    steps: int
    processes: dict[str, dict[str, float]]


def run_soak(minutes: float, pause: float, folder: Path) -> tuple[list[Sample], list[dict[str, Any]]]:
    """Train for some minutes. Return the samples and the records of metrics.jsonl."""
    (folder / "job.yaml").write_text(yaml.safe_dump(make_job(pause)))
    paths = [str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "distmeta.cli.main", "train", "job.yaml", "--json"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL, env=environment)
    metrics = folder / "runs" / "soak" / "metrics.jsonl"
    while not metrics.exists():
        assert process.poll() is None, "the run did not start"
        time.sleep(0.5)
    samples: list[Sample] = []
    started = time.monotonic()
    while time.monotonic() - started < 60 * minutes:
        time.sleep(min(INTERVAL, 6 * minutes))
        assert process.poll() is None, "the run ended by itself"
        processes = {name: read_process(pid) for name, pid in find_processes(process.pid).items()}
        steps = metrics.read_bytes().count(b"\n")
        samples.append(Sample(time.monotonic() - started, steps, processes))
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 130, "the run saves a checkpoint and ends"
    return samples, [json.loads(line) for line in metrics.read_text().splitlines()]


def compare_tenths(what: str, values: Sequence[float]) -> dict[str, Any]:
    """Return the medians of the second and of the last tenth."""
    tenth = max(len(values) // 10, 1)
    early = statistics.median(values[tenth : 2 * tenth])
    late = statistics.median(values[-tenth:])
    return {"what": what, "second_tenth": early, "last_tenth": late}


def processor_seconds_per_step(samples: list[Sample]) -> list[float]:
    """Return the processor seconds of all processes per step, between consecutive samples."""
    found = []
    for before, after in pairwise(samples[1:]):
        spent = sum(
            after.processes[name]["processor"] - before.processes[name]["processor"]
            for name in after.processes
        )
        found.append(spent / max(after.steps - before.steps, 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds that a draw takes at least")
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    given = parser.parse_args()
    environment = describe_environment()
    minutes = 0.3 if given.quick else given.minutes
    with tempfile.TemporaryDirectory() as folder:
        samples, records = run_soak(minutes, given.pause, Path(folder))
    names = list(samples[-1].processes)
    assert all(set(names) <= set(sample.processes) for sample in samples[1:]), "a worker was lost on the way"
    rows = [
        compare_tenths(f"{name}: {what}", [sample.processes[name][what] for sample in samples[1:]])
        for name in names
        for what in ("megabytes", "descriptors")
    ]
    rows.append(compare_tenths("processor seconds a step", processor_seconds_per_step(samples)))
    rows.append(compare_tenths("seconds a step", [record["seconds_step"] for record in records]))
    settings = {"steps": len(records), "minutes": samples[-1].seconds / 60, "pause": given.pause}
    save_section("soak", "hour", environment, rows, given.quick, **settings)


if __name__ == "__main__":
    main()
