"""A rank of the `all-reduce` group: a replica of theta and the outer optimizer, and the shards that are its own."""

from __future__ import annotations

import pickle
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import distributed

from distmeta.compute.compression import decode
from distmeta.compute.vectors import Layout, finite, tree_sum
from distmeta.errors import NumericsError
from distmeta.runtime.failure_policy import another_may_fare_better
from distmeta.runtime.problem import Problem
from distmeta.runtime.strategy import server_of
from distmeta.runtime.worker import Shard, ShardResult, Worker, WorkerSpec, problem_of
from distmeta.strategies.all_reduce.group import (
    GET_SECONDS,
    Abandoned,
    RankAnswer,
    RankError,
    Give,
    Halt,
    Load,
    PackedState,
    Retune,
    Score,
    Steps,
    Stop,
)
from distmeta.strategies.gradient_step import Central


class Agreed(Exception):  # noqa: N818 - control flow within a rank
    """What one rank's computation raised, on every rank: none of them takes the step."""

    def __init__(self, failure: RankError):
        super().__init__(failure)
        self.failure = failure


class Ranks:
    """Shard i is computed by rank i mod world; all ranks have all results, but each the gradients of its own shards."""

    def __init__(self, worker: Worker):
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.gradients: list[np.ndarray] = []
        self._worker = worker
        self._slot = 4096

    def own(self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        results = []
        for shard in shards[self.rank :: self.size]:
            check()
            results.append(self._worker.compute(flat, shard))
        return results

    def map(self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        """Raises Agreed, on every rank, what any of them raised."""
        try:
            results: list[ShardResult] | RankError = self.own(flat, shards, check)
        except Exception as error:
            if another_may_fare_better(error):
                raise  # this rank leaves, and Ray Train makes the group anew
            results = RankError.of(error)
        if isinstance(results, list):
            self.gradients = [decode(r.gradient) for r in results if r.gradient is not None]
            results = [replace(result, gradient=None) for result in results]
        gathered = self._gathered(results)
        failures = [part for part in gathered if isinstance(part, RankError)]
        if failures:  # a mistake rather than the interruption that it came with
            raise Agreed(min(failures, key=lambda failure: isinstance(failure.error, Abandoned)))
        return [gathered[i % self.size][i // self.size] for i in range(len(shards))]

    def close(self) -> None:
        pass

    def _gathered(self, thing: Any) -> list[Any]:
        """Every rank's, in one small collective; in two where one is larger than any before. (all_gather_object: always
        two, and slower ones.)"""
        data = np.frombuffer(pickle.dumps(thing), np.uint8)
        while True:
            slot = np.zeros(self._slot, np.uint8)
            slot[:8] = np.frombuffer(len(data).to_bytes(8, "little"), np.uint8)
            fits = min(len(data), self._slot - 8)
            slot[8 : 8 + fits] = data[:fits]
            parts = [torch.empty(self._slot, dtype=torch.uint8) for _ in range(self.size)]
            distributed.all_gather(parts, torch.from_numpy(slot))
            found = [part.numpy().tobytes() for part in parts]
            lengths = [int.from_bytes(part[:8], "little") for part in found]
            if max(lengths) + 8 <= self._slot:
                return [pickle.loads(part[8 : 8 + n]) for part, n in zip(found, lengths, strict=True)]
            self._slot = 1 << (max(lengths) + 8).bit_length()


class Replicated(Central):
    """The parameter server of `driver`, on every rank: the same sums everywhere, so the same theta everywhere.

    A rank adds its shards by the fixed tree; the all-reduce adds the ranks' sums in an order of its own.
    """

    def __init__(self, problem: Problem):
        super().__init__(server_of(problem, problem.job.outer, None))
        self._device = problem.device
        worker = Worker.of(problem, self._server.layout)
        worker.draw_ahead()
        self.pool = self.ranks = Ranks(worker)

    def _map(self, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        return self.ranks.map(self._flat_for(shards), shards, check)

    def _average(self, results: list[ShardResult], tasks: int) -> bool:
        parts = self.ranks.gradients
        total = tree_sum(parts) if parts else np.zeros(self._server.layout.size, np.float32)
        summed = torch.from_numpy(total).to(self._device if _nccl() else "cpu")
        distributed.all_reduce(summed)
        self._mean = summed.cpu().numpy() / np.float32(tasks)
        return finite(self._mean)

    @property
    def layout(self) -> Layout:
        return self._server.layout

    def packed(self, whole: bool) -> PackedState:
        return PackedState.of(self._server, whole)


def _nccl() -> bool:
    return "nccl" in distributed.get_backend_config()


def serve(config: dict[str, Any]) -> None:
    """A rank's life, in Ray Train's training thread: command after command, until the driver or the host is gone."""
    import ray
    from ray.exceptions import RayActorError

    try:
        _Rank(ray, config["host"], config["spec"][0]).serve()
    except RayActorError:  # no host, no driver
        return


def take_own_gpu() -> None:
    """Ray Train shows a rank the GPUs of all ranks on its node. The problem is built on torch's current one, which is
    the first for all of them, and NCCL refuses ranks that share a GPU. Holds for this thread."""
    from ray.train.torch import get_device

    torch.cuda.set_device(get_device())


class _Rank:
    def __init__(self, ray: Any, host: Any, spec: Any):
        self._ray, self._host = ray, host
        self._rank, self._number, self._upcoming = distributed.get_rank(), 0, None
        names = [uuid.uuid4().hex]
        distributed.broadcast_object_list(names)
        self._attempt = names[0]
        self._kept: Any = None
        """What the driver was given a reference to."""
        failure = self._build(spec)
        self._get(host.join.remote(self._attempt, self._rank, distributed.get_world_size(), failure))

    def serve(self) -> None:
        self._ask()
        while True:
            command, number = self._await(), self._number
            if isinstance(command, Stop):
                return
            self._number += 1
            self._ask()  # the next one, so that it is seen here when there is one
            if isinstance(command, Halt):
                continue
            answer = self._obey(command)
            self._get(self._host.answer.remote(self._attempt, number, self._rank, answer))

    def _build(self, spec: Any) -> RankError | None:
        try:
            wanted: WorkerSpec = self._get(spec)
            if wanted.job["run"]["gpus_per_worker"] and torch.cuda.is_available():
                take_own_gpu()
            self._problem = problem_of(wanted)
            self._replica = Replicated(self._problem)
        except Exception as error:
            if another_may_fare_better(error):
                raise
            return RankError.of(error)
        return None

    def _obey(self, command: Any) -> RankAnswer:
        """What a circumstance raises (a lost rank, memory) is raised: this rank leaves."""
        self._kept = None
        if isinstance(command, Steps):
            return self._steps(command)
        if isinstance(command, Score):
            return self._score(command)
        if isinstance(command, Give):
            packed = self._replica.packed(command.whole)
            self._kept = self._ray.put(packed) if self._rank == 0 else None
            return RankAnswer((zlib.crc32(packed.flat.data) if command.whole else 0, [self._kept]))
        if isinstance(command, Load):
            packed = self._get(command.state[0])
            self._replica.load(packed.unpacked(self._replica.layout), command.outer)
            return RankAnswer()
        assert isinstance(command, Retune), command
        self._replica.retune(command.outer)
        return RankAnswer()

    def _steps(self, command: Steps) -> RankAnswer:
        """The records of the steps that were taken: rank 0's."""
        self._problem = self._problem.at(command.phase)
        records = []
        for step in range(command.step, command.step + command.count):
            try:
                records += self._replica.advance(self._problem, step, self._check)
            except Agreed as agreed:
                return RankAnswer(records, agreed.failure)
            except NumericsError as error:  # from the sum, which all ranks see
                return RankAnswer(records, RankError.of(error))
        return RankAnswer(records if self._rank == 0 else len(records))

    def _score(self, command: Score) -> RankAnswer:
        flat = self._replica.flat() if command.flat is None else self._get(command.flat[0])
        try:
            return RankAnswer(self._replica.ranks.own(flat, command.shards, self._check))
        except Exception as error:
            if another_may_fare_better(error):
                raise
            return RankAnswer(None, RankError.of(error))

    def _check(self) -> None:
        if self._ray.wait([self._upcoming], timeout=0)[0]:
            raise Abandoned

    def _ask(self) -> None:
        self._upcoming = self._host.next.remote(self._attempt, self._number)

    def _await(self) -> Any:
        """The next command, however long the driver is busy; the host's end ends it."""
        while not self._ray.wait([self._upcoming], timeout=GET_SECONDS)[0]:
            continue
        return self._get(self._upcoming)

    def _get(self, reference: Any) -> Any:
        return self._ray.get(reference, timeout=GET_SECONDS)
