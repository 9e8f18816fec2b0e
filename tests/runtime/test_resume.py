"""Where a training starts, and what a resume may change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import tree
from support.outcomes import ActingReporter, read_theta, train_job

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints


@pytest.mark.parametrize("file", ["theta.safetensors", "optimizer.safetensors", "state.json", "all files"])
def test_damaged_checkpoint_is_skipped_by_a_resume(file: str, workplace: Path) -> None:
    """It is reported. A damaged checkpoint that is named itself is refused, also by `evaluate`."""
    uninterrupted = train_job(tree("maml"), checkpoint_every=1)
    run = train_job(tree("maml"), checkpoint_every=1, name="mine")
    latest = checkpoints.find(run)
    if file == "all files":
        shutil.rmtree(latest)
    else:
        (latest / file).write_bytes((latest / file).read_bytes()[:-7])
        with pytest.raises(InputError, match=r"damaged|not a complete checkpoint"):
            distmeta.train(Job.load(run / "job.yaml"), resume=latest)
    with pytest.raises(InputError):
        distmeta.evaluate(run)

    reporter = ActingReporter()
    assert distmeta.train(Job.load(run / "job.yaml"), resume=run, reporter=reporter).step == 6
    assert reporter.reports[0].startswith("skipping a damaged checkpoint: runs/mine/checkpoints/")
    assert reporter.reports[1] == "continuing from step 5, the last complete checkpoint"
    assert read_theta(run) == read_theta(uninterrupted)
    assert (run / "metrics.jsonl").read_text().count("\n") == 6


def test_existing_run_folder_is_refused(workplace: Path) -> None:
    run = train_job(tree("maml"), name="mine")
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    with pytest.raises(InputError, match=r"run.name: the run folder runs/mine exists already"):
        train_job(tree("maml"), name="mine")
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outer": {"lr": 0.5}}, "outer.lr: got 0.5, but the run to resume has 0.01"),
        ({"model": {"hidden": [8]}}, r"model.hidden: got \[8\], but the run to resume has \[16, 16\]"),
        ({"algorithm": {"inner_steps": 5}}, "algorithm.inner_steps: got 5"),
    ],
)
def test_checkpoint_of_another_job_is_refused(
    change: dict[str, dict[str, object]], message: str, workplace: Path
) -> None:
    run = train_job(tree("maml"), name="mine")
    job = Job.load(run / "job.yaml").replace(**change)
    with pytest.raises(InputError, match=message):
        distmeta.train(job, resume=run)


def test_checkpoint_with_another_seed_is_refused(workplace: Path) -> None:
    run = train_job(tree("maml"), name="mine")
    job = Job.parse(Job.load(run / "job.yaml").to_dict() | {"seed": 1})
    with pytest.raises(InputError, match="seed: got 1, but"):
        distmeta.train(job, resume=run)


def test_resume_cannot_remove_an_option(workplace: Path) -> None:
    run = distmeta.train(Job.parse(tree("maml", outer={"clip_norm": 3.0}))).run
    with pytest.raises(InputError, match=r"outer.clip_norm: got None, but the run to resume has 3.0"):
        distmeta.train(Job.parse(tree("maml")), resume=run)


def test_resume_cannot_change_to_a_strategy_with_other_bits(workplace: Path) -> None:
    run = train_job(tree("maml"), name="mine")
    message = r"strategy.type: got 'local', but the run to resume has 'driver'"
    with pytest.raises(InputError, match=message):
        train_job(tree("maml"), resume=run, strategy={"type": "local"})
    with pytest.raises(InputError, match=r"strategy.compress: got 'int8', but the run to resume has 'none'"):
        train_job(tree("maml"), resume=run, strategy={"type": "driver", "compress": "int8"})


def test_resume_may_change_steps_placement_and_output(workplace: Path) -> None:
    run = train_job(tree("maml"), name="mine")
    job = Job.parse(tree("maml", run={"steps": 9, "cpus_per_worker": 0.5}, output="elsewhere"))
    result = distmeta.train(job, resume=run)
    assert (result.run, result.step) == (run, 9)
    assert Job.load(run / "job.yaml").run.steps == 9


def test_resume_auto_starts_or_continues(workplace: Path) -> None:
    with pytest.raises(InputError, match=r"--resume auto: run.name is not set"):
        distmeta.train(Job.parse(tree("maml")), resume="auto")
    job = Job.parse(tree("maml", run={"name": "mine"}))
    first = distmeta.train(job, resume="auto")
    again = distmeta.train(job, resume="auto")
    assert (first.step, again) == (6, first)
    longer = distmeta.train(job.replace(run={"steps": 8}), resume="auto")
    assert longer.step == 8


def test_checkpoint_is_named_from_within_its_folder(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train_job(tree("maml"), name="mine").resolve()
    monkeypatch.chdir(run / "checkpoints")
    result = distmeta.train(Job.load(run / "job.yaml", ["run.steps=7"]), resume="latest")
    assert result.run.resolve() == run
    assert checkpoints.load(run).progress.step == 7


def test_checkpoint_outside_a_run_folder_is_evaluated_but_not_resumed(workplace: Path) -> None:
    run = train_job(tree("maml"), name="mine")
    shutil.copytree(checkpoints.find(run), workplace / "copied")
    assert distmeta.evaluate(workplace / "copied").tasks == 600
    with pytest.raises(InputError, match="outside a run folder: it can be evaluated, not resumed"):
        distmeta.train(Job.load(run / "job.yaml"), resume=workplace / "copied")
