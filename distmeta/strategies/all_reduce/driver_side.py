"""`all-reduce`: workers form a group under Ray Train, all-reduce the meta-gradient and step a replicated optimizer.

This process only watches, evaluates and checkpoints. theta is that of `driver` within rounding: the ranks' sums are
added in an order of the collective's own. A group that lost a rank, or that Ray Train resizes, is made anew as a whole
(gloo and NCCL know no other way), and the run goes back to its last checkpoint.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from distmeta.config.sections import OuterSection
from distmeta.errors import InputError
from distmeta.runtime.checkpoint import TrainingState
from distmeta.runtime.failure_policy import LostShardError, hung
from distmeta.runtime.problem import Problem
from distmeta.runtime.ray_cluster import connect, remove_orphaned_placement_groups, import_ray, describe_resources
from distmeta.runtime.ray_workers import POLL_SECONDS, SAY_SECONDS, describe, lost_by
from distmeta.runtime.strategy import LostStateError, Record, server_of
from distmeta.runtime.worker import Shard, ShardResult, WorkerSpec
from distmeta.strategies.all_reduce.group import (
    ENVIRONMENT,
    GET_SECONDS,
    Abandoned,
    RankAnswer,
    RankError,
    Give,
    Halt,
    Host,
    Load,
    Lost,
    PackedState,
    Retune,
    Score,
    Steps,
    Stop,
)

AHEAD_SECONDS = 0.5
"""For about so long the group takes steps without a word from here: progress is still seen, and Ctrl-C heard."""
CLOSE_SECONDS = 10.0
"""Longest wait for the group to leave by itself."""
ORPHAN_SECONDS = 2.0
"""After a host's end: until Ray knows that Ray Train's controller went with it."""


class AllReduce:
    requires_workers = True
    equals_driver = False

    def __init__(
        self,
        problem: Problem,
        outer: OuterSection,
        state: TrainingState | None,
        report: Callable[[str], None],
    ):
        self._ray = ray = import_ray(problem.job.run.address)
        self._run, self._report = problem.job.run, report
        self._compiles = problem.job.compute.compile
        self._host: Any = None
        self._attempt, self._world, self._known = "", 1, 0
        self._check: Callable[[], None] = lambda: None
        self._given: np.ndarray | None = None
        self._opened, self._lost = False, ""
        server = server_of(problem, outer, state)
        self._layout = server.layout
        least, most = self._run.min_workers, self._run.max_workers
        number = f"{least}" if least == most else f"{least} to {most}"
        report(f"starting a Ray Train group of {number} worker{'s' * (most > 1)} …")
        self._disconnect = connect(ray, self._run.address, math.ceil(least * self._run.cpus_per_worker))
        try:
            self._spec = ray.put(WorkerSpec.of(problem, self._layout))
            self._take_up(PackedState.of(server), outer)
        except BaseException:
            self.close()
            raise
        self._opened = True
        self.pool = GroupPool(self)

    @property
    def size(self) -> int:
        return self._world

    def advance(self, problem: Problem, step: int, check: Callable[[], None]) -> list[Record]:
        """As many steps as take a moment, up to the next one whose theta is looked at."""
        self._check = check
        check()
        count = min(self._ahead, boundary(problem, step) - step)
        begun = time.monotonic()
        answers, stopped = self._ask(Steps(step, count, problem.phase), "step", count)
        records = answers[0].value
        if not records:  # else what stopped them comes again with the next step
            self._raise(answers, stopped)
        seconds = (time.monotonic() - begun) / len(records)
        self._ahead = max(1, min(2 * self._ahead, int(AHEAD_SECONDS / seconds)))
        return records

    def retune(self, outer: OuterSection) -> None:
        self._outer = outer
        self._ask(Retune(outer), "retune")

    def flat(self) -> np.ndarray:
        self._given = self._give(whole=False).flat
        return self._given

    def state(self) -> TrainingState:
        return self._give(whole=True).unpacked(self._layout)

    def load(self, state: TrainingState, outer: OuterSection) -> None:
        self._take_up(PackedState.from_state(state, self._layout), outer)

    def close(self) -> None:
        if self._host is not None:
            left = False
            if self._attempt:
                self._host.tell.remote(self._attempt, Stop())
                left = bool(self._ray.wait([self._fitting], timeout=CLOSE_SECONDS)[0])
            self._end(left)
        self._disconnect()

    def score(
        self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]
    ) -> list[ShardResult]:
        """The shards' scores; theta stays where it is if it is the one that `flat` gave last."""
        self._check = check
        check()
        command = Score(tuple(shards), None if flat is self._given else [self._ray.put(flat)])
        answers, stopped = self._ask(command, "score")
        if any(answer.failure for answer in answers):
            self._raise(answers, stopped)
        return [answers[i % self._world].value[i // self._world] for i in range(len(shards))]

    def _give(self, whole: bool) -> PackedState:
        """Rank 0's state. The others' theta is the same to the bit, unless processors differ in how they round."""
        answers, _ = self._ask(Give(whole), "give")
        try:
            packed = self._ray.get(answers[0].value[1][0], timeout=GET_SECONDS)
        except lost_by(self._ray) as error:
            self._lose(describe(error))
        if whole and len({answer.value[0] for answer in answers}) > 1:
            self._report("the replicas of theta differ (unlike processors?): all go on from rank 0's")
            self._ask(Load([self._ray.put(packed)], self._outer), "load")
        return packed

    def _take_up(self, packed: PackedState, outer: OuterSection) -> None:
        """Brings a group, a new one if need be, to a state.

        Raises:
            InputError: it finds no room, or the job fails to build there.
            LostShardError: it is lost again and again.
        """
        state, lost = [self._ray.put(packed)], []
        self._outer, self._given, self._ahead = outer, None, 1
        self._timed: dict[str, deque[float]] = {}
        while len(lost) < self._run.max_shard_failures:
            if self._host is None:
                self._begin()
            try:
                self._await_group()
                self._ask(Load(state, outer), "load")
                return
            except LostStateError as error:
                lost.append(str(error))
                self._report(f"{error}, while starting: another is made")
        raise LostShardError(
            f"{lost[-1]}, {len(lost)} times in a row while starting: run.max_shard_failures is {len(lost)}"
        )

    def _begin(self) -> None:
        """The host, and Ray Train with it, on this node."""
        ray, run = self._ray, self._run
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options = {
            "num_cpus": 0,
            "max_concurrency": 1000 + 4 * run.max_workers,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=True
            ),
            "runtime_env": {
                "env_vars": ENVIRONMENT | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{run.start_timeout:g}"}
            },
        }
        self._host = ray.remote(Host).options(**options).remote()
        self._attempt, self._known = "", 0
        self._fitting = self._host.fit.remote(
            [self._spec], run, shards_of_a_rank(run.shards or 1, run.min_workers)
        )

    def _await_group(self) -> None:
        """Until every rank is there, and built."""
        begun = time.monotonic()
        said = begun + SAY_SECONDS[0] - SAY_SECONDS[1]
        ready = self._host.ready.remote(self._known)
        while not self._ray.wait([ready], timeout=POLL_SECONDS)[0]:
            self._check()
            now = time.monotonic()
            if now - begun > self._run.start_timeout:
                self._end()
                self._no_room()
            if now - said > SAY_SECONDS[1]:
                said = now
                remove_orphaned_placement_groups(self._ray)  # Ray may have taken longer to see that a controller is gone
                self._report(f"waiting for the group for {now - begun:.0f} s: {self._room()}")
        found = self._result(ready)
        self._attempt, self._world, failure = found
        if failure is not None:
            reraise(failure)

    def _no_room(self) -> NoReturn:
        run, limit = self._run, f"run.start_timeout = {self._run.start_timeout:g} s"
        if self._opened:
            raise LostShardError(f"no group of workers was ready after {limit}: {self._room()}")
        raise InputError(
            f"run.workers: got {run.min_workers} of {run.cpus_per_worker:g} CPU and {run.gpus_per_worker:g} GPU each, "
            f"but their group was not ready after {limit}; {resources(self._ray)}"
        )

    def _room(self) -> str:
        run = self._run
        each = f"{run.cpus_per_worker:g} CPU, {run.gpus_per_worker:g} GPU each"
        return f"{run.min_workers} worker{'s' * (run.min_workers > 1)} of {each}; {resources(self._ray)}"

    def _ask(self, command: Any, kind: str, count: int = 1) -> tuple[list[RankAnswer], BaseException | None]:
        """Every rank's answer, and what `check` raised meanwhile: the group then ends its step, or its shard, early.

        Raises:
            LostStateError: the group was lost, or is silent for too long.
        """
        if not self._attempt:
            raise LostStateError(self._lost)
        self._given = None if kind != "score" else self._given
        answer, begun = self._host.ask.remote(self._attempt, command), time.monotonic()
        timed = self._timed.setdefault(kind, deque(maxlen=64))
        stopped: BaseException | None = None
        while not self._ray.wait([answer], timeout=POLL_SECONDS)[0]:
            if stopped is None and kind in ("step", "score"):
                try:
                    self._check()
                except BaseException as error:
                    stopped = error
                    self._host.tell.remote(self._attempt, Halt())
            silent, longest = time.monotonic() - begun, self._longest(command) * count
            if hung(silent, () if self._compiles else [seconds * count for seconds in timed], 0, longest):
                self._end()
                self._lose(f"no answer for {silent:.0f} s")
        answers = self._result(answer)
        if stopped is None:
            timed.append((time.monotonic() - begun) / count)
        return answers, stopped

    def _longest(self, command: Any) -> float:
        """Seconds that a rank may take: `run.shard_timeout` for each of its shards."""
        if isinstance(command, Score):
            return self._run.shard_timeout * shards_of_a_rank(len(command.shards), self._world)
        if isinstance(command, Steps):
            return self._run.shard_timeout * shards_of_a_rank(self._run.shards or 1, self._world)
        return self._run.start_timeout

    def _result(self, reference: Any) -> Any:
        """What the host answered.

        Raises:
            LostStateError: the group is no more; where the host is neither, the next one is.
        """
        try:
            result = self._ray.get(reference, timeout=GET_SECONDS)
        except lost_by(self._ray) as error:
            self._end()
            self._lose(describe(error))
        if isinstance(result, Lost):
            self._known = result.count
            if result.ended:
                self._end()
            self._lose(result.reason)
        return result

    def _lose(self, reason: str) -> NoReturn:
        """There is no theta from here on, until one is loaded, also where ranks of the group still answer."""
        self._attempt, self._lost = "", f"lost the group ({reason})"
        raise LostStateError(self._lost)

    def _end(self, left: bool = False) -> None:
        """Ends the host, and whatever is below it, also the places of a group that has not left by itself."""
        self._ray.kill(self._host)
        self._host, self._attempt = None, ""
        if not left:
            remove_orphaned_placement_groups(self._ray, ORPHAN_SECONDS)

    def _raise(self, answers: list[RankAnswer], stopped: BaseException | None) -> NoReturn:
        failures = [answer.failure for answer in answers if answer.failure is not None]
        real = [failure for failure in failures if not isinstance(failure.error, Abandoned)]
        if real:
            reraise(real[0])
        assert stopped is not None, "abandoned without a reason"
        raise stopped


class GroupPool:
    """Evaluations by the group's own ranks: nobody else needs room."""

    def __init__(self, strategy: AllReduce):
        self._strategy = strategy

    @property
    def size(self) -> int:
        return self._strategy.size

    def map(self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        return self._strategy.score(flat, shards, check)

    def close(self) -> None:
        pass  # the strategy's


def boundary(problem: Problem, step: int) -> int:
    """The first step after `step` whose theta is evaluated, saved, or stepped on with other settings."""
    run = problem.job.run
    ends = [run.steps, *(change.step for change in problem.job.changes)]
    ends += [(step // every + 1) * every for every in (run.eval_every, run.checkpoint_every) if every]
    return min(end for end in ends if end > step)


def shards_of_a_rank(shards: int, world: int) -> int:
    return -(-shards // world)


def reraise(failure: RankError) -> NoReturn:
    """Raises here what was raised on a rank: a user's mistake alone, anything else with the rank's traceback."""
    if isinstance(failure.error, InputError):
        raise failure.error
    raise failure.error from RuntimeError(failure.traceback)
