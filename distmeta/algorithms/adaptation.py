"""What the gradient-based methods share: phi and its optimizer, the gradient of the support loss, minibatches."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from distmeta.errors import InputError, did_you_mean
from distmeta.protocols import PADDING, Model, Score, Theta, ways_of

OptimizerName = Literal["sgd", "momentum", "adam"]
Betas = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
BETAS = [0.9, 0.999]


NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class Adapting(NamedTuple):
    """phi on its way through a task, with the state of the inner optimizer, which starts anew in every task."""

    phi: Theta
    moments: tuple[Theta, ...]
    """sgd: (); momentum: (velocity,); adam: (first moment, second moment)."""


class InnerOptimizer(NamedTuple):
    """An optimizer as two pure functions, differentiable to any order through its state."""

    moments: int
    """How many tensors of state a parameter has."""
    update: Callable[[Theta, tuple[Theta, ...], int], tuple[Theta, tuple[Theta, ...]]]
    """(gradient, moments, step from 0) -> (what to subtract from phi, per unit of rate; moments)."""

    def begin(self, phi: Theta, adapted: tuple[str, ...]) -> Adapting:
        zeros = {name: torch.zeros_like(phi[name]) for name in adapted}
        return Adapting(phi, (zeros,) * self.moments)


def optimizer(
    name: OptimizerName, momentum: float = 0.9, betas: Betas = BETAS, eps: float = 1e-8
) -> InnerOptimizer:
    """The update of torch.optim's SGD, SGD with momentum, or Adam.

        sgd:      u = g
        momentum: v ← μ v + g,  u = v
        adam:     m ← β₁m + (1−β₁)g,  s ← β₂s + (1−β₂)g²,  u = (m/(1−β₁ᵗ)) / (√(s/(1−β₂ᵗ)) + ε)

    The derivative of √s at s = 0 is taken as 0 (s is flat there in g): where a parameter has had no gradient, the
    meta-gradient is finite. Reference: Kingma & Ba 2015, arXiv 1412.6980, Algorithm 1.
    """

    def sgd(g: Theta, moments: tuple[Theta, ...], k: int) -> tuple[Theta, tuple[Theta, ...]]:
        return g, ()

    def heavy_ball(g: Theta, moments: tuple[Theta, ...], k: int) -> tuple[Theta, tuple[Theta, ...]]:
        velocity = {name: momentum * moments[0][name] + g[name] for name in g}
        return velocity, (velocity,)

    def adam(g: Theta, moments: tuple[Theta, ...], k: int) -> tuple[Theta, tuple[Theta, ...]]:
        first = {name: betas[0] * moments[0][name] + (1 - betas[0]) * g[name] for name in g}
        second = {name: betas[1] * moments[1][name] + (1 - betas[1]) * g[name].square() for name in g}
        c1, c2 = 1 - betas[0] ** (k + 1), (1 - betas[1] ** (k + 1)) ** 0.5
        step = {name: first[name] / c1 / (_sqrt(second[name]) / c2 + eps) for name in g}
        return step, (first, second)

    known = {
        "sgd": InnerOptimizer(0, sgd),
        "momentum": InnerOptimizer(1, heavy_ball),
        "adam": InnerOptimizer(2, adam),
    }
    return known[name]


def _sqrt(s: Tensor) -> Tensor:
    zero = s == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, s).sqrt())


def begin_phi(model: Model, score: Score, theta: Theta, support: Any) -> Theta:
    """phi_0: theta's `model.*`, its head made for the task's number of classes."""
    return model.begin(theta, support, ways_of(score))


def adapted_names(model: Model, adapt: str) -> tuple[str, ...]:
    """Keys of the parameters that an inner loop moves: `all`, `head`, `body`, or a glob over parameter names.

    Raises:
        InputError: it matches none, or leaves a shared head alone.
    """
    names = model.adaptable
    if adapt in ("head", "body"):
        chosen = tuple(name for name in names if (name in model.head) == (adapt == "head"))
    else:
        glob = "*" if adapt == "all" else adapt
        chosen = tuple(name for name in names if fnmatchcase(name.removeprefix("model."), glob))
    if not chosen:
        known = [name.removeprefix("model.") for name in names]
        raise InputError(
            f"algorithm.adapt: got {adapt!r}, which matches no parameter, expected all, head, body or a glob; "
            f"{did_you_mean(adapt, known)}"
        )
    if model.head_init == "shared" and not set(model.head) & set(chosen):
        raise InputError(
            f"model.head: got shared with algorithm.adapt = {adapt!r}, which leaves the head as it is, so that all "
            "classes would stay alike: expected linear or prototype"
        )
    return chosen


def rate_of(name: str) -> str:
    """The key of a parameter's learned rate: `inner_lr.<parameter>`."""
    return "inner_lr." + name.removeprefix("model.")


def shapes_for_any_ways(model: Model, theta: Theta, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of phi's entries, but one row for all classes in a head with free ways, which broadcasts."""
    rows = {name: (1, *whole_shape(model, name)[1:]) for name in names}
    return {name: tuple(theta[name].shape) if name in theta else rows[name] for name in names}


def whole_shape(model: Model, name: str) -> tuple[int, ...]:
    """A parameter's shape in the module itself."""
    return tuple(model.module.get_parameter(name.removeprefix("model.")).shape)


def support_gradient(
    model: Model,
    score: Score,
    phi: Theta,
    support: Any,
    names: tuple[str, ...] | None = None,
    first_order: bool = False,
) -> Theta:
    """∇ L_support(φ) in φ's entries `names` (None: all), itself differentiable unless `first_order`."""
    moving = phi if names is None else {name: phi[name] for name in names}
    gradient = torch.func.grad(lambda p: score(model({**phi, **p}, support.x), support)[0])(moving)
    return {name: g.detach() for name, g in gradient.items()} if first_order else gradient


def check_adam(model: Model, name: OptimizerName) -> None:
    """Refuses Adam with a shared head: its classes start alike, so that the body's first gradient is rounding noise,
    which Adam's division would make full steps of.
    """
    if name == "adam" and model.head_init == "shared":
        raise InputError(
            "algorithm.inner_optimizer: got adam with model.head: shared, whose classes start alike, so that the first "
            "gradient of the body is rounding noise that Adam scales up: expected sgd or momentum, or head: prototype"
        )


def check_batches(score: Score, inner_batch: int | None) -> None:
    """Refuses minibatches of tasks with fewer classes: a batch does not show which ones the task has."""
    if inner_batch is not None and getattr(score, "absent", False):
        raise InputError(
            f"algorithm.inner_batch: got {inner_batch} with tasks.min_ways, expected null: a minibatch does not show "
            "which classes the task has"
        )


def minibatch(support: Any, k: int, size: int | None) -> Any:
    """Rows k·size … (k+1)·size − 1 of the support set, going round at its end; the whole set when it is no larger.

    Task families lay support rows out shot by shot, so `ways` neighbouring rows hold one example a class. Rows of
    padding are left out.
    """
    count = tree_leaves(support)[0].shape[0]
    if size is None or size >= count:
        return support
    rows: Any = [(k * size + i) % count for i in range(size)]
    y = getattr(support, "y", None)
    if y is not None and not y.is_floating_point():
        real_N = y != PADDING
        real_first_N = (~real_N).int().argsort(stable=True)
        rows = real_first_N[(k * size + torch.arange(size, device=y.device)) % real_N.sum()]
    return tree_map(lambda leaf: leaf[rows], support)
