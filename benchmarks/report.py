"""What every result carries: where, when and how it was measured; intervals, tables, JSON files."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "ray", "numpy", "torchopt", "higher", "jax", "scikit-learn")


def environment() -> dict[str, Any]:
    """Command, hardware, versions, commit, date, and how busy the machine was when the measuring began."""
    return {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "hardware": hardware(),
        "load_average_at_start": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES} | _cuda_versions(),
    }


def commit() -> str:
    """The short hash of HEAD; `+changes` where a tracked file outside benchmarks/ differs from it."""
    head = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks")
    return (head or "unknown") + ("+changes" if changed else "")


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_bf16() -> bool:
    """Whether this processor has instructions for bfloat16."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def hardware() -> str:
    """Processor, cores, memory; the GPU that torch takes where it sees one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{processor}, {cores()} cores, {gigabytes:.0f} GiB, {_gpu() or 'CPU only'}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns padded so that a terminal shows it as one too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def write(name: str, start: dict[str, Any], result: dict[str, Any], quick: bool) -> None:
    """Writes results/NAME.json; a smoke run leaves no figures behind."""
    if quick:
        print("\n--quick: a smoke run; its figures mean nothing and are not written")
        return
    load = [round(value, 2) for value in os.getloadavg()]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {"environment": start | {"load_average_at_end": load}, **result}
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nwrote {os.path.relpath(path)}")


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean and 1.96·s/√n."""
    spread = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {"mean": float(np.mean(values)), "ci95": spread}


def percent(figure: Mapping[str, float]) -> str:
    return f"{100 * figure['mean']:.2f} ± {100 * figure['ci95']:.2f} %"


def plain(figure: Mapping[str, float]) -> str:
    return f"{figure['mean']:.3f} ± {figure['ci95']:.3f}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"GPU {found.name}, {found.total_memory / 2**30:.0f} GiB"


def _cuda_versions() -> dict[str, Any]:
    """CUDA's and cuDNN's, where there is a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
