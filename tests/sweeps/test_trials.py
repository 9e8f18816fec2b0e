"""What becomes of trials: failed, killed, perturbed, their driver killed. A file apart, since a file is a process."""

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
from sweeping import RATES, bits, evaluations, runs_of, swept

import distmeta
from distmeta.config.job import Job
from distmeta.config.yaml_text import parse_yaml
from distmeta.sweeps.run import NoView
from distmeta.sweeps.trial import folder_of


@pytest.mark.slow  # two trials; a failed one alone: test_all_trials_failed
def test_one_failed_trial_is_marked_and_the_sweep_goes_on(
    client: Any, workplace: Path, cluster: None
) -> None:
    space = {"algorithm.inner_lr": {"grid": [1e30, 0.05]}}
    found = distmeta.sweep(Job.parse(swept(tracked=True, space=space, trials=1)))
    assert [trial.status for trial in found.trials] == ["failed", "finished"]
    assert found.trials[0].reason == "NumericsError: val_loss_after is not finite at step 2"
    table = pq.read_table(found.folder / "sweep" / "trials.parquet").to_pylist()
    assert table[0]["reason"] == found.trials[0].reason
    assert table[0]["value"] is None
    _, children = runs_of(client)
    assert [children[f"trial-0000{i}"].info.status for i in range(2)] == ["FAILED", "FINISHED"]
    assert children["trial-00000"].data.tags["distmeta.reason"] == found.trials[0].reason
    assert children["trial-00001"].data.tags["distmeta.trial"] == "finished"


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


@pytest.mark.slow
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


def test_each_history_of_values_has_a_run_of_its_own(workplace: Path) -> None:
    """A trial that goes on from the same checkpoint of a slower one twice, with other values."""
    histories = [
        [{"step": 0, "set": {"outer.lr": 0.02}}, {"step": 2, "set": {"outer.lr": rate}}]
        for rate in (0.01, 0.03, 0.05)
    ]
    trials = workplace / "runs"
    for history, name in zip(histories[:2], ["trial-00001-2", "trial-00001-2-2"], strict=True):
        assert folder_of(trials, "trial-00001-2", history) == trials / name
        distmeta.train(Job.parse(tree("maml", changes=history, run={"steps": 3, "name": name})))
        assert folder_of(trials, "trial-00001-2", history) == trials / name, "after a lost worker"
    assert folder_of(trials, "trial-00001-2", histories[2]) == trials / "trial-00001-2-3"


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


@pytest.mark.slow  # a minute and a half
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_driver_is_killed_and_the_sweep_goes_on(
    how: signal.Signals, client: Any, workplace: Path
) -> None:
    """Finished trials are kept, the others go on, no trial has two MLflow runs; the numbers are an unharmed sweep's."""
    job = Job.parse(swept(run={"steps": 150, "eval_every": 10}, tracked=True, trials=3, concurrent=1))
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
