"""Contrastive meta-learning on adapted parameters: after ConML, Wu et al. 2024, arXiv 2410.05975."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.utils._pytree import tree_map

from distmeta.algorithms.adaptation import adapted_names, begin_phi, support_gradient
from distmeta.protocols import Episode, Metrics, Model, Score, Theta, Unroll


class Contrastive:
    """MAML on pairs of tasks: two draws of one task should adapt to the same parameters, two tasks to different ones.

        φ_s(t), φ_q(t): θ adapted to the support and to the query set of task t, by K steps −α∇L each
        pull = ½ Σ_t ‖φ_s(t) − φ_q(t)‖,   push = mean over a, b ∈ {s, q} of max(0, m − ‖φ_a(1) − φ_b(2)‖)
        meta-loss = w_query · ½ Σ_t L_query(φ_s(t)) + w · (pull + push)

    This is ConML's objective (the loss + λ(D_in − D_out), distances within and between tasks, of adapted models) for
    MAML, with the Euclidean distance of all adapted parameters, and a push that ends at the margin m of Hadsell, Chopra
    & LeCun 2006 (CVPR, "Dimensionality reduction by learning an invariant mapping"), so that it cannot win by
    blowing parameters up. Deviations from ConML: it uses cosine distances and all pairs of a step's tasks, here a
    task meets one other. Defaults of `margin` and `weight` are ours: the size of a distance depends on the model and α.

    The query labels adapt φ_q in training only. In classification a task's classes are numbered at random, so that the
    same classes in another order end in another head: `adapt: body` compares what does not depend on the order as much.

    Metrics, one number a task [2]: the query's after the support; the distances `within` a task and `between` the two
    (the mean over a, b).

    Args:
        inner_lr, inner_steps: α and K. The rate's default is MAML's for 5-way Omniglot.
        margin: m, the distance at which different tasks are far enough apart.
        weight: w of the contrastive term.
        query_weight: w_query of the query loss; 0 trains on the contrastive term alone.
        adapt: which parameters the inner loop moves, as for `maml`.
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
        adapt: str = "all",
    ):
        self.model, self.score = model, score
        self.inner_lr, self.inner_steps = inner_lr, inner_steps
        self.margin, self.weight, self.query_weight = margin, weight, query_weight
        self.names = adapted_names(model, adapt)

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
        rows, adapted = [], []
        for task in range(2):
            one = tree_map(lambda leaf, task=task: leaf[task], episode)
            pair = unroll(self, theta, one.support), unroll(self, theta, one.query)
            loss, metrics = score(self.predict(theta, pair[0], one.query.x), one.query)
            rows.append({"loss": loss, **metrics, "within": distance(*pair)})
            adapted.append(pair)
        columns = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        apart = torch.stack([distance(a, b) for a in adapted[0] for b in adapted[1]])
        contrast = columns["within"].mean() + torch.relu(self.margin - apart).mean()
        columns["between"] = apart.mean().expand(2)
        return self.query_weight * columns["loss"].mean() + self.weight * contrast, columns


def distance(a: Theta, b: Theta) -> Tensor:
    """‖a − b‖ over all entries; its gradient where a = b is taken as 0."""
    square = torch.stack([(a[name] - b[name]).square().sum() for name in a]).sum()
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())
