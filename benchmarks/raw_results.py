"""Raw results of the benchmarks: one file per study in results/, and what every measurement records about itself.

A file is a JSON list of sections, one per part of the study. A section has the name of its `part`, the `environment` in
which it was measured, its `settings` and its `rows`. `report.py` makes the tables of README.md from these files.
"""

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
SCRIPT = os.path.relpath(sys.argv[0], ROOT)
"""The script that runs. Found at import, since some scripts change the working folder."""
PACKAGES = ("torch", "ray", "numpy", "torchopt", "higher", "jax", "scikit-learn")

Section = dict[str, Any]


def describe_environment() -> dict[str, Any]:
    """Return command, hardware, versions, commit, date and the load of the machine. Call it before measuring."""
    return {
        "command": shlex.join(["python", SCRIPT, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": current_commit(),
        "hardware": describe_hardware(),
        "load_average_at_start": load_average(),
        "python": platform.python_version(),
        "versions": package_versions(),
    }


def load_study(study: str) -> dict[str, Section]:
    """Return the sections of results/STUDY.json by part; none if there is no such file."""
    path = RESULTS / f"{study}.json"
    if not path.is_file():
        return {}
    sections = json.loads(path.read_text(encoding="utf-8"))
    return {section["part"]: section for section in sections}


def save_section(
    study: str,
    part: str,
    environment: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    quick: bool = False,
    **settings: Any,
) -> None:
    """Write one part of a study to results/STUDY.json. Other parts stay. With `quick` only print the rows."""
    if quick:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        print("--quick: a smoke run. Its figures mean nothing and are not written.")
        return
    section: Section = {"part": part, "environment": {**environment, "load_average_at_end": load_average()}}
    if settings:
        section["settings"] = settings
    section["rows"] = list(rows)
    sections = load_study(study)
    sections[part] = section
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{study}.json"
    path.write_text(format_sections(list(sections.values())), encoding="utf-8")
    print(f"wrote {os.path.relpath(path)}: {part}, {len(rows)} rows", flush=True)


def format_sections(sections: Sequence[Section]) -> str:
    """Return the sections as JSON with one line per row, which keeps files small and differences readable."""
    texts = []
    for section in sections:
        head = {key: value for key, value in section.items() if key != "rows"}
        rows = ",\n".join(" " + json.dumps(row, ensure_ascii=False) for row in section["rows"])
        texts.append(f'{json.dumps(head, ensure_ascii=False)[:-1]}, "rows": [\n{rows}\n]}}')
    return "[\n" + ",\n".join(texts) + "\n]\n"


def interval(values: np.ndarray) -> dict[str, float]:
    """Return the mean and the half width of its 95 % interval, 1.96·s/√n."""
    half_width = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {"mean": float(np.mean(values)), "ci95": half_width}


def current_commit() -> str:
    """Return the short hash of HEAD, with `+changes` if a tracked file outside benchmarks/ differs from it."""
    head = run_git("rev-parse", "--short", "HEAD")
    changed = run_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks")
    suffix = "+changes" if changed else ""
    return (head or "unknown") + suffix


def run_git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def has_bf16_instructions() -> bool:
    """Return whether this processor has instructions for bfloat16."""
    words = set(read_cpuinfo().split())
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def describe_hardware() -> str:
    """Return processor, cores, memory and, if torch sees one, the GPU."""
    lines = read_cpuinfo().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{processor}, {count_cores()} cores, {gigabytes:.0f} GiB, {describe_gpu()}"


def describe_gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "CPU only"
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"GPU {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"


def package_versions() -> dict[str, Any]:
    """Return the versions of the packages that are installed, and of CUDA and cuDNN if there is a GPU."""
    import torch

    found: dict[str, Any] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def load_average() -> list[float]:
    return [round(load, 2) for load in os.getloadavg()]
