"""The section `sweep` of a job: what it may contain, and the points that it yields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, tree
from hypothesis import given, settings
from hypothesis import strategies as st

from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.sweeps.search import draw_points


def job(space: Any, run: dict[str, Any] | None = None, **sweep: Any) -> Job:
    return Job.parse(tree("maml", run=run or {"eval_every": 2}, sweep={"space": space, **sweep}))


RATES = {"algorithm.inner_lr": {"loguniform": [1e-3, 1.0]}, "outer.lr": {"loguniform": [1e-4, 0.1]}}


@pytest.mark.parametrize(
    ("space", "sweep", "message"),
    [
        ({"algorithm.rate": {"uniform": [0, 1]}}, {}, "space.algorithm.rate: uniform gives 0.0: algorithm."),
        ({"outr.lr": {"uniform": [0.1, 1]}}, {}, "space.outr.lr: uniform gives 0.1: outr: unknown key; did you"),
        ({"outer.lr": {"uniform": [1, 0.1]}}, {}, "space.outer.lr.uniform: got [1.0, 0.1], expected the lower"),
        ({"outer.lr": {"uniform": [1, 1]}}, {}, "space.outer.lr.uniform: got [1.0, 1.0]"),
        ({"outer.lr": {"loguniform": [0, 1]}}, {}, "space.outer.lr.loguniform: got a lower bound of 0.0, exp"),
        ({"outer.lr": {"uniform": [-1, 1]}}, {}, "space.outer.lr: uniform gives -1.0: outer.lr: got -1.0, expected"),
        ({"outer.lr": {"uniform": [0.1, 1], "grid": [1]}}, {}, "space.outer.lr: got uniform and grid, expected one of"),
        ({"outer.lr": {}}, {}, "space.outer.lr: got nothing, expected one of"),
        ({"outer.lr": {"unifrom": [0.1, 1]}}, {}, "space.outer.lr.unifrom: unknown key"),
        ({"algorithm.inner_steps": {"uniform": [1, 3]}}, {}, "space.algorithm.inner_steps: uniform gives 1.0"),
        ({"run.steps": {"integers": [1, 3]}}, {}, "space.run.steps: a sweep cannot search this key"),
        ({"tracking.type": {"choice": ["none"]}}, {}, "space.tracking.type: a sweep cannot"),
        ({}, {}, "space: got nothing"),
        (RATES, {"metric": "loss_after"}, "metric: got 'loss_after', expected"),
        (RATES, {"trals": 3}, "trals: unknown key; did you mean 'trials'?"),
        ({"outer.lr": {"grid": [0.1]}}, {"search": "tpe"}, "space.outer.lr: got a grid with sweep.search: tpe"),
        (RATES, {"scheduler": {"type": "pbt"}, "concurrent": 2}, "concurrent: got 2 with sweep.scheduler: pbt"),
        (RATES, {"scheduler": {"type": "pbt"}, "search": "tpe"}, "search: got tpe with sweep.scheduler: pbt"),
        (RATES, {"scheduler": {"type": "asha", "interval": 3}}, "scheduler.interval: got 3 with sweep.scheduler"),
        ({"run.tasks_per_step": {"integers": [1, 3]}}, {"scheduler": {"type": "pbt"}}, "space.run.tasks_per_step: pbt"),
    ],
)  # fmt: skip
def test_impossible_sweep_is_refused(space: Any, sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        job(space, **sweep)
    assert str(caught.value).startswith(f"sweep.{message}")
    assert len(str(caught.value).splitlines()) == 1


def test_sweep_without_evaluations_is_refused() -> None:
    with pytest.raises(InputError, match=r"^sweep: got run.eval_every: 0"):
        job(RATES, run={"eval_every": 0})


def test_error_names_the_line_of_the_mistake(tmp_path: Path) -> None:
    text = (REPOSITORY / "jobs" / "sinusoid-maml.yaml").read_text()
    text += (
        "sweep:\n  space:\n    algorithm.inner_lr: {uniform: [0.1, 1]}\n    outer.lr: {loguniform: [0, 1]}\n"
    )
    path = tmp_path / "job.yaml"
    path.write_text(text)
    line = 1 + next(i for i, row in enumerate(text.splitlines()) if "loguniform" in row)
    with pytest.raises(
        InputError, match=rf"job.yaml: line {line}: sweep.space.outer.lr.loguniform: got a lower"
    ):
        Job.load(path)
    with pytest.raises(
        InputError, match=r"job.yaml: sweep.space.outer.lr.uniform: got"
    ):  # not the file's fault
        Job.load(path, ["sweep.space={outer.lr: {uniform: [3, 1]}}"])


def test_grid_is_tried_with_every_draw() -> None:
    space = {
        "outer.lr": {"loguniform": [1e-4, 0.1]},
        "algorithm.inner_steps": {"grid": [1, 2, 3]},
        "model.activation": {"grid": ["relu", "tanh"]},
        "run.tasks_per_step": {"integers": [4, 8]},
        "algorithm.first_order": {"choice": [True, False]},
    }
    section = job(space, trials=2).sweep
    assert section is not None
    found = draw_points(section, 0)
    assert len(found) == section.count == 12
    assert len({(p["algorithm.inner_steps"], p["model.activation"]) for p in found[:6]}) == 6
    assert len({p["outer.lr"] for p in found[:6]}) == 1
    assert found[0]["outer.lr"] != found[6]["outer.lr"]
    for point in found:
        assert list(point) == list(space)
        assert 4 <= point["run.tasks_per_step"] <= 8
        job(space).with_values(point)


def test_grid_without_draws_is_run_once() -> None:
    section = job({"outer.lr": {"grid": [0.1, 0.2]}, "algorithm.inner_steps": {"grid": [1, 2]}}).sweep
    assert section is not None
    assert section.count == 4
    assert [tuple(point.values()) for point in draw_points(section, 7)] == [
        (0.1, 1),
        (0.1, 2),
        (0.2, 1),
        (0.2, 2),
    ]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    low=st.floats(1e-6, 1.0),
    factor=st.floats(1.001, 1e4),
    few=st.integers(1, 4),
)
def test_draws_depend_only_on_the_seed_and_their_number(
    seed: int, low: float, factor: float, few: int
) -> None:
    space = {
        "outer.lr": {"loguniform": [low, low * factor]},
        "algorithm.inner_lr": {"uniform": [low, 2 * factor]},
    }
    short = job(space, trials=few).sweep
    long = job(space, trials=few + 3).sweep
    assert short is not None
    assert long is not None
    found = draw_points(long, seed)
    assert found[:few] == draw_points(short, seed)
    assert found != draw_points(long, seed + 1)
    for point in found:
        assert low * 0.999999 <= point["outer.lr"] <= low * factor * 1.000001
        assert low <= point["algorithm.inner_lr"] <= 2 * factor
