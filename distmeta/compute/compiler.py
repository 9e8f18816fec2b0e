"""Gradients through torch.compile."""

from __future__ import annotations

import os
import shutil
import socket
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

from distmeta.compute.numerics import full_precision
from distmeta.errors import InputError

TOLERANCE = 1e-4
"""Largest relative distance of a compiled result from the eager one in float32. Fused operations round otherwise."""
MOST_PROGRAMS = 16
"""For the same shapes: what changes with every outer step would be compiled for ever."""
SHAKES, SHAKEN = 8, 1e-6
"""How often, and by how much of themselves, arguments are moved to learn how far a rounding may move the result."""


class Compiler:
    """Compiles a shard's gradient once for every set of argument shapes, and checks it on the first arguments.

    The function is traced into one graph of tensor operations with all derivatives written out (`make_fx`): whatever
    Python an algorithm or a model has in it runs once, while tracing, and what depends on a tensor's value is
    refused there. The graph then goes to torch.compile with static shapes. Compiled code is kept in
    torch's own cache on disk, which all processes of a machine share.

    Args:
        precision: of the job's computations. Rounding to bfloat16 alone may move the meta-gradient of a deep network by
            a third; compiled code rounds at other places, and is then held against float32.
        trace_only: runs the graph as it is: finds out in a second or two whether there is one.
    """

    def __init__(self, precision: str, trace_only: bool = False):
        self._reduced, self._trace_only = precision != "float32", trace_only
        self._programs: dict[tuple[Any, ...], tuple[Callable[..., Any], Callable[..., Any]]] = {}

    def __call__(self, name: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(*arguments) -> (gradient, mask, metrics), of pytrees of tensors.

        `name` tells functions apart that take the same shapes; the first of a name is compiled, and kept: the name may
        have ids of what is in it. The mask must be the eager one; the gradient and every metric named `loss…` near it,
        each by itself. Other metrics (accuracies) may jump with a rounding.

        Raises:
            InputError: it cannot be compiled, the compiled result is not the eager one, or there is no end of programs.
        """
        leaves = tree_leaves(arguments)
        key = (name, *((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves))
        if key in self._programs:
            return self._programs[key][1](*arguments)
        if sum(other[1:] == key[1:] for other in self._programs) >= MOST_PROGRAMS:
            raise InputError(
                f"compute.compile: got true, but the algorithm's at(step) asked for more than {MOST_PROGRAMS} "
                "programs, expected one for many steps: hold the numbers that change in its attribute `scheduled`, or "
                "use compute.compile=false"
            )
        expected = function(*arguments)
        try:
            program: Callable[..., Any] = make_fx(function)(*arguments)
            if not self._trace_only:
                program = torch.compile(program, dynamic=False, fullgraph=True)
            with warnings.catch_warnings():
                # advice to compute in another precision than the job's
                warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
                result = program(*arguments)
        except Exception as error:  # whatever tracing or a backend raises
            inner = getattr(error, "inner_exception", error)  # dynamo wraps a backend's
            if isinstance(inner, (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)):
                raise inner from None  # says nothing about the program
            reason = (str(inner).strip().splitlines() or [type(inner).__name__])[0]
            raise InputError(
                f"compute.compile: got true, but this cannot be compiled ({reason}): use compute.compile=false"
            ) from error
        reference = expected
        if self._reduced:
            with full_precision(leaves[0].device.type):
                reference = function(*arguments)
        self._check(reference, expected, result, lambda: _shaken(function, arguments))
        self._programs[key] = (function, program)
        return result

    def _check(self, reference: Any, expected: Any, result: Any, shaken: Callable[[], list[Any]]) -> None:
        """Compares with float32's (`reference`): as near to it as the eager result is, but for a factor of 2. Where it
        is not, also as near as eager results are to each other whose arguments are a rounding apart (`shaken`): a ReLU
        that falls on the other side of zero moves one task's meta-gradient by a hundredth of its norm.
        """
        near: list[Any] | None = None
        for name in ["gradient", *(name for name in expected[2] if name.startswith("loss"))]:

            def part(of: Any, name: str = name) -> Any:
                return of[0] if name == "gradient" else of[2][name]

            exact, eager = part(reference), part(expected)
            away, allowed = distance(exact, part(result)), TOLERANCE + 2 * distance(exact, eager)
            if not away <= allowed:
                near = shaken() if near is None else near
                allowed += 2 * max(distance(eager, part(one)) for one in near)
            if not away <= allowed:
                raise InputError(
                    f"compute.compile: got true, but the compiled {name} differs from the eager one by {away:.1e} of "
                    f"its norm, expected at most {allowed:.0e}: use compute.compile=false"
                )
        if not torch.equal(expected[1], result[1]):
            raise InputError(
                "compute.compile: got true, but compiled and eager gradients are finite for different tasks: "
                "use compute.compile=false"
            )


def _shaken(function: Callable[..., Any], arguments: Any) -> list[Any]:
    """Eager results of arguments whose floating numbers are moved by a rounding, at random."""

    def moved(leaf: Any, generator: torch.Generator) -> Any:
        if not (isinstance(leaf, torch.Tensor) and leaf.is_floating_point()):
            return leaf
        noise = torch.randn(leaf.shape, generator=generator).to(leaf)
        return leaf * (1 + SHAKEN * noise)

    generators = [torch.Generator().manual_seed(seed) for seed in range(SHAKES)]
    return [function(*tree_map(lambda leaf, g=g: moved(leaf, g), arguments)) for g in generators]


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


class MissingCompilerError(InputError):
    """A machine that is to compile lacks something; its argument: what `missing` says."""

    def __str__(self) -> str:
        return f"compute.compile: got true, but there is {self.args[0]}: use compute.compile=false"


def find_missing_tool(device: str) -> str | None:
    """What torch.compile lacks on this machine for a type of device; None: nothing.

    On a CPU it needs a C++ compiler, on a GPU Triton, which needs one of C.
    """
    compiler = os.environ.get("CXX", "g++")
    lacking = None
    if device == "cpu":
        lacking = None if shutil.which(compiler) else f"C++ compiler ({compiler})"
    elif find_spec("triton") is None:
        lacking = "Triton"
    elif not any(shutil.which(name) for name in [os.environ.get("CC", "cc"), "gcc", "clang"]):
        lacking = "C compiler"
    return lacking and f"no {lacking} on {socket.gethostname()}"
