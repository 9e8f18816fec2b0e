"""MAML++: Antoniou, Edwards & Storkey 2019, "How to train your MAML", arXiv 1810.09502."""

from __future__ import annotations

import copy
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.adaptation import NORM_LAYERS, begin_phi, select_adapted, support_gradient
from distmeta.algorithms.learned_rates import inner_lr_key
from distmeta.errors import InputError
from distmeta.protocols import Episode, Metrics, Model, Score, Theta, Unroll

SMALLEST_WEIGHT = 0.03
"""Smallest weight, times 1/K, of every step but the last while the weights are annealed (the authors' code)."""


class MAMLPlusPlus:
    """MAML with the paper's remedies for its instability (§4).

        φ_{k+1} = φ_k − α_k ∇L_support(φ_k),   α_k learned per parameter tensor and step           (LSLR)
        meta-loss = Σ_k w_k L_query(φ_k), k = 1 … K                                                (MSL)

    - MSL: during the first `msl_steps` outer steps, w moves from uniform 1/K to the last step. By the rule of the
      authors' code, w_k = max((1 − t)/K, 0.03/K) for k < K, where t is the fraction of these steps that is over (their
      epochs are steps here). Later, and in evaluation, only the last step counts.
    - DA: first order until outer step `first_order_steps`, then exact. The default 0 is the authors' configuration for
      Omniglot. The paper's text has the first 50 epochs (of 500 steps).
    - BNWB: the weights and biases of norms have one value per step (keys `norm.<parameter>`, [K+1, …]; row k belongs to
      φ_k). The inner loop does not change them.
    - LSLR: keys `inner_lr.<parameter>`, [K]. Steps after the K-th use the last rate and the last row.
    - CA: cosine annealing of the outer rate is the job's `outer.schedule`.

    BNRS: every step normalises by the statistics of its batch. That is what the authors' code computes: it collects
    running statistics per step, but always calls `F.batch_norm` with `training=True`, which does not read them. There
    are no running statistics that predictions read: they would be state outside theta.

    Deviation: the authors' code scores φ_{k+1} with row k of the norms, we score it with row k + 1.

    Args:
        inner_lr: initial value of every rate, > 0. Its default and those of K and `msl_steps` (10 epochs of 500) are
            the authors' configuration for 5-way 1-shot Omniglot.
        inner_steps: K ≥ 1.
        msl_steps: outer steps with a multi-step loss; 0: the loss is always that of the last step.
        first_order_steps: outer steps that treat ∇L_support as a constant.
    """

    group_size = 1

    def __init__(
        self,
        model: Model,
        score: Score,
        inner_lr: Annotated[float, Field(gt=0)] = 0.1,
        inner_steps: Annotated[int, Field(ge=1)] = 5,
        msl_steps: Annotated[int, Field(ge=0)] = 5000,
        first_order_steps: Annotated[int, Field(ge=0)] = 0,
    ):
        self.model = model
        self.score = score
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.msl_steps = msl_steps
        self.first_order_steps = first_order_steps
        self.norms = find_norm_keys(model)
        self.names = tuple(name for name in select_adapted(model, "all") if name not in self.norms)
        if not self.names:
            raise InputError(
                "model.type: got only norm layers, expected parameters that an inner loop can change"
            )
        self.scheduled = compute_step_weights(msl_steps, inner_steps, msl_steps)
        """w, [K], float64."""
        self.multi_step = False
        self.first_order = False

    def init(self, generator: torch.Generator) -> Theta:
        start = self.model.init(generator)
        theta = {name: value for name, value in start.items() if name not in self.norms}
        theta |= {inner_lr_key(name): torch.full((self.inner_steps,), self.inner_lr) for name in self.names}
        rows = self.inner_steps + 1
        return theta | {norm_key(name): torch.stack([start[name]] * rows) for name in self.norms}

    def begin(self, theta: Theta, support: Any) -> Theta:
        return begin_phi(self.model, self.score, theta | self._norms_at(theta, 0), support)

    def step(self, theta: Theta, phi: Theta, support: Any, k: int) -> Theta:
        gradient = support_gradient(self.model, self.score, phi, support, self.names, self.first_order)
        row = min(k, self.inner_steps - 1)
        moved = {name: phi[name] - theta[inner_lr_key(name)][row] * g for name, g in gradient.items()}
        return phi | moved | self._norms_at(theta, k + 1)

    def predict(self, theta: Theta, phi: Theta, x: Tensor) -> Tensor:
        return self.model(phi, x)

    def meta_loss(
        self, theta: Theta, episode: Episode, unroll: Unroll, score: Score
    ) -> tuple[Tensor, Metrics]:
        states = unroll(self, theta, episode.support, every=True)
        if not self.multi_step:
            states = states[-1:]  # the weights of the others are 0
        scored = [score(self.predict(theta, phi, episode.query.x), episode.query) for phi in states]
        losses = torch.stack([loss for loss, _ in scored])
        weights = self.scheduled[-len(states) :].to(losses.device, losses.dtype)
        last_loss, metrics = scored[-1]
        return (weights * losses).sum(), {"loss": last_loss, **metrics}

    def at(self, step: int) -> MAMLPlusPlus:
        """Return the algorithm with the loss weights and the order of derivatives of outer step `step`."""
        algorithm = copy.copy(self)
        algorithm.scheduled = compute_step_weights(step, self.inner_steps, self.msl_steps)
        algorithm.multi_step = step < self.msl_steps
        algorithm.first_order = step < self.first_order_steps
        return algorithm

    def _norms_at(self, theta: Theta, k: int) -> Theta:
        return {name: theta[norm_key(name)][min(k, self.inner_steps)] for name in self.norms}


def compute_step_weights(step: int, inner_steps: int, msl_steps: int) -> Tensor:
    """Return w, [K], float64: the weights of the query losses after inner steps 1 … K in outer step `step`.

    They are annealed over `msl_steps` outer steps. Their sum is 1.
    """
    early = 0.0
    if step < msl_steps:
        early = max(1 - step / msl_steps, SMALLEST_WEIGHT) / inner_steps
    weights = [early] * (inner_steps - 1)
    return torch.tensor([*weights, 1 - (inner_steps - 1) * early], dtype=torch.float64)


def find_norm_keys(model: Model) -> tuple[str, ...]:
    """Return the keys of phi that are weights and biases of norm layers."""
    layers = [name for name, module in model.module.named_modules() if isinstance(module, NORM_LAYERS)]
    parameters = [f"{name}.{kind}".lstrip(".") for name in layers for kind in ("weight", "bias")]
    return tuple(name for name in model.adaptable if name.removeprefix("model.") in parameters)


def norm_key(name: str) -> str:
    """Return the key of a norm parameter's values for all steps in theta: `norm.<parameter>`."""
    return "norm." + name.removeprefix("model.")
