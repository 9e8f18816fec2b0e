"""theta as one flat vector: the layout of its tensors, buffers, and sums of vectors."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmeta.compute.vectors import ALIGN, BLOCK, Buffer, Layout, as_tensor, choose_edges
from distmeta.runtime.parameter_server import tree_sum

shapes = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=6)


def make_theta(shapes: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"model.{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}


@settings(deadline=None)
@given(shapes)
def test_vector_holds_theta_aligned_with_zeros_between(shapes: list[tuple[int, ...]]) -> None:
    theta = make_theta(shapes)
    layout = Layout.from_theta(theta)
    flat = layout.flatten(theta)
    assert layout.parameters == sum(value.numel() for value in theta.values())
    assert len(flat) == layout.size
    assert all(start % ALIGN == 0 for start, _ in layout.places)
    for found in (layout.views(torch.from_numpy(flat)), layout.unflatten(flat)):
        assert found.keys() == theta.keys()
        assert all(torch.equal(found[name], value) for name, value in theta.items())
    assert np.count_nonzero(flat) <= layout.parameters
    assert float(np.abs(flat).astype(np.float64).sum()) == pytest.approx(
        sum(float(value.double().abs().sum()) for value in theta.values())
    )


def test_views_share_memory_and_unflattened_tensors_do_not() -> None:
    layout = Layout.from_theta(make_theta([(3, 5), (2,)]))
    flat = torch.zeros(2 * layout.size)
    views = layout.views(flat[layout.size :])  # of a piece of a larger vector
    views["model.1"].fill_(1.0)
    assert flat[layout.size + ALIGN : layout.size + ALIGN + 2].tolist() == [1.0, 1.0]
    layout.unflatten(flat.numpy()[layout.size :])["model.0"].fill_(7.0)
    assert float(flat.sum()) == 2.0


def test_buffers_that_share_device_memory_have_their_own_vectors() -> None:
    """As on a GPU, which has one vector of theta's size for all shards."""
    layout = Layout.from_theta(make_theta([(3, 5), (2,)]))
    there = torch.zeros(layout.size)
    found = []
    for number, buffer in enumerate([Buffer(layout, there), Buffer(layout, there)]):
        for view in buffer.views.values():
            view.fill_(number + 1.0)
        buffer.fetch()
        found.append(buffer.vector)
    expected = layout.flatten({name: torch.ones_like(view) for name, view in layout.views(there).items()})
    assert np.array_equal(found[0], expected)
    assert np.array_equal(found[1], 2 * expected)


def test_aligned_vector_is_not_copied() -> None:
    memory = torch.arange(4.0 * ALIGN).numpy()
    memory.flags.writeable = False  # as Ray gives it
    for first, where in ((0, True), (ALIGN, True), (1, False)):
        tensor = as_tensor(memory[first:])
        assert (tensor.data_ptr() == memory[first:].ctypes.data) is where
        assert tensor.data_ptr() % (4 * ALIGN) == 0
        assert np.array_equal(tensor.numpy(), memory[first:])


@settings(deadline=None)
@given(shapes, st.integers(1, 4))
def test_spans_of_all_slices_cover_theta(shapes: list[tuple[int, ...]], pieces: int) -> None:
    theta = make_theta(shapes)
    layout = Layout.from_theta(theta)
    flat = layout.flatten(theta)
    seen = dict.fromkeys(theta, 0)
    for start, stop in pairwise(choose_edges(layout.size, pieces)):
        for name, first, last, at in layout.spans(start, stop):
            assert first == seen[name]
            assert np.array_equal(
                flat[start:stop][at : at + last - first], theta[name].flatten().numpy()[first:last]
            )
            seen[name] = last
    assert seen == {name: value.numel() for name, value in theta.items()}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_sum_is_that_of_the_binary_tree(count: int) -> None:
    draws = np.random.default_rng(0)
    vectors = [draws.standard_normal(BLOCK + 7).astype(np.float32) for _ in range(count)]

    def tree(parts: list[np.ndarray]) -> np.ndarray:
        while len(parts) > 1:
            pairs = [parts[i] + parts[i + 1] for i in range(0, len(parts) - 1, 2)]
            parts = pairs + parts[len(pairs) * 2 :]
        return parts[0]

    assert np.array_equal(tree_sum(vectors), tree(vectors))
