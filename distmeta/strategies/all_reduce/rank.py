"""A rank of the `all-reduce` group: a replica of theta and the outer optimizer, and a worker for some shards."""

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
from distmeta.errors import NumericsError
from distmeta.runtime.failure_policy import is_worth_retrying
from distmeta.runtime.parameter_server import is_finite, tree_sum
from distmeta.runtime.problem import Problem
from distmeta.runtime.ray_workers import GET_SECONDS
from distmeta.runtime.shards import Shard, ShardResult, WorkerSpec
from distmeta.runtime.strategy import build_server
from distmeta.runtime.worker import Worker
from distmeta.strategies.all_reduce.messages import (
    Abandon,
    Abandoned,
    Leave,
    LoadState,
    PackedState,
    RankAnswer,
    RankError,
    Retune,
    ScoreShards,
    SendState,
    TakeSteps,
)
from distmeta.strategies.driver import CentralStep

FIRST_SLOT_BYTES = 4096
"""What a rank sends to the others after each step usually fits into so many bytes."""
LENGTH_BYTES = 8
"""A slot begins with the length of its content."""


class GroupFailure(Exception):  # noqa: N818 - control flow within a rank
    """What one rank's computation raised. It is raised on every rank, so that none of them takes the step."""

    def __init__(self, failure: RankError):
        super().__init__(failure)
        self.failure = failure


class RankPool:
    """Computes shard i on rank i mod world. Every rank gets all results, but only the gradients of its own shards."""

    def __init__(self, worker: Worker):
        self.rank = distributed.get_rank()
        self.size = distributed.get_world_size()
        self.gradients: list[np.ndarray] = []
        """Gradient sums of this rank's shards in the current step, float32."""
        self._worker = worker
        self._slot_bytes = FIRST_SLOT_BYTES

    def compute_own(
        self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]
    ) -> list[ShardResult]:
        """Compute this rank's share of the shards."""
        results = []
        for shard in shards[self.rank :: self.size]:
            check()
            results.append(self._worker.compute(flat, shard))
        return results

    def map(self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        """Compute the shards together with the other ranks and return all results, without gradients.

        Raises:
            GroupFailure: a rank's computation failed.
        """
        own: list[ShardResult] | RankError
        try:
            results = self.compute_own(flat, shards, check)
            self.gradients = [decode(r.gradient) for r in results if r.gradient is not None]
            own = [replace(result, gradient=None) for result in results]
        except Exception as error:
            if is_worth_retrying(error):
                raise  # this rank leaves, and Ray Train makes a new group
            own = RankError.from_exception(error)
        gathered = self.gather(own)
        failures = [answer for answer in gathered if isinstance(answer, RankError)]
        if failures:  # a real error is more important than an interruption that came at the same time
            raise GroupFailure(min(failures, key=lambda failure: isinstance(failure.error, Abandoned)))
        return [gathered[i % self.size][i // self.size] for i in range(len(shards))]

    def close(self) -> None:
        pass

    def gather(self, thing: Any) -> list[Any]:
        """Return every rank's `thing`, by rank.

        This takes one small collective, or two if a thing is larger than any before. torch's `all_gather_object` always
        takes two, and slower ones.
        """
        data = np.frombuffer(pickle.dumps(thing), np.uint8)
        while True:
            slot = np.zeros(self._slot_bytes, np.uint8)
            slot[:LENGTH_BYTES] = np.frombuffer(len(data).to_bytes(LENGTH_BYTES, "little"), np.uint8)
            fitting = min(len(data), self._slot_bytes - LENGTH_BYTES)
            slot[LENGTH_BYTES : LENGTH_BYTES + fitting] = data[:fitting]
            slots = [torch.empty(self._slot_bytes, dtype=torch.uint8) for _ in range(self.size)]
            distributed.all_gather(slots, torch.from_numpy(slot))
            parts = [received.numpy().tobytes() for received in slots]
            lengths = [int.from_bytes(part[:LENGTH_BYTES], "little") for part in parts]
            needed = max(lengths) + LENGTH_BYTES
            if needed <= self._slot_bytes:
                return [
                    pickle.loads(part[LENGTH_BYTES : LENGTH_BYTES + length])
                    for part, length in zip(parts, lengths, strict=True)
                ]
            self._slot_bytes = 1 << needed.bit_length()


class ReplicatedDriver(CentralStep):
    """The strategy `driver` on every rank: the same sums everywhere, so the same theta everywhere.

    A rank adds the gradients of its shards by the fixed tree. The all-reduce adds the ranks' sums in its own order.
    """

    pool: RankPool

    def __init__(self, problem: Problem):
        super().__init__(build_server(problem, problem.job.outer, None))
        self._device = problem.device
        worker = Worker(problem, self.server.layout)
        worker.start_prefetching()
        self.pool = RankPool(worker)

    def compute_shards(self, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        return self.pool.map(self.flat_for(shards), shards, check)

    def average(self, results: list[ShardResult], tasks: int) -> bool:
        own_sum = np.zeros(self.server.layout.size, np.float32)
        if self.pool.gradients:
            own_sum = tree_sum(self.pool.gradients)
        uses_nccl = "nccl" in distributed.get_backend_config()
        total = torch.from_numpy(own_sum).to(self._device if uses_nccl else "cpu")
        distributed.all_reduce(total)
        self.mean = total.cpu().numpy() / np.float32(tasks)
        return is_finite(self.mean)


def run_rank(config: dict[str, Any]) -> None:
    """Carry out the driver's commands, in Ray Train's training thread, until the driver or the host is gone.

    Args:
        config: `host`, the `GroupHost` actor, and `spec`, a reference to the `WorkerSpec` in a list.
    """
    import ray
    from ray.exceptions import RayActorError

    try:
        RankLoop(ray, config["host"], config["spec"][0]).run()
    except RayActorError:  # the host is gone, and so is the driver
        return


def select_own_gpu() -> None:
    """Make this rank's GPU the current device of this thread.

    Ray Train shows each rank the GPUs of all ranks on its node. The job's parts are built on torch's current device,
    which would be the first GPU for all of them, and NCCL refuses ranks that share a GPU.
    """
    from ray.train.torch import get_device

    torch.cuda.set_device(get_device())


class RankLoop:
    """Fetches commands from the host and answers them."""

    def __init__(self, ray: Any, host: Any, spec: Any):
        self._ray = ray
        self._host = host
        self._rank = distributed.get_rank()
        self._number = 0
        """Number of the command that comes next."""
        self._upcoming: Any = None
        """Reference to that command."""
        self._sent_state: Any = None
        """The state that rank 0 sent last. The driver only has a reference, so it is kept until the next command."""
        names = [uuid.uuid4().hex]
        distributed.broadcast_object_list(names)
        self._group = names[0]
        failure = self._build(spec)
        world = distributed.get_world_size()
        self._get(host.join.remote(self._group, self._rank, world, failure))

    def run(self) -> None:
        """Carry out commands until one says to leave."""
        self._request_command()
        while True:
            command = self._wait_for_command()
            number = self._number
            if isinstance(command, Leave):
                return
            self._number += 1
            self._request_command()  # the next one, so that `_check` sees when it is there
            if isinstance(command, Abandon):
                continue  # it came after the command that it was meant for
            answer = self._carry_out(command)
            self._get(self._host.answer.remote(self._group, number, self._rank, answer))

    def _build(self, spec: Any) -> RankError | None:
        """Build the job's parts; return why that failed, if it did."""
        try:
            worker_spec: WorkerSpec = self._get(spec)
            if worker_spec.job["run"]["gpus_per_worker"] and torch.cuda.is_available():
                select_own_gpu()
            self._problem = worker_spec.build_problem()
            self._replica = ReplicatedDriver(self._problem)
        except Exception as error:
            if is_worth_retrying(error):
                raise
            return RankError.from_exception(error)
        return None

    def _carry_out(self, command: Any) -> RankAnswer:
        """Carry out a command. An error that is worth retrying is raised: this rank leaves."""
        self._sent_state = None
        if isinstance(command, TakeSteps):
            return self._take_steps(command)
        if isinstance(command, ScoreShards):
            return self._score(command)
        if isinstance(command, SendState):
            return self._send_state(command)
        if isinstance(command, LoadState):
            packed = self._get(command.state[0])
            self._replica.load(packed.unpack(self._replica.server.layout), command.outer)
            return RankAnswer()
        assert isinstance(command, Retune), command
        self._replica.retune(command.outer)
        return RankAnswer()

    def _take_steps(self, command: TakeSteps) -> RankAnswer:
        """Answer with the records of the steps taken; ranks other than 0 only with their number."""
        self._problem = self._problem.at(command.phase)
        records = []
        for step in range(command.step, command.step + command.count):
            try:
                records += self._replica.advance(self._problem, step, self._check)
            except GroupFailure as error:
                return RankAnswer(records, error.failure)
            except NumericsError as error:  # raised on all ranks, because all have the same sum
                return RankAnswer(records, RankError.from_exception(error))
        return RankAnswer(records if self._rank == 0 else len(records))

    def _score(self, command: ScoreShards) -> RankAnswer:
        flat = self._replica.flat() if command.flat is None else self._get(command.flat[0])
        try:
            return RankAnswer(self._replica.pool.compute_own(flat, command.shards, self._check))
        except Exception as error:
            if is_worth_retrying(error):
                raise
            return RankAnswer(None, RankError.from_exception(error))

    def _send_state(self, command: SendState) -> RankAnswer:
        """Answer with the checksum of theta (0 unless `complete`) and, on rank 0, a reference to the state."""
        packed = PackedState.from_server(self._replica.server, command.complete)
        checksum = zlib.crc32(packed.flat.data) if command.complete else 0
        if self._rank == 0:
            self._sent_state = self._ray.put(packed)
        return RankAnswer((checksum, [self._sent_state]))

    def _check(self) -> None:
        """Raise Abandoned if there is another command already: the driver does not wait for the current one."""
        if self._ray.wait([self._upcoming], timeout=0)[0]:
            raise Abandoned

    def _request_command(self) -> None:
        self._upcoming = self._host.next_command.remote(self._group, self._number)

    def _wait_for_command(self) -> Any:
        """Return the next command, however long the driver is busy. If the host ends, this raises RayActorError."""
        while not self._ray.wait([self._upcoming], timeout=GET_SECONDS)[0]:
            continue
        return self._get(self._upcoming)

    def _get(self, reference: Any) -> Any:
        return self._ray.get(reference, timeout=GET_SECONDS)
