"""Checkpoints: whole or not there; found by every path; never code."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tree
from mlflow import MlflowClient

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime import training as driver
from distmeta.runtime.checkpoint import Checkpoint, Progress


def state(step: int, best_step: int | None = None) -> Checkpoint:
    theta = {"model.w": torch.full((3,), float(step))}
    moments = {"model.w/exp_avg": torch.ones(3)}
    return Checkpoint(
        {"name": "x"},
        theta,
        {"mean": torch.zeros(2)},
        moments,
        {"clock": 7},
        Progress(step, best_step=best_step),
    )


def test_round_trip(tmp_path: Path) -> None:
    folder = checkpoints.save(tmp_path, state(7), keep=3)
    assert folder.name == "step-00000007"
    loaded = checkpoints.load(folder)
    assert loaded.progress == Progress(7)
    assert torch.equal(loaded.theta["model.w"], torch.full((3,), 7.0))
    assert set(loaded.constants) == {"mean"}
    assert set(loaded.optimizer) == {"model.w/exp_avg"}


def test_found_by_every_path(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, state(1, best_step=1), keep=3)
    last = checkpoints.save(tmp_path, state(2, best_step=1), keep=3)
    folder = tmp_path / "checkpoints"
    assert checkpoints.find(tmp_path) == checkpoints.find(folder / "latest") == checkpoints.find(last) == last
    assert checkpoints.find(folder / "best").name == "step-00000001"
    assert (folder / "best").read_text() == "step-00000001\n"


def test_the_last_k_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        checkpoints.save(tmp_path, state(step, best_step=1), keep=2)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == ["step-00000001", "step-00000005", "step-00000006"]


@pytest.mark.parametrize("name", ["theta", "optimizer", "constants"])
def test_a_damaged_file_is_one_clear_error(name: str, tmp_path: Path) -> None:
    folder = checkpoints.save(tmp_path, state(3), keep=3)
    path = folder / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match=rf"{name}.safetensors is damaged") as caught:
        checkpoints.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1, "sha256": 3}', "\x00"]
)
def test_a_bad_state_file_is_one_clear_error(text: str, tmp_path: Path) -> None:
    folder = checkpoints.save(tmp_path, state(3), keep=3)
    (folder / "state.json").write_text(text)
    with pytest.raises(InputError):
        checkpoints.load(tmp_path)


def test_latest_cannot_point_outside(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "a", state(3), keep=3)
    checkpoints.save(tmp_path / "b", state(3), keep=3)
    (tmp_path / "a" / "checkpoints" / "latest").write_text("../../b/checkpoints/step-00000003\n")
    with pytest.raises(InputError, match="not a checkpoint beside it"):
        checkpoints.load(tmp_path / "a")


def test_an_unfinished_write_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(tmp_path, state(1), keep=3)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(
        checkpoints.SaveError, match=r"step 2 cannot be saved .*No space.* is step-00000001: make room"
    ):
        checkpoints.save(tmp_path, state(2), keep=3)
    assert checkpoints.load(tmp_path).progress.step == 1


@pytest.mark.parametrize("file", ["theta.safetensors", "optimizer.safetensors", "state.json", "all of it"])
def test_a_damaged_checkpoint_is_passed_over(file: str, workplace: Path) -> None:
    """By a resume, with a line; one that is named itself is refused, and `evaluate` says so too."""
    whole = trained(checkpoint_every=1)
    run = trained(checkpoint_every=1, name="mine")
    latest = checkpoints.find(run)
    if file == "all of it":
        shutil.rmtree(latest)
    else:
        (latest / file).write_bytes((latest / file).read_bytes()[:-7])
        with pytest.raises(InputError, match=r"damaged|not a whole checkpoint"):
            distmeta.train(Job.load(run / "job.yaml"), resume=latest)
    with pytest.raises(InputError):
        distmeta.evaluate(run)

    class Heard(driver.SilentReporter):
        def report(self, text: str) -> None:
            said.append(text)

    said: list[str] = []
    assert distmeta.train(Job.load(run / "job.yaml"), resume=run, reporter=Heard()).step == 6
    assert said[0].startswith("passed over: runs/mine/checkpoints/")
    assert said[1] == "going on from step 5, the last whole checkpoint"
    theta, expected = checkpoints.load(run).theta, checkpoints.load(whole).theta
    assert all(torch.equal(theta[name], expected[name]) for name in expected)
    assert metric_steps(run) == [1, 2, 3, 4, 5, 6]


def trained(**run: object) -> Path:
    return distmeta.train(Job.parse(tree("maml", run=run))).run


def test_a_second_run_into_a_folder_is_refused(workplace: Path) -> None:
    run = trained(name="mine")
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    with pytest.raises(InputError, match=r"run.name: the run folder runs/mine exists already"):
        trained(name="mine")
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


def test_another_jobs_checkpoint_is_refused(workplace: Path) -> None:
    run = trained(name="mine")
    stored = Job.load(run / "job.yaml")
    for change, message in [
        ({"outer": {"lr": 0.5}}, "outer.lr: got 0.5, but the run to resume has 0.01"),
        ({"model": {"hidden": [8]}}, r"model.hidden: got \[8\], but the run to resume has \[16, 16\]"),
        ({"algorithm": {"inner_steps": 5}}, "algorithm.inner_steps: got 5"),
    ]:
        with pytest.raises(InputError, match=message):
            distmeta.train(stored.replace(**change), resume=run)
    with pytest.raises(InputError, match="seed: got 1, but"):
        distmeta.train(Job.parse(stored.to_dict() | {"seed": 1}), resume=run)


def test_what_a_resume_may_change(workplace: Path) -> None:
    run = trained(name="mine")
    job = Job.parse(tree("maml", run={"steps": 9, "cpus_per_worker": 0.5}, output="elsewhere"))
    summary = distmeta.train(job, resume=run)
    assert (summary.run, summary.step) == (run, 9)
    assert Job.load(run / "job.yaml").run.steps == 9


def test_resume_auto(workplace: Path) -> None:
    with pytest.raises(InputError, match=r"--resume auto: run.name is not set"):
        distmeta.train(Job.parse(tree("maml")), resume="auto")
    job = Job.parse(tree("maml", run={"name": "mine"}))
    first = distmeta.train(job, resume="auto")
    again = distmeta.train(job, resume="auto")
    assert (first.step, again) == (6, first)
    longer = distmeta.train(job.replace(run={"steps": 8}), resume="auto")
    assert longer.step == 8


def test_half_written_lines_and_later_steps_are_cut_back(workplace: Path) -> None:
    run = trained(name="mine", steps=4)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss_after": 1.0}\n{"step": 6, "lo')
    distmeta.train(Job.load(run / "job.yaml", ["run.steps=6"]), resume=run)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_patience_stops_and_best_is_kept(workplace: Path) -> None:
    job = tree(
        "maml",
        outer={"optimizer": "sgd", "lr": 1e-30},
        run={"steps": 50, "eval_every": 1, "eval_tasks": 5, "patience": 3},
    )
    summary = distmeta.train(Job.parse(job))
    assert (summary.step, summary.best_step) == (4, 1)
    assert checkpoints.load(summary.run / "checkpoints" / "best").progress.step == 1


def test_progress_waits_for_its_evaluation(workplace: Path) -> None:
    """Interrupted between a step and its evaluation, a run evaluates first when it goes on."""
    job = tree("maml", run={"steps": 8, "eval_every": 4, "eval_tasks": 5, "checkpoint_every": 4, "keep": 9})
    whole = distmeta.train(Job.parse(job)).run
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    stored = checkpoints.load(whole / "checkpoints" / "step-00000004")
    record = {k: v for k, v in rows[3].items() if not k.startswith("val_")}
    pending = replace(stored, progress=replace(stored.progress, pending=record, best=None, best_step=None))
    run = workplace / "interrupted"
    checkpoints.save(run, pending, keep=3)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    distmeta.train(Job.parse(stored.job), resume=run)
    again = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in again] == list(range(1, 9))
    assert again[3] == rows[3]
    assert again[7]["val_loss_after"] == rows[7]["val_loss_after"]


def metric_steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_pending_evaluation_is_done_once(workplace: Path) -> None:
    """However often the run is taken up again, and also where the evaluation was that of the last step."""
    run = trained(name="mine", eval_every=6, eval_tasks=5)
    stored = checkpoints.load(run)
    rows = (run / "metrics.jsonl").read_text().splitlines()
    record = {k: v for k, v in json.loads(rows[-1]).items() if not k.startswith("val_")}
    progress = replace(stored.progress, pending=record, best=None, best_step=None)
    checkpoints.save(run, replace(stored, progress=progress), keep=3)
    job = Job.load(run / "job.yaml")
    for _ in range(2):
        assert distmeta.train(job, resume=run).step == 6
        assert metric_steps(run) == [1, 2, 3, 4, 5, 6]
        assert checkpoints.load(run).progress == replace(stored.progress, pending=None)


def test_going_on_from_an_older_checkpoint_drops_the_later_ones(workplace: Path) -> None:
    run = trained(name="mine", checkpoint_every=1, keep=3)
    whole = checkpoints.load(run).theta
    older = run / "checkpoints" / "step-00000004"
    distmeta.train(Job.load(run / "job.yaml", ["run.steps=5"]), resume=older)
    assert checkpoints.find(run).name == "step-00000005"
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*"))[-1] == "step-00000005"
    assert metric_steps(run) == [1, 2, 3, 4, 5]
    distmeta.train(Job.load(run / "job.yaml", ["run.steps=6"]), resume=run)
    assert all(torch.equal(whole[name], value) for name, value in checkpoints.load(run).theta.items())


def test_named_from_within_its_own_folder(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(name="mine").resolve()
    monkeypatch.chdir(run / "checkpoints")
    summary = distmeta.train(Job.load(run / "job.yaml", ["run.steps=7"]), resume="latest")
    assert summary.run.resolve() == run
    assert checkpoints.load(run).progress.step == 7


def test_a_checkpoint_outside_a_run_folder_is_not_resumed(workplace: Path) -> None:
    run = trained(name="mine")
    shutil.copytree(checkpoints.find(run), workplace / "copied")
    assert distmeta.evaluate(workplace / "copied").tasks == 600
    with pytest.raises(InputError, match="outside a run folder: it can be evaluated, not resumed"):
        distmeta.train(Job.load(run / "job.yaml"), resume=workplace / "copied")


def test_a_run_folder_has_one_writer(workplace: Path) -> None:
    """And the one that is refused leaves the run, in MLflow too, to the one at work."""
    run = distmeta.train(Job.parse(tree("maml", run={"name": "mine"}, tracking={"type": "mlflow"}))).run
    job = Job.load(run / "job.yaml", ["run.steps=9"])
    client = MlflowClient("sqlite:///mlflow.db")
    tracked = checkpoints.load(run).progress.tracking_ids["mlflow"]

    class Second:
        def begin(self, folder: Path, job: Job, step: int) -> None:
            with pytest.raises(InputError, match="in use by another process"):
                distmeta.train(job, resume=run)
            assert client.get_run(tracked).info.status == "RUNNING"

        def step(self, record: object) -> None: ...
        def report(self, text: str) -> None: ...
        def end(self) -> None: ...

    assert distmeta.train(job, resume=run, reporter=Second()).step == 9
    assert metric_steps(run) == list(range(1, 10))


def test_a_resume_cannot_take_an_option_away(workplace: Path) -> None:
    run = distmeta.train(Job.parse(tree("maml", outer={"clip_norm": 3.0}))).run
    with pytest.raises(InputError, match=r"outer.clip_norm: got None, but the run to resume has 3.0"):
        distmeta.train(Job.parse(tree("maml")), resume=run)


def test_a_run_that_patience_stopped_stays_stopped(workplace: Path) -> None:
    settings = {"steps": 50, "eval_every": 1, "eval_tasks": 5, "patience": 2, "name": "patient"}
    job = Job.parse(tree("maml", outer={"optimizer": "sgd", "lr": 1e-30}, run=settings))
    assert [distmeta.train(job, resume="auto").step for _ in range(3)] == [3, 3, 3]
