"""Sweeps on a real Ray cluster and a real MLflow store: trials are ordinary trainings, to the bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import tree

import distmeta
from distmeta.core import InputError
from distmeta.job import Job
from distmeta.jobfile import parse_yaml
from distmeta.mlflow_store import import_mlflow
from distmeta.runtime import checkpoint as checkpoints
from distmeta.sweeps import NothingFoundError
from distmeta.sweeps.run import NoView

RUN = {"steps": 6, "eval_every": 2, "eval_tasks": 5, "name": "swept"}
RATES = {"algorithm.inner_lr": {"loguniform": [0.01, 0.2]}, "outer.lr": {"loguniform": [1e-3, 0.05]}}
TRACKED = {"type": "mlflow", "experiment": "sweeps"}


@pytest.fixture
def client(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/mlflow.db")
    import_mlflow()
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{workplace}/mlflow.db")


def swept(run: dict[str, Any] | None = None, tracked: bool = False, **sweep: Any) -> dict[str, Any]:
    section = {"space": RATES, "trials": 3, "scheduler": {"type": "none"}, **sweep}
    return tree(
        "maml", run=RUN | (run or {}), sweep=section, tracking=TRACKED if tracked else {"type": "none"}
    )


def bits(run: Path) -> list[bytes]:
    theta = checkpoints.load(run).theta
    return [theta[name].numpy().tobytes() for name in sorted(theta)]


def evaluations(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["val_loss_after"] for row in rows if "val_loss_after" in row}


def runs_of(client: Any) -> tuple[Any, dict[str, Any]]:
    """The parent run, and the children by name."""
    experiment = client.get_experiment_by_name("sweeps").experiment_id
    runs = client.search_runs([experiment])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.info.run_name: run for run in runs if run is not parent}
    assert len(children) == len(runs) - 1, "a trial has two runs"
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.info.run_id}
    return parent, children


def test_a_sweep_from_its_job_to_its_best(client: Any, workplace: Path, cluster: None) -> None:
    job = Job.parse(swept(tracked=True))
    found = distmeta.sweep(job)
    assert found.folder == workplace / "runs" / "swept"
    assert [trial.status for trial in found.trials] == ["finished"] * 3
    assert found.value == min(trial.value for trial in found.trials if trial.value is not None)

    table = pq.read_table(found.folder / "sweep" / "trials.parquet").to_pylist()
    assert [row["trial"] for row in table] == ["trial-00000", "trial-00001", "trial-00002"]
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


def test_poor_trials_stop_early(client: Any, workplace: Path, cluster: None) -> None:
    space = {"algorithm.inner_lr": {"grid": [0.05, 0.06, 1e-6, 1e-6, 1e-6, 1e-6]}}
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


def test_a_budget_ends_the_sweep(workplace: Path, cluster: None) -> None:
    found = distmeta.sweep(Job.parse(swept(trials=8, concurrent=1, budget=9)))
    assert 9 <= sum(trial.steps for trial in found.trials) <= 12
    assert len(found.trials) < 8
    assert {trial.status for trial in found.trials} <= {"finished", "stopped"}


def test_one_failed_trial_is_marked_and_the_sweep_goes_on(
    client: Any, workplace: Path, cluster: None
) -> None:
    space = {"algorithm.inner_lr": {"grid": [0.05, 1e30, 0.06]}}
    found = distmeta.sweep(Job.parse(swept(tracked=True, space=space, trials=1)))
    assert [trial.status for trial in found.trials] == ["finished", "failed", "finished"]
    assert found.trials[1].reason == "NumericsError: val_loss_after is not finite at step 2"
    table = pq.read_table(found.folder / "sweep" / "trials.parquet").to_pylist()
    assert table[1]["reason"] == found.trials[1].reason
    assert table[1]["value"] is None
    _, children = runs_of(client)
    assert [children[f"trial-0000{i}"].info.status for i in range(3)] == ["FINISHED", "FAILED", "FINISHED"]
    assert children["trial-00001"].data.tags["distmeta.reason"] == found.trials[1].reason
    assert children["trial-00002"].data.tags["distmeta.trial"] == "finished"


def test_a_killed_trial_goes_on_from_its_checkpoint(client: Any, workplace: Path, cluster: None) -> None:
    class Flag(NoView):
        def begin(self, folder: Path, count: int) -> None:
            (workplace / "kill").touch()  # from here on: the sweep itself draws tasks before

    job = swept(tracked=True, trials=2) | {
        "tasks": {"type": "hard_cases:Lethal", "flag": str(workplace / "kill")}
    }
    found = distmeta.sweep(Job.parse(job), view=Flag())
    assert not (workplace / "kill").exists(), "a trial was killed"
    assert [trial.status for trial in found.trials] == ["finished"] * 2
    runs_of(client)  # none has two runs
    for trial in found.trials:
        assert trial.run is not None
        alone = Job.parse(job).with_values({**trial.values, "run.name": "alone", "tracking.type": "none"})
        alone = alone.with_values({"output": trial.name})
        assert bits(distmeta.train(alone).run) == bits(trial.run)


def test_no_credential_reaches_the_folder(
    client: Any, workplace: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "open-sesame")
    found = distmeta.sweep(Job.parse(swept(tracked=True, trials=1)))
    files = [path for path in found.folder.rglob("*") if path.is_file()]
    assert any(path.name == "tuner.pkl" for path in files)
    assert not [path for path in files if b"open-sesame" in path.read_bytes()]


def test_a_metric_that_there_is_not(workplace: Path, cluster: None) -> None:
    with pytest.raises(
        NothingFoundError, match=r"InputError: sweep.metric: got 'val_acuracy_after', but evaluations"
    ):
        distmeta.sweep(Job.parse(swept(trials=1, metric="val_acuracy_after")))


def test_all_trials_failed(workplace: Path, cluster: None) -> None:
    job = Job.parse(swept(space={"algorithm.inner_lr": {"grid": [1e30, 1e31]}}, trials=1))
    with pytest.raises(
        NothingFoundError, match="no trial came to an evaluation: NumericsError: val_loss_after is not"
    ):
        distmeta.sweep(job)


def test_population_based_training_is_replayed_from_its_job(
    client: Any, workplace: Path, cluster: None
) -> None:
    scheduler = {"type": "pbt", "interval": 2}
    job = Job.parse(swept(run={"steps": 10}, tracked=True, trials=4, scheduler=scheduler))
    found = distmeta.sweep(job)
    assert {trial.status for trial in found.trials} == {"finished"}
    _, children = runs_of(client)
    jobs = {trial.name: Job.load(trial.run / "job.yaml") for trial in found.trials if trial.run}
    assert any(len(one.changes) > 1 for one in jobs.values()), "nobody was perturbed"
    for trial in found.trials:
        assert trial.run is not None
        replayed = jobs[trial.name].with_values({"output": "replays", "tracking.type": "none"})
        run = distmeta.train(replayed).run
        assert bits(run) == bits(trial.run)
        assert evaluations(run) == evaluations(trial.run)
        for key in RATES:  # its own MLflow run has the rates of every step that led to it
            history = client.get_metric_history(children[trial.run.name].info.run_id, key)
            logged = {metric.step: metric.value for metric in history}
            assert len(history) == 10
            assert logged == {step + 1: replayed.at(step).value(key) for step in range(10)}
            assert trial.values[key] == logged[10]
    best = distmeta.train(Job.load(found.folder / "sweep" / "best.yaml", ["tracking.type=none"])).run
    assert bits(best) == bits(found.best_run)


@pytest.mark.slow
def test_a_population_survives_a_member(workplace: Path, cluster: None) -> None:
    space = {
        "algorithm.inner_lr": {"loguniform": [1e-2, 1e24]}
    }  # with this seed, one draw has no finite loss
    job = swept(space=space, trials=4, seed=217, scheduler={"type": "pbt", "interval": 2})
    statuses = [trial.status for trial in distmeta.sweep(Job.parse(job)).trials]
    assert len(statuses) == 4
    assert statuses.count("finished") >= 2
    assert "failed" in statuses


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


def test_a_sweep_goes_on_with_its_own_job_only(workplace: Path, cluster: None) -> None:
    with pytest.raises(InputError, match=r"^--resume: .* is not a sweep's folder"):
        distmeta.sweep(Job.parse(swept()), resume=workplace)
    distmeta.sweep(Job.parse(swept(trials=1)))
    with pytest.raises(InputError, match=r"^run.name: the folder .* exists already: go on with --resume"):
        distmeta.sweep(Job.parse(swept(trials=1)))
    with pytest.raises(
        InputError, match=r"^sweep.trials: got 2, but the sweep to go on with has 1: take its"
    ):
        distmeta.sweep(Job.parse(swept(trials=2)), resume=workplace / "runs" / "swept")


@pytest.mark.slow  # a minute and a half
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_driver_is_killed_and_the_sweep_goes_on(
    how: signal.Signals, client: Any, workplace: Path
) -> None:
    """Finished trials are kept, the others go on, no trial has two MLflow runs; the numbers are an unharmed sweep's."""
    job = Job.parse(swept(run={"steps": 150, "eval_every": 10}, tracked=True, trials=3, concurrent=1))
    (workplace / "job.yaml").write_text(job.dump())
    folder = workplace / "runs" / "swept"
    command = [sys.executable, "-m", "distmeta.cli", "sweep"]
    process = subprocess.Popen([*command, "job.yaml"], stderr=subprocess.PIPE, text=True, cwd=workplace)
    second = folder / "trials" / "trial-00001" / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not (second.exists() and second.read_text().count("val_loss") > 1):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    errors = process.communicate(timeout=120)[1]
    if how == signal.SIGTERM:
        assert process.returncode == 130, errors
        assert f"distmeta sweep --resume {folder}" in errors
    first = (
        folder / "trials" / "trial-00000" / "metrics.jsonl"
    ).read_bytes()  # with the seconds of every step
    done = subprocess.run(
        [*command, "--resume", str(folder), "--json"],
        capture_output=True, text=True, timeout=300, cwd=workplace,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["trials"] == 3
    again = (folder / "trials" / "trial-00000" / "metrics.jsonl").read_bytes()
    assert first == again, "a finished trial is kept"
    _, children = runs_of(client)
    assert sorted(children) == ["trial-00000", "trial-00001", "trial-00002"]
    for row in pq.read_table(folder / "sweep" / "trials.parquet").to_pylist():
        alone = job.with_values(
            {**{key: row[key] for key in RATES}, "run.name": "alone-" + row["trial"], "tracking.type": "none"}
        )
        assert bits(distmeta.train(alone).run) == bits(Path(row["run"]))
        history = client.get_metric_history(children[row["trial"]].info.run_id, "loss_after")
        assert [metric.step for metric in history] == list(range(1, 151))
        assert children[row["trial"]].info.status == "FINISHED"
    assert parse_yaml((folder / "sweep" / "best.yaml").read_text(), "best")["run"]["steps"] == 150
