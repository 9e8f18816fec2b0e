"""Counter-based randomness: every draw is a function of (seed, stream, step, task index).

No generator state lives between steps, so none is checkpointed, and it does not matter which worker draws
a task. A task's *id* counts steps and tasks from a number that `numpy.random.SeedSequence` hashes from seed and stream.
What a task family draws comes from Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): from the
blocks that its id counts (`uniforms`), or from a generator keyed by the id, where a task's numbers have no fixed count.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

STREAMS = {"train": 0, "val": 1, "test": 2, "init": 3, "model": 4, "probe": 5, "sweep": 6}
DROPOUT = 2**61
"""The part of a task's random numbers that its torch seed is, past those of any family."""
MOST_TASKS, MOST_STEPS = 2**26, 2**36
"""As many tasks in a step, and steps in a stream, as there are ids for."""


def task_ids(seed: int, stream: str, step: int, count: int) -> np.ndarray:
    """Ids of tasks 0 … count-1 of a step, uint64 [count]: consecutive, so that one call draws for all of them.

        id = first(seed, stream) + 2²⁶ · step + index

    A stream has no id twice. Two streams, of 256 tasks in each of a million steps, have one in common with a
    probability of 2·10⁻¹⁰.
    """
    assert count <= MOST_TASKS, count
    assert step < MOST_STEPS, step
    first = _first_id(seed, stream) + MOST_TASKS * step
    return np.arange(first, first + count, dtype=np.uint64)


@cache
def _first_id(seed: int, stream: str) -> int:
    """A number below 2⁶²."""
    sequence = np.random.SeedSequence(seed, spawn_key=(STREAMS[stream],))
    return int(sequence.generate_state(1, np.uint64)[0]) >> 2


def task_generator(task_id: int | np.integer, part: int = 0) -> np.random.Generator:
    """The random numbers of one task; `part` k + 1: the noise of what is collected after k inner steps."""
    return np.random.Generator(np.random.Philox(key=(part << 64) | int(task_id)))


def torch_seed(task_id: int | np.integer) -> int:
    """What torch's own generator starts from where a model draws (dropout): of a task alone. A CPU's takes the lower 32
    bits of a seed, which the ids of later steps have in common."""
    return int(task_generator(task_id, DROPOUT).integers(2**63))


def uniforms(ids: Sequence[Any] | np.ndarray, count: int, part: int = 0) -> np.ndarray:
    """`count` uniform numbers of [0, 1) of each task, float64 [T, count].

    Task i has the Philox blocks of four numbers i·B + 1 … (i + 1)·B, B = ⌈count / 4⌉, under the key (B, part + 2⁶³),
    which is no `task_generator`'s. So they depend on its id, B and `part`, not on what else is drawn: one call draws
    for a whole run of consecutive ids.
    """
    of = np.asarray(ids, np.uint64)
    blocks = -(-count // 4)
    drawn = np.empty((len(of), 4 * blocks))
    cuts = np.flatnonzero((of[1:] - of[:-1] != 1) | (of[1:] == 0)) + 1
    for start, stop in pairwise(sorted({0, *cuts.tolist(), len(of)})):
        counter, key = int(of[start]) * blocks, (part + 2**63 << 64) | blocks
        np.random.Generator(np.random.Philox(counter=counter, key=key)).random(out=drawn[start:stop])
    return drawn[:, :count]


def torch_generator(seed: int, stream: str) -> torch.Generator:
    """A CPU torch generator for a stream that is drawn once a run (`init`, `model`)."""
    value = np.random.SeedSequence(seed, spawn_key=(STREAMS[stream],)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(value) & (2**63 - 1))


def stream_generator(seed: int, stream: str, index: int) -> np.random.Generator:
    """The random numbers of one item of a stream that is not of tasks (`sweep`: one draw of the space)."""
    sequence = np.random.SeedSequence(seed, spawn_key=(STREAMS[stream], index))
    return np.random.Generator(np.random.Philox(sequence))
