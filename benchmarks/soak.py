"""Memory, file descriptors, processor and wall time of a step over a long run: nothing may grow.

    python benchmarks/soak.py [--minutes 60] [--pause 0.05] [--quick]

Sine waves on two Ray workers, an evaluation each 200 steps, a checkpoint each 50, MLflow on. Each draw pauses on the
workers, so that an hour on a machine with other things to do holds the same work. Every 10 s: memory (proportional
set size, which counts a page that k processes share as 1/k), open descriptors and processor time of the driver and the
workers; the last over the steps meanwhile is what other work on the machine disturbs least. Flat means: the median of
the last tenth against that of the second tenth, the first being the start.
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
from typing import Any

import report
import yaml

from distmeta.protocols import Episode
from distmeta.tasks.regression import Sinusoid

EVERY = 10.0
"""Seconds between two looks."""
TOLD = ("seconds", "files", "steps")
"""What a look has besides processes."""


class Paced(Sinusoid):
    """Sine waves whose draws take a moment."""

    def __init__(self, pause: float, shots: int = 10, queries: int = 10):
        super().__init__(shots=shots, queries=queries)
        self.pause = pause

    def draw(self, split: str, ids: Any) -> Episode:
        time.sleep(self.pause)
        return super().draw(split, ids)


def job(pause: float) -> dict[str, Any]:
    return {
        "name": "soak",
        "model": {"type": "mlp", "hidden": [40, 40]},
        "tasks": {"type": "soak:Paced", "pause": pause, "shots": 10, "queries": 10},
        "algorithm": {"type": "maml", "inner_lr": 0.01, "inner_steps": 5},
        "run": {
            "steps": 10_000_000, "tasks_per_step": 16, "shards": 4, "workers": 2, "eval_every": 200,
            "eval_tasks": 100, "checkpoint_every": 50, "name": "soak",
        },
    }  # fmt: skip


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def look(pid: int) -> dict[str, float]:
    """MB of proportional set size, descriptors, and seconds of processor time so far."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    ticks = sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return {
        "megabytes": kilobytes / 1024,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "processor": ticks / os.sysconf("SC_CLK_TCK"),
    }


def watched(driver: int) -> dict[str, int]:
    """The driver and its workers, by name."""
    names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(driver)}
    workers = sorted(pid for pid, words in names.items() if words.startswith(b"ray::WorkerProcess"))
    return {"driver": driver} | {f"worker {i}": pid for i, pid in enumerate(workers)}


def soak(minutes: float, pause: float, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The looks, and the run's metrics."""
    (folder / "job.yaml").write_text(yaml.safe_dump(job(pause)))
    paths = [str(Path(__file__).parent), str(report.ROOT), os.environ.get("PYTHONPATH", "")]
    line = [sys.executable, "-m", "distmeta.cli.main", "train", "job.yaml", "--json"]
    process = subprocess.Popen(
        line, cwd=folder, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    )
    looks: list[dict[str, Any]] = []
    metrics = folder / "runs" / "soak" / "metrics.jsonl"
    while not metrics.exists():
        assert process.poll() is None, "the run did not start"
        time.sleep(0.5)
    begun = time.monotonic()
    while time.monotonic() - begun < 60 * minutes:
        time.sleep(min(EVERY, 6 * minutes))
        assert process.poll() is None, "the run ended by itself"
        now = {name: look(pid) for name, pid in watched(process.pid).items()}
        told = {
            "seconds": time.monotonic() - begun,
            "files": len(list(folder.rglob("*"))),
            "steps": metrics.read_bytes().count(b"\n"),
        }
        looks.append(told | now)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 130, "Ctrl-C saves and ends"
    return looks, [json.loads(line) for line in metrics.read_text().splitlines()]


def growth(values: Sequence[float]) -> dict[str, float]:
    """The median of the last tenth, of the second, and their ratio."""
    tenth = max(len(values) // 10, 1)
    early, late = statistics.median(values[tenth : 2 * tenth]), statistics.median(values[-tenth:])
    return {"second tenth": early, "last tenth": late, "ratio": late / early}


def processor_a_step(looks: list[dict[str, Any]]) -> list[float]:
    """Seconds of processor time of all watched processes, over the steps from each look to the next."""
    names = [key for key in looks[-1] if key not in TOLD]
    return [
        sum(after[name]["processor"] - before[name]["processor"] for name in names)
        / max(after["steps"] - before["steps"], 1)
        for before, after in pairwise(looks[1:])
    ]


def plot(looks: list[dict[str, Any]], steps: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(8, 8), constrained_layout=True)
    minutes = [each["seconds"] / 60 for each in looks]
    for name in [key for key in looks[-1] if key not in TOLD]:
        axes[0].plot(minutes, [each[name]["megabytes"] for each in looks], label=name)
        axes[1].plot(minutes, [each[name]["descriptors"] for each in looks], label=name)
    axes[0].set(ylabel="memory, MB (PSS)", xlabel="minutes", ylim=(0, None))
    axes[1].set(ylabel="open descriptors", xlabel="minutes", ylim=(0, None))
    axes[0].legend()
    size = max(len(steps) // 200, 1)
    pieces = [steps[i : i + size] for i in range(0, len(steps), size)]
    medians = [1000 * statistics.median(row["seconds_step"] for row in piece) for piece in pieces]
    axes[2].plot([piece[0]["step"] for piece in pieces], medians, label=f"wall, median of {size}")
    spent = [1000 * value for value in processor_a_step(looks)]
    axes[2].plot([look["steps"] for look in looks[2:]], spent, label="processor, all three")
    axes[2].set(ylabel="ms a step", xlabel="step", ylim=(0, None))
    axes[2].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds that a draw takes at least")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    start, minutes = report.environment(), 0.3 if options.quick else options.minutes
    with tempfile.TemporaryDirectory() as folder:
        looks, steps = soak(minutes, options.pause, Path(folder))
    names = [key for key in looks[-1] if key not in TOLD]
    assert all(set(names) <= set(each) for each in looks[1:]), "a worker was lost on the way"
    figures = {
        f"{name}: {what}": growth([each[name][what] for each in looks[1:] if name in each])
        for name in names
        for what in ("megabytes", "descriptors")
    }
    figures["processor seconds a step"] = growth(processor_a_step(looks))
    figures["seconds a step"] = growth([row["seconds_step"] for row in steps])
    rows = [
        [name, *(f"{figure[key]:.4g}" for key in ("second tenth", "last tenth", "ratio"))]
        for name, figure in figures.items()
    ]
    print(report.table(["what", "second tenth", "last tenth", "ratio"], rows))
    print(
        f"{len(steps)} steps in {looks[-1]['seconds'] / 60:.0f} minutes; {looks[-1]['files']} files in the folder"
    )
    result = {
        "steps": len(steps),
        "minutes": looks[-1]["seconds"] / 60,
        "pause": options.pause,
        "flat": figures,
    }
    report.write("soak", start, result, options.quick)
    if not options.quick:
        plot(looks, steps, report.RESULTS / "soak.png")


if __name__ == "__main__":
    main()
