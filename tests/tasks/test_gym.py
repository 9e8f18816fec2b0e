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
    """Left or right to an end; a new one for every task."""

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


def equal(a: Trajectories, b: Trajectories, rows: slice = slice(None)) -> bool:
    return all(torch.equal(one[rows], other) for one, other in zip(a, b, strict=True))


def still(actions: int) -> Any:
    return lambda x: torch.zeros(*x.shape[:-1], 2 * actions)


@pytest.mark.parametrize(
    ("name", "actions"), [("half-cheetah-direction", 6), ("half-cheetah-velocity", 6), ("ant-goal", 8)]
)
def test_named_environments_depend_on_the_task_alone(name: str, actions: int) -> None:
    pytest.importorskip("mujoco", reason="needs the extra rl")
    family = Gym(name, trajectories=2, horizon=5)
    together = family.collect("train", IDS, 0, still(actions))
    alone = Gym(name, trajectories=2, horizon=5).collect("train", IDS[1:2], 0, still(actions))
    for field in ("x", "action", "real", "total"):
        assert torch.equal(getattr(together, field)[1:2], getattr(alone, field)), field
    assert equal(together, family.collect("train", IDS, 0, still(actions)))  # kept environments keep nothing
    assert not torch.equal(together.x, family.collect("train", IDS, 1, still(actions)).x)
    assert len({tuple(row.tolist()) for row in together.total}) == 3


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [("half-cheetah-direction", "maml-rl"), ("half-cheetah-velocity", "meta-sgd"), ("ant-goal", "reptile")],
)
def test_a_short_run_of_each(name: str, algorithm: str, workplace: Path) -> None:
    pytest.importorskip("mujoco", reason="needs the extra rl")
    tasks = {"type": "gym", "make": name, "trajectories": 2, "horizon": 10}
    model = {"type": "gaussian", "hidden": [8]}
    run = {"steps": 2, "tasks_per_step": 2, "shards": 1, "eval_tasks": 2}
    trained = distmeta.train(Job.parse(tree({"type": algorithm}, tasks=tasks, model=model, run=run))).run
    found = distmeta.evaluate(trained, ["algorithm.inner_steps=3"])
    assert len(found.curve["return"]) == 4
    assert np.isfinite(found.curve["return"]).all()
    moved = [distmeta.load(trained / "checkpoints" / f"step-0000000{k}").theta for k in (0, 2)]
    assert all(not torch.equal(moved[0][key], moved[1][key]) for key in moved[0] if "weight" in key)


def test_rewards_of_the_cheetah_are_the_papers() -> None:
    pytest.importorskip("mujoco", reason="needs the extra rl")
    from distmeta.tasks.mujoco import make_half_cheetah_direction, make_half_cheetah_velocity

    for make in (make_half_cheetah_direction, make_half_cheetah_velocity):
        environment = make(np.random.default_rng(1))
        environment.reset(seed=0)
        action = np.full(6, 0.5, np.float32)
        _, reward, _, _, info = environment.step(action)
        speed, target = info["x_velocity"], environment.target
        gain = target * speed if make is make_half_cheetah_direction else -abs(speed - target)
        assert reward == pytest.approx(gain - 0.05 * 6 * 0.25)


def test_a_users_own_environment(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "corridor.py").write_text(CORRIDOR)
    monkeypatch.syspath_prepend(str(workplace))
    tasks = {"type": "gym", "make": "corridor:Corridor", "trajectories": 8, "horizon": 8}
    small = {"steps": 20, "tasks_per_step": 6, "shards": 1}
    job = tree({"type": "maml-rl", "inner_lr": 1.0}, tasks=tasks, run=small)
    run = distmeta.train(Job.parse(job)).run
    overrides = ["run.eval_tasks=30", "tasks.make=corridor:Corridor"]  # what is called is named again
    figures = distmeta.evaluate(run, overrides).figures
    before, after = figures["return_before"], figures["return_after"]
    assert before is not None
    assert after is not None
    assert after > before + 1
    family = Gym("corridor:Corridor", trajectories=4, horizon=8)
    batch = family.collect("train", IDS, 0, lambda x: torch.tensor([-50.0, 50.0]).expand(*x.shape[:2], 2))
    assert bool((batch.real.sum(-1) == 3).all())
    assert set(batch.total.flatten().tolist()) <= {6.0, -6.0}
    assert bool((batch.x[:, :, 0] != batch.x[:, :1, 0]).any())  # every trajectory is seeded by itself


def test_what_is_no_environment_is_refused() -> None:
    with pytest.raises(InputError, match=r"^tasks.make: got 'half-cheetah', expected one of .* did you mean"):
        Gym("half-cheetah")
    with pytest.raises(InputError, match=r"^tasks.make: got a str, expected a gymnasium.Env"):
        Gym("builtins:repr")
