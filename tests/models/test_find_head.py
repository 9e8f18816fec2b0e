"""Which layer is the head: certain, named, or in doubt. `adapt: head` and `body` move exactly its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tree
from torch import Tensor, nn
from torch.nn.utils import prune

from distmeta.compute.execution import Execution, shard_gradient
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.evaluation.one_task import run_one_task
from distmeta.models.head import find_head
from distmeta.runtime.problem import build_problem
from distmeta.seeding import task_ids


class Net(nn.Module):
    """A body, and a head that a subclass changes."""

    def __init__(self, in_shape: tuple[int, ...] = (1,), out_features: int = 1):
        super().__init__()
        self.body = nn.Linear(in_shape[0], 4)
        self.head = nn.Linear(4, out_features)
        self.change()

    def change(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class WeightNormed(Net):
    def change(self) -> None:
        nn.utils.parametrizations.weight_norm(self.head)


class OldWeightNormed(Net):
    def change(self) -> None:
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(self.head)


class Pruned(Net):
    def change(self) -> None:
        prune.l1_unstructured(self.head, "weight", amount=1)


class TwoLayers(Net):
    def change(self) -> None:
        self.head = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


class AliasedHead(Net):
    """The same layer under two names is one layer."""

    def change(self) -> None:
        self.output = self.head


class Tied(nn.Module):
    def __init__(self, in_shape: tuple[int, ...] = (1,), out_features: int = 1):
        super().__init__()
        self.embed = nn.Linear(4, 1, bias=False)
        self.head = nn.Linear(4, 1)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x @ self.embed.weight))


class GateFirst(nn.Module):
    """Two layers have the head's width."""

    def __init__(self, in_shape: tuple[int, ...] = (1,), out_features: int = 1):
        super().__init__()
        self.body = nn.Linear(1, 4)
        self.gate = nn.Linear(4, out_features)
        self.out = nn.Linear(4, out_features)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return self.out(hidden) * self.gate(hidden)


class NamesItsHead(GateFirst):
    head_module = "out"


class ConvolutionalHead(Net):
    """No layer is called head, and none is a linear layer with the outputs of the tasks."""

    def change(self) -> None:
        del self.head
        self.out = nn.Conv1d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.body(x))[..., None])[..., 0]


class SubmoduleCalledHeadModule(Net):
    def change(self) -> None:
        self.head_module = self.head
        del self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head_module(torch.tanh(self.body(x)))


class HeadByKeyword(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=torch.tanh(self.body(x)))


class HeadThatIsNotCalled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.body(x)), self.head.weight, self.head.bias)


@pytest.fixture(autouse=True)
def path_of_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


BODY = {"body.weight", "body.bias"}
HEADS: list[tuple[type[nn.Module], set[str]]] = [
    (Net, {"head.weight", "head.bias"}),
    (WeightNormed, {f"head.parametrizations.weight.original{i}" for i in (0, 1)} | {"head.bias"}),
    (OldWeightNormed, {"head.weight_g", "head.weight_v", "head.bias"}),
    (Pruned, {"head.weight_orig", "head.bias"}),
    (TwoLayers, {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}),
    (AliasedHead, {"head.weight", "head.bias"}),
    (NamesItsHead, {"out.weight", "out.bias"}),
    (SubmoduleCalledHeadModule, {"head_module.weight", "head_module.bias"}),
]


def list_adapted(model: type[nn.Module] | dict[str, Any], adapt: Any) -> set[str]:
    section = model if isinstance(model, dict) else {"type": f"test_find_head:{model.__name__}"}
    job = tree({"type": "maml", "adapt": adapt}, model=section)
    return {name.removeprefix("model.") for name in build_problem(Job.parse(job)).algorithm.names}


@pytest.mark.parametrize(("model", "head"), HEADS, ids=lambda value: getattr(value, "__name__", None))
def test_head_and_body_divide_the_parameters(model: type[nn.Module], head: set[str]) -> None:
    others = {name for name, _ in model().named_parameters()} - head
    assert list_adapted(model, "head") == head
    assert list_adapted(model, "body") == others
    assert list_adapted(model, "all") == head | others
    assert others >= BODY


def test_job_names_the_head() -> None:
    model = {"type": "test_find_head:GateFirst", "head_module": "gate"}
    assert list_adapted(model, "head") == {"gate.weight", "gate.bias"}
    with pytest.raises(InputError, match=r"model.head_module: got 'gaet', .* did you mean 'gate'\?"):
        list_adapted(model | {"head_module": "gaet"}, "head")


@pytest.mark.parametrize("adapt", ["head", "body", ["body", "out.*"]])
def test_head_in_doubt_is_an_error_only_for_those_who_need_it(adapt: Any) -> None:
    expected = r"model.head_module: missing, but 2 linear layers have 1 outputs \(gate, out\): name the head"
    with pytest.raises(InputError, match=expected):
        list_adapted(GateFirst, adapt)
    assert len(list_adapted(GateFirst, "all")) == 6


@pytest.mark.parametrize("adapt", ["head", "body"])
def test_unknown_head_is_an_error_for_those_who_need_it(adapt: str) -> None:
    expected = (
        f"algorithm.adapt: got '{adapt}', but ConvolutionalHead has no submodule 'head' and no linear layer"
    )
    with pytest.raises(InputError, match=expected):
        list_adapted(ConvolutionalHead, adapt)
    model = {"type": "test_find_head:ConvolutionalHead"}
    out = {"out.weight", "out.bias"}
    assert list_adapted(model, "all") == BODY | out
    assert list_adapted(model | {"head_module": "out"}, adapt) == {"head": out, "body": BODY}[adapt]


def test_features_are_the_inputs_of_the_head_however_it_is_called() -> None:
    x = torch.linspace(-1, 1, 5)[:, None]
    features = []
    for kind in (Net, HeadByKeyword):
        section = {"type": f"test_find_head:{kind.__name__}"}
        problem = build_problem(Job.parse(tree("maml", model=section)))
        theta = problem.init()
        features.append(problem.model.features(theta, x))
        hidden = torch.tanh(x @ theta["model.body.weight"].T + theta["model.body.bias"])
        torch.testing.assert_close(features[-1], hidden)
    assert torch.equal(*features)
    problem = build_problem(Job.parse(tree("maml", model={"type": "test_find_head:HeadThatIsNotCalled"})))
    with pytest.raises(
        InputError,
        match=r"'head' of HeadThatIsNotCalled is not called in the forward pass, expected self.head",
    ):
        problem.model.features(problem.init(), x)


def test_tied_head_is_an_error_that_names_the_other_layer() -> None:
    expected = r"model.head_module: the head 'head' shares a parameter with 'embed' \(tied weights\)"
    with pytest.raises(InputError, match=expected):
        list_adapted(Tied, "head")
    with pytest.raises(InputError, match=expected):
        list_adapted({"type": "test_find_head:Tied", "head_module": "head"}, "head")
    assert list_adapted(Tied, "*") == {"embed.weight", "head.bias"}


def test_several_globs() -> None:
    assert list_adapted(TwoLayers, ["head.0.*", "body.bias"]) == {"head.0.weight", "head.0.bias", "body.bias"}
    assert list_adapted(TwoLayers, ["head", "body.bias"]) == set(dict(TwoLayers().named_parameters())) - {
        "body.weight"
    }
    with pytest.raises(InputError, match=r"algorithm.adapt: got 'neck.\*', which matches no parameter"):
        list_adapted(TwoLayers, ["head", "neck.*"])


@pytest.mark.parametrize("head", ["shared", "prototype"])
def test_computed_heads_need_a_plain_linear_layer(head: str) -> None:
    with pytest.raises(
        InputError, match=r"model.head_module: got 'head' of WeightNormed, expected a plain linear"
    ):
        list_adapted({"type": "test_find_head:WeightNormed", "head": head}, "all")


def test_head_of_a_mlp_whose_hidden_layers_have_its_width() -> None:
    model = {"type": "mlp", "hidden": [1, 1]}
    assert list_adapted(model, "head") == {"5.weight", "5.bias"}
    assert find_head(nn.Linear(3, 2), 5).module is None


def compute_by_hand(module: nn.Module, head: set[str], episode: Any, inner_lr: float) -> dict[str, Tensor]:
    """Return the meta-gradient of one inner step on the head, by plain autograd."""
    theta = {name: value.detach().clone().requires_grad_() for name, value in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], batch: Any) -> Tensor:
        outputs = torch.func.functional_call(module, parameters, (batch.x[0],))
        return (outputs - batch.y[0]).square().mean()

    names = sorted(head)
    gradient = torch.autograd.grad(
        loss(theta, episode.support), [theta[name] for name in names], create_graph=True
    )
    moved = {name: theta[name] - inner_lr * g for name, g in zip(names, gradient, strict=True)}
    found = torch.autograd.grad(loss(theta | moved, episode.query), list(theta.values()))
    return dict(zip(theta, found, strict=True))


@pytest.mark.parametrize(("model", "head"), HEADS[:5], ids=lambda value: getattr(value, "__name__", None))
def test_meta_gradient_of_an_adapted_head_equals_plain_autograd(
    model: type[nn.Module], head: set[str]
) -> None:
    algorithm = {"type": "maml", "adapt": "head", "inner_lr": 0.3, "inner_steps": 1}
    problem = build_problem(Job.parse(tree(algorithm, model={"type": f"test_find_head:{model.__name__}"})))
    theta = {name: value.double() for name, value in problem.init().items()}
    problem.model.to(dtype=torch.float64)
    ids = task_ids(0, "train", 0, 1)
    episode = problem.family.draw("train", ids)
    episode = episode._replace(
        support=episode.support._replace(x=episode.support.x.double(), y=episode.support.y.double()),
        query=episode.query._replace(x=episode.query.x.double(), y=episode.query.y.double()),
    )
    execution = Execution("loop", 1)
    found = shard_gradient(problem.algorithm, problem.score("train"), theta, episode, ids, execution).gradient
    expected = compute_by_hand(problem.model.module, head, episode, 0.3)
    for name, value in expected.items():
        torch.testing.assert_close(found[f"model.{name}"], value, rtol=1e-9, atol=1e-12)


def test_check_prints_what_is_adapted() -> None:
    job = tree({"type": "maml", "adapt": "head"}, model={"type": "test_find_head:WeightNormed"})
    lines = list(run_one_task(Job.parse(job)))
    names = "head.bias, head.parametrizations.weight.original0, head.parametrizations.weight.original1"
    assert f"adapts 3 of 5 tensors, 6 numbers: {names}" in lines
