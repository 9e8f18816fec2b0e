"""Every draw is a function of (seed, stream, step, task index), however many tasks are drawn at once."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from distmeta.seeding import STREAMS, draw_uniforms, task_generator, task_ids, torch_seed

ids = st.lists(
    st.integers(0, 2**64 - 1) | st.integers(2**64 - 3, 2**64 - 1) | st.integers(0, 3), max_size=8
).map(lambda found: np.array(found, np.uint64))


@settings(deadline=None)
@given(ids, st.integers(0, 40), st.integers(0, 2**33))
def test_draws_of_a_task_do_not_depend_on_the_other_tasks(ids: np.ndarray, count: int, part: int) -> None:
    together = draw_uniforms(ids, count, part)
    assert together.shape == (len(ids), count)
    for row, task_id in zip(together, ids, strict=True):
        assert np.array_equal(draw_uniforms([task_id], count, part)[0], row)


@settings(deadline=None)
@given(st.integers(0, 2**64 - 10), st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**33))
def test_consecutive_tasks_are_consecutive_blocks_of_philox(
    first: int, tasks: int, count: int, part: int
) -> None:
    """Salmon et al. 2011: a block is a function of counter and key. numpy counts up before it draws."""
    blocks = -(-count // 4)
    rows = draw_uniforms([first + i for i in range(tasks)], count, part)
    for i, row in enumerate(rows):
        for b in range(blocks):
            philox = np.random.Philox(key=0)
            philox.state = philox.state | {
                "state": {
                    "counter": _words((first + i) * blocks + b, 4),
                    "key": np.array([blocks, part + 2**63], np.uint64),
                }
            }
            block = np.random.Generator(philox).random(4)
            assert np.array_equal(row[4 * b : 4 * b + 4], block[: count - 4 * b])


def _words(number: int, count: int) -> np.ndarray:
    return np.array([number >> 64 * i & 2**64 - 1 for i in range(count)], np.uint64)


@settings(deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 2**36 - 1), st.integers(1, 40))
def test_ids_of_a_step_are_consecutive_and_do_not_depend_on_their_count(
    seed: int, step: int, count: int
) -> None:
    whole = task_ids(seed, "train", step, 40)
    assert np.array_equal(task_ids(seed, "train", step, count), whole[:count])
    assert np.all(np.diff(whole) == 1)
    assert whole[-1] < 2**63, "no id wraps around to 0"


def test_steps_streams_and_seeds_do_not_share_ids() -> None:
    firsts = np.array(
        [
            task_ids(seed, stream, step, 1)[0]
            for seed in range(5)
            for stream in STREAMS
            for step in (*range(50), 10**6, 10**10)
        ]
    )
    assert np.diff(np.sort(firsts)).min() > 10**6, "the ids of two steps do not overlap"
    assert len(np.unique(firsts % 2**26)) == 5 * len(STREAMS), "steps are whole multiples of 2**26 apart"


def test_torch_seeds_of_all_steps_differ_in_their_lower_32_bits() -> None:
    seeds = {torch_seed(task_id) % 2**32 for step in range(200) for task_id in task_ids(0, "train", step, 2)}
    assert len(seeds) == 400


def test_uniforms_are_uniform_and_differ_between_tasks_parts_and_counts() -> None:
    ids = task_ids(0, "train", 0, 500)
    drawn = draw_uniforms(ids, 22)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counted = np.histogram(drawn, 20, (0, 1))[0]
    assert ((counted - 550) ** 2 / 550).sum() < 43.8, (
        "chi squared with 19 degrees of freedom: one in a thousand"
    )
    others = [
        draw_uniforms(ids, 22, 1),
        draw_uniforms(ids, 25)[:, :22],
        draw_uniforms(task_ids(0, "train", 1, 500), 22),
    ]
    others.append(np.roll(drawn, 1, axis=0))
    others.append(np.stack([task_generator(i).random(22) for i in ids]))
    for other in others:
        correlation = np.corrcoef(drawn.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 4 / drawn.size**0.5
