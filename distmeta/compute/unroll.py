"""The inner loop."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from distmeta.protocols import Algorithm, Theta, support_at


def unroll(
    algorithm: Algorithm,
    theta: Theta,
    support: Any,
    steps: int | None = None,
    detach: bool = False,
    every: bool = False,
) -> Any:
    """`begin`, then `steps` inner steps (the algorithm's own number by default): the state after the last.

    The graph of every step is kept, so that the meta-gradient goes through all of them; with `detach` none is,
    and the state is a constant. `every`: the states after each step, as a list.
    """
    state, after = algorithm.begin(theta, support_at(support, 0)), []
    for k in range(algorithm.inner_steps if steps is None else steps):
        state = algorithm.step(theta, state, support_at(support, k), k)
        if detach:
            state = detached(state)
        if every:
            after.append(state)
    return after if every else state


def detached(tree: Any) -> Any:
    """The same pytree, as constants."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)
