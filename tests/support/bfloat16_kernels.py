"""Products of bfloat16 numbers as the kernels of various processors may round them, computed with float32 products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten: Any = torch.ops.aten


class Kernels(NamedTuple):
    """How a sum of products is rounded to bfloat16."""

    partial_sums: int = 1  # each is rounded; they are added in bfloat16
    nearest: bool = True  # False: to the bfloat16 number above or below, at random
    only_batched: bool = (
        False  # the partial sums are only those of grouped convolutions and bmm, which vmap uses
    )
    wrong_if_narrow: bool = False  # strided convolutions to a map of width 1 return other numbers (AMX)


KERNELS = {
    "float32 sums": Kernels(),
    "either neighbour": Kernels(nearest=False),
    "bfloat16 sums": Kernels(partial_sums=4),
    "bfloat16 sums under vmap": Kernels(partial_sums=4, only_batched=True),
    "AMX": Kernels(wrong_if_narrow=True),
}
"""AMX: oneDNN 3.12's kernel is wrong there, not just inexact (pytorch issue 169688)."""


class EmulatedKernels(TorchDispatchMode):
    """Replaces convolutions, their gradients, and matrix products, if their inputs are bfloat16."""

    def __init__(self, kernels: Kernels):
        super().__init__()
        self.kernels = kernels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in SPLITS or args[SPLITS[func]].dtype != torch.bfloat16:
            return func(*args, **(kwargs or {}))
        assert not kwargs, f"{func} with {kwargs}: not emulated"
        if self.kernels.wrong_if_narrow and func is aten.convolution.default and _is_narrow(args):
            return torch.full_like(func(*args), 7.0)
        wide = [value.float() if isinstance(value, Tensor) else value for value in args]
        count = self._partial_sums(func, args)
        total: list[Tensor | None] | None = None
        for part in range(count):
            results = func(*self._arguments(func, wide, part, count))
            single = isinstance(results, Tensor)
            rounded = [self._round(value) for value in ([results] if single else results)]
            total = rounded if total is None else [_add(a, b) for a, b in zip(total, rounded, strict=True)]
        assert total is not None
        return total[0] if len(total) == 1 else tuple(total)

    def _partial_sums(self, func: Any, args: Any) -> int:
        batched = func is aten.bmm.default
        if func is aten.convolution.default:
            batched = args[8] > 1
        if func is aten.convolution_backward.default:
            batched = args[9] > 1
        return 1 if self.kernels.only_batched and not batched else self.kernels.partial_sums

    def _arguments(self, func: Any, args: list[Any], part: int, count: int) -> list[Any]:
        """Arguments whose products are every `count`-th of the sum, from `part` on."""
        if count == 1:
            return args
        split = SPLITS[func]
        factor = args[split]
        row = factor[0] if func is aten.convolution.default else factor  # alike for all output channels
        if func in (aten.mm.default, aten.bmm.default, aten.addmm.default):
            row = factor.flatten(0, -2)[0]
        mask = (torch.arange(row.numel()) % count == part).view(row.shape)
        changed = [*args[:split], factor * mask, *args[split + 1 :]]
        if part > 0 and func is aten.convolution.default:
            changed[2] = None  # the bias is added once
        if part > 0 and func is aten.addmm.default:
            changed[0] = torch.zeros_like(args[0])
        return changed

    def _round(self, value: Tensor | None) -> Tensor | None:
        if value is None or self.kernels.nearest:
            return None if value is None else value.to(torch.bfloat16)
        generator = torch.Generator().manual_seed(0)  # alike in every run
        below = torch.randint(1 << 16, value.shape, generator=generator, dtype=torch.int32)
        bits = value.contiguous().view(torch.int32) + below
        return (bits >> 16 << 16).view(torch.float32).to(torch.bfloat16)


def _is_narrow(args: Any) -> bool:
    input, weight, _, stride, padding, dilation, transposed, *_ = args
    if transposed:
        return False
    reach = dilation[-1] * (weight.shape[-1] - 1) + 1
    return stride[-1] > 1 and (input.shape[-1] + 2 * padding[-1] - reach) // stride[-1] + 1 == 1


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a + b


SPLITS: dict[Callable[..., Any], int] = {
    aten.convolution.default: 1,  # the weight
    aten.convolution_backward.default: 0,  # the gradient of the output
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.addmm.default: 1,
}
"""The operations, and which argument is split into parts: the results are linear in it."""
