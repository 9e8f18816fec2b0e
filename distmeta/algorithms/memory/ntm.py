"""The memory of the neural Turing machine: Graves, Wayne & Danihelka 2014, arXiv 1410.5401, §3.

Shapes: N slots, W numbers per slot, R heads, K = 2 · max_shift + 1 shifts; any leading axes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distmeta.algorithms.memory.addressing import EPSILON, Memory, address_by_content


class NTMState(NamedTuple):
    memory: Tensor
    """[..., N, W]."""
    read: Tensor
    """The last read weights, [..., R, N]."""
    write: Tensor
    """The last write weights, [..., 1, N]."""


def build_ntm(slots: int, width: int, reads: int, max_shift: int) -> Memory:
    """Build a memory with one write head and `reads` read heads, which address by content and by moving on.

        w_c = softmax_i(β cos(k, M(i)))                           content                (eq. 5)
        w_g = g w_c + (1 − g) w_{t−1}                             interpolation          (eq. 7)
        w̃(i) = Σ_j w_g(j) s(i − j)                                circular shift         (eq. 8)
        w(i) = w̃(i)^γ / Σ_j w̃(j)^γ                                sharpening             (eq. 9)
        M_t(i) = M_{t−1}(i) (1 − w(i) e) + w(i) a;  r = Σ_i w(i) M_t(i)                  (eqs. 2 to 4)

    The controller's numbers become β by softplus, g by σ, s by softmax, γ by 1 + softplus, e by σ, and k and a by
    tanh. The write head goes first, and the read heads see what it wrote.

    Deviations: heads start at slot 0 and the memory at 1e-6; the paper learns both (Collier & Beel 2018, arXiv
    1807.08518, found a constant start best).

    Args:
        max_shift: the furthest that a head moves in one access, in slots, either way.
    """
    shifts = 2 * max_shift + 1
    head_size = width + 3 + shifts
    sizes = [reads * head_size, head_size, width, width]

    def begin(like: Tensor) -> NTMState:
        first_N = (torch.arange(slots, device=like.device) == 0).to(like.dtype)
        return NTMState(like.new_full((slots, width), EPSILON), first_N.expand(reads, slots), first_N[None])

    def access(state: NTMState, emitted: Tensor) -> tuple[NTMState, Tensor]:
        read_heads, write_head, erase_W, add_W = emitted.split(sizes, -1)
        write_1N = address(write_head[..., None, :], state.memory, state.write)
        keep_NW = 1 - write_1N.mT * erase_W.sigmoid()[..., None, :]
        memory_NW = state.memory * keep_NW + write_1N.mT * add_W.tanh()[..., None, :]
        read_RN = address(read_heads.unflatten(-1, (reads, head_size)), memory_NW, state.read)
        return NTMState(memory_NW, read_RN, write_1N), (read_RN @ memory_NW).flatten(-2)

    def address(emitted: Tensor, memory_NW: Tensor, before_RN: Tensor) -> Tensor:
        key_RW, strength_R1, gate_R1, power_R1, shift_RK = emitted.split([width, 1, 1, 1, shifts], -1)
        content_RN = address_by_content(key_RW.tanh(), memory_NW, F.softplus(strength_R1[..., 0]))
        weights_RN = interpolate(content_RN, before_RN, gate_R1.sigmoid())
        weights_RN = shift(weights_RN, shift_RK.softmax(-1))
        return sharpen(weights_RN, 1 + F.softplus(power_R1))

    return Memory(sum(sizes), begin, access)


def interpolate(content_RN: Tensor, before_RN: Tensor, gate_R1: Tensor) -> Tensor:
    """Return g w_c + (1 − g) w_{t−1}."""
    return gate_R1 * content_RN + (1 - gate_R1) * before_RN


def shift(weights_RN: Tensor, shift_RK: Tensor) -> Tensor:
    """Return the circular convolution of the weights with the shifts −⌊K/2⌋ … ⌊K/2⌋; +1 moves slot i to i + 1."""
    reach = shift_RK.shape[-1] // 2
    moved_RKN = torch.stack([weights_RN.roll(k, -1) for k in range(-reach, reach + 1)], -2)
    return (shift_RK[..., None, :] @ moved_RKN)[..., 0, :]


def sharpen(weights_RN: Tensor, power_R1: Tensor) -> Tensor:
    """Return w^γ / Σ w^γ as the softmax of γ log w, in which no power underflows. 1e-16 keeps log 0 finite."""
    return (power_R1 * (weights_RN + 1e-16).log()).softmax(-1)
