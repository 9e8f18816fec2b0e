"""What the bits of a result depend on besides its inputs: threads, kernels, reduced precision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def numerics(
    threads: int, deterministic: bool, precision: str = "float32", device: str = "cpu"
) -> Iterator[None]:
    """Runs a block under the job's settings and puts the process's own back.

    - `threads` for operations: the split of a sum over threads changes its bits.
    - `precision`: `float32` means float32: no TF32 in matrix products or convolutions. `tf32`: TF32 there, on
      GPUs that have it. `bf16`: torch.autocast on `device`, so that products and convolutions compute in bfloat16,
      inner and outer losses alike; theta, its gradient, the optimizer and all sums over tasks stay float32.
    - attention by the backend that has second derivatives (the fused ones have none).
    - `deterministic`: deterministic kernels; torch names an operation that has none.
    """
    before = _settings()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for on CUDA
    tf32 = precision == "tf32"
    _apply((threads, deterministic or before[1], tf32, tf32, False))
    # cached casts would be those of another transform's theta
    autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
    try:
        with sdpa_kernel(SDPBackend.MATH), autocast:
            yield
    finally:
        _apply(before)


@contextmanager
def full_precision(device: str) -> Iterator[None]:
    """Float32 for a block within `numerics`."""
    before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _settings() -> tuple[int, bool, bool, bool, bool]:
    """Those of the process that `numerics` changes."""
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        bool(torch.backends.cuda.matmul.allow_tf32),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
    )


def _apply(wanted: tuple[int, bool, bool, bool, bool]) -> None:
    threads, deterministic, matmul, cudnn, benchmark = wanted
    torch.set_num_threads(threads)
    if deterministic != torch.are_deterministic_algorithms_enabled():  # imports all of torch.compile, seconds
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = cudnn
    torch.backends.cudnn.benchmark = benchmark
