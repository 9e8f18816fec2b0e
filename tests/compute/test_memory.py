"""A process that computes keeps the memory that it frees."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PAGES = """
import resource, sys
import torch
if sys.argv[1] == "kept":
    from distmeta.compute.memory import keep_freed_memory
    keep_freed_memory()
def fill():
    for size in (5_000_000, 20_000_000):  # glibc keeps at most 32 MB on its own
        torch.ones(size)
for _ in range(10):
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    def pages(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", PAGES, how], check=True, capture_output=True, text=True, timeout=120
        )
        return int(done.stdout)

    assert pages("kept") * 10 < pages("as it comes")
