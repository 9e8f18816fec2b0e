"""The meta-gradient with the graph of one inner step at a time.

    there, without a graph:      φ_0 = begin(θ),   φ_{k+1} = step_k(θ, φ_k),   every φ_k kept
    back, last step to first:    a_K = ∂L/∂φ_K,    (δ_k, a_k) = a_{k+1} · ∂step_k/∂(θ, φ_k)
    meta-gradient                = ∂L/∂θ + Σ_k δ_k + a_0 · ∂begin/∂θ

The derivative is that of the whole graph, to rounding; memory holds K+1 states and one step's graph, not K graphs,
and every step is computed twice. With gradient descent inside, a_{k+1} · ∂step_k/∂φ_k = a_{k+1} − α H(φ_k) a_{k+1}:
a Hessian-vector product, taken reverse over reverse. (MixFlow-MG, Kemaev et al. 2025, arXiv 2505.00793, takes it
forward over reverse, which on a CPU is slower and needs as much memory: benchmarks/README.md.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from distmeta.compute.unroll import detached
from distmeta.errors import InputError
from distmeta.protocols import Algorithm, State, Theta, Unroll, support_at

Loss = Callable[[Theta, Unroll], tuple[Tensor, Any]]
"""(theta, unroll) -> (a group's meta-loss, its metrics)."""

Vjp = Callable[..., tuple[Any, ...]]
"""vjp(function, *primals, has_aux) -> (outputs, pull[, aux]), pull(cotangents) -> those of the primals; lists and dicts
of float tensors: `torch.func.vjp`, or `reverse_vjp`."""


class _Passage(NamedTuple):
    """An inner loop as it was run."""

    algorithm: Algorithm
    support: Any
    states: list[State]
    """φ_0 … φ_K, constants."""
    shown: list[int]
    """Which of them the loss saw."""
    constant: bool
    """It was asked for with `detach`."""
    every: bool

    def given(self, states: list[State]) -> Any:
        """What the loss asked for."""
        return states if self.every else states[-1]


def constant_memory(loss: Loss, theta: Theta, vjp: Vjp) -> tuple[Theta, Any]:
    """∇_θ of a loss that unrolls inner loops from theta, and its metrics.

    The loss is computed twice, first without a graph: to run its inner loops.

    Raises:
        InputError: it unrolls from something else than its theta, whose gradient would be lost.
    """
    passages: list[_Passage] = []
    fixed = detached(theta)

    def record(
        algorithm: Algorithm,
        given: Theta,
        support: Any,
        steps: int | None = None,
        detach: bool = False,
        every: bool = False,
    ) -> Any:
        count = algorithm.inner_steps if steps is None else steps
        states = list(_trajectory(algorithm, detached(given), support, count))
        shown = list(range(1, count + 1)) if every else [count]
        if not detach and not (given.keys() == fixed.keys() and all(given[n] is fixed[n] for n in fixed)):
            raise InputError(
                "compute.differentiation: got constant-memory, but meta_loss unrolls from other than its own theta: "
                "use reverse, or unroll from theta itself or with detach=True"
            )
        passages.append(_Passage(algorithm, support, states, shown, detach, every))
        return passages[-1].given([states[k] for k in shown])

    with torch.no_grad():
        loss(fixed, record)

    def replayed(theta: Theta, moved: list[list[list[Tensor]]]) -> tuple[Tensor, Any]:
        """The loss as a function of theta and of the states that it sees."""
        found = iter(zip(passages, moved, strict=True))

        def replay(*_: Any, **__: Any) -> Any:
            """The same inner loops in the same order as `record` met them."""
            passage, own = next(found)
            states = [passage.states[k] for k in passage.shown]
            if not passage.constant:
                states = [_with(state, part) for state, part in zip(states, own, strict=True)]
            return passage.given(states)

        return loss(theta, replay)

    seen = [[_floats(passage.states[k]) for k in passage.shown] for passage in passages]
    value, pull, metrics = vjp(replayed, fixed, seen, has_aux=True)
    gradient, adjoints = pull(torch.ones_like(value))
    for passage, adjoint in zip(passages, adjoints, strict=True):
        if not passage.constant and any(adjoint):
            more = _back(passage, fixed, dict(zip(passage.shown, adjoint, strict=True)), vjp)
            gradient = {name: gradient[name] + more[name] for name in gradient}
    return gradient, metrics


def _back(passage: _Passage, theta: Theta, adjoints: dict[int, list[Tensor]], vjp: Vjp) -> Theta:
    """What falls on theta from the adjoints of some states, last step to first."""
    algorithm, support, states = passage.algorithm, passage.support, passage.states
    last = len(states) - 1
    gradient = {name: torch.zeros_like(value) for name, value in theta.items()}
    carried = adjoints[last]
    for k in reversed(range(last)):

        def step(theta: Theta, leaves: list[Tensor], k: int = k) -> list[Tensor]:
            return _floats(algorithm.step(theta, _with(states[k], leaves), support_at(support, k), k))

        _, pull = vjp(step, theta, _floats(states[k]))
        more, carried = pull(carried)
        if k in adjoints:
            carried = [a + b for a, b in zip(carried, adjoints[k], strict=True)]
        gradient = {name: gradient[name] + more[name] for name in gradient}
    _, pull = vjp(lambda theta: _floats(algorithm.begin(theta, support_at(support, 0))), theta)
    (more,) = pull(carried)
    return {name: gradient[name] + more[name] for name in gradient}


def _trajectory(algorithm: Algorithm, theta: Theta, support: Any, steps: int) -> Iterator[State]:
    """φ_0 … φ_K, constants, where no graph is kept."""
    state = algorithm.begin(theta, support_at(support, 0))
    yield detached(state)
    for k in range(steps):
        state = detached(algorithm.step(theta, state, support_at(support, k), k))
        yield state


def _floats(state: State) -> list[Tensor]:
    """The leaves of a state that have a derivative."""
    return [leaf for leaf in tree_flatten(state)[0] if _moves(leaf)]


def _with(state: State, floats: list[Tensor]) -> State:
    """The state with other values for them."""
    leaves, spec = tree_flatten(state)
    given = iter(floats)
    return tree_unflatten([next(given) if _moves(leaf) else leaf for leaf in leaves], spec)


def _moves(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def reverse_vjp(function: Callable[..., Any], *primals: Any, has_aux: bool = False) -> tuple[Any, ...]:
    """`torch.func.vjp` by plain autograd, which costs less on a CPU; not under vmap. `pull` may be called once."""
    leaves, spec = tree_flatten(primals)
    with torch.enable_grad():
        own = [leaf.detach().requires_grad_() for leaf in leaves]
        outputs = function(*tree_unflatten(own, spec))
    outputs, *aux = outputs if has_aux else (outputs,)

    def pull(cotangents: Any) -> Any:
        pairs = zip(tree_flatten(outputs)[0], tree_flatten(cotangents)[0], strict=True)
        moving = [(output, cotangent) for output, cotangent in pairs if output.requires_grad]
        found: list[Tensor | None] = [None] * len(own)
        if moving:
            # a product instead of `grad_outputs`, for which torch 2.13 loads its symbolic shapes, 30 MB of them
            total = torch.stack([(output * cotangent).sum() for output, cotangent in moving]).sum()
            found = list(torch.autograd.grad(total, own, allow_unused=True))
        filled = [
            torch.zeros_like(leaf) if part is None else part for leaf, part in zip(own, found, strict=True)
        ]
        return tree_unflatten(filled, spec)

    return (tree_map(torch.Tensor.detach, outputs), pull, *aux)
