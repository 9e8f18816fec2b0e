"""`run.strategy`: how meta-gradients are combined, and the keys of `run` that belong to one strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from distmeta.config.parts import shown
from distmeta.errors import InputError

Strategy = Literal["driver", "sharded", "all-reduce", "async", "local"]

KEYS: dict[str, dict[str, Any]] = {
    "driver": {},
    "sharded": {"servers": 2},
    "all-reduce": {},
    "async": {"max_staleness": 2, "staleness_aware": False},
    "local": {"replicas": 2, "local_steps": 50, "local_lr": 0.7, "local_momentum": 0.9},
}
"""Each strategy's own keys and their defaults; they are null under any other."""
ON_WORKERS = {"sharded", "all-reduce", "async"}
"""Those that need Ray workers."""
SAME_BITS = {"driver", "sharded"}
"""Between these a resume may go: the same theta and the same state to the bit."""
OWN = sorted({key for keys in KEYS.values() for key in keys})


def filled(run: Any) -> Any:
    """The section `run` with the defaults of its strategy's keys.

    Raises:
        InputError: a key of another strategy has a value.
    """
    strategy = run.get("strategy", "driver") if isinstance(run, Mapping) else None
    if not isinstance(strategy, str) or strategy not in KEYS:
        return run  # refused by its type
    for key in OWN:
        if run.get(key) is not None and key not in KEYS[strategy]:
            owner = next(name for name, keys in KEYS.items() if key in keys)
            raise InputError(
                f"run.{key}: got {shown(run[key])} with run.strategy: {strategy}, expected run.strategy: {owner}"
            )
    defaults = {key: value for key, value in KEYS[strategy].items() if run.get(key) is None}
    return {**run, **defaults}


def in_process(run: Mapping[str, Any]) -> dict[str, Any]:
    """The section `run` of a job that computes in this process and combines nothing: an evaluation's."""
    return {**run, "workers": 0, "strategy": "driver", **dict.fromkeys(OWN)}


def check(run: Any) -> None:
    """Raises InputError where the section `run` and its strategy do not go together."""
    if run.strategy in ON_WORKERS and not run.max_workers:
        raise InputError(
            f"run.strategy: got {run.strategy!r} with run.workers: 0, expected at least 1 worker"
        )
    if run.strategy == "all-reduce" and run.compress != "none":
        raise InputError(
            f"run.compress: got {run.compress} with run.strategy: all-reduce, whose sums travel as they are: "
            "expected none"
        )
    if run.strategy != "local":
        return
    if run.shards is not None and run.replicas > run.shards:
        raise InputError(
            f"run.replicas: got {run.replicas}, expected at most run.shards = {run.shards}, their shares of a step"
        )
    for key in ("eval_every", "checkpoint_every"):
        if getattr(run, key) % run.local_steps:
            raise InputError(
                f"run.{key}: got {getattr(run, key)}, expected a multiple of run.local_steps = {run.local_steps}: "
                "between averages there is no one theta"
            )
