"""Sinusoids and lines: the papers' functions, and draws that depend only on the id."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmeta.errors import InputError
from distmeta.protocols import Batch, TaskFamily
from distmeta.seeding import task_ids
from distmeta.tasks.regression import Linear, Sinusoid


@pytest.mark.parametrize("family", [Sinusoid(shots=5, queries=7), Linear(shots=5, queries=7)])
def test_episodes_have_the_declared_shapes(family):
    episode = family.draw("train", task_ids(0, "train", 0, 4))
    assert isinstance(family, TaskFamily)
    assert episode.support.x.shape == episode.support.y.shape == (4, 5, 1)
    assert episode.query.x.shape == episode.query.y.shape == (4, 7, 1)
    assert all(leaf.dtype == torch.float32 and leaf.is_contiguous() for part in episode for leaf in part)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**64 - 1))
def test_sinusoid_has_an_amplitude_and_phase_in_range(task_id):
    episode = Sinusoid(shots=10, queries=10).draw("train", np.array([task_id], np.uint64))
    x, y = (torch.cat(leaves, 1)[0, :, 0].double() for leaves in zip(*episode, strict=True))
    design = torch.stack([x.sin(), x.cos()], 1)  # A sin(x − b) = (A cos b) sin x − (A sin b) cos x
    a, c = torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    assert torch.allclose(design @ torch.stack([a, c]), y, atol=1e-4)
    assert 0.1 - 1e-3 <= math.hypot(a, c) <= 5 + 1e-3
    assert -1e-3 <= math.atan2(-c, a) <= math.pi + 1e-3
    assert x.abs().max() <= 5


def test_line_has_its_slope_and_offset():
    family = Linear(shots=3, queries=3, slope=[2, 2], offset=[-1, -1])
    episode = family.draw("test", task_ids(0, "test", 0, 3))
    torch.testing.assert_close(episode.query.y, 2 * episode.query.x - 1)


@pytest.mark.parametrize("family", [Sinusoid(), Linear()])
def test_task_depends_only_on_its_id(family):
    ids = task_ids(0, "train", 3, 6)
    together = family.draw("train", ids)
    alone = family.draw("train", ids[4:5])
    for whole, part in zip(together, alone, strict=True):
        assert torch.equal(whole.x[4:5], part.x)
        assert torch.equal(whole.y[4:5], part.y)
    other = family.draw("val", task_ids(0, "val", 3, 6))
    assert not torch.equal(other.support.x, together.support.x)


def test_evaluation_has_its_own_sizes():
    family = Sinusoid(shots=5, queries=6, eval_shots=2, eval_queries=9)
    for split, sizes in {"train": (5, 6), "val": (2, 9), "test": (2, 9)}.items():
        episode = family.draw(split, task_ids(0, split, 0, 1))
        assert (episode.support.x.shape[1], episode.query.x.shape[1]) == sizes


def test_score_is_the_mean_squared_error():
    batch = Batch(torch.zeros(3, 1), torch.tensor([[1.0], [2.0], [3.0]]))
    for family in (Sinusoid(), Linear()):
        loss, metrics = family.score(torch.zeros(3, 1), batch)
        assert loss.item() == pytest.approx(14 / 3)
        assert metrics == {}


def test_wrong_options_are_refused():
    with pytest.raises(InputError, match=r"tasks\.amplitude: got \[2, 1\]"):
        Sinusoid(amplitude=[2, 1])
    with pytest.raises(InputError, match=r"tasks\.slope"):
        Linear(slope=[0, math.inf])
    with pytest.raises(InputError, match=r"tasks\.eval_shots: got 0"):
        Sinusoid(eval_shots=0)
