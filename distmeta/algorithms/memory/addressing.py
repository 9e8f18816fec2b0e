"""The interface of an external memory, and content-based addressing, which all memories use.

Shapes: N slots, W numbers per slot, R read heads, E numbers that the controller emits per access. All functions take
any leading axes (`...`), that is, a batch of memories with different contents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

EPSILON = 1e-6


class Memory(NamedTuple):
    """A memory as two pure functions of its state, a pytree of tensors."""

    emitted_size: int
    """E."""
    begin: Callable[[Tensor], Any]
    """like -> the empty memory, with the dtype and device of `like`."""
    access: Callable[[Any, Tensor], tuple[Any, Tensor]]
    """(state, emitted [..., E]) -> (state, what the heads read [..., R·W]). It writes first and then reads."""


def cosine_similarity(keys_RW: Tensor, memory_NW: Tensor) -> Tensor:
    """Return k·m / (√(|k|² + ε) √(|m|² + ε)), [..., R, N]: 0 for a slot of zeros, and differentiable there.

    ε = 1e-6 is that of the DNC's published code (google-deepmind/dnc, addressing.py).
    """
    norms_R1 = smooth_norm(keys_RW)[..., None]
    norms_1N = smooth_norm(memory_NW)[..., None, :]
    return keys_RW @ memory_NW.mT / (norms_R1 * norms_1N)


def address_by_content(keys_RW: Tensor, memory_NW: Tensor, strength_R: Tensor) -> Tensor:
    """Return softmax over the slots of strength · cosine, [..., R, N] (Graves et al. 2014, §3.3.1)."""
    return (strength_R[..., None] * cosine_similarity(keys_RW, memory_NW)).softmax(-1)


def smooth_norm(rows: Tensor) -> Tensor:
    return (rows.square().sum(-1) + EPSILON).sqrt()
