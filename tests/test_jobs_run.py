"""Every shipped job runs: two steps and an evaluation of it; at full length by hand (`pytest -m slow`)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import REPOSITORY

import distmeta
from distmeta.config.job import Job

JOBS = sorted((REPOSITORY / "jobs").glob("*.yaml"))
OMNIGLOT = Path(os.environ.get("DISTMETA_OMNIGLOT", REPOSITORY.parent / "shared" / "data" / "omniglot"))


@pytest.fixture(scope="session")
def omniglot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task store of the real data, built once."""
    if not OMNIGLOT.is_dir():
        pytest.skip(f"no Omniglot data in {OMNIGLOT} (set DISTMETA_OMNIGLOT)")
    from distmeta.data.build import build_omniglot

    path = tmp_path_factory.mktemp("data") / "omniglot.arrow"
    built = build_omniglot(str(OMNIGLOT), str(path))
    assert (built["classes"], built["examples"]) == (242, 4840)
    return path


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_two_steps(path: Path, workplace: Path, request: pytest.FixtureRequest) -> None:
    small = [
        "run.steps=2",
        "run.workers=0",
        "run.eval_tasks=4",
        "run.eval_inner_steps=2",
        "tracking.type=none",
        "compute.compile=false",  # takes a minute; tests/conformance/test_compiled.py has it
    ]
    if "omniglot" in path.stem:
        small.append(f"tasks.path={request.getfixturevalue('omniglot')}")
        small += ["run.tasks_per_step=2", "run.shards=1"]
        small += ["model.width=16"] if Job.load(path).model.type == "conv4" else []
    if "trajectories" in Job.load(path).tasks.options:
        small += ["tasks.trajectories=3", "tasks.horizon=10"]
    job = Job.load(path, small)
    if job.tasks.type == "gym":
        pytest.importorskip("mujoco", reason="needs the extra rl")
    assert job.name == path.stem
    run = distmeta.train(job).run
    held_out = ["tasks.split_by=group", "tasks.test=[Sanskrit]"]  # for a job that trains on all there is
    figures = distmeta.evaluate(run, held_out if job.tasks.options.get("test", 1) is None else []).figures
    assert figures["loss_after"] is not None
    adapts = distmeta.load(run).problem.algorithm.inner_steps > 0
    assert (figures["loss_before"] is not None) == adapts


@pytest.mark.slow
@pytest.mark.parametrize(("split", "neighbour"), [("[7, 8, 9]", 0.791)])
def test_digits_maml_beats_the_nearest_neighbour(split: str, neighbour: float, workplace: Path) -> None:
    """0.784 ± 0.007 is 1-nearest-neighbour on pixels, measured on the same tasks (benchmarks/accuracy.py)."""
    job = Job.load(
        REPOSITORY / "jobs" / "digits-maml.yaml", ["tracking.type=none", f"tasks.test_digits={split}"]
    )
    evaluation = distmeta.evaluate(distmeta.train(job).run)
    accuracy, interval = evaluation.figures["accuracy_after"], evaluation.ci95
    assert evaluation.tasks == 600
    assert accuracy is not None
    assert interval is not None
    assert accuracy - interval > neighbour
    assert accuracy > (evaluation.figures["accuracy_before"] or 0) + 0.5
