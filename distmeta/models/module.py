"""Build a `torch.nn.Module` and find out which of its tensors are frozen or tied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from distmeta.compute.inspection import RUNNING_NORMS
from distmeta.errors import InputError, describe_failure, did_you_mean, shorten_list

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
        if find_lazy(module):
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
    unknown = find_lazy(module)
    if unknown:
        raise InputError(
            f"model.type={type(module).__name__}: the size of {unknown[0]!r} is unknown after a forward pass, expected "
            "lazy layers that every pass uses"
        )


def find_lazy(module: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers that have no size yet."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [
        name for name, value in tensors if isinstance(value, UninitializedParameter | UninitializedBuffer)
    ]


def has_dropout(module: nn.Module) -> bool:
    return any(is_dropout(layer) for layer in module.modules())


def is_dropout(layer: nn.Module) -> bool:
    """Return whether a layer of torch draws random numbers in training mode."""
    if isinstance(layer, DROPOUTS):
        return layer.p > 0
    if isinstance(layer, nn.RNNBase):
        return layer.dropout > 0 and layer.num_layers > 1
    return isinstance(layer, nn.MultiheadAttention) and layer.dropout > 0


def check_trainable(module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Refuse modules that an inner loop cannot differentiate.

    Args:
        parameters: the trainable ones.

    Raises:
        InputError: a trainable parameter is complex, or a layer is quantised.
    """
    kind = type(module).__name__
    for name, value in parameters.items():
        if value.is_complex():
            raise InputError(
                f"model.type={kind}: the parameter {name!r} is complex, expected real numbers: keep the real and the "
                "imaginary part (torch.view_as_real) and join them in the forward pass (torch.view_as_complex)"
            )
    for name, layer in module.named_modules():
        if type(layer).__module__.startswith("torch.ao.nn.quantized"):
            raise InputError(
                f"model.type={kind}: the layer {name!r} is quantised and has no gradient, expected the model before "
                "its quantisation"
            )


def prepare_module(module: nn.Module, train_mode: TrainMode) -> list[str]:
    """Make a module fit for inner loops. Return what a user should know of that, a line each.

    - Parameters and buffers become float32, because theta is.
    - Embeddings with sparse gradients get dense ones: a sparse one has no second derivative.
    - `train_mode: train` puts layers into training mode, except those whose running statistics would then change.
      `keep` leaves them all as the constructor did.
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
        turn_on(module)
        return notes
    notes.extend(describe_resting(module))
    return notes


def turn_on(module: nn.Module) -> None:
    """Put layers into training mode, except norms and spectral norms that the constructor left in evaluation mode.

    In training mode they would change their buffers, and such models are refused.
    """
    fixed = [
        part
        for layer in module.modules()
        if keeps_statistics(layer)
        for part in layer.modules()
        if not part.training
    ]
    module.train()
    for part in fixed:
        part.training = False


def keeps_statistics(layer: nn.Module) -> bool:
    """Return whether a layer may have buffers that it updates in training mode."""
    if isinstance(layer, RUNNING_NORMS):
        return layer.running_mean is not None
    is_old_spectral_norm = "weight_u" in dict(layer.named_buffers(recurse=False))
    return is_old_spectral_norm or isinstance(layer, ParametrizationList)


def is_own(layer: nn.Module) -> bool:
    """Return whether a layer may ask for its mode in code that torch does not know (`F.dropout`). Norms do not."""
    return not type(layer).__module__.startswith("torch.") and not isinstance(layer, RUNNING_NORMS)


def describe_resting(module: nn.Module) -> list[str]:
    """Return a line if the constructor left dropout, or modules that may have it in their code, in evaluation mode."""
    resting = {name: layer for name, layer in module.named_modules() if not layer.training}
    dropouts = [name for name, layer in resting.items() if is_dropout(layer)]
    own = [name for name, layer in resting.items() if is_own(layer)]
    if not dropouts and not own:
        return []
    outermost = [name for name in own if name and name.rpartition(".")[0] not in own]
    modules = shorten_list(outermost) if "" not in own else type(module).__name__
    found = f"{len(dropouts)} dropout layers" if dropouts else f"the modules {modules}"
    return [
        f"model.train_mode: keep: {found} are in evaluation mode (as from_pretrained leaves them), so dropout in them "
        "does nothing in training; model.train_mode=train turns it on"
    ]


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
