"""Workers that die, hang, lag and fail, on a real Ray cluster: theta and metrics are those of an undisturbed run."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import POLICIES, tree
from support.outcomes import ActingReporter, read_outcome, train_job
from support.processes import ENVIRONMENT, find_workers, send_signal, wait_until_gone

from distmeta.compute.compiler import MissingCompilerError
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime import ray_workers
from distmeta.runtime.failure_policy import LostShardError

RUN = {"steps": 8, "eval_every": 4, "eval_tasks": 60, "start_timeout": 120.0}
EPOCHS = {"type": "maml-rl", "inner_lr": 0.1, "kl": 0.1, "outer_epochs": 3}


def faulty_job(workplace: Path, **options: Any) -> dict[str, Any]:
    """Return a job whose tasks do harm on workers, as often as the options of `hard_cases.FaultyTasksOnWorkers` say."""
    tasks = {"type": "hard_cases:FaultyTasksOnWorkers", "folder": str(workplace), **options}
    return tree("maml", tasks=tasks, run=RUN)


@pytest.mark.parametrize(
    ("job", "steps"),
    [
        pytest.param(tree("maml"), (2, 3, 5), id="maml", marks=pytest.mark.slow),
        pytest.param(tree(EPOCHS, **POLICIES), (2, 5), id="outer-epochs", marks=pytest.mark.slow),
        pytest.param(tree("rl2"), (3,), id="rl2", marks=pytest.mark.slow),
    ],
)
def test_all_workers_are_killed_at_once_several_times(
    job: dict[str, Any], steps: tuple[int, ...], workplace: Path, cluster: None
) -> None:
    def kill() -> None:
        victims = find_workers()
        assert victims
        send_signal(victims, signal.SIGKILL)

    expected = read_outcome(train_job(job, **RUN))
    reporter = ActingReporter(dict.fromkeys(steps, kill))
    assert read_outcome(train_job(job, reporter, **RUN, workers=2)) == expected
    assert sum(text.startswith("lost worker") for text in reporter.reports) >= len(steps)


@pytest.mark.parametrize(
    "when", ["build", *(pytest.param(when, marks=pytest.mark.slow) for when in ("train", "val"))]
)
def test_workers_die_while_starting_training_or_evaluating(when: str, workplace: Path, cluster: None) -> None:
    expected = read_outcome(train_job(faulty_job(workplace)))
    reporter = ActingReporter()
    job = faulty_job(workplace, kill=when, times=3)
    assert read_outcome(train_job(job, reporter, workers=2, max_shard_failures=4)) == expected
    assert len(list(workplace.glob("fault-*"))) == 3, "two workers and a replacement were killed"
    losses = [text for text in reporter.reports if "lost worker" in text or "died while starting" in text]
    assert len(losses) == 3


@pytest.mark.slow  # four workers for one message; that some die is tested above
def test_workers_that_never_start_end_the_run_before_it_begins(workplace: Path, cluster: None) -> None:
    message = r"^4 workers in a row died while starting, the last by: ActorDied"
    with pytest.raises(LostShardError, match=message):
        train_job(faulty_job(workplace, kill="build", times=99), workers=2, max_shard_failures=2)
    assert not (workplace / "runs").exists()


@pytest.mark.slow
def test_stopped_worker_is_replaced_after_the_limit(workplace: Path, cluster: None) -> None:
    stopped: list[int] = []

    def stop() -> None:
        stopped.extend(find_workers())
        send_signal(stopped, signal.SIGSTOP)

    expected = read_outcome(train_job(tree("maml", run=RUN)))
    reporter = ActingReporter({3: stop})
    run = train_job(tree("maml", run=RUN), reporter, workers=1, shard_timeout=20.0)
    assert read_outcome(run) == expected
    assert any(text.startswith("lost worker 0 (no answer for") for text in reporter.reports), reporter.reports
    assert stopped
    assert not wait_until_gone(stopped, 60), "Ray kills a process that does not answer"


@pytest.mark.slow
def test_slow_shard_is_also_computed_by_another_worker(workplace: Path, cluster: None) -> None:
    expected = read_outcome(train_job(faulty_job(workplace)))
    reporter = ActingReporter()
    # one draw in one worker sleeps for long, and the other worker has nothing else to do
    job = faulty_job(workplace, sleep=45.0, times=1, after=12)
    assert read_outcome(train_job(job, reporter, workers=2)) == expected
    assert any("is slow: worker" in text for text in reporter.reports), reporter.reports
    assert not any("lost worker" in text for text in reporter.reports), reporter.reports


@pytest.mark.slow
def test_lack_of_memory_is_tried_on_another_worker(workplace: Path, cluster: None) -> None:
    expected = read_outcome(train_job(faulty_job(workplace)))
    reporter = ActingReporter()
    job = faulty_job(workplace, fail="MemoryError", times=2, after=3)
    assert read_outcome(train_job(job, reporter, workers=2)) == expected
    losses = [text for text in reporter.reports if "lost worker" in text and "MemoryError" in text]
    assert len(losses) == 2, reporter.reports


def test_mistake_in_the_code_is_raised_at_once(workplace: Path, cluster: None) -> None:
    with pytest.raises(ZeroDivisionError):
        train_job(faulty_job(workplace, fail="ZeroDivisionError", times=1), workers=1, name="mistake")
    assert len(list(workplace.glob("fault-*"))) == 1
    assert checkpoints.load(workplace / "runs" / "mistake").progress.step == 0


@pytest.mark.slow
def test_elastic_pool_starts_with_the_minimum_and_uses_what_fits(workplace: Path, cluster: None) -> None:
    """Three workers would need six processors. The cluster has four."""
    expected = read_outcome(train_job(tree("maml", run=RUN)))
    sizes: list[int] = []
    reporter = ActingReporter({8: lambda: sizes.append(len(find_workers()))})
    elastic = {"workers": {"min": 1, "max": 3}, "cpus_per_worker": 2.0}
    assert read_outcome(train_job(tree("maml", run=RUN), reporter, **elastic)) == expected
    assert 1 <= sizes[0] <= 2


def test_cluster_without_room_is_reported_and_ends_the_run(workplace: Path, cluster: None) -> None:
    reporter = ActingReporter()
    job = tree("maml", run=RUN | {"workers": {"min": 2, "max": 3}, "cpus_per_worker": 3.0})
    with pytest.raises(InputError, match=r"run.workers: got 2 of 3 CPU .* the cluster has 4 CPU"):
        train_job(job, reporter, start_timeout=8.0)
    waiting = [text for text in reporter.reports if text.startswith("waiting for workers")]
    assert waiting
    assert any("of 2 ready" in text for text in waiting)
    assert "waiting for room (3 CPU, 0 GPU each); the cluster has 4 CPU" in waiting[0]


def test_late_worker_without_a_compiler_is_refused(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker that is built first finds a compiler, the others do not."""
    import ray

    first = str(tmp_path / "first")

    class SelectiveProcess(ray_workers.WorkerProcess):
        def build(self, spec: Any) -> int:
            try:
                open(first, "x").close()
            except FileExistsError:
                time.sleep(1.0)  # by then the run has started
                raise MissingCompilerError("no C++ compiler (g++) on elsewhere") from None
            return 0

    monkeypatch.setattr(ray_workers, "WorkerProcess", SelectiveProcess)
    reports: list[str] = []
    run = Job.parse(tree(run={"workers": {"min": 1, "max": 2}, "cpus_per_worker": 0.5})).run
    workers = ray_workers.RayWorkers(ray, run, reports.append)
    try:
        workers.start(ray.put(None))
        deadline = time.monotonic() + 60
        while not any("is refused" in text for text in reports):
            assert time.monotonic() < deadline, reports
            workers.update()
            workers.wait([])
        assert workers.size == 1, "the run continues with the worker that it has"
    finally:
        workers.close()
    message = (
        r"worker \d is refused \(there is no C\+\+ compiler \(g\+\+\) on elsewhere\): another one is started"
    )
    assert any(re.fullmatch(message, text) for text in reports), reports


@pytest.mark.slow
def test_lost_shard_is_one_line_on_the_command_line(workplace: Path) -> None:
    """The run stops with a checkpoint and without a traceback, whatever Ray prints about a dead worker."""
    job = tree(
        "maml", tasks={"type": "hard_cases:FaultyTasksOnWorkers", "folder": ".", "kill": "train", "times": 99}
    )
    job["run"] |= {"workers": 1, "max_shard_failures": 2, "name": "lost"}
    (workplace / "job.yaml").write_text(yaml.safe_dump(job))
    done = subprocess.run(
        [sys.executable, "-m", "distmeta.cli.main", "train", "job.yaml", "--json"],
        capture_output=True,
        text=True,
        timeout=240,
        env=ENVIRONMENT,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    error = json.loads(done.stdout)["error"]
    for part in ("LostShardError: shard 0 (tasks 0 to 1) lost 2 workers", "run.max_shard_failures is 2"):
        assert part in error
    assert checkpoints.load(workplace / "runs" / "lost").progress.step == 0
