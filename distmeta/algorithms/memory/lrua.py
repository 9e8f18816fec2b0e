"""The memory with least recently used access: Santoro et al. 2016, arXiv 1605.06065, §3.2.

Shapes: N slots, W numbers per slot, R heads; any leading axes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distmeta.algorithms.memory.addressing import Memory, cosine_similarity


class LRUAState(NamedTuple):
    memory: Tensor
    """[..., N, W]."""
    read: Tensor
    """The last read weights, [..., R, N]."""
    usage: Tensor
    """How much each slot was used lately, [..., N]."""


def build_lrua(slots: int, width: int, reads: int, decay: float) -> Memory:
    """Build a memory whose heads overwrite the slot they read last or the least used one, and read by content.

        w_w = σ(α) w_r,t−1 + (1 − σ(α)) w_lu,t−1                             write                        (eq. 7)
        M_t(i) = M_{t−1}(i) + w_w(i) k, the least used slot set to zero before                           (eq. 8)
        w_r = softmax_i cos(k, M_t(i)),  r = Σ_i w_r(i) M_t(i)               read                   (eqs. 2 to 4)
        w_u = γ w_u,t−1 + w_r + w_w                                          usage                        (eq. 5)

    The controller emits k (through tanh) and α. The usage w_u only orders the slots; no gradient goes through it.

    Deviation: the paper describes one head. Here each head has its own k and α, all add to w_u, and head h has the
    h-th of the R least used slots (eq. 6), as in a reproduction (tristandeleu/ntm-one-shot).

    Args:
        decay: γ in [0, 1].
    """

    def begin(like: Tensor) -> LRUAState:
        return LRUAState(like.new_zeros(slots, width), like.new_zeros(reads, slots), like.new_zeros(slots))

    def access(state: LRUAState, emitted: Tensor) -> tuple[LRUAState, Tensor]:
        keys, alphas_R = emitted.split([reads * width, reads], -1)
        keys_RW = keys.unflatten(-1, (reads, width)).tanh()
        gate_R1 = alphas_R.sigmoid()[..., None]
        least_used_RN = find_least_used(state.usage, reads)
        write_RN = gate_R1 * state.read + (1 - gate_R1) * least_used_RN
        keep_N1 = 1 - least_used_RN.sum(-2)[..., None]
        memory_NW = keep_N1 * state.memory + write_RN.mT @ keys_RW
        read_RN = cosine_similarity(keys_RW, memory_NW).softmax(-1)
        usage_N = decay * state.usage + (read_RN + write_RN).sum(-2).detach()
        return LRUAState(memory_NW, read_RN, usage_N), (read_RN @ memory_NW).flatten(-2)

    return Memory(reads * (width + 1), begin, access)


def find_least_used(usage_N: Tensor, count: int) -> Tensor:
    """Return the `count` least used slots, one-hot [count, N], the least used first. Ties: the lower index first."""
    slot_R1 = usage_N.argsort(dim=-1, stable=True)[..., :count, None]
    return (slot_R1 == torch.arange(usage_N.shape[-1], device=usage_N.device)).to(usage_N.dtype)
