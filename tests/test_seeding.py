"""Every draw is a function of (seed, stream, step, task index), however many tasks are drawn at once."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from distmeta.seeding import task_generator, task_generators, task_ids, uniforms

ids = st.lists(st.integers(0, 2**64 - 1), max_size=5).map(lambda found: np.array(found, np.uint64))


@settings(deadline=None)
@given(ids, st.integers(0, 40), st.integers(0, 2**33))
def test_one_generator_set_anew_draws_what_a_tasks_own_does(ids: np.ndarray, count: int, part: int) -> None:
    own = [task_generator(task_id, part) for task_id in ids]
    assert np.array_equal(
        uniforms(ids, count, part), np.array([g.random(count) for g in own]).reshape(len(ids), count)
    )
    # what a generator keeps between calls, half of a 64-bit number, is not handed on to the next task
    halves = [g.integers(2**31, size=3, dtype=np.int32).tolist() for g in task_generators(ids, part)]
    assert halves == [
        task_generator(task_id, part).integers(2**31, size=3, dtype=np.int32).tolist() for task_id in ids
    ]


@settings(deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 10**6), st.integers(1, 40))
def test_a_longer_list_of_ids_starts_with_the_shorter_one(seed: int, step: int, count: int) -> None:
    whole = task_ids(seed, "train", step, 40)
    assert np.array_equal(task_ids(seed, "train", step, count), whole[:count])
    assert len(set(whole.tolist())) == 40
