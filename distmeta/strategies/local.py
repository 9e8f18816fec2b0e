"""`local`: replicas take several outer steps without the others, then their changes of theta are averaged.

    Δ = 1/R Σᵣ (θ − θᵣ),   θ ← θ − Nesterov momentum(Δ; local_lr, local_momentum)

θᵣ is θ after `local_steps` steps of the job's `outer` optimizer on replica r's share of each step's shards (Douillard
et al. 2023, "DiLoCo: Distributed low-communication training of language models"). Deviation from the paper: replicas
share the tasks of each step, instead of each having its own part of the data.

A replica is not tied to a worker. Its state (of the optimizer, and what compression left out of its last delta) goes to
whichever worker computes its next round, and stays in that node's object store if the same worker computes it again. So
the result depends on `strategy.replicas`, but neither on the number of workers nor on lost ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from distmeta.compute.compression import Compression, decode
from distmeta.config.sections import OuterSection
from distmeta.errors import InputError
from distmeta.runtime.checkpoint import TrainingState
from distmeta.runtime.failure_policy import LostShardError
from distmeta.runtime.outer_optimizer import check_state, read_clock
from distmeta.runtime.outer_rates import OuterRates
from distmeta.runtime.parameter_server import ParameterServer, is_finite, mean_vector
from distmeta.runtime.pool import RayPool, WorkOrder, open_pool
from distmeta.runtime.problem import Problem
from distmeta.runtime.ray_workers import worker_failures
from distmeta.runtime.strategy import LostStateError, Record
from distmeta.runtime.worker import LocalPool
from distmeta.strategies.replica import Round, RoundResult, run_round, split_state, to_tensors

AVERAGED_SEPARATELY = ("step", "grad_norm", "outer_lr", "tasks", "tasks_dropped", "dropped")
"""Keys of a record that `merge_records` does not average over tasks."""


class Local:
    """The strategy `local`. Its options:

    Args:
        replicas: copies of theta that take steps without the others.
        local_steps: outer steps between two averages.
        local_lr: learning rate of the step on the averaged delta.
        local_momentum: its Nesterov momentum. With 0 and a rate of 1, the replicas' parameters are averaged.
        compress: how deltas travel. The workers read it from the job.
    """

    requires_workers = False
    equals_driver = False

    def __init__(
        self,
        problem: Problem,
        outer: OuterSection,
        state: TrainingState | None,
        report: Callable[[str], None],
        replicas: Annotated[int, Field(ge=1)] = 2,
        local_steps: Annotated[int, Field(ge=1)] = 50,
        local_lr: Annotated[float, Field(gt=0)] = 0.7,
        local_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        compress: Compression = "none",
    ):
        self._run = problem.job.run
        self._report = report
        self._replicas = replicas
        self._local_steps = local_steps
        averaging = OuterSection(optimizer="sgd", lr=local_lr)
        if local_momentum:
            averaging = OuterSection(optimizer="sgd", lr=local_lr, momentum=local_momentum, nesterov=True)
        self.server = ParameterServer(problem.init(), averaging)
        self._states: list[Any] = [{} for _ in range(replicas)]
        """Each replica's state: a dict `<parameter>/<quantity>` of arrays, or a reference to one on a worker's node."""
        self._outer = outer
        self._clocks: list[dict[str, Any]] = [{} for _ in range(replicas)]
        """Each replica's clock and plain data of its optimizer; empty at step 0."""
        if state is not None:
            self.load(state, outer)
        self.pool = open_pool(problem, self.server.layout, report)

    @staticmethod
    def check_job(job: Any, options: Mapping[str, Any]) -> None:
        """Raise InputError if the replicas do not fit the job's shards, or theta is needed between two averages."""
        run = job.run
        if job.outer.ema is not None:
            raise InputError(
                f"outer.ema: got {job.outer.ema} with strategy.type: local, expected null: its replicas are averaged"
            )
        if run.shards is not None and options["replicas"] > run.shards:
            raise InputError(
                f"strategy.replicas: got {options['replicas']}, expected at most run.shards = {run.shards}: each "
                "replica needs a share of a step's shards"
            )
        for key in ("eval_every", "checkpoint_every"):
            value = getattr(run, key)
            if value % options["local_steps"]:
                raise InputError(
                    f"run.{key}: got {value}, expected a multiple of strategy.local_steps = {options['local_steps']}: "
                    "between averages there is no single theta"
                )

    def retune(self, outer: OuterSection) -> None:
        OuterRates(self.server.layout.names, outer)  # raises InputError if it is not possible
        self._outer = outer

    def flat(self) -> np.ndarray:
        return self.server.flat()

    def state(self) -> TrainingState:
        tensors, averaging = self.server.state()
        for index, replica_state in enumerate(self._fetch(self._states)):
            for key, value in to_tensors(replica_state).items():
                name, _, quantity = key.rpartition("/")
                tensors[f"{name}/{replica_prefix(index)}{quantity}"] = value
        return TrainingState(self.server.theta(), tensors, {"averaging": averaging, "replicas": self._clocks})

    def load(self, state: TrainingState, outer: OuterSection) -> None:
        if state.outer.keys() != {"averaging", "replicas"}:
            raise InputError("checkpoint: its outer state is not that of replicas")
        self._outer = outer
        self._clocks = read_clocks(state.outer["replicas"], self._replicas)
        theta = self.server.theta()
        replica = ParameterServer(theta, outer)
        for index in range(self._replicas):
            replica_state = select_replica(state.optimizer, replica_prefix(index))
            moments, residuals = split_state(replica_state)
            replica.check_state(moments)
            check_state(residuals, theta)
            self._states[index] = {key: value.numpy() for key, value in replica_state.items()}
        averaging_state = {
            key: value
            for key, value in state.optimizer.items()
            if not key.rpartition("/")[2].startswith("replica")
        }
        self.server.load(state.theta, averaging_state, state.outer["averaging"])

    def close(self) -> None:
        self.pool.close()

    def advance(self, problem: Problem, step: int, check: Callable[[], None]) -> list[Record]:
        """Take one round of steps.

        A round ends at the next multiple of `local_steps`, the next of the job's changes, or the last step.
        """
        started = time.perf_counter()
        next_average = (step // self._local_steps + 1) * self._local_steps
        ends = [next_average, self._run.steps, *(change.step for change in problem.job.changes)]
        stop = min(end for end in ends if end > step)
        rounds = [
            Round(index, self._replicas, step, stop, problem.phase, self._outer, self._clocks[index])
            for index in range(self._replicas)
        ]
        results, deltas, states = self._compute_rounds(rounds, check)
        computed = time.perf_counter()
        finite_deltas = []
        for index, delta in enumerate(deltas):
            if is_finite(delta):
                finite_deltas.append(delta)
            else:
                self._report(
                    f"replica {index} is not finite after step {stop}: it is left out and starts anew"
                )
                states[index] = {}
        if finite_deltas:
            self.server.step(mean_vector(finite_deltas, len(finite_deltas)))
        else:
            self.server.skip()
        self._states = states
        self._clocks = [result.clock for result in results]
        averaged = time.perf_counter()
        steps = stop - step
        slowest = max(result.seconds for result in results)
        times = {
            "tasks_per_second": self._run.tasks_per_step * steps / (averaged - started),
            "seconds_step": (averaged - started) / steps,
            "seconds_transfer": max(computed - started - slowest, 0.0) / steps,
            "seconds_aggregate": (averaged - computed) / steps,
        }
        rows_by_step = zip(*(result.records for result in results), strict=True)
        return [merge_records(rows, self.pool.size) | times for rows in rows_by_step]

    def _compute_rounds(
        self, rounds: list[Round], check: Callable[[], None]
    ) -> tuple[list[RoundResult], list[np.ndarray], list[Any]]:
        """Return every replica's result, its delta as float32, and its state (or a reference to it)."""
        if isinstance(self.pool, LocalPool):
            computed = []
            for one_round in rounds:
                check()
                state = self._states[one_round.index]
                computed.append(run_round(self.pool.worker, one_round, self.flat(), state))
            results, encoded, states = zip(*computed, strict=True)
            return list(results), [decode(vector) for vector in encoded], list(states)
        assert isinstance(self.pool, RayPool)
        theta = self.pool.put(self.flat(), check)
        orders = [
            WorkOrder([one_round], [theta, self._states[one_round.index]], function=run_round, outputs=3)
            for one_round in rounds
        ]
        self.pool.resume()
        try:
            while not all(order.pending.done for order in orders):
                check()
                self.pool.work(orders)
        except LostShardError:
            self._fetch(self._states)  # raises LostStateError if a replica's state was lost with a node
            raise
        answers = [order.pending.results[0] for order in orders]
        encoded = self._fetch([answer.pieces[0] for answer in answers])
        states = [answer.pieces[1] for answer in answers]
        return [answer.result for answer in answers], [decode(vector) for vector in encoded], states

    def _fetch(self, objects: list[Any]) -> list[Any]:
        """Return the objects; references to objects on workers' nodes are resolved.

        Raises:
            LostStateError: an object is lost.
        """
        if not isinstance(self.pool, RayPool):
            return objects
        ray: Any = import_module("ray")  # a job without workers does not need Ray
        limit = self._run.shard_timeout
        try:
            return [one if isinstance(one, dict) else ray.get(one, timeout=limit) for one in objects]
        except ray.exceptions.RayTaskError as error:
            raise LostStateError(f"a replica's state is lost ({type(error.cause).__name__})") from None
        except worker_failures(ray) as error:
            raise LostStateError(f"a replica's state is lost ({type(error).__name__})") from None


def read_clocks(clocks: Any, replicas: int) -> list[dict[str, Any]]:
    """Return the replicas' clocks in a checkpoint, or raise `InputError` if they are not those of so many replicas."""
    if not isinstance(clocks, list) or len(clocks) != replicas:
        raise InputError(f"checkpoint: expected the clocks of strategy.replicas = {replicas} replicas")
    for clock in clocks:
        if clock != {}:
            read_clock(clock)
    return clocks


def replica_prefix(index: int) -> str:
    """Return the prefix of a replica's quantities in a checkpoint's optimizer state."""
    return f"replica{index}."


def select_replica(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return one replica's part of a checkpoint's optimizer state, without the prefix."""
    selected = {}
    for key, value in tensors.items():
        name, _, quantity = key.rpartition("/")
        if quantity.startswith(prefix):
            selected[f"{name}/{quantity.removeprefix(prefix)}"] = value
    return selected


def merge_records(rows: tuple[Record, ...], workers: int) -> Record:
    """Merge the replicas' records of one step: means over tasks, sums of tasks, seconds per worker.

    Args:
        rows: each replica's record of the step.
        workers: workers that computed at the same time.
    """
    merged: Record = {"step": rows[0]["step"]}
    for key in rows[0]:
        if key not in AVERAGED_SEPARATELY and not key.startswith(("seconds_", "tasks_per")):
            merged[key] = mean_over_tasks([(row[key], row["tasks"]) for row in rows])
    norms = [row["grad_norm"] for row in rows if math.isfinite(row["grad_norm"])]
    dropped = sorted(task for row in rows for task in row.get("dropped", ()))
    merged["grad_norm"] = math.fsum(norms) / len(norms) if norms else math.nan
    merged["outer_lr"] = rows[0]["outer_lr"]
    merged["tasks"] = sum(row["tasks"] for row in rows)
    merged["tasks_dropped"] = len(dropped)
    if dropped:
        merged["dropped"] = dropped
    for key in ("seconds_draw", "seconds_compute", "seconds_outer"):
        merged[key] = sum(row[key] for row in rows) / workers
    return merged


def mean_over_tasks(values: list[tuple[float | None, int]]) -> float | None:
    """Return the mean of (value, number of tasks) pairs, weighted by tasks; None if no value is known."""
    known = [(value, tasks) for value, tasks in values if value is not None and tasks]
    total = sum(tasks for _, tasks in known)
    if not total:
        return None
    return math.fsum(value * tasks for value, tasks in known) / total
