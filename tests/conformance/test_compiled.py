"""Compiled gradients of every registered algorithm, and of the protocol's hard cases, equal the eager ones.

"Traced" tests run the graph that torch.compile receives, without compiling it: a second or two instead of half a
minute.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from conftest import tree
from test_conformance import CASES, LOOP, VMAP, parts

import distmeta
import distmeta.compute.compiler
from distmeta.algorithms.maml import MAML
from distmeta.compute.compiler import MOST_PROGRAMS, Compiler
from distmeta.compute.execution import Execution, shard_gradient
from distmeta.compute.schedules import describe_structure, replace_scheduled_values
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime.problem import build_problem

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
LONG = {
    "mann",
    "mann-ntm",
    "mann-dnc",
    "matching-fce",
    "contrastive",
    "snail",
    "lstm",
    "imaml",
    "meta-curvature",
}
"""Algorithms that take 3 to 30 seconds to trace."""
VARIANTS = {
    "fomaml",
    "reptile-adam",
    "maml-adam",
    "maml-momentum",
    "anil",
    "boil",
    "maml-plus-plus",
    "hypernet",
}
VARIANTS |= {"e-maml", "meta-sgd-policy", "reptile-policy", "pairwise", "bilevel-implicit"}
"""Variants of an algorithm that is traced anyway."""
VECTORISED = {"protonet"}
"""Also traced under vmap in every run of the tests."""
COMPILED = {("protonet", torch.float64)}
"""Compiled in every run of the tests, as is one case of test_execution."""


def distance_from_eager(
    given: tuple[Any, ...], execution: Execution, compiler: Compiler, step: int = 0
) -> float:
    """Return the relative distance between the program's gradient and the eager one."""
    problem, theta, episodes, ids = given
    arguments = (problem.training_at(step), problem.score("train"), theta, episodes, ids, execution)
    eager = shard_gradient(*arguments).gradient
    for _ in range(2):  # the second time without the comparison in Compiler
        result = shard_gradient(*arguments, compiler).gradient
    squared_distance = sum(float((result[key] - eager[key]).double().square().sum()) for key in theta)
    return (squared_distance / sum(float(value.double().square().sum()) for value in eager.values())) ** 0.5


def traced_cases() -> Iterator[Any]:
    for name in CASES:
        for execution in (LOOP, VMAP):
            for dtype in TOLERANCE:
                quick = dtype == torch.float64 if execution == LOOP else dtype == torch.float32
                quick = quick and name not in LONG | VARIANTS and (execution == LOOP or name in VECTORISED)
                marks = () if quick else pytest.mark.slow
                words = f"{name}-{execution.mode}-{str(dtype)[-2:]}"
                yield pytest.param(name, execution, dtype, id=words, marks=marks)


@pytest.mark.parametrize(("name", "execution", "dtype"), list(traced_cases()))
def test_traced_gradient_equals_eager_gradient(name: str, execution: Execution, dtype: torch.dtype) -> None:
    compiler = Compiler("float32", trace_only=True)
    assert distance_from_eager(parts(name, dtype=dtype), execution, compiler) <= TOLERANCE[dtype]


def compiled_cases() -> Iterator[Any]:
    for case in product(CASES, TOLERANCE):
        marks = () if case in COMPILED else pytest.mark.slow
        yield pytest.param(*case, id=f"{case[0]}-{str(case[1])[-2:]}", marks=marks)


@pytest.mark.parametrize(("name", "dtype"), list(compiled_cases()))
def test_compiled_gradient_equals_eager_gradient(name: str, dtype: torch.dtype) -> None:
    assert distance_from_eager(parts(name, dtype=dtype), VMAP, Compiler("float32")) <= TOLERANCE[dtype]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The list of all functions that have been traced."""
    seen: list[Any] = []
    make_fx = distmeta.compute.compiler.make_fx

    def counting(function: Any) -> Any:
        seen.append(function)
        return make_fx(function)

    monkeypatch.setattr(distmeta.compute.compiler, "make_fx", counting)
    return seen


def test_one_program_serves_all_steps_that_only_differ_in_scheduled_values(traced: list[Any]) -> None:
    """MAML++: other weights in every step; exact derivatives from step 2 on; only the last loss from step 4 on."""
    schedule = {"msl_steps": 4, "first_order_steps": 2, "inner_steps": 2}
    job = tree({"type": "maml-plus-plus", "inner_lr": 0.05, **schedule}, model={"type": "mlp", "hidden": [4]})
    given = parts(job, tasks=1)
    compiler = Compiler("float32", trace_only=True)
    programs = []
    for step in range(6):
        assert distance_from_eager(given, LOOP, compiler, step) <= 1e-5
        programs.append(len(traced))
    assert programs == [1, 1, 2, 2, 3, 3]


def test_too_many_programs_are_refused() -> None:
    compiler = Compiler("float32", trace_only=True)

    def function(x: torch.Tensor) -> Any:
        return {"a": x.sin()}, x > 0, {}

    for name in range(MOST_PROGRAMS):
        compiler(name, function, torch.ones(3))
    compiler(MOST_PROGRAMS, function, torch.ones(4))
    with pytest.raises(InputError, match=r"compute.compile: got true, .* in its attribute `scheduled`"):
        compiler(MOST_PROGRAMS, function, torch.ones(3))


def test_structure_of_an_algorithm_is_compared_by_value_and_identity() -> None:
    plus = build_problem(Job.parse(tree("maml-plus-plus"))).algorithm
    assert describe_structure(plus.at(0)) == describe_structure(plus.at(1))
    assert describe_structure(plus.at(0)) != describe_structure(plus)  # only the last loss
    assert replace_scheduled_values(plus, (1,)).scheduled == (1,)
    other = copy.copy(plus)
    other.model = copy.copy(plus.model)
    assert describe_structure(other) != describe_structure(plus)
    plain = build_problem(Job.parse(tree("maml"))).algorithm
    assert isinstance(plain, MAML)
    assert describe_structure(plain) != describe_structure(copy.copy(plain))  # without `at`: by identity
    assert replace_scheduled_values(plain, ()) is plain


@pytest.mark.slow
def test_algorithm_with_a_schedule_trains_compiled(workplace: Any) -> None:
    algorithm = {"type": "maml-plus-plus", "inner_lr": 0.05, "inner_steps": 2, "msl_steps": 2}
    losses = []
    for compiled in (False, True):
        job = tree(algorithm, compute={"compile": compiled}, run={"steps": 4, "shards": 2})
        run = distmeta.train(Job.parse(job))
        assert Job.load(run.run / "job.yaml").compute.compile == compiled
        losses.append(run.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
