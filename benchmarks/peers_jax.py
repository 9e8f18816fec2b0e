"""MAML in JAX on an MLP, `jit(vmap(grad))`: what the fastest users of another framework write."""

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
    """A call that computes the mean meta-gradient of the episodes, waited for; and what it found.

    theta: an MLP's layers one after the other, weight [out, in] and bias [out], ReLU between; mean squared error.
    The episodes are JAX's own arrays before the first call. XLA takes all cores that the process may use.
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

    found = {name: torch.from_numpy(np.array(value)) for name, value in zip(names, call(), strict=True)}
    return call, found
