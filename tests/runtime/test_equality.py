"""theta is the same to the bit in one process, with any number of workers, with a killed worker, and after a resume."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ALGORITHMS, POLICIES, tree
from support.job_workers import JobWorker, JobWorkerPool
from support.outcomes import read_rows, read_rows_without_times, read_theta, train_job

import distmeta
import distmeta.protocols
from distmeta.compute.vectors import Buffer
from distmeta.config.job import Job
from distmeta.errors import NumericsError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.parameter_server import ParameterServer
from distmeta.runtime.problem import build_problem
from distmeta.runtime.reporter import SilentReporter
from distmeta.runtime.resolve import resolve
from distmeta.runtime.shards import Shard, ShardResult
from distmeta.runtime.worker import Worker, plan_shards
from distmeta.strategies import driver

EPOCHS = {"type": "maml-rl", "inner_lr": 0.1, "kl": 0.1, "outer_epochs": 3}
RUN = {"steps": 4, "eval_every": 2, "eval_tasks": 10}
CHANGES = [
    {"step": 0, "set": {"outer.lr": 0.02}},
    {"step": 2, "set": {"outer.lr": 0.005, "algorithm.inner_lr": 0.1}},
    {"step": 4, "set": {"algorithm.inner_lr": 0.02}},
]
CASES = {name: tree(name, run=RUN) for name in ALGORITHMS} | {
    "pairwise": tree({"type": "hard_cases:PairwiseMAML"}, run=RUN),
    "policy-gradient": tree("maml", tasks={"type": "hard_cases:TwoArmedBandit"}, run=RUN),
    "memory": tree({"type": "hard_cases:MemoryRegressor"}, run=RUN),
    "outer-epochs": tree(EPOCHS, run=RUN, **POLICIES),
    "compiled": tree("maml", compute={"compile": True}, run=RUN),
    "constant-memory": tree("maml", compute={"differentiation": "constant-memory"}, run=RUN),
    "bf16": tree("maml", compute={"precision": "bf16"}, run=RUN),
    "changes": tree("maml", changes=CHANGES, run=RUN | {"steps": 5}),
    "dropout": tree("maml", model={"type": "hard_cases:DropoutNet"}, run=RUN),
    "unequal": tree("maml", tasks={"type": "hard_cases:UnequalTasks"}, run=RUN),
    "conv4": tree(
        "maml",
        model={"type": "conv4", "width": 8, "pool": "stride"},
        tasks={"type": "digits", "ways": 3, "shots": 1, "queries": 3},
        run=RUN,
    ),
}
if find_spec("mujoco"):
    GYM = {"type": "gym", "trajectories": 2, "horizon": 5}
    CASES["gym"] = tree("maml-rl", tasks=GYM, run=RUN)

WITH_RAY = {"maml": (1, 4)}
"""Cases that run on these numbers of Ray workers in every run of the tests. The others run on two hosts."""


def list_steps(name: str) -> list[int]:
    return list(range(1, CASES[name]["run"]["steps"] + 1))


@pytest.fixture(scope="module")
def train_here(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that trains a case in this process, once, and returns its run folder."""
    runs: dict[str, Path] = {}

    def train_once(name: str) -> Path:
        if name not in runs:
            runs[name] = train_job(CASES[name] | {"output": str(tmp_path_factory.mktemp("here"))})
        return runs[name]

    return train_once


class FlagReporter(SilentReporter):
    """Creates a file when training begins. Before that, this process itself draws tasks."""

    def __init__(self, path: Path):
        self.path = path

    def begin(self, folder: Path, job: Job, step: int) -> None:
        self.path.touch()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in WITH_RAY else pytest.mark.slow)
        for name in CASES
        if name in WITH_RAY or name not in ALGORITHMS
    ],
)
def test_any_number_of_workers_gives_the_same_theta(
    name: str, workplace: Path, cluster: None, train_here: Callable[[str], Path]
) -> None:
    assert Job.load(train_here(name) / "job.yaml").compute.compile == (name == "compiled")
    assert [row["step"] for row in read_rows_without_times(train_here(name))] == list_steps(name)
    for workers in WITH_RAY.get(name, (3,)):
        run = train_job(CASES[name], workers=workers)
        assert read_theta(run) == read_theta(train_here(name)), workers
        assert read_rows_without_times(run) == read_rows_without_times(train_here(name))


@pytest.fixture(scope="module")
def hosts(cluster: None) -> Iterator[list[Any]]:
    import ray

    actors = [ray.remote(JobWorker).options(num_cpus=1).remote() for _ in range(2)]
    yield actors
    for actor in actors:
        ray.kill(actor)


@pytest.mark.parametrize("name", [name for name in CASES if name not in {*WITH_RAY, "compiled"}])
def test_other_processes_give_the_same_theta(
    name: str,
    workplace: Path,
    hosts: list[Any],
    train_here: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Train with two other processes. How RayPool distributes shards is tested above."""
    here = train_here(name)
    monkeypatch.setattr(driver, "open_pool", partial(JobWorkerPool, hosts))
    run = train_job(CASES[name])
    assert read_theta(run) == read_theta(here)
    assert read_rows_without_times(run) == read_rows_without_times(here)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "compiled" else name for name in CASES]
)
def test_resume_gives_the_same_theta(name: str, workplace: Path, train_here: Callable[[str], Path]) -> None:
    short = train_job(CASES[name], steps=3, name="stopped")
    # the short run evaluates its last step, 3: that line is not compared
    distmeta.train(Job.load(short / "job.yaml", [f"run.steps={list_steps(name)[-1]}"]), resume=short)
    assert read_theta(short) == read_theta(train_here(name))
    resumed_rows = [row for row in read_rows_without_times(short) if row["step"] != 3]
    expected_rows = [row for row in read_rows_without_times(train_here(name)) if row["step"] != 3]
    assert resumed_rows == expected_rows
    assert [row["step"] for row in read_rows_without_times(short)] == list_steps(name)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "exponential"])
def test_resume_restores_every_optimizer_and_schedule(optimizer: str, schedule: str, workplace: Path) -> None:
    outer = {
        "optimizer": optimizer,
        "schedule": {"type": schedule, "steps": 9, "final": 0.1},
        "groups": {"*bias": {"lr": 0.02}},
        "clip_norm": 0.5,
    }
    if optimizer in ("sgd", "rmsprop"):
        outer["momentum"] = 0.9
    job = tree("maml", outer=outer, run={"steps": 12, "tasks_per_step": 2, "shards": 1})
    uninterrupted = train_job(job)
    short = train_job(job, steps=5, name="stopped")
    distmeta.train(Job.load(short / "job.yaml", ["run.steps=12"]), resume=short)
    assert read_theta(short) == read_theta(uninterrupted)


def test_shard_of_a_killed_worker_is_computed_again(workplace: Path, cluster: None) -> None:
    """The workers prefetch tasks."""
    job = tree("maml", tasks={"type": "hard_cases:TasksThatKillTheProcess", "flag": str(workplace / "kill")})
    calm = train_job(job)
    lethal = Job.parse(job).replace(run={"workers": 2}, compute={"draw_ahead": True})
    shaken = distmeta.train(lethal, reporter=FlagReporter(workplace / "kill")).run
    assert not (workplace / "kill").exists(), "a worker was killed"
    assert read_theta(shaken) == read_theta(calm)
    assert read_rows_without_times(shaken) == read_rows_without_times(calm)


def test_shard_that_kills_every_worker_stops_the_run_with_a_checkpoint(
    workplace: Path, cluster: None
) -> None:
    from distmeta.runtime.failure_policy import LostShardError

    tasks = {"type": "hard_cases:TasksThatKillTheProcess", "flag": str(workplace / "kill"), "always": True}
    job = Job.parse(tree("maml", tasks=tasks, run={"workers": 2, "name": "doomed", "max_shard_failures": 2}))
    with pytest.raises(LostShardError, match=r"shard \d \(tasks \d to \d\) lost 2 workers"):
        distmeta.train(job, reporter=FlagReporter(workplace / "kill"))
    assert checkpoints.load(workplace / "runs" / "doomed").progress.step == 0


def test_error_on_a_worker_is_raised_in_the_driver(workplace: Path, cluster: None) -> None:
    tasks = {"type": "hard_cases:TasksThatVanish", "flag": str(workplace / "gone")}
    job = Job.parse(tree("maml", tasks=tasks, run={"workers": 1, "name": "gone"}))
    with pytest.raises(distmeta.errors.InputError, match=r"^tasks.path: the store is gone$"):
        distmeta.train(job, reporter=FlagReporter(workplace / "gone"))
    assert checkpoints.load(workplace / "runs" / "gone").progress.step == 0


def test_too_few_resources_are_reported(workplace: Path, cluster: None) -> None:
    with pytest.raises(distmeta.errors.InputError, match=r"run.workers: got 9 .* the cluster has 4 CPU"):
        train_job(tree("maml"), workers=9, start_timeout=3)
    assert not (workplace / "runs").exists()


def test_non_finite_tasks_are_dropped_and_counted(workplace: Path) -> None:
    run = train_job(tree("maml", tasks={"type": "hard_cases:SomeTasksWithNaN"}, run={"tasks_per_step": 16}))
    rows = read_rows_without_times(run)
    assert sum(row["tasks_dropped"] for row in rows) > 0
    for row in rows:
        assert row["tasks"] + row["tasks_dropped"] == 16
        assert len(row.get("dropped", [])) == row["tasks_dropped"]
        assert np.isfinite(row["loss_after"])
    assert all(np.isfinite(value.numpy()).all() for value in checkpoints.load(run).theta.values())


def test_step_without_a_finite_task_changes_nothing(workplace: Path) -> None:
    job = tree(
        "maml",
        tasks={"type": "hard_cases:AllTasksWithNaN"},
        run={"steps": 3, "keep": 9, "checkpoint_every": 1},
    )
    run = train_job(job)
    states = [checkpoints.load(run / "checkpoints" / f"step-{step:08d}") for step in (0, 3)]
    assert all(np.array_equal(states[0].theta[n], states[1].theta[n]) for n in states[0].theta)
    assert states[1].optimizer == {}
    assert read_rows_without_times(run)[0]["loss_after"] is None
    assert read_rows_without_times(run)[0]["grad_norm"] is None


def test_infinite_sum_of_finite_gradients_never_reaches_theta(workplace: Path) -> None:
    tasks = {"type": "hard_cases:TasksWithOverflowingSum"}
    run = train_job(tree("maml", tasks=tasks, outer={"clip_norm": 1.0}, run={"steps": 2}))
    assert [(row["tasks"], row["tasks_dropped"]) for row in read_rows_without_times(run)] == [(0, 8), (0, 8)]
    assert all(np.isfinite(value.numpy()).all() for value in checkpoints.load(run).theta.values())


def test_mistake_that_only_workers_see_is_one_line(workplace: Path, cluster: None) -> None:
    tasks = {"type": "hard_cases:TasksOfOneProcess", "pid": os.getpid()}
    with pytest.raises(distmeta.errors.InputError, match=r"^tasks.path: not on this node$"):
        train_job(tree("maml", tasks=tasks), workers=1)
    assert not (workplace / "runs").exists()


def test_stop_at_a_non_finite_gradient(workplace: Path) -> None:
    job = tree(
        "maml", tasks={"type": "hard_cases:AllTasksWithNaN"}, run={"on_nonfinite": "stop", "name": "bad"}
    )
    with pytest.raises(distmeta.errors.NumericsError, match=r"step 1: .* tasks \[0, 1"):
        distmeta.train(Job.parse(job))
    assert checkpoints.load(workplace / "runs" / "bad").progress.step == 0


def test_worker_without_the_trajectories_collects_them_again() -> None:
    problem = resolve(build_problem(Job.parse(CASES["outer-epochs"])))
    server = ParameterServer(problem.init(), problem.job.outer)
    first = server.flat()
    shard = plan_shards(problem, "train", 0, 8, 4, 1)[2]
    one = Worker(problem, server.layout)
    other = Worker(problem, server.layout)
    gradient = one.compute(first, shard).gradient
    assert gradient is not None
    server.step(gradient)
    both = np.concatenate([server.flat(), first])
    later = replace(shard, epoch=1)
    results = [worker.compute(both, later).gradient for worker in (one, other)]
    assert results[0] is not None
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], gradient)


def test_error_between_outer_epochs_undoes_them(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = train_job(CASES["outer-epochs"], steps=3, eval_every=0)
    compute = Worker.compute

    def stopping(worker: Worker, flat: np.ndarray, shard: Shard, out: Buffer | None) -> ShardResult:
        if (shard.step, shard.epoch) == (stop, 2):
            raise NumericsError("on the way")
        return compute(worker, flat, shard, out)

    for stop in (0, 2):
        monkeypatch.setattr(Worker, "compute", stopping)
        name = f"stopped-{stop}"
        with pytest.raises(NumericsError):
            train_job(CASES["outer-epochs"], steps=3, eval_every=0, name=name)
        monkeypatch.setattr(Worker, "compute", compute)
        run = workplace / "runs" / name
        assert checkpoints.load(run).progress.step == stop
        distmeta.train(Job.load(run / "job.yaml"), resume=run)
        assert read_theta(run) == read_theta(calm)


@pytest.mark.parametrize("execution", ["loop", "vmap"])
def test_scores_before_adaptation_follow_before_every_and_change_no_bit(
    workplace: Path, execution: str
) -> None:
    job = tree("maml", compute={"execution": execution}, run={"steps": 5})
    runs = {every: train_job(job, name=f"every-{every}", before_every=every) for every in (1, 3, 0)}
    assert read_theta(runs[1]) == read_theta(runs[3]) == read_theta(runs[0])
    rows = {every: read_rows(run) for every, run in runs.items()}
    before = {every: [row["loss_before"] for row in rows[every]] for every in rows}
    assert None not in before[1]
    assert before[3] == [before[1][0], None, None, before[1][3], None]
    assert before[0] == [None] * 5
    assert rows[0][4]["loss_after"] == rows[1][4]["loss_after"]
