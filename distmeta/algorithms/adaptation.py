"""Inner-loop helpers of the gradient-based methods: phi, its optimizer, the support gradient, minibatches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from distmeta.compute.inner_gradient import inner_gradient
from distmeta.errors import InputError, did_you_mean
from distmeta.protocols import PADDING, Batch, MayLackClasses, Model, Score, Theta, find_ways
from distmeta.trees import tree_leaves, tree_map

Adapt = str | list[str]
"""Which parameters an inner loop changes: `all`, `head`, `body`, a glob, or a list of these."""
OptimizerName = Literal["sgd", "momentum", "adam", "adamw"]
InnerSchedule = Literal["constant", "linear", "cosine"] | list[Annotated[float, Field(ge=0)]]
"""How the inner rate changes: a shape, or a factor for every step."""
Betas = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
BETAS = [0.9, 0.999]

NORM_LAYERS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


class InnerState(NamedTuple):
    """phi and the state of the inner optimizer, which starts at zero in every task."""

    phi: Theta
    moments: tuple[Theta, ...]
    """sgd: (); momentum: (velocity,); adam and adamw: (first moment, second moment)."""
    stopped: tuple[Tensor, ...] = ()
    """With a rule for stopping early: whether the task takes no more steps, a bool []."""


@dataclass(frozen=True)
class InnerOptimizer:
    """The updates of torch.optim's SGD, SGD with momentum, Adam and AdamW as pure functions.

        clipping: g ← g · min(1, clip_norm / ‖g‖)
        decay:    g ← g + λφ;   adamw: φ ← (1 − αλ) φ
        sgd:      u = g
        momentum: v ← μ v + g,  u = v
        adam:     m ← β₁m + (1−β₁)g,  s ← β₂s + (1−β₂)g²,  u = (m/(1−β₁ᵗ)) / (√(s/(1−β₂ᵗ)) + ε)
        step k:   φ ← φ − α f_k u

    They are differentiable to any order, also through the optimizer's state. The derivative of √s at s = 0 is taken
    as 0, so the meta-gradient of a parameter that has had no gradient is finite.

    Reference: Kingma & Ba 2015, arXiv 1412.6980, Algorithm 1; Loshchilov & Hutter 2019, arXiv 1711.05101, Algorithm 2.
    """

    name: OptimizerName
    momentum: float
    betas: Betas
    eps: float
    weight_decay: float = 0.0
    """λ"""
    clip_norm: float | None = None
    """Largest norm of the gradient of all adapted parameters together."""
    factors: tuple[float, ...] = (1.0,)
    """f_0 … f_{K−1}. Later steps have the last one."""

    def begin(self, phi: Theta, names: tuple[str, ...]) -> InnerState:
        """Return the state before the first inner step, in which only the parameters `names` are adapted."""
        zeros = {name: torch.zeros_like(phi[name]) for name in names}
        count = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}[self.name]
        return InnerState(phi, (zeros,) * count)

    def step(self, state: InnerState, g: Theta, k: int, inner_lr: float) -> InnerState:
        """Return the state after inner step `k`, counted from 0, along the gradient `g` of the adapted parameters."""
        rate = inner_lr * self.factors[min(k, len(self.factors) - 1)]
        phi = state.phi
        if self.clip_norm is not None:
            g = clip_gradient(g, self.clip_norm)
        if self.weight_decay and self.name == "adamw":
            phi = phi | {name: (1 - rate * self.weight_decay) * phi[name] for name in g}
        elif self.weight_decay:
            g = {name: g[name] + self.weight_decay * phi[name] for name in g}
        if self.name == "sgd":
            update = g
            moments = ()
        elif self.name == "momentum":
            update = {name: self.momentum * state.moments[0][name] + g[name] for name in g}
            moments = (update,)
        else:
            update, moments = self._adam(g, state.moments, k)
        moved = {name: phi[name] - rate * update[name] for name in update}
        return state._replace(phi=phi | moved, moments=moments)

    def _adam(self, g: Theta, moments: tuple[Theta, ...], k: int) -> tuple[Theta, tuple[Theta, ...]]:
        beta1, beta2 = self.betas
        first = {name: beta1 * moments[0][name] + (1 - beta1) * g[name] for name in g}
        second = {name: beta2 * moments[1][name] + (1 - beta2) * g[name].square() for name in g}
        correction1 = 1 - beta1 ** (k + 1)
        correction2 = (1 - beta2 ** (k + 1)) ** 0.5
        update = {
            name: first[name] / correction1 / (sqrt_or_zero(second[name]) / correction2 + self.eps)
            for name in g
        }
        return update, (first, second)


def sqrt_or_zero(x: Tensor) -> Tensor:
    """Return √x, with derivative 0 instead of infinity at x = 0."""
    is_zero = x == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, x).sqrt())


def clip_gradient(g: Theta, limit: float) -> Theta:
    """Return the gradient scaled down to the norm `limit`, as `torch.nn.utils.clip_grad_norm_` does."""
    norm = sqrt_or_zero(torch.stack([value.square().sum() for value in g.values()]).sum())
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    return {name: factor * value for name, value in g.items()}


def list_factors(schedule: InnerSchedule, steps: int) -> tuple[float, ...]:
    """Return the factor f_k on the inner rate in each of K steps.

        linear: f_k = 1 − k/K,   cosine: f_k = (1 + cos(πk/K)) / 2

    Raises:
        InputError: a list does not have one factor per step.
    """
    if isinstance(schedule, list):
        if len(schedule) != steps:
            raise InputError(
                f"algorithm.inner_schedule: got {len(schedule)} factors, expected one for each of {steps} inner steps"
            )
        return tuple(schedule)
    if schedule == "linear":
        return tuple(1 - k / steps for k in range(steps))
    if schedule == "cosine":
        return tuple((1 + math.cos(math.pi * k / steps)) / 2 for k in range(steps))
    return (1.0,)


def allow_stopping(state: InnerState, limit: float | None) -> InnerState:
    """Return the state before the first inner step of a task that `stop_if_reached` may stop."""
    if limit is None:
        return state
    first = next(iter(state.phi.values()))
    return state._replace(stopped=(first.new_zeros((), dtype=torch.bool),))


def stop_if_reached(before: InnerState, after: InnerState, loss: Tensor, limit: float | None) -> InnerState:
    """Return the state after a step, or the one before it once a step's support loss has been at most `limit`.

    A stopped task stays stopped, also if a later minibatch has a larger loss. The state is chosen element by element,
    so that this runs under vmap. A step that is not taken is an identity in the meta-gradient.
    """
    if limit is None:
        return after
    has_stopped = before.stopped[0] | (loss <= limit)
    chosen = tree_map(lambda old, new: torch.where(has_stopped, old, new), before, after)
    return chosen._replace(stopped=(has_stopped,))


def begin_phi(model: Model, score: Score, theta: Theta, support: Any) -> Theta:
    """Return φ_0: the parameters `model.*` of theta, with a head for the task's number of classes."""
    if model.head_init == "linear":  # the head does not depend on the task
        return model.begin(theta, support)
    return model.begin(theta, support, find_ways(score))


def select_adapted(model: Model, adapt: Adapt) -> tuple[str, ...]:
    """Return the keys of the parameters that the inner loop adapts.

    Args:
        adapt: `all`, `head`, `body`, a glob over parameter names, or a list of these.

    Raises:
        InputError: an entry matches no parameter, the head is not known, or a shared head would not be adapted.
    """
    entries = [adapt] if isinstance(adapt, str) else adapt
    found: set[str] = set()
    for entry in entries:
        matching = _match_parameters(model, entry)
        if not matching:
            known = [name.removeprefix("model.") for name in model.adaptable]
            raise InputError(
                f"algorithm.adapt: got {entry!r}, which matches no parameter, expected all, head, body or a glob; "
                f"{did_you_mean(entry, known)}"
            )
        found |= matching
    names = tuple(name for name in model.adaptable if name in found)
    if model.head_init == "shared" and not set(model.head) & set(names):
        raise InputError(
            f"model.head: got shared with algorithm.adapt = {adapt!r}, expected linear or prototype: without "
            "adaptation, the rows of a shared head stay equal for all classes"
        )
    return names


def _match_parameters(model: Model, entry: str) -> set[str]:
    if entry in ("head", "body") and not model.head:
        raise InputError(
            f"algorithm.adapt: got {entry!r}, but {type(model.module).__name__} has no submodule 'head' and no linear "
            "layer with as many outputs as the tasks need, expected model.head_module, the name of its head"
        )
    if entry == "head":
        return set(model.adaptable) & set(model.head)
    if entry == "body":
        return set(model.adaptable) - set(model.head)
    glob = "*" if entry == "all" else entry
    return {name for name in model.adaptable if fnmatchcase(name.removeprefix("model."), glob)}


def support_gradient(
    model: Model,
    score: Score,
    phi: Theta,
    support: Any,
    names: tuple[str, ...] | None = None,
    first_order: bool = False,
) -> Theta:
    """Return ∇L_support(φ) for the entries `names` of φ (None: all). It is a constant if `first_order`."""
    return support_gradient_and_loss(model, score, phi, support, names, first_order)[0]


def support_gradient_and_loss(
    model: Model,
    score: Score,
    phi: Theta,
    support: Any,
    names: tuple[str, ...] | None = None,
    first_order: bool = False,
) -> tuple[Theta, Tensor]:
    """Return the same gradient, and L_support(φ)."""
    adapted = phi if names is None else {name: phi[name] for name in names}

    def support_loss(p: Theta) -> tuple[Tensor, Tensor]:
        loss = score(model({**phi, **p}, support.x), support)[0]
        return loss, loss.detach()

    return inner_gradient(support_loss, adapted, has_aux=True, first_order=first_order)


def check_inner_optimizer(model: Model, name: OptimizerName) -> None:
    """Refuse Adam and AdamW with a shared head.

    All rows of a shared head start equal, so the body's first gradient is rounding noise. Adam would scale it up to a
    full step.
    """
    if name in ("adam", "adamw") and model.head_init == "shared":
        raise InputError(
            f"algorithm.inner_optimizer: got {name} with model.head: shared, expected sgd or momentum, or head: "
            "prototype: the first gradient of the body is rounding noise, which Adam would scale up"
        )


def check_inner_batch(score: Score, inner_batch: int | None) -> None:
    """Refuse minibatches if tasks may have fewer classes: a minibatch does not show which classes the task has."""
    if inner_batch is not None and isinstance(score, MayLackClasses) and score.absent:
        raise InputError(
            f"algorithm.inner_batch: got {inner_batch} with tasks.min_ways, expected null: a minibatch does not show "
            "which classes the task has"
        )


def select_minibatch(support: Any, k: int, size: int | None, score: Score) -> Any:
    """Return rows k·size … (k+1)·size − 1 of the support set, starting again after its last row.

    Task families lay support rows out shot by shot, so `ways` neighbouring rows hold one example per class. If `score`
    is of classes, rows of padding are skipped; in other tasks -1 is a target like any other. If `size` is None or at
    least the number of rows, the whole set is returned.
    """
    count = tree_leaves(support)[0].shape[0]
    if size is None or size >= count:
        return support
    rows: Any = [(k * size + i) % count for i in range(size)]
    has_labels = isinstance(support, Batch) and isinstance(support.y, Tensor) and support.y.dim() == 1
    if has_labels and find_ways(score) is not None:
        is_real_N = support.y != PADDING
        real_first_N = (~is_real_N).int().argsort(stable=True)
        positions = k * size + torch.arange(size, device=support.y.device)
        rows = real_first_N[positions % is_real_N.sum()]
    return tree_map(lambda leaf: leaf[rows], support)
