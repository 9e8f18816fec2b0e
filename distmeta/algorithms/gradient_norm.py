"""MAML with a penalty on the gradient of the query loss: explicit gradient regularization, arXiv 2009.11162."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.adaptation import begin_phi, support_gradient
from distmeta.compute.inner_gradient import inner_gradient
from distmeta.protocols import Episode, Metrics, Model, Score, Theta, Unroll


class GradientNorm:
    """MAML's loss plus the squared norm of its gradient at φ_K, a regularizer that prefers flat minima.

        φ_0 = θ,   φ_{k+1} = φ_k − α ∇L_support(φ_k)
        meta-loss = L_query(φ_K) + λ/2 ‖∇_φ L_query(φ_K)‖²

    λ = 0 is MAML. The penalty is that of explicit gradient regularization (Barrett & Dherin 2021, arXiv 2009.11162:
    L + μ‖∇L‖² with μ = λ/2), applied to MAML's meta-loss (Finn et al. 2017, arXiv 1703.03400). The norm is over all
    entries of φ. Its gradient costs another pass through the Hessian of the query loss.

    The metric `loss` is the query loss without the penalty; `gradient_norm` is ‖∇_φ L_query(φ_K)‖.

    Args:
        inner_lr: α > 0. The default is MAML's for 5-way Omniglot.
        inner_steps: K ≥ 1.
        lam: λ ≥ 0. No paper gives a value for this combination; the default is ours.
    """

    group_size = 1

    def __init__(
        self,
        model: Model,
        score: Score,
        inner_lr: Annotated[float, Field(gt=0)] = 0.4,
        inner_steps: Annotated[int, Field(ge=1)] = 1,
        lam: Annotated[float, Field(ge=0)] = 0.01,
    ):
        self.model = model
        self.score = score
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.lam = lam

    def init(self, generator: torch.Generator) -> Theta:
        return self.model.init(generator)

    def begin(self, theta: Theta, support: Any) -> Theta:
        return begin_phi(self.model, self.score, theta, support)

    def step(self, theta: Theta, phi: Theta, support: Any, k: int) -> Theta:
        gradient = support_gradient(self.model, self.score, phi, support)
        return {name: phi[name] - self.inner_lr * gradient[name] for name in phi}

    def predict(self, theta: Theta, phi: Theta, x: Tensor) -> Tensor:
        return self.model(phi, x)

    def meta_loss(
        self, theta: Theta, episode: Episode, unroll: Unroll, score: Score
    ) -> tuple[Tensor, Metrics]:
        phi = unroll(self, theta, episode.support)

        def query_loss(p: Theta) -> tuple[Tensor, tuple[Tensor, Metrics]]:
            loss, metrics = score(self.predict(theta, p, episode.query.x), episode.query)
            return loss, (loss, metrics)

        gradient, (loss, metrics) = inner_gradient(query_loss, phi, has_aux=True)
        squared_norm = torch.stack([g.square().sum() for g in gradient.values()]).sum()
        norm = squared_norm.detach().sqrt()
        return loss + 0.5 * self.lam * squared_norm, {"loss": loss, **metrics, "gradient_norm": norm}
