"""What the gradient-based methods share: the gradient of the support loss, minibatches of a support set."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from distmeta.core import Model, Score, Theta


def support_gradient(model: Model, score: Score, phi: Theta, support: Any) -> Theta:
    """∇_φ L_support(φ), itself differentiable."""
    return torch.func.grad(lambda p: score(model(p, support.x), support)[0])(phi)


def minibatch(support: Any, k: int, size: int | None) -> Any:
    """Rows k·size … (k+1)·size − 1 of the support set, going round at its end; the whole set when it is no larger.

    Task families lay support rows out shot by shot, so `ways` neighbouring rows hold one example a class.
    """
    count = tree_leaves(support)[0].shape[0]
    if size is None or size >= count:
        return support
    rows = [(k * size + i) % count for i in range(size)]
    return tree_map(lambda leaf: leaf[rows], support)
