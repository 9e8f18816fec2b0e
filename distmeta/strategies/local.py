"""`local`: replicas take `strategy.local_steps` outer steps on their own, then their deltas are averaged; for slow links.

    Δ = 1/R Σᵣ (θ − θᵣ),   θ ← θ − Nesterov momentum(Δ; strategy.local_lr, strategy.local_momentum)

θᵣ is θ after H steps of the job's `outer` optimizer on replica r's share of each step's shards (Douillard et al. 2023,
"DiLoCo: Distributed low-communication training of language models"). A replica is no worker but some work: its state
(the optimizer's, and what coding its last delta left out) goes to whoever computes its round, and stays in that
node's object store where the same worker computes it again. So the bits depend on `strategy.replicas`, not on the number
of workers, nor on those that are lost. Deviation: a step's tasks are shared out, instead of data cut for good.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import compress
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from distmeta.compute.compression import Compression, decode
from distmeta.compute.vectors import finite, mean_of
from distmeta.config.sections import OuterSection
from distmeta.errors import InputError
from distmeta.runtime.checkpoint import TrainingState
from distmeta.runtime.failure_policy import LostShardError
from distmeta.runtime.parameter_server import ParameterServer, check_state, clock_of
from distmeta.runtime.pool import LocalPool, RayPool, WorkOrder, open_pool
from distmeta.runtime.problem import Problem
from distmeta.runtime.ray_workers import describe, lost_by
from distmeta.runtime.strategy import LostStateError, Record
from distmeta.strategies.replica import Round, RoundResult, run_round, tensors_of


class Local:
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
        compress: Compression = "none",  # workers read it from the job
    ):
        run = problem.job.run
        self._local_steps = local_steps
        self._run, self._report, self._count = run, report, replicas
        momentum, rate = local_momentum or None, local_lr
        averaging = OuterSection(
            optimizer="sgd", lr=rate, momentum=momentum, nesterov=True if momentum else None
        )
        self._server = ParameterServer(problem.init(), averaging)
        self._states: list[Any] = [{} for _ in range(self._count)]
        self._outer, self._clock = outer, dict[str, Any]()
        if state is not None:
            self.load(state, outer)
        self.pool = open_pool(problem, self._server.layout, report)

    @staticmethod
    def check_job(job: Any, options: Mapping[str, Any]) -> None:
        run = job.run
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
        clock_of(self._server.layout.names, outer, self._clock)  # raises where a rate is of nothing
        self._outer = outer

    def flat(self) -> np.ndarray:
        return self._server.flat()

    def state(self) -> TrainingState:
        tensors, averaging = self._server.state()
        for index, kept in enumerate(self._fetched(self._states)):
            for key, value in tensors_of(kept).items():
                name, _, quantity = key.rpartition("/")
                tensors[f"{name}/{_prefix(index)}{quantity}"] = value
        return TrainingState(self._server.theta(), tensors, {"averaging": averaging, "replicas": self._clock})

    def load(self, state: TrainingState, outer: OuterSection) -> None:
        names, theta = self._server.layout.names, self._server.theta()
        if state.outer.keys() != {"averaging", "replicas"}:
            raise InputError("checkpoint: its outer state is not that of replicas")
        self._outer, self._clock = outer, state.outer["replicas"]
        clock_of(names, outer, self._clock)  # raises where it is not this job's
        for index in range(self._count):
            own = _own(state.optimizer, _prefix(index))
            check_state(own, theta)
            self._states[index] = {key: value.numpy() for key, value in own.items()}
        averaged = {
            k: v for k, v in state.optimizer.items() if not k.rpartition("/")[2].startswith("replica")
        }
        self._server.load(state.theta, averaged, state.outer["averaging"])

    def close(self) -> None:
        self.pool.close()

    def advance(self, problem: Problem, step: int, check: Callable[[], None]) -> list[Record]:
        """A round: to the next multiple of `strategy.local_steps`, the next of the job's changes, or the last step."""
        started, length = time.perf_counter(), self._local_steps
        ends = [(step // length + 1) * length, self._run.steps, *(c.step for c in problem.job.changes)]
        stop = min(end for end in ends if end > step)
        rounds = [
            Round(index, self._count, step, stop, problem.phase, self._outer, self._clock)
            for index in range(self._count)
        ]
        results, deltas, states = self._computed(rounds, check)
        computed = time.perf_counter()
        good = [finite(delta) for delta in deltas]
        for index in [i for i, is_good in enumerate(good) if not is_good]:
            self._report(f"replica {index} is not finite after step {stop}: left out, begun anew")
            states[index] = {}
        whole = list(compress(deltas, good))
        if whole:
            self._server.step(mean_of(whole, len(whole)))
        else:
            self._server.skip()
        self._states, self._clock = states, results[0].clock
        times = computed - started, time.perf_counter() - computed
        return [
            _merged(problem, rows, results, times, self.pool.size)
            for rows in zip(*(result.records for result in results), strict=True)
        ]

    def _computed(
        self, rounds: list[Round], check: Callable[[], None]
    ) -> tuple[list[RoundResult], list[np.ndarray], list[Any]]:
        """Every replica's result, delta and state."""
        if isinstance(self.pool, LocalPool):
            found = []
            for own in rounds:
                check()
                found.append(run_round(self.pool.worker, own, self.flat(), self._states[own.index]))
            results, coded, states = zip(*found, strict=True)
            return list(results), [decode(vector) for vector in coded], list(states)
        assert isinstance(self.pool, RayPool)
        theta = self.pool.put(self.flat(), check)
        works = [WorkOrder([own], [theta, self._states[own.index]], rounds=True) for own in rounds]
        self.pool.begin()
        try:
            while not all(work.left.done for work in works):
                check()
                self.pool.turn(works)
        except LostShardError:
            self._fetched(self._states)  # a replica's state may have gone with a node
            raise
        answers = [work.left.results[0] for work in works]
        coded = self._fetched([answer.pieces[0] for answer in answers])
        states = [answer.pieces[1] for answer in answers]
        return [answer.result for answer in answers], [decode(vector) for vector in coded], states

    def _fetched(self, objects: list[Any]) -> list[Any]:
        """What is kept on workers' nodes, here."""
        if not isinstance(getattr(self, "pool", None), RayPool):
            return objects
        ray: Any = import_module("ray")  # `run.workers: 0` goes without
        limit = self._run.shard_timeout
        try:
            return [found if isinstance(found, dict) else ray.get(found, timeout=limit) for found in objects]
        except (ray.exceptions.RayTaskError, *lost_by(ray)) as error:
            raise LostStateError(f"a replica's state is lost ({describe(error).partition(':')[0]})") from None


def _prefix(index: int) -> str:
    return f"replica{index}."


def _own(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """A replica's part of a checkpoint's optimizer state."""
    found = {}
    for key, value in tensors.items():
        name, _, quantity = key.rpartition("/")
        if quantity.startswith(prefix):
            found[f"{name}/{quantity.removeprefix(prefix)}"] = value
    return found


def _merged(
    problem: Problem,
    rows: tuple[Record, ...],
    results: list[RoundResult],
    times: tuple[float, float],
    workers: int,
) -> Record:
    """One line of a step that every replica took: means over tasks, sums of tasks; its part of the round's seconds."""
    steps, tasks = len(results[0].records), sum(row["tasks"] for row in rows)
    merged: Record = {"step": rows[0]["step"]}
    left_out = ("step", "grad_norm", "outer_lr", "tasks", "tasks_dropped", "dropped")
    for key in rows[0]:
        if key in left_out or key.startswith(("seconds_", "tasks_per")):
            continue
        known = [(row[key], row["tasks"]) for row in rows if row[key] is not None and row["tasks"]]
        weight = sum(count for _, count in known)
        merged[key] = math.fsum(value * count for value, count in known) / weight if weight else None
    norms = [row["grad_norm"] for row in rows if math.isfinite(row["grad_norm"])]
    dropped = sorted(task for row in rows for task in row.get("dropped", ()))
    merged |= {
        "grad_norm": math.fsum(norms) / len(norms) if norms else math.nan,
        "outer_lr": rows[0]["outer_lr"],
        "tasks": tasks,
        "tasks_dropped": len(dropped),
        **({"dropped": dropped} if dropped else {}),
    }
    computing, averaging = times
    longest = max(result.seconds for result in results)
    return merged | {
        "tasks_per_second": problem.job.run.tasks_per_step * steps / (computing + averaging),
        "seconds_step": (computing + averaging) / steps,
        "seconds_draw": sum(row["seconds_draw"] for row in rows) / workers,
        "seconds_compute": sum(row["seconds_compute"] for row in rows) / workers,
        "seconds_transfer": max(computing - longest, 0.0) / steps,
        "seconds_aggregate": averaging / steps,
        "seconds_outer": sum(row["seconds_outer"] for row in rows) / workers,
    }
