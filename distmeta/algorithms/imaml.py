"""Implicit MAML: Rajeswaran, Finn, Kakade & Levine 2019, arXiv 1909.04630."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.adaptation import begin_phi, support_gradient
from distmeta.protocols import Episode, Metrics, Model, Score, Theta, Unroll, query_loss, support_at


class IMAML:
    """MAML whose inner loop is a proximal problem, differentiated at its solution and not through its path.

        φ* = argmin_φ L_support(φ) + λ/2 ‖φ − θ‖²,   φ_{k+1} = φ_k − α(∇L_support(φ_k) + λ(φ_k − θ))
        meta-gradient v solves (I + ∇²L_support(φ*)/λ) v = ∇L_query(φ*)                         (Lemma 1, Alg. 2)

    v comes from `cg_steps` steps of conjugate gradients on Hessian-vector products; memory does not grow with
    `inner_steps`. `meta_loss` is the surrogate ⟨θ, sg(v)⟩.

    The defaults are the paper's for 5-way 1-shot Omniglot (appendix: λ = 2, 16 inner steps, 5 CG steps; the rate
    of 0.1 is from the authors' code). Deviation: their code damps CG by 1 and evaluates with λ = 0; here the
    default damping is Lemma 1's, none, and evaluation solves the same proximal problem as training.

    Args:
        inner_lr, inner_steps: the inner gradient descent, α and its length.
        lam: λ.
        cg_steps: steps of conjugate gradients.
        cg_damping: δ in (I(1 + δ) + ∇²L/λ) v = ∇L_query, which keeps CG stable far from a minimum; 0 is Lemma 1.
    """

    group_size = 1

    def __init__(
        self,
        model: Model,
        score: Score,
        inner_lr: Annotated[float, Field(gt=0)] = 0.1,
        inner_steps: Annotated[int, Field(ge=1)] = 16,
        lam: Annotated[float, Field(gt=0)] = 2.0,
        cg_steps: Annotated[int, Field(ge=1)] = 5,
        cg_damping: Annotated[float, Field(ge=0)] = 0.0,
    ):
        self.model, self.score = model, score
        self.inner_lr, self.inner_steps, self.lam = inner_lr, inner_steps, lam
        self.cg_steps, self.cg_damping = cg_steps, cg_damping

    def init(self, generator: torch.Generator) -> Theta:
        return self.model.init(generator)

    def begin(self, theta: Theta, support: Any) -> Theta:
        return begin_phi(self.model, self.score, theta, support)

    def step(self, theta: Theta, phi: Theta, support: Any, k: int) -> Theta:
        gradient = support_gradient(self.model, self.score, phi, support)
        start = self.begin(theta, support)
        return {
            name: phi[name] - self.inner_lr * (gradient[name] + self.lam * (phi[name] - start[name]))
            for name in phi
        }

    def predict(self, theta: Theta, phi: Theta, x: Tensor) -> Tensor:
        return self.model(phi, x)

    def meta_loss(
        self, theta: Theta, episode: Episode, unroll: Unroll, score: Score
    ) -> tuple[Tensor, Metrics]:
        fixed = {name: value.detach() for name, value in theta.items()}
        phi = unroll(self, fixed, episode.support, detach=True)
        support = support_at(episode.support, self.inner_steps - 1)

        def loss_at(p: Theta) -> tuple[Tensor, Metrics]:
            return query_loss(self, fixed, episode, lambda *_: p, score)

        query_gradient, metrics = torch.func.grad(loss_at, has_aux=True)(phi)

        hessian_product = torch.func.vjp(lambda p: support_gradient(self.model, self.score, p, support), phi)[
            1
        ]

        def matvec(v: Theta) -> Theta:
            (hessian_v,) = hessian_product(
                v
            )  # the Hessian is symmetric; its graph is built once for all CG steps
            return {name: (1 + self.cg_damping) * v[name] + hessian_v[name] / self.lam for name in v}

        v = conjugate_gradients(matvec, query_gradient, self.cg_steps)
        start = self.begin(theta, support)  # theta, but for a shared head
        products = [(start[name] * v[name].detach()).sum() for name in v]
        return torch.stack(products).sum(), {name: value.detach() for name, value in metrics.items()}


def conjugate_gradients(matvec: Callable[[Theta], Theta], b: Theta, steps: int) -> Theta:
    """Solves A v = b for a positive definite A after `steps` steps from v = 0 (exact after as many as dimensions).

    The number of steps is fixed, so that it runs under vmap; a residual that reaches zero stays there.
    """
    v = {name: torch.zeros_like(value) for name, value in b.items()}
    r, p = dict(b), dict(b)
    rr = _dot(r, r)
    for _ in range(steps):
        a_p = matvec(p)
        alpha = _ratio(rr, _dot(p, a_p))
        v = {name: v[name] + alpha * p[name] for name in v}
        r = {name: r[name] - alpha * a_p[name] for name in r}
        rr_next = _dot(r, r)
        beta = _ratio(rr_next, rr)
        p = {name: r[name] + beta * p[name] for name in p}
        rr = rr_next
    return v


def _dot(a: Theta, b: Theta) -> Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where both vanished."""
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b == 0, torch.ones_like(b), b))
