"""Counter-based randomness: every draw is a function of (seed, stream, step, task index).

No generator state lives between steps, so none is checkpointed, and it does not matter which worker draws
a task. A task's *id* is 64 bits hashed from the four by `numpy.random.SeedSequence`; what a task family
draws comes from a Philox generator keyed by that id (Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3").
"""

from __future__ import annotations

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


def torch_generator(seed: int, stream: str) -> torch.Generator:
    """A CPU torch generator for a stream that is drawn once a run (`init`, `model`)."""
    value = np.random.SeedSequence(seed, spawn_key=(STREAMS[stream],)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(value) & (2**63 - 1))


def stream_generator(seed: int, stream: str, index: int) -> np.random.Generator:
    """The random numbers of one item of a stream that is not of tasks (`sweep`: one draw of the space)."""
    sequence = np.random.SeedSequence(seed, spawn_key=(STREAMS[stream], index))
    return np.random.Generator(np.random.Philox(sequence))
