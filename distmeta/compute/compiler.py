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

from distmeta.compute.numerics import compute_in_float32
from distmeta.errors import InputError, first_line
from distmeta.trees import tree_leaves, tree_map

TOLERANCE = 1e-4
"""Largest relative distance between a compiled and an eager result in float32. Fused operations round differently."""
MOST_PROGRAMS = 16
"""Programs for the same shapes. Otherwise an algorithm that changes in every outer step would be compiled in each."""
PERTURBED_RESULTS = 8
PERTURBATION = 1e-6
"""The effect of rounding is measured on so many copies of the arguments, with relative changes of this size."""

Function = Callable[..., Any]
"""function(*arguments) -> (gradient, mask, metrics), of pytrees of tensors."""


class Compiler:
    """Compiles a chunk's gradient once for every set of argument shapes, and checks it on the first arguments.

    The function is traced into one graph of tensor operations that contains all derivatives (`make_fx`). Python code in
    an algorithm or a model runs only once, while tracing; code that depends on a tensor's value is refused there. The
    graph then goes to torch.compile with static shapes. Compiled code is kept in torch's own cache on disk, which all
    processes of a machine share.

    Args:
        precision: of the job. Compiled code rounds to bfloat16 at other places than eager code, so in `bf16` both are
            compared with a float32 result.
        trace_only: run the traced graph without compiling it. This shows within seconds whether tracing works.
    """

    def __init__(self, precision: str, trace_only: bool = False):
        self._is_reduced = precision != "float32"
        self._trace_only = trace_only
        self._programs: dict[tuple[Any, ...], tuple[Function, Function]] = {}
        """Function and program by name and shapes."""

    def __call__(self, name: Any, function: Function, *arguments: Any) -> Any:
        """Return function(*arguments), computed by its compiled program.

        Args:
            name: tells apart functions that take the same shapes. Only the first function of a name is compiled. It is
                kept in memory, because the name may contain `id`s of its objects, which Python could reuse.

        Raises:
            InputError: the function cannot be compiled, the compiled result is not the eager one, or there are too many
                programs.
        """
        leaves = tree_leaves(arguments)
        key = (name, *((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves))
        if key in self._programs:
            return self._programs[key][1](*arguments)
        if sum(other[1:] == key[1:] for other in self._programs) >= MOST_PROGRAMS:
            raise InputError(
                f"compute.compile: got true, but the algorithm's at(step) needs more than {MOST_PROGRAMS} "
                "programs, expected one for many steps: put the values that change in its attribute `scheduled`, or "
                "use compute.compile=false"
            )
        expected = function(*arguments)
        program, result = self._compile(function, arguments)
        reference = expected
        if self._is_reduced:
            with compute_in_float32(leaves[0].device.type):
                reference = function(*arguments)
        self._check(reference, expected, result, lambda: _compute_perturbed_results(function, arguments))
        self._programs[key] = (function, program)
        return result

    def _compile(self, function: Function, arguments: Any) -> tuple[Function, Any]:
        """Return the program and its result."""
        try:
            program: Function = make_fx(function)(*arguments)
            if not self._trace_only:
                program = torch.compile(program, dynamic=False, fullgraph=True)
            with warnings.catch_warnings():
                # torch advises to compute in another precision than the job's
                warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
                return program, program(*arguments)
        except Exception as error:  # whatever tracing or a backend raises
            # torch.compile wraps what a backend raises (public attribute of torch._dynamo's BackendCompilerFailed)
            inner = getattr(error, "inner_exception", error)
            if isinstance(inner, (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)):
                raise inner from None  # a machine's failure says nothing about the program
            raise InputError(
                f"compute.compile: got true, but this cannot be compiled ({first_line(inner)}): "
                "use compute.compile=false"
            ) from error

    def _check(
        self, reference: Any, expected: Any, result: Any, compute_perturbed: Callable[[], list[Any]]
    ) -> None:
        """Compare a compiled result with the eager one.

        The masks must be equal. The gradient and every metric named `loss…` are compared one by one with `reference`,
        the float32 result: each may be twice as far from it as the eager one. If it is farther, it may also be twice as
        far as eager results are from each other if their arguments differ by a rounding. (If rounding puts the input of
        one ReLU on the other side of zero, one task's meta-gradient changes by a hundredth of its norm.) Other metrics
        are not compared, because accuracies jump.

        Raises:
            InputError: they differ by more.
        """
        perturbed: list[Any] | None = None
        for name in ["gradient", *(name for name in expected[2] if name.startswith("loss"))]:

            def select(results: Any, name: str = name) -> Any:
                return results[0] if name == "gradient" else results[2][name]

            exact = select(reference)
            eager = select(expected)
            distance = measure_distance(exact, select(result))
            allowed = TOLERANCE + 2 * measure_distance(exact, eager)
            if not distance <= allowed:
                perturbed = compute_perturbed() if perturbed is None else perturbed
                allowed += 2 * max(measure_distance(eager, select(one)) for one in perturbed)
            if not distance <= allowed:
                raise InputError(
                    f"compute.compile: got true, but the compiled {name} differs from the eager one by {distance:.1e} "
                    f"of its norm, expected at most {allowed:.0e}: use compute.compile=false"
                )
        if not torch.equal(expected[1], result[1]):
            raise InputError(
                "compute.compile: got true, but compiled and eager gradients are finite for different tasks: "
                "use compute.compile=false"
            )


def _compute_perturbed_results(function: Function, arguments: Any) -> list[Any]:
    """Return eager results of arguments whose floating-point numbers are changed at random by about a rounding."""

    def perturb(leaf: Any, generator: torch.Generator) -> Any:
        if not (isinstance(leaf, torch.Tensor) and leaf.is_floating_point()):
            return leaf
        noise = torch.randn(leaf.shape, generator=generator).to(leaf)
        return leaf * (1 + PERTURBATION * noise)

    results = []
    for seed in range(PERTURBED_RESULTS):
        generator = torch.Generator().manual_seed(seed)
        perturbed = tree_map(lambda leaf, generator=generator: perturb(leaf, generator), arguments)
        results.append(function(*perturbed))
    return results


def measure_distance(expected: Any, result: Any) -> float:
    """Return ‖result − expected‖ / ‖expected‖ over two pytrees, over the numbers that are finite in both.

    It is infinite if a number is finite in only one of them.
    """
    squared_distance = 0.0
    squared_norm = 0.0
    for a, b in zip(tree_leaves(expected), tree_leaves(result), strict=True):
        is_finite = torch.isfinite(a)
        if not torch.equal(is_finite, torch.isfinite(b)):
            return float("inf")
        squared_distance += float((a - b)[is_finite].double().square().sum())
        squared_norm += float(a[is_finite].double().square().sum())
    return (squared_distance / squared_norm) ** 0.5 if squared_norm else squared_distance**0.5


class MissingCompilerError(InputError):
    """A machine that has to compile lacks a tool. The argument is what `find_missing_tool` returned."""

    def __str__(self) -> str:
        return f"compute.compile: got true, but there is {self.args[0]}: use compute.compile=false"


def find_missing_tool(device_type: str) -> str | None:
    """Return what torch.compile lacks on this machine, as "no … on HOST"; None if nothing.

    On a CPU it needs a C++ compiler, on a GPU Triton, which needs a C compiler.
    """
    cpp_compiler = os.environ.get("CXX", "g++")
    c_compilers = [os.environ.get("CC", "cc"), "gcc", "clang"]
    missing = None
    if device_type == "cpu":
        if shutil.which(cpp_compiler) is None:
            missing = f"C++ compiler ({cpp_compiler})"
    elif find_spec("triton") is None:
        missing = "Triton"
    elif not any(shutil.which(name) for name in c_compilers):
        missing = "C compiler"
    return None if missing is None else f"no {missing} on {socket.gethostname()}"
