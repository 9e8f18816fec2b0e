"""Modules as users bring them: lazy, in other precisions, in evaluation mode, wrapped, with spectral norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tree
from torch import Tensor, nn

from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime.problem import build_problem
from distmeta.runtime.resolve import resolve


class Net(nn.Module):
    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__()
        self.body = nn.Linear(1, 4)
        self.head = nn.Linear(4, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class LazyNet(Net):
    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__(in_shape, out_features)
        self.body = nn.Sequential(nn.LazyLinear(4), nn.Dropout(0.5))


class UnusedLazyNet(LazyNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.expand(-1, 4))


class FailingLazyNet(LazyNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ torch.ones(7, 7)


class DoubleNet(Net):
    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__(in_shape, out_features)
        self.double()


class RestingNet(LazyNet):
    """As `from_pretrained` leaves a model."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__(in_shape, out_features)
        self.eval()


class SparseNet(nn.Module):
    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__()
        self.table = nn.Embedding(10, 4, sparse=True)
        self.head = nn.Linear(4, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).mean(1))


def wrap(in_shape: tuple[int, ...], out_features: int) -> nn.Module:
    return nn.DataParallel(Net(in_shape, out_features))


def script(in_shape: tuple[int, ...], out_features: int) -> nn.Module:
    return torch.jit.trace(Net(in_shape, out_features), torch.zeros(2, 1))


class SpectralNet(Net):
    def __init__(self, in_shape: tuple[int, ...], out_features: int, fixed: bool = False):
        super().__init__(in_shape, out_features)
        layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.body = nn.Sequential(nn.Linear(1, 4), layer.eval() if fixed else layer)


class OldSpectralNet(Net):
    def __init__(self, in_shape: tuple[int, ...], out_features: int, fixed: bool = False):
        super().__init__(in_shape, out_features)
        layer = nn.utils.spectral_norm(nn.Linear(4, 4))
        self.body = nn.Sequential(nn.Linear(1, 4), layer.eval() if fixed else layer)


class ParametrizedNet(Net):
    """What a refusal of spectral norm offers instead."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int, kind: str):
        super().__init__(in_shape, out_features)
        parametrize = getattr(nn.utils.parametrizations, kind)
        self.body = nn.Sequential(nn.Linear(1, 4), parametrize(nn.Linear(4, 4)))


class LazyNormNet(Net):
    """Its only lazy tensors are buffers."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__(in_shape, out_features)
        self.body = nn.Sequential(nn.Linear(1, 4), nn.LazyBatchNorm1d(affine=False).eval())


class ComplexNet(Net):
    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__(in_shape, out_features)
        self.phase = nn.Parameter(torch.ones(4, dtype=torch.complex64))


class QuantisedNet(Net):
    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__(in_shape, out_features)
        self.body = torch.ao.nn.quantized.dynamic.Linear(1, 4)


class BagNet(nn.Module):
    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__()
        self.table = nn.EmbeddingBag(10, 4, sparse=True)
        self.head = nn.Linear(4, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


class RestingParts(Net):
    """A whole model in evaluation mode, with one kind of dropout."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int, kind: str):
        super().__init__(in_shape, out_features)
        self.extra: nn.Module = {
            "lstm": lambda: nn.LSTM(4, 4, 2, dropout=0.3),
            "attention": lambda: nn.MultiheadAttention(4, 2, dropout=0.3),
            "none": nn.Identity,
        }[kind]()
        self.eval()


class FixedStatistics(Net):
    """As a pretrained network: everything is in evaluation mode."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__(in_shape, out_features)
        self.body = nn.Sequential(
            nn.Linear(1, 4),
            nn.BatchNorm1d(4),
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
            nn.utils.spectral_norm(nn.Linear(4, 4)),
            nn.Dropout(0.5),
        )
        self.eval()


class NormNet(Net):
    def __init__(self, in_shape: tuple[int, ...], out_features: int, remedy: str = "none"):
        super().__init__(in_shape, out_features)
        norms = {
            "none": lambda: nn.BatchNorm1d(4),
            "batch": lambda: nn.BatchNorm1d(4, track_running_stats=False),
            "group": lambda: nn.GroupNorm(2, 4),
            "eval": lambda: nn.BatchNorm1d(4).eval(),
        }
        self.body = nn.Sequential(nn.Linear(1, 4), norms[remedy]())


@pytest.fixture(autouse=True)
def path_of_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def section(name: str, **options: Any) -> dict[str, Any]:
    return {"type": f"test_prepare_module:{name}", **options}


def resolve_job(name: str, notes: list[str] | None = None, **changes: Any) -> Any:
    model = section(name, **changes.pop("model", {}))
    run = {"tasks_per_step": 2, "shards": 1, "eval_every": 1, "eval_tasks": 2}
    algorithm = changes.pop("algorithm", "maml")
    problem = build_problem(Job.parse(tree(algorithm, model=model, run=run, **changes)))
    return resolve(problem, (notes if notes is not None else []).append)


def test_lazy_layers_get_their_sizes_and_start_the_same_everywhere() -> None:
    first = resolve_job("LazyNet").init()
    second = resolve_job("LazyNet").init()
    assert first["model.body.0.weight"].shape == (4, 1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = resolve_job("LazyNet", seed=5).init()
    assert not torch.equal(first["model.body.0.weight"], other["model.body.0.weight"])
    assert resolve_job("LazyNet").model.module.body[1].training
    assert resolve_job("LazyNormNet").model.constants["body.1.running_var"].shape == (4,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("UnusedLazyNet", r"the size of 'body.0.weight' is unknown after a forward pass"),
        (
            "FailingLazyNet",
            r"its lazy layers need one forward pass on inputs of the tasks, which failed: RuntimeError",
        ),
        (
            "ComplexNet",
            r"the parameter 'phase' is complex, expected real numbers: keep the real and the imaginary part",
        ),
        ("QuantisedNet", r"the layer 'body' is quantised and has no gradient, expected the model before"),
        ("script", r"got a compiled module \(TopLevelTracedModule\), expected the module itself"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")
def test_modules_that_cannot_be_used_are_one_line(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_job(name)


def test_other_precisions_become_float32_and_this_is_said() -> None:
    notes: list[str] = []
    theta = resolve_job("DoubleNet", notes).init()
    assert {value.dtype for value in theta.values()} == {torch.float32}
    assert notes == ["model.type=DoubleNet: parameters of type float64 became float32"]


def test_evaluation_mode_is_kept_and_said_or_changed() -> None:
    notes: list[str] = []
    assert not resolve_job("RestingNet", notes).model.module.body[1].training
    assert len(notes) == 1
    assert notes[0].startswith("model.train_mode: keep: 1 dropout layers are in evaluation mode")
    notes.clear()
    assert resolve_job("RestingNet", notes, model={"train_mode": "train"}).model.module.body[1].training
    assert notes == []


@pytest.mark.parametrize(
    ("kind", "found"),
    [("lstm", "1 dropout layers"), ("attention", "1 dropout layers"), ("none", "the modules RestingParts")],
)
def test_every_kind_of_resting_dropout_is_said(kind: str, found: str) -> None:
    notes = build_problem(Job.parse(tree("maml", model=section("RestingParts", kind=kind)))).model.notes
    assert len(notes) == 1
    assert notes[0].startswith(f"model.train_mode: keep: {found} are in evaluation mode")


def test_norms_that_rest_are_not_said() -> None:
    assert build_problem(Job.parse(tree("maml", model=section("NormNet", remedy="eval")))).model.notes == []


def test_train_mode_leaves_fixed_statistics() -> None:
    problem = resolve_job("FixedStatistics", model={"train_mode": "train"})
    norm, spectral, old_spectral, dropout = list(problem.model.module.body)[1:]
    assert dropout.training
    assert not norm.training
    assert not spectral.parametrizations.weight[0].training
    assert not old_spectral.training
    assert problem.model.module.training
    turned_on = resolve_job("NormNet", model={"remedy": "eval", "train_mode": "train"})
    assert not turned_on.model.module.body[1].training


def test_sparse_embeddings_get_dense_gradients() -> None:
    problem = resolve_job("SparseNet", tasks={"type": "hard_cases:DigitSumTasks"})
    assert problem.execution.mode == "vmap"


def test_wrapped_modules_are_unwrapped() -> None:
    assert "model.body.weight" in resolve_job("wrap").init()


@pytest.mark.parametrize(
    ("name", "vector"), [("SpectralNet", "parametrizations.weight.0._u"), ("OldSpectralNet", "weight_u")]
)
def test_remedies_for_spectral_norm_work(name: str, vector: str) -> None:
    expected = rf"'body.1.{vector}'.* call .eval\(\) on that layer .*, or use weight_norm or orthogonal"
    with pytest.raises(InputError, match=expected):
        resolve_job(name)
    resolve_job(name, model={"fixed": True})


@pytest.mark.parametrize("kind", ["weight_norm", "orthogonal"])
def test_other_parametrizations_work_in_place_of_spectral_norm(kind: str) -> None:
    resolve_job("ParametrizedNet", model={"kind": kind})


def test_remedy_for_embedding_bags_works() -> None:
    tasks = {"type": "hard_cases:DigitSumTasks"}
    with pytest.raises(InputError, match=r"no second derivative .*\(algorithm.first_order=true\)"):
        resolve_job("BagNet", tasks=tasks)
    resolve_job("BagNet", algorithm={"type": "maml", "first_order": True}, tasks=tasks)


def test_remedies_for_running_statistics_work() -> None:
    expected = r"'body.1.running_mean'.*track_running_stats=False .*GroupNorm, or call .eval\(\)"
    with pytest.raises(InputError, match=expected):
        resolve_job("NormNet")
    for remedy in ("batch", "group", "eval"):
        resolve_job("NormNet", model={"remedy": remedy})
