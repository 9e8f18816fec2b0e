"""Runs of small jobs and what they leave, for tests that compare them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import distmeta
from distmeta.config.job import Job
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.training import Silent


class Watching(Silent):
    """Does something after a step, in the driver's own thread; keeps what is said."""

    def __init__(self, steps: Mapping[int, Callable[[], Any]] | None = None):
        self.steps, self.said = dict(steps or {}), list[str]()

    def step(self, record: Mapping[str, Any]) -> None:
        self.steps.pop(record["step"], lambda: None)()

    def say(self, text: str) -> None:
        self.said.append(text)


def trained(
    job: dict[str, Any], reporter: Silent | None = None, resume: Path | None = None, **run: Any
) -> Path:
    return distmeta.train(Job.parse(job | {"run": job["run"] | run}), resume, reporter).run


def outcome(run: Path) -> tuple[dict[str, bytes], dict[str, bytes], Any, list[dict[str, Any]]]:
    """theta, the optimizer's state, the schedule; metrics.jsonl without what depends on the clock."""
    saved = checkpoints.load(run)
    theta, moments = (
        {name: value.numpy().tobytes() for name, value in found.items()}
        for found in (saved.theta, saved.optimizer)
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith(("seconds", "tasks_per"))} for row in rows]
    return theta, moments, saved.outer, rows
