"""The memory with least recently used access: Santoro et al. 2016, arXiv 1605.06065, §3.2.

Shapes: N slots, W numbers a slot, R heads; any leading axes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distmeta.algorithms.memory.addressing import Memory, cosine


class LRUA(NamedTuple):
    """The content, what the heads read last, and how much each slot was in use lately."""

    memory: Tensor
    """[..., N, W]."""
    read: Tensor
    """[..., R, N]."""
    usage: Tensor
    """[..., N]."""


def lrua(slots: int, width: int, reads: int, decay: float) -> Memory:
    """Heads that write over the slot they read last, or over the one that is least in use; and read by content.

        w_w = σ(α) w_r,t−1 + (1 − σ(α)) w_lu,t−1                             write                        (eq. 7)
        M_t(i) = M_{t−1}(i) + w_w(i) k, the least used slot set to zero before                           (eq. 8)
        w_r = softmax_i cos(k, M_t(i)),  r = Σ_i w_r(i) M_t(i)               read                   (eqs. 2 to 4)
        w_u = γ w_u,t−1 + w_r + w_w                                          usage                        (eq. 5)

    The controller emits k, by way of tanh, and α. w_u orders the slots and takes no part in the gradient. The paper
    writes all this for one head: here each has its own k and α, all add to w_u, and of the R slots that are least in
    use (eq. 6) head h has the h-th for itself, as in a reproduction (tristandeleu/ntm-one-shot).
    """

    def begin(like: Tensor) -> LRUA:
        return LRUA(like.new_zeros(slots, width), like.new_zeros(reads, slots), like.new_zeros(slots))

    def access(state: LRUA, emitted: Tensor) -> tuple[LRUA, Tensor]:
        keys, alphas_R = emitted.split([reads * width, reads], -1)
        keys_RW, again_R1 = keys.unflatten(-1, (reads, width)).tanh(), alphas_R.sigmoid()[..., None]
        least_RN = least_used(state.usage, reads)
        write_RN = again_R1 * state.read + (1 - again_R1) * least_RN
        kept_N1 = 1 - least_RN.sum(-2)[..., None]
        memory_NW = kept_N1 * state.memory + write_RN.mT @ keys_RW
        read_RN = cosine(keys_RW, memory_NW).softmax(-1)
        usage_N = decay * state.usage + (read_RN + write_RN).sum(-2).detach()
        return LRUA(memory_NW, read_RN, usage_N), (read_RN @ memory_NW).flatten(-2)

    return Memory(reads * (width + 1), begin, access)


def least_used(usage_N: Tensor, count: int) -> Tensor:
    """The `count` slots least in use, one-hot [count, N], the least first; of equals the first."""
    slot_R1 = usage_N.argsort(dim=-1, stable=True)[..., :count, None]
    return (slot_R1 == torch.arange(usage_N.shape[-1], device=usage_N.device)).to(usage_N.dtype)
