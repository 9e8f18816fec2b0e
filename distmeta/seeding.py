"""Counter-based randomness: every draw is a function of (seed, stream, step, task index).

No generator state lives between steps, so none is checkpointed, and it does not matter which worker draws
a task. A task's *id* is 64 bits hashed from the four by `numpy.random.SeedSequence`; what a task family
draws comes from a Philox generator keyed by that id (Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

STREAMS = {"train": 0, "val": 1, "test": 2, "init": 3, "model": 4, "probe": 5, "sweep": 6}


def task_ids(seed: int, stream: str, step: int, count: int) -> np.ndarray:
    """Ids of tasks 0 … count-1 of a step, uint64 [count]. A longer list starts with the shorter one."""
    sequence = np.random.SeedSequence(seed, spawn_key=(STREAMS[stream], step))
    return sequence.generate_state(count, np.uint64)


def task_generator(task_id: int | np.integer, part: int = 0) -> np.random.Generator:
    """The random numbers of one task; `part` k + 1: the noise of what is collected after k inner steps."""
    return np.random.Generator(np.random.Philox(key=(part << 64) | int(task_id)))


def task_generators(ids: Iterable[int | np.integer], part: int = 0) -> Iterator[np.random.Generator]:
    """`task_generator` of one task after the other. It is one generator, set anew for each, which takes a tenth of the
    time that making one does: draw from it before the next.
    """
    philox = np.random.Philox(key=0)
    generator = np.random.Generator(philox)
    state: Any = philox.state  # numpy's own type for it admits arrays alone
    key = [0, part]
    # lists of plain numbers: it reads them one by one, and those of an array take longer
    state |= {"state": {"counter": [0] * 4, "key": key}, "buffer": [0] * 4}
    for task_id in ids:
        key[0] = int(task_id)
        philox.state = state  # copies it
        yield generator


def uniforms(ids: Any, count: int, part: int = 0) -> np.ndarray:
    """The first `count` uniform numbers of [0, 1) of each task, float64 [T, count]."""
    rows = [generator.random(count) for generator in task_generators(ids, part)]
    return np.array(rows).reshape(len(rows), count)  # of no tasks, too


def torch_generator(seed: int, stream: str) -> torch.Generator:
    """A CPU torch generator for a stream that is drawn once a run (`init`, `model`)."""
    value = np.random.SeedSequence(seed, spawn_key=(STREAMS[stream],)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(value) & (2**63 - 1))


def stream_generator(seed: int, stream: str, index: int) -> np.random.Generator:
    """The random numbers of one item of a stream that is not of tasks (`sweep`: one draw of the space)."""
    sequence = np.random.SeedSequence(seed, spawn_key=(STREAMS[stream], index))
    return np.random.Generator(np.random.Philox(sequence))
