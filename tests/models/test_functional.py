"""A `torch.nn.Module` as a pure function of its parameters: frozen and tied tensors, weights from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.problem import build_problem


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


def build_model(module: Any = None, seed: int = 0, **options: Any) -> FunctionalModel:
    build = module or (lambda: MLP((3,), 2, hidden=[4]))
    return FunctionalModel(build, torch.Generator().manual_seed(seed), **options)


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


def test_model_that_is_no_module_is_an_error() -> None:
    with pytest.raises(InputError, match=r"model.type: got dict, expected a torch.nn.Module"):
        build_model(dict)


def test_recurrent_layers_run_without_cudnn() -> None:
    """cuDNN has no second derivative of recurrent layers."""
    model = build_problem(Job.parse(tree("maml", model={"type": "test_functional:Recurrent"}))).model
    model(model.init(), torch.ones(3, 2))
    assert model.module.cudnn_enabled == [False]
    assert torch.backends.cudnn.enabled


def test_tied_parameters_have_one_entry_in_theta() -> None:
    model = build_model(Tied)
    x = torch.randn(2, 3)
    weight = torch.randn(3, 3)
    assert model.adaptable == ("model.into.weight",)
    torch.testing.assert_close(model({"model.into.weight": weight}, x), x @ weight.T @ weight.T)


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
    run = distmeta.train(Job.parse(tree(model={"type": "mlp", "hidden": [8], "freeze": "1.*"}))).run
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
