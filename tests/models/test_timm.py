"""Networks of timm, against plain autograd. Needs the extra `timm`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from conftest import tree

from distmeta.compute.execution import Execution, shard_gradient
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime.problem import apply_job_numerics, build_problem
from distmeta.runtime.resolve import resolve
from distmeta.seeding import task_ids
from distmeta.trees import tree_map

needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="needs timm")
LORA = {"lora": {"r": 2, "alpha": 4, "target_modules": ["qkv"]}}
VIT = {
    "name": "vit_tiny_patch16_224",
    "options": {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3},
}
RESNET = {"name": "resnet10t", "options": {"stem_width": 4}}


@pytest.fixture(scope="module", autouse=True)
def torchvision_beside_another_torch() -> Any:
    """Declare the operators without which torchvision built for CUDA cannot be imported beside a CPU build of torch."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    if find_spec("torchvision") is not None and "cpu" in torch.__version__:
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield
    del library


def build_job(algorithm: Any = "maml", **model: Any) -> Job:
    tasks = {"type": "digits", "ways": 3, "shots": 1, "queries": 2}
    run = {"tasks_per_step": 2, "shards": 1, "eval_every": 1, "eval_tasks": 2}
    return Job.parse(tree(algorithm, model={"type": "timm"} | model, tasks=tasks, run=run))


@needs_timm
@pytest.mark.parametrize("model", [VIT, VIT | {"peft": LORA}, RESNET, RESNET | {"batch_norm": "fixed"}])
@pytest.mark.parametrize("adapt", ["all", "head"])
def test_meta_gradient_equals_plain_autograd(model: dict[str, Any], adapt: str) -> None:
    problem = build_problem(
        build_job({"type": "maml", "inner_lr": 0.05, "inner_steps": 1, "adapt": adapt}, **model)
    )
    theta = {name: value.double() for name, value in problem.init().items()}
    problem.model.to(dtype=torch.float64)
    ids = task_ids(0, "train", 0, 1)
    drawn = problem.family.draw("train", ids)
    episodes = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, drawn)
    score = problem.score("train")
    with apply_job_numerics(problem.job, problem.device):
        found = shard_gradient(problem.algorithm, score, theta, episodes, ids, Execution("loop", 1)).gradient
        support, query = (tree_map(lambda leaf: leaf[0], part) for part in episodes)
        start = {name: value.clone().requires_grad_() for name, value in theta.items()}
        adapted = problem.algorithm.names

        def compute_loss(parameters: Any, batch: Any) -> Any:
            values = {name.removeprefix("model."): value for name, value in parameters.items()}
            return score(torch.func.functional_call(problem.model.module, values, (batch.x,)), batch)[0]

        loss = compute_loss(start, support)
        gradient = torch.autograd.grad(loss, [start[name] for name in adapted], create_graph=True)
        moved = {name: start[name] - 0.05 * g for name, g in zip(adapted, gradient, strict=True)}
        expected = torch.autograd.grad(compute_loss(start | moved, query), list(start.values()))
    for (name, value), exact in zip(found.items(), expected, strict=True):
        assert float((value - exact).norm()) <= 1e-9 * float(exact.norm()) + 1e-12, name


@needs_timm
def test_batch_norms_carry_nothing_from_task_to_task() -> None:
    problem = build_problem(build_job(**RESNET))
    with apply_job_numerics(problem.job, problem.device):
        resolve(problem)
    assert problem.model.head == ("model.fc.weight", "model.fc.bias")


@needs_timm
def test_theta_of_a_lora_network() -> None:
    theta = build_problem(build_job(**VIT, peft=LORA)).init()
    assert {name.removeprefix("model.") for name in theta} == {
        "blocks.0.attn.qkv.lora_A.default.weight",
        "blocks.0.attn.qkv.lora_B.default.weight",
        "head.weight",
        "head.bias",
    }


@needs_timm
def test_unknown_network_is_one_line() -> None:
    with pytest.raises(
        InputError, match=r"model.name: got 'resnet1O', expected a network of timm; did you mean"
    ):
        build_problem(build_job(name="resnet1O"))


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_missing_timm_is_one_line() -> None:
    with pytest.raises(
        InputError, match=r"model.type: got timm, which cannot be imported \(No module named 'timm'"
    ):
        build_problem(build_job(name="resnet18"))
