"""Bilevel optimisation of a user's own problem: unrolled or implicit hypergradients."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.adaptation import (
    BETAS,
    Betas,
    InnerOptimizer,
    InnerSchedule,
    InnerState,
    OptimizerName,
    allow_stopping,
    list_factors,
    select_minibatch,
    stop_if_reached,
)
from distmeta.algorithms.imaml import dot, solve_conjugate_gradients
from distmeta.compute.gradient import detach_tree, support_at
from distmeta.compute.inner_gradient import inner_gradient, inner_vjp
from distmeta.errors import InputError, did_you_mean
from distmeta.protocols import BilevelProblem, Episode, Metrics, Model, Score, Theta, Unroll

UPPER = "upper."
LOWER = "lower."
INNER_LR = "inner_lr"
PROBLEMS = {
    "reweighting": "distmeta.algorithms.bilevel_problems:Reweighting",
    "learned-loss": "distmeta.algorithms.bilevel_problems:LearnedLoss",
    "distillation": "distmeta.algorithms.bilevel_problems:Distillation",
}
"""The problems that come with distmeta."""


class Bilevel:
    """Learn upper parameters u so that lower parameters w, trained with them, have a low upper loss.

        w_{k+1} = w_k − α ∇_w L_lower(u, w_k, support),   meta-loss = L_upper(u, w_K, query)

    `unrolled` differentiates through the inner steps. The others differentiate the minimum instead, by the implicit
    function theorem; the inner loop then has to come close to a minimum:

        dL_upper/du = ∂_u L_upper − ∂_u ∂_w L_lower · v,   (∇²_w L_lower + δI) v = ∂_w L_upper

    with v from conjugate gradients (Pedregosa 2016, arXiv 1602.02355) or from the Neumann series
    η Σ_{j=0..J} (I − η(∇²_w L_lower + δI))^j ∂_w L_upper (Lorraine et al. 2020, arXiv 1911.02590, §4). With J = 0 the
    Hessian is replaced by I/η (Luketina et al. 2016, arXiv 1511.06727, §2). Their memory does not grow with
    `inner_steps`.

    Args:
        problem: `reweighting`, `learned-loss`, `distillation`, or `package.module:Name` of your own `BilevelProblem`.
        options: keyword arguments of the problem. It also receives `model` and `score` if it has such parameters.
        inner_lr: α > 0.
        learn_inner_lr: make α an upper parameter that starts at `inner_lr`.
        inner_steps: K ≥ 1.
        inner_optimizer: `sgd`, `momentum`, `adam` or `adamw`, as in torch.optim. Its state starts at zero in each task.
        momentum: μ in [0, 1), for `momentum`.
        betas: β₁ and β₂ in [0, 1), for `adam` and `adamw`.
        eps: ε > 0, for `adam` and `adamw`.
        inner_weight_decay: λ ≥ 0; added to the gradient, or with `adamw` decoupled from it.
        inner_clip_norm: largest norm of the gradient in a step; null: not clipped.
        inner_schedule: how α changes over the steps, as in `maml`.
        inner_batch: examples of the support set per inner step; null: all of them.
        inner_stop_loss: a task takes no more steps once the lower loss of a step (of its minibatch, with
            `inner_batch`) is at most this; null: all steps.
        backprop_steps: the number of last steps with second derivatives. In earlier steps ∇_w L_lower is a constant, as
            in `maml`. K or null is all steps. At least 1, because without second derivatives the lower loss would teach
            u nothing.
        lower_start: w_0. `fixed`: the same constants in every task; `learned`: part of theta; `random`: drawn for each
            task from the task's seed.
        start_seed: seed of the constants, or of the values from which `learned` starts, of a problem that draws them.
        hypergradient: `unrolled`, `conjugate-gradients` or `neumann`.
        implicit_steps: steps of conjugate gradients (at least 1), or the terms J of the Neumann series after the first.
        neumann_rate: η > 0, below 2 / the largest eigenvalue of the Hessian; null: `inner_lr`.
        damping: δ ≥ 0.
    """

    group_size = 1

    def __init__(
        self,
        model: Model,
        score: Score,
        problem: str,
        options: dict[str, Any] | None = None,
        inner_lr: Annotated[float, Field(gt=0)] = 0.1,
        learn_inner_lr: bool = False,
        inner_steps: Annotated[int, Field(ge=1)] = 5,
        inner_optimizer: OptimizerName = "sgd",
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        betas: Betas = BETAS,
        eps: Annotated[float, Field(gt=0)] = 1e-8,
        inner_weight_decay: Annotated[float, Field(ge=0)] = 0.0,
        inner_clip_norm: Annotated[float, Field(gt=0)] | None = None,
        inner_schedule: InnerSchedule = "constant",
        inner_batch: Annotated[int, Field(ge=1)] | None = None,
        inner_stop_loss: float | None = None,
        backprop_steps: Annotated[int, Field(ge=1)] | None = None,
        lower_start: Literal["fixed", "learned", "random"] = "fixed",
        start_seed: Annotated[int, Field(ge=0)] = 0,
        hypergradient: Literal["unrolled", "conjugate-gradients", "neumann"] = "unrolled",
        implicit_steps: Annotated[int, Field(ge=0)] = 10,
        neumann_rate: Annotated[float, Field(gt=0)] | None = None,
        damping: Annotated[float, Field(ge=0)] = 0.0,
    ):
        if hypergradient != "unrolled":
            _check_implicit(hypergradient, lower_start, learn_inner_lr, backprop_steps, inner_weight_decay)
        if hypergradient == "conjugate-gradients" and implicit_steps == 0:
            raise InputError(
                "algorithm.implicit_steps: got 0 with hypergradient: conjugate-gradients, expected at least 1: "
                "without a step v is 0"
            )
        self._score = score
        self.problem = build_bilevel_problem(problem, options or {}, {"model": model, "score": score})
        self.inner_lr = inner_lr
        self.learn_inner_lr = learn_inner_lr
        self.inner_steps = inner_steps
        self.optimizer = InnerOptimizer(
            inner_optimizer,
            momentum,
            betas,
            eps,
            weight_decay=inner_weight_decay,
            clip_norm=inner_clip_norm,
            factors=list_factors(inner_schedule, inner_steps),
        )
        self.inner_batch = inner_batch
        self.inner_stop_loss = inner_stop_loss
        self.constant_steps = 0 if backprop_steps is None else max(inner_steps - backprop_steps, 0)
        self.lower_start = lower_start
        self.hypergradient = hypergradient
        self.implicit_steps = implicit_steps
        self.neumann_rate = neumann_rate or inner_lr
        self.damping = damping
        self._start = self.problem.init_lower(torch.Generator().manual_seed(start_seed))

    def init(self, generator: torch.Generator) -> Theta:
        upper = self.problem.init_upper(generator)
        theta = {UPPER + name: value for name, value in upper.items()}
        if self.lower_start == "learned":
            theta |= {LOWER + name: value.clone() for name, value in self._start.items()}
        if self.learn_inner_lr:
            theta[INNER_LR] = torch.tensor(self.inner_lr)
        return theta

    def begin(self, theta: Theta, support: Any) -> InnerState:
        lower = self._begin_lower(theta)
        return allow_stopping(self.optimizer.begin(lower, tuple(lower)), self.inner_stop_loss)

    def step(self, theta: Theta, state: InnerState, support: Any, k: int) -> InnerState:
        upper = remove_prefix(theta, UPPER)
        batch = select_minibatch(support, k, self.inner_batch, self._score)

        def lower_loss(lower: Theta) -> tuple[Tensor, Tensor]:
            loss = self.problem.lower_loss(upper, lower, batch)
            return loss, loss.detach()

        is_constant = k < self.constant_steps
        gradient, loss = inner_gradient(lower_loss, state.phi, has_aux=True, first_order=is_constant)
        rate: Any = theta[INNER_LR] if self.learn_inner_lr else self.inner_lr
        after = self.optimizer.step(state, gradient, k, rate)
        return stop_if_reached(state, after, loss, self.inner_stop_loss)

    def predict(self, theta: Theta, state: InnerState, x: Any) -> Any:
        return self.problem.predict(remove_prefix(theta, UPPER), state.phi, x)

    def meta_loss(
        self, theta: Theta, episode: Episode, unroll: Unroll, score: Score
    ) -> tuple[Tensor, Metrics]:
        if self.hypergradient != "unrolled":
            return self._implicit_loss(theta, episode, unroll)
        state = unroll(self, theta, episode.support)
        loss, metrics = self.problem.upper_loss(remove_prefix(theta, UPPER), state.phi, episode.query)
        return loss, {"loss": loss, **metrics}

    def _begin_lower(self, theta: Theta) -> Theta:
        if self.lower_start == "learned":
            return remove_prefix(theta, LOWER)
        like = next(iter(theta.values()))
        start = self._start
        if self.lower_start == "random":  # torch's generator starts from the task's seed
            seed = int(torch.randint(2**62, (1,), device="cpu"))
            start = self.problem.init_lower(torch.Generator().manual_seed(seed))
        return {name: value.to(like.device, like.dtype) for name, value in start.items()}

    def _implicit_loss(self, theta: Theta, episode: Episode, unroll: Unroll) -> tuple[Tensor, Metrics]:
        """Return L_upper(u, sg(w)) − ⟨∂_w L_lower(u, sg(w)), sg(v)⟩, whose gradient is the hypergradient."""
        constants = {name: value.detach() for name, value in theta.items()}
        lower = unroll(self, constants, episode.support, detach=True).phi
        support = support_at(episode.support, self.inner_steps - 1)
        upper = remove_prefix(theta, UPPER)
        upper_constants = remove_prefix(constants, UPPER)

        def lower_gradient(u: Theta, w: Theta) -> Theta:
            return inner_gradient(lambda p: self.problem.lower_loss(u, p, support), w)

        gradient = inner_gradient(
            lambda w: self.problem.upper_loss(upper_constants, w, episode.query)[0], lower, first_order=True
        )
        # The Hessian is symmetric, so its product with v is a vjp.
        _, multiply_hessian = inner_vjp(lambda w: lower_gradient(upper_constants, w), lower)

        def matvec(v: Theta) -> Theta:
            hessian_v = multiply_hessian(v)
            return {name: hessian_v[name] + self.damping * v[name] for name in v}

        if self.hypergradient == "neumann":
            v = sum_neumann_series(matvec, gradient, self.implicit_steps, self.neumann_rate)
        else:
            v = solve_conjugate_gradients(matvec, gradient, self.implicit_steps)
        loss, metrics = self.problem.upper_loss(upper, lower, episode.query)
        response = dot(lower_gradient(upper, lower), detach_tree(v))
        metrics = {name: value.detach() for name, value in metrics.items()}
        return loss - response, {"loss": loss.detach(), **metrics}


def sum_neumann_series(matvec: Any, b: Theta, terms: int, rate: float) -> Theta:
    """Return η Σ_{j=0..terms} (I − ηA)^j b, which converges to A⁻¹b if η is below 2 / the largest eigenvalue of A.

    Args:
        matvec: v -> A v.
        rate: η.
    """
    term = b
    total = b
    for _ in range(terms):
        a_term = matvec(term)
        term = {name: term[name] - rate * a_term[name] for name in term}
        total = {name: total[name] + term[name] for name in total}
    return {name: rate * value for name, value in total.items()}


def remove_prefix(theta: Theta, prefix: str) -> Theta:
    """Return the entries of `theta` whose names start with `prefix`, by their names without it."""
    return {name.removeprefix(prefix): value for name, value in theta.items() if name.startswith(prefix)}


def build_bilevel_problem(name: str, options: dict[str, Any], given: dict[str, Any]) -> BilevelProblem:
    """Import a problem and call it with its options.

    Evaluation refuses a checkpoint that names a problem outside distmeta before this is called, unless the user named
    it too (`evaluation.trusted_parts`).

    Args:
        name: a key of `PROBLEMS`, or `package.module:Name`.
        given: arguments that the problem receives if it has parameters of these names.

    Raises:
        InputError: it cannot be imported, does not take the options, or lacks a method.
    """
    target = PROBLEMS.get(name, name)
    module_name, _, attribute = target.partition(":")
    if not attribute:
        raise InputError(
            f"algorithm.problem: got {name!r}, expected one of {', '.join(PROBLEMS)} or package.module:Name; "
            f"{did_you_mean(name, list(PROBLEMS))}"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        part = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        raise InputError(
            f"algorithm.problem: importing {name!r} failed: {type(error).__name__}: {error}"
        ) from error
    if not callable(part):
        raise InputError(
            f"algorithm.problem: got {name!r}, which is a {type(part).__name__}, expected a class or function"
        )
    signature = inspect.signature(part)
    accepted = {key: value for key, value in given.items() if key in signature.parameters}
    arguments = options | accepted
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise InputError(
            f"algorithm.options: {error} in {name!r}, expected its parameters {signature}"
        ) from None
    problem = part(**arguments)
    if not isinstance(problem, BilevelProblem):
        raise InputError(
            f"algorithm.problem: got {name!r}, expected the methods init_upper, init_lower, lower_loss, upper_loss and "
            "predict (distmeta.protocols.BilevelProblem)"
        )
    return problem


def _check_implicit(
    hypergradient: str,
    lower_start: str,
    learn_inner_lr: bool,
    backprop_steps: int | None,
    inner_weight_decay: float,
) -> None:
    """Refuse options that have no effect or a wrong one: the minimum of L_lower depends neither on start nor path."""
    reason = f"with hypergradient: {hypergradient}"
    why = "the minimum does not depend on it, use hypergradient: unrolled"
    if lower_start == "learned":
        raise InputError(f"algorithm.lower_start: got learned {reason}, expected fixed or random: {why}")
    if learn_inner_lr:
        raise InputError(f"algorithm.learn_inner_lr: got true {reason}, expected false: {why}")
    if backprop_steps is not None:
        raise InputError(f"algorithm.backprop_steps: got {backprop_steps} {reason}, expected null: {why}")
    if inner_weight_decay:
        raise InputError(
            f"algorithm.inner_weight_decay: got {inner_weight_decay} {reason}, expected 0: the inner loop would end at "
            "the minimum of another loss; add the penalty to lower_loss"
        )
