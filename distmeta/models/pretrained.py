"""Start from trained weights (`model.init_from`): take the tensors that fit, and say which ones did not."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distmeta.errors import InputError, first_line, shorten_list

FIELD = "model.init_from"
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
"""Endings of files that `torch.load` reads. They are read with `weights_only`, which runs no code."""
STATE_KEYS = ("state_dict", "model_state_dict", "model")
"""Where a training script's checkpoint keeps the tensors of its model."""
MOST_PREFIX_PARTS = 3


class Fit(NamedTuple):
    """How the tensors of a file fit a module."""

    prefix: str
    """What was removed from the names in the file."""
    taken: dict[str, Tensor]
    """By the module's names."""
    other_shape: list[str]
    """Names of the module whose tensor in the file has another shape."""
    unknown: list[str]
    """Names in the file that the module does not have."""
    missing: list[str]
    """Names of the module that the file does not have."""

    def __str__(self) -> str:
        total = len(self.taken) + len(self.other_shape) + len(self.missing)
        parts = [f"{len(self.taken)} of the model's {total} tensors were taken"]
        if self.prefix:
            parts.append(f"without the prefix {self.prefix!r}")
        if self.other_shape:
            parts.append(f"another shape: {shorten_list(self.other_shape)}")
        if self.missing:
            parts.append(f"not in the file: {shorten_list(self.missing)}")
        if self.unknown:
            parts.append(f"not in the model: {shorten_list(self.unknown)}")
        return f"{FIELD}: " + "; ".join(parts)


def load_weights(module: nn.Module, path: str, prefix: str | None = None, strict: bool = False) -> Fit:
    """Copy the tensors of a file into the module's parameters and buffers, by name.

    Args:
        path: a safetensors file; a `.pt`, `.pth`, `.bin` or `.ckpt` file of tensors; or a run folder or checkpoint of
            distmeta.
        prefix: is removed from the names in the file; names without it are left out. None: the prefix with which most
            tensors fit (`module.`, `model.`, `backbone.`, …).
        strict: refuse a file that does not fit in every tensor.

    Raises:
        InputError: there is no such file, it cannot be read without running code, or its tensors do not fit.
    """
    tensors = read_tensors(path)
    targets = dict(module.named_parameters()) | dict(module.named_buffers())
    prefixes = _list_prefixes(tensors) if prefix is None else [prefix]
    fits = [_fit(tensors, targets, candidate) for candidate in prefixes]
    best = max(fits, key=lambda fit: len(fit.taken))  # the first, and so the shortest, of equally good ones
    if not best.taken:
        raise InputError(
            f"{FIELD}: none of the {len(tensors)} tensors of {path!r} fits the model. The file has "
            f"{shorten_list([_describe(*item) for item in list(tensors.items())[:3]])}; the model has "
            f"{shorten_list([_describe(*item) for item in list(targets.items())[:3]])}"
        )
    if strict and (best.other_shape or best.unknown or best.missing):
        raise InputError(f"{best}, expected all of both (model.init_strict)")
    with torch.no_grad():
        for name, value in best.taken.items():
            targets[name].copy_(value)
    return best


def read_tensors(path: str) -> dict[str, Tensor]:
    """Return the tensors of a file or of a checkpoint, by name."""
    place = Path(path).expanduser()
    if place.is_dir():
        folder = _find_checkpoint(place)
        constants = folder / "constants.safetensors"
        theta = _load_safetensors(folder / "theta.safetensors")
        theta = {name.removeprefix("model."): value for name, value in theta.items()}
        return theta | (_load_safetensors(constants) if constants.exists() else {})
    if not place.is_file():
        raise InputError(f"{FIELD}: got {path!r}, expected an existing file or run folder")
    return _load_pickled(place) if place.suffix in PICKLED else _load_safetensors(place)


def _find_checkpoint(folder: Path) -> Path:
    """Return the checkpoint in a run folder (its latest), or the folder itself."""
    pointer = folder / "checkpoints" / "latest"
    if pointer.is_file():
        folder = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    elif pointer.is_dir():  # a link
        folder = pointer
    if not (folder / "theta.safetensors").is_file():
        raise InputError(
            f"{FIELD}: got the folder {str(folder)!r}, expected a run folder or a checkpoint of distmeta"
        )
    return folder


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{FIELD}: {str(path)!r} is not a readable safetensors file: {error}") from None


def _load_pickled(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():  # torch advises on files that it reads all the same
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise InputError(
            f"{FIELD}: {str(path)!r} cannot be read without running code ({first_line(error)}), expected a file of "
            "tensors: save model.state_dict()"
        ) from None
    for key in STATE_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise InputError(
            f"{FIELD}: {str(path)!r} holds a {type(content).__name__}, expected a dict of tensors"
        )
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _list_prefixes(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return "" and all dotted prefixes of the names, the shortest first."""
    prefixes = {""}
    for name in tensors:
        parts = name.split(".")
        for count in range(1, min(len(parts), MOST_PREFIX_PARTS + 1)):
            prefixes.add(".".join(parts[:count]) + ".")
    return sorted(prefixes, key=lambda prefix: (len(prefix), prefix))


def _fit(tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor], prefix: str) -> Fit:
    taken: dict[str, Tensor] = {}
    other_shape = []
    unknown = []
    for key, value in tensors.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name not in targets:
            unknown.append(key)
        elif value.shape != targets[name].shape:
            other_shape.append(name)
        else:
            taken[name] = value
    missing = [name for name in targets if name not in taken and name not in other_shape]
    return Fit(prefix, taken, other_shape, unknown, missing)


def _describe(name: str, value: Tensor) -> str:
    return f"{name} {list(value.shape)}"
