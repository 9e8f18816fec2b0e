"""How shards' meta-gradients become the next theta: one literal table, `run.strategy` -> "module:Class".

A strategy is a class with the functions of `distmeta.runtime.strategy.Strategy`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from distmeta.config.sections import Outer
from distmeta.runtime.checkpoint import TrainingState
from distmeta.runtime.problem import Problem
from distmeta.runtime.strategy import Strategy

STRATEGIES = {
    "driver": "distmeta.strategies.driver:Driver",
    "sharded": "distmeta.strategies.sharded:Sharded",
    "all-reduce": "distmeta.strategies.all_reduce.driver_side:AllReduce",
    "async": "distmeta.strategies.asynchronous:Async",
    "local": "distmeta.strategies.local:Local",
}


def open_strategy(
    problem: Problem, outer: Outer, state: TrainingState | None, say: Callable[[str], None]
) -> Strategy:
    """The strategy that the job asks for, ready to advance."""
    module, _, name = STRATEGIES[problem.job.run.strategy].partition(":")
    return getattr(import_module(module), name)(problem, outer, state, say)
