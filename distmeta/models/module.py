"""Build a `torch.nn.Module` and find out which of its tensors are frozen or tied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from distmeta.errors import InputError, describe_failure, did_you_mean

Glob = str | list[str]
"""A glob over parameter names, or a list of globs."""
TrainMode = Literal["keep", "train"]
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def build_seeded(
    build: Callable[[], nn.Module], generator: torch.Generator, make_inputs: Callable[[], Any] | None = None
) -> nn.Module:
    """Build the module with torch's CPU generator seeded from `generator`, and then restore torch's generator.

    Args:
        make_inputs: one task's inputs, with which lazy layers find their sizes.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would also seed the GPUs
        module = unwrap(build())
        if any(is_lazy(parameter) for parameter in module.parameters()):
            materialize(module, make_inputs)
    return module


def unwrap(module: Any) -> nn.Module:
    """Return the module itself.

    Raises:
        InputError: it is no module, or one that has been compiled or scripted.
    """
    if isinstance(module, nn.DataParallel):
        module = module.module
    if not isinstance(module, nn.Module):
        raise InputError(f"model.type: got {type(module).__name__}, expected a torch.nn.Module")
    if isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule":
        raise InputError(
            f"model.type: got a compiled module ({type(module).__name__}), expected the module itself: distmeta "
            "compiles whole gradients (compute.compile)"
        )
    return module


def materialize(module: nn.Module, make_inputs: Callable[[], Any] | None) -> None:
    """Let lazy layers find their sizes, by one forward pass in evaluation mode.

    Raises:
        InputError: the pass fails, or a layer is not reached.
    """
    modes = {submodule: submodule.training for submodule in module.modules()}
    try:
        if make_inputs is not None:
            with torch.no_grad():
                module.eval()(make_inputs())
    except Exception as error:  # a user's model may raise anything
        raise InputError(
            f"model.type={type(module).__name__}: its lazy layers need one forward pass on inputs of the tasks, which "
            f"failed: {describe_failure(error)}"
        ) from error
    finally:
        for submodule, is_training in modes.items():
            submodule.training = is_training
    unknown = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
    if unknown:
        raise InputError(
            f"model.type={type(module).__name__}: the size of {unknown[0]!r} is unknown after a forward pass, expected "
            "lazy layers that every pass uses"
        )


def is_lazy(parameter: Tensor) -> bool:
    """Return whether a parameter has no size yet."""
    return isinstance(parameter, UninitializedParameter)


def has_dropout(module: nn.Module) -> bool:
    return any(isinstance(layer, DROPOUTS) and layer.p > 0 for layer in module.modules())


def prepare_module(module: nn.Module, train_mode: TrainMode) -> list[str]:
    """Make a module fit for inner loops. Return what a user should know of that, a line each.

    - Parameters and buffers become float32, because theta is.
    - Embeddings with sparse gradients get dense ones: a sparse one has no second derivative.
    - `train_mode: train` puts all layers into training mode. `keep` leaves them as the constructor did.
    """
    notes = []
    floats = {value.dtype for value in module.parameters() if value.is_floating_point()}
    if floats - {torch.float32}:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in floats))
        notes.append(f"model.type={type(module).__name__}: parameters of type {found} became float32")
        module.float()
    for layer in module.modules():
        if isinstance(layer, EMBEDDINGS):
            layer.sparse = False
    if train_mode == "train":
        module.train()
        return notes
    resting = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, DROPOUTS) and layer.p > 0 and not layer.training
    ]
    if resting:
        notes.append(
            f"model.train_mode: keep: {len(resting)} dropout layers are in evaluation mode (as from_pretrained leaves "
            "them) and do nothing in training; model.train_mode=train turns them on"
        )
    return notes


def find_frozen(parameters: Mapping[str, Tensor], freeze: Glob | None) -> set[str]:
    """Return the names of the parameters that match a glob or do not require gradients.

    Raises:
        InputError: a glob matches nothing.
    """
    frozen = {name for name, value in parameters.items() if not value.requires_grad}
    globs = [freeze] if isinstance(freeze, str) else freeze or []
    for glob in globs:
        matching = {name for name in parameters if fnmatchcase(name, glob)}
        if not matching:
            raise InputError(
                f"model.freeze: got {glob!r}, which matches no parameter; {did_you_mean(glob, list(parameters))}"
            )
        frozen |= matching
    return frozen


def has_tied_tensors(module: nn.Module) -> bool:
    """Return whether a parameter or buffer has two names. functional_call searches for these at every call if asked."""
    for named in (module.named_parameters, module.named_buffers):
        if len(list(named())) < len(list(named(remove_duplicate=False))):
            return True
    return False
