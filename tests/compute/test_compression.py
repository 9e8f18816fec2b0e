"""Compressed vectors: error bounds, no bias, numbers that are not finite, and pieces."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distmeta.compute.compression import GROUP, LEVELS, Coded, cut, decode, encode
from distmeta.compute.vectors import BLOCK


def vector(seed: int, size: int) -> np.ndarray:
    draws = np.random.default_rng(seed)
    return (draws.standard_normal(size) * 10.0 ** draws.integers(-6, 6, size)).astype(np.float32)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 3 * GROUP), st.sampled_from(["nearest", "random"]))
def test_errors_stay_below_their_bounds(seed: int, size: int, rounding: str) -> None:
    x = vector(seed, size)
    draws = np.random.default_rng(seed) if rounding == "random" else None
    assert np.array_equal(decode(encode(x, "none")), x)
    assert (np.abs(decode(encode(x, "bf16")) - x) <= 2.0**-8 * np.abs(x)).all()
    largest = np.concatenate(
        [np.full(len(x[i : i + GROUP]), np.abs(x[i : i + GROUP]).max()) for i in range(0, size, GROUP)]
    )
    bound = largest / LEVELS * (1.0 if draws is not None else 0.5) * (1 + 1e-5)
    assert (np.abs(decode(encode(x, "int8", draws)) - x) <= bound).all()


def test_random_rounding_has_no_bias() -> None:
    x = np.linspace(-1, 1, 501, dtype=np.float32)
    rounds = [decode(encode(x, "int8", np.random.default_rng(k))) for k in range(400)]
    assert np.abs(np.mean(rounds, 0) - x).max() < 5 * 0.5 / LEVELS / np.sqrt(400)


@pytest.mark.parametrize("how", ["bf16", "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_stay_so(how: str, bad: float) -> None:
    x = np.ones(3 * GROUP, np.float32)
    x[GROUP] = bad
    found = decode(encode(x, how, np.random.default_rng(0)))
    assert not np.isfinite(found[GROUP])
    assert np.allclose(np.delete(found, slice(GROUP, 2 * GROUP)), 1)


@pytest.mark.parametrize("how", ["none", "bf16", "int8"])
def test_pieces_decode_like_the_whole(how: str) -> None:
    x = vector(3, 2 * BLOCK + 77)
    coded = encode(x, how, np.random.default_rng(1))
    parts = cut(coded, [0, BLOCK, 2 * BLOCK, len(x)])
    assert [len(decode(part)) for part in parts] == [BLOCK, BLOCK, 77]
    assert np.array_equal(np.concatenate([decode(part) for part in parts]), decode(coded))
    sent = coded.nbytes if isinstance(coded, np.ndarray) else sum(a.nbytes for a in coded if a is not None)
    assert sent <= len(x) * {"none": 4, "bf16": 2, "int8": 1.01}[how]
    assert isinstance(coded, np.ndarray if how == "none" else Coded)
