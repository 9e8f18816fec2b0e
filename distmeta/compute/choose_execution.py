"""What the user's model can do, found out by running it once; and how tasks are run because of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distmeta.compute.gradient import WHOLE_SHARD, Execution
from distmeta.errors import InputError

CHUNKS = (8, 32)
"""Chunks that `measure` tries besides whole shards."""
LARGE = 1_200_000
"""Numbers of a map, for one task's query set, past which a CPU computes convolutions task by task: the maps of several
tasks at once no longer fit its cache (benchmarks/execution.py)."""
LONG = 16
"""Inner steps of a network of convolutions from which on one step's graph is held, not all of them."""


class Traits(NamedTuple):
    draws: bool
    """It draws from torch's global generator (dropout)."""
    convolves: bool
    """It has convolutions."""
    largest_map: int = 0
    """Numbers that its largest convolution makes of x; 0 where they were not seen."""


def traits(module: nn.Module, x: Any) -> Traits:
    """Runs the module once on inputs x [N, ...], as the task family gives them.

    An algorithm may call its model on something else; one that x does not fit is judged by its layers.

    Raises:
        InputError: it changes its buffers, so that one task would leak into the next.
    """
    convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules())
    before = {name: value.clone() for name, value in module.named_buffers()}
    maps: list[int] = []
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.no_grad():
        state = _generators(x)
        hooks = [
            m.register_forward_hook(lambda _, inputs, output: maps.append(output.numel()))
            for m in module.modules()
            if isinstance(m, nn.modules.conv._ConvNd)
        ]
        try:
            module(x)
        except Exception:  # whatever a user's model raises on inputs that are not its own
            return Traits(has_dropout(module), convolves)
        finally:
            for hook in hooks:
                hook.remove()
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
    return Traits(draws, convolves, max(maps, default=0))


def has_dropout(module: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in module.modules())


def _generators(x: Tensor) -> list[Tensor]:
    """The states of the global generators that a model on x's device may draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(x.device)] if x.is_cuda else states


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and torch.equal(a, b)


Trial = Callable[[Execution], object]
"""Computes the gradient of the job's own first tasks in this way."""


def choose_execution(
    asked: Execution, found: Traits, on_gpu: bool, precision: str, few: Trial, shard: Trial, largest: int
) -> Execution:
    """Settles `compute.execution` (`asked.mode`) and, where it is measured, `compute.chunk`.

    auto is `loop` for a model that draws random numbers or that torch.func.vmap cannot run, and on a CPU for
    convolutions with `LARGE` maps or in bfloat16 (on processors that have it they were measured so alone); else `vmap`.
    measure takes what is fastest on a whole shard: the loop, vmap over all of it, vmap over chunks of it.

    Args:
        few: two groups of tasks, to see whether vmap works at all.
        shard: the largest shard.
        largest: its groups of tasks.

    Raises:
        InputError: vmap was asked for and cannot be.
    """
    loop, vmapped = asked._replace(mode="loop", chunk=1), asked._replace(mode="vmap")
    if asked.mode == "loop":
        return loop
    if found.draws:
        if asked.mode == "vmap":
            raise InputError(
                "compute.execution: got vmap for a model that draws random numbers (dropout), which are seeded per "
                "task: use compute.execution=loop"
            )
        return loop
    gains = precision == "float32" and 0 < found.largest_map <= LARGE
    if asked.mode == "auto" and found.convolves and not gains and not on_gpu:
        return loop
    try:
        few(vmapped)
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        if asked.mode == "vmap":
            reason = str(error).splitlines()[0]
            raise InputError(
                f"compute.execution: got vmap, which this model or algorithm cannot run under ({reason}): "
                "use compute.execution=loop"
            ) from error
        return loop
    if asked.mode == "measure":
        smaller = [chunk for chunk in CHUNKS if chunk < largest]
        chunks = [WHOLE_SHARD, *smaller] if asked.chunk == WHOLE_SHARD else [asked.chunk]
        return fastest([loop, *(vmapped._replace(chunk=chunk) for chunk in chunks)], shard)
    return vmapped


def fastest(ways: Sequence[Execution], trial: Trial) -> Execution:
    """The way of the shortest trial of three, each tried once before (a compiler works in the first).

    What a GPU has no memory for is left out; the first way is the one that needs least.
    """
    seconds: dict[Execution, float] = {}
    for way in ways:
        with contextlib.suppress(torch.OutOfMemoryError):
            trial(way)
            seconds[way] = float("inf")
    for _ in range(3):
        for way in seconds:
            started = time.perf_counter()
            trial(way)
            seconds[way] = min(seconds[way], time.perf_counter() - started)
    return min(seconds, key=lambda way: seconds[way])


def choose_differentiation(asked: str, found: Traits, long: bool) -> str:
    """Settles `compute.differentiation`.

    auto is `constant-memory` for a network of convolutions, `LONG` inner steps or more, and a meta-loss that goes back
    through them (`long`). Elsewhere holding all graphs takes little memory and is faster (benchmarks/memory.py).

    Raises:
        InputError: constant-memory, which computes a step twice, for a model that draws random numbers in it.
    """
    if asked == "constant-memory" and found.draws:
        raise InputError(
            "compute.differentiation: got constant-memory, which computes every step twice, for a model that draws "
            "random numbers (dropout): use compute.differentiation=reverse"
        )
    if asked == "auto":
        return "constant-memory" if long and not found.draws else "reverse"
    return asked
