"""The state of torch's global generators, from which a model or an algorithm draws within a task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RandomState = tuple[Tensor, ...]
"""The state of the CPU's generator, then of each GPU's."""


def read_random_state(gpus: Sequence[torch.device] | None) -> RandomState:
    """Return the state of the CPU's generator and of those of the GPUs. With None nothing is read or set."""
    if gpus is None:
        return ()
    return (torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in gpus))


def set_random_state(state: RandomState, gpus: Sequence[torch.device] | None) -> None:
    """Continue from a state that `read_random_state` returned for the same GPUs."""
    if gpus is None:
        return
    torch.set_rng_state(state[0])
    for value, device in zip(state[1:], gpus, strict=True):
        torch.cuda.set_rng_state(value, device)


def is_same_state(a: RandomState, b: RandomState) -> bool:
    """Return whether nothing was drawn between the two."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
