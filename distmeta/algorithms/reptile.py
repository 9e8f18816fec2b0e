"""Reptile: Nichol, Achiam & Schulman 2018, arXiv 1803.02999."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.inner import minibatch, support_gradient
from distmeta.core import Episode, Metrics, Model, Score, Theta, Unroll, query_loss


class Reptile:
    """Moves θ towards the parameters that a few gradient steps on a task end at.

        φ_0 = θ,   φ_{k+1} = φ_k − α ∇L_batch_k(φ_k),   meta-gradient = θ − φ_K                 (Algorithm 2)

    An outer SGD of rate ε is the paper's θ ← θ + ε(φ_K − θ). It is not the derivative of a query loss: the
    surrogate ½‖θ − sg(φ_K)‖² has this gradient; the query loss is among the metrics, and the query set takes no
    part in training.

    Deviation: the paper's inner optimizer is Adam with β1 = 0; here it is SGD.

    Args:
        inner_lr: α.
        inner_steps: K. With K = 1 this is the gradient of the average loss, α∇L: joint training (§3).
        inner_batch: support examples that one inner step sees; null, or where there are no more: all. The paper's
            analysis (§5) rests on steps that see different minibatches.
    """

    group_size = 1

    def __init__(
        self,
        model: Model,
        score: Score,
        inner_lr: Annotated[float, Field(gt=0)] = 0.02,
        inner_steps: Annotated[int, Field(ge=1)] = 5,
        inner_batch: Annotated[int, Field(ge=1)] | None = None,
    ):
        self.model, self.score = model, score
        self.inner_lr, self.inner_steps, self.inner_batch = inner_lr, inner_steps, inner_batch

    def init(self, generator: torch.Generator) -> Theta:
        return self.model.init(generator)

    def begin(self, theta: Theta, support: Any) -> Theta:
        return dict(theta)

    def step(self, theta: Theta, phi: Theta, support: Any, k: int) -> Theta:
        gradient = support_gradient(self.model, self.score, phi, minibatch(support, k, self.inner_batch))
        return {name: phi[name] - self.inner_lr * gradient[name] for name in phi}

    def predict(self, theta: Theta, phi: Theta, x: Tensor) -> Tensor:
        return self.model(phi, x)

    def meta_loss(
        self, theta: Theta, episode: Episode, unroll: Unroll, score: Score
    ) -> tuple[Tensor, Metrics]:
        fixed = {name: value.detach() for name, value in theta.items()}
        phi = unroll(self, fixed, episode.support, detach=True)
        _, metrics = query_loss(self, fixed, episode, lambda *_: phi, score)
        distance = [(theta[name] - phi[name]).square().sum() for name in theta]
        return 0.5 * torch.stack(distance).sum(), metrics
