"""The training loop's small decisions. Whole runs are tested in the other files of this folder."""

from __future__ import annotations

from distmeta.runtime.loop import is_spike


def test_spike_stands_out_from_the_losses_before_it() -> None:
    losses = [1.0, 1.2, 0.8, 1.1] * 5
    assert not is_spike(100.0, losses[:19]), "too few to compare with"
    assert not is_spike(2.0, losses)
    assert is_spike(2.6, losses)
    assert not is_spike(0.0, losses)
    assert not is_spike(1.9e-6, [1e-6] * 20), "small numbers that hardly move"
    assert not is_spike(-5.0, [-10.0 + 0.1 * k for k in range(20)]), "negative losses: returns"
    assert is_spike(5.0, [-10.0 + 0.1 * k for k in range(20)])
