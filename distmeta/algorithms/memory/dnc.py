"""The memory of the differentiable neural computer: Graves et al. 2016, Nature 538, 471–476, Methods.

Shapes: N slots, W numbers a slot, R read heads; any leading axes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distmeta.algorithms.memory.addressing import Memory, content


class DNC(NamedTuple):
    """The content, which slots are in use, where the heads were, and the order in which slots were written."""

    memory: Tensor
    """[..., N, W]."""
    usage: Tensor
    """[..., N], as write and precedence."""
    write: Tensor
    precedence: Tensor
    link: Tensor
    """[..., N, N]; [i, j]: slot i was written right after slot j."""
    read: Tensor
    """[..., R, N]."""


def dnc(slots: int, width: int, reads: int) -> Memory:
    """One write head that finds free slots or slots by content; read heads that go by content or by order of writing.

        u = (u_{t−1} + w − u_{t−1} ∘ w) ∘ Π_r (1 − f_r w_r),  w and w_r those of t − 1         usage
        a[φ_j] = (1 − u[φ_j]) Π_{i<j} u[φ_i],  φ sorting u ascending                           allocation
        w = g_w (g_a a + (1 − g_a) C(M_{t−1}, k_w, β_w))                                       write
        M_t = M_{t−1} ∘ (1 − w eᵀ) + w vᵀ
        L[i,j] = (1 − w[i] − w[j]) L_{t−1}[i,j] + w[i] p_{t−1}[j],  L[i,i] = 0                 links
        p = (1 − Σ_i w[i]) p_{t−1} + w                                                         precedence
        w_r = π₁ Lᵀ w_r,t−1 + π₂ C(M_t, k_r, β_r) + π₃ L w_r,t−1;  r = M_tᵀ w_r                read

    C = softmax(β cos), β = 1 + softplus, gates and e = σ, π = softmax of what the controller emits. The allocation's
    derivative takes the order φ as fixed.
    """
    sizes = [reads * width, reads, width, 1, width, width, reads, 1, 1, 3 * reads]

    def begin(like: Tensor) -> DNC:
        free_N = like.new_zeros(slots)
        memory_NW, link_NN = like.new_zeros(slots, width), like.new_zeros(slots, slots)
        return DNC(memory_NW, free_N, free_N, free_N, link_NN, like.new_zeros(reads, slots))

    def access(state: DNC, emitted: Tensor) -> tuple[DNC, Tensor]:
        keys, betas_R, key_W, beta_1, erase_W, write_W, free_R, allocate_1, gate_1, modes = emitted.split(
            sizes, -1
        )
        usage_N = used(state.usage, state.write, state.read, free_R.sigmoid())
        found_N = content(key_W[..., None, :], state.memory, oneplus(beta_1))[..., 0, :]
        allocate_1 = allocate_1.sigmoid()
        write_N = gate_1.sigmoid() * (allocate_1 * allocation(usage_N) + (1 - allocate_1) * found_N)
        write_N1 = write_N[..., None]
        kept_NW = 1 - write_N1 * erase_W.sigmoid()[..., None, :]
        memory_NW = state.memory * kept_NW + write_N1 * write_W[..., None, :]
        link_NN = linked(state.link, state.precedence, write_N)
        precedence_N = (1 - write_N.sum(-1, keepdim=True)) * state.precedence + write_N
        found_RN = content(keys.unflatten(-1, (reads, width)), memory_NW, oneplus(betas_R))
        back_R1, here_R1, on_R1 = modes.unflatten(-1, (3, reads)).softmax(-2)[..., None].unbind(-3)
        read_RN = back_R1 * (state.read @ link_NN) + here_R1 * found_RN + on_R1 * (state.read @ link_NN.mT)
        after = DNC(memory_NW, usage_N, write_N, precedence_N, link_NN, read_RN)
        return after, (read_RN @ memory_NW).flatten(-2)

    return Memory(sum(sizes), begin, access)


def oneplus(x: Tensor) -> Tensor:
    """1 + log(1 + eˣ)."""
    return 1 + F.softplus(x)


def used(usage_N: Tensor, write_N: Tensor, read_RN: Tensor, free_R: Tensor) -> Tensor:
    """How far each slot is in use, after the last write and after what its readers freed."""
    kept_N = torch.ones_like(usage_N)
    for freed_N in (free_R[..., None] * read_RN).unbind(-2):  # torch.prod's derivative looks at the data
        kept_N = kept_N * (1 - freed_N)
    return (usage_N + write_N - usage_N * write_N) * kept_N


def allocation(usage_N: Tensor) -> Tensor:
    """Where to write: on the least used slot, as far as it is free; then on the next."""
    ascending_N, order_N = usage_N.sort(dim=-1, stable=True)
    rank_N = order_N.argsort(-1)
    return ((1 - ascending_N) * product_before(ascending_N)).gather(-1, rank_N)


def product_before(x_N: Tensor) -> Tensor:
    """Π_{i<j} x[i], by doubling: products alone, whose derivatives exist at 0."""
    one_N = torch.ones_like(x_N)
    product_N, reach = torch.cat([one_N[..., :1], x_N[..., :-1]], -1), 1
    while reach < x_N.shape[-1]:
        product_N = product_N * torch.cat([one_N[..., :reach], product_N[..., :-reach]], -1)
        reach *= 2
    return product_N


def linked(link_NN: Tensor, precedence_N: Tensor, write_N: Tensor) -> Tensor:
    """The links after a write."""
    row_N1, column_1N = write_N[..., None], write_N[..., None, :]
    link_NN = (1 - row_N1 - column_1N) * link_NN + row_N1 * precedence_N[..., None, :]
    return link_NN * (1 - torch.eye(link_NN.shape[-1], dtype=link_NN.dtype, device=link_NN.device))
