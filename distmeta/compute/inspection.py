"""Run a user's model and the first meta-gradient once, and find out what matters for choosing how to compute them."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distmeta.compute.conversion import find_difference
from distmeta.compute.gradient import Method, Objective, compute_group, cut_into_chunks, seed_generators
from distmeta.compute.random_state import is_same_state, read_random_state
from distmeta.errors import InputError, describe_failure, first_line
from distmeta.protocols import Episode, Episodes, Theta
from distmeta.trees import name_leaves, tree_leaves, tree_map

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
REMEDY = "Compute it without changing a tensor: return a new one instead (x = x + 1 instead of x += 1)"
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
RUNNING_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


# --- The model ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelTraits:
    """What one forward pass reveals about a user's model."""

    has_convolutions: bool
    largest_feature_map: int = 0
    """Elements of the largest output of a convolution; 0 if the pass failed."""


def inspect_model(module: nn.Module, inputs: Any) -> ModelTraits:
    """Run the model once on one task's inputs, a pytree with leaves [N, ...].

    If the model does not accept `inputs` (an algorithm may call it differently), the answer is based on its layers.

    Raises:
        InputError: the forward pass changes a buffer or a parameter. Tasks would then influence each other.
    """
    check_embeddings(module)
    has_convolutions = any(isinstance(layer, CONVOLUTIONS) for layer in module.modules())
    gpus = list({leaf.device for leaf in tree_leaves(inputs) if leaf.is_cuda})
    before = {name: value.detach().clone() for name, value in _list_tensors(module).items()}
    feature_maps: list[int] = []
    try:
        with torch.random.fork_rng(devices=gpus), torch.no_grad():
            feature_maps = _run_and_record_feature_maps(module, inputs)
    except Exception:  # a user's model may raise anything on inputs that it does not accept
        feature_maps = []
    changed = _restore_tensors(module, before)
    if changed:
        raise InputError(
            f"model.type={type(module).__name__}: the forward pass changes {changed[0]!r}, so tasks would influence "
            f"each other. {find_remedy(module, changed[0])}"
        )
    return ModelTraits(has_convolutions, max(feature_maps, default=0))


def check_embeddings(module: nn.Module) -> None:
    """Refuse embeddings that shorten their vectors in the forward pass. They write to theta, as soon as one is long."""
    for name, layer in module.named_modules():
        if isinstance(layer, EMBEDDINGS) and layer.max_norm is not None:
            raise InputError(
                f"model.type={type(module).__name__}: the embedding {name!r} has max_norm={layer.max_norm:g}, with "
                "which the forward pass writes to the weights, so that results would depend on the worker. Leave "
                "max_norm out, or shorten the vectors that the embedding returns"
            )


def find_remedy(module: nn.Module, changed: str) -> str:
    """Return what to do about a tensor that the forward pass changes."""
    owner = module.get_submodule(changed.rpartition(".")[0])
    if isinstance(owner, RUNNING_NORMS):
        return (
            "Use track_running_stats=False (statistics of the batch at hand), use GroupNorm, or call .eval() on the "
            "norm layers in __init__ (fixed statistics)"
        )
    if "parametrizations" in changed or changed.rpartition(".")[2] in ("weight_u", "weight_v"):
        return (
            "Spectral norm updates its vectors in each forward pass in training mode: call .eval() on that layer in "
            "__init__ (fixed vectors), or use weight_norm or orthogonal"
        )
    return REMEDY


def _list_tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _run_and_record_feature_maps(module: nn.Module, inputs: Any) -> list[int]:
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


def _restore_tensors(module: nn.Module, before: Mapping[str, Tensor]) -> list[str]:
    """Put the module's tensors back; return the names of those that had changed."""
    changed = []
    with torch.no_grad():
        for name, value in _list_tensors(module).items():
            old = before.get(name)
            if old is None or old.shape != value.shape or not torch.equal(old, value):
                changed.append(name)
            if old is not None and old.shape == value.shape:
                value.copy_(old)
    return changed


# --- The first gradient -------------------------------------------------------------------------------------------


def inspect_gradient(
    objective: Objective, theta: Theta, module: nn.Module, episodes: Episodes, ids: np.ndarray
) -> bool:
    """Compute the meta-gradient of the first group of tasks by plain autograd, and watch what else happens.

    Args:
        module: the user's model.

    Returns:
        Whether random numbers were drawn from torch's global generators (dropout, noise).

    Raises:
        InputError: the gradient cannot be computed; or it writes to theta, to a constant or to the data; or it draws
            from the global generators of numpy or Python, which are not seeded for each task.
    """
    gpus = list({value.device for value in theta.values() if value.is_cuda})
    size = objective.algorithm.group_size
    chunk = next(iter(cut_into_chunks(episodes, ids, size, Method())))
    kept = {f"theta[{name!r}]": value for name, value in theta.items()}
    kept |= dict(name_leaves(chunk.episodes))

    def compute() -> bool:
        with torch.random.fork_rng(devices=gpus):
            seed_generators(ids[chunk.positions[0]], gpus)
            before = read_random_state(gpus)
            compute_group(objective, theta, chunk.episodes)
            return not is_same_state(before, read_random_state(gpus))

    try:
        return watch(compute, module, kept, "the first meta-gradient")
    except InputError as error:
        reason = _find_reason_in_data(chunk.episodes)
        if error.__cause__ is None or reason is None:
            raise
        raise InputError(
            f"tasks.type: draw returned {reason} (the computation failed: {first_line(error.__cause__)})"
        ) from error.__cause__


def _find_reason_in_data(chunk: Episode) -> str | None:
    """Return what is unusual about the data of a computation that failed, leaves [groups, group size, N, ...]."""
    pixels = [name for name, leaf in name_leaves(chunk) if leaf.dtype == torch.uint8]
    if pixels:
        return (
            f"{pixels[0]} as uint8, which the model cannot compute with, expected float32 for pixels "
            "(x.float() / 255), or int64 for tokens"
        )
    return find_difference(tree_map(lambda leaf: leaf[0, 0], chunk))


def watch(compute: Callable[[], Any], module: nn.Module, kept: Mapping[str, Tensor], what: str) -> Any:
    """Return what a computation with a user's code returns.

    Raises:
        InputError: it failed; or it changed a tensor of the module or one of the `kept` tensors; or it drew from a
            generator that is not seeded.
    """
    watched = {**_list_tensors(module), **kept}
    before = {name: value.detach().clone() for name, value in watched.items()}
    generators_before = _read_unseeded_generators()
    try:
        result = compute()
    except InputError:
        raise
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # a machine's failure says nothing about the job
    except Exception as error:  # a user's model, algorithm or score may raise anything
        remedy = "expected a model, an algorithm and a score that plain PyTorch can run and differentiate"
        if isinstance(error, RuntimeError) and "derivative for" in str(error):
            remedy = (
                "torch has no second derivative of this operation, expected another one, or a first-order method "
                "(algorithm.first_order=true)"
            )
        raise InputError(f"{what} of this job failed: {describe_failure(error)}: {remedy}") from error
    for name, value in watched.items():
        if not torch.equal(torch.nan_to_num(value.detach()), torch.nan_to_num(before[name])):
            remedy = REMEDY if name in kept else find_remedy(module, name)
            raise InputError(
                f"{what} of this job changes {name!r}, so tasks would influence each other. {remedy}"
            )
    drawn = _find_changed_generator(generators_before)
    if drawn is not None:  # perhaps only by an import that the first call made
        generators_before = _read_unseeded_generators()
        compute()
        drawn = _find_changed_generator(generators_before)
    if drawn is not None:
        raise InputError(
            f"{what} of this job draws from {drawn}, which is not seeded for each task, so results would depend on "
            "the worker: draw with torch (torch.rand, torch.randperm)"
        )
    return result


def _read_unseeded_generators() -> dict[str, bytes]:
    return {
        "numpy's global generator (np.random)": pickle.dumps(np.random.get_state(legacy=False)),
        "Python's global generator (random)": pickle.dumps(random.getstate()),
    }


def _find_changed_generator(before: Mapping[str, bytes]) -> str | None:
    """Return the name of a generator that was drawn from since `before` was read."""
    now = _read_unseeded_generators()
    return next((name for name in before if before[name] != now[name]), None)
