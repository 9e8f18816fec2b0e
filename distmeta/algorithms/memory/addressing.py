"""External memories that a controller writes to and reads from: pure functions, one access at a time.

Shapes: N slots, W numbers a slot, R read heads, E numbers that the controller emits for one access. All functions take
any leading axes (`...`): a batch of memories, where each has its own content.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

EPSILON = 1e-6


class Memory(NamedTuple):
    """A memory as two pure functions of its state, a pytree of tensors."""

    emits: int
    """E."""
    begin: Callable[[Tensor], Any]
    """The empty memory, with the dtype and device of the tensor given."""
    access: Callable[[Any, Tensor], tuple[Any, Tensor]]
    """(state, emitted [..., E]) -> (state, what the heads read [..., R·W]): writes, then reads what is there now."""


def cosine(keys_RW: Tensor, memory_NW: Tensor) -> Tensor:
    """k·m / (√(|k|² + ε) √(|m|² + ε)), [..., R, N]: 0 with a slot of zeros, and differentiable there.

    ε = 1e-6 is that of the DNC's published code (google-deepmind/dnc, addressing.py).
    """
    norms_R1, norms_1N = _norm(keys_RW)[..., None], _norm(memory_NW)[..., None, :]
    return keys_RW @ memory_NW.mT / (norms_R1 * norms_1N)


def content(keys_RW: Tensor, memory_NW: Tensor, strength_R: Tensor) -> Tensor:
    """softmax over the slots of strength · cosine, [..., R, N] (Graves et al. 2014, §3.3.1)."""
    return (strength_R[..., None] * cosine(keys_RW, memory_NW)).softmax(-1)


def _norm(rows: Tensor) -> Tensor:
    return (rows.square().sum(-1) + EPSILON).sqrt()
