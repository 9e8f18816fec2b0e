"""Any Gymnasium environment as a family of tasks. Needs the extra `rl`: pip install 'distmeta[rl]'.

Shapes: T tasks, N trajectories of each, H time steps, O numbers of an observation, A actions.
"""

from __future__ import annotations

import copy
import inspect
import math
from typing import Annotated, Any, final

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from distmeta.config.parts import locate
from distmeta.errors import InputError
from distmeta.protocols import Metrics
from distmeta.seeding import task_generator
from distmeta.tasks.rollout import Actions, Collection, Environment, Film, score
from distmeta.trajectories import Trajectories

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]

NAMED = {
    "half-cheetah-direction": "distmeta.tasks.mujoco:half_cheetah_direction",
    "half-cheetah-velocity": "distmeta.tasks.mujoco:half_cheetah_velocity",
    "ant-goal": "distmeta.tasks.mujoco:ant_goal",
}
SEEDS = 2**33
"""Added to an inner step's number: the stream of the environments' seeds."""


@final
class Gym:
    """Tasks that are Gymnasium environments, T·N of them stepped side by side and acted in by one call of the policy.

    `make` names a function `make(generator) -> gymnasium.Env`: it draws a task from a `numpy.random.Generator` and
    makes its environment. An environment with a method `set_task(generator)` is kept, and told its next task; others
    are made anew for every task. `env.reset` is seeded by the task's id, the inner step, the trajectory and the
    episode. An episode ends where the environment says so, or after `horizon` steps: what would have come is then not
    bootstrapped. A `make` that has a parameter `render_mode` can be filmed.

    Args:
        make: half-cheetah-direction, half-cheetah-velocity, ant-goal (`tasks.mujoco`), or package.module:make.
        trajectories: N, collected before every inner step and after the last; `eval_trajectories` in val and test.
        horizon, episodes, history: see `tasks.rollout.Collection`.
        discount, gae_lambda, normalise: see `policies.advantages`.

    Raises:
        InputError: Gymnasium is not there; spaces that are neither boxes nor, for actions, discrete.
    """

    def __init__(
        self,
        make: str = "half-cheetah-velocity",
        trajectories: Count = 20,
        horizon: Count = 200,
        episodes: Count = 1,
        history: bool = False,
        discount: Fraction = 0.99,
        gae_lambda: Fraction = 1.0,
        normalise: bool = True,
        eval_trajectories: Count | None = None,
    ) -> None:
        try:
            import gymnasium
        except ImportError as error:
            raise InputError(
                f"tasks.type: got gym, which needs Gymnasium ({error}): pip install 'distmeta[rl]'"
            ) from None
        self._make = locate("tasks.make", make, NAMED)
        self._how = Collection(trajectories, horizon, episodes, history, discount, gae_lambda, normalise)
        self._scenes: list[list[np.ndarray]] | None = None
        self._eval_trajectories = eval_trajectories or trajectories
        first = self._made(np.random.default_rng(0))
        self._kept: list[Any] = [first]
        """Environments that can be told another task."""
        seen, acted = first.observation_space, first.action_space
        if not isinstance(seen, gymnasium.spaces.Box):
            raise InputError(f"tasks.make: got observations of {seen}, expected a Box")
        if isinstance(acted, gymnasium.spaces.Discrete):
            self._actions = Actions(int(acted.n), real=False)
        elif isinstance(acted, gymnasium.spaces.Box):
            self._actions = Actions(math.prod(acted.shape), real=True)
        else:
            raise InputError(f"tasks.make: got actions of {acted}, expected Box or Discrete")
        self.in_shape = self._how.in_shape(math.prod(seen.shape), self._actions)
        self.out_features = self._actions.outputs

    def collect(self, split: str, ids: Any, k: int, policy: Any) -> Trajectories:
        """Trajectories of the tasks `ids` under the policy after k inner steps."""
        how = self._how
        count = how.trajectories if split == "train" else self._eval_trajectories
        seeds = [task_generator(i, SEEDS + k).integers(2**31, size=(count, how.episodes)) for i in ids]
        environments = self._environments(ids, count)
        if self._scenes is not None:
            environments[0] = Filmed(self._made(task_generator(ids[0]), render_mode="rgb_array"))
            self._scenes.append(environments[0].frames)
        noise = self._actions.noise(ids, k, count, how.episodes * how.horizon)
        vector = side_by_side(environments, np.stack(seeds), self._actions)
        try:
            return how.run(vector, self._actions, noise, policy)
        finally:
            for environment in environments:
                if environment not in self._kept:  # made for these trajectories alone
                    environment.close()

    def score(self, outputs: Tensor, batch: Trajectories) -> tuple[Tensor, Metrics]:
        return score(outputs, batch)

    def film(self) -> Film:
        """See `tasks.rollout.Film`.

        Raises:
            InputError: `make` cannot be told to render.
        """
        parameters = inspect.signature(self._make).parameters
        if "render_mode" not in parameters:
            raise InputError(
                f"--video: tasks.make takes {', '.join(parameters)}, expected make(generator, render_mode=None), whose "
                "environment renders frames where it is told 'rgb_array'"
            )
        family = copy.copy(self)
        family._kept, family._scenes = [self._kept[0]], []
        return Film(family, family._scenes, int(self._kept[0].metadata.get("render_fps", 30)))

    def _environments(self, ids: Any, count: int) -> list[Any]:
        """T·N environments, task after task."""
        if not hasattr(self._kept[0].unwrapped, "set_task") and not hasattr(self._kept[0], "set_task"):
            return [self._made(task_generator(i)) for i in ids for _ in range(count)]
        while len(self._kept) < len(ids) * count:
            self._kept.append(self._made(task_generator(ids[0])))
        for number in range(len(ids) * count):
            environment = self._kept[number]
            told = environment if hasattr(environment, "set_task") else environment.unwrapped
            told.set_task(task_generator(ids[number // count]))
        return self._kept[: len(ids) * count]

    def _made(self, generator: np.random.Generator, **more: Any) -> Any:
        made = self._make(generator, **more)
        if not hasattr(made, "step") or not hasattr(made, "action_space"):
            raise InputError(f"tasks.make: got a {type(made).__name__}, expected a gymnasium.Env")
        return made


class Filmed:
    """An environment whose frames are kept, as far as `side_by_side` asks of one."""

    def __init__(self, environment: Any):
        self.environment, self.frames = environment, []
        self.action_space, self.observation_space = environment.action_space, environment.observation_space

    def reset(self, seed: int) -> Any:
        found = self.environment.reset(seed=seed)
        self._shoot()
        return found

    def step(self, action: Any) -> Any:
        found = self.environment.step(action)
        self._shoot()
        return found

    def close(self) -> None:
        self.environment.close()

    def _shoot(self) -> None:
        try:
            frame = self.environment.render()
        except Exception as error:  # whatever OpenGL's bindings raise where there is no display
            raise InputError(
                f"--video: the environment cannot be drawn ({type(error).__name__}: {error}); without a display MuJoCo "
                "needs MUJOCO_GL=egl or osmesa and its libraries (Debian: libegl1 or libosmesa6)"
            ) from None
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3:
            raise InputError(
                f"--video: the environment rendered a {type(frame).__name__}, expected uint8 [height, width, 3]"
            )
        self.frames.append(frame)


def side_by_side(environments: list[Any], seeds_TNE: np.ndarray, actions: Actions) -> Environment:
    """Gymnasium environments, T·N of them, as one. Those that have ended wait for the others."""
    shape = seeds_TNE.shape[:2]
    space = environments[0].action_space
    size = math.prod(environments[0].observation_space.shape)

    def given(action: Tensor) -> list[Any]:
        """What the environments take: within their bounds, or one of their numbers."""
        if not actions.real:
            return (action.flatten() + int(space.start)).tolist()
        rows = action.reshape(len(environments), *space.shape).numpy()
        return list(np.clip(rows, space.low, space.high))

    def reset(episode: int) -> tuple[np.ndarray, Tensor]:
        seen = np.empty((len(environments), size), np.float32)
        for row, environment, seed in zip(seen, environments, seeds_TNE[..., episode].flat, strict=True):
            row[:] = environment.reset(seed=int(seed))[0].ravel()
        return np.zeros(len(environments), bool), torch.from_numpy(seen).view(*shape, size)

    def step(ended: np.ndarray, action: Tensor) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
        ended, rows = ended.copy(), given(action)
        seen = np.zeros((len(environments), size), np.float32)
        reward = np.zeros(len(environments), np.float32)
        for i, environment in enumerate(environments):
            if not ended[i]:
                observed, reward[i], terminated, truncated, _ = environment.step(rows[i])
                seen[i] = observed.ravel()
                ended[i] = terminated or truncated
        tensors = (torch.from_numpy(array) for array in (seen, reward, ended))
        seen_T, reward_T, ended_T = (tensor.view(*shape, *tensor.shape[1:]) for tensor in tensors)
        return ended, seen_T, reward_T, ended_T

    return Environment(reset, step)
