"""Point navigation in the plane: Finn et al. 2017, §5.3."""

from __future__ import annotations

from typing import Annotated, Any, final

import torch
from pydantic import Field
from torch import Tensor

from distmeta.protocols import Episode, Metrics, PerStep
from distmeta.seeding import uniforms
from distmeta.tasks.rollout import Actions, Collection, Environment, score
from distmeta.trajectories import Trajectories

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]

STEP, NEAR = 0.1, 0.01
"""The longest move along an axis; a goal is reached within NEAR of it on both axes."""


@final
class Navigation:
    """Go from the origin to a goal that is not shown: reward −distance, goals uniform in [−0.5, 0.5]².

    A policy sees its position [2] and moves by an action [2], clipped to ±0.1. An episode ends after `horizon` steps,
    or at the goal. The splits are the same distribution, disjoint by their task ids; goals and noise are functions of
    the id.

    Deviation: the paper writes of the negative squared distance; its code, and its figures, have the distance.

    Args:
        trajectories: N, collected before every inner step and after the last; `eval_trajectories` in val and test.
        horizon, episodes, history: see `tasks.rollout.Collection`.
        discount, gae_lambda, normalise: see `policies.advantages`.
    """

    def __init__(
        self,
        trajectories: Count = 20,
        horizon: Count = 100,
        episodes: Count = 1,
        history: bool = False,
        discount: Fraction = 0.99,
        gae_lambda: Fraction = 1.0,
        normalise: bool = True,
        eval_trajectories: Count | None = None,
    ) -> None:
        self._how = Collection(trajectories, horizon, episodes, history, discount, gae_lambda, normalise)
        self._eval_trajectories = eval_trajectories or trajectories
        self._actions = Actions(2, real=True)
        self.in_shape = self._how.in_shape(2, self._actions)
        self.out_features = self._actions.outputs

    def goals(self, ids: Any) -> Tensor:
        """[T, 2]."""
        return torch.from_numpy(uniforms(ids, 2) - 0.5).float()

    def collect(self, split: str, ids: Any, k: int, policy: Any) -> Trajectories:
        """Trajectories of the tasks `ids` under the policy after k inner steps."""
        how = self._how
        count = how.trajectories if split == "train" else self._eval_trajectories
        noise = self._actions.noise(ids, k, count, how.episodes * how.horizon)
        return how.run(plane(self.goals(ids), count), self._actions, noise, policy)

    def figures(self, ids: Any, episodes: Episode) -> dict[str, Any]:
        """A way to each goal, a star, before adaptation and after each update."""
        from matplotlib.figure import Figure

        updates = episodes.support.batches if isinstance(episodes.support, PerStep) else ()
        batches = (*updates, episodes.query)
        figure = Figure(figsize=(3.2 * len(batches), 3.4), layout="constrained")
        for k, axes in enumerate(figure.subplots(1, len(batches), squeeze=False)[0]):
            batch = batches[k]
            for t, goal in enumerate(self.goals(ids)):
                axes.plot(*way(batch, t, self._how.horizon).T, color=f"C{t}", linewidth=0.7)
                axes.plot(*goal, "*", color=f"C{t}", markersize=12, markeredgecolor="black", zorder=3)
            title = f"after {k} update{'s' * (k > 1)}" if k else "before adaptation"
            axes.set(title=title, xlim=(-0.8, 0.8), ylim=(-0.8, 0.8), aspect="equal")
        return {"trajectories": figure}

    def score(self, outputs: Tensor, batch: Trajectories) -> tuple[Tensor, Metrics]:
        return score(outputs, batch)


def plane(goal_T2: Tensor, copies: int) -> Environment:
    """A point in the plane for every goal."""
    goal = goal_T2[:, None, :]
    start = torch.zeros(len(goal_T2), copies, 2)

    def step(place: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        place = place + action.clamp(-STEP, STEP)
        away = place - goal
        return place, place, -away.square().sum(-1).sqrt(), (away.abs() < NEAR).all(-1)

    return Environment(lambda episode: (start, start), step)


def way(batch: Trajectories, t: int, horizon: int) -> Tensor:
    """Places of the first trajectory's last episode, from the origin to where its last move led, [steps + 1, 2]."""
    place, action, real = (leaf[t, 0, -horizon:] for leaf in (batch.x, batch.action, batch.real))
    steps = int(real.sum())
    return torch.cat([place[:steps, :2], (place[:, :2] + action.clamp(-STEP, STEP))[steps - 1 : steps]])
