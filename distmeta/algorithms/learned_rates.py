"""Keys and shapes of inner learning rates that are part of theta (MAML++, Meta-SGD, Meta-Curvature)."""

from __future__ import annotations

from distmeta.protocols import Model, Theta


def inner_lr_key(name: str) -> str:
    """Return the key of a parameter's learned rate in theta: `inner_lr.<parameter>`."""
    return "inner_lr." + name.removeprefix("model.")


def choose_rate_shapes(model: Model, theta: Theta, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return shapes for learned values per element of phi. A head with free ways has one row for all classes."""
    shapes = {name: (1, *find_parameter_shape(model, name)[1:]) for name in names}
    return {name: tuple(theta[name].shape) if name in theta else shapes[name] for name in names}


def find_parameter_shape(model: Model, name: str) -> tuple[int, ...]:
    """Return the shape of a parameter in the module itself."""
    return tuple(model.module.get_parameter(name.removeprefix("model.")).shape)
