"""Policies that act a moment longer on Ray workers, so that a run lasts long enough to be harmed."""

from __future__ import annotations

import sys
import time
from typing import Any

from distmeta.tasks.bandit import Bandit
from distmeta.tasks.navigation import Navigation
from distmeta.trajectories import Trajectories


class PacedFamily:
    """A task family that sleeps before it collects data, in Ray's worker processes only."""

    def __init__(self, family: Any, seconds: float):
        self.family = family
        self.seconds = seconds
        self.in_shape = family.in_shape
        self.out_features = family.out_features
        self.score = family.score

    def collect(self, split: str, ids: Any, k: int, policy: Any) -> Trajectories:
        if sys.argv[0].endswith("default_worker.py"):
            time.sleep(self.seconds)
        return self.family.collect(split, ids, k, policy)


class PacedNavigation(PacedFamily):
    def __init__(self, seconds: float):
        super().__init__(Navigation(trajectories=4, horizon=6), seconds)


class PacedBandit(PacedFamily):
    def __init__(self, seconds: float):
        super().__init__(Bandit(arms=3, horizon=6), seconds)
