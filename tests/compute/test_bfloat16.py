"""`compute.precision: bf16`: what is computed in bfloat16, and how far that moves the meta-gradient.

The bound on the error holds on every processor because it is relative to the problem's own sensitivity: how far the
exact meta-gradient moves if only theta is rounded to bfloat16. A processor's own kernels are one case; emulated ones
are the others, so that a processor without bfloat16 instructions tests those too.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from statistics import median
from typing import Any

import pytest
import torch
from conftest import tree
from support.bfloat16_kernels import KERNELS, EmulatedKernels
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distmeta.compute.execution import WHOLE_SHARD, Execution, shard_gradient
from distmeta.compute.numerics import apply_numerics
from distmeta.config.job import Job
from distmeta.models.functional import FunctionalModel
from distmeta.protocols import Theta
from distmeta.runtime.problem import build_problem
from distmeta.seeding import task_ids
from distmeta.trees import tree_leaves

EXECUTIONS = {"loop": Execution("loop", 1), "vmap": Execution("vmap", WHOLE_SHARD)}
SEEDS = range(5)
LARGEST_FACTOR = 8.0
"""Error of bfloat16 in units of the problem's sensitivity. Medians over 3 seeds were 1 to 4. A kernel that is wrong,
not just inexact, gives hundreds."""
PRODUCTS = {"convolution", "convolution_backward", "mm", "bmm", "addmm"}
COPIES = {
    "_to_copy",
    "clone",
    "new_empty",
    "select",
    "slice",
    "permute",
    "transpose",
    "t",
    "view",
    "_unsafe_view",
    "expand",
    "detach",
    "alias",
    "unsqueeze",
    "squeeze",
}
SUMS = {"add", "sum"}
"""Of the terms of a derivative that belongs to products."""


def conv_job(norm: str, seed: int = 0, halvings: int = 1) -> Job:
    """Maps of 4×4 and several images per class: a norm over 3 numbers would amplify any rounding without bound."""
    model = {"type": "conv4", "width": 8, "norm": norm, "pool": "stride", "halvings": halvings}
    tasks = {"type": "digits", "ways": 3, "shots": 3, "queries": 3}
    job = tree({"type": "maml", "inner_lr": 0.05, "inner_steps": 1}, model=model, tasks=tasks)
    return Job.parse(job | {"seed": seed})


def meta_gradient(job: Job, execution: str, theta: Theta | None = None) -> Tensor:
    problem = build_problem(job)
    theta = problem.init() if theta is None else theta
    ids = task_ids(job.seed, "train", 0, 4)
    episodes = problem.family.draw("train", ids)
    result = shard_gradient(
        problem.algorithm, problem.score("train"), theta, episodes, ids, EXECUTIONS[execution]
    )
    return torch.cat([value.flatten() for value in result.gradient.values()])


def relative_distance(exact: Tensor, other: Tensor) -> float:
    return float((other - exact).norm() / exact.norm())


@cache
def exact_gradient(norm: str, seed: int) -> Tensor:
    return meta_gradient(conv_job(norm, seed), "loop")


@cache
def sensitivity(norm: str, seed: int) -> float:
    """How far the float32 meta-gradient moves if theta is rounded to bfloat16."""
    job = conv_job(norm, seed)
    rounded = {name: value.to(torch.bfloat16).float() for name, value in build_problem(job).init().items()}
    return relative_distance(exact_gradient(norm, seed), meta_gradient(job, "loop", rounded))


@pytest.mark.parametrize("kernels", ["this processor's", *KERNELS])
@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_bfloat16_moves_the_gradient_as_little_as_rounding_theta(norm: str, kernels: str) -> None:
    factors: dict[str, list[float]] = {execution: [] for execution in EXECUTIONS}
    for seed in SEEDS[:3] if kernels in KERNELS else SEEDS:
        for execution, found in factors.items():
            emulated = EmulatedKernels(KERNELS[kernels]) if kernels in KERNELS else nullcontext()
            with apply_numerics(1, False, "bf16"), emulated:
                near = meta_gradient(conv_job(norm, seed), execution)
            assert near.dtype == torch.float32
            found.append(relative_distance(exact_gradient(norm, seed), near) / sensitivity(norm, seed))
    for execution, found in factors.items():
        assert 0.1 < median(found) < LARGEST_FACTOR, (execution, found)


class RecordBfloat16(TorchDispatchMode):
    """Records the names of operations that take or return bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        if any(isinstance(leaf, Tensor) and leaf.dtype == torch.bfloat16 for leaf in leaves):
            self.names.add(func.overloadpacket.__name__.rstrip("_"))
        return result


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_only_products_are_computed_in_bfloat16(norm: str, execution: str) -> None:
    """Statistics and derivatives of norms, activations, pooling, losses and inner updates are float32."""
    with apply_numerics(1, False, "bf16"), RecordBfloat16() as recorded:
        meta_gradient(conv_job(norm), execution)
    assert {"convolution", "convolution_backward"} <= recorded.names
    assert recorded.names <= PRODUCTS | COPIES | SUMS


class Normalised(nn.Module):
    """A user's own model, with the functional form of a norm and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.norm = nn.RMSNorm(6)
        self.head = nn.Linear(6, 3)
        self.types: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        body = self.body(x)
        normalised = nn.functional.layer_norm(self.norm(body), (6,))
        weighted = normalised * body.softmax(-1)
        outputs = self.head(weighted)
        self.types = [body.dtype, normalised.dtype, weighted.dtype, outputs.dtype]
        return outputs


def test_norms_softmax_and_head_of_a_users_model_are_float32() -> None:
    model = FunctionalModel(Normalised, torch.Generator().manual_seed(0), out_features=3)
    with apply_numerics(1, False, "bf16"):
        model(model.init(), torch.ones(4, 6))
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert model.module.types == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    assert product.dtype == torch.float32, "outside the model"


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_wrong_convolutions_of_processors_with_amx_are_not_used(execution: str) -> None:
    """Three strided blocks end in maps of one pixel, for which oneDNN's kernel on AMX returns wrong numbers."""
    job = conv_job("none", halvings=3)
    exact = meta_gradient(job, "loop")
    with apply_numerics(1, False, "bf16"), EmulatedKernels(KERNELS["AMX"]):
        near = meta_gradient(job, execution)
    assert relative_distance(exact, near) < 0.2


def test_emulated_amx_kernel_is_wrong_for_narrow_outputs() -> None:
    image = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)
    kernel = torch.ones(1, 1, 3, 3, dtype=torch.bfloat16)
    with EmulatedKernels(KERNELS["AMX"]):
        assert float(nn.functional.conv2d(image, kernel, stride=2, padding=1)) == 7.0
