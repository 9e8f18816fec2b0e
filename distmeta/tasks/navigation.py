"""Point navigation in the plane: Finn et al. 2017, §5.3."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from distmeta.protocols import Episode, PerStep
from distmeta.seeding import draw_uniforms
from distmeta.tasks.options import Fraction, Positive
from distmeta.tasks.rollout import ActionSpace, Collector, VectorEnvironment, score_policy
from distmeta.trajectories import Trajectories

MAX_MOVE = 0.1
"""The longest move along an axis."""
GOAL_TOLERANCE = 0.01
"""A goal is reached if the position is this close on both axes."""


@final
class Navigation:
    """Go from the origin to a hidden goal: reward −distance, goals uniform in [−0.5, 0.5]².

    A policy sees its position [2] and moves by an action [2], which is clipped to ±0.1. An episode ends after
    `horizon` steps, or at the goal. All splits have the same distribution and different task ids. Goals and noise are
    functions of the id.

    Deviation: the paper describes the negative squared distance, but its code and its figures use the distance.

    Args:
        trajectories: N, collected before every inner step and after the last one.
        eval_trajectories: N in val and test; `trajectories` by default.
        horizon, episodes, history: see `tasks.rollout.Collector`.
        discount, gae_lambda, normalise: see `trajectories.estimate_advantages`.
    """

    def __init__(
        self,
        trajectories: Positive = 20,
        horizon: Positive = 100,
        episodes: Positive = 1,
        history: bool = False,
        discount: Fraction = 0.99,
        gae_lambda: Fraction = 1.0,
        normalise: bool = True,
        eval_trajectories: Positive | None = None,
    ) -> None:
        self._collector = Collector(trajectories, horizon, episodes, history, discount, gae_lambda, normalise)
        self._eval_trajectories = eval_trajectories or trajectories
        self._actions = ActionSpace(2, continuous=True)
        self.in_shape = self._collector.input_shape(2, self._actions)
        self.out_features = self._actions.policy_outputs

    def draw_goals(self, ids: Any) -> Tensor:
        """Draw the goal of each task, [T, 2]."""
        return torch.from_numpy(draw_uniforms(ids, 2) - 0.5).float()

    def collect(self, split: str, ids: Any, k: int, policy: Any) -> Trajectories:
        """Collect trajectories of the tasks `ids` with the policy after k inner steps."""
        collector = self._collector
        count = collector.trajectories if split == "train" else self._eval_trajectories
        noise = self._actions.draw_noise(ids, k, count, collector.episodes * collector.horizon)
        environment = make_plane(self.draw_goals(ids), count)
        return collector.collect(environment, self._actions, noise, policy)

    def figures(self, ids: Any, episodes: Episode) -> dict[str, Any]:
        """Plot a path to each goal (a star) before adaptation and after each update."""
        from matplotlib.figure import Figure

        support = episodes.support.batches if isinstance(episodes.support, PerStep) else ()
        batches = (*support, episodes.query)
        figure = Figure(figsize=(3.2 * len(batches), 3.4), layout="constrained")
        for k, axes in enumerate(figure.subplots(1, len(batches), squeeze=False)[0]):
            for t, goal in enumerate(self.draw_goals(ids)):
                path = trace_path(batches[k], t, self._collector.horizon)
                axes.plot(*path.T, color=f"C{t}", linewidth=0.7)
                axes.plot(*goal, "*", color=f"C{t}", markersize=12, markeredgecolor="black", zorder=3)
            title = f"after {k} update{'s' * (k > 1)}" if k else "before adaptation"
            axes.set(title=title, xlim=(-0.8, 0.8), ylim=(-0.8, 0.8), aspect="equal")
        return {"trajectories": figure}

    score = staticmethod(score_policy)


def make_plane(goal_T2: Tensor, copies: int) -> VectorEnvironment:
    """Make the environments of these goals, `copies` points for each."""
    goal = goal_T2[:, None, :]
    start = torch.zeros(len(goal_T2), copies, 2)

    def step(position: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        position = position + action.clamp(-MAX_MOVE, MAX_MOVE)
        offset = position - goal
        distance = offset.square().sum(-1).sqrt()
        arrived = (offset.abs() < GOAL_TOLERANCE).all(-1)
        return position, position, -distance, arrived

    return VectorEnvironment(lambda episode: (start, start), step)


def trace_path(batch: Trajectories, t: int, horizon: int) -> Tensor:
    """Return the positions of task t's first trajectory in its last episode, [steps + 1, 2].

    The path begins at the origin and ends at the position after the last move.
    """
    position, action, real = (leaf[t, 0, -horizon:] for leaf in (batch.x, batch.action, batch.real))
    steps = int(real.sum())
    after_moves = position[:, :2] + action.clamp(-MAX_MOVE, MAX_MOVE)
    return torch.cat([position[:steps, :2], after_moves[steps - 1 : steps]])
