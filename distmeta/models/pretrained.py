"""Weights from a safetensors file (`model.init_from`)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from distmeta.errors import InputError, did_you_mean


def load_weights(module: nn.Module, path: str) -> None:
    """Copy the tensors of a safetensors file into the module's parameters and buffers, by name.

    The file may be a `theta.safetensors`, whose names start with `model.`. It may lack some of the module's tensors.

    Raises:
        InputError: there is no such file, or a name or shape does not fit the module.
    """
    if not Path(path).is_file():
        raise InputError(f"model.init_from: got {path!r}, expected an existing safetensors file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"model.init_from: {path!r} is not a readable safetensors file: {error}") from None
    targets = dict(module.named_parameters()) | dict(module.named_buffers())
    for key, value in tensors.items():
        name = key.removeprefix("model.")
        if name not in targets:
            raise InputError(
                f"model.init_from: tensor {name!r} is not in the model; {did_you_mean(name, list(targets))}"
            )
        if value.shape != targets[name].shape:
            raise InputError(
                f"model.init_from: tensor {name!r} has shape {list(value.shape)}, expected {list(targets[name].shape)}"
            )
        with torch.no_grad():
            targets[name].copy_(value)
