"""Gradients through torch.compile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from distmeta.core import InputError

TOLERANCE = {"float32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}
"""Largest relative distance of a compiled result from the eager one. Fused operations round otherwise."""


class Compiler:
    """Compiles a shard's gradient once for every set of argument shapes, and checks it on the first arguments.

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
        self._programs: dict[tuple[Any, ...], tuple[Callable[..., Any], Callable[..., Any]]] = {}

    def __call__(self, name: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(*arguments) -> (gradient, mask, metrics), of pytrees of tensors.

        `name` tells functions apart that take the same shapes. A mask must be the eager one, and a gradient and every
        metric named `loss…` near it, each by itself; other metrics (accuracies) may jump with a rounding.

        Raises:
            InputError: it cannot be compiled, or the compiled result is not the eager one.
        """
        leaves = tree_leaves(arguments)
        key = (name, *((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves))
        if key in self._programs:
            return self._programs[key][1](*arguments)
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
        self._check(expected, result)
        self._programs[key] = (function, program)  # the function too: `name` may be an id of something in it
        return result

    def _check(self, expected: Any, result: Any) -> None:
        (gradient, mask, metrics), (own_gradient, own_mask, own_metrics) = expected, result
        aways = {"gradient": distance(gradient, own_gradient)}
        aways |= {
            name: distance(value, own_metrics[name])
            for name, value in metrics.items()
            if name.startswith("loss")
        }
        aways["set of finite tasks"] = 0.0 if torch.equal(mask, own_mask) else float("inf")
        name = max(aways, key=lambda name: aways[name])
        if not aways[name] <= self._tolerance:
            raise InputError(
                f"compute.compile: got true, but the compiled {name} differs from the eager one by "
                f"{aways[name]:.1e} of its norm, expected at most {self._tolerance:.0e}: use compute.compile=false"
            )


def distance(expected: Any, result: Any) -> float:
    """‖result − expected‖ / ‖expected‖ over two pytrees, where both are finite; infinite where one alone is."""
    apart = size = 0.0
    for a, b in zip(tree_leaves(expected), tree_leaves(result), strict=True):
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
