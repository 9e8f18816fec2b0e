"""What the user's model can do, found out by running it once; and how tasks are run because of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distmeta.compute.shard import Execution, shard_gradient
from distmeta.core import Algorithm, Episode, InputError, Score, Theta


class Traits(NamedTuple):
    draws: bool
    """It draws from torch's global generator (dropout)."""
    convolves: bool
    """It has convolutions."""


def traits(module: nn.Module, x: Any) -> Traits:
    """Runs the module once on inputs x [N, ...], as the task family gives them.

    An algorithm may call its model on something else; one that x does not fit is judged by its layers.

    Raises:
        InputError: it changes its buffers, so that one task would leak into the next.
    """
    convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules())
    before = {name: value.clone() for name, value in module.named_buffers()}
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.no_grad():
        state = _generators(x)
        try:
            module(x)
        except Exception:  # whatever a user's model raises on inputs that are not its own
            return Traits(has_dropout(module), convolves)
        draws = any(not torch.equal(a, b) for a, b in zip(state, _generators(x), strict=True))
        changed = [name for name, value in module.named_buffers() if not _same(value, before.get(name))]
        for name, value in module.named_buffers():
            if name in before:
                value.copy_(before[name])
    if changed:
        raise InputError(
            f"model.type: {type(module).__name__} changes its buffer {changed[0]!r} when it is called, so that tasks "
            "would leak into each other: build its norms with track_running_stats=False (statistics of the batch at "
            "hand), use group norm, or call .eval() on them in the model's __init__ (fixed statistics)"
        )
    return Traits(draws, convolves)


def has_dropout(module: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in module.modules())


def _generators(x: Tensor) -> list[Tensor]:
    """The states of the global generators that a model on x's device may draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(x.device)] if x.is_cuda else states


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and torch.equal(a, b)


def choose_execution(
    asked: str,
    chunk: int | None,
    found: Traits,
    on_gpu: bool,
    algorithm: Algorithm,
    score: Score,
    theta: Theta,
    episodes: Episode,
) -> Execution:
    """The fixed rule behind `compute.execution`; `episodes` are two groups of tasks to try vmap on.

    auto is `loop` for a model that draws random numbers or that torch.func.vmap cannot run, and for convolutions
    on a CPU, where vmap turns per-task weights into grouped convolutions and is slower than the loop; else `vmap`.

    Raises:
        InputError: vmap was asked for and cannot be.
    """
    # 2**31: a whole shard, whatever its size
    vmapped = Execution("vmap", chunk or 2**31)
    loop = Execution("loop", 1)
    if asked == "loop":
        return loop
    if found.draws:
        if asked == "vmap":
            raise InputError(
                "compute.execution: got vmap for a model that draws random numbers (dropout), which are seeded per "
                "task: use compute.execution=loop"
            )
        return loop
    if asked == "auto" and found.convolves and not on_gpu:
        return loop
    try:
        ids = torch.zeros(2 * algorithm.group_size, dtype=torch.int64).numpy()
        shard_gradient(algorithm, score, theta, episodes, ids, vmapped)
    except (RuntimeError, ValueError, TypeError) as error:
        if asked == "vmap" and not isinstance(error, InputError):
            reason = str(error).splitlines()[0]
            raise InputError(
                f"compute.execution: got vmap, which this model or algorithm cannot run under ({reason}): "
                "use compute.execution=loop"
            ) from error
        if isinstance(error, InputError):
            raise
        return loop
    return vmapped
