"""The memory of the neural Turing machine: Graves, Wayne & Danihelka 2014, arXiv 1410.5401, §3.

Shapes: N slots, W numbers a slot, R heads, K = 2 · shift + 1 shifts; any leading axes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distmeta.algorithms.memory.addressing import EPSILON, Memory, content


class NTM(NamedTuple):
    """The content, and where each head was."""

    memory: Tensor
    """[..., N, W]."""
    read: Tensor
    """[..., R, N]."""
    write: Tensor
    """[..., 1, N]."""


def ntm(slots: int, width: int, reads: int, shift: int) -> Memory:
    """One write head and `reads` read heads, each finding its slots by content and by moving on.

        w_c = softmax_i(β cos(k, M(i)))                           content                (eq. 5)
        w_g = g w_c + (1 − g) w_{t−1}                             interpolation          (eq. 7)
        w̃(i) = Σ_j w_g(j) s(i − j)                                shift, round the end   (eq. 8)
        w(i) = w̃(i)^γ / Σ_j w̃(j)^γ                                sharpening             (eq. 9)
        M_t(i) = M_{t−1}(i) (1 − w(i) e) + w(i) a;  r = Σ_i w(i) M_t(i)                  (eqs. 2 to 4)

    β = softplus, g = σ, s = softmax, γ = 1 + softplus, e = σ and k, a = tanh of what the controller emits. The write
    head goes first; the read heads see what it wrote.

    Deviations: heads start at slot 0 and memory at 1e-6 (Collier & Beel 2018, arXiv 1807.08518, found such a constant
    best), where the paper learns both.

    Args:
        shift: the furthest that a head moves in one access, either way.
    """
    head = width + 3 + 2 * shift + 1
    sizes = [reads * head, head, width, width]

    def begin(like: Tensor) -> NTM:
        first_N = (torch.arange(slots, device=like.device) == 0).to(like.dtype)
        return NTM(like.new_full((slots, width), EPSILON), first_N.expand(reads, slots), first_N[None])

    def access(state: NTM, emitted: Tensor) -> tuple[NTM, Tensor]:
        reading, writing, erase_W, add_W = emitted.split(sizes, -1)
        write_1N = address(writing[..., None, :], state.memory, state.write)
        kept_NW = 1 - write_1N.mT * erase_W.sigmoid()[..., None, :]
        memory_NW = state.memory * kept_NW + write_1N.mT * add_W.tanh()[..., None, :]
        read_RN = address(reading.unflatten(-1, (reads, head)), memory_NW, state.read)
        return NTM(memory_NW, read_RN, write_1N), (read_RN @ memory_NW).flatten(-2)

    def address(emitted: Tensor, memory_NW: Tensor, before_RN: Tensor) -> Tensor:
        key_RW, strength_R1, gate_R1, power_R1, shift_RK = emitted.split([width, 1, 1, 1, 2 * shift + 1], -1)
        content_RN = content(key_RW.tanh(), memory_NW, F.softplus(strength_R1[..., 0]))
        gated_RN = interpolated(content_RN, before_RN, gate_R1.sigmoid())
        return sharpened(shifted(gated_RN, shift_RK.softmax(-1)), 1 + F.softplus(power_R1))

    return Memory(sum(sizes), begin, access)


def interpolated(content_RN: Tensor, before_RN: Tensor, gate_R1: Tensor) -> Tensor:
    """g w_c + (1 − g) w_{t−1}."""
    return gate_R1 * content_RN + (1 - gate_R1) * before_RN


def shifted(weights_RN: Tensor, shift_RK: Tensor) -> Tensor:
    """Circular convolution; the shifts are −⌊K/2⌋ … ⌊K/2⌋, and +1 moves a weight from slot i to i + 1."""
    reach = shift_RK.shape[-1] // 2
    moved_RKN = torch.stack([weights_RN.roll(k, -1) for k in range(-reach, reach + 1)], -2)
    return (shift_RK[..., None, :] @ moved_RKN)[..., 0, :]


def sharpened(weights_RN: Tensor, power_R1: Tensor) -> Tensor:
    """w^γ / Σ w^γ, as the softmax of γ log w: no power underflows. 1e-16 keeps log 0 finite."""
    return (power_R1 * (weights_RN + 1e-16).log()).softmax(-1)
