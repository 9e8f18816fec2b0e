"""A `torch.nn.Module` as a pure function of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from distmeta.core import InputError, Theta, nearest, select

PREFIX = "model."


class Functional:
    """model(phi, x): the module's outputs under the parameters `phi` (keys `model.<parameter>`).

    Trainable parameters are `phi`'s; frozen ones and buffers are *constants*: they are not in theta, are sent to
    a worker once, and are saved beside theta in a checkpoint.

    Args:
        build: makes the module.
        generator: seeds the module's own initialisation.
        freeze: glob over parameter names; what it matches is frozen.
        init_from: safetensors file of (some of) the module's parameters and buffers.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        generator: torch.Generator,
        freeze: str | None = None,
        init_from: str | None = None,
    ):
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module = build()
        if not isinstance(self.module, nn.Module):
            raise InputError(f"model.type: got {type(self.module).__name__}, expected a torch.nn.Module")
        parameters = dict(self.module.named_parameters())
        if init_from is not None:
            _load(self.module, init_from)
        frozen = {name for name in parameters if freeze is not None and fnmatchcase(name, freeze)}
        frozen |= {name for name, value in parameters.items() if not value.requires_grad}
        if freeze is not None and not frozen:
            raise InputError(
                f"model.freeze: got {freeze!r}, which matches no parameter; {nearest(freeze, list(parameters))}"
            )
        self._initial = {n: p.detach().clone() for n, p in parameters.items() if n not in frozen}
        self.constants: dict[str, Tensor] = {n: parameters[n].detach() for n in sorted(frozen)}
        self.constants |= {n: b.detach() for n, b in self.module.named_buffers()}

    def init(self, generator: torch.Generator | None = None) -> Theta:
        """The trainable parameters at the start. The module drew them itself; `generator` is not used."""
        return {PREFIX + name: value.clone() for name, value in self._initial.items()}

    def __call__(self, phi: Mapping[str, Tensor], x: Tensor) -> Tensor:
        values = dict(self.constants)
        for name, value in select(phi, PREFIX).items():
            values[name.removeprefix(PREFIX)] = value
        return torch.func.functional_call(self.module, values, (x,))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Functional:
        """Moves the constants (and the module's own copies); floating-point ones change their dtype."""
        self.module.to(device=device, dtype=dtype)

        def move(value: Tensor) -> Tensor:
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

        self.constants = {name: move(value) for name, value in self.constants.items()}
        self._initial = {name: move(value) for name, value in self._initial.items()}
        return self


def _load(module: nn.Module, path: str) -> None:
    """Copies the tensors of a safetensors file into the module, by name."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise InputError(f"model.init_from: got {path!r}, expected an existing safetensors file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"model.init_from: {path!r} is not a readable safetensors file: {error}") from None
    tensors = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, value in tensors.items():
        if name not in own:
            raise InputError(
                f"model.init_from: tensor {name!r} is not in the model; {nearest(name, list(own))}"
            )
        if value.shape != own[name].shape:
            raise InputError(
                f"model.init_from: tensor {name!r} has shape {list(value.shape)}, "
                f"expected {list(own[name].shape)}"
            )
        with torch.no_grad():
            own[name].copy_(value)
