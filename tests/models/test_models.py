"""Models as pure functions of their parameters, the shipped models, and unusual models of users."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tree
from safetensors.torch import save_file
from torch import Tensor, nn

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.models.conv4 import Conv4
from distmeta.models.functional import FunctionalModel
from distmeta.models.mlp import MLP
from distmeta.models.resnet12 import ResNet12
from distmeta.protocols import Batch, Episode
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.problem import build_problem
from distmeta.runtime.resolve import resolve


class Masked(nn.Linear):
    """A model with a constant buffer and a parameter that is not trained."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__(in_shape[0], out_features)
        self.register_buffer("mask", torch.tensor([3.0]))
        self.scale = nn.Parameter(torch.tensor([2.0]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.mask * self.scale


class Tied(nn.Module):
    """A model with one matrix under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(3, 3, bias=False)
        self.out = nn.Linear(3, 3, bias=False)
        self.out.weight = self.into.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.into(x))


def build_model(module: Any = None, seed: int = 0, **options: Any) -> FunctionalModel:
    build = module or (lambda: MLP((3,), 2, hidden=[4]))
    return FunctionalModel(build, torch.Generator().manual_seed(seed), **options)


def build_job(**changes: Any) -> Job:
    return Job.parse(tree(**changes))


class Recurrent(nn.Module):
    """A model that reads x [N, F] as sequences of numbers. It records whether cuDNN is enabled."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__()
        self.cudnn_enabled: list[bool] = []
        self.lstm = nn.LSTM(1, 4, batch_first=True)
        self.head = nn.Linear(4, out_features)

    def forward(self, x_NF: Tensor) -> Tensor:
        self.cudnn_enabled.append(torch.backends.cudnn.enabled)
        return self.head(self.lstm(x_NF[..., None])[0][:, -1])


def test_recurrent_layers_run_without_cudnn() -> None:
    """cuDNN has no second derivative of recurrent layers."""
    model = build_problem(Job.parse(tree("maml", model={"type": "test_models:Recurrent"}))).model
    model(model.init(), torch.ones(3, 2))
    assert model.module.cudnn_enabled == [False]
    assert torch.backends.cudnn.enabled


def test_tied_parameters_have_one_entry_in_theta() -> None:
    model = build_model(Tied)
    x = torch.randn(2, 3)
    weight = torch.randn(3, 3)
    assert model.adaptable == ("model.into.weight",)
    torch.testing.assert_close(model({"model.into.weight": weight}, x), x @ weight.T @ weight.T)


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
@pytest.mark.parametrize("pool", ["max", "stride"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 8), (1, 1, 5)])
def test_conv4_shapes(norm: Any, pool: Any, shape: tuple[int, ...]) -> None:
    model = Conv4(shape, 5, width=8, norm=norm, pool=pool)
    x = torch.randn(6, *shape)
    assert model(x).shape == (6, 5)
    assert model.features(x).shape == (6, model.head.in_features)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [8] * 4
    assert all((c.bias is not None) == (norm == "none") for c in convolutions)
    assert {c.stride for c in convolutions} == {(1, 1) if pool == "max" else (2, 2)}
    assert not list(model.buffers())


def test_conv4_has_as_many_features_as_in_the_papers() -> None:
    assert Conv4((1, 28, 28), 5).head.in_features == 64
    assert Conv4((3, 84, 84), 5, width=32).head.in_features == 32 * 5 * 5
    assert Conv4((3, 84, 84), 5, width=32, pool="stride").head.in_features == 32


def test_conv4_may_keep_the_map_as_features() -> None:
    maps = Conv4((1, 28, 28), 5, width=[4, 6, 8, 10], pool="stride", halvings=3, average=False)
    assert maps.head.in_features == 10 * 4 * 4
    assert [m.out_channels for m in maps.modules() if isinstance(m, nn.Conv2d)] == [4, 6, 8, 10]
    x = torch.rand(3, 1, 28, 28)
    assert maps.features(x).shape == (3, 160)
    assert Conv4((1, 28, 28), 5, width=8, halvings=3).features(x).shape == (3, 8 * 3 * 3)
    assert Conv4((1, 28, 28), 5, width=8, average=True, halvings=0).features(x).shape == (3, 8)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("shape", [(3, 84, 84), (1, 28, 28), (1, 1, 5)])
def test_resnet12_shapes(norm: Any, shape: tuple[int, ...]) -> None:
    model = ResNet12(shape, 5, widths=[4, 6, 8, 10], norm=norm)
    x = torch.randn(2, *shape)
    assert model(x).shape == (2, 5)
    assert model.features(x).shape == (2, 10)
    assert model.blocks(x).shape[2:] == tuple(
        max(side // 16, 1) if min(shape[1:]) > 1 else side for side in shape[1:]
    )
    assert len([m for m in model.modules() if isinstance(m, nn.Conv2d)]) == 4 * 4
    assert not list(model.buffers())


def test_resnet12_has_as_many_parameters_as_in_the_paper() -> None:
    """MetaOptNet's has 12.4 million parameters without the head."""
    model = ResNet12((3, 84, 84), 5)
    assert sum(p.numel() for p in model.blocks.parameters()) == 12_424_320
    assert model.head.in_features == 640


def test_resnet12_with_dropout_trains_with_second_derivatives_and_repeats(workplace: Path) -> None:
    model = {"type": "resnet12", "widths": [2, 2, 3, 4], "dropout": 0.2}
    tasks = {"type": "digits", "ways": 3, "shots": 1, "queries": 2}
    small = tree("maml", model=model, tasks=tasks, run={"steps": 2, "tasks_per_step": 4})
    first = checkpoints.load(distmeta.train(Job.parse(small)).run).theta
    second = checkpoints.load(distmeta.train(Job.parse(small)).run).theta
    start = build_problem(Job.parse(small)).init()
    assert all(first[name].equal(second[name]) for name in first)
    assert any(not first[name].equal(start[name]) for name in first)


def test_batch_norm_has_no_running_statistics() -> None:
    model = Conv4((1, 8, 8), 3, width=4)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 4
    assert not any(m.track_running_stats for m in norms)
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(model.train()(x), model.eval()(x))


def test_conv4_without_images_is_an_error() -> None:
    with pytest.raises(
        InputError, match=r"model.type: got conv4 for inputs of shape \(1,\), expected images"
    ):
        build_problem(build_job(model={"type": "conv4"}))


@pytest.mark.parametrize(("hidden", "count"), [([], 1), ([7], 2), ([5, 6], 3)])
def test_mlp_layers(hidden: list[int], count: int) -> None:
    model = MLP((2, 3), 4, hidden=hidden, activation="tanh")
    assert model(torch.randn(9, 2, 3)).shape == (9, 4)
    linear = [m for m in model if isinstance(m, nn.Linear)]
    assert [m.in_features for m in linear] == [6, *hidden]
    assert len(linear) == count
    assert not isinstance(model[-1], nn.Tanh)


def test_mlp_may_start_as_in_the_papers_code() -> None:
    model = MLP((1,), 1, hidden=[200], init="normal")
    weights = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if n.endswith("weight")])
    assert float(weights.abs().max()) <= 0.02
    assert 0.007 < float(weights.std()) < 0.01
    assert all(not p.detach().any() for n, p in model.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize("module", [None, lambda: Conv4((1, 8, 8), 3, width=4), lambda: Masked((3,), 2)])
def test_functional_model_computes_like_the_module(module: Any) -> None:
    model = build_model(module)
    shape = (1, 8, 8) if isinstance(model.module, Conv4) else (3,)
    x = torch.randn(4, *shape)
    phi = model.init()
    assert all(name.startswith("model.") for name in phi)
    assert torch.equal(model(phi, x), model.module(x))
    other = {name: value + 1 for name, value in phi.items()}
    assert not torch.equal(model(other, x), model.module(x))  # phi is used, not the module's parameters
    phi["model." + next(iter(dict(model.module.named_parameters())))].add_(1)
    assert torch.equal(model(model.init(), x), model.module(x))  # init returns copies


def test_initialisation_depends_only_on_the_generator() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_model(seed=3).init()
    other = build_model(seed=4).init()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = build_model(seed=3).init()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.1.weight"], other["model.1.weight"])


def test_frozen_parameters_are_constants() -> None:
    model = build_model(freeze="1.*")
    theta = model.init()
    x = torch.randn(5, 3)
    assert set(theta) == {"model.3.weight", "model.3.bias"}
    assert set(model.constants) == {"1.weight", "1.bias"}
    assert torch.equal(model(theta, x), model.module(x))
    model.constants["1.weight"] = torch.zeros(4, 3)
    assert not torch.equal(model(theta, x), model.module(x))  # the constants are used


def test_buffers_and_parameters_without_gradient_are_constants() -> None:
    model = build_model(lambda: Masked((3,), 2))
    assert set(model.init()) == {"model.weight", "model.bias"}
    assert set(model.constants) == {"mask", "scale"}


def test_freeze_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(
        InputError, match=r"model.freeze: got '1.wieght', which matches no parameter; did you"
    ):
        build_model(freeze="1.wieght")


def test_frozen_parameters_do_not_change_in_training(workplace: Path) -> None:
    run = distmeta.train(build_job(model={"type": "mlp", "hidden": [8], "freeze": "1.*"})).run
    stored = checkpoints.load(run)
    start = checkpoints.load(run / "checkpoints" / "step-00000000")
    assert set(stored.theta) == {"model.3.weight", "model.3.bias"}
    assert torch.equal(stored.constants["1.weight"], start.constants["1.weight"])
    assert not torch.equal(stored.theta["model.3.weight"], start.theta["model.3.weight"])


def test_init_from_loads_all_or_some_tensors(tmp_path: Path) -> None:
    path = str(tmp_path / "start.safetensors")
    source = build_model(seed=5).init()
    save_file(source, path)  # with names as in a checkpoint's theta
    loaded = build_model(seed=6, init_from=path)
    assert all(torch.equal(loaded.init()[name], value) for name, value in source.items())
    save_file({"1.weight": torch.ones(4, 3)}, path)  # with names as in the module
    partly = build_model(seed=6, init_from=path, freeze="1.weight")
    assert partly.constants["1.weight"].eq(1).all()
    assert torch.equal(partly.init()["model.3.weight"], build_model(seed=6).init()["model.3.weight"])


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"1.weight": torch.ones(2, 3)}, r"tensor '1.weight' has shape \[2, 3\], expected \[4, 3\]"),
        ({"1.wieght": torch.ones(4, 3)}, r"tensor '1.wieght' is not in the model; did you mean '1.weight'\?"),
        (None, "expected an existing safetensors file"),
        (b"not safetensors", "is not a readable safetensors file"),
        (b"", "is not a readable safetensors file"),
    ],
)
def test_init_from_with_another_content_is_an_error(tensors: Any, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    if isinstance(tensors, bytes):
        path.write_bytes(tensors)
    elif tensors is not None:
        save_file(tensors, path)
    with pytest.raises(InputError, match=rf"model.init_from: .*{expected}"):
        build_model(init_from=str(path))


def test_model_that_is_no_module_is_an_error() -> None:
    with pytest.raises(InputError, match=r"model.type: got dict, expected a torch.nn.Module"):
        build_model(dict)


def test_running_statistics_are_an_error_with_a_remedy(workplace: Path) -> None:
    with pytest.raises(
        InputError, match=r"the forward pass changes the buffer '1.running_mean'.*use GroupNorm"
    ):
        distmeta.train(build_job(model={"type": "hard_cases:RunningNorm"}))
    assert not list(workplace.iterdir())


def test_dropout_runs_in_the_loop_and_repeats_bit_by_bit(workplace: Path) -> None:
    small = build_job(
        model={"type": "hard_cases:Dropout"}, run={"steps": 3, "eval_every": 3, "eval_tasks": 4}
    )
    problem = resolve(build_problem(small))
    assert problem.execution.mode == problem.job.compute.execution == "loop"
    first = checkpoints.load(distmeta.train(small).run).theta
    second = checkpoints.load(distmeta.train(small).run).theta
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(
        InputError, match=r"compute.execution: got vmap for a model that draws random numbers"
    ):
        resolve(build_problem(small.replace(compute={"execution": "vmap"})))


def test_fused_attention_trains_with_second_derivatives(workplace: Path) -> None:
    small = build_job(
        model={"type": "hard_cases:Attention"},
        run={"steps": 3, "tasks_per_step": 4, "shards": 2},
        compute={"execution": "loop"},
    )
    summary = distmeta.train(small)
    stored = checkpoints.load(summary.run)
    start = checkpoints.load(summary.run / "checkpoints" / "step-00000000")
    assert summary.loss is not None
    assert np.isfinite(summary.loss)
    assert all(not torch.equal(stored.theta[name], start.theta[name]) for name in stored.theta)


class LargeImages:
    """Tasks with feature maps that are too large to compute several tasks at once on a CPU."""

    in_shape = (1, 600, 600)
    out_features = 1

    def draw(self, split: str, ids: Any) -> Episode:
        x = torch.zeros(len(ids), 2, *self.in_shape)
        return Episode(Batch(x[:, :1], x[:, :1, 0, 0, :1]), Batch(x, x[:, :, 0, 0, :1]))

    def score(self, outputs: torch.Tensor, batch: Batch) -> Any:
        return (outputs - batch.y).square().mean(), {}


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({}, "vmap"),
        ({"model": {"type": "hard_cases:Attention"}}, "vmap"),
        ({"model": {"type": "hard_cases:Branching"}}, "loop"),
        (
            {
                "model": {"type": "conv4", "width": 4, "pool": "stride"},
                "tasks": {"type": "digits", "queries": 2},
            },
            "vmap",
        ),
        (
            {
                "model": {"type": "conv4", "width": 4, "pool": "stride"},
                "tasks": {"type": "digits", "queries": 2},
                "compute": {"precision": "bf16"},
            },
            "loop",
        ),
        ({"compute": {"precision": "bf16"}}, "vmap"),
        ({"model": {"type": "conv4", "width": 2}, "tasks": {"type": "test_models:LargeImages"}}, "loop"),
        ({"compute": {"execution": "loop"}}, "loop"),
        ({"compute": {"execution": "vmap", "chunk": 2}}, "vmap"),
    ],
)
def test_execution_is_chosen_by_a_fixed_rule(changes: dict[str, Any], mode: str) -> None:
    from distmeta.compute.numerics import numerics

    with numerics(1, False):
        problem = resolve(build_problem(build_job(**changes)))
    assert problem.execution.mode == problem.job.compute.execution == mode
    if "chunk" in changes.get("compute", {}):
        assert problem.execution.chunk == 2


def test_impossible_vmap_is_an_error() -> None:
    small = build_job(model={"type": "hard_cases:Branching"}, compute={"execution": "vmap"})
    with pytest.raises(
        InputError, match=r"compute.execution: got vmap, which this model .* cannot run under"
    ):
        resolve(build_problem(small))
    convolutional = build_job(
        model={"type": "conv4", "width": 4},
        tasks={"type": "digits", "queries": 2},
        compute={"execution": "vmap"},
    )
    assert resolve(build_problem(convolutional)).execution.mode == "vmap"


def test_resolving_twice_changes_nothing() -> None:
    problem = resolve(build_problem(build_job()))
    assert resolve(build_problem(problem.job)).job == problem.job


def test_model_on_integers_trains_evaluates_and_adapts(workplace: Path) -> None:
    """Tokens reach the model as integers everywhere."""
    job = tree(
        "maml", model={"type": "hard_cases:Tokens"}, tasks={"type": "hard_cases:Sums"}, run={"eval_tasks": 5}
    )
    run = distmeta.train(Job.parse(job)).run
    assert distmeta.evaluate(run).figures["loss_after"] is not None
    adapted = distmeta.load(run).adapt([[1, 2, 3], [4, 5, 6]], [[0.2], [0.5]])
    assert adapted([[7, 8, 9]]).shape == (1, 1)


@pytest.mark.parametrize("width", [1, 9, 17, 34, 64])
def test_group_norm_works_with_any_width(width: int) -> None:
    assert Conv4((1, 8, 8), 5, width=width, norm="group")(torch.rand(3, 1, 8, 8)).shape == (3, 5)


def test_dropout_with_collected_data_is_an_error(workplace: Path) -> None:
    job = tree("maml", model={"type": "hard_cases:Dropout"}, tasks={"type": "hard_cases:Bandit"})
    with pytest.raises(
        InputError, match=r"model.type: hard_cases:Dropout has dropout, but data are collected"
    ):
        distmeta.train(Job.parse(job))
