"""The outer optimizer: schedules, parameter groups, a moving average of theta, and optimizers of a user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tree
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import distmeta
from distmeta.compute.vectors import Layout
from distmeta.config.job import Job
from distmeta.config.parts import import_part
from distmeta.config.sections import OuterSection
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.outer_optimizer import AVERAGE, select_average
from distmeta.runtime.outer_rates import OuterRates
from distmeta.runtime.parameter_server import ParameterServer


def build_theta() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)}


def draw_gradients(count: int) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(1)
    layout = Layout.from_theta(build_theta())
    shapes = {name: value.shape for name, value in build_theta().items()}
    return [
        layout.flatten({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
        for _ in range(count)
    ]


def parse_outer(**options: Any) -> OuterSection:
    return Job.parse(tree(outer=options)).outer


def test_warm_up_then_cosine_equals_torchs_schedulers() -> None:
    steps, warmup = 12, 4
    outer = parse_outer(lr=0.3, schedule={"type": "cosine", "steps": steps, "warmup": warmup})
    server = ParameterServer(build_theta(), outer)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    rise = LinearLR(optimizer, 1 / warmup, 1.0, total_iters=warmup - 1)
    fall = CosineAnnealingLR(optimizer, T_max=steps - warmup)
    scheduler = SequentialLR(optimizer, [rise, fall], milestones=[warmup])
    for gradient in draw_gradients(steps):
        assert server.rate() == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        server.step(gradient)
        optimizer.step()
        scheduler.step()


TORCH = "torch.optim.lr_scheduler:"
SCHEDULES: dict[str, dict[str, Any]] = {
    "OneCycleLR": {"max_lr": 0.5, "total_steps": 12, "cycle_momentum": False},
    "CosineAnnealingWarmRestarts": {"T_0": 3, "T_mult": 2, "eta_min": 0.01},
    "MultiStepLR": {"milestones": [2, 5], "gamma": 0.5},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.3, "step_size_up": 2, "cycle_momentum": False},
    "PolynomialLR": {"total_iters": 8, "power": 2.0},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_any_scheduler_of_torch(name: str) -> None:
    """The rates of both groups are torch's, also after a restart and after going back."""
    options = SCHEDULES[name]
    groups = {"b": {"lr": 0.05}}
    outer = parse_outer(
        optimizer="sgd", lr=0.3, groups=groups, schedule={"type": TORCH + name, "options": options}
    )
    rates = OuterRates(("a", "b"), outer)
    parameters = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.3, 0.05)]
    optimizer = torch.optim.SGD(parameters)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **options)
    expected = []
    for step in range(12):
        expected.append([group["lr"] for group in optimizer.param_groups])
        assert rates.of_tensors() == expected[-1]
        assert OuterRates(("a", "b"), outer, step).of_tensors() == expected[-1]
        rates.advance()
        optimizer.step()
        scheduler.step()
    rates.steps = 2
    assert rates.of_tensors() == expected[2]


def test_scheduler_of_torch_follows_the_warm_up() -> None:
    schedule = {"type": TORCH + "ExponentialLR", "options": {"gamma": 0.5}, "warmup": 2}
    rates = OuterRates(("a",), parse_outer(lr=0.4, schedule=schedule))
    found = []
    for _ in range(5):
        found += rates.of_groups()
        rates.advance()
    assert found == pytest.approx([0.2, 0.4, 0.4, 0.2, 0.1])


def test_groups_equal_torchs() -> None:
    """Every option of a group reaches its tensors and no others."""
    outer = parse_outer(
        optimizer="adamw",
        lr=0.1,
        weight_decay=0.3,
        groups={"b": {"lr": 0.02, "weight_decay": 0.0, "betas": [0.5, 0.7], "eps": 1e-3}},
    )
    server = ParameterServer(build_theta(), outer)
    a, b = (nn.Parameter(value.clone()) for value in build_theta().values())
    other = {"params": [b], "lr": 0.02, "weight_decay": 0.0, "betas": (0.5, 0.7), "eps": 1e-3}
    optimizer = torch.optim.AdamW([{"params": [a]}, other], lr=0.1, weight_decay=0.3, foreach=False)
    for gradient in draw_gradients(5):
        parts = server.layout.unflatten(gradient)
        a.grad = parts["a"]
        b.grad = parts["b"]
        optimizer.step()
        server.step(gradient)
    assert torch.equal(server.theta()["a"], a.detach())
    assert torch.equal(server.theta()["b"], b.detach())


def test_groups_may_change_during_a_run() -> None:
    """The optimizer's state is kept for each tensor, whatever the groups are."""
    outer = parse_outer(lr=0.1, groups={"a": {"weight_decay": 0.1}})
    server = ParameterServer(build_theta(), outer)
    gradients = draw_gradients(4)
    for gradient in gradients[:2]:
        server.step(gradient)
    before, _ = server.state()
    server.retune(parse_outer(lr=0.1, groups={"b": {"lr": 0.5}}))
    after, _ = server.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_average_equals_torchs_averaged_model(optimizer: str) -> None:
    server = ParameterServer(build_theta(), parse_outer(optimizer=optimizer, lr=0.1, ema=0.8))
    module = nn.ParameterDict({name: nn.Parameter(value) for name, value in build_theta().items()})
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    for gradient in draw_gradients(6):
        server.step(gradient)
        with torch.no_grad():
            for name, value in server.theta().items():
                module[name].copy_(value)
        averaged.update_parameters(module)
    found = select_average(server.theta(), server.state()[0])
    for name, value in averaged.module.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-6, atol=1e-7)
        assert not torch.equal(found[name], server.theta()[name])


def test_average_survives_a_restart_bit_by_bit() -> None:
    outer = parse_outer(lr=0.1, ema=0.8)
    gradients = draw_gradients(6)
    server = ParameterServer(build_theta(), outer)
    restarted = ParameterServer(build_theta(), outer)
    for gradient in gradients[:3]:
        server.step(gradient)
    restarted.load(server.theta(), *server.state())
    for gradient in gradients[3:]:
        server.step(gradient)
        restarted.step(gradient)
    first, second = server.state()[0], restarted.state()[0]
    assert f"a/{AVERAGE}" in first
    assert all(torch.equal(first[key], second[key]) for key in first)


def build_job(**changes: Any) -> Job:
    run = {
        "steps": 4,
        "eval_every": 2,
        "eval_tasks": 6,
        "checkpoint_every": 2,
        "tasks_per_step": 4,
        "shards": 4,
    }
    return Job.parse(tree("maml", run=run | changes.pop("run", {}), **changes))


def test_average_is_validated_evaluated_and_loaded(workplace: Path) -> None:
    run = distmeta.train(build_job(outer={"lr": 0.05, "ema": 0.5})).run
    stored = checkpoints.load(run)
    average = select_average(stored.theta, stored.optimizer)
    learner = distmeta.load(run)
    assert all(torch.equal(learner.theta[name], average[name]) for name in average)
    raw = distmeta.load(run, ["outer.ema=null"])
    assert all(torch.equal(raw.theta[name], stored.theta[name]) for name in average)
    assert any(not torch.equal(raw.theta[name], learner.theta[name]) for name in average)
    without = distmeta.train(build_job(outer={"lr": 0.05})).run
    plain = checkpoints.load(without)
    assert all(torch.equal(plain.theta[name], stored.theta[name]) for name in average)
    figures = distmeta.evaluate(run, ["run.eval_tasks=6"]).figures
    assert figures == distmeta.evaluate(run, ["run.eval_tasks=6"]).figures
    assert figures != distmeta.evaluate(run, ["run.eval_tasks=6", "outer.ema=null"]).figures


@pytest.mark.parametrize("strategy", ["sharded", pytest.param("all-reduce", marks=pytest.mark.slow)])
def test_strategies_agree_on_the_average(strategy: str, workplace: Path, cluster: None) -> None:
    outer = {"lr": 0.05, "ema": 0.5, "schedule": {"type": "linear", "warmup": 2}}
    central = checkpoints.load(distmeta.train(build_job(outer=outer)).run)
    section = {"type": strategy} | ({"servers": 2} if strategy == "sharded" else {})
    changed = build_job(outer=outer, run={"workers": 2}, strategy=section)
    spread = checkpoints.load(distmeta.train(changed).run)
    for tensors, others in ((central.theta, spread.theta), (central.optimizer, spread.optimizer)):
        assert tensors.keys() == others.keys()
        for key, value in tensors.items():
            if strategy == "sharded":
                assert torch.equal(value, others[key])
            else:  # its sums are added in another order
                torch.testing.assert_close(value, others[key], rtol=1e-3, atol=1e-6)


class Signed(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675), as a user would write it."""

    def __init__(self, params: Any, lr: float, beta: float = 0.9):
        if not 0 <= beta < 1:
            raise ValueError(f"beta is {beta}")
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                memory = state.setdefault("memory", torch.zeros_like(parameter))
                memory.lerp_(parameter.grad, 1 - group["beta"])
                parameter.sub_(group["lr"] * memory.sign())


@pytest.fixture
def path_of_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_own_optimizer_trains_and_resumes_bit_by_bit(workplace: Path, path_of_this_module: None) -> None:
    own = {"optimizer": "test_outer_optimizer:Signed", "lr": 0.01, "options": {"beta": 0.5}}
    whole = checkpoints.load(distmeta.train(build_job(outer=own)).run)
    first = distmeta.train(build_job(outer=own, run={"steps": 2})).run
    resumed = checkpoints.load(distmeta.train(build_job(outer=own), resume=str(first)).run)
    assert {key.rpartition("/")[2] for key in whole.optimizer} == {"memory"}
    assert all(torch.equal(whole.theta[name], resumed.theta[name]) for name in whole.theta)
    start = checkpoints.load(first / "checkpoints" / "step-00000000").theta
    moved = [(whole.theta[name] - start[name]).abs().max() for name in start]
    assert float(max(moved)) <= 4 * 0.01 + 1e-6


class CountingFactors(torch.optim.Optimizer):
    """Keeps factors of another shape than the parameter's, and numbers in its state and in its groups."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, {"lr": lr, "scale": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["scale"] *= 0.9
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                rows = parameter.grad.reshape(parameter.shape[0], -1).square().mean(1)
                state["rows"] = state.get("rows", torch.zeros_like(rows)) + rows
                change = parameter.grad / (1 + state["rows"]).view(-1, *[1] * (parameter.dim() - 1))
                parameter.sub_(group["lr"] * group["scale"] / (state["count"] + group["step"]) * change)


OWN_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "test_outer_optimizer:CountingFactors": {},
    "torch.optim:Adafactor": {},
    "torch.optim:NAdam": {"options": {"momentum_decay": 0.01}, "groups": {"b": {"options": {"eps": 1e-4}}}},
}


@pytest.mark.parametrize("name", OWN_OPTIMIZERS)
def test_own_optimizer_sees_tensors_in_their_shapes(name: str, path_of_this_module: None) -> None:
    """Its steps are those of the optimizer alone, also after a restart from its saved state."""
    outer = parse_outer(optimizer=name, lr=0.1, **OWN_OPTIMIZERS[name])
    server = ParameterServer(build_theta(), outer)
    restarted = ParameterServer(build_theta(), outer)
    a, b = (nn.Parameter(value.clone()) for value in build_theta().values())
    of_b = outer.groups["b"].options if outer.groups else {}
    groups = [{"params": [a]}, {"params": [b], **of_b}] if of_b else [{"params": [a, b]}]
    optimizer = import_part("outer.optimizer", name, {})(groups, lr=0.1, **outer.options)
    gradients = draw_gradients(6)
    for number, gradient in enumerate(gradients):
        if number == 3:
            tensors, plain = server.state()
            restarted.load(server.theta(), tensors, json.loads(json.dumps(plain)))
        parts = server.layout.unflatten(gradient)
        a.grad = parts["a"]
        b.grad = parts["b"]
        optimizer.step()
        for one in (server, restarted)[: 1 + (number >= 3)]:
            one.step(gradient)
            assert torch.equal(one.theta()["a"], a.detach())
            assert torch.equal(one.theta()["b"], b.detach())


def test_state_of_another_optimizer_is_refused(path_of_this_module: None) -> None:
    own = ParameterServer(build_theta(), parse_outer(optimizer="torch.optim:Adafactor"))
    adam = ParameterServer(build_theta(), parse_outer())
    adam.step(draw_gradients(1)[0])
    with pytest.raises(InputError, match=r"checkpoint: its optimizer state 'a/exp_avg' does not match"):
        own.load(adam.theta(), *adam.state())


@pytest.mark.parametrize("name", ["torch.optim:Adafactor", "test_outer_optimizer:CountingFactors"])
def test_replicas_keep_the_state_of_an_own_optimizer(
    name: str, workplace: Path, path_of_this_module: None
) -> None:
    """`local`: a run that was stopped between two averages ends like one that was not."""
    strategy = {"type": "local", "replicas": 2, "local_steps": 2}
    job = build_job(outer={"optimizer": name, "lr": 0.01}, strategy=strategy)
    whole = checkpoints.load(distmeta.train(job).run)
    first = distmeta.train(job.replace(run={"steps": 2})).run
    resumed = checkpoints.load(distmeta.train(job, resume=str(first)).run)
    assert all(torch.equal(whole.theta[name], resumed.theta[name]) for name in whole.theta)


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        ({"optimizer": "torch.optim:LBFGS"}, r"outer.(optimizer|options): .*torch.optim:LBFGS"),
        ({"optimizer": "torch.optim:Muon"}, r"outer.options: torch.optim:Muon refuses them .*2D"),
        (
            {"groups": {"*.bias": {}, "*.1.bias": {"lr": 0.1}}},
            r"outer.groups: earlier globs match everything that '\*.1.bias'",
        ),
        ({"groups": {"heed.*": {"lr": 0.1}}}, r"outer.groups: 'heed.\*' matches nothing of theta; known: "),
        ({"groups": {"*": {"momentum": 0.9}}}, r"outer.groups.\*.momentum: not an option of adam, which has"),
        (
            {"groups": {"*": {"options": {"x": 1}}}},
            r"outer.groups.\*.options: got {'x': 1}, expected them as",
        ),
        (
            {"schedule": {"type": "cosin"}},
            r"outer.schedule.type: got 'cosin', expected one of .*did you mean 'cosine'",
        ),
        ({"schedule": {"type": TORCH + "StepLR"}}, r"outer.schedule.options: .* refuses them .*step_size"),
        (
            {"schedule": {"type": TORCH + "ReduceLROnPlateau"}},
            r"fails in step 1 .*metric.*, expected a scheduler that needs only the number of steps",
        ),
        (
            {"schedule": {"type": TORCH + "OneCycleLR", "options": {"max_lr": 0.1, "total_steps": 9}}},
            r"outer.schedule.options: .*cycle_momentum",
        ),
        (
            {
                "schedule": {
                    "type": TORCH + "OneCycleLR",
                    "options": SCHEDULES["OneCycleLR"] | {"total_steps": 3},
                }
            },
            r"fails in step 4 .*number of total steps is 3.*expected one that lasts",
        ),
        (
            {"schedule": {"options": {"gamma": 1.0}}},
            r"outer.schedule.options: got .*, expected them as keys of outer.schedule",
        ),
        (
            {"schedule": {"type": TORCH + "StepLR", "options": {"step_size": 1}, "final": 0.1}},
            r"outer.schedule.final: got 0.1 with a scheduler of torch",
        ),
        ({"optimizer": "adma"}, r"outer.optimizer: got 'adma', expected one of sgd.*did you mean 'adam'"),
        ({"optimizer": "nowhere:Lion"}, r"outer.optimizer: cannot import 'nowhere'"),
        (
            {"optimizer": "builtins:dict"},
            r"outer.options: builtins:dict refuses them|builds dict, expected a torch",
        ),
        (
            {"optimizer": "test_outer_optimizer:Signed", "options": {"beta": 2.0}},
            r"refuses them \(beta is 2.0\)",
        ),
        ({"optimizer": "test_outer_optimizer:Signed", "options": {"rho": 1}}, r"refuses them .*'rho'"),
        (
            {"optimizer": "test_outer_optimizer:Signed", "betas": [0.9, 0.9]},
            r"outer.betas: not an option .*options",
        ),
        ({"options": {"beta": 1.0}}, r"outer.options: got .*, expected them as keys of outer"),
        ({"ema": 1.0}, r"outer.ema: got 1.0, expected a value less than 1"),
        ({"schedule": {"steps": 3, "warmup": 3}}, r"outer.schedule.warmup: got 3, expected fewer than"),
    ],
)
def test_impossible_settings_are_one_line(
    outer: dict[str, Any], message: str, workplace: Path, path_of_this_module: None
) -> None:
    with pytest.raises(InputError, match=message):
        distmeta.train(build_job(outer=outer))
    assert not list(workplace.iterdir())


def test_slices_refuse_an_own_optimizer() -> None:
    with pytest.raises(
        InputError, match=r"outer.optimizer: got .* with strategy.type: sharded, expected one of"
    ):
        Job.parse(
            tree(
                outer={"optimizer": "torch.optim:Adafactor"}, strategy={"type": "sharded"}, run={"workers": 2}
            )
        )


def test_local_strategy_refuses_an_average() -> None:
    with pytest.raises(InputError, match=r"outer.ema: got 0.9 with strategy.type: local, expected null"):
        Job.parse(
            tree(outer={"ema": 0.9}, strategy={"type": "local"}, run={"eval_every": 0, "checkpoint_every": 0})
        )
