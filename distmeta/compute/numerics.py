"""Numerical settings of a process that change the bits of a result: threads, kernels, precision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from distmeta.compute.precision import set_model_precision

# Deterministic matrix products on CUDA need this variable. CUDA reads it once, before a process's first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

FLOAT32_VALUES = ("none", "ieee")
"""Values of torch's `fp32_precision` that mean float32."""


class _Settings(NamedTuple):
    """The settings of torch that `apply_numerics` changes, except for TF32 and bfloat16."""

    threads: int
    deterministic: bool
    benchmark: bool
    """Whether cuDNN tries several kernels and takes the fastest one, which may differ from run to run."""
    attention_fast_path: bool
    """Whether torch's attention layers use another implementation in evaluation than in training."""


@contextmanager
def apply_numerics(
    threads: int, deterministic: bool, precision: str = "float32", device: str = "cpu"
) -> Iterator[None]:
    """Apply a job's numerical settings within the block, and restore those of the process afterwards.

    Attention uses the backend that has second derivatives. The fused backends have none. `nn.TransformerEncoder` and
    `nn.MultiheadAttention` compute the same way in evaluation as in training.

    Args:
        threads: of torch's operations. The bits of a sum depend on how it is split over threads.
        deterministic: use deterministic kernels. If an operation has none, torch raises an error that names it.
        precision: `float32`: no TF32. `tf32`: matrix products and convolutions may use TF32, on GPUs that have it.
            `bf16`: matrix products and convolutions inside the model use bfloat16 (`compute.precision`). Everything
            else stays float32.
        device: type of device that computes, "cpu" or "cuda".
    """
    before = _read_settings()
    _change_settings(
        _Settings(threads, deterministic or before.deterministic, benchmark=False, attention_fast_path=False)
    )
    bfloat16_device = device if precision == "bf16" else None
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            _set_tf32(precision == "tf32", device),
            set_model_precision(bfloat16_device),
        ):
            yield
    finally:
        _change_settings(before)


@contextmanager
def compute_in_float32(device: str) -> Iterator[None]:
    """Within a block of `apply_numerics`, compute in float32 whatever precision the job has."""
    with _set_tf32(False, device), set_model_precision(None):
        yield


@contextmanager
def _set_tf32(allowed: bool, device: str) -> Iterator[None]:
    """Allow or forbid TF32 within the block, through both of torch's interfaces.

    Both are set because torch's compiler reads either one. If a process has used the newer interface, the older one
    may be unreadable, and its "not allowed" does not overrule the newer one. A CPU that computes in float32 anyway
    needs no change.
    """
    cudnn: Any = torch.backends.cudnn
    cpu: Any = torch.backends.mkldnn
    cpu_parts = (cpu.matmul, cpu.conv, cpu.rnn)
    if device == "cpu" and all(part.fp32_precision in FLOAT32_VALUES for part in cpu_parts):
        yield
        return
    parts = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, *cpu_parts)
    before = [part.fp32_precision for part in parts]
    try:
        older_before = (torch.get_float32_matmul_precision(), cudnn.allow_tf32)
    except RuntimeError:  # the older interface cannot express the values that the newer one has
        older_before = None
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    cudnn.allow_tf32 = allowed
    for part in parts:
        part.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        if older_before is not None:
            torch.set_float32_matmul_precision(older_before[0])
            cudnn.allow_tf32 = older_before[1]
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


def _read_settings() -> _Settings:
    return _Settings(
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.mha.get_fastpath_enabled(),
    )


def _change_settings(settings: _Settings) -> None:
    torch.set_num_threads(settings.threads)
    # Only on a change, because this function imports torch.compile, which takes seconds.
    if settings.deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(settings.deterministic)
    torch.backends.cudnn.benchmark = settings.benchmark
    torch.backends.mha.set_fastpath_enabled(settings.attention_fast_path)
