"""Prefetched tasks are the same ones, and one thread at a time uses a task family."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tree

from distmeta.config.job import Job
from distmeta.protocols import Episode
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.prefetch import Prefetcher
from distmeta.runtime.problem import build_problem
from distmeta.runtime.resolve import resolve
from distmeta.runtime.shards import Shard, WorkerSpec
from distmeta.runtime.worker import Worker, plan_shards


def build_worker(**compute: Any) -> tuple[Worker, np.ndarray]:
    """Return a worker as it is in a Ray actor, and theta."""
    problem = resolve(build_problem(Job.parse(tree("maml", compute=compute))))
    server = ParameterServer(problem.init(), problem.job.outer)
    return Worker.from_spec(WorkerSpec.from_problem(problem, server.layout)), server.flat()


def test_prefetched_tasks_give_the_same_gradients(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, flat = build_worker(draw_ahead=True)
    problem = worker.enter_phase(0)
    drawn: list[tuple[str, int, tuple[int, ...]]] = []
    inside = threading.Lock()
    draw = problem.family.draw

    def watched(split: str, ids: np.ndarray) -> Episode:
        assert inside.acquire(blocking=False), "a task family is used by one thread at a time"
        drawn.append((split, threading.get_ident(), tuple(map(int, ids))))
        time.sleep(0.02)
        inside.release()
        return draw(split, ids)

    monkeypatch.setattr(problem.family, "draw", watched)
    plain, _ = build_worker()
    here = threading.get_ident()
    for step in range(4):
        plan = plan_shards(problem, "train", step, 8, 4, 1)
        # other shards in the last step: the guesses are wrong, and the tasks are drawn when they are needed
        for shard in plan[::2] if step < 3 else plan[1::2]:
            prefetched = worker.compute(flat, shard)
            expected = plain.compute(flat, shard)
            assert np.array_equal(prefetched.gradient, expected.gradient)
            assert prefetched.metrics.keys() == expected.metrics.keys()
        scored = plan_shards(problem, "val", 0, 8, 1, 1)[0]
        assert np.array_equal(
            worker.compute(flat, scored).metrics["loss"], plain.compute(flat, scored).metrics["loss"]
        )
    asked = [thread == here for split, thread, _ in drawn if split == "train"]
    # step 0: nothing can be guessed; step 1: the first shard is guessed when the second one comes again
    assert asked.count(False) >= 3, drawn
    assert all(thread == here for split, thread, _ in drawn if split == "val")


def test_failed_prefetch_is_raised_when_the_shard_is_computed() -> None:
    shards = [Shard(index, "train", 0, 4, index, index + 1, 1) for index in range(2)]
    prefetcher = Prefetcher(1)
    failing: set[int] = set()

    def draw(shard: Shard) -> Any:
        if shard.step in failing:
            raise ZeroDivisionError(str(shard.step))
        return shard.step, shard.index

    def draw_shard(step: int, index: int) -> Any:
        return prefetcher.draw(Shard(index, "train", step, 4, index, index + 1, 1), draw)

    assert [prefetcher.draw(shard, draw) for shard in shards] == [(0, 0), (0, 1)]
    failing.add(2)
    assert [draw_shard(1, 0), draw_shard(1, 1)] == [(1, 0), (1, 1)]
    prefetcher.wait()
    with pytest.raises(ZeroDivisionError):
        draw_shard(2, 0)
    failing.clear()
    assert [draw_shard(2, 0), draw_shard(2, 1), draw_shard(5, 1)] == [(2, 0), (2, 1), (5, 1)]


def test_prefetched_tasks_are_used_with_a_later_theta() -> None:
    """`async` gives every shard the current theta when it is handed out."""
    prefetcher = Prefetcher(1)
    threads: list[int] = []

    def draw(shard: Shard) -> Any:
        threads.append(threading.get_ident())
        return shard.step, shard.index

    for step in range(4):
        for index in range(2):
            shard = Shard(index, "train", step, 4, index, index + 1, 1, version=step)
            assert prefetcher.draw(shard, draw) == (step, index)
    prefetcher.wait()
    # the first three are drawn when needed, because nothing can be guessed; all others are prefetched, once each
    assert [thread == threading.get_ident() for thread in threads] == [True] * 3 + [False] * 6
