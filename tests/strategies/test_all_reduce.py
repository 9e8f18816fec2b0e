"""`all-reduce`: theta is that of `driver` within rounding, and what a group under Ray Train survives."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import HOME, POLICIES, tree
from support.outcomes import ActingReporter, read_rows, train_job
from support.processes import (
    ENVIRONMENT,
    find_actors,
    find_descendants,
    read_command,
    send_signal,
    wait_until_gone,
)

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.problem import build_problem
from distmeta.runtime.ray_cluster import remove_orphaned_placement_groups
from distmeta.runtime.resolve import resolve
from distmeta.runtime.strategy import LostStateError
from distmeta.strategies.all_reduce.driver_side import AllReduce, next_boundary
from distmeta.strategies.all_reduce.group_host import GroupHost
from distmeta.strategies.all_reduce.messages import Abandon, Leave, LostGroup, RankAnswer, RankError

SGD = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "clip_norm": 1.0}
POISONED = {"type": "hard_cases:SomeTasksWithNaN"}
"""One task in four is not finite."""
EPOCHS = {"type": "maml-rl", "inner_lr": 0.1, "kl": 0.1, "outer_epochs": 3}
ALL_REDUCE = {"type": "all-reduce"}
TWO_RANKS = {"workers": 2, "start_timeout": 120.0}


def read_flat(run: Path) -> np.ndarray:
    theta = checkpoints.load(run).theta
    return np.concatenate([theta[name].numpy().ravel() for name in sorted(theta)])


def relative_distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Return ‖found − expected‖₂ / ‖expected‖₂."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def is_close(found: float | None, expected: float | None, relative: float) -> bool:
    """The absolute tolerance is for losses of policy gradients, which are nothing but rounding."""
    if found is None or expected is None:
        return found is expected
    return math.isclose(found, expected, rel_tol=relative, abs_tol=1e-6)


def find_ranks(pid: int | None = None) -> list[int]:
    """Return the processes of the group's ranks below a process (None: this one)."""
    return find_actors("RayTrainWorker", pid)


JOBS = {
    "sgd": tree("maml", tasks=POISONED, outer=SGD, compute={"draw_ahead": True}, run={"steps": 20}),
    "epochs": tree(EPOCHS, outer=SGD, run={"steps": 3}, **POLICIES),
    "all-bad": tree("maml", tasks={"type": "hard_cases:AllTasksWithNaN"}, outer=SGD, run={"steps": 2}),
    "stop": tree("maml", tasks=POISONED, outer=SGD, run={"steps": 4, "on_nonfinite": "stop"}),
    "mistake": tree("maml", outer=SGD, run={"steps": 10}),
    "abandoned": tree("maml", outer=SGD, run={"steps": 10}),
}
FAILURES = {
    "stop": ["0: NumericsError"] * 2,
    "mistake": ["8: ZeroDivisionError"],
    "abandoned": ["8: Abandoned"],
}


def test_ranks_agree_with_driver_and_on_every_failure(workplace: Path) -> None:
    """Three processes for four shards: the replicas only, without Ray."""
    (workplace / "jobs.json").write_text(json.dumps(JOBS))
    script = [sys.executable, str(Path(__file__).with_name("ranks.py"))]
    processes = [
        subprocess.Popen([*script, str(rank), "3", str(workplace)], env=ENVIRONMENT, cwd=workplace)
        for rank in range(3)
    ]
    assert [process.wait(180) for process in processes] == [0, 0, 0]
    found = [json.loads((workplace / f"rank-{rank}.json").read_text()) for rank in range(3)]
    for name, job in JOBS.items():
        thetas = [np.load(workplace / f"{name}-{rank}.npy") for rank in range(3)]
        assert all(np.array_equal(theta, thetas[0]) for theta in thetas), "replicas are equal to the bit"
        assert [of_rank[name]["failures"] for of_rank in found] == [FAILURES.get(name, [])] * 3
        assert found[0][name]["gathered"] == [0, 3000, 6000, 0, 1, 2]
        if name == "stop":
            continue
        driver = train_job(job)
        assert relative_distance(thetas[0], read_flat(driver)) < 1e-5, name
        for row, expected in zip(found[0][name]["records"], read_rows(driver), strict=True):
            assert row.get("dropped") == expected.get("dropped")
            assert row["tasks"] == expected["tasks"]
            assert is_close(row["loss_after"], expected["loss_after"], 1e-4)


@pytest.mark.slow
def test_run_with_evaluations_checkpoints_and_a_killed_rank(workplace: Path, cluster: None) -> None:
    job = tree("maml", tasks=POISONED, outer=SGD)
    job["run"] |= {"steps": 20, "eval_every": 10, "eval_tasks": 60, "checkpoint_every": 5}
    driver = train_job(job)
    ranks_seen: list[list[int]] = []

    def kill_rank() -> None:
        ranks_seen.append(find_ranks())
        send_signal(ranks_seen[-1][:1], signal.SIGKILL)

    reporter = ActingReporter({8: kill_rank})
    run = train_job(job, reporter, strategy=ALL_REDUCE, **TWO_RANKS)
    assert len(ranks_seen[0]) == 2
    assert relative_distance(read_flat(run), read_flat(driver)) < 1e-5
    rewinds = [text for text in reporter.reports if "back to the checkpoint of step" in text]
    assert len(rewinds) == 1, reporter.reports
    message = r"lost the group \(rank [01]: \w*Actor\w*\): back to the checkpoint of step 5"
    assert re.match(message, rewinds[0]), rewinds
    assert [row["step"] for row in read_rows(run)] == list(range(1, 21))
    for row, expected in zip(read_rows(run), read_rows(driver), strict=True):
        assert row.keys() == expected.keys()
        assert row.get("dropped") == expected.get("dropped")
        for name in {"loss_after", "grad_norm", "val_loss_after"} & expected.keys():
            assert is_close(row[name], expected[name], 1e-3)
    assert not wait_until_gone(find_ranks(), 30)
    assert not (HOME / "ray_results").exists()


@pytest.mark.slow
def test_ctrl_c_saves_and_a_resume_continues(workplace: Path, cluster: None) -> None:
    """The command with its own local Ray; then a resume on the cluster, with Adam, whose losses are driver's."""
    run_section = TWO_RANKS | {"steps": 100_000, "name": "long", "eval_every": 7, "eval_tasks": 50}
    job = tree("maml", run=run_section, strategy=ALL_REDUCE)
    shared_memory = set(Path("/dev/shm").iterdir())
    process, run = start_command(job, 5)
    descendants = find_descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not wait_until_gone(descendants, 30)
    assert set(Path("/dev/shm").iterdir()) <= shared_memory
    progress = checkpoints.load(run).progress
    step = progress.step
    assert step == json.loads(out)["step"] >= 5
    assert len(read_rows(run)) == progress.last_recorded_step, "a record waits for its evaluation"
    distmeta.train(Job.load(run / "job.yaml", [f"run.steps={step + 9}"]), resume=run)
    driver = train_job(job, strategy={"type": "driver"}, workers=0, steps=step + 9, name="undisturbed")
    assert [row["step"] for row in read_rows(run)] == list(range(1, step + 10))
    losses = [row["loss_after"] for row in read_rows(run)]
    assert losses == pytest.approx([row["loss_after"] for row in read_rows(driver)], rel=1e-2)


def start_command(job: dict[str, Any], lines: int) -> tuple[subprocess.Popen[str], Path]:
    """Start `distmeta train`, and wait until it has taken so many steps. Return the process and the run folder."""
    Path("job.yaml").write_text(yaml.safe_dump(job))
    command = [sys.executable, "-m", "distmeta.cli.main", "train", "job.yaml", "--json"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    run = Path("runs", job["run"]["name"]).absolute()
    deadline = time.monotonic() + 180
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not start"
        time.sleep(0.05)
    return process, run


@pytest.mark.slow
def test_lack_of_room_and_mistakes_are_reported_before_training(workplace: Path, cluster: None) -> None:
    job = tree("maml", run=TWO_RANKS, strategy=ALL_REDUCE)
    message = r"run.workers: got 5 of 1 CPU .* not ready .* the cluster has 4 CPU"
    with pytest.raises(InputError, match=message):
        train_job(job, workers=5, start_timeout=20.0)
    assert not (workplace / "runs").exists()
    mistake = {"fail": "ZeroDivisionError", "times": 1}
    job["tasks"] = {"type": "hard_cases:FaultyTasksOnWorkers", "folder": str(workplace), **mistake}
    with pytest.raises(ZeroDivisionError):
        train_job(job, name="mistake")
    assert checkpoints.load(workplace / "runs" / "mistake").progress.step == 0


@pytest.mark.slow
def test_placement_groups_of_a_dead_creator_are_removed(workplace: Path, cluster: None) -> None:
    """As when a host ends while its group starts. Ray would keep the placement group until the job ends."""
    import ray
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    class Creator:
        def create(self) -> str:
            group = placement_group([{"CPU": 1.0}] * 2)
            ray.get(group.ready(), timeout=60)
            return group.id.hex()

    def find_existing() -> set[str]:
        return {key for key, group in placement_group_table().items() if group["state"] != "REMOVED"}

    first = ray.remote(Creator).options(num_cpus=0).remote()
    second = ray.remote(Creator).options(num_cpus=0).remote()
    lost, kept = ray.get([first.create.remote(), second.create.remote()], timeout=90)
    own = placement_group([{"memory": 1.0}])
    ray.get(own.ready(), timeout=60)
    ray.kill(first)
    assert remove_orphaned_placement_groups(ray, 5.0) == 1
    assert {kept, own.id.hex()} <= find_existing(), "of a living actor, and of this process"
    assert lost not in find_existing()
    ray.kill(second)
    assert remove_orphaned_placement_groups(ray, 5.0) == 1
    remove_placement_group(own)


@pytest.mark.slow
def test_elastic_group_takes_what_fits(workplace: Path, cluster: None) -> None:
    sizes: list[int] = []
    reporter = ActingReporter({6: lambda: sizes.append(len(find_ranks()))})
    # Ray Train keeps two places of a group that was killed, as in the tests above, for 180 s
    elastic = {"workers": {"min": 1, "max": 6}, "start_timeout": 300.0}
    run = train_job(tree("maml", run=elastic, strategy=ALL_REDUCE), reporter)
    assert [row["step"] for row in read_rows(run)] == list(range(1, 7))
    assert sizes in ([4], [2])


@pytest.mark.slow
def test_group_with_a_hung_rank_is_replaced(workplace: Path, cluster: None) -> None:
    stopped: list[int] = []

    def stop_rank() -> None:
        stopped.extend(find_ranks()[:1])
        send_signal(stopped, signal.SIGSTOP)

    reporter = ActingReporter({3: stop_rank})
    run_section = TWO_RANKS | {"steps": 8, "eval_every": 2, "shard_timeout": 10.0}
    run = train_job(tree("maml", run=run_section, strategy=ALL_REDUCE), reporter)
    assert [row["step"] for row in read_rows(run)] == list(range(1, 9))
    losses = [text for text in reporter.reports if text.startswith("lost the group (no answer for ")]
    assert losses, reporter.reports
    assert not wait_until_gone(stopped, 60)


@pytest.mark.slow
def test_killed_driver_leaves_no_processes(workplace: Path) -> None:
    run_section = TWO_RANKS | {"steps": 100_000, "name": "killed", "checkpoint_every": 3}
    shared_memory = set(Path("/dev/shm").iterdir())
    process, run = start_command(tree("maml", run=run_section, strategy=ALL_REDUCE), 7)
    descendants = find_descendants(process.pid)
    send_signal(find_ranks(process.pid)[:1], signal.SIGSTOP)
    send_signal([process.pid], signal.SIGKILL)
    process.communicate(timeout=30)
    left = wait_until_gone(descendants, 30)
    assert not left, [read_command(pid) for pid in left]
    assert set(Path("/dev/shm").iterdir()) <= shared_memory
    assert checkpoints.load(run).progress.step >= 6


def test_boundaries_are_steps_whose_theta_is_needed() -> None:
    changes = [{"step": 8, "set": {"outer.lr": 0.1}}]
    job = tree("maml", changes=changes, run={"steps": 17, "eval_every": 5, "checkpoint_every": 6})
    problem = resolve(build_problem(Job.parse(job)))
    expected = {0: 5, 4: 5, 5: 6, 6: 8, 8: 10, 10: 12, 12: 15, 15: 17, 16: 17}
    assert {step: next_boundary(problem, step) for step in expected} == expected


def test_host_carries_commands_and_a_lost_group_ends_them() -> None:
    """The host's bookkeeping, without Ray."""
    asyncio.run(asyncio.wait_for(_use_host(), 20))


async def _use_host() -> None:
    host = GroupHost()
    ready = asyncio.create_task(host.wait_for_group(0))
    await host.join("a", 0, 2, None)
    await asyncio.sleep(0)
    assert not ready.done()
    await host.join("a", 1, 2, None)
    assert await ready == ("a", 2, None)

    asked = asyncio.create_task(host.ask("a", "steps"))
    assert [await host.next_command("a", 0) for _ in range(2)] == ["steps", "steps"]
    await host.tell("a", Abandon())
    assert await host.next_command("a", 1) == Abandon()
    await host.answer("a", 0, 1, RankAnswer("one"))
    await host.answer("a", 0, 0, RankAnswer("zero"))
    assert await asked == [RankAnswer("zero"), RankAnswer("one")]

    asked = asyncio.create_task(host.ask("a", "more"))
    waiting = asyncio.create_task(host.next_command("a", 3))
    await asyncio.sleep(0)
    await host.report_loss("ActorDiedError: killed")
    assert await asked == LostGroup("ActorDiedError: killed", 1)
    assert await waiting == Leave()
    assert await host.ask("a", "late") == LostGroup("ActorDiedError: killed", 1)

    ready = asyncio.create_task(host.wait_for_group(1))
    await host.join("b", 0, 1, RankError.from_exception(ValueError("no such model")))
    name, world, failure = await ready  # type: ignore[misc]
    assert (name, world) == ("b", 1)
    assert failure is not None
    assert isinstance(failure.error, ValueError)

    asked = asyncio.create_task(host.ask("b", "steps"))
    await asyncio.sleep(0)
    await host.join("c", 0, 3, None)
    lost = await asked
    assert lost == LostGroup("Ray Train resized it from 1 to 3 workers", 2)
    await host.answer("b", 0, 0, RankAnswer("too late"))
    assert (await host.wait_for_group(1)) == lost, "a driver that does not know of the loss learns it first"


def test_loss_of_a_group_is_described_by_the_rank_that_died() -> None:
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    from distmeta.strategies.all_reduce.ray_train import describe_failure

    died = WorkerHealthCheckFailedError("A worker health check failed.", MemoryError("gone"))
    peer = RuntimeError("Traceback:\n  ...\nRuntimeError: [gloo] Connection closed by peer")
    assert describe_failure({0: peer, 1: died}) == "rank 1: MemoryError"
    assert describe_failure({0: peer}) == "rank 0: RuntimeError: [gloo] Connection closed by peer"


def test_interface_is_found_by_its_address() -> None:
    from distmeta.strategies.all_reduce.ray_train import find_interface

    assert find_interface("127.0.0.1") == "lo"
    assert find_interface("203.0.113.9") is None


def test_rank_computes_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train shows a rank the GPUs of all ranks on its node."""
    import ray.train.torch

    from distmeta.strategies.all_reduce import rank

    def fail_to_build() -> None:
        raise InputError("tasks: not here")

    selected: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", selected.append)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(rank.RankLoop, "_get", lambda self, spec: spec)
    loop = rank.RankLoop.__new__(rank.RankLoop)
    for gpus in (0, 1):
        job = Job.parse(tree(run={"gpus_per_worker": gpus})).to_dict()
        spec = SimpleNamespace(job=job, build_problem=fail_to_build)
        assert "tasks: not here" in str(loop._build(spec))
        assert selected == [torch.device("cuda", 1)] * gpus


def test_lost_state_stays_lost() -> None:
    strategy = AllReduce.__new__(AllReduce)
    strategy._group = ""
    strategy._lost = "lost the group (in this test)"
    with pytest.raises(LostStateError, match="in this test"):
        strategy.state()


def test_error_that_cannot_be_pickled_travels_as_text() -> None:
    class LocalError(Exception):
        pass

    failure = RankError.from_exception(LocalError("only here"))
    assert isinstance(failure.error, RuntimeError)
    assert "LocalError: only here" in str(failure.error)
    assert isinstance(RankError.from_exception(InputError("tasks.path: missing")).error, InputError)
