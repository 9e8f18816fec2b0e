"""The meta-gradient with the graph of only one inner step in memory.

    forward, without a graph:    φ_0 = begin(θ),   φ_{k+1} = step_k(θ, φ_k),   every φ_k is kept
    backward, last step first:   a_K = ∂L/∂φ_K,    (δ_k, a_k) = a_{k+1} · ∂step_k/∂(θ, φ_k)
    meta-gradient                = ∂L/∂θ + Σ_k δ_k + a_0 · ∂begin/∂θ

The result is the derivative of the whole graph, to rounding. Memory holds K+1 states and the graph of one step, not K
graphs, and every step is computed twice. For inner gradient descent,

    a_{k+1} · ∂step_k/∂φ_k = a_{k+1} − α H(φ_k) a_{k+1}

is a Hessian-vector product, taken reverse over reverse. (MixFlow-MG, Kemaev et al. 2025, arXiv 2505.00793, takes it
forward over reverse. On a CPU that is slower and needs as much memory; the benchmark report has the numbers.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distmeta.compute.gradient import detach_tree, support_at
from distmeta.compute.random_state import RandomState, read_random_state, set_random_state
from distmeta.errors import InputError
from distmeta.protocols import Algorithm, State, Theta, Unroll
from distmeta.trees import tree_flatten, tree_map, tree_unflatten

Loss = Callable[[Theta, Unroll], tuple[Tensor, Any]]
"""(theta, unroll) -> (meta-loss of a group, its metrics)."""

Vjp = Callable[..., tuple[Any, ...]]
"""vjp(function, *primals, has_aux) -> (outputs, pull_back[, aux]), where pull_back(cotangents of the outputs) returns
those of the primals. `torch.func.vjp`, or `reverse_vjp`. Inputs and outputs are lists and dicts of float tensors."""


class _InnerLoop(NamedTuple):
    """An inner loop that the loss ran."""

    algorithm: Algorithm
    support: Any
    states: list[State]
    """φ_0 … φ_K, constants."""
    marks: list[RandomState]
    """The generators' states before φ_0 … φ_K were computed, and after φ_K, [K + 2]."""
    returned: list[int]
    """Indices of the states that the loss received."""
    is_constant: bool
    """The loss asked for it with `detach`."""
    every: bool

    def select_result(self, states: list[State]) -> Any:
        """Return from the received states what `unroll` returns."""
        return states if self.every else states[-1]


def differentiate_in_constant_memory(
    loss: Loss, theta: Theta, vjp: Vjp, gpus: Sequence[torch.device] | None = None
) -> tuple[Theta, Any]:
    """Return ∇_θ of a loss that unrolls inner loops from theta, and its metrics.

    The loss is computed twice. The first time is without a graph, to run its inner loops. If random numbers are drawn
    on the way, the second time sees the same ones.

    Args:
        gpus: GPUs whose random numbers are repeated besides the CPU's; None: none are drawn (vmap refuses them).

    Raises:
        InputError: the loss unrolls from anything but its theta. That part of the gradient would be lost.
    """
    loops: list[_InnerLoop] = []
    constants = detach_tree(theta)

    def record(
        algorithm: Algorithm,
        theta: Theta,
        support: Any,
        steps: int | None = None,
        detach: bool = False,
        every: bool = False,
    ) -> Any:
        """Run an inner loop and remember its states."""
        count = algorithm.inner_steps if steps is None else steps
        states, marks = _run_inner_loop(algorithm, detach_tree(theta), support, count, gpus)
        is_own_theta = theta.keys() == constants.keys() and all(theta[n] is constants[n] for n in constants)
        if not detach and not is_own_theta:
            raise InputError(
                "compute.differentiation: got constant-memory, but meta_loss unrolls from something other than its "
                "theta: use reverse, or unroll from theta itself or with detach=True"
            )
        returned = list(range(1, count + 1)) if every else [count]
        loop = _InnerLoop(algorithm, support, states, marks, returned, detach, every)
        loops.append(loop)
        return loop.select_result([states[k] for k in returned])

    start = read_random_state(gpus)
    with torch.no_grad():
        loss(constants, record)
    end = read_random_state(gpus)

    def loss_of_states(theta: Theta, leaves: list[list[list[Tensor]]]) -> tuple[Tensor, Any]:
        """Return the loss as a function of theta and of the states that it receives from its inner loops."""
        remaining = iter(zip(loops, leaves, strict=True))

        def replay(*_: Any, **__: Any) -> Any:
            """Return the states of the same inner loops, in the same order."""
            loop, own_leaves = next(remaining)
            set_random_state(loop.marks[-1], gpus)
            states = [loop.states[k] for k in loop.returned]
            if not loop.is_constant:
                states = [_replace_leaves(state, new) for state, new in zip(states, own_leaves, strict=True)]
            return loop.select_result(states)

        return loss(theta, replay)

    leaves = [[_list_float_leaves(loop.states[k]) for k in loop.returned] for loop in loops]
    set_random_state(start, gpus)
    value, pull_back, metrics = vjp(loss_of_states, constants, leaves, has_aux=True)
    gradient, adjoints = pull_back(torch.ones_like(value))
    for loop, adjoint in zip(loops, adjoints, strict=True):
        if not loop.is_constant and any(adjoint):
            adjoints_of_states = dict(zip(loop.returned, adjoint, strict=True))
            gradient = _add(gradient, _back_through(loop, constants, adjoints_of_states, vjp, gpus))
    set_random_state(end, gpus)
    return gradient, metrics


def _back_through(
    loop: _InnerLoop,
    theta: Theta,
    adjoints: dict[int, list[Tensor]],
    vjp: Vjp,
    gpus: Sequence[torch.device] | None,
) -> Theta:
    """Return the part of the gradient in theta that comes from the adjoints of some of the loop's states."""
    algorithm = loop.algorithm
    states = loop.states
    last = len(states) - 1
    gradient = {name: torch.zeros_like(value) for name, value in theta.items()}
    adjoint = adjoints[last]
    for k in reversed(range(last)):

        def step(theta: Theta, leaves: list[Tensor], k: int = k) -> list[Tensor]:
            state = _replace_leaves(states[k], leaves)
            return _list_float_leaves(algorithm.step(theta, state, support_at(loop.support, k), k))

        set_random_state(loop.marks[k + 1], gpus)
        _, pull_back = vjp(step, theta, _list_float_leaves(states[k]))
        through_step, adjoint = pull_back(adjoint)
        if k in adjoints:
            adjoint = [a + b for a, b in zip(adjoint, adjoints[k], strict=True)]
        gradient = _add(gradient, through_step)

    def begin(theta: Theta) -> list[Tensor]:
        return _list_float_leaves(algorithm.begin(theta, support_at(loop.support, 0)))

    set_random_state(loop.marks[0], gpus)
    _, pull_back = vjp(begin, theta)
    (through_begin,) = pull_back(adjoint)
    return _add(gradient, through_begin)


def _run_inner_loop(
    algorithm: Algorithm, theta: Theta, support: Any, steps: int, gpus: Sequence[torch.device] | None
) -> tuple[list[State], list[RandomState]]:
    """Return φ_0 … φ_K as constants, and the generators' states before each of them and after the last, [K + 2]."""
    marks = [read_random_state(gpus)]
    states = [detach_tree(algorithm.begin(theta, support_at(support, 0)))]
    for k in range(steps):
        marks.append(read_random_state(gpus))
        states.append(detach_tree(algorithm.step(theta, states[-1], support_at(support, k), k)))
    return states, [*marks, read_random_state(gpus)]


def _add(a: Theta, b: Theta) -> Theta:
    return {name: a[name] + b[name] for name in a}


def _list_float_leaves(state: State) -> list[Tensor]:
    """Return the leaves of a state that have a derivative."""
    return [leaf for leaf in tree_flatten(state)[0] if _is_float(leaf)]


def _replace_leaves(state: State, float_leaves: list[Tensor]) -> State:
    """Return the state with other values for its float leaves."""
    leaves, structure = tree_flatten(state)
    remaining = iter(float_leaves)
    return tree_unflatten([next(remaining) if _is_float(leaf) else leaf for leaf in leaves], structure)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def reverse_vjp(function: Callable[..., Any], *primals: Any, has_aux: bool = False) -> tuple[Any, ...]:
    """Do the same as `torch.func.vjp` with plain autograd, which costs less on a CPU.

    vmap cannot run it, and `pull_back` may be called only once.
    """
    leaves, structure = tree_flatten(primals)
    with torch.enable_grad():
        inputs = [leaf.detach().requires_grad_() for leaf in leaves]
        outputs = function(*tree_unflatten(inputs, structure))
    outputs, *aux = outputs if has_aux else (outputs,)

    def pull_back(cotangents: Any) -> Any:
        pairs = zip(tree_flatten(outputs)[0], tree_flatten(cotangents)[0], strict=True)
        products = [(output * cotangent).sum() for output, cotangent in pairs if output.requires_grad]
        if not products:
            return tree_unflatten([torch.zeros_like(leaf) for leaf in inputs], structure)
        # a sum of products instead of `grad_outputs`, for which torch 2.13 loads its symbolic shapes (30 MB)
        found = torch.autograd.grad(torch.stack(products).sum(), inputs, allow_unused=True)
        filled = [
            torch.zeros_like(leaf) if part is None else part for leaf, part in zip(inputs, found, strict=True)
        ]
        return tree_unflatten(filled, structure)

    return (tree_map(torch.Tensor.detach, outputs), pull_back, *aux)
