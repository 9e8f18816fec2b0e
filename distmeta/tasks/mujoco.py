"""MuJoCo's bodies with tasks of their own: Finn et al. 2017, §5.3. Needs the extra `rl`."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from distmeta.errors import InputError

try:
    import gymnasium
    import mujoco
    from gymnasium.envs.mujoco.ant_v5 import AntEnv
    from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
except ImportError as missing:
    raise InputError(
        f"tasks.make: it needs MuJoCo in Gymnasium ({missing}): pip install 'distmeta[rl]'"
    ) from None


class Retargeted(gymnasium.Wrapper):
    """An environment whose reward is a function of what happened and of a target, which is the task."""

    def __init__(
        self,
        environment: Any,
        target: Callable[[np.random.Generator], Any],
        reward: Callable[[dict[str, Any], Any], float],
        generator: np.random.Generator,
    ):
        super().__init__(environment)
        self._drawn, self._reward = target, reward
        self.set_task(generator)

    def set_task(self, generator: np.random.Generator) -> None:
        self.target = self._drawn(generator)

    def step(self, action: Any) -> Any:
        seen, _, terminated, truncated, info = self.env.step(action)
        return seen, self._reward(info, self.target), terminated, truncated, info


def half_cheetah_direction(generator: np.random.Generator, render_mode: str | None = None) -> Any:
    """Run forwards or backwards: reward ±velocity − 0.05‖a‖²."""
    return Retargeted(
        _cheetah(render_mode),
        lambda g: 1.0 if g.random() < 0.5 else -1.0,
        lambda info, sign: sign * info["x_velocity"] + info["reward_ctrl"],
        generator,
    )


def half_cheetah_velocity(generator: np.random.Generator, render_mode: str | None = None) -> Any:
    """Run at a speed uniform in [0, 2]: reward −|velocity − speed| − 0.05‖a‖²."""
    return Retargeted(
        _cheetah(render_mode),
        lambda g: 2 * g.random(),
        lambda info, speed: -abs(info["x_velocity"] - speed) + info["reward_ctrl"],
        generator,
    )


def ant_goal(generator: np.random.Generator, render_mode: str | None = None) -> Any:
    """Go to a place uniform in the disc of radius 3: reward −‖place − goal‖₁ + 1 while upright − 0.1‖a‖².

    After the goal environments of ProMP and PEARL (Rakelly et al. 2019, arXiv 1903.08254), without contact costs, and
    with a bonus of 1 instead of 4.
    """
    with _made(render_mode):
        ant = AntEnv(
            render_mode=render_mode,
            ctrl_cost_weight=0.1,
            contact_cost_weight=0,
            include_cfrc_ext_in_observation=False,
            exclude_current_positions_from_observation=False,
        )

    def goal(g: np.random.Generator) -> np.ndarray:
        radius, angle = 3 * math.sqrt(g.random()), 2 * math.pi * g.random()
        return radius * np.array([math.cos(angle), math.sin(angle)])

    def reward(info: dict[str, Any], place: np.ndarray) -> float:
        away = abs(info["x_position"] - place[0]) + abs(info["y_position"] - place[1])
        return -away + info["reward_survive"] + info["reward_ctrl"]

    return Retargeted(ant, goal, reward, generator)


def _cheetah(render_mode: str | None) -> Any:
    with _made(render_mode):
        return HalfCheetahEnv(ctrl_cost_weight=0.05, render_mode=render_mode)


@contextmanager
def _made(render_mode: str | None) -> Iterator[None]:
    """Without MuJoCo's remarks on Gymnasium's own model files, one for every copy; without a display where there is
    none, which Gymnasium reads from the environment only.
    """
    if render_mode and sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        os.environ.setdefault("MUJOCO_GL", "egl")
    bindings: Any = mujoco
    before = bindings.get_mju_user_warning()
    bindings.set_mju_user_warning(lambda text: None)
    try:
        yield
    finally:
        bindings.set_mju_user_warning(before)
