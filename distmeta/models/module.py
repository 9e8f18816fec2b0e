"""Build a `torch.nn.Module` and find out which of its tensors are frozen or tied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from distmeta.errors import InputError, did_you_mean


def build_seeded(build: Callable[[], nn.Module], generator: torch.Generator) -> nn.Module:
    """Build the module with torch's CPU generator seeded from `generator`, and then restore torch's generator."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would also seed the GPUs
        module = build()
    if not isinstance(module, nn.Module):
        raise InputError(f"model.type: got {type(module).__name__}, expected a torch.nn.Module")
    return module


def find_frozen(parameters: Mapping[str, Tensor], freeze: str | None) -> set[str]:
    """Return the names of the parameters that match the glob or do not require gradients."""
    frozen = {name for name, value in parameters.items() if not value.requires_grad}
    if freeze is not None:
        frozen |= {name for name in parameters if fnmatchcase(name, freeze)}
        if not frozen:
            raise InputError(
                f"model.freeze: got {freeze!r}, which matches no parameter; {did_you_mean(freeze, list(parameters))}"
            )
    return frozen


def has_tied_tensors(module: nn.Module) -> bool:
    """Return whether a parameter or buffer has two names. functional_call searches for these at every call if asked."""
    for named in (module.named_parameters, module.named_buffers):
        if len(list(named())) < len(list(named(remove_duplicate=False))):
            return True
    return False
