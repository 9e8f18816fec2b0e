"""Sweeps on a real Ray cluster and a real MLflow store. A trial equals the training of the same job, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.outcomes import read_theta
from support.small_sweeps import RATES, make_sweep, read_losses, read_mlflow_runs

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.sweeps import NothingFoundError
from distmeta.sweeps.run import resolve_sweep_job


def test_sweep_of_gpu_trials_is_resolved_without_a_gpu() -> None:
    """As on the head node of a cluster."""
    job = Job.parse(make_sweep({"gpus_per_worker": 1}))
    assert resolve_sweep_job(job, lambda text: None).run.gpus_per_worker == 1


def test_sweep_from_its_job_to_its_best(
    client: Any, workplace: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "open-sesame")
    job = Job.parse(make_sweep(tracked=True, trials=2))
    found = distmeta.sweep(job)
    assert found.folder == workplace / "runs" / "swept"
    assert [trial.status for trial in found.trials] == ["finished"] * 2
    assert found.value == min(trial.value for trial in found.trials if trial.value is not None)

    table = pq.read_table(found.folder / "sweep" / "trials.parquet").to_pylist()
    assert [row["trial"] for row in table] == ["trial-00000", "trial-00001"]
    assert {row["outer.lr"] for row in table} == {trial.values["outer.lr"] for trial in found.trials}
    for row in table:  # a trial equals the training with the same overrides
        overrides = {key: row[key] for key in RATES}
        single = distmeta.train(
            job.with_values({**overrides, "run.name": "single-" + row["trial"], "tracking.type": "none"})
        ).run
        assert read_theta(single) == read_theta(Path(row["run"]))
        assert read_losses(single) == read_losses(Path(row["run"]))

    best = Job.load(found.folder / "sweep" / "best.yaml", ["tracking.type=none"])
    again = distmeta.train(best).run
    assert read_theta(again) == read_theta(found.best_run)
    assert found.value in read_losses(again).values()
    assert best.run.steps == 6
    assert best.sweep is None

    parent, children = read_mlflow_runs(client)
    assert parent.info.status == "FINISHED"
    assert parent.data.params["sweep.space.outer.lr.loguniform"] == "[0.001, 0.05]"
    assert float(parent.data.params["best.outer.lr"]) == found.best["outer.lr"]
    assert "trials.json" in parent.data.tags["mlflow.loggedArtifacts"]
    names = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert names == {"trials.parquet", "trials.json", "job.yaml", "best.yaml", "curves.png", "values.png"}
    for row in table:
        child = children[row["trial"]]
        assert child.info.status == "FINISHED"
        assert float(child.data.params["outer.lr"]) == row["outer.lr"]
        assert len(client.get_metric_history(child.info.run_id, "loss_after")) == 6
        assert row["mlflow_run"] == child.info.run_id

    files = [path for path in found.folder.rglob("*") if path.is_file()]
    assert any(path.name == "tuner.pkl" for path in files)
    assert not [path for path in files if b"open-sesame" in path.read_bytes()]
    with pytest.raises(InputError, match=r"^run.name: the folder .* exists already: resume it with --resume"):
        distmeta.sweep(job)
    with pytest.raises(InputError, match=r"^--resume: .* is not a sweep's folder"):
        distmeta.sweep(job, resume=workplace)
    with pytest.raises(
        InputError, match=r"^sweep.trials: got 3, but the sweep to resume has 2: use the sweep's own"
    ):
        distmeta.sweep(Job.parse(make_sweep(tracked=True, trials=3)), resume=found.folder)


@pytest.mark.slow
def test_trials_with_workers_and_tpe(workplace: Path, cluster: None) -> None:
    job = Job.parse(make_sweep(run={"workers": 2}, trials=2, search="tpe", concurrent=1))
    found = distmeta.sweep(job)
    assert len(found.trials) == 2
    for trial in found.trials:
        assert trial.run is not None
        single = job.with_values({**trial.values, "run.workers": 0, "run.name": "single-" + trial.name})
        assert read_theta(distmeta.train(single).run) == read_theta(trial.run)
    again = distmeta.sweep(job.replace(run={"name": "again"}))
    values = [sorted(trial.values["outer.lr"] for trial in sweep.trials) for sweep in (found, again)]
    assert values[0] == values[1], "the same seed gives the same values"


@pytest.mark.slow
def test_trials_that_are_groups_under_ray_train(workplace: Path, cluster: None) -> None:
    """Four places and groups of two: two trials at once, then the third."""
    job = Job.parse(make_sweep(run={"workers": 2}, trials=3) | {"strategy": {"type": "all-reduce"}})
    found = distmeta.sweep(job)
    assert [trial.status for trial in found.trials] == ["finished"] * 3
    for trial in found.trials:
        assert trial.run is not None
        overrides = {**trial.values, "run.workers": 0, "run.name": "single-" + trial.name}
        single = distmeta.train(job.with_values(overrides, strategy={"type": "driver"})).run
        assert read_losses(single) == pytest.approx(read_losses(trial.run), rel=1e-3)


@pytest.mark.slow
def test_poor_trials_stop_early(client: Any, workplace: Path, cluster: None) -> None:
    space = {"algorithm.inner_lr": {"grid": [0.05, 0.06, 1e-6, 1e-6]}}
    scheduler = {"type": "asha", "reduction": 2}
    job = make_sweep(tracked=True, space=space, trials=1, concurrent=1, scheduler=scheduler)
    found = distmeta.sweep(Job.parse(job))
    assert {trial.status for trial in found.trials} == {"finished", "stopped"}
    _, children = read_mlflow_runs(client)
    for trial in found.trials:
        child = children[trial.name]
        if trial.status == "finished":
            assert trial.steps == 6
            assert child.info.status == "FINISHED"
        else:
            assert trial.steps < 6
            assert child.info.status == "KILLED"
        steps = [metric.step for metric in client.get_metric_history(child.info.run_id, "val_loss_after")]
        assert sorted(steps) == list(range(2, trial.steps + 1, 2))


@pytest.mark.slow  # two trials, for one number
def test_budget_ends_the_sweep(workplace: Path, cluster: None) -> None:
    found = distmeta.sweep(Job.parse(make_sweep(trials=8, concurrent=1, budget=9)))
    assert 9 <= sum(trial.steps for trial in found.trials) <= 12
    assert len(found.trials) < 8
    assert {trial.status for trial in found.trials} <= {"finished", "stopped"}


@pytest.mark.slow  # a trial, for one message; the next test covers a sweep without a successful trial
def test_unknown_metric_is_named(workplace: Path, cluster: None) -> None:
    with pytest.raises(
        NothingFoundError, match=r"InputError: sweep.metric: got 'val_acuracy_after', but evaluations"
    ):
        distmeta.sweep(Job.parse(make_sweep(trials=1, metric="val_acuracy_after")))


@pytest.mark.slow
def test_sweep_without_a_successful_trial_names_the_reason(workplace: Path, cluster: None) -> None:
    job = Job.parse(make_sweep(space={"algorithm.inner_lr": {"grid": [1e30]}}, trials=1))
    with pytest.raises(
        NothingFoundError, match="no trial reached an evaluation: NumericsError: val_loss_after is not"
    ):
        distmeta.sweep(job)


@pytest.mark.slow
def test_tpe_with_asha(workplace: Path, cluster: None) -> None:
    found = distmeta.sweep(Job.parse(make_sweep(search="tpe", scheduler={"type": "asha", "reduction": 2})))
    assert {trial.status for trial in found.trials} <= {"finished", "stopped"}
    assert len(found.trials) == 3


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            {"workers": 5},
            "run.workers: 5: a trial needs 5 places of 1 CPU and 0 GPU, but the cluster has 4: ",
        ),
        (
            {"cpus_per_worker": 5.0},
            "run.workers: 0: a trial needs 1 place of 5 CPU and 0 GPU, but the cluster has 0: ",
        ),
        (
            {"workers": 2, "cpus_per_worker": 3.0},
            "run.workers: 2: a trial needs 2 places of 3 CPU and 0 GPU, but the",
        ),
    ],
)
def test_trial_that_does_not_fit_on_the_cluster_is_refused(
    workplace: Path, cluster: None, run: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        distmeta.sweep(Job.parse(make_sweep(run=run)))
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(": 4 CPU and 0 GPU on 1 node")
    assert not (workplace / "runs").exists()
