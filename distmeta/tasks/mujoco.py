"""MuJoCo's bodies with tasks: Finn et al. 2017, §5.3. Needs the extra `rl`."""

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


class TargetEnvironment(gymnasium.Wrapper):
    """An environment whose reward depends on a target. The target is the task; `set_task` draws another one."""

    def __init__(
        self,
        environment: Any,
        draw_target: Callable[[np.random.Generator], Any],
        compute_reward: Callable[[dict[str, Any], Any], float],
        generator: np.random.Generator,
    ):
        super().__init__(environment)
        self._draw_target = draw_target
        self._compute_reward = compute_reward
        self.set_task(generator)

    def set_task(self, generator: np.random.Generator) -> None:
        self.target = self._draw_target(generator)

    def step(self, action: Any) -> Any:
        observation, _, terminated, truncated, info = self.env.step(action)
        return observation, self._compute_reward(info, self.target), terminated, truncated, info


def make_half_cheetah_direction(generator: np.random.Generator, render_mode: str | None = None) -> Any:
    """Run forwards or backwards: reward ±velocity − 0.05‖a‖²."""
    return TargetEnvironment(
        _make_half_cheetah(render_mode),
        lambda g: 1.0 if g.random() < 0.5 else -1.0,
        lambda info, sign: sign * info["x_velocity"] + info["reward_ctrl"],
        generator,
    )


def make_half_cheetah_velocity(generator: np.random.Generator, render_mode: str | None = None) -> Any:
    """Run at a speed uniform in [0, 2]: reward −|velocity − speed| − 0.05‖a‖²."""
    return TargetEnvironment(
        _make_half_cheetah(render_mode),
        lambda g: 2 * g.random(),
        lambda info, speed: -abs(info["x_velocity"] - speed) + info["reward_ctrl"],
        generator,
    )


def make_ant_goal(generator: np.random.Generator, render_mode: str | None = None) -> Any:
    """Go to a goal uniform in the disc of radius 3: reward −‖position − goal‖₁ + 1 while upright − 0.1‖a‖².

    Like the goal environments of ProMP and PEARL (Rakelly et al. 2019, arXiv 1903.08254). Deviations: no contact costs,
    and a bonus of 1 instead of 4 for being upright.
    """
    with _prepare_mujoco(render_mode):
        ant = AntEnv(
            render_mode=render_mode,
            ctrl_cost_weight=0.1,
            contact_cost_weight=0,
            include_cfrc_ext_in_observation=False,
            exclude_current_positions_from_observation=False,
        )

    def draw_goal(g: np.random.Generator) -> np.ndarray:
        radius = 3 * math.sqrt(g.random())
        angle = 2 * math.pi * g.random()
        return radius * np.array([math.cos(angle), math.sin(angle)])

    def compute_reward(info: dict[str, Any], goal: np.ndarray) -> float:
        distance = abs(info["x_position"] - goal[0]) + abs(info["y_position"] - goal[1])
        return -distance + info["reward_survive"] + info["reward_ctrl"]

    return TargetEnvironment(ant, draw_goal, compute_reward, generator)


def _make_half_cheetah(render_mode: str | None) -> Any:
    with _prepare_mujoco(render_mode):
        return HalfCheetahEnv(ctrl_cost_weight=0.05, render_mode=render_mode)


@contextmanager
def _prepare_mujoco(render_mode: str | None) -> Iterator[None]:
    """Prepare MuJoCo for making an environment.

    - Without a display, frames are rendered by EGL. Gymnasium reads this choice only from `MUJOCO_GL`.
    - MuJoCo's warnings about Gymnasium's own model files are silenced. Each copy of an environment would print them.
    """
    has_display = {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)
    if render_mode and sys.platform == "linux" and not has_display:
        os.environ.setdefault("MUJOCO_GL", "egl")
    bindings: Any = mujoco
    warn = bindings.get_mju_user_warning()
    bindings.set_mju_user_warning(lambda text: None)
    try:
        yield
    finally:
        bindings.set_mju_user_warning(warn)
