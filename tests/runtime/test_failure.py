"""The failure policy and the bookkeeping of shards, without Ray; a worker that is refused, with it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import tree
from hypothesis import given
from hypothesis import strategies as st

from distmeta.compute.compiler import MissingCompilerError
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import ray_workers as fleet
from distmeta.runtime.failure_policy import another_may_fare_better, backoff, gives_up, hung, straggles
from distmeta.runtime.pending_shards import PendingShards
from distmeta.runtime.scores import spikes


def test_the_first_loss_is_replaced_at_once_further_ones_in_a_row_back_off_up_to_a_limit() -> None:
    assert [backoff(n) for n in range(6)] == [0.0, 0.0, 0.5, 1.0, 2.0, 4.0]
    assert backoff(12) == backoff(10_000) == 30.0


def test_a_shard_that_keeps_killing_stops_the_run_and_is_named() -> None:
    assert gives_up("shard 3 (tasks 12 to 15)", 2, 3, "ActorDiedError: killed") is None
    message = gives_up("shard 3 (tasks 12 to 15)", 3, 3, "ActorDiedError: killed")
    for part in ("shard 3", "tasks 12 to 15", "3 workers", "ActorDiedError", "run.max_shard_failures is 3"):
        assert part in str(message)


def test_a_straggler_is_one_that_takes_far_longer_than_its_peers() -> None:
    assert not straggles(1e9, [], 1), "nothing to compare with"
    assert not straggles(4.9, [0.001] * 5, 1), "too short to matter"
    assert straggles(5.1, [0.001] * 5, 1)
    assert not straggles(39.0, [10.0] * 5, 1)
    assert straggles(41.0, [10.0] * 5, 1)
    assert not straggles(1e9, [10.0] * 5, 2), "two workers have it already"


def test_a_worker_is_hung_after_the_limit_or_sooner_where_its_peers_were_timed() -> None:
    assert not hung(1799.0, [], 0, 1800.0)
    assert hung(1801.0, [], 0, 1800.0)
    assert not hung(59.0, [0.1], 0, 1800.0)
    assert hung(61.0, [0.1], 0, 1800.0)
    assert not hung(199.0, [0.1, 10.0], 0, 1800.0)
    assert hung(201.0, [0.1, 10.0], 0, 1800.0)
    assert not hung(399.0, [0.1, 10.0], 1, 1800.0), "it has cost a worker already: it may be a slow one"
    assert hung(4.0, [100.0], 9, 3.0), "never past the limit"


def test_a_loss_spikes_where_it_stands_out_from_those_before() -> None:
    usual = [1.0, 1.2, 0.8, 1.1] * 5
    assert not spikes(100.0, usual[:19]), "too few to compare with"
    assert not spikes(2.0, usual)
    assert spikes(2.6, usual)
    assert not spikes(0.0, usual)
    assert not spikes(1.9e-6, [1e-6] * 20), "small numbers that hardly move"
    assert not spikes(-5.0, [-10.0 + 0.1 * k for k in range(20)]), "returns as losses are negative"
    assert spikes(5.0, [-10.0 + 0.1 * k for k in range(20)])


def test_only_a_workers_circumstances_are_tried_elsewhere() -> None:
    import torch

    for error in (
        MemoryError(),
        FileNotFoundError("store"),
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: unspecified launch failure", 719),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    ):
        assert another_may_fare_better(error), error
    for error in (
        InputError("tasks.path"),
        RuntimeError("shapes"),
        ZeroDivisionError(),
        torch.AcceleratorError("CUDA error: device-side assert triggered", 710),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    ):
        assert not another_may_fare_better(error), error


@given(st.integers(1, 9), st.lists(st.tuples(st.integers(0, 3), st.sampled_from("GGGAL")), max_size=200))
def test_whatever_happens_every_shard_is_answered_once(count: int, events: list[tuple[int, str]]) -> None:
    """Workers take shards (G), also those of stragglers, answer (A) and are lost (L) in any order."""
    work: PendingShards[int] = PendingShards(count)
    held: dict[int, int] = {}  # worker -> position
    answers = 0
    for now, (worker, event) in enumerate([*events, *((0, e) for e in "AGA" * 3 * count)], start=1):
        if event == "G" and worker not in held:
            position = work.next()
            position = work.straggler(now * 100.0, [1.0]) if position is None else position
            if position is not None:
                assert position not in work.results
                assert list(held.values()).count(position) < 2
                work.given(position, now * 100.0)
                held[worker] = position
        elif event == "A" and worker in held:
            answers += work.answered(held.pop(worker), worker)
        elif event == "L" and worker in held:
            work.lost(held.pop(worker), blamed=True)
    for worker in list(held):
        answers += work.answered(held.pop(worker), worker)
    while (position := work.next()) is not None:
        work.given(position, 1e9)
        answers += work.answered(position, 0)
    assert work.done
    assert answers == count == len(work.in_order())


def test_a_worker_that_comes_later_without_a_compiler_is_refused(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real cluster; who builds first finds a compiler, the others do not."""
    import ray

    first = str(tmp_path / "first")

    class Picky(fleet.WorkerProcess):
        def build(self, spec: Any) -> int:
            try:
                open(first, "x").close()
            except FileExistsError:
                time.sleep(1.0)  # by then the run has begun
                raise MissingCompilerError("no C++ compiler (g++) on elsewhere") from None
            return 0

    monkeypatch.setattr(fleet, "WorkerProcess", Picky)
    said: list[str] = []
    run = Job.parse(tree(run={"workers": {"min": 1, "max": 2}, "cpus_per_worker": 0.5})).run
    workers = fleet.Fleet(ray, run, ray.put(None), said.append)
    try:
        workers.open()
        deadline = time.monotonic() + 60
        while not any("is refused" in text for text in said):
            assert time.monotonic() < deadline, said
            workers.tend()
            workers.wait([])
        assert workers.size == 1, "the run goes on with the one that it has"
    finally:
        workers.close()
    refused = (
        r"worker \d is refused \(there is no C\+\+ compiler \(g\+\+\) on elsewhere\): another is started"
    )
    assert any(re.fullmatch(refused, text) for text in said), said
