"""The memory of a process that computes: what it frees, it keeps."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of mallopt(3), glibc."""


def keep_freed() -> None:
    """From here on this process keeps the memory that it frees for what it allocates next; Linux with glibc alone.

    A tensor of more than some hundred kilobytes is otherwise fresh from the system each time, which hands it out page
    by page and clears each: a fifth of the time of a convolutional net's shard, over half with 4 million parameters. In
    return the process never becomes smaller than it was at its largest.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
