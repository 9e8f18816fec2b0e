"""The numerical settings of a process, which the bits of a result depend on: threads, kernels, precision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from distmeta.compute.precision import set_model_precision

# deterministic products on CUDA need it; it is read once, at the first product of a process
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

FULL = ("none", "ieee")
"""Values of torch's `fp32_precision` that mean float32."""


@contextmanager
def numerics(
    threads: int, deterministic: bool, precision: str = "float32", device: str = "cpu"
) -> Iterator[None]:
    """Apply a job's settings in the block, and restore the process's own afterwards.

    - `threads` for operations: how a sum is split over threads changes its bits.
    - `precision`: `float32` means no TF32 in matrix products or convolutions. `tf32` means TF32 there, on GPUs that
      have it. `bf16`: convolutions and products inside the model compute in bfloat16, in inner and outer
      losses alike (`compute.precision`). Everything else stays float32.
    - attention uses the backend that has second derivatives (the fused ones have none).
    - `deterministic`: deterministic kernels. torch raises an error that names an operation without one.
    """
    before = _settings()
    _apply((threads, deterministic or before[1], False))
    bfloat16_device = device if precision == "bf16" else None
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            _tf32(precision == "tf32", device),
            set_model_precision(bfloat16_device),
        ):
            yield
    finally:
        _apply(before)


@contextmanager
def full_precision(device: str) -> Iterator[None]:
    """Compute in float32 in a block within `numerics`."""
    with _tf32(False, device), set_model_precision(None):
        yield


@contextmanager
def _tf32(allowed: bool, device: str) -> Iterator[None]:
    """Allow or forbid TF32 through both of torch's interfaces.

    torch's compiler reads either one. If a process has used the newer interface, the older one cannot be read, and its
    "not allowed" means "as set elsewhere". On a CPU that computes in float32 nothing is changed.
    """
    cudnn: Any = torch.backends.cudnn
    cpu: Any = torch.backends.mkldnn
    if device == "cpu" and all(part.fp32_precision in FULL for part in (cpu.matmul, cpu.conv, cpu.rnn)):
        yield
        return
    parts = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv, cpu.rnn)
    before = [part.fp32_precision for part in parts]
    try:
        older = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # the older interface cannot express what the newer one has set
        older = None
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    cudnn.allow_tf32 = allowed
    for part in parts:
        part.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older[0])
            cudnn.allow_tf32 = older[1]
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


def _settings() -> tuple[int, bool, bool]:
    """Return the settings that `numerics` changes, besides TF32."""
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
    )


def _apply(wanted: tuple[int, bool, bool]) -> None:
    threads, deterministic, benchmark = wanted
    torch.set_num_threads(threads)
    if (
        deterministic != torch.are_deterministic_algorithms_enabled()
    ):  # it imports torch.compile, which takes seconds
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = benchmark
