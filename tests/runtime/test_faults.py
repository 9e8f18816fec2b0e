"""Workers that die, hang, lag and fail, on a real Ray cluster: theta and metrics are those of a calm run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import POLICIES, REPOSITORY, tree
from processes import gone, send, worker_pids

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.failure_policy import LostShardError
from distmeta.runtime.training import Silent

RUN = {"steps": 8, "eval_every": 4, "eval_tasks": 60, "start_timeout": 120.0}


class Harm(Silent):
    """Does something to the workers after a step, in the driver's own thread; keeps what is said."""

    def __init__(self, steps: Mapping[int, Callable[[], Any]] | None = None):
        self.steps, self.said = steps or {}, list[str]()

    def step(self, record: Mapping[str, Any]) -> None:
        self.steps.get(record["step"], lambda: None)()

    def say(self, text: str) -> None:
        self.said.append(text)


def outcome(
    job: dict[str, Any], reporter: Silent | None = None, **run: Any
) -> tuple[bytes, list[dict[str, Any]]]:
    """theta, and metrics.jsonl without what depends on the clock."""
    folder = distmeta.train(Job.parse(job | {"run": job["run"] | run}), reporter=reporter).run
    theta = checkpoints.load(folder).theta
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith(("seconds", "tasks_per"))} for row in rows]
    return b"".join(name.encode() + theta[name].numpy().tobytes() for name in sorted(theta)), rows


def faulty(workplace: Path, **options: Any) -> dict[str, Any]:
    """A job whose tasks do harm on workers, as often as its options say."""
    tasks = {"type": "hard_cases:Faulty", "folder": str(workplace), **options}
    return tree("maml", tasks=tasks, run=RUN)


EPOCHS = {"type": "maml-rl", "inner_lr": 0.1, "kl": 0.1, "outer_epochs": 3}


@pytest.mark.parametrize(
    ("job", "steps"),
    [
        pytest.param(tree("maml"), (2, 3, 5), id="maml", marks=pytest.mark.slow),
        pytest.param(tree(EPOCHS, **POLICIES), (2, 5), id="outer-epochs", marks=pytest.mark.slow),
        pytest.param(tree("rl2"), (3,), id="rl2", marks=pytest.mark.slow),
    ],
)
def test_all_workers_killed_at_once_and_again(
    job: dict[str, Any], steps: tuple[int, ...], workplace: Path, cluster: None
) -> None:
    def kill() -> None:
        victims = worker_pids()
        assert victims
        send(victims, signal.SIGKILL)

    job = job | {"run": job["run"] | RUN}
    calm = outcome(job)
    harm = Harm(dict.fromkeys(steps, kill))
    assert outcome(job, harm, workers=2) == calm
    assert sum(text.startswith("lost worker") for text in harm.said) >= len(steps)


@pytest.mark.parametrize(
    "when", ["build", *(pytest.param(when, marks=pytest.mark.slow) for when in ("train", "val"))]
)
def test_workers_that_die_while_starting_in_a_shard_and_in_an_evaluation(
    when: str, workplace: Path, cluster: None
) -> None:
    calm = outcome(faulty(workplace))
    harm = Harm()
    assert outcome(faulty(workplace, kill=when, times=3), harm, workers=2, max_shard_failures=4) == calm
    assert len(list(workplace.glob("fault-*"))) == 3, "two workers and a replacement were killed"
    assert len([text for text in harm.said if "lost worker" in text or "died while starting" in text]) == 3


@pytest.mark.slow  # four workers, for one message; that some die is tested above
def test_workers_that_never_start_end_the_run_before_it_begins(workplace: Path, cluster: None) -> None:
    with pytest.raises(
        LostShardError, match=r"^4 workers in a row died while starting, the last by: ActorDied"
    ):
        outcome(faulty(workplace, kill="build", times=99), workers=2, max_shard_failures=2)
    assert not (workplace / "runs").exists()


@pytest.mark.slow
def test_a_stopped_worker_is_replaced_after_the_limit(workplace: Path, cluster: None) -> None:
    stopped: list[int] = []

    def stop() -> None:
        stopped.extend(worker_pids())
        send(stopped, signal.SIGSTOP)

    calm = outcome(tree("maml", run=RUN))
    harm = Harm({3: stop})
    assert outcome(tree("maml", run=RUN), harm, workers=1, shard_timeout=20.0) == calm
    assert any(text.startswith("lost worker 0 (no answer for") for text in harm.said), harm.said
    assert stopped
    assert not gone(stopped, 60), "Ray ends what does not answer"


def test_a_slow_shard_is_computed_elsewhere_too(workplace: Path, cluster: None) -> None:
    calm = outcome(faulty(workplace))
    harm = Harm()
    # one draw in one worker sleeps for long; the other worker has nothing else to do
    assert outcome(faulty(workplace, sleep=45.0, times=1, after=12), harm, workers=2) == calm
    assert any("is slow: worker" in text for text in harm.said), harm.said
    assert not any("lost worker" in text for text in harm.said), harm.said


@pytest.mark.slow
def test_what_a_machine_lacks_is_tried_elsewhere(workplace: Path, cluster: None) -> None:
    calm = outcome(faulty(workplace))
    harm = Harm()
    assert outcome(faulty(workplace, fail="MemoryError", times=2, after=3), harm, workers=2) == calm
    assert sum("lost worker" in text and "MemoryError" in text for text in harm.said) == 2, harm.said


def test_a_mistake_in_the_code_is_raised_at_once(workplace: Path, cluster: None) -> None:
    with pytest.raises(ZeroDivisionError):
        outcome(faulty(workplace, fail="ZeroDivisionError", times=1), workers=1, name="mistake")
    assert len(list(workplace.glob("fault-*"))) == 1
    assert checkpoints.load(workplace / "runs" / "mistake").progress.step == 0


def test_an_elastic_pool_starts_with_the_minimum_and_uses_what_fits(workplace: Path, cluster: None) -> None:
    """Three workers would fit a cluster of six processors; this one has four."""
    calm, sizes = outcome(tree("maml", run=RUN)), list[int]()
    harm = Harm({8: lambda: sizes.append(len(worker_pids()))})
    elastic = {"workers": {"min": 1, "max": 3}, "cpus_per_worker": 2.0}
    assert outcome(tree("maml", run=RUN | {"steps": 8}), harm, **elastic) == calm
    assert 1 <= sizes[0] <= 2
    crowded = Harm()
    wide = tree("maml", run=RUN | {"workers": {"min": 2, "max": 3}, "cpus_per_worker": 3.0})
    with pytest.raises(InputError, match=r"run.workers: got 2 of 3 CPU .* the cluster has 4 CPU"):
        outcome(wide, crowded, start_timeout=8.0)
    waiting = [text for text in crowded.said if text.startswith("waiting for workers")]
    assert waiting
    assert any("of 2 ready" in text for text in waiting)
    assert "waiting for room (3 CPU, 0 GPU each); the cluster has 4 CPU" in waiting[0]


@pytest.mark.slow
def test_at_the_command_line_a_lost_shard_is_one_line_and_json_stays_json(workplace: Path) -> None:
    """Ray prints what it thinks of a dead worker; the run stops with a checkpoint, without a traceback."""
    job = tree("maml", tasks={"type": "hard_cases:Faulty", "folder": ".", "kill": "train", "times": 99})
    job["run"] |= {"workers": 1, "max_shard_failures": 2, "name": "lost"}
    (workplace / "job.yaml").write_text(yaml.safe_dump(job))
    done = subprocess.run(
        [sys.executable, "-m", "distmeta.cli.main", "train", "job.yaml", "--json"],
        capture_output=True, text=True, timeout=240,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    error = json.loads(done.stdout)["error"]
    for part in ("LostShardError: shard 0 (tasks 0 to 1) lost 2 workers", "run.max_shard_failures is 2"):
        assert part in error
    assert checkpoints.load(workplace / "runs" / "lost").progress.step == 0
