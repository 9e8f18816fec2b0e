"""Sweeps on a real Ray cluster and a real MLflow store: trials are ordinary trainings, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sweeping import RATES, bits, evaluations, runs_of, swept

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.sweeps import NothingFoundError
from distmeta.sweeps.run import _settled


def test_a_sweep_of_gpu_trials_is_settled_without_one() -> None:
    """On a head node, say."""
    job = Job.parse(swept({"gpus_per_worker": 1}))
    assert _settled(job, lambda text: None).run.gpus_per_worker == 1


def test_a_sweep_from_its_job_to_its_best(
    client: Any, workplace: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "open-sesame")
    job = Job.parse(swept(tracked=True, trials=2))
    found = distmeta.sweep(job)
    assert found.folder == workplace / "runs" / "swept"
    assert [trial.status for trial in found.trials] == ["finished"] * 2
    assert found.value == min(trial.value for trial in found.trials if trial.value is not None)

    table = pq.read_table(found.folder / "sweep" / "trials.parquet").to_pylist()
    assert [row["trial"] for row in table] == ["trial-00000", "trial-00001"]
    assert {row["outer.lr"] for row in table} == {trial.values["outer.lr"] for trial in found.trials}
    for row in table:  # a trial is the training that the same overrides give
        overrides = {key: row[key] for key in RATES}
        alone = distmeta.train(
            job.with_values({**overrides, "run.name": "alone-" + row["trial"], "tracking.type": "none"})
        ).run
        assert bits(alone) == bits(Path(row["run"]))
        assert evaluations(alone) == evaluations(Path(row["run"]))

    best = Job.load(found.folder / "sweep" / "best.yaml", ["tracking.type=none"])
    again = distmeta.train(best).run
    assert bits(again) == bits(found.best_run)
    assert found.value in evaluations(again).values()
    assert best.run.steps == 6
    assert best.sweep is None

    parent, children = runs_of(client)
    assert parent.info.status == "FINISHED"
    assert parent.data.params["sweep.space.outer.lr.loguniform"] == "[0.001, 0.05]"
    assert float(parent.data.params["best.outer.lr"]) == found.best["outer.lr"]
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
    with pytest.raises(InputError, match=r"^run.name: the folder .* exists already: go on with --resume"):
        distmeta.sweep(job)
    with pytest.raises(InputError, match=r"^--resume: .* is not a sweep's folder"):
        distmeta.sweep(job, resume=workplace)
    with pytest.raises(
        InputError, match=r"^sweep.trials: got 3, but the sweep to go on with has 2: take its"
    ):
        distmeta.sweep(Job.parse(swept(tracked=True, trials=3)), resume=found.folder)


@pytest.mark.slow
def test_trials_with_workers_and_other_searches(workplace: Path, cluster: None) -> None:
    job = Job.parse(swept(run={"workers": 2}, trials=2, search="tpe", concurrent=1))
    found = distmeta.sweep(job)
    assert len(found.trials) == 2
    for trial in found.trials:
        assert trial.run is not None
        alone = job.with_values({**trial.values, "run.workers": 0, "run.name": "alone-" + trial.name})
        assert bits(distmeta.train(alone).run) == bits(trial.run)
    again = distmeta.sweep(job.replace(run={"name": "again"}))
    values = [sorted(trial.values["outer.lr"] for trial in sweep.trials) for sweep in (found, again)]
    assert values[0] == values[1], "the same seed gives the same values"


@pytest.mark.slow
def test_trials_of_groups_under_ray_train(workplace: Path, cluster: None) -> None:
    """Four places, groups of two: two trials at once, the third one after them."""
    job = Job.parse(swept(run={"strategy": "all-reduce", "workers": 2}, trials=3))
    found = distmeta.sweep(job)
    assert [trial.status for trial in found.trials] == ["finished"] * 3
    for trial in found.trials:
        assert trial.run is not None
        alone = {
            **trial.values,
            "run.strategy": "driver",
            "run.workers": 0,
            "run.name": "alone-" + trial.name,
        }
        assert evaluations(distmeta.train(job.with_values(alone)).run) == pytest.approx(
            evaluations(trial.run), rel=1e-3
        )


@pytest.mark.slow
def test_poor_trials_stop_early(client: Any, workplace: Path, cluster: None) -> None:
    space = {"algorithm.inner_lr": {"grid": [0.05, 0.06, 1e-6, 1e-6]}}
    job = swept(tracked=True, space=space, trials=1, concurrent=1, scheduler={"type": "asha", "reduction": 2})
    found = distmeta.sweep(Job.parse(job))
    assert {trial.status for trial in found.trials} == {"finished", "stopped"}
    for trial in found.trials:
        assert trial.steps == 6 if trial.status == "finished" else trial.steps < 6
    _, children = runs_of(client)
    status = {trial.name: children[trial.name].info.status for trial in found.trials}
    assert status == {t.name: "FINISHED" if t.status == "finished" else "KILLED" for t in found.trials}
    for trial in found.trials:
        steps = [
            m.step for m in client.get_metric_history(children[trial.name].info.run_id, "val_loss_after")
        ]
        assert sorted(steps) == list(range(2, trial.steps + 1, 2))


@pytest.mark.slow  # two trials, for one number
def test_a_budget_ends_the_sweep(workplace: Path, cluster: None) -> None:
    found = distmeta.sweep(Job.parse(swept(trials=8, concurrent=1, budget=9)))
    assert 9 <= sum(trial.steps for trial in found.trials) <= 12
    assert len(found.trials) < 8
    assert {trial.status for trial in found.trials} <= {"finished", "stopped"}


@pytest.mark.slow  # a trial, for one message; that none succeeds is tested below
def test_a_metric_that_there_is_not(workplace: Path, cluster: None) -> None:
    with pytest.raises(
        NothingFoundError, match=r"InputError: sweep.metric: got 'val_acuracy_after', but evaluations"
    ):
        distmeta.sweep(Job.parse(swept(trials=1, metric="val_acuracy_after")))


def test_all_trials_failed(workplace: Path, cluster: None) -> None:
    job = Job.parse(swept(space={"algorithm.inner_lr": {"grid": [1e30]}}, trials=1))
    with pytest.raises(
        NothingFoundError, match="no trial came to an evaluation: NumericsError: val_loss_after is not"
    ):
        distmeta.sweep(job)


@pytest.mark.slow
def test_tpe_with_asha(workplace: Path, cluster: None) -> None:
    found = distmeta.sweep(Job.parse(swept(search="tpe", scheduler={"type": "asha", "reduction": 2})))
    assert {trial.status for trial in found.trials} <= {"finished", "stopped"}
    assert len(found.trials) == 3


def test_more_than_the_cluster_has_is_said_at_once(workplace: Path, cluster: None) -> None:
    for run, message in (
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
    ):
        with pytest.raises(InputError) as caught:
            distmeta.sweep(Job.parse(swept(run=run)))
        assert str(caught.value).startswith(message)
        assert str(caught.value).endswith(": 4 CPU and 0 GPU on 1 node")
        assert not (workplace / "runs").exists()
