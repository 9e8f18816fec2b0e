"""A job's precision holds, no matter what the process has set through either of torch's interfaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from distmeta.compute.numerics import _set_tf32, apply_numerics, compute_in_float32

BACKENDS: Any = torch.backends
ASKED: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "TF32, older": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "no TF32, older": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "TF32 everywhere": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
    "TF32 in products": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "no TF32 in convolutions": lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
}


def read_precisions() -> list[str]:
    """Return the newer interface's precision of everything, then of each part."""
    cudnn = BACKENDS.cudnn
    cpu = BACKENDS.mkldnn
    parts = (BACKENDS, BACKENDS.cuda.matmul, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv, cpu.rnn)
    return [part.fp32_precision for part in parts]


@pytest.fixture
def restored_precision() -> Iterator[None]:
    """Restore torch's own precision after the test."""
    yield
    BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    BACKENDS.cuda.matmul.fp32_precision = BACKENDS.mkldnn.matmul.fp32_precision = "none"
    BACKENDS.mkldnn.conv.fp32_precision = BACKENDS.mkldnn.rnn.fp32_precision = "none"


def read_settings() -> tuple[list[str], str, bool, bool]:
    """Return the values of both interfaces. Reading the older one raises if the two disagree."""
    older = BACKENDS.cuda.matmul.allow_tf32, BACKENDS.cudnn.allow_tf32
    return read_precisions()[1:], torch.get_float32_matmul_precision(), *older


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("allowed", [False, True])
def test_settings_of_the_process_neither_matter_nor_change(
    asked: str, allowed: bool, restored_precision: None
) -> None:
    untouched = read_precisions()
    ASKED[asked]()
    before = read_precisions()
    inside = (["ieee"] * 6, "highest", False, False)
    if allowed:
        inside = (["tf32"] * 6, "high", True, True)
    with _set_tf32(allowed, "cuda"):
        assert read_settings() == inside
        with _set_tf32(False, "cuda"):
            assert read_settings() == (["ieee"] * 6, "highest", False, False)
        assert read_settings() == inside
    assert read_precisions() == before
    assert asked == "nothing" or asked.startswith("no TF32") or before != untouched


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_cpu_computes_in_float32(asked: str, precision: str, restored_precision: None) -> None:
    ASKED[asked]()
    before = read_precisions()
    with apply_numerics(1, False, precision):
        assert set(read_precisions()[4:]) <= {"none", "ieee"}
        assert not torch.is_autocast_enabled("cpu"), "it is on only in the forward pass of a model"
        with compute_in_float32("cpu"):
            assert set(read_precisions()[4:]) <= {"none", "ieee"}
            assert not torch.is_autocast_enabled("cpu")
    assert read_precisions() == before
