"""The tracker of a job that needs none: the run folder has everything."""

from __future__ import annotations

from typing import Any

from distmeta.tracking.interface import TrackedRun


class NoTracker:
    """What `tracking: {type: none}` names. distmeta never builds it.

    It accepts any option, so that `tracking.type=none` on the command line works with every job file.
    """

    def __init__(self, run: TrackedRun, **options: Any): ...
