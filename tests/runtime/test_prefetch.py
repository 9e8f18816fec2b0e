"""Tasks that are drawn before they are asked for: the same ones, by one thread at a time."""

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


def a_worker(**compute: Any) -> tuple[Worker, np.ndarray]:
    """As it is in a process of its own."""
    problem = resolve(build_problem(Job.parse(tree("maml", compute=compute))))
    server = ParameterServer(problem.init(), problem.job.outer)
    return Worker.from_spec(WorkerSpec.from_problem(problem, server.layout)), server.flat()


def test_draws_are_those_asked_for_and_begun_before(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, flat = a_worker(draw_ahead=True)
    problem = worker.enter_phase(0)
    drawn: list[tuple[str, int, tuple[int, ...]]] = []
    inside, draw = threading.Lock(), problem.family.draw

    def watched(split: str, ids: np.ndarray) -> Episode:
        assert inside.acquire(blocking=False), "a task family is used by one thread at a time"
        drawn.append((split, threading.get_ident(), tuple(map(int, ids))))
        time.sleep(0.02)
        inside.release()
        return draw(split, ids)

    monkeypatch.setattr(problem.family, "draw", watched)
    plain, _ = a_worker()
    here = threading.get_ident()
    for step in range(4):
        plan = plan_shards(problem, "train", step, 8, 4, 1)
        # what comes next changes in the last step: guessed wrong, drawn when it is asked for
        for shard in plan[::2] if step < 3 else plan[1::2]:
            ahead, alone = worker.compute(flat, shard), plain.compute(flat, shard)
            assert np.array_equal(ahead.gradient, alone.gradient)
            assert ahead.metrics.keys() == alone.metrics.keys()
        scored = plan_shards(problem, "val", 0, 8, 1, 1)[0]
        assert np.array_equal(
            worker.compute(flat, scored).metrics["loss"], plain.compute(flat, scored).metrics["loss"]
        )
    asked = [thread == here for split, thread, _ in drawn if split == "train"]
    # step 0: nobody knows what comes; step 1: the first shard was guessed when the second one came again
    assert asked.count(False) >= 3, drawn
    assert all(thread == here for split, thread, _ in drawn if split == "val")


def test_a_draw_that_fails_ahead_is_raised_where_it_is_asked_for() -> None:
    shards = [Shard(index, "train", 0, 4, index, index + 1, 1) for index in range(2)]
    ahead, failing = Prefetcher(1), set[int]()

    def draw(shard: Shard) -> Any:
        if shard.step in failing:
            raise ZeroDivisionError(str(shard.step))
        return shard.step, shard.index

    def at(step: int, index: int) -> Any:
        return ahead.draw(Shard(index, "train", step, 4, index, index + 1, 1), draw)

    assert [ahead.draw(shard, draw) for shard in shards] == [(0, 0), (0, 1)]
    failing.add(2)
    assert [at(1, 0), at(1, 1)] == [(1, 0), (1, 1)]
    ahead.wait()
    with pytest.raises(ZeroDivisionError):
        at(2, 0)
    failing.clear()
    assert [at(2, 0), at(2, 1), at(5, 1)] == [(2, 0), (2, 1), (5, 1)]


def test_a_shard_of_a_later_theta_has_the_tasks_that_were_drawn_for_it() -> None:
    """`async` gives every shard the theta that there is when it is handed out."""
    ahead, threads = Prefetcher(1), list[int]()

    def draw(shard: Shard) -> Any:
        threads.append(threading.get_ident())
        return shard.step, shard.index

    for step in range(4):
        for index in range(2):
            shard = Shard(index, "train", step, 4, index, index + 1, 1, version=step)
            assert ahead.draw(shard, draw) == (step, index)
    ahead.wait()
    # the first three, while nobody knows what comes; all others ahead, once each
    assert [thread == threading.get_ident() for thread in threads] == [True] * 3 + [False] * 6
