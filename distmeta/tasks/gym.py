"""Any Gymnasium environment as a family of tasks. Needs the extra `rl`: pip install 'distmeta[rl]'.

Shapes: T tasks, N trajectories of each, H time steps, E episodes, O observation features, A actions.
"""

from __future__ import annotations

import copy
import inspect
import math
import pkgutil
from collections.abc import Callable
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from distmeta.errors import InputError, did_you_mean, summarize_error
from distmeta.seeding import task_generator
from distmeta.tasks.options import Fraction, Positive
from distmeta.tasks.rollout import ActionSpace, Collector, Film, VectorEnvironment, score_policy
from distmeta.trajectories import Trajectories

ENVIRONMENTS = {
    "half-cheetah-direction": "distmeta.tasks.mujoco:make_half_cheetah_direction",
    "half-cheetah-velocity": "distmeta.tasks.mujoco:make_half_cheetah_velocity",
    "ant-goal": "distmeta.tasks.mujoco:make_ant_goal",
}
"""The environments that `tasks.make` may name."""
SEEDS = 2**33
"""Added to the number of an inner step: the part of a task's random numbers that seeds its environments."""


@runtime_checkable
class GymEnvironment(Protocol):
    """What this module needs of a Gymnasium environment."""

    action_space: Any
    observation_space: Any

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]: ...

    def step(self, action: Any, /) -> tuple[Any, Any, bool, bool, dict[str, Any]]: ...


@runtime_checkable
class SetsTask(Protocol):
    """An environment that can change its task. `Gym` keeps it, and calls `set_task` instead of making another one."""

    def set_task(self, generator: np.random.Generator) -> None:
        """Draw a task from the generator and use it from now on."""
        ...


@final
class Gym:
    """Tasks that are Gymnasium environments. T·N of them are stepped side by side, with one call of the policy.

    `make` names a function `make(generator) -> gymnasium.Env`. It draws a task from a `numpy.random.Generator` and
    returns its environment. An environment that provides `SetsTask` is kept and given its next task; others are made
    anew for every task. `env.reset` is seeded by the task's id, the inner step, the trajectory and the episode. An
    episode ends when the environment says so, or after `horizon` steps (rewards after that are not estimated). If
    `make` has a parameter `render_mode`, its environments can be filmed.

    Args:
        make: half-cheetah-direction, half-cheetah-velocity, ant-goal (`tasks.mujoco`), or package.module:make.
        trajectories: N, collected before every inner step and after the last one.
        eval_trajectories: N in val and test; `trajectories` by default.
        horizon, episodes, history: see `tasks.rollout.Collector`.
        discount, gae_lambda, normalise: see `trajectories.estimate_advantages`.

    Raises:
        InputError: Gymnasium is not installed; observations are not a Box; actions are neither Box nor Discrete.
    """

    def __init__(
        self,
        make: str = "half-cheetah-velocity",
        trajectories: Positive = 20,
        horizon: Positive = 200,
        episodes: Positive = 1,
        history: bool = False,
        discount: Fraction = 0.99,
        gae_lambda: Fraction = 1.0,
        normalise: bool = True,
        eval_trajectories: Positive | None = None,
    ) -> None:
        try:
            import gymnasium
        except ImportError as error:
            raise InputError(
                f"tasks.type: got gym, which needs Gymnasium ({error}): pip install 'distmeta[rl]'"
            ) from None
        self._make = _import_maker(make)
        self._collector = Collector(trajectories, horizon, episodes, history, discount, gae_lambda, normalise)
        self._eval_trajectories = eval_trajectories or trajectories
        self._scenes: list[list[np.ndarray]] | None = None
        """Frames of each collected batch; None if nothing is filmed."""
        first = self._make_environment(np.random.default_rng(0))
        self._reusable: list[Any] = [first]
        """Environments that are kept between batches. Only the first one is, unless they provide `SetsTask`."""
        observations = first.observation_space
        actions = first.action_space
        if not isinstance(observations, gymnasium.spaces.Box):
            raise InputError(f"tasks.make: got observations of {observations}, expected a Box")
        if isinstance(actions, gymnasium.spaces.Discrete):
            self._actions = ActionSpace(int(actions.n), continuous=False)
        elif isinstance(actions, gymnasium.spaces.Box):
            self._actions = ActionSpace(math.prod(actions.shape), continuous=True)
        else:
            raise InputError(f"tasks.make: got actions of {actions}, expected Box or Discrete")
        self.in_shape = self._collector.input_shape(math.prod(observations.shape), self._actions)
        self.out_features = self._actions.policy_outputs

    def collect(self, split: str, ids: Any, k: int, policy: Any) -> Trajectories:
        """Collect trajectories of the tasks `ids` with the policy after k inner steps."""
        collector = self._collector
        count = collector.trajectories if split == "train" else self._eval_trajectories
        shape = (count, collector.episodes)
        seeds_TNE = np.stack([task_generator(i, SEEDS + k).integers(2**31, size=shape) for i in ids])
        environments = self._prepare_environments(ids, count)
        if self._scenes is not None:
            filmed = FilmedEnvironment(
                self._make_environment(task_generator(ids[0]), render_mode="rgb_array")
            )
            environments[0] = filmed
            self._scenes.append(filmed.frames)
        noise = self._actions.draw_noise(ids, k, count, collector.episodes * collector.horizon)
        vector = join_environments(environments, seeds_TNE, self._actions)
        try:
            return collector.collect(vector, self._actions, noise, policy)
        finally:
            for environment in environments:
                if environment not in self._reusable:
                    environment.close()

    score = staticmethod(score_policy)

    def film(self) -> Film:
        """Return a copy of the family that films what it collects; see `tasks.rollout.Film`.

        Raises:
            InputError: `make` has no parameter `render_mode`.
        """
        parameters = inspect.signature(self._make).parameters
        if "render_mode" not in parameters:
            raise InputError(
                f"--video: tasks.make takes {', '.join(parameters)}, expected make(generator, render_mode=None), whose "
                "environment renders frames if it is made with render_mode='rgb_array'"
            )
        first = self._reusable[0]
        scenes: list[list[np.ndarray]] = []
        family = copy.copy(self)
        family._reusable = [first]
        family._scenes = scenes
        return Film(family, scenes, int(first.metadata.get("render_fps", 30)))

    def _prepare_environments(self, ids: Any, count: int) -> list[Any]:
        """Return T·N environments that are set to their tasks: all copies of the first task, then of the second, …"""
        if _find_task_setter(self._reusable[0]) is None:
            return [self._make_environment(task_generator(i)) for i in ids for _ in range(count)]
        while len(self._reusable) < len(ids) * count:
            self._reusable.append(self._make_environment(task_generator(ids[0])))
        environments = self._reusable[: len(ids) * count]
        for number, environment in enumerate(environments):
            setter = _find_task_setter(environment)
            assert setter is not None, environment
            setter.set_task(task_generator(ids[number // count]))
        return environments

    def _make_environment(self, generator: np.random.Generator, **options: Any) -> Any:
        environment = self._make(generator, **options)
        if not isinstance(environment, GymEnvironment):
            raise InputError(f"tasks.make: got a {type(environment).__name__}, expected a gymnasium.Env")
        return environment


def _import_maker(make: str) -> Callable[..., Any]:
    """Return the function that a name in `ENVIRONMENTS`, or `package.module:make`, stands for."""
    target = ENVIRONMENTS.get(make, make)
    if ":" not in target:
        raise InputError(
            f"tasks.make: got {make!r}, expected one of {', '.join(ENVIRONMENTS)} or package.module:make; "
            f"{did_you_mean(make, list(ENVIRONMENTS))}"
        )
    try:
        maker = pkgutil.resolve_name(target)
    except InputError:  # from `tasks.mujoco`: MuJoCo is not installed
        raise
    except Exception as error:
        raise InputError(f"tasks.make: importing {target!r} failed: {summarize_error(error)}") from error
    if not callable(maker):
        raise InputError(
            f"tasks.make: got {target!r}, which is a {type(maker).__name__}, expected a function"
        )
    return maker


def _find_task_setter(environment: Any) -> SetsTask | None:
    """Return the environment, or the one that it wraps, if it can change its task."""
    if isinstance(environment, SetsTask):
        return environment
    unwrapped = environment.unwrapped
    return unwrapped if isinstance(unwrapped, SetsTask) else None


class FilmedEnvironment:
    """An environment that keeps its frames. It has what `join_environments` needs."""

    def __init__(self, environment: Any):
        self.environment = environment
        self.frames: list[np.ndarray] = []
        self.action_space = environment.action_space
        self.observation_space = environment.observation_space

    def reset(self, seed: int) -> Any:
        result = self.environment.reset(seed=seed)
        self._keep_frame()
        return result

    def step(self, action: Any) -> Any:
        result = self.environment.step(action)
        self._keep_frame()
        return result

    def close(self) -> None:
        self.environment.close()

    def _keep_frame(self) -> None:
        try:
            frame = self.environment.render()
        except Exception as error:  # without a display, OpenGL's bindings raise various exceptions
            raise InputError(
                f"--video: the environment cannot be drawn ({type(error).__name__}: {error}); without a display MuJoCo "
                "needs MUJOCO_GL=egl or osmesa and its libraries (Debian: libegl1 or libosmesa6)"
            ) from None
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3:
            raise InputError(
                f"--video: the environment rendered a {type(frame).__name__}, expected uint8 [height, width, 3]"
            )
        self.frames.append(frame)


def join_environments(
    environments: list[Any], seeds_TNE: np.ndarray, actions: ActionSpace
) -> VectorEnvironment:
    """Step T·N Gymnasium environments as one. Those that have ended wait for the others."""
    shape = seeds_TNE.shape[:2]
    total = len(environments)
    space = environments[0].action_space
    features = math.prod(environments[0].observation_space.shape)

    def convert_actions(action: Tensor) -> list[Any]:
        """Return one action per environment: clipped to its bounds, or one of its integers."""
        if not actions.continuous:
            return (action.flatten() + int(space.start)).tolist()
        rows = action.reshape(total, *space.shape).numpy()
        return list(np.clip(rows, space.low, space.high))

    def reset(episode: int) -> tuple[np.ndarray, Tensor]:
        observations = np.empty((total, features), np.float32)
        for i, seed in enumerate(seeds_TNE[..., episode].flat):
            observation, _ = environments[i].reset(seed=int(seed))
            observations[i] = observation.ravel()
        return np.zeros(total, bool), torch.from_numpy(observations).view(*shape, features)

    def step(ended_before: np.ndarray, action: Tensor) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
        given = convert_actions(action)
        ended = ended_before.copy()
        observations = np.zeros((total, features), np.float32)
        rewards = np.zeros(total, np.float32)
        for i, environment in enumerate(environments):
            if not ended[i]:
                observation, rewards[i], terminated, truncated, _ = environment.step(given[i])
                observations[i] = observation.ravel()
                ended[i] = terminated or truncated
        return (
            ended,
            torch.from_numpy(observations).view(*shape, features),
            torch.from_numpy(rewards).view(shape),
            torch.from_numpy(ended).view(shape),
        )

    return VectorEnvironment(reset, step)
