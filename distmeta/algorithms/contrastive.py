"""Contrastive meta-learning on adapted parameters: after ConML, Wu et al. 2024, arXiv 2410.05975."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.adaptation import Adapt, begin_phi, select_adapted, sqrt_or_zero, support_gradient
from distmeta.protocols import Episode, Metrics, Model, Score, Theta, Unroll
from distmeta.trees import tree_map


class Contrastive:
    """MAML on pairs of tasks: two draws of a task should adapt to the same parameters, two tasks to different ones.

        φ_s(t), φ_q(t): θ adapted to the support and to the query set of task t, each by K steps −α∇L
        pull = ½ Σ_t ‖φ_s(t) − φ_q(t)‖,   push = mean over a, b ∈ {s, q} of max(0, m − ‖φ_a(1) − φ_b(2)‖)
        meta-loss = w_query · ½ Σ_t L_query(φ_s(t)) + w · (pull + push)

    This is ConML's objective for MAML: the loss + λ(D_in − D_out), where D_in and D_out are distances of adapted models
    within and between tasks. Here the distance is Euclidean, over all adapted parameters, and the push ends at the
    margin m (Hadsell, Chopra & LeCun 2006, CVPR, "Dimensionality reduction by learning an invariant mapping"), so
    growing parameters cannot lower the loss forever.

    Deviations: ConML uses cosine distances and all pairs of a step's tasks; here each task is compared with one other.

    The query labels adapt φ_q in training only. In classification the classes of a task are numbered at random, so
    the same classes in another order lead to another head. `adapt: body` compares parameters that depend less on it.

    Metrics have one value per task, [2]: those of the query set after adapting to the support set, the distance
    `within` the task, and `between` the two tasks (mean over a, b).

    Args:
        inner_lr: α > 0. The default is MAML's for 5-way Omniglot.
        inner_steps: K ≥ 1.
        margin: m ≥ 0, the distance from which different tasks no longer repel each other. A good value depends on the
            model and on α; the default is ours.
        weight: w ≥ 0 of the contrastive term. The default is ours.
        query_weight: w_query ≥ 0 of the query loss; 0: train only with the contrastive term.
        adapt: the parameters that the inner loop changes, as in `maml`.
    """

    group_size = 2

    def __init__(
        self,
        model: Model,
        score: Score,
        inner_lr: Annotated[float, Field(gt=0)] = 0.4,
        inner_steps: Annotated[int, Field(ge=1)] = 1,
        margin: Annotated[float, Field(ge=0)] = 1.0,
        weight: Annotated[float, Field(ge=0)] = 0.1,
        query_weight: Annotated[float, Field(ge=0)] = 1.0,
        adapt: Adapt = "all",
    ):
        self.model = model
        self.score = score
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.margin = margin
        self.weight = weight
        self.query_weight = query_weight
        self.names = select_adapted(model, adapt)

    def init(self, generator: torch.Generator) -> Theta:
        return self.model.init(generator)

    def begin(self, theta: Theta, support: Any) -> Theta:
        return begin_phi(self.model, self.score, theta, support)

    def step(self, theta: Theta, phi: Theta, support: Any, k: int) -> Theta:
        gradient = support_gradient(self.model, self.score, phi, support, self.names)
        return phi | {name: phi[name] - self.inner_lr * g for name, g in gradient.items()}

    def predict(self, theta: Theta, phi: Theta, x: Tensor) -> Tensor:
        return self.model(phi, x)

    def meta_loss(
        self, theta: Theta, episode: Episode, unroll: Unroll, score: Score
    ) -> tuple[Tensor, Metrics]:
        metrics_per_task = []
        adapted = []
        for task in range(2):
            one = tree_map(lambda leaf, task=task: leaf[task], episode)
            phi_support = unroll(self, theta, one.support)
            phi_query = unroll(self, theta, one.query)
            loss, metrics = score(self.predict(theta, phi_support, one.query.x), one.query)
            within = distance(phi_support, phi_query)
            metrics_per_task.append({"loss": loss, **metrics, "within": within})
            adapted.append((phi_support, phi_query))
        metrics = {name: torch.stack([m[name] for m in metrics_per_task]) for name in metrics_per_task[0]}
        between = torch.stack([distance(a, b) for a in adapted[0] for b in adapted[1]])
        contrast = metrics["within"].mean() + torch.relu(self.margin - between).mean()
        metrics["between"] = between.mean().expand(2)
        return self.query_weight * metrics["loss"].mean() + self.weight * contrast, metrics


def distance(a: Theta, b: Theta) -> Tensor:
    """Return ‖a − b‖ over all entries, with derivative 0 at a = b."""
    return sqrt_or_zero(torch.stack([(a[name] - b[name]).square().sum() for name in a]).sum())
