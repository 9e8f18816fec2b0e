"""MAML++: Antoniou, Edwards & Storkey 2019, "How to train your MAML", arXiv 1810.09502."""

from __future__ import annotations

import copy
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.adaptation import NORMS, adapted_names, begin_phi, rate_of, support_gradient
from distmeta.errors import InputError
from distmeta.protocols import Episode, Metrics, Model, Score, Theta, Unroll

SMALLEST_WEIGHT = 0.03
"""Of a step's loss before the last while the weights are annealed, times 1/K: the authors' code."""


class MAMLPlusPlus:
    """MAML with the paper's remedies for its instability (§4).

        φ_{k+1} = φ_k − α_k ∇L_support(φ_k),   α_k learned for each parameter tensor and step      (LSLR)
        meta-loss = Σ_k w_k L_query(φ_k), k = 1 … K                                                (MSL)

    - MSL: over the first `msl_steps` outer steps w goes from uniform 1/K towards the last step, by the rule of the
      authors' code, max((1 − t)/K, 0.03/K) for all but the last with t the fraction gone (their epochs, here steps);
      afterwards and in evaluation the last counts alone.
    - DA: first order until outer step `first_order_steps`, then exact. 0, the default, is the authors' Omniglot
      configuration; the paper's text has the first 50 epochs (of 500 steps).
    - BNWB: a norm's weights and biases have a value for every step (keys `norm.<parameter>`, [K+1, …]: row k is that
      of φ_k), which the inner loop does not move.
    - LSLR: `inner_lr.<parameter>`, [K]. Past the trained steps, the last rate and the last row stay.
    - CA: cosine annealing of the outer rate is the job's `outer.schedule`.

    Deviations: no per-step running statistics (BNRS): norms use the statistics of the batch at hand, always. The
    authors' code scores φ_{k+1} under row k of the norms, here under its own, k + 1.

    Args:
        inner_lr: the first value of every rate. The default, as K and `msl_steps` (10 epochs of 500), is that of the
            authors' configuration for 5-way 1-shot Omniglot.
        inner_steps: K.
        msl_steps: outer steps with a multi-step loss; 0: the last step's alone.
        first_order_steps: outer steps that take ∇L_support as a constant.
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
        self.model, self.score = model, score
        self.inner_lr, self.inner_steps = inner_lr, inner_steps
        self.msl_steps, self.first_order_steps = msl_steps, first_order_steps
        self.norms = norm_names(model)
        self.names = tuple(name for name in adapted_names(model, "all") if name not in self.norms)
        if not self.names:
            raise InputError(
                "model.type: got norm layers alone, expected parameters that an inner loop can move"
            )
        self.scheduled = _weights(msl_steps, inner_steps, msl_steps)
        """w [K], float64."""
        self.multi_step, self.first_order = False, False

    def at(self, step: int) -> MAMLPlusPlus:
        """With the weights of the multi-step loss and the order of derivatives of outer step `step`."""
        now = copy.copy(self)
        now.scheduled = _weights(step, self.inner_steps, self.msl_steps)
        now.multi_step, now.first_order = step < self.msl_steps, step < self.first_order_steps
        return now

    def init(self, generator: torch.Generator) -> Theta:
        start = self.model.init(generator)
        theta = {name: value for name, value in start.items() if name not in self.norms}
        theta |= {rate_of(name): torch.full((self.inner_steps,), self.inner_lr) for name in self.names}
        rows = self.inner_steps + 1
        return theta | {row_of(name): torch.stack([start[name]] * rows) for name in self.norms}

    def begin(self, theta: Theta, support: Any) -> Theta:
        return begin_phi(self.model, self.score, theta | self._norms_at(theta, 0), support)

    def step(self, theta: Theta, phi: Theta, support: Any, k: int) -> Theta:
        gradient = support_gradient(self.model, self.score, phi, support, self.names, self.first_order)
        last = min(k, self.inner_steps - 1)
        moved = {name: phi[name] - theta[rate_of(name)][last] * g for name, g in gradient.items()}
        return phi | moved | self._norms_at(theta, k + 1)

    def predict(self, theta: Theta, phi: Theta, x: Tensor) -> Tensor:
        return self.model(phi, x)

    def meta_loss(
        self, theta: Theta, episode: Episode, unroll: Unroll, score: Score
    ) -> tuple[Tensor, Metrics]:
        states = unroll(self, theta, episode.support, every=True)
        counted = states if self.multi_step else states[-1:]  # the others' weights are 0
        scored = [score(self.predict(theta, phi, episode.query.x), episode.query) for phi in counted]
        losses = torch.stack([loss for loss, _ in scored])
        weights = self.scheduled[-len(counted) :].to(losses.device, losses.dtype)
        loss, more = scored[-1]
        return (weights * losses).sum(), {"loss": loss, **more}

    def _norms_at(self, theta: Theta, k: int) -> Theta:
        return {name: theta[row_of(name)][min(k, self.inner_steps)] for name in self.norms}


def step_weights(step: int, inner_steps: int, length: int) -> tuple[float, ...]:
    """Weights of the query losses after inner steps 1 … K in an outer step, annealed over `length`; their sum is 1."""
    if step >= length:
        return (0.0,) * (inner_steps - 1) + (1.0,)
    early = max(1 - step / length, SMALLEST_WEIGHT) / inner_steps
    return (early,) * (inner_steps - 1) + (1 - (inner_steps - 1) * early,)


def _weights(step: int, inner_steps: int, length: int) -> Tensor:
    return torch.tensor(step_weights(step, inner_steps, length), dtype=torch.float64)


def norm_names(model: Model) -> tuple[str, ...]:
    """Keys of phi that are weights and biases of norm layers."""
    layers = [name for name, module in model.module.named_modules() if isinstance(module, NORMS)]
    keys = [f"{name}.{kind}".lstrip(".") for name in layers for kind in ("weight", "bias")]
    return tuple(name for name in model.adaptable if name.removeprefix("model.") in keys)


def row_of(name: str) -> str:
    """The key of a norm parameter's values for every step: `norm.<parameter>`."""
    return "norm." + name.removeprefix("model.")
