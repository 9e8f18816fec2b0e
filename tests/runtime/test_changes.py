"""Values that change during a run (`changes`): only the job decides the result, not when the run was resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tree
from support.outcomes import ActingReporter, read_rows, read_theta, train_job

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime.parameter_server import ParameterServer

OUTER = {"optimizer": "adam", "lr": 0.01, "clip_norm": 0.5, "schedule": {"type": "cosine", "steps": 8}}
RUN = {"steps": 8, "eval_every": 4, "eval_tasks": 5}
CHANGE = {"step": 4, "set": {"outer.lr": 0.05, "algorithm.inner_lr": 0.2, "outer.clip_norm": 0.1}}


def test_change_added_on_resume_equals_change_from_the_start(workplace: Path) -> None:
    whole = train_job(tree("maml", outer=OUTER, run=RUN, changes=[CHANGE]))
    begun = train_job(tree("maml", outer=OUTER, run=RUN), steps=4, name="begun")
    job = tree("maml", outer=OUTER, run=RUN, changes=[CHANGE])
    train_job(job, resume=begun, name="begun")
    assert read_theta(begun) == read_theta(whole)
    assert read_theta(whole) != read_theta(train_job(tree("maml", outer=OUTER, run=RUN)))
    rows = read_rows(whole)
    assert [row["algorithm.inner_lr"] for row in rows] == [0.05] * 4 + [0.2] * 4
    assert [row["outer.lr"] for row in rows] == [0.01] * 4 + [0.05] * 4


def test_evaluation_uses_the_values_of_the_checkpoints_step(workplace: Path) -> None:
    run = train_job(tree("maml", run=RUN, changes=[CHANGE]))
    for step, rate in ((4, 0.05), (8, 0.2)):
        learner = distmeta.load(run / f"checkpoints/step-0000000{step}")
        assert learner.problem.job.algorithm.options["inner_lr"] == rate


def test_changes_of_completed_steps_must_stay(workplace: Path) -> None:
    run = train_job(tree("maml", run=RUN, changes=[CHANGE]), name="a")
    for changes in ([], [{"step": 3, "set": {"outer.lr": 0.05}}]):
        with pytest.raises(
            InputError,
            match=r"^changes: got .* before step 8, .* so their changes must stay$",
        ):
            train_job(tree("maml", run=RUN, changes=changes), resume=run, steps=9, name="a")
    train_job(
        tree("maml", run=RUN, changes=[CHANGE, {"step": 8, "set": {"outer.lr": 0.05}}]),
        resume=run,
        steps=9,
        name="a",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            [{"step": 3, "set": {"outer.lr": 0.1}}, {"step": 3, "set": {"outer.lr": 0.2}}],
            "changes.1.step: got 3",
        ),
        (
            [{"step": 3, "set": {"algorithm.inner_steps": 2.0}}],
            "changes.0.set: algorithm.inner_steps cannot change",
        ),
        ([{"step": 3, "set": {"model.hidden": 2.0}}], "changes.0.set: model.hidden cannot change"),
        (
            [{"step": 3, "set": {"outer.lr": -1.0}}],
            "changes.0.set: outer.lr: got -1.0, expected a value greater than 0",
        ),
        ([{"step": 3, "set": {}}], "changes.0.set: got nothing"),
        ([{"stp": 3, "set": {"outer.lr": 1.0}}], "changes.0.step: missing"),
    ],
)
def test_impossible_changes_are_refused(changes: list[Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Job.parse(tree("maml", changes=changes))
    assert str(caught.value).startswith(message)


def test_retuning_keeps_optimizer_state_and_clock() -> None:
    theta = {"a": torch.ones(3), "b": torch.zeros(2)}
    job = Job.parse(tree("maml", outer=OUTER))
    one = ParameterServer(theta, job.outer)
    two = ParameterServer(theta, job.outer)
    gradient = one.layout.flatten({"a": torch.arange(3.0), "b": torch.ones(2)})
    for server in (one, two):
        server.step(gradient)
        server.step(gradient)
    two.retune(job.outer)  # the same settings: nothing changes
    assert one.rate() == two.rate()
    for server in (one, two):
        server.step(gradient)
    assert np.array_equal(one.flat(), two.flat())
    other = job.with_values({"outer.lr": 0.1}).outer
    two.retune(other)
    assert two.rate() == pytest.approx(10 * one.rate())


def test_loss_spike_is_reported_once(workplace: Path) -> None:
    changes = [
        {"step": 30, "set": {"algorithm.inner_lr": 3.0}},
        {"step": 33, "set": {"algorithm.inner_lr": 0.05}},
    ]
    reporter = ActingReporter()
    distmeta.train(Job.parse(tree("maml", run={"steps": 36}, changes=changes)), reporter=reporter)
    (message,) = [text for text in reporter.reports if "far above" in text]
    assert message.startswith("step 31: loss ")
