"""`all-reduce`: driver's theta within rounding, and what a group under Ray Train survives."""

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
from conftest import HOME, POLICIES, REPOSITORY, tree
from outcomes import Watching, trained
from processes import descendants, gone, send, state, words

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.problem import build
from distmeta.runtime.ray_cluster import free_orphans
from distmeta.runtime.resolve import resolve
from distmeta.runtime.strategy import LostStateError
from distmeta.strategies.all_reduce.driver_side import AllReduce, boundary
from distmeta.strategies.all_reduce.group import RankAnswer, RankError, Halt, Host, Lost, Stop

SGD = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "clip_norm": 1.0}
POISONED = {"type": "hard_cases:Poisoned"}
"""One task in four is not finite."""
EPOCHS = {"type": "maml-rl", "inner_lr": 0.1, "kl": 0.1, "outer_epochs": 3}
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])}
GROUP = {"strategy": "all-reduce", "workers": 2, "start_timeout": 120.0}


def flat(run: Path) -> np.ndarray:
    theta = checkpoints.load(run).theta
    return np.concatenate([theta[name].numpy().ravel() for name in sorted(theta)])


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative, in the 2-norm."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def close(found: float | None, expected: float | None, relative: float) -> bool:
    """A loss of policy gradients is nothing but rounding."""
    if found is None or expected is None:
        return found is expected
    return math.isclose(found, expected, rel_tol=relative, abs_tol=1e-6)


def ranks(pid: int | None = None) -> list[int]:
    """The group's processes below one."""
    below = descendants(os.getpid() if pid is None else pid)
    return [p for p in below if words(p).startswith("ray::RayTrainWorker") and state(p) not in ("", "Z")]


JOBS = {
    "sgd": tree("maml", tasks=POISONED, outer=SGD, compute={"draw_ahead": True}, run={"steps": 20}),
    "epochs": tree(EPOCHS, outer=SGD, run={"steps": 3}, **POLICIES),
    "all-bad": tree("maml", tasks={"type": "hard_cases:AllBad"}, outer=SGD, run={"steps": 2}),
    "stop": tree("maml", tasks=POISONED, outer=SGD, run={"steps": 4, "on_nonfinite": "stop"}),
    "mistake": tree("maml", outer=SGD, run={"steps": 10}),
    "halted": tree("maml", outer=SGD, run={"steps": 10}),
}


def test_ranks_agree_with_the_driver_and_on_every_failure(workplace: Path) -> None:
    """Three processes for four shards, without Ray: the replicas alone."""
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
        assert all(np.array_equal(theta, thetas[0]) for theta in thetas), "replicas, to the bit"
        stops = {
            "stop": ["0: NumericsError"] * 2,
            "mistake": ["8: ZeroDivisionError"],
            "halted": ["8: Abandoned"],
        }
        assert [each[name]["stops"] for each in found] == [stops.get(name, [])] * 3
        assert found[0][name]["gathered"] == [0, 3000, 6000, 0, 1, 2]
        if name == "stop":
            continue
        alone = trained(job)
        assert distance(thetas[0], flat(alone)) < 1e-5, name
        for got, expected in zip(found[0][name]["records"], rows(alone), strict=True):
            assert got.get("dropped") == expected.get("dropped")
            assert got["tasks"] == expected["tasks"]
            assert close(got["loss_after"], expected["loss_after"], 1e-4)


def test_through_evaluations_checkpoints_and_a_killed_rank(workplace: Path, cluster: None) -> None:
    job = tree("maml", tasks=POISONED, outer=SGD)
    job["run"] |= {"steps": 20, "eval_every": 10, "eval_tasks": 60, "checkpoint_every": 5}
    alone = trained(job)
    victims: list[list[int]] = []

    def kill() -> None:
        victims.append(ranks())
        send(victims[-1][:1], signal.SIGKILL)

    watching = Watching({8: kill})
    run = trained(job, watching, **GROUP)
    assert len(victims[0]) == 2
    assert distance(flat(run), flat(alone)) < 1e-5
    back = [text for text in watching.said if "back to the checkpoint of step" in text]
    assert len(back) == 1, watching.said
    assert re.match(
        r"lost the group \(rank [01]: \w*Actor\w*\): back to the checkpoint of step 5", back[0]
    ), back
    assert [row["step"] for row in rows(run)] == list(range(1, 21))
    for got, expected in zip(rows(run), rows(alone), strict=True):
        assert got.keys() == expected.keys()
        assert got.get("dropped") == expected.get("dropped")
        for name in {"loss_after", "grad_norm", "val_loss_after"} & expected.keys():
            assert close(got[name], expected[name], 1e-3)
    assert not gone(ranks(), 30)
    assert not (HOME / "ray_results").exists()


@pytest.mark.slow
def test_ctrl_c_saves_and_a_resume_goes_on(workplace: Path, cluster: None) -> None:
    """The command, on a Ray of its own; then on the cluster, with Adam, whose losses are driver's."""
    job = tree("maml", run=GROUP | {"steps": 100_000, "name": "long", "eval_every": 7, "eval_tasks": 50})
    shared = set(Path("/dev/shm").iterdir())
    process, run = started(job, 5)
    family = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not gone(family, 30)
    assert set(Path("/dev/shm").iterdir()) <= shared
    progress = checkpoints.load(run).progress
    step = progress.step
    assert step == json.loads(out)["step"] >= 5
    assert len(rows(run)) == step - (progress.pending is not None), "a record waits for its evaluation"
    resumed = Job.load(run / "job.yaml", [f"run.steps={step + 9}"])
    distmeta.train(resumed, resume=run)
    alone = trained(job, strategy="driver", workers=0, steps=step + 9, name="alone")
    assert [row["step"] for row in rows(run)] == list(range(1, step + 10))
    losses = [[row["loss_after"] for row in rows(each)] for each in (run, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def started(job: dict[str, Any], lines: int) -> tuple[subprocess.Popen[str], Path]:
    """`distmeta train` of the job, once it has taken so many steps; its run."""
    Path("job.yaml").write_text(yaml.safe_dump(job))
    words = [sys.executable, "-m", "distmeta.cli.main", "train", "job.yaml", "--json"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        words, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT, start_new_session=True
    )
    run, deadline = Path("runs", job["run"]["name"]).absolute(), time.monotonic() + 180
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not get going"
        time.sleep(0.05)
    return process, run


@pytest.mark.slow
def test_no_room_and_a_mistake_are_said_at_once(workplace: Path, cluster: None) -> None:
    job = tree("maml", run=GROUP)
    with pytest.raises(
        InputError, match=r"run.workers: got 5 of 1 CPU .* not ready .* the cluster has 4 CPU"
    ):
        trained(job, workers=5, start_timeout=20.0)
    assert not (workplace / "runs").exists()
    mistake = {"fail": "ZeroDivisionError", "times": 1}
    job["tasks"] = {"type": "hard_cases:Faulty", "folder": str(workplace), **mistake}
    with pytest.raises(ZeroDivisionError):
        trained(job, name="mistake")
    assert checkpoints.load(workplace / "runs" / "mistake").progress.step == 0


@pytest.mark.slow
def test_places_of_a_dead_creator_are_free_again(workplace: Path, cluster: None) -> None:
    """As where a host ends while its group starts: Ray would keep the places until the job ends."""
    import ray
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    class Creator:
        def make(self) -> str:
            group = placement_group([{"CPU": 1.0}] * 2)
            ray.get(group.ready(), timeout=60)
            return group.id.hex()

    def standing() -> set[str]:
        return {key for key, group in placement_group_table().items() if group["state"] != "REMOVED"}

    one, other = (ray.remote(Creator).options(num_cpus=0).remote() for _ in range(2))
    lost, kept = ray.get([one.make.remote(), other.make.remote()], timeout=90)
    own = placement_group([{"memory": 1.0}])
    ray.get(own.ready(), timeout=60)
    ray.kill(one)
    assert free_orphans(ray, 5.0) == 1
    assert {kept, own.id.hex()} <= standing(), "of a living actor, and of this process itself"
    assert lost not in standing()
    ray.kill(other)
    assert free_orphans(ray, 5.0) == 1
    remove_placement_group(own)


@pytest.mark.slow
def test_a_group_takes_what_fits(workplace: Path, cluster: None) -> None:
    sizes: list[int] = []
    watching = Watching({6: lambda: sizes.append(len(ranks()))})
    # Ray Train keeps two places of a group that was killed, as in tests before, for 180 s
    elastic = {"workers": {"min": 1, "max": 6}, "start_timeout": 300.0}
    run = trained(tree("maml", run=GROUP | elastic), watching)
    assert [row["step"] for row in rows(run)] == list(range(1, 7))
    assert sizes in ([4], [2])


@pytest.mark.slow
def test_a_rank_that_hangs_costs_the_group(workplace: Path, cluster: None) -> None:
    stopped: list[int] = []

    def stop() -> None:
        stopped.extend(ranks()[:1])
        send(stopped, signal.SIGSTOP)

    watching = Watching({3: stop})
    run = trained(tree("maml", run=GROUP | {"steps": 8, "eval_every": 2, "shard_timeout": 10.0}), watching)
    assert [row["step"] for row in rows(run)] == list(range(1, 9))
    assert any(text.startswith("lost the group (no answer for ") for text in watching.said), watching.said
    assert not gone(stopped, 60)


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_behind(workplace: Path) -> None:
    job = tree("maml", run=GROUP | {"steps": 100_000, "name": "killed", "checkpoint_every": 3})
    shared = set(Path("/dev/shm").iterdir())
    process, run = started(job, 7)
    family = descendants(process.pid)
    send(ranks(process.pid)[:1], signal.SIGSTOP)
    send([process.pid], signal.SIGKILL)
    process.communicate(timeout=30)
    left = gone(family, 30)
    assert not left, [words(pid) for pid in left]
    assert set(Path("/dev/shm").iterdir()) <= shared
    assert checkpoints.load(run).progress.step >= 6


def test_steps_go_ahead_to_the_next_theta_that_is_looked_at() -> None:
    changes = [{"step": 8, "set": {"outer.lr": 0.1}}]
    job = tree("maml", changes=changes, run={"steps": 17, "eval_every": 5, "checkpoint_every": 6})
    problem = resolve(build(Job.parse(job)))
    assert [boundary(problem, step) for step in (0, 4, 5, 6, 8, 10, 12, 15, 16)] == [
        5,
        5,
        6,
        8,
        10,
        12,
        15,
        17,
        17,
    ]


def test_jobs_that_have_no_group() -> None:
    with pytest.raises(
        InputError, match=r"^run.strategy: got 'all-reduce' with run.workers: 0, expected at least 1"
    ):
        Job.parse(tree("maml", run={"strategy": "all-reduce"}))
    with pytest.raises(InputError, match=r"^run.compress: got int8 with run.strategy: all-reduce"):
        Job.parse(tree("maml", run=GROUP | {"compress": "int8"}))


def test_a_command_reaches_every_rank_and_a_lost_group_ends_it() -> None:
    """The host's bookkeeping, without Ray."""
    asyncio.run(asyncio.wait_for(_host_scenes(), 20))


async def _host_scenes() -> None:
    host = Host()
    ready = asyncio.create_task(host.ready(0))
    await host.join("a", 0, 2, None)
    await asyncio.sleep(0)
    assert not ready.done()
    await host.join("a", 1, 2, None)
    assert await ready == ("a", 2, None)
    asked = asyncio.create_task(host.ask("a", "steps"))
    assert [await host.next("a", 0) for _ in range(2)] == ["steps", "steps"]
    await host.tell("a", Halt())
    assert await host.next("a", 1) == Halt()
    await host.answer("a", 0, 1, RankAnswer("one"))
    await host.answer("a", 0, 0, RankAnswer("zero"))
    assert await asked == [RankAnswer("zero"), RankAnswer("one")]
    asked, waiting = asyncio.create_task(host.ask("a", "more")), asyncio.create_task(host.next("a", 3))
    await asyncio.sleep(0)
    await host.lost("ActorDiedError: killed")
    assert await asked == Lost("ActorDiedError: killed", 1)
    assert await waiting == Stop()
    assert await host.ask("a", "late") == Lost("ActorDiedError: killed", 1)
    ready = asyncio.create_task(host.ready(1))
    await host.join("b", 0, 1, RankError.of(ValueError("no such model")))
    name, world, failure = await ready  # type: ignore[misc]
    assert (name, world) == ("b", 1)
    assert failure is not None
    assert isinstance(failure.error, ValueError)
    asked = asyncio.create_task(host.ask("b", "steps"))
    await asyncio.sleep(0)
    await host.join("c", 0, 3, None)
    lost = await asked
    assert lost == Lost("Ray Train resized it from 1 to 3 workers", 2)
    await host.answer("b", 0, 0, RankAnswer("too late"))
    assert (await host.ready(1)) == lost, "said once, to who does not know"


def test_a_lost_group_is_said_by_who_died() -> None:
    from distmeta.strategies.all_reduce.ray_train import interface_of, reason_of

    class HealthError(Exception):
        health_check_failure = MemoryError("gone")

    told = RuntimeError("Traceback:\n  ...\nRuntimeError: [gloo] Connection closed by peer")
    assert reason_of({0: told, 1: HealthError()}) == "rank 1: MemoryError"
    assert reason_of({0: told}) == "rank 0: RuntimeError: [gloo] Connection closed by peer"
    assert (interface_of("127.0.0.1"), interface_of("203.0.113.9")) == ("lo", None)


def test_a_rank_computes_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train shows it those of all ranks on its node."""
    import ray.train.torch

    from distmeta.strategies import rank

    def build(spec: Any) -> None:
        raise InputError("tasks: not here")

    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(rank, "problem_of", build)
    monkeypatch.setattr(rank._Rank, "_get", lambda self, spec: spec)
    one = rank._Rank.__new__(rank._Rank)
    for gpus in (0, 1):
        spec = SimpleNamespace(job=Job.parse(tree(run={"gpus_per_worker": gpus})).tree())
        assert "tasks: not here" in str(one._build(spec))
        assert taken == [torch.device("cuda", 1)] * gpus


def test_a_state_that_is_lost_stays_lost() -> None:
    strategy = AllReduce.__new__(AllReduce)
    strategy._attempt, strategy._lost = "", "lost the group (as a test says)"
    with pytest.raises(LostStateError, match="as a test says"):
        strategy.state()


def test_what_cannot_be_pickled_travels_as_text() -> None:
    class LocalError(Exception):
        pass

    failure = RankError.of(LocalError("only here"))
    assert isinstance(failure.error, RuntimeError)
    assert "LocalError: only here" in str(failure.error)
    assert isinstance(RankError.of(InputError("tasks.path: missing")).error, InputError)
