"""Trials that fail, are killed or change their values, and a sweep whose driver is killed.

These tests have their own file, because with `pytest -n` each file has one process.
"""

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
from support.outcomes import read_theta
from support.small_sweeps import RATES, make_sweep, read_losses, read_mlflow_runs

import distmeta
from distmeta.config.job import Job
from distmeta.config.yaml_text import parse_yaml
from distmeta.sweeps.trial import choose_folder
from distmeta.sweeps.view import SilentView


@pytest.mark.slow  # two trials; test_sweep_without_a_successful_trial_names_the_reason has one
def test_failed_trial_is_marked_and_the_sweep_continues(client: Any, workplace: Path, cluster: None) -> None:
    space = {"algorithm.inner_lr": {"grid": [1e30, 0.05]}}
    found = distmeta.sweep(Job.parse(make_sweep(tracked=True, space=space, trials=1)))
    assert [trial.status for trial in found.trials] == ["failed", "finished"]
    assert found.trials[0].reason == "NumericsError: val_loss_after is not finite at step 2"
    table = pq.read_table(found.folder / "sweep" / "trials.parquet").to_pylist()
    assert table[0]["reason"] == found.trials[0].reason
    assert table[0]["value"] is None
    _, children = read_mlflow_runs(client)
    assert [children[f"trial-0000{i}"].info.status for i in range(2)] == ["FAILED", "FINISHED"]
    assert children["trial-00000"].data.tags["distmeta.reason"] == found.trials[0].reason
    assert children["trial-00001"].data.tags["distmeta.trial"] == "finished"


@pytest.mark.slow
def test_killed_trial_continues_from_its_checkpoint(client: Any, workplace: Path, cluster: None) -> None:
    flag = workplace / "kill"

    class KillingView(SilentView):
        def begin(self, folder: Path, count: int) -> None:
            flag.touch()  # only now, because the sweep's own process draws tasks before

    job = make_sweep(tracked=True, trials=2) | {
        "tasks": {"type": "hard_cases:TasksThatKillTheProcess", "flag": str(flag)}
    }
    found = distmeta.sweep(Job.parse(job), view=KillingView())
    assert not flag.exists(), "no trial was killed"
    assert [trial.status for trial in found.trials] == ["finished"] * 2
    read_mlflow_runs(client)  # asserts that no trial has two runs
    for trial in found.trials:
        assert trial.run is not None
        single = Job.parse(job).with_values({**trial.values, "run.name": "single", "tracking.type": "none"})
        single = single.with_values({"output": trial.name})
        assert read_theta(distmeta.train(single).run) == read_theta(trial.run)


@pytest.mark.slow
def test_population_based_training_can_be_repeated_from_its_job(
    client: Any, workplace: Path, cluster: None
) -> None:
    scheduler = {"type": "pbt", "interval": 2}
    job = Job.parse(make_sweep(run={"steps": 10}, tracked=True, trials=4, scheduler=scheduler))
    found = distmeta.sweep(job)
    assert {trial.status for trial in found.trials} == {"finished"}
    _, children = read_mlflow_runs(client)
    jobs = {trial.name: Job.load(trial.run / "job.yaml") for trial in found.trials if trial.run}
    assert any(len(trial_job.changes) > 1 for trial_job in jobs.values()), "no values have changed"
    for trial in found.trials:
        assert trial.run is not None
        repeated = jobs[trial.name].with_values({"output": "repeated", "tracking.type": "none"})
        run = distmeta.train(repeated).run
        assert read_theta(run) == read_theta(trial.run)
        assert read_losses(run) == read_losses(trial.run)
        for key in RATES:  # the trial's MLflow run has the rates of every step that led to its theta
            history = client.get_metric_history(children[trial.run.name].info.run_id, key)
            logged = {metric.step: metric.value for metric in history}
            assert len(history) == 10
            assert logged == {step + 1: repeated.at(step).value(key) for step in range(10)}
            assert trial.values[key] == logged[10]
    best = distmeta.train(Job.load(found.folder / "sweep" / "best.yaml", ["tracking.type=none"])).run
    assert read_theta(best) == read_theta(found.best_run)


def test_each_history_of_values_has_its_own_folder(workplace: Path) -> None:
    """A trial may continue twice from the same checkpoint of a slower trial, with different values."""
    histories = [
        [{"step": 0, "set": {"outer.lr": 0.02}}, {"step": 2, "set": {"outer.lr": rate}}]
        for rate in (0.01, 0.03, 0.05)
    ]
    trials = workplace / "runs"
    for history, name in zip(histories[:2], ["trial-00001-2", "trial-00001-2-2"], strict=True):
        assert choose_folder(trials, "trial-00001-2", history) == trials / name
        distmeta.train(Job.parse(tree("maml", changes=history, run={"steps": 3, "name": name})))
        assert choose_folder(trials, "trial-00001-2", history) == trials / name, "after a lost worker"
    assert choose_folder(trials, "trial-00001-2", histories[2]) == trials / "trial-00001-2-3"


@pytest.mark.slow
def test_population_survives_a_failed_member(workplace: Path, cluster: None) -> None:
    # with this seed, one draw is so large that no loss is finite
    space = {"algorithm.inner_lr": {"loguniform": [1e-2, 1e24]}}
    job = make_sweep(space=space, trials=4, seed=217, scheduler={"type": "pbt", "interval": 2})
    statuses = [trial.status for trial in distmeta.sweep(Job.parse(job)).trials]
    assert len(statuses) == 4
    assert statuses.count("finished") >= 2
    assert "failed" in statuses


@pytest.mark.slow  # a minute and a half
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_sweep_continues_after_its_driver_was_killed(
    sent: signal.Signals, client: Any, workplace: Path
) -> None:
    """Finished trials are kept, the others continue, and no trial has two MLflow runs. The numbers are the same."""
    settings = {"steps": 150, "eval_every": 10}
    job = Job.parse(make_sweep(run=settings, tracked=True, trials=3, concurrent=1))
    (workplace / "job.yaml").write_text(job.to_yaml())
    folder = workplace / "runs" / "swept"
    command = [sys.executable, "-m", "distmeta.cli.main", "sweep"]
    process = subprocess.Popen([*command, "job.yaml"], stderr=subprocess.PIPE, text=True, cwd=workplace)
    second = folder / "trials" / "trial-00001" / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not (second.exists() and second.read_text().count("val_loss") > 1):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(sent)
    errors = process.communicate(timeout=120)[1]
    if sent == signal.SIGTERM:
        assert process.returncode == 130, errors
        assert f"distmeta sweep --resume {folder}" in errors
    first = folder / "trials" / "trial-00000" / "metrics.jsonl"
    before = first.read_bytes()
    resumed = subprocess.run(
        [*command, "--resume", str(folder), "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=workplace,
    )
    assert resumed.returncode == 0, resumed.stderr
    (line,) = resumed.stdout.splitlines()
    assert json.loads(line)["trials"] == 3
    assert first.read_bytes() == before, "the finished trial was computed again"
    _, children = read_mlflow_runs(client)
    assert sorted(children) == ["trial-00000", "trial-00001", "trial-00002"]
    for row in pq.read_table(folder / "sweep" / "trials.parquet").to_pylist():
        overrides = {key: row[key] for key in RATES}
        single = job.with_values({**overrides, "run.name": "single-" + row["trial"], "tracking.type": "none"})
        assert read_theta(distmeta.train(single).run) == read_theta(Path(row["run"]))
        history = client.get_metric_history(children[row["trial"]].info.run_id, "loss_after")
        assert [metric.step for metric in history] == list(range(1, 151))
        assert children[row["trial"]].info.status == "FINISHED"
    assert parse_yaml((folder / "sweep" / "best.yaml").read_text(), "best")["run"]["steps"] == 150
