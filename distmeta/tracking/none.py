"""The tracker of a job that needs none: the run folder has everything."""

from __future__ import annotations

from distmeta.tracking.interface import TrackedRun


class NoTracker:
    """What `tracking: {type: none}` names. distmeta never builds it."""

    def __init__(self, run: TrackedRun): ...
