"""`distmeta check --run-one-task`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import tree

from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.evaluation.one_task import run_one_task

DRIFTING = """
import torch


class Net(torch.nn.Linear):
    calls = 0

    def __init__(self, in_shape, out_features):
        super().__init__(in_shape[0], out_features)

    def forward(self, x):
        Net.calls += 1
        return super().forward(x) * Net.calls
"""


def check(job: dict[str, Any]) -> str:
    return "\n".join(run_one_task(Job.parse(job)))


@pytest.mark.parametrize(
    ("job", "algorithm", "tasks"),
    [
        (tree("maml"), "FirstOrder, ScoresSupport, AdaptsParameters", "none"),
        (
            tree("protonet"),
            "ScoresSupport",
            "ScoresPerSplit, HasFingerprint, HasEvaluationWays, NamesClasses, HasPreparation",
        ),
        (tree("rl2"), "ActsWithMemory, ScoresSupport", "CollectsData"),
    ],
    ids=["maml", "protonet", "rl2"],
)
def test_optional_capabilities_are_listed(job: dict[str, Any], algorithm: str, tasks: str) -> None:
    lines = check(job).splitlines()
    assert f"optional capabilities of the algorithm: {algorithm}" in lines
    assert f"optional capabilities of the tasks: {tasks}" in lines


def test_impure_model_is_refused(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "drifting.py").write_text(DRIFTING)
    monkeypatch.syspath_prepend(str(workplace))
    with pytest.raises(InputError, match=r"^purity: the same task gave two different gradients"):
        check(tree(model={"type": "drifting:Net"}))


def test_compiled_gradient_is_checked_too() -> None:
    text = check(tree(compute={"compile": True}))
    assert "pure: two runs gave the same bits" in text
    assert ", compiled; " in text
