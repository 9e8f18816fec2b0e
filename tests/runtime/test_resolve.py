"""How a job is executed is chosen from its model and tasks, by a fixed rule."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import tree

from distmeta.compute.numerics import apply_numerics
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime.problem import build_problem
from distmeta.runtime.resolve import resolve


def build_job(**changes: Any) -> Job:
    return Job.parse(tree(**changes))


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({}, "vmap"),
        ({"model": {"type": "hard_cases:AttentionNet"}}, "vmap"),
        ({"model": {"type": "hard_cases:BranchingNet"}}, "loop"),
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
        ({"model": {"type": "conv4", "width": 2}, "tasks": {"type": "hard_cases:LargeImageTasks"}}, "loop"),
        ({"compute": {"execution": "loop"}}, "loop"),
        ({"compute": {"execution": "vmap", "chunk": 2}}, "vmap"),
    ],
)
def test_execution_is_chosen_by_a_fixed_rule(changes: dict[str, Any], mode: str) -> None:
    with apply_numerics(1, False):
        problem = resolve(build_problem(build_job(**changes)))
    assert problem.execution.mode == problem.job.compute.execution == mode
    if "chunk" in changes.get("compute", {}):
        assert problem.execution.chunk == 2


def test_impossible_vmap_is_an_error() -> None:
    small = build_job(model={"type": "hard_cases:BranchingNet"}, compute={"execution": "vmap"})
    with pytest.raises(
        InputError, match=r"compute.execution: got vmap, but this model .* does not run under vmap"
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
