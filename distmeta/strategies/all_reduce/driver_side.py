"""`all-reduce` as the training process sees it: watch the group, evaluate, save.

theta is that of `driver` within rounding, because the all-reduce adds the ranks' sums in its own order. If a rank is
lost, or Ray Train resizes the group, the whole group is made anew (gloo and NCCL can do nothing else), and the run goes
back to its last checkpoint.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from distmeta.config.sections import OuterSection
from distmeta.errors import InputError, summarize_error
from distmeta.runtime.checkpoint import TrainingState
from distmeta.runtime.failure_policy import LostShardError, is_hung
from distmeta.runtime.problem import Problem
from distmeta.runtime.ray_cluster import (
    connect,
    describe_resources,
    import_ray,
    remove_orphaned_placement_groups,
)
from distmeta.runtime.ray_workers import (
    FIRST_REPORT_SECONDS,
    GET_SECONDS,
    POLL_SECONDS,
    REPORT_SECONDS,
    describe_number,
    worker_failures,
)
from distmeta.runtime.shards import Shard, ShardResult, WorkerSpec
from distmeta.runtime.strategy import LostStateError, Record, build_server
from distmeta.strategies.all_reduce.group_host import ENVIRONMENT, GroupHost
from distmeta.strategies.all_reduce.messages import (
    Abandon,
    Abandoned,
    Leave,
    LoadState,
    LostGroup,
    PackedState,
    RankAnswer,
    RankError,
    Retune,
    ScoreShards,
    SendState,
    TakeSteps,
)

BATCH_SECONDS = 0.5
"""The group takes about so many seconds of steps per command, so that progress is still seen and Ctrl-C is heard."""
TIMES_KEPT = 64
"""How many of the last answering times are kept for each kind of command."""
CLOSE_SECONDS = 10.0
"""Longest wait for the group to leave by itself."""
ORPHAN_SECONDS = 2.0
"""After a host's end, Ray takes about this long to know that Ray Train's controller ended with it."""


class AllReduce:
    """The strategy `all-reduce`. It has no options.

    It is also its own pool: the group's ranks compute evaluations, so that no other workers need room.
    """

    requires_workers = True
    equals_driver = False

    def __init__(
        self,
        problem: Problem,
        outer: OuterSection,
        state: TrainingState | None,
        report: Callable[[str], None],
    ):
        self._run = problem.job.run
        self._report = report
        self._ray = import_ray(self._run.address)
        self._may_compile = problem.job.compute.compile
        self._host: Any = None
        """The `GroupHost` actor; None: there is none."""
        self._trainer: Any = None
        """Reference that is ready when the host's trainer has ended."""
        self._group = ""
        """Name of the group; empty: theta is lost, or no group is there yet."""
        self._world = 1
        """Ranks in the group."""
        self._known_losses = 0
        """Groups lost since the host started, as far as this process knows."""
        self._lost = ""
        """Why theta is lost."""
        self._check: Callable[[], None] = lambda: None
        """Raises to abandon what the group computes."""
        self._scored: np.ndarray | None = None
        """The vector that `flat` returned last, as long as the group's theta is the same."""
        self._started = False
        server = build_server(problem, outer, state)
        self._layout = server.layout
        number = describe_number(self._run.min_workers, self._run.max_workers, "worker")
        report(f"starting a Ray Train group of {number} …")
        cpus = math.ceil(self._run.min_workers * self._run.cpus_per_worker)
        self._disconnect = connect(self._ray, self._run.address, cpus)
        try:
            self._spec = self._ray.put(WorkerSpec.from_problem(problem, self._layout))
            self._load_into_group(PackedState.from_server(server), outer)
        except BaseException:
            self.close()
            raise
        self._started = True
        self.pool = self

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._world

    def advance(self, problem: Problem, step: int, check: Callable[[], None]) -> list[Record]:
        """Take as many steps as need `BATCH_SECONDS`, but not past the next one whose theta is needed here."""
        self._check = check
        check()
        count = min(self._steps_per_command, next_boundary(problem, step) - step)
        started = time.monotonic()
        answers, interruption = self._ask(TakeSteps(step, count, problem.phase), "step", count)
        records = answers[0].value
        if not records:  # if there are some, what stopped the group comes again in the next step
            self._raise_failure(answers, interruption)
        seconds_per_step = (time.monotonic() - started) / len(records)
        affordable = int(BATCH_SECONDS / seconds_per_step)
        self._steps_per_command = max(1, min(2 * self._steps_per_command, affordable))
        return records

    def retune(self, outer: OuterSection) -> None:
        self._outer = outer
        self._ask(Retune(outer), "retune")

    def flat(self) -> np.ndarray:
        self._scored = self._fetch_state(complete=False).flat
        return self._scored

    def state(self) -> TrainingState:
        return self._fetch_state(complete=True).unpack(self._layout)

    def load(self, state: TrainingState, outer: OuterSection) -> None:
        self._load_into_group(PackedState.from_state(state, self._layout), outer)

    def close(self) -> None:
        if self._host is not None:
            has_left = False
            if self._group:
                self._host.tell.remote(self._group, Leave())
                has_left = bool(self._ray.wait([self._trainer], timeout=CLOSE_SECONDS)[0])
            self._kill_host(has_left)
        self._disconnect()

    def map(self, flat: np.ndarray, shards: Sequence[Shard], check: Callable[[], None]) -> list[ShardResult]:
        """Score the shards of an evaluation. If `flat` is what `flat()` returned last, theta does not travel."""
        self._check = check
        check()
        theta = None if flat is self._scored else [self._ray.put(flat)]
        answers, interruption = self._ask(ScoreShards(tuple(shards), theta), "score")
        if any(answer.failure for answer in answers):
            self._raise_failure(answers, interruption)
        return [answers[i % self._world].value[i // self._world] for i in range(len(shards))]

    def _fetch_state(self, complete: bool) -> PackedState:
        """Return rank 0's state; only theta unless `complete`.

        The other ranks' theta has the same bits, unless the processors differ in how they round. Then all ranks
        continue from rank 0's state.
        """
        answers, _ = self._ask(SendState(complete), "send")
        try:
            packed = self._ray.get(answers[0].value[1][0], timeout=GET_SECONDS)
        except worker_failures(self._ray) as error:
            self._lose_state(summarize_error(error))
        checksums = {answer.value[0] for answer in answers}
        if complete and len(checksums) > 1:
            self._report(
                "the replicas of theta differ (different processors?): all ranks continue from rank 0's"
            )
            self._ask(LoadState([self._ray.put(packed)], self._outer), "load")
        return packed

    def _load_into_group(self, packed: PackedState, outer: OuterSection) -> None:
        """Give the group a state. If there is no group, start one.

        Raises:
            InputError: the group finds no room, or the job cannot be built there.
            LostShardError: the group was lost `run.max_shard_failures` times in a row.
        """
        state = [self._ray.put(packed)]
        self._outer = outer
        self._scored = None
        self._steps_per_command = 1
        self._times: dict[str, deque[float]] = {}
        losses = []
        while len(losses) < self._run.max_shard_failures:
            if self._host is None:
                self._start_host()
            try:
                self._wait_for_group()
                self._ask(LoadState(state, outer), "load")
                return
            except LostStateError as error:
                losses.append(str(error))
                self._report(f"{error}, while starting: another one is started")
        raise LostShardError(
            f"{losses[-1]}, {len(losses)} times in a row while starting: run.max_shard_failures is {len(losses)}"
        )

    def _start_host(self) -> None:
        """Start the host on this node, and Ray Train in it."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        run = self._run
        this_node = self._ray.get_runtime_context().get_node_id()
        environment = ENVIRONMENT | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{run.start_timeout:g}"}
        options = {
            "num_cpus": 0,
            "max_concurrency": 1000 + 4 * run.max_workers,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(this_node, soft=True),
            "runtime_env": {"env_vars": environment},
        }
        self._host = self._ray.remote(GroupHost).options(**options).remote()
        self._group = ""
        self._known_losses = 0
        shards_per_rank = most_shards_per_rank(run.shards or 1, run.min_workers)
        self._trainer = self._host.run_trainer.remote([self._spec], run, shards_per_rank)

    def _wait_for_group(self) -> None:
        """Wait until every rank has joined and built the job's parts."""
        started = time.monotonic()
        last_report = started + FIRST_REPORT_SECONDS - REPORT_SECONDS
        complete = self._host.wait_for_group.remote(self._known_losses)
        while not self._ray.wait([complete], timeout=POLL_SECONDS)[0]:
            self._check()
            now = time.monotonic()
            if now - started > self._run.start_timeout:
                self._kill_host()
                self._raise_no_room()
            if now - last_report > REPORT_SECONDS:
                last_report = now
                # again, because Ray may have learned late that a controller is gone
                remove_orphaned_placement_groups(self._ray)
                self._report(f"waiting for the group for {now - started:.0f} s: {self._describe_need()}")
        self._group, self._world, failure = self._get_answer(complete)
        if failure is not None:
            raise_rank_error(failure)

    def _raise_no_room(self) -> NoReturn:
        run = self._run
        limit = f"run.start_timeout = {run.start_timeout:g} s"
        if self._started:
            raise LostShardError(f"no group of workers was ready after {limit}: {self._describe_need()}")
        raise InputError(
            f"run.workers: got {run.min_workers} of {run.cpus_per_worker:g} CPU and {run.gpus_per_worker:g} GPU each, "
            f"but their group was not ready after {limit}; {describe_resources(self._ray)}"
        )

    def _describe_need(self) -> str:
        """Return `2 workers of 1 CPU, 0 GPU each; the cluster has …`."""
        run = self._run
        workers = describe_number(run.min_workers, run.min_workers, "worker")
        each = f"{run.cpus_per_worker:g} CPU, {run.gpus_per_worker:g} GPU each"
        return f"{workers} of {each}; {describe_resources(self._ray)}"

    def _ask(self, command: Any, kind: str, count: int = 1) -> tuple[list[RankAnswer], BaseException | None]:
        """Give the group a command.

        Args:
            kind: commands of the same kind take about equally long.
            count: how many steps the command takes.

        Returns:
            Every rank's answer, and what `check` raised in the meantime. The group then ended its step early.

        Raises:
            LostStateError: the group was lost, or was silent for too long.
        """
        if not self._group:
            raise LostStateError(self._lost)
        if kind != "score":
            self._scored = None
        started = time.monotonic()
        reference = self._host.ask.remote(self._group, command)
        times = self._times.setdefault(kind, deque(maxlen=TIMES_KEPT))
        interruption: BaseException | None = None
        while not self._ray.wait([reference], timeout=POLL_SECONDS)[0]:
            if interruption is None and kind in ("step", "score"):
                try:
                    self._check()
                except BaseException as error:
                    interruption = error
                    self._host.tell.remote(self._group, Abandon())
            silent = time.monotonic() - started
            usual_times = () if self._may_compile else [seconds * count for seconds in times]
            if is_hung(silent, usual_times, 0, self._time_limit(command) * count):
                self._kill_host()
                self._lose_state(f"no answer for {silent:.0f} s")
        answers = self._get_answer(reference)
        if interruption is None:
            times.append((time.monotonic() - started) / count)
        return answers, interruption

    def _time_limit(self, command: Any) -> float:
        """Return the seconds that a rank may take for a step or a command: `run.shard_timeout` for each shard."""
        if isinstance(command, ScoreShards):
            return self._run.shard_timeout * most_shards_per_rank(len(command.shards), self._world)
        if isinstance(command, TakeSteps):
            return self._run.shard_timeout * most_shards_per_rank(self._run.shards or 1, self._world)
        return self._run.start_timeout

    def _get_answer(self, reference: Any) -> Any:
        """Return what the host answered.

        Raises:
            LostStateError: the group is lost. If the host is lost too, the next `load` starts another one.
        """
        try:
            answer = self._ray.get(reference, timeout=GET_SECONDS)
        except worker_failures(self._ray) as error:
            self._kill_host()
            self._lose_state(summarize_error(error))
        if isinstance(answer, LostGroup):
            self._known_losses = answer.count
            if answer.ended:
                self._kill_host()
            self._lose_state(answer.reason)
        return answer

    def _lose_state(self, reason: str) -> NoReturn:
        """Note that theta is lost until one is loaded, even if some ranks of the group still answer."""
        self._group = ""
        self._lost = f"lost the group ({reason})"
        raise LostStateError(self._lost)

    def _kill_host(self, group_has_left: bool = False) -> None:
        """Kill the host and everything that it started. If the group has not left by itself, free its resources."""
        self._ray.kill(self._host)
        self._host = None
        self._group = ""
        if not group_has_left:
            remove_orphaned_placement_groups(self._ray, ORPHAN_SECONDS)

    def _raise_failure(self, answers: list[RankAnswer], interruption: BaseException | None) -> NoReturn:
        """Raise what stopped the group: a rank's error if there is one, else what `check` raised."""
        failures = [answer.failure for answer in answers if answer.failure is not None]
        errors = [failure for failure in failures if not isinstance(failure.error, Abandoned)]
        if errors:
            raise_rank_error(errors[0])
        assert interruption is not None, "the group abandoned a step without a reason"
        raise interruption


def next_boundary(problem: Problem, step: int) -> int:
    """Return the first step after `step` whose theta is evaluated or saved, or after which a change takes effect."""
    run = problem.job.run
    ends = [run.steps, *(change.step for change in problem.job.changes)]
    for interval in (run.eval_every, run.checkpoint_every):
        if interval:
            ends.append((step // interval + 1) * interval)
    return min(end for end in ends if end > step)


def most_shards_per_rank(shards: int, world: int) -> int:
    """Return ⌈shards / world⌉."""
    return math.ceil(shards / world)


def raise_rank_error(failure: RankError) -> NoReturn:
    """Raise the error of a rank in this process.

    A user's mistake is raised without a traceback, anything else with the rank's traceback.
    """
    if isinstance(failure.error, InputError):
        raise failure.error
    raise failure.error from RuntimeError(failure.traceback)
