"""What the bits of a result depend on besides its inputs: threads, kernels, reduced precision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def numerics(threads: int, deterministic: bool) -> Iterator[None]:
    """Runs a block under the job's settings and puts the process's own back.

    - `threads` for operations: the split of a sum over threads changes its bits.
    - float32 means float32: no TF32 in matrix products or convolutions.
    - attention by the backend that has second derivatives (the fused ones have none).
    - `deterministic`: deterministic kernels; torch names an operation that has none.
    """
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        bool(torch.backends.cuda.matmul.allow_tf32),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
    )
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for on CUDA
    _apply(threads, deterministic or before[1], False, False, False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _apply(*before)


def _apply(threads: int, deterministic: bool, matmul: bool, cudnn: bool, benchmark: bool) -> None:
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = cudnn
    torch.backends.cudnn.benchmark = benchmark
