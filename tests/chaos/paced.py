"""Policies that act a moment longer on Ray workers, so that a run lasts long enough to be harmed."""

from __future__ import annotations

import sys
import time
from typing import Any

from distmeta.tasks.bandit import Bandit
from distmeta.tasks.navigation import Navigation
from distmeta.trajectories import Trajectories


class _Paced:
    def __init__(self, family: Any, seconds: float):
        self.family, self.seconds = family, seconds
        self.in_shape, self.out_features, self.score = family.in_shape, family.out_features, family.score

    def collect(self, split: str, ids: Any, k: int, policy: Any) -> Trajectories:
        if sys.argv[0].endswith("default_worker.py"):
            time.sleep(self.seconds)
        return self.family.collect(split, ids, k, policy)


class PacedNavigation(_Paced):
    def __init__(self, seconds: float):
        super().__init__(Navigation(trajectories=4, horizon=6), seconds)


class PacedBandit(_Paced):
    def __init__(self, seconds: float):
        super().__init__(Bandit(arms=3, horizon=6), seconds)
