"""Gradients through torch.compile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from distmeta.core import InputError

TOLERANCE = {"float32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}
"""Largest relative distance of a compiled result from the eager one. Fused operations round otherwise."""


class Compiler:
    """Compiles a function of tensors once for every set of argument shapes, and checks it on the first arguments.

    The function is traced into one graph of tensor operations with all derivatives written out (`make_fx`): whatever
    Python an algorithm or a model has in it runs once, while tracing, and what depends on a tensor's value is
    refused there. The graph then goes to torch.compile with static shapes. Compiled code is kept in
    torch's own cache on disk, which all processes of a machine share.

    Args:
        precision: of the job's computations; it decides how far the result may be from the eager one.
        trace_only: runs the graph as it is: finds out in a second or two whether there is one.
    """

    def __init__(self, precision: str, trace_only: bool = False):
        self._tolerance, self._trace_only = TOLERANCE[precision], trace_only
        self._programs: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, name: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(*arguments): pytrees of tensors. `name` tells functions apart that take the same shapes.

        Raises:
            InputError: it cannot be compiled, or the compiled result is not the eager one.
        """
        leaves = tree_leaves(arguments)
        key = (name, *((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves))
        known = self._programs.get(key)
        if known is not None:
            return known(*arguments)
        expected = function(*arguments)
        try:
            program: Callable[..., Any] = make_fx(function)(*arguments)
            if not self._trace_only:
                program = torch.compile(program, dynamic=False, fullgraph=True)
            result = program(*arguments)
        except Exception as error:  # whatever tracing or a backend raises
            inner = getattr(error, "inner_exception", error)  # dynamo wraps a backend's
            reason = (str(inner).strip().splitlines() or [type(inner).__name__])[0]
            raise InputError(
                f"compute.compile: got true, but this cannot be compiled ({reason}): use compute.compile=false"
            ) from error
        away = distance(expected, result)
        if not away <= self._tolerance:
            raise InputError(
                f"compute.compile: got true, but the compiled gradient differs from the eager one by {away:.1e} of its "
                f"norm, expected at most {self._tolerance:.0e}: use compute.compile=false"
            )
        self._programs[key] = program
        return result


def distance(expected: Any, result: Any) -> float:
    """‖result − expected‖ / ‖expected‖ over all floating tensors of two pytrees, where both are finite.

    Infinite where one is finite and the other is not.
    """
    apart = size = 0.0
    for a, b in zip(tree_leaves(expected), tree_leaves(result), strict=True):
        if isinstance(a, Tensor) and a.is_floating_point():
            finite = torch.isfinite(a)
            if not torch.equal(finite, torch.isfinite(b)):
                return float("inf")
            apart += float((a - b)[finite].double().square().sum())
            size += float(a[finite].double().square().sum())
    return (apart / size) ** 0.5 if size else apart**0.5


def missing() -> str | None:
    """What torch.compile lacks on this machine; None if it has a C++ compiler."""
    name = os.environ.get("CXX", "g++")
    return None if shutil.which(name) else f"no C++ compiler ({name}) here"
