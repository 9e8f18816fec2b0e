"""The memories, compared with their papers' formulas by hand or in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from distmeta.algorithms.memory import dnc as memory_dnc
from distmeta.algorithms.memory import lrua as memory_lrua
from distmeta.algorithms.memory import ntm as memory_ntm
from distmeta.algorithms.memory.addressing import address_by_content, cosine_similarity
from distmeta.algorithms.memory.mann import build_memory
from distmeta.trees import tree_leaves, tree_map

DOUBLE = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def cosine(k: np.ndarray, m: np.ndarray) -> float:
    return float(k @ m / np.sqrt((k @ k + 1e-6) * (m @ m + 1e-6)))


# content


def test_content_addressing_is_the_softmax_of_the_cosine() -> None:
    keys = random(3, 4)
    memory = random(6, 4, seed=1)
    strength = random(3, seed=2).exp()
    expected = (
        strength[:, None] * torch.nn.functional.cosine_similarity(keys[:, None], memory[None], dim=-1)
    ).softmax(-1)
    torch.testing.assert_close(address_by_content(keys, memory, strength), expected, rtol=1e-5, atol=0)


def test_empty_slot_has_similarity_0_and_a_finite_gradient() -> None:
    keys = random(2, 4).requires_grad_()
    memory = torch.zeros(3, 4, dtype=DOUBLE, requires_grad=True)
    similarity = cosine_similarity(keys, memory)
    assert not similarity.any()
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(similarity.sum(), (keys, memory)))


# lrua


def test_lrua_matches_computation_by_hand() -> None:
    """Three slots and one head: which slot is written, which is zeroed, and all weights, worked out on paper."""
    memory = build_memory("lrua", 3, 2, 1, 0.5, 1)
    state = memory.begin(torch.zeros(1, dtype=DOUBLE))
    key = torch.tensor([0.6, 0.8], dtype=DOUBLE)
    alpha = torch.zeros(1, dtype=DOUBLE)  # σ(0) = ½
    emitted = torch.cat([key.atanh(), alpha])
    # 1: no slot was used, so the first is written; nothing was read before: w_w = ½ (1, 0, 0), M = (½k, 0, 0).
    state, read = memory.access(state, emitted)
    weights = softmax(np.array([1.0, 0.0, 0.0]))
    torch.testing.assert_close(state.memory[0], 0.5 * key)
    assert not state.memory[1:].any()
    np.testing.assert_allclose(state.read[0], weights, atol=1e-5)  # ε of the cosine
    np.testing.assert_allclose(read, weights[0] * 0.5 * key, atol=1e-5)
    np.testing.assert_allclose(state.usage, weights + np.array([0.5, 0, 0]), atol=1e-5)
    # 2: the second slot is the least used: w_w = ½ w_r + ½ (0, 1, 0). The key is turned by 90°.
    turned = torch.tensor([-0.8, 0.6], dtype=DOUBLE)
    before = state
    state, read = memory.access(state, torch.cat([turned.atanh(), alpha]))
    write = 0.5 * before.read[0] + torch.tensor([0.0, 0.5, 0.0], dtype=DOUBLE)
    torch.testing.assert_close(state.memory, before.memory + write[:, None] * turned)
    # Slot 1 holds ½ of the old key and, at a right angle, `part` of the new one. Slots 2 and 3 hold only the new one.
    part = float(write[0])
    similarity = np.array([part / np.hypot(0.5, part), 1.0, 1.0])
    np.testing.assert_allclose(state.read[0], softmax(similarity), atol=1e-4)
    np.testing.assert_allclose(state.usage, 0.5 * before.usage + state.read[0] + write, atol=1e-12)
    # 3: a large α overwrites the slot that was read last. The third slot, the least used, is zeroed nevertheless.
    before = state
    assert before.usage.argmin() == 2
    state, _ = memory.access(state, torch.cat([key.atanh(), alpha + 100]))
    cleared = before.memory * torch.tensor([[1.0], [1.0], [0.0]], dtype=DOUBLE)
    torch.testing.assert_close(state.memory, cleared + before.read[0][:, None] * key)


def test_lrua_gives_every_head_another_slot() -> None:
    usage = torch.tensor([0.3, 0.0, 0.2, 0.0])
    expected = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
    assert torch.equal(memory_lrua.find_least_used(usage, 3), expected)
    memory = build_memory("lrua", 4, 2, 2, 0.9, 1)
    # two keys, and two alphas that write only to the least used slot
    emitted = torch.tensor([1.0, 0.0, 0.0, -1.0, -100.0, -100.0], dtype=DOUBLE)
    state, _ = memory.access(memory.begin(torch.zeros(1, dtype=DOUBLE)), emitted)
    written = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.0, 0.0], [0.0, 0.0]], dtype=DOUBLE).tanh()
    torch.testing.assert_close(state.memory, written)


# ntm


def test_ntm_shift_is_circular() -> None:
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=DOUBLE)
    for shift, expected in (
        ([0.0, 1.0, 0.0], [0.1, 0.2, 0.3, 0.4]),
        ([0.0, 0.0, 1.0], [0.4, 0.1, 0.2, 0.3]),
        ([1.0, 0.0, 0.0], [0.2, 0.3, 0.4, 0.1]),
        ([0.5, 0.0, 0.5], [0.3, 0.2, 0.3, 0.2]),
    ):
        moved = memory_ntm.shift(weights, torch.tensor([shift], dtype=DOUBLE))
        torch.testing.assert_close(moved, torch.tensor([expected], dtype=DOUBLE))
    two = memory_ntm.shift(weights, torch.tensor([[0.0, 0, 0, 0, 1]], dtype=DOUBLE))
    torch.testing.assert_close(two, torch.tensor([[0.3, 0.4, 0.1, 0.2]], dtype=DOUBLE))


def test_ntm_sharpening_and_interpolation() -> None:
    weights = torch.tensor([[0.5, 0.3, 0.2, 0.0]], dtype=DOUBLE)
    sharp = memory_ntm.sharpen(weights, torch.tensor([[3.0]], dtype=DOUBLE))
    torch.testing.assert_close(sharp, weights**3 / (weights**3).sum())
    same = memory_ntm.sharpen(weights, torch.ones(1, 1, dtype=DOUBLE))
    torch.testing.assert_close(same, weights)
    uniform = memory_ntm.sharpen(torch.full((1, 128), 1 / 128), torch.tensor([[60.0]]))
    torch.testing.assert_close(uniform, torch.full((1, 128), 1 / 128))  # (1/128)^60 underflows in float32
    before = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=DOUBLE)
    mixed = memory_ntm.interpolate(weights, before, torch.tensor([[0.25]], dtype=DOUBLE))
    torch.testing.assert_close(mixed, torch.tensor([[0.125, 0.075, 0.05, 0.75]], dtype=DOUBLE))


def test_ntm_access_equals_the_equations_of_the_paper() -> None:
    """Equations 2 to 9 in plain numpy, for three accesses."""
    slots = 5
    width = 3
    reads = 2
    memory = build_memory("ntm", slots, width, reads, 0.95, 1)
    state = memory.begin(torch.zeros(1, dtype=DOUBLE))
    content_NW = np.full((slots, width), 1e-6)
    heads = [np.eye(slots)[0] for _ in range(reads + 1)]
    size = width + 6

    def address(e: np.ndarray, m: np.ndarray, before: np.ndarray) -> np.ndarray:
        key = np.tanh(e[:width])
        beta = np.log1p(np.exp(e[width]))
        gate = sigmoid(e[width + 1])
        power = 1 + np.log1p(np.exp(e[width + 2]))
        shift = softmax(e[width + 3 :])
        w = gate * softmax(beta * np.array([cosine(key, row) for row in m])) + (1 - gate) * before
        moved = np.array(
            [sum(w[j] * shift[1 + d] for j in range(slots) for d in (-1, 0, 1) if (j + d) % slots == i)
             for i in range(slots)]
        )  # fmt: skip
        return moved**power / (moved**power).sum()

    for t in range(3):
        emitted = random(memory.emitted_size, seed=t)
        state, read = memory.access(state, emitted)
        e = emitted.numpy()
        write = e[reads * size : (reads + 1) * size]
        erase = e[-2 * width : -width]
        add = e[-width:]
        heads[reads] = address(write, content_NW, heads[reads])
        column = heads[reads][:, None]
        content_NW = content_NW * (1 - column * sigmoid(erase)) + column * np.tanh(add)
        for r in range(reads):
            heads[r] = address(e[r * size : (r + 1) * size], content_NW, heads[r])
        theirs = np.concatenate([heads[r] @ content_NW for r in range(reads)])
        np.testing.assert_allclose(read.numpy(), theirs, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(state.memory.numpy(), content_NW, rtol=1e-9, atol=1e-12)


# dnc


def allocate_by_formula(usage: np.ndarray) -> np.ndarray:
    order = np.argsort(usage, kind="stable")
    a = np.zeros_like(usage)
    for j, slot in enumerate(order):
        a[slot] = (1 - usage[slot]) * np.prod([usage[i] for i in order[:j]])
    return a


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slots", [1, 2, 5, 16])
def test_dnc_allocation_equals_the_formula_of_the_paper(slots: int, seed: int) -> None:
    usage = np.random.default_rng(seed).random(slots)
    usage[usage < 0.2] = 0.0  # for an unused slot the product is 0
    usage[usage > 0.9] = 1.0
    result = memory_dnc.compute_allocation(torch.from_numpy(usage))
    np.testing.assert_allclose(result.numpy(), allocate_by_formula(usage), rtol=1e-12, atol=1e-15)


def test_dnc_allocation_has_the_derivative_of_its_formula() -> None:
    usage = torch.tensor([0.4, 0.0, 0.9, 0.3], dtype=DOUBLE, requires_grad=True)
    torch.autograd.gradcheck(memory_dnc.compute_allocation, (usage[None].expand(2, -1) + 0.05,))
    (gradient,) = torch.autograd.grad(memory_dnc.compute_allocation(usage)[3], usage)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.7, 0.0, 0.0], dtype=DOUBLE))  # (1 − u₃) u₁


def test_dnc_links_follow_the_order_of_writing() -> None:
    link = torch.zeros(4, 4)
    precedence = torch.zeros(4)
    for slot in (2, 0, 3):
        write = torch.eye(4)[slot]
        link = memory_dnc.update_links(link, precedence, write)
        precedence = write
    expected = torch.zeros(4, 4)
    expected[0, 2] = 1
    expected[3, 0] = 1
    torch.testing.assert_close(link, expected)
    # Slot 2 is written again, so the link to what followed it is lost.
    link = memory_dnc.update_links(link, precedence, torch.eye(4)[2])
    expected[0, 2] = 0
    expected[2, 3] = 1
    torch.testing.assert_close(link, expected)


def test_dnc_usage_after_a_write_and_a_freed_slot() -> None:
    usage = torch.tensor([0.5, 0.0, 1.0])
    write = torch.tensor([0.5, 0.2, 0.0])
    read = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    result = memory_dnc.update_usage(usage, write, read, torch.tensor([0.75, 0.0]))
    torch.testing.assert_close(result, torch.tensor([0.75, 0.2, 0.25]))


def test_dnc_access_equals_the_equations_of_the_paper() -> None:
    """The equations of the Methods in plain numpy, for four accesses."""
    slots = 4
    width = 3
    reads = 2
    memory = build_memory("dnc", slots, width, reads, 0.95, 1)
    state = memory.begin(torch.zeros(1, dtype=DOUBLE))
    m = np.zeros((slots, width))
    usage = np.zeros(slots)
    write = np.zeros(slots)
    precedence = np.zeros(slots)
    link = np.zeros((slots, slots))
    heads = np.zeros((reads, slots))

    def address(key: np.ndarray, beta: float) -> np.ndarray:
        return softmax((1 + np.log1p(np.exp(beta))) * np.array([cosine(key, row) for row in m]))

    for t in range(4):
        emitted = random(memory.emitted_size, seed=10 + t)
        state, read = memory.access(state, emitted)
        cuts = np.cumsum([reads * width, reads, width, 1, width, width, reads, 1, 1])
        keys, betas, key, beta, erase, add, free, allocate, gate, modes = np.split(emitted.numpy(), cuts)
        usage = usage + write - usage * write
        for r in range(reads):
            usage = usage * (1 - sigmoid(free[r]) * heads[r])
        allocate = sigmoid(allocate)
        write = sigmoid(gate) * (
            allocate * allocate_by_formula(usage) + (1 - allocate) * address(key, beta[0])
        )
        m = m * (1 - np.outer(write, sigmoid(erase))) + np.outer(write, add)
        for i in range(slots):
            for j in range(slots):
                moved = (1 - write[i] - write[j]) * link[i, j] + write[i] * precedence[j]
                link[i, j] = 0 if i == j else moved
        precedence = (1 - write.sum()) * precedence + write
        mode = softmax(modes.reshape(3, reads), 0)
        heads = np.stack(
            [
                mode[0, r] * link.T @ heads[r]
                + mode[1, r] * address(keys[r * width : (r + 1) * width], betas[r])
                + mode[2, r] * link @ heads[r]
                for r in range(reads)
            ]
        )
        np.testing.assert_allclose(read.numpy(), (heads @ m).ravel(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(state.link.numpy(), link, rtol=1e-9, atol=1e-12)


# all memories


@pytest.mark.parametrize("kind", ["lrua", "ntm", "dnc"])
def test_batch_of_memories_equals_one_memory_at_a_time(kind: str) -> None:
    memory = build_memory(kind, 6, 4, 2, 0.9, 1)
    empty = memory.begin(torch.zeros(1, dtype=DOUBLE))
    states = tree_map(lambda leaf: leaf.expand(3, *leaf.shape), empty)
    emitted = random(2, 3, memory.emitted_size)
    for e in emitted:
        states, together = memory.access(states, e)
    for n in range(3):
        state = empty
        for e in emitted:
            state, alone = memory.access(state, e[n])
        torch.testing.assert_close(together[n], alone)
        for batched, single in zip(tree_leaves(states), tree_leaves(state), strict=True):
            torch.testing.assert_close(batched[n], single)
