"""The memory of the differentiable neural computer: Graves et al. 2016, Nature 538, 471–476, Methods.

Shapes: N slots, W numbers per slot, R read heads; any leading axes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distmeta.algorithms.memory.addressing import Memory, address_by_content


class DNCState(NamedTuple):
    memory: Tensor
    """[..., N, W]."""
    usage: Tensor
    """How much each slot is in use, [..., N]."""
    write: Tensor
    """The last write weights, [..., N]."""
    precedence: Tensor
    """How much each slot was the last one written to, [..., N]."""
    link: Tensor
    """[..., N, N]; [i, j]: slot i was written right after slot j."""
    read: Tensor
    """The last read weights, [..., R, N]."""


def build_dnc(slots: int, width: int, reads: int) -> Memory:
    """Build a memory whose write head finds free slots or slots by content, and whose read heads also follow the order
    of writing.

        u = (u_{t−1} + w − u_{t−1} ∘ w) ∘ Π_r (1 − f_r w_r),  w and w_r those of t − 1         usage
        a[φ_j] = (1 − u[φ_j]) Π_{i<j} u[φ_i],  φ sorting u ascending                           allocation
        w = g_w (g_a a + (1 − g_a) C(M_{t−1}, k_w, β_w))                                       write
        M_t = M_{t−1} ∘ (1 − w eᵀ) + w vᵀ
        L[i,j] = (1 − w[i] − w[j]) L_{t−1}[i,j] + w[i] p_{t−1}[j],  L[i,i] = 0                 links
        p = (1 − Σ_i w[i]) p_{t−1} + w                                                         precedence
        w_r = π₁ Lᵀ w_r,t−1 + π₂ C(M_t, k_r, β_r) + π₃ L w_r,t−1;  r = M_tᵀ w_r                read

    C = softmax(β cos). The controller's numbers become β by oneplus, gates and e by σ, and π by softmax. The derivative
    of the allocation takes the order φ as fixed.
    """
    sizes = [reads * width, reads, width, 1, width, width, reads, 1, 1, 3 * reads]

    def begin(like: Tensor) -> DNCState:
        zeros_N = like.new_zeros(slots)
        return DNCState(
            memory=like.new_zeros(slots, width),
            usage=zeros_N,
            write=zeros_N,
            precedence=zeros_N,
            link=like.new_zeros(slots, slots),
            read=like.new_zeros(reads, slots),
        )

    def access(state: DNCState, emitted: Tensor) -> tuple[DNCState, Tensor]:
        (
            read_keys, read_strengths_R, write_key_W, write_strength_1, erase_W, write_W,
            free_R, allocation_gate_1, write_gate_1, read_modes,
        ) = emitted.split(sizes, -1)  # fmt: skip
        usage_N = update_usage(state.usage, state.write, state.read, free_R.sigmoid())
        write_key_1W = write_key_W[..., None, :]
        content_N = address_by_content(write_key_1W, state.memory, oneplus(write_strength_1))[..., 0, :]
        allocation_gate_1 = allocation_gate_1.sigmoid()
        write_N = write_gate_1.sigmoid() * (
            allocation_gate_1 * compute_allocation(usage_N) + (1 - allocation_gate_1) * content_N
        )
        write_N1 = write_N[..., None]
        keep_NW = 1 - write_N1 * erase_W.sigmoid()[..., None, :]
        memory_NW = state.memory * keep_NW + write_N1 * write_W[..., None, :]
        link_NN = update_links(state.link, state.precedence, write_N)
        precedence_N = (1 - write_N.sum(-1, keepdim=True)) * state.precedence + write_N
        read_keys_RW = read_keys.unflatten(-1, (reads, width))
        content_RN = address_by_content(read_keys_RW, memory_NW, oneplus(read_strengths_R))
        modes = read_modes.unflatten(-1, (3, reads)).softmax(-2)[..., None]
        backward_R1, content_R1, forward_R1 = modes.unbind(-3)
        read_RN = (
            backward_R1 * (state.read @ link_NN)
            + content_R1 * content_RN
            + forward_R1 * (state.read @ link_NN.mT)
        )
        after = DNCState(memory_NW, usage_N, write_N, precedence_N, link_NN, read_RN)
        return after, (read_RN @ memory_NW).flatten(-2)

    return Memory(sum(sizes), begin, access)


def oneplus(x: Tensor) -> Tensor:
    """Return 1 + log(1 + eˣ)."""
    return 1 + F.softplus(x)


def update_usage(usage_N: Tensor, write_N: Tensor, read_RN: Tensor, free_R: Tensor) -> Tensor:
    """Return the usage after the last write and after the read heads freed slots."""
    retention_N = torch.ones_like(usage_N)
    # One factor at a time, because the derivative of torch.prod depends on whether the data contain zeros.
    for freed_N in (free_R[..., None] * read_RN).unbind(-2):
        retention_N = retention_N * (1 - freed_N)
    return (usage_N + write_N - usage_N * write_N) * retention_N


def compute_allocation(usage_N: Tensor) -> Tensor:
    """Return write weights over the slots: the least used slot first, as far as it is free, then the next one."""
    ascending_N, order_N = usage_N.sort(dim=-1, stable=True)
    rank_N = order_N.argsort(-1)
    return ((1 - ascending_N) * exclusive_product(ascending_N)).gather(-1, rank_N)


def exclusive_product(x_N: Tensor) -> Tensor:
    """Return Π_{i<j} x[i] by doubling. It uses only products, whose derivatives exist at 0."""
    ones_N = torch.ones_like(x_N)
    product_N = torch.cat([ones_N[..., :1], x_N[..., :-1]], -1)
    reach = 1
    while reach < x_N.shape[-1]:
        product_N = product_N * torch.cat([ones_N[..., :reach], product_N[..., :-reach]], -1)
        reach *= 2
    return product_N


def update_links(link_NN: Tensor, precedence_N: Tensor, write_N: Tensor) -> Tensor:
    """Return the links after a write."""
    write_N1 = write_N[..., None]
    write_1N = write_N[..., None, :]
    link_NN = (1 - write_N1 - write_1N) * link_NN + write_N1 * precedence_N[..., None, :]
    return link_NN * (1 - torch.eye(link_NN.shape[-1], dtype=link_NN.dtype, device=link_NN.device))
