"""What one run of a user's code reveals before step 0: random numbers, tensors that are changed, failures."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tree
from torch import Tensor, nn

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.evaluation.one_task import run_one_task
from distmeta.protocols import Batch, Episode
from distmeta.runtime.problem import build_problem
from distmeta.runtime.resolve import resolve


def resolve_job(**changes: Any) -> Any:
    run = {"eval_every": 2, "eval_tasks": 2, "tasks_per_step": 4}
    return resolve(build_problem(Job.parse(tree(**({"run": run} | changes)))))


class MeanNet(nn.Module):
    """A small network. Subclasses do something else on the way."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__()
        self.body = nn.Linear(in_shape[0], 4)
        self.head = nn.Linear(4, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class FunctionalDropoutNet(MeanNet):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class NumpyNoiseNet(MeanNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + float(np.random.normal())


class PythonNoiseNet(MeanNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + random.random()


class WritingNet(MeanNet):
    """Normalises its own weights in place."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.head.weight.div_(self.head.weight.norm())
        return super().forward(x)


class ShortEmbeddingNet(nn.Module):
    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__()
        self.table = nn.Embedding(10, 4, max_norm=1.0)
        self.head = nn.Linear(4, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).mean(1))


class FailingNet(MeanNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ torch.ones(7, 7)


class CountingNet(MeanNet):
    """Changes a buffer and then fails on what `inspect_model` gives it."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__(in_shape, out_features)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Any) -> Tensor:
        self.calls += 1
        return super().forward(x)


class ModelOf:
    """The place of this module's classes in a job."""

    def __getattr__(self, name: str) -> dict[str, str]:
        return {"type": f"test_inspection:{name}"}


MODEL = ModelOf()


@pytest.fixture(autouse=True)
def path_of_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_functional_dropout_is_found_and_runs_in_the_loop() -> None:
    assert resolve_job(model=MODEL.FunctionalDropoutNet).execution.mode == "loop"
    with pytest.raises(InputError, match=r"compute.execution: got vmap for a job that draws random numbers"):
        resolve_job(model=MODEL.FunctionalDropoutNet, compute={"execution": "vmap"})
    lines = list(run_one_task(Job.parse(tree(model=MODEL.FunctionalDropoutNet))))
    assert "random numbers: drawn within a task, from a generator that is seeded for each task" in lines
    assert "random numbers: none are drawn within a task" in list(run_one_task(Job.parse(tree())))


@pytest.mark.parametrize(
    ("name", "generator"), [("NumpyNoiseNet", r"\(np\.random\)"), ("PythonNoiseNet", r"\(random\)")]
)
def test_generators_that_are_not_seeded_are_refused(name: str, generator: str) -> None:
    with pytest.raises(InputError, match=rf"draws from .*{generator}, which is not seeded.*draw with torch"):
        resolve_job(model={"type": f"test_inspection:{name}"})


def test_model_that_writes_to_its_weights_is_refused() -> None:
    with pytest.raises(InputError, match=r"forward pass changes 'head.weight', so tasks would influence"):
        resolve_job(model=MODEL.WritingNet)


def test_embedding_with_max_norm_is_refused() -> None:
    with pytest.raises(InputError, match=r"embedding 'table' has max_norm=1, .* Leave max_norm out"):
        resolve_job(model=MODEL.ShortEmbeddingNet, tasks={"type": "hard_cases:DigitSumTasks"})


def test_failing_forward_pass_names_the_users_line() -> None:
    with pytest.raises(InputError, match=r"first meta-gradient .* RuntimeError: .*test_inspection.py:\d+\)"):
        resolve_job(model=MODEL.FailingNet)


def test_changed_buffer_is_found() -> None:
    with pytest.raises(InputError, match=r"forward pass changes 'calls'.*return a new one instead"):
        resolve_job(model=MODEL.CountingNet)


class PairTasks:
    """The input is a tuple of two tensors."""

    in_shape = (1,)
    out_features = 1

    def draw(self, split: str, ids: Any) -> Episode:
        generator = torch.Generator().manual_seed(int(ids[0]) % 2**31)
        x = torch.randn(len(ids), 6, 1, generator=generator)
        return Episode(Batch((x, x), x), Batch((x, x), x))

    def score(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return (outputs - batch.y).square().mean(), {}


class PairNormNet(nn.Module):
    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.head = nn.Linear(1, out_features)

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return self.head(self.norm(x[0]) + x[1])


def test_running_statistics_are_found_if_the_input_is_a_tuple() -> None:
    with pytest.raises(
        InputError, match=r"forward pass changes 'norm.running_mean'.*track_running_stats=False"
    ):
        resolve_job(model=MODEL.PairNormNet, tasks={"type": "test_inspection:PairTasks"})


class ImpureTasks(PairTasks):
    def draw(self, split: str, ids: Any) -> Episode:
        x = torch.randn(len(ids), 6, 1)
        return Episode(Batch(x, x), Batch(x, x))


def test_check_finds_a_draw_that_is_not_a_function_of_the_ids() -> None:
    job = Job.parse(tree(tasks={"type": "test_inspection:ImpureTasks"}))
    with pytest.raises(InputError, match=r"draw gave two different episodes for the same ids"):
        list(run_one_task(job))


class MaskedTransformer(nn.Module):
    """In evaluation torch would take another path here, with nested tensors, which vmap cannot run."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__()
        self.embed = nn.Linear(1, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(8, out_features)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x[:, None].expand(-1, 3, -1))
        is_padding = torch.arange(3, device=x.device).expand(hidden.shape[:2]) == 2
        return self.head(self.encoder(hidden, src_key_padding_mask=is_padding)[:, 0])


def test_transformer_with_a_padding_mask_trains_validates_and_resumes(workplace: Path) -> None:
    run = {"steps": 2, "tasks_per_step": 4, "eval_every": 1, "eval_tasks": 2, "checkpoint_every": 1}
    job = Job.parse(tree(model=MODEL.MaskedTransformer, run=run))
    first = distmeta.train(job)
    longer = distmeta.train(job.replace(run={"steps": 3}), resume=str(first.run))
    assert longer.step == 3
    assert np.isfinite(distmeta.evaluate(longer.run, ["run.eval_tasks=2"]).figures["loss_after"])


class DerivativeNet(MeanNet):
    """The output is a derivative with respect to the input, as in physics-informed networks."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = super().forward(x).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


def test_derivative_in_the_forward_pass_works_everywhere(workplace: Path) -> None:
    run = {"steps": 1, "tasks_per_step": 4, "eval_every": 1, "eval_tasks": 2}
    finished = distmeta.train(Job.parse(tree(model=MODEL.DerivativeNet, run=run)))
    assert np.isfinite(distmeta.evaluate(finished.run, ["run.eval_tasks=2"]).figures["loss_after"])
    predicted = distmeta.load(finished.run).adapt([[0.5], [1.0]], [[0.1], [0.2]])([[0.3]])
    assert predicted.shape == (1, 1)
    assert not predicted.requires_grad
