"""Counter-based random numbers: every draw is a function of (seed, stream, step, task index).

No generator state exists between steps, so none is saved in checkpoints, and it does not matter which worker draws a
task. A task's id is a hash of seed and stream, plus its step and index (`task_ids`). Task families draw from Philox
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The id is either the counter (`draw_uniforms`: a
fixed count of numbers, fast for many tasks) or the key (`task_generator`: any count of numbers).
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
"""The part of a task's random numbers that seeds torch. Families use lower parts."""
MOST_TASKS = 2**26
"""Tasks per step for which there are ids."""
MOST_STEPS = 2**36
"""Steps per stream for which there are ids."""


def task_ids(seed: int, stream: str, step: int, count: int) -> np.ndarray:
    """Return the ids of the tasks 0 … count-1 of a step, uint64 [count]. They are consecutive.

        id = first(seed, stream) + 2²⁶ · step + index

    No id occurs twice in a stream. Two streams with 256 tasks in each of a million steps have an id in common with
    probability 2·10⁻¹⁰.
    """
    assert count <= MOST_TASKS, count
    assert step < MOST_STEPS, step
    first = _first_id(seed, stream) + MOST_TASKS * step
    return np.arange(first, first + count, dtype=np.uint64)


@cache
def _first_id(seed: int, stream: str) -> int:
    """Return the id of the first task of a stream, below 2⁶²."""
    sequence = np.random.SeedSequence(seed, spawn_key=(STREAMS[stream],))
    return int(sequence.generate_state(1, np.uint64)[0]) >> 2


def task_generator(task_id: int | np.integer, part: int = 0) -> np.random.Generator:
    """Return a generator of one task's random numbers. Part k + 1 is for data collected after k inner steps."""
    return np.random.Generator(np.random.Philox(key=(part << 64) | int(task_id)))


def torch_seed(task_id: int | np.integer) -> int:
    """Return the seed of torch's generator for one task, if the model draws random numbers (dropout).

    The seed is not the id, because on a CPU torch uses only the lower 32 bits, which the ids of several steps share.
    """
    return int(task_generator(task_id, DROPOUT).integers(2**63))


def draw_uniforms(ids: Sequence[Any] | np.ndarray, count: int, part: int = 0) -> np.ndarray:
    """Return `count` uniform numbers in [0, 1) for each task, float64 [T, count].

    Task i uses the Philox blocks of four numbers i·B + 1 … (i + 1)·B, B = ⌈count / 4⌉, with the key (B, part + 2⁶³),
    which `task_generator` never uses. The numbers depend on the id, B and `part`, not on the other tasks. One generator
    serves a whole run of consecutive ids.
    """
    task_ids_T = np.asarray(ids, np.uint64)
    blocks = -(-count // 4)
    key = (part + 2**63 << 64) | blocks
    numbers = np.empty((len(task_ids_T), 4 * blocks))
    is_new_run = (task_ids_T[1:] - task_ids_T[:-1] != 1) | (task_ids_T[1:] == 0)
    cuts = np.flatnonzero(is_new_run) + 1
    for start, stop in pairwise(sorted({0, *cuts.tolist(), len(task_ids_T)})):
        counter = int(task_ids_T[start]) * blocks
        np.random.Generator(np.random.Philox(counter=counter, key=key)).random(out=numbers[start:stop])
    return numbers[:, :count]


def torch_generator(seed: int, stream: str) -> torch.Generator:
    """Return a torch generator on the CPU for a stream that is used once per run (`init`, `model`)."""
    value = np.random.SeedSequence(seed, spawn_key=(STREAMS[stream],)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(value) & (2**63 - 1))


def stream_generator(seed: int, stream: str, index: int) -> np.random.Generator:
    """Return a generator for one item of a stream without tasks (`sweep`: one draw from the search space)."""
    sequence = np.random.SeedSequence(seed, spawn_key=(STREAMS[stream], index))
    return np.random.Generator(np.random.Philox(sequence))
