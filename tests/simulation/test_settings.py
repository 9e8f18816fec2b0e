"""The texts in which a person describes a cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distmeta.errors import InputError
from distmeta.simulation.settings import Link, Stragglers, parse_latency, parse_workers


@settings(deadline=None)
@given(
    st.floats(0.001, 1e6),
    st.sampled_from(["bit", "kbit", "Mbit", "Gbit", "Tbit"]),
    st.sampled_from(["", "/s"]),
)
def test_links(number: float, unit: str, ending: str) -> None:
    exponent = {"bit": 0, "kbit": 3, "Mbit": 6, "Gbit": 9, "Tbit": 12}[unit]
    link = Link.parse(f"{number:f}{unit}{ending}")
    assert link.bytes_per_second == pytest.approx(float(f"{number:f}") * 10**exponent / 8)
    rounded = replace(link, bytes_per_second=float(f"{link.bytes_per_second:.3g}"))
    assert Link.parse(str(rounded)).bytes_per_second == pytest.approx(link.bytes_per_second, rel=0.01)


@settings(deadline=None)
@given(st.text(max_size=12))
def test_any_text_is_a_setting_or_an_input_error(text: str) -> None:
    for parse in (Link.parse, parse_latency, Stragglers.parse, parse_workers):
        try:
            value = parse(text)
        except InputError as error:
            assert str(error).startswith("--")  # noqa: PT017 - most texts are refused
        else:
            assert value is not None


@settings(deadline=None)
@given(st.floats(0, 1e5), st.sampled_from(["ns", "us", "µs", "ms", "s"]))
def test_latencies(number: float, unit: str) -> None:
    scale = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}[unit]
    assert parse_latency(f"{number:f}{unit}") == pytest.approx(float(f"{number:f}") * scale)


@settings(deadline=None)
@given(st.floats(0, 3))
def test_stragglers(sigma: float) -> None:
    assert Stragglers.parse(f"lognormal:{sigma:f}").sigma == float(f"{sigma:f}")
    assert Stragglers.parse("none") == Stragglers()


@settings(deadline=None)
@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=6))
def test_workers(counts: list[int]) -> None:
    assert parse_workers(", ".join(map(str, counts))) == tuple(sorted(set(counts)))
