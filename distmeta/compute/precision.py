"""`compute.precision: bf16`: convolutions and matrix products inside the model are computed in bfloat16.

Everything else stays float32: norm layers, softmax, the model's head, losses, inner updates, distances, and whatever an
algorithm computes outside the model. Autocast is on only while the model's forward pass runs. A derivative has the type
of the operation that it belongs to, as torch recommends for autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from distmeta.compute.gradient import to_float32
from distmeta.trees import tree_map_only

FLOAT32_FUNCTIONS = frozenset(
    [
        functional.batch_norm,
        functional.instance_norm,
        functional.group_norm,
        functional.layer_norm,
        functional.rms_norm,
        functional.normalize,
        functional.softmax,
        functional.log_softmax,
        torch.batch_norm,
        torch.instance_norm,
        torch.group_norm,
        torch.layer_norm,
        torch.rms_norm,
        torch.softmax,
        torch.log_softmax,
        Tensor.softmax,
        Tensor.log_softmax,
    ]
)
"""Functions that are given float32 inputs. On a GPU torch's autocast does this for most of them, on a CPU for none."""

CONVOLUTIONS = frozenset(
    [
        functional.conv1d,
        functional.conv2d,
        functional.conv3d,
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
    ]
)

bfloat16_device: ContextVar[str | None] = ContextVar("bfloat16_device", default=None)
"""The type of device on which models compute in bfloat16; None if they compute in float32."""


@contextmanager
def set_model_precision(device: str | None) -> Iterator[None]:
    """Within this block models compute in bfloat16 on a type of device ("cpu", "cuda"), or in float32 (None)."""
    token = bfloat16_device.set(device)
    try:
        yield
    finally:
        bfloat16_device.reset(token)


@contextmanager
def compute_in_bfloat16(device: str, head_weight: Tensor | None) -> Iterator[None]:
    """Run the forward pass of a model in this block with products in bfloat16.

    Args:
        device: type of device, "cpu" or "cuda".
        head_weight: weight of the model's head, which stays float32.
    """
    # No cache: it could return a cast parameter of another function transform.
    autocast = torch.autocast(device, torch.bfloat16, cache_enabled=False)
    with autocast, _Float32Functions(device, head_weight):
        yield


class _Float32Functions(TorchFunctionMode):
    """Computes `FLOAT32_FUNCTIONS`, the head, and convolutions to maps of width 1 in float32.

    Norm layers need it on every processor. In the loop torch 2.13 keeps the statistics of a bfloat16 input in float32
    but not their second derivatives; under vmap it computes the statistics of group norm in bfloat16, and refuses the
    derivative of batch norm (pytorch issue 184890).

    Convolutions to maps of width 1 are wrong on processors with AMX: oneDNN's bfloat16 kernel (3.12, in torch 2.13)
    gives wrong numbers, not just inexact ones, if the output's width is 1 and the stride above 1 (pytorch issue 169688,
    pull request 188426; issue 163347 shows a stride of 1). These maps are small, so float32 costs little. Remove
    `_has_narrow_output` when the oldest torch that we allow has the fix.
    """

    def __init__(self, device: str, head_weight: Tensor | None):
        super().__init__()
        self.device = device
        self.head_weight = head_weight

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._needs_float32(func, args, kwargs):
            return func(*args, **kwargs)
        wide_args, wide_kwargs = tree_map_only(Tensor, to_float32, (args, kwargs))
        with torch.autocast(self.device, enabled=False):
            return func(*wide_args, **wide_kwargs)

    def _needs_float32(self, func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
        if func in FLOAT32_FUNCTIONS:
            return True
        if func is functional.linear:
            return len(args) > 1 and args[1] is self.head_weight
        return self.device == "cpu" and func in CONVOLUTIONS and _has_narrow_output(*args, **kwargs)


def _has_narrow_output(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    """Return whether a convolution's output has width 1 (its last axis). The arguments are those of torch."""
    if padding == "same":
        return input.shape[-1] == 1
    stride = _last(stride)
    padding = 0 if padding == "valid" else _last(padding)
    reach = _last(dilation) * (weight.shape[-1] - 1) + 1
    width = (input.shape[-1] + 2 * padding - reach) // stride + 1
    return width == 1


def _last(value: Any) -> int:
    return value[-1] if isinstance(value, tuple | list) else value
