"""Start from trained weights (`model.init_from`): take the tensors that fit, and say which ones did not."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distmeta.errors import InputError, first_line, shorten_list

FIELD = "model.init_from"
COMPILED = "_orig_mod."
"""What `torch.compile` puts into the names of a module's parameters, in any place."""
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
"""Endings of files that `torch.load` reads. They are read with `weights_only`, which runs no code."""
STATE_KEYS = ("state_dict", "model_state_dict", "model")
"""Where a training script's checkpoint keeps the tensors of its model."""
MOST_PREFIX_PARTS = 3


class Fit(NamedTuple):
    """How the tensors of a file fit a module."""

    prefix: str
    """What was removed from the names in the file."""
    added: str
    """What was put before them: the submodule whose weights the file has."""
    taken: dict[str, Tensor]
    """By the module's names."""
    other_shape: list[str]
    """Names of the module whose tensor in the file has another shape or kind of numbers."""
    unknown: list[str]
    """Names in the file that the module does not have."""
    missing: list[str]
    """Names of the module that the file does not have."""

    def __str__(self) -> str:
        total = len(self.taken) + len(self.other_shape) + len(self.missing)
        parts = [f"{len(self.taken)} of the model's {total} tensors were taken"]
        if self.prefix:
            parts.append(f"without the prefix {self.prefix!r}")
        if self.added:
            parts.append(f"with {self.added!r} before their names")
        if self.other_shape:
            parts.append(f"another shape or type: {shorten_list(self.other_shape)}")
        if self.missing:
            parts.append(f"not in the file: {shorten_list(self.missing)}")
        if self.unknown:
            parts.append(f"not in the model: {shorten_list(self.unknown)}")
        return f"{FIELD}: " + "; ".join(parts)


class Targets(NamedTuple):
    """The tensors of a module. One with several names (tied weights) counts once, by the first of them."""

    tensors: dict[str, Tensor]
    first_names: dict[str, str]
    """By every name."""
    stored: list[str]
    """First names of those that a `state_dict` has: all but buffers that are not persistent."""

    @classmethod
    def from_module(cls, module: nn.Module) -> Targets:
        """Collect a module's parameters and buffers."""
        named = dict(module.named_parameters(remove_duplicate=False))
        named |= dict(module.named_buffers(remove_duplicate=False))
        first_by_id: dict[int, str] = {}
        for name, value in named.items():
            first_by_id.setdefault(id(value), name)
        first_names = {name: first_by_id[id(value)] for name, value in named.items()}
        kept = {first_names[name] for name in module.state_dict() if name in named}
        stored = [name for name in first_by_id.values() if name in kept]
        return cls(named, first_names, stored)


def load_weights(module: nn.Module, path: str, prefix: str | None = None, strict: bool = False) -> Fit:
    """Copy the tensors of a file into the module's parameters and buffers, by name.

    Args:
        path: a safetensors file; a `.pt`, `.pth`, `.bin` or `.ckpt` file of tensors; or a run folder or checkpoint of
            distmeta.
        prefix: is removed from the names in the file; names without it are left out. None: the prefix with which most
            tensors fit (`module.`, `model.`, `backbone.`, …). If none fits, the file may have the weights of one of the
            module's own submodules.
        strict: refuse a file that does not fit in every tensor.

    Raises:
        InputError: there is no such file, it cannot be read without running code, or its tensors do not fit.
    """
    tensors = read_tensors(path)
    if not tensors:
        raise InputError(f"{FIELD}: {path!r} has no tensors, expected a state_dict")
    targets = Targets.from_module(module)
    prefixes = _list_prefixes(tensors) if prefix is None else [prefix.replace(COMPILED, "")]
    best = _find_best_fit(tensors, targets, prefixes, [""])
    if not best.taken:
        best = _find_best_fit(tensors, targets, prefixes, [f"{name}." for name, _ in module.named_children()])
    if not best.taken:
        raise InputError(
            f"{FIELD}: none of the {len(tensors)} tensors of {path!r} fits the model. The file has "
            f"{shorten_list([_describe(*item) for item in list(tensors.items())[:3]])}; the model has "
            f"{shorten_list([_describe(*item) for item in list(targets.tensors.items())[:3]])}"
        )
    if strict and (best.other_shape or best.unknown or best.missing):
        raise InputError(f"{best}, expected all of both (model.init_strict)")
    with torch.no_grad():
        for name, value in best.taken.items():
            targets.tensors[name].copy_(value)
    return best


def read_tensors(path: str) -> dict[str, Tensor]:
    """Return the tensors of a file or of a checkpoint, by the names of a module that is not compiled."""
    return {name.replace(COMPILED, ""): value for name, value in _read_file(path).items()}


def _read_file(path: str) -> dict[str, Tensor]:
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
    except Exception as error:  # a file that is no checkpoint may raise anything
        raise InputError(
            f"{FIELD}: {str(path)!r} cannot be read without running code ({_find_reason(error)}), expected a file of "
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
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return {name: _make_dense(value) for name, value in tensors.items()}


def _find_reason(error: BaseException) -> str:
    """Return which class a pickle needs, from torch's advice on many lines; else the first line."""
    found = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error))
    return f"it needs {found[1]}" if found else first_line(error)


def _make_dense(value: Tensor) -> Tensor:
    if value.is_quantized:
        return value.dequantize()
    return value if value.layout == torch.strided else value.to_dense()


def _list_prefixes(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return "" and all dotted prefixes of the names, the shortest first."""
    prefixes = {""}
    for name in tensors:
        parts = name.split(".")
        for count in range(1, min(len(parts), MOST_PREFIX_PARTS + 1)):
            prefixes.add(".".join(parts[:count]) + ".")
    return sorted(prefixes, key=lambda prefix: (len(prefix), prefix))


def _find_best_fit(
    tensors: Mapping[str, Tensor], targets: Targets, prefixes: Sequence[str], added: Sequence[str]
) -> Fit:
    """Return the fit that takes most tensors; of equally good ones the first, which has the shortest prefix."""
    fits = [_fit(tensors, targets, prefix, before) for before in added or [""] for prefix in prefixes]
    return max(fits, key=lambda fit: len(fit.taken))


def _fit(tensors: Mapping[str, Tensor], targets: Targets, prefix: str, added: str) -> Fit:
    taken: dict[str, Tensor] = {}
    other_shape = []
    unknown = []
    for key, value in tensors.items():
        name = targets.first_names.get(added + key.removeprefix(prefix))
        if not key.startswith(prefix) or name is None:
            unknown.append(key)
        elif _is_like(value, targets.tensors[name]):
            taken[name] = value
        elif name not in other_shape:
            other_shape.append(name)
    missing = [name for name in targets.stored if name not in taken and name not in other_shape]
    return Fit(prefix, added, taken, other_shape, unknown, missing)


def _is_like(value: Tensor, target: Tensor) -> bool:
    """Return whether two tensors have the same shape and are both real, complex, or whole numbers.

    Whole numbers in place of real ones are quantised weights without their scale.
    """
    both_real = value.is_floating_point() == target.is_floating_point()
    both_complex = value.is_complex() == target.is_complex()
    return both_real and both_complex and value.shape == target.shape


def _describe(name: str, value: Tensor) -> str:
    return f"{name} {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
