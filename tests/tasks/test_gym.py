"""Gymnasium's environments as tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tree

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.seeding import task_ids
from distmeta.trajectories import Trajectories

gymnasium = pytest.importorskip("gymnasium", reason="needs the extra rl")
from distmeta.tasks.gym import Gym  # noqa: E402

IDS = task_ids(0, "train", 0, 3)
CORRIDOR = '''
import gymnasium, numpy as np

class Corridor(gymnasium.Env):
    """Go left or right to the end that pays. Every task has a new environment."""

    observation_space = gymnasium.spaces.Box(-9, 9, (1,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, generator):
        self.end = 1 if generator.random() < 0.5 else -1

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 0
        self.first = self.np_random.random()
        return np.array([self.first], np.float32), {}

    def step(self, action):
        self.place += 2 * action - 1
        return np.array([self.place], np.float32), float(self.place * self.end), abs(self.place) == 3, False, {}
'''


def are_equal(a: Trajectories, b: Trajectories) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def make_random_policy(actions: int) -> Any:
    return lambda x: torch.zeros(*x.shape[:-1], 2 * actions)


@pytest.mark.parametrize(
    ("name", "actions"), [("half-cheetah-direction", 6), ("half-cheetah-velocity", 6), ("ant-goal", 8)]
)
def test_trajectories_depend_only_on_the_task(name: str, actions: int) -> None:
    pytest.importorskip("mujoco", reason="needs the extra rl")
    policy = make_random_policy(actions)
    family = Gym(name, trajectories=2, horizon=5)
    together = family.collect("train", IDS, 0, policy)
    alone = Gym(name, trajectories=2, horizon=5).collect("train", IDS[1:2], 0, policy)
    for field in ("x", "action", "real", "total"):
        assert torch.equal(getattr(together, field)[1:2], getattr(alone, field)), field
    assert are_equal(
        together, family.collect("train", IDS, 0, policy)
    )  # reused environments remember nothing
    assert not torch.equal(together.x, family.collect("train", IDS, 1, policy).x)
    assert len({tuple(row.tolist()) for row in together.total}) == 3


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [("half-cheetah-direction", "maml-rl"), ("half-cheetah-velocity", "meta-sgd"), ("ant-goal", "reptile")],
)
def test_each_environment_trains_and_evaluates(name: str, algorithm: str, workplace: Path) -> None:
    pytest.importorskip("mujoco", reason="needs the extra rl")
    job = tree(
        {"type": algorithm},
        tasks={"type": "gym", "make": name, "trajectories": 2, "horizon": 10},
        model={"type": "gaussian", "hidden": [8]},
        run={"steps": 2, "tasks_per_step": 2, "shards": 1, "eval_tasks": 2},
    )
    run = distmeta.train(Job.parse(job)).run
    evaluation = distmeta.evaluate(run, ["algorithm.inner_steps=3"])
    assert len(evaluation.curve["return"]) == 4
    assert np.isfinite(evaluation.curve["return"]).all()
    before = distmeta.load(run / "checkpoints" / "step-00000000").theta
    after = distmeta.load(run / "checkpoints" / "step-00000002").theta
    assert all(not torch.equal(before[name], after[name]) for name in before if "weight" in name)


def test_rewards_of_the_cheetah_are_those_of_the_paper() -> None:
    pytest.importorskip("mujoco", reason="needs the extra rl")
    from distmeta.tasks.mujoco import make_half_cheetah_direction, make_half_cheetah_velocity

    for make in (make_half_cheetah_direction, make_half_cheetah_velocity):
        environment = make(np.random.default_rng(1))
        environment.reset(seed=0)
        action = np.full(6, 0.5, np.float32)
        _, reward, _, _, info = environment.step(action)
        speed = info["x_velocity"]
        target = environment.target
        gain = target * speed if make is make_half_cheetah_direction else -abs(speed - target)
        assert reward == pytest.approx(gain - 0.05 * 6 * 0.25)


@pytest.fixture
def corridor(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (workplace / "corridor.py").write_text(CORRIDOR)
    monkeypatch.syspath_prepend(str(workplace))
    return "corridor:Corridor"


def test_run_learns_a_users_environment(corridor: str) -> None:
    job = tree(
        {"type": "maml-rl", "inner_lr": 1.0},
        tasks={"type": "gym", "make": corridor, "trajectories": 8, "horizon": 8},
        run={"steps": 20, "tasks_per_step": 6, "shards": 1},
    )
    run = distmeta.train(Job.parse(job)).run
    overrides = ["run.eval_tasks=30", f"tasks.make={corridor}"]  # a function that is called is named again
    figures = distmeta.evaluate(run, overrides).figures
    before = figures["return_before"]
    after = figures["return_after"]
    assert before is not None
    assert after is not None
    assert after > before + 1


def test_episodes_end_when_the_environment_ends(corridor: str) -> None:
    family = Gym(corridor, trajectories=4, horizon=8)

    def go_right(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([-50.0, 50.0]).expand(*x.shape[:2], 2)

    batch = family.collect("train", IDS, 0, go_right)
    assert bool((batch.real.sum(-1) == 3).all())
    assert set(batch.total.flatten().tolist()) <= {6.0, -6.0}
    assert bool((batch.x[:, :, 0] != batch.x[:, :1, 0]).any())  # each trajectory has its own seed


def test_other_objects_than_environments_are_refused() -> None:
    with pytest.raises(InputError, match=r"^tasks.make: got 'half-cheetah', expected one of .* did you mean"):
        Gym("half-cheetah")
    with pytest.raises(InputError, match=r"^tasks.make: got a str, expected a gymnasium.Env"):
        Gym("builtins:repr")
    with pytest.raises(
        InputError, match=r"^tasks.make: importing 'nowhere:make' failed: ModuleNotFoundError"
    ):
        Gym("nowhere:make")
    with pytest.raises(InputError, match=r"^tasks.make: got 'os:sep', which is a str, expected a function"):
        Gym("os:sep")
