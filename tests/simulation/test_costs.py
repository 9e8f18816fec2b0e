"""Curves of measured costs."""

from __future__ import annotations

import math

import pytest

from distmeta.simulation.costs import CostCurve


def test_curves() -> None:
    curve = CostCurve(((10.0, 1.0), (20.0, 2.0), (40.0, 2.5)))
    assert [curve(size) for size in (10, 15, 30, 40, 80)] == pytest.approx([1.0, 1.5, 2.25, 2.5, 3.5])
    assert curve(0) == 0.0
    assert curve(-1e9) == 0.0  # never below
    assert CostCurve(((5.0, 3.0),))(1e9) == 3.0
    assert math.isclose(CostCurve(((0.0, 1.0), (1.0, 0.0)))(9.0), 0.0)
    with pytest.raises(ValueError, match="rising"):
        CostCurve(((2.0, 1.0), (1.0, 2.0)))
