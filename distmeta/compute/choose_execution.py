"""Choose how a shard's tasks are computed, from what one forward pass reveals about the user's model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distmeta.compute.execution import WHOLE_SHARD, Execution
from distmeta.compute.gradient import build_objective, group_loss, unroll
from distmeta.errors import InputError, first_line
from distmeta.protocols import Algorithm, Episode, FirstOrder, Score, Theta

CHUNKS = (8, 32)
"""Chunks that `measure` tries besides whole shards."""
LARGE_FEATURE_MAP = 1_200_000
"""Elements of one task's query feature map above which a CPU computes convolutions task by task: the feature maps of
several tasks at once no longer fit its cache (benchmarks/execution.py)."""
MANY_STEPS = 16
"""From this many inner steps on, auto keeps one step's graph of a convolutional network in memory, not all of them."""
CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


# --- The model ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelTraits:
    """What one forward pass reveals about a user's model."""

    uses_random_numbers: bool
    """It draws from torch's global generator, for example in dropout."""
    has_convolutions: bool
    largest_feature_map: int = 0
    """Elements of the largest output of a convolution; 0 if the pass failed."""


def inspect_model(module: nn.Module, inputs: Tensor) -> ModelTraits:
    """Run the model once on inputs [N, ...] and report what matters for choosing how to compute it.

    If the model does not accept `inputs` (an algorithm may call it differently), the answer is based on its layers.

    Raises:
        InputError: the forward pass changes a buffer. Tasks would then influence each other.
    """
    has_convolutions = any(isinstance(layer, CONVOLUTIONS) for layer in module.modules())
    buffers_before = {name: value.clone() for name, value in module.named_buffers()}
    gpus = [inputs.device] if inputs.is_cuda else []
    with torch.random.fork_rng(devices=gpus), torch.no_grad():
        random_state_before = _read_random_state(inputs)
        try:
            feature_maps = _run_and_record_feature_maps(module, inputs)
        except Exception:  # a user's model may raise anything on inputs that it does not accept
            return ModelTraits(has_dropout(module), has_convolutions)
        states = zip(random_state_before, _read_random_state(inputs), strict=True)
        uses_random_numbers = any(not torch.equal(before, after) for before, after in states)
        changed = _restore_buffers(module, buffers_before)
    if changed:
        raise InputError(
            f"model.type={type(module).__name__}: the forward pass changes the buffer {changed[0]!r}, so tasks would "
            "influence each other. Use track_running_stats=False (statistics of the batch at hand), use GroupNorm, or "
            "call .eval() on the norm layers in __init__ (fixed statistics)"
        )
    return ModelTraits(uses_random_numbers, has_convolutions, max(feature_maps, default=0))


def has_dropout(module: nn.Module) -> bool:
    return any(isinstance(layer, DROPOUTS) and layer.p > 0 for layer in module.modules())


def _run_and_record_feature_maps(module: nn.Module, inputs: Tensor) -> list[int]:
    """Run the model; return the number of elements of every convolution's output."""
    sizes: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output: sizes.append(output.numel()))
        for layer in module.modules()
        if isinstance(layer, CONVOLUTIONS)
    ]
    try:
        module(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return sizes


def _read_random_state(inputs: Tensor) -> list[Tensor]:
    """Return the states of the global generators that a model on the inputs' device may draw from."""
    states = [torch.get_rng_state()]
    if inputs.is_cuda:
        states.append(torch.cuda.get_rng_state(inputs.device))
    return states


def _restore_buffers(module: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """Put the buffers back; return the names of those that had changed."""
    changed = []
    for name, value in module.named_buffers():
        old = before.get(name)
        if old is None or old.shape != value.shape or not torch.equal(old, value):
            changed.append(name)
        if old is not None:
            value.copy_(old)
    return changed


# --- Execution ----------------------------------------------------------------------------------------------------

Trial = Callable[[Execution], object]
"""trial(execution) computes the gradient of some of the job's tasks in this way."""


def choose_execution(
    asked: Execution,
    traits: ModelTraits,
    on_gpu: bool,
    precision: str,
    try_two_groups: Trial,
    try_shard: Trial,
    largest_shard: int,
) -> Execution:
    """Decide `compute.execution` (`asked.mode`) and, if it is measured, `compute.chunk`.

    - auto: `loop` for a model that draws random numbers or that `torch.func.vmap` cannot run; on a CPU also for
      convolutions with large feature maps, or in bfloat16 (a rule from measurements on processors with bfloat16
      instructions).
      Otherwise `vmap`.
    - measure: compute a whole shard by the loop, by vmap over all of it and by vmap over chunks; take the fastest.

    Args:
        try_two_groups: shows whether vmap works at all.
        largest_shard: groups of tasks in the largest shard, which `try_shard` computes.

    Raises:
        InputError: vmap was asked for and is impossible.
    """
    loop = asked._replace(mode="loop", chunk=1)
    vmap = asked._replace(mode="vmap")
    if asked.mode == "loop":
        return loop
    if traits.uses_random_numbers:
        if asked.mode == "vmap":
            raise InputError(
                "compute.execution: got vmap for a model that draws random numbers (dropout), which are seeded per "
                "task: use compute.execution=loop"
            )
        return loop
    fits_cache = precision == "float32" and 0 < traits.largest_feature_map <= LARGE_FEATURE_MAP
    if asked.mode == "auto" and traits.has_convolutions and not fits_cache and not on_gpu:
        return loop
    try:
        try_two_groups(vmap)
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        if asked.mode == "vmap":
            raise InputError(
                f"compute.execution: got vmap, but this model or algorithm does not run under vmap "
                f"({first_line(error)}): use compute.execution=loop"
            ) from error
        return loop
    if asked.mode == "measure":
        smaller = [chunk for chunk in CHUNKS if chunk < largest_shard]
        chunks = [WHOLE_SHARD, *smaller] if asked.chunk == WHOLE_SHARD else [asked.chunk]
        return find_fastest([loop, *(vmap._replace(chunk=chunk) for chunk in chunks)], try_shard)
    return vmap


def find_fastest(executions: Sequence[Execution], trial: Trial) -> Execution:
    """Return the execution with the shortest of three trials, after one trial that does not count (compilation).

    Executions that run out of GPU memory are left out. The first one needs the least memory.
    """
    seconds: dict[Execution, float] = {}
    for execution in executions:
        with contextlib.suppress(torch.OutOfMemoryError):
            trial(execution)
            seconds[execution] = float("inf")
    for _ in range(3):
        for execution in seconds:
            started = time.perf_counter()
            trial(execution)
            seconds[execution] = min(seconds[execution], time.perf_counter() - started)
    return min(seconds, key=lambda execution: seconds[execution])


# --- Differentiation ----------------------------------------------------------------------------------------------


def choose_differentiation(asked: str, traits: ModelTraits, has_long_graphs: bool) -> str:
    """Decide `compute.differentiation`.

    auto is `constant-memory` if the meta-gradient goes back through many inner steps of a convolutional network
    (`has_long_graphs`). In other cases holding all graphs takes little memory and is faster (benchmarks/memory.py).

    Raises:
        InputError: constant-memory, which computes a step twice, for a model that draws random numbers in it.
    """
    if asked == "constant-memory" and traits.uses_random_numbers:
        raise InputError(
            "compute.differentiation: got constant-memory, which computes every step twice, for a model that draws "
            "random numbers (dropout): use compute.differentiation=reverse"
        )
    if asked != "auto":
        return asked
    return "constant-memory" if has_long_graphs and not traits.uses_random_numbers else "reverse"


def holds_graphs(algorithm: Algorithm, score: Score, theta: Theta, group: Episode) -> bool:
    """Return whether the meta-gradient of a group, leaves [G, ...], goes back through its inner loops."""
    are_detached: list[bool] = []

    def watch(
        algorithm: Algorithm,
        theta: Theta,
        support: Any,
        steps: int | None = None,
        detach: bool = False,
        every: bool = False,
    ) -> Any:
        are_detached.append(detach)
        return unroll(algorithm, theta, support, steps, detach, every)

    with torch.no_grad():
        group_loss(build_objective(algorithm, score), theta, group, watch)
    is_first_order = isinstance(algorithm, FirstOrder) and algorithm.first_order
    return not all(are_detached) and not is_first_order
