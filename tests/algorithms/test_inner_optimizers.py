"""Inner optimizers, compared with torch.optim and TorchOpt, and the parameters that they change."""

from __future__ import annotations

import pytest
import torch
from conftest import tree
from torch import nn

from distmeta.algorithms.adaptation import select_minibatch
from distmeta.compute.execution import Execution, shard_gradient
from distmeta.compute.gradient import unroll
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.protocols import Batch
from distmeta.runtime.problem import build_problem
from distmeta.seeding import task_ids

LOOP = Execution("loop", 1)
TORCH = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.8),
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr, betas=(0.7, 0.95), eps=1e-3),
}


def build_setting(name: str, steps: int = 6, **options):
    """Build a small problem whose inner loop has the optimizer `name`, theta and three tasks, in float64."""
    algorithm = {"type": "maml", "inner_lr": 0.03, "inner_steps": steps, "inner_optimizer": name, **options}
    if name == "adam":
        algorithm |= {"betas": [0.7, 0.95], "eps": 1e-3}
    if name == "momentum":
        algorithm |= {"momentum": 0.8}
    problem = build_problem(Job.parse(tree(algorithm)))
    theta = {key: value.double() for key, value in problem.init().items()}
    problem.model.to(dtype=torch.float64)
    ids = task_ids(0, "train", 0, 3)
    support, query = problem.family.draw("train", ids)
    double = [Batch(b.x.double(), b.y.double()) for b in (support, query)]
    return problem, theta, type(problem.family.draw("train", ids))(*double), ids


@pytest.mark.parametrize("name", TORCH)
def test_trajectory_equals_torch_optim(name: str) -> None:
    problem, theta, episodes, _ = build_setting(name)
    support = Batch(episodes.support.x[0], episodes.support.y[0])
    state = unroll(problem.algorithm, theta, support, detach=True)
    module = problem.model.module
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.copy_(theta["model." + key])
    optimizer = TORCH[name](module.parameters(), 0.03)
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.mse_loss(module(support.x), support.y).backward()
        optimizer.step()
    for key, parameter in module.named_parameters():
        torch.testing.assert_close(state.phi["model." + key], parameter.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", TORCH)
def test_meta_gradient_goes_through_the_optimizer_state(name: str) -> None:
    """Finite differences of the query loss after six steps, float64."""
    problem, theta, episodes, ids = build_setting(name)
    algorithm = problem.algorithm
    score = problem.score("train")
    generator = torch.Generator().manual_seed(0)
    direction = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in theta.items()}

    def total(h: float) -> float:
        moved = {k: v + h * direction[k] for k, v in theta.items()}
        metrics = shard_gradient(algorithm, score, moved, episodes, ids, LOOP).metrics
        return float(metrics["loss_after"].sum())

    gradient = shard_gradient(algorithm, score, theta, episodes, ids, LOOP).gradient
    exact = sum(float((gradient[k] * direction[k]).sum()) for k in theta)
    assert (total(1e-6) - total(-1e-6)) / 2e-6 == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("execution", [LOOP, Execution("vmap", 2**31)])
def test_adam_with_zero_gradients_has_no_nan(execution: Execution) -> None:
    """Dead units have gradient 0, so √s is at 0, where its derivative is infinite."""
    job = tree({"type": "maml", "inner_lr": 0.01, "inner_steps": 3, "inner_optimizer": "adam"})
    job["model"] = {"type": "mlp", "hidden": [16], "activation": "relu"}
    problem = build_problem(Job.parse(job))
    theta = problem.init()
    theta["model.1.bias"] = torch.where(torch.arange(16) < 8, -100.0, 0.1)  # half of the units are dead
    ids = task_ids(0, "train", 0, 4)
    episodes = problem.family.draw("train", ids)
    result = shard_gradient(problem.algorithm, problem.score("train"), theta, episodes, ids, execution)
    assert result.tasks == 4
    assert all(bool(torch.isfinite(value).all()) for value in result.gradient.values())
    assert bool((result.gradient["model.1.weight"][:8] == 0).all())
    assert bool((result.gradient["model.1.weight"][8:] != 0).any())


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_meta_gradient_equals_torchopt(name: str) -> None:
    import torchopt

    problem, theta, episodes, ids = build_setting(name)
    ours = shard_gradient(problem.algorithm, problem.score("train"), theta, episodes, ids, LOOP).gradient
    module = problem.model.module
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.copy_(theta["model." + key])
    if name == "momentum":
        optimizer = torchopt.MetaSGD(module, lr=0.03, momentum=0.8)
    else:
        optimizer = torchopt.MetaAdam(module, lr=0.03, betas=(0.7, 0.95), eps=1e-3)
    start = [torchopt.extract_state_dict(part, by="reference") for part in (module, optimizer)]
    parameters = dict(module.named_parameters())
    for t in range(3):
        for _ in range(6):
            optimizer.step(nn.functional.mse_loss(module(episodes.support.x[t]), episodes.support.y[t]))
        nn.functional.mse_loss(module(episodes.query.x[t]), episodes.query.y[t]).backward()
        for part, state in zip((module, optimizer), start, strict=True):
            torchopt.recover_state_dict(part, state)
    theirs = torch.cat([p.grad.flatten() for p in parameters.values()])
    own = torch.cat([ours["model." + key].flatten() for key in parameters])
    # torchopt keeps the bias corrections of Adam in float32
    assert float((own - theirs).norm() / theirs.norm()) <= (1e-6 if name == "adam" else 1e-10)


@pytest.mark.parametrize(("adapt", "layers"), [("head", {"5"}), ("body", {"1", "3"}), ("3.*", {"3"})])
def test_inner_loop_changes_only_the_selected_parameters(adapt: str, layers: set[str]) -> None:
    problem, theta, episodes, _ = build_setting("sgd", adapt=adapt)
    support = Batch(episodes.support.x[0], episodes.support.y[0])
    phi = unroll(problem.algorithm, theta, support, detach=True).phi
    changed = {key.split(".")[1] for key in phi if not torch.equal(phi[key], theta[key])}
    assert changed == layers


def test_adapt_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match=r"algorithm\.adapt: got 'haed', which matches no parameter"):
        build_setting("sgd", adapt="haed")


def score_targets(outputs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Score outputs that are no classes."""
    return (outputs - batch.y).square().mean(), {}


INNER_OPTIONS = {
    "sgd with decay": (
        {"inner_optimizer": "sgd", "inner_weight_decay": 0.3},
        lambda p: torch.optim.SGD(p, lr=0.03, weight_decay=0.3),
    ),
    "momentum with decay": (
        {"inner_optimizer": "momentum", "momentum": 0.8, "inner_weight_decay": 0.3},
        lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.8, weight_decay=0.3),
    ),
    "adam with decay": (
        {"inner_optimizer": "adam", "inner_weight_decay": 0.3},
        lambda p: torch.optim.Adam(p, lr=0.03, betas=(0.7, 0.95), eps=1e-3, weight_decay=0.3),
    ),
    "adamw": (
        {"inner_optimizer": "adamw", "eps": 1e-3, "inner_weight_decay": 0.3},
        lambda p: torch.optim.AdamW(p, lr=0.03, eps=1e-3, weight_decay=0.3),
    ),
    "clipped": ({"inner_clip_norm": 0.05}, lambda p: torch.optim.SGD(p, lr=0.03)),
    "linear": ({"inner_schedule": "linear"}, lambda p: torch.optim.SGD(p, lr=0.03)),
    "cosine": ({"inner_schedule": "cosine"}, lambda p: torch.optim.SGD(p, lr=0.03)),
    "factors": ({"inner_schedule": [1.0, 0.5, 2.0, 0.0, 1.0, 3.0]}, lambda p: torch.optim.SGD(p, lr=0.03)),
    "minibatches": ({"inner_batch": 2}, lambda p: torch.optim.SGD(p, lr=0.03)),
}
"""Options of MAML's inner loop, and the optimizer of torch that they correspond to."""
SCHEDULERS = {
    "linear": lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=6),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "factors": lambda o: torch.optim.lr_scheduler.LambdaLR(
        o, lambda k: [1.0, 0.5, 2.0, 0.0, 1.0, 3.0, 3.0][k]
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
@pytest.mark.parametrize("kind", ["maml", "reptile"])
@pytest.mark.parametrize("case", INNER_OPTIONS)
def test_trajectory_with_options_equals_torch(case: str, kind: str) -> None:
    options, build_optimizer = INNER_OPTIONS[case]
    if case == "adamw":
        options = options | {"betas": [0.9, 0.999]}  # those of torch; Reptile's default differs
    problem, theta, episodes, _ = build_setting(options.get("inner_optimizer", "sgd"), type=kind, **options)
    support = Batch(episodes.support.x[0], episodes.support.y[0])
    state = unroll(problem.algorithm, theta, support, detach=True)
    module = problem.model.module
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.copy_(theta["model." + key])
    optimizer = build_optimizer(module.parameters())
    scheduler = SCHEDULERS[case](optimizer) if case in SCHEDULERS else None
    for k in range(6):
        rows = [(2 * k) % 5, (2 * k + 1) % 5] if case == "minibatches" else slice(None)
        optimizer.zero_grad()
        nn.functional.mse_loss(module(support.x[rows]), support.y[rows]).backward()
        if case == "clipped":
            norm = nn.utils.clip_grad_norm_(module.parameters(), 0.05)
            assert norm > 0.05
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    for key, parameter in module.named_parameters():
        torch.testing.assert_close(state.phi["model." + key], parameter.detach(), rtol=1e-10, atol=1e-12)


def compute_gradient(execution: Execution = LOOP, **options):
    problem, theta, episodes, ids = build_setting(options.get("inner_optimizer", "sgd"), steps=3, **options)
    found = shard_gradient(problem.algorithm, problem.score("train"), theta, episodes, ids, execution)
    return torch.cat([found.gradient[name].flatten() for name in theta])


def measure_slope(options: dict) -> tuple[float, float]:
    """Return the difference quotient of the loss along a direction, and the gradient's product with it."""
    problem, theta, episodes, ids = build_setting(options.get("inner_optimizer", "sgd"), steps=3, **options)
    generator = torch.Generator().manual_seed(3)
    direction = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in theta.items()}

    def run(scale: float):
        moved = {k: v + scale * direction[k] for k, v in theta.items()}
        return shard_gradient(problem.algorithm, problem.score("train"), moved, episodes, ids, LOOP)

    slope = (run(1e-6).metrics["loss_after"].sum() - run(-1e-6).metrics["loss_after"].sum()) / 2e-6
    exact = run(0.0).gradient
    return float(slope), sum(float((exact[k] * direction[k]).sum()) for k in exact)


DIFFERENTIABLE = {name: options for name, (options, _) in INNER_OPTIONS.items()} | {
    "stopped": {"inner_stop_loss": 5.6}
}


@pytest.mark.parametrize("case", DIFFERENTIABLE)
def test_meta_gradient_with_options_equals_the_difference_quotient(case: str) -> None:
    options = dict(DIFFERENTIABLE[case])
    if isinstance(options.get("inner_schedule"), list):
        options["inner_schedule"] = options["inner_schedule"][:3]
    slope, exact = measure_slope(options)
    assert slope == pytest.approx(exact, rel=1e-5)
    loop = compute_gradient(**options)
    for execution in (Execution("vmap", 3), LOOP._replace(differentiation="constant-memory")):
        assert float((compute_gradient(execution, **options) - loop).norm() / loop.norm()) <= 1e-9


def test_task_stops_at_its_support_loss() -> None:
    """Steps after the loss has been reached change nothing, in each task by itself."""
    problem, theta, episodes, _ = build_setting("sgd", steps=3)
    supports = [Batch(x, y) for x, y in zip(episodes.support.x, episodes.support.y, strict=True)]
    states = [
        [problem.algorithm.begin(theta, support), *unroll(problem.algorithm, theta, support, every=True)]
        for support in supports
    ]
    losses = [
        [float(problem.family.score(problem.model(s.phi, support.x), support)[0].detach()) for s in row]
        for row, support in zip(states, supports, strict=True)
    ]
    limit = losses[0][1]  # the first task stops after one step
    stopping, _, _, _ = build_setting("sgd", steps=3, inner_stop_loss=limit)
    taken = [next((k for k, loss in enumerate(row) if loss <= limit), 3) for row in losses]
    assert taken[0] == 1
    assert len(set(taken)) > 1
    for t, support in enumerate(supports):
        found = unroll(stopping.algorithm, theta, support)
        for name, value in states[t][taken[t]].phi.items():
            assert torch.equal(found.phi[name], value)


def adapt_by_hand(model, theta, support, limit: float) -> tuple[dict, list[float], int]:
    """Take six steps on one row each until a row's loss is at most the limit, in plain autograd.

    Return φ, the losses of the rows before each step that was considered, and the number of steps taken.
    """
    phi = dict(theta)
    losses = []
    taken = 0
    has_stopped = False
    for k in range(6):
        rows = slice(k % 5, k % 5 + 1)
        loss = (model(phi, support.x[rows]) - support.y[rows]).square().mean()
        losses.append(float(loss.detach()))
        has_stopped = has_stopped or losses[-1] <= limit
        if not has_stopped:
            gradient = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            phi = {name: value - 0.03 * g for (name, value), g in zip(phi.items(), gradient, strict=True)}
            taken += 1
    return phi, losses, taken


@pytest.mark.parametrize(
    "execution", [LOOP, Execution("vmap", 3), LOOP._replace(differentiation="constant-memory")]
)
def test_stopped_task_stays_stopped_on_later_minibatches(execution: Execution) -> None:
    """A task that has stopped at one row does not start again at a row with a larger loss."""
    limit = 4.0
    problem, theta, episodes, ids = build_setting("sgd", inner_batch=1, inner_stop_loss=limit)
    result = shard_gradient(problem.algorithm, problem.score("train"), theta, episodes, ids, execution)
    total = {name: torch.zeros_like(value) for name, value in theta.items()}
    counts = set()
    would_start_again = False
    for t in range(3):
        start = {name: value.clone().requires_grad_() for name, value in theta.items()}
        support = Batch(episodes.support.x[t], episodes.support.y[t])
        phi, losses, taken = adapt_by_hand(problem.model, start, support, limit)
        counts.add(taken)
        would_start_again |= any(value > limit for value in losses[taken + 1 :])
        loss = (problem.model(phi, episodes.query.x[t]) - episodes.query.y[t]).square().mean()
        for name, g in zip(start, torch.autograd.grad(loss, list(start.values())), strict=True):
            total[name] += g
    assert would_start_again
    assert len(counts) > 1
    for name, value in total.items():
        torch.testing.assert_close(result.gradient[name], value, rtol=1e-9, atol=1e-12)


def test_reptile_stops_at_its_support_loss() -> None:
    limit = 4.0
    problem, theta, episodes, _ = build_setting("sgd", type="reptile", inner_batch=1, inner_stop_loss=limit)
    for t in range(3):
        support = Batch(episodes.support.x[t], episodes.support.y[t])
        start = {name: value.clone().requires_grad_() for name, value in theta.items()}
        phi, _, _ = adapt_by_hand(problem.model, start, support, limit)
        found = unroll(problem.algorithm, theta, support, detach=True)
        for name, value in phi.items():
            torch.testing.assert_close(found.phi[name], value.detach(), rtol=1e-12, atol=1e-13)


def test_truncated_backpropagation_lies_between_fomaml_and_maml() -> None:
    exact = compute_gradient()
    first_order = compute_gradient(first_order=True)
    assert torch.equal(compute_gradient(backprop_steps=3), exact)
    assert torch.equal(compute_gradient(backprop_steps=9), exact)
    assert torch.equal(compute_gradient(backprop_steps=0), first_order)
    distances = [float((compute_gradient(backprop_steps=n) - exact).norm()) for n in range(4)]
    assert distances == sorted(distances, reverse=True)
    assert distances[1] > 0
    for execution in (Execution("vmap", 3), LOOP._replace(differentiation="constant-memory")):
        other = compute_gradient(execution, backprop_steps=1)
        torch.testing.assert_close(other, compute_gradient(backprop_steps=1), rtol=1e-9, atol=1e-12)


def test_truncated_backpropagation_equals_plain_autograd() -> None:
    problem, theta, episodes, ids = build_setting("sgd", steps=3, backprop_steps=1)
    found = shard_gradient(problem.algorithm, problem.score("train"), theta, episodes, ids, LOOP).gradient
    total = {name: torch.zeros_like(value) for name, value in theta.items()}
    for t in range(3):
        start = {name: value.clone().requires_grad_() for name, value in theta.items()}
        phi = start
        for k in range(3):
            outputs = problem.model(phi, episodes.support.x[t])
            loss = (outputs - episodes.support.y[t]).square().mean()
            gradient = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            if k < 2:
                gradient = [g.detach() for g in gradient]
            phi = {name: value - 0.03 * g for (name, value), g in zip(phi.items(), gradient, strict=True)}
        loss = (problem.model(phi, episodes.query.x[t]) - episodes.query.y[t]).square().mean()
        for name, g in zip(start, torch.autograd.grad(loss, list(start.values())), strict=True):
            total[name] += g
    for name, value in total.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_schedule": [1.0]}, r"algorithm.inner_schedule: got 1 factors, expected one for each of 6"),
        ({"inner_schedule": "triangle"}, r"algorithm.inner_schedule: got 'triangle', expected"),
        ({"inner_clip_norm": 0.0}, r"algorithm.inner_clip_norm: got 0.0, expected a value greater than 0"),
        ({"backprop_steps": -1}, r"algorithm.backprop_steps: got -1"),
        (
            {"backprop_steps": 2, "first_order": True},
            r"algorithm.backprop_steps: got 2 with first_order: true, expected null: no step of a first-order method",
        ),
        ({"inner_batch": 0}, r"algorithm.inner_batch: got 0"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_setting("sgd", **options)


@pytest.mark.parametrize(
    "y",
    [
        torch.zeros(8, dtype=torch.long),
        torch.zeros(8, 5, dtype=torch.long),  # independent labels
        torch.zeros(8, 3, 4, dtype=torch.long),  # masks
        torch.zeros(8, 5),
        {"mask": torch.zeros(8, 3, dtype=torch.long), "size": torch.zeros(8)},
    ],
    ids=["classes", "labels", "masks", "numbers", "tree"],
)
def test_rows_of_a_minibatch_do_not_depend_on_the_targets(y) -> None:
    x = torch.arange(8)[:, None]
    rows = [select_minibatch(Batch(x, y), k, 3, score_targets).x[:, 0].tolist() for k in range(3)]
    assert rows == [[0, 1, 2], [3, 4, 5], [6, 7, 0]]
