"""MAML in JAX on an MLP, `jit(vmap(grad))`, as users of JAX write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peers import Inner

from distmeta.protocols import Episode, Theta


def meta_gradient(theta: Theta, episodes: Episode, inner: Inner) -> tuple[Callable[[], Any], Theta]:
    """Return a function that computes the mean meta-gradient of the episodes and waits for it, and its result.

    The episodes are JAX arrays before the first call. XLA uses all cores that the process may use.

    Args:
        theta: weight [out, in] and bias [out] of the layers of an MLP with ReLU. The loss is the mean squared error.
    """
    names = list(theta)
    weights = [jnp.asarray(value.numpy()) for value in theta.values()]
    data = [jnp.asarray(leaf.numpy()) for batch in episodes for leaf in batch]

    def outputs(weights: list[Any], x: Any) -> Any:
        for weight, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
            x = jax.nn.relu(x @ weight.T + bias)
        return x @ weights[-2].T + weights[-1]

    def loss(weights: list[Any], x: Any, y: Any) -> Any:
        return jnp.mean((outputs(weights, x) - y) ** 2)

    def query_loss(weights: list[Any], x_s: Any, y_s: Any, x_q: Any, y_q: Any) -> Any:
        for _ in range(inner.steps):
            gradient = jax.grad(loss)(weights, x_s, y_s)
            weights = [w - inner.lr * g for w, g in zip(weights, gradient, strict=True)]
        return loss(weights, x_q, y_q)

    def mean_loss(weights: list[Any], *data: Any) -> Any:
        return jnp.mean(jax.vmap(query_loss, (None, 0, 0, 0, 0))(weights, *data))

    compiled = jax.jit(jax.grad(mean_loss))

    def call() -> Any:
        return jax.block_until_ready(compiled(weights, *data))

    gradient = {name: torch.from_numpy(np.array(value)) for name, value in zip(names, call(), strict=True)}
    return call, gradient
