"""`distmeta submit` against a real Ray head with its dashboard."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import HOME, tree
from heads import free_ports, head_with_dashboard

import distmeta
from distmeta.cluster.jobs_client import Submission, Tail, connect, follow
from distmeta.cluster.submit import entrypoint, submit
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints

NET = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self, in_shape, out_features, width=8):
        super().__init__(nn.Linear(in_shape[0], width), nn.Tanh(), nn.Linear(width, out_features))
"""


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    with head_with_dashboard(cpus=2) as address:
        yield address


def small(**changes: Any) -> dict[str, Any]:
    return tree("maml", run={"workers": 1}) | changes


def words(*more: str) -> list[str]:
    return [sys.executable, "-m", "distmeta.cli.main", "submit", *more]


def theta_of(run: str | Path) -> dict[str, Any]:
    return checkpoints.load(run).theta


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_own_module_in_another_folder_gives_the_same_bits(
    head: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = workplace / "project"
    (project / "nets").mkdir(parents=True)
    (project / "nets" / "tiny.py").write_text(NET)
    (project / "job.yaml").write_text(yaml.safe_dump(small(model={"type": "nets.tiny:Net"})))
    (project / ".env").write_text("PASSWORD=hunter2")
    (workplace / "elsewhere").mkdir()
    monkeypatch.chdir(workplace / "elsewhere")
    given = ["job.yaml", "run.name=submitted", "--working-dir", "../project", "--address", head, "--json"]
    done = subprocess.run(words(*given), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout)
    assert set(last) == {"submission_id", "status"}
    assert last["status"] == "SUCCEEDED"
    assert last["submission_id"].startswith("small-")
    for line in ("small: maml on sinusoid, 1 Ray worker", "step 6/6: loss", "done: step 6"):
        assert line in done.stderr
    assert "not packaged, since their names are those of secrets: .env" in done.stderr
    unpacked = list(HOME.glob("submit/*/runtime_resources/working_dir_files/*/*"))
    assert {path.name for path in unpacked} >= {"job.yaml", "nets"}
    assert not [path for path in unpacked if path.name == ".env"]

    monkeypatch.chdir(project)
    alone = distmeta.train(Job.load("job.yaml", ["run.workers=0"])).run
    assert equal(theta_of(HOME / "distmeta" / "runs" / "submitted"), theta_of(alone))


def test_left_stopped_and_resumed(head: str, workplace: Path) -> None:
    (workplace / "job.yaml").write_text(yaml.safe_dump(tree("maml")))
    given = ["job.yaml", "run.name=long", "run.steps=1000000", "--address", head, "--json"]
    process = subprocess.Popen(words(*given), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    shown = ""
    while "step 1/" not in shown:
        line = process.stderr.readline()
        assert line, shown
        shown += line
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate(timeout=30)
    assert process.returncode == 130
    last = json.loads(out)
    run, name = str(HOME / "distmeta" / "runs" / "long"), last["submission_id"]
    assert last["status"] == "RUNNING"
    for hint in (f"ray job logs --follow --address {head} {name}", f"ray job stop --address {head} {name}"):
        assert hint in rest
    assert f"distmeta submit job.yaml run.name=long run.steps=1000000 --address {head} --resume {run}" in rest

    client = connect(head)
    assert client.get_job_status(name) == "RUNNING"
    client.stop_job(name)
    pieces: list[str] = []
    stopped = follow(client, Submission(name, head, "RUNNING"), pieces.append)
    assert (stopped.status, stopped.exit_code, stopped.run) == ("STOPPED", 130, run)
    assert "is saved; go on with:" in "".join(pieces)
    step = checkpoints.load(run).progress.step
    assert step > 0

    # a relative run is one of the cluster's, and brings its job
    ended = submit(None, [f"run.steps={step + 3}"], address=head, resume="runs/long")
    assert (ended.status, ended.exit_code) == ("SUCCEEDED", 0)
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, step + 4)]


def test_a_module_that_the_cluster_lacks_is_the_users_mistake(
    head: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "installed").mkdir()
    (workplace / "installed" / "only_here.py").write_text(NET)
    (workplace / "project").mkdir()
    monkeypatch.chdir(workplace / "project")
    Path("job.yaml").write_text(yaml.safe_dump(small(model={"type": "only_here:Net"})))
    paths = f"{workplace}/installed:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        words("job.yaml", "--address", head, "--json"),
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    last = json.loads(done.stdout)
    assert "model.type: cannot import 'only_here'" in last["error"]
    assert last["status"] == "FAILED"


@pytest.mark.slow
def test_how_a_driver_ends_is_how_submit_ends(head: str) -> None:
    client = connect(head)
    lines = {"exit 3": 1, "exit 130": 130, "exec no-such-distmeta": 2}
    names = {line: client.submit_job(entrypoint=line) for line in lines}
    for line, code in lines.items():
        ended = follow(client, Submission(names[line], head, "PENDING"), lambda text: None)
        assert ended.exit_code == code, (line, ended)
        assert ended.status == "FAILED"
        assert ended.message
        assert ("no `distmeta` on the PATH" in ended.message) == line.startswith("exec")


def test_a_wrong_token_is_one_line(head: str, workplace: Path) -> None:
    (workplace / "job.yaml").write_text(yaml.safe_dump(small()))
    environment = os.environ | {"RAY_AUTH_TOKEN": "0" * 32}
    done = subprocess.run(
        words("job.yaml", "--address", head, "--json"), capture_output=True, text=True, timeout=60, env=environment
    )  # fmt: skip
    assert done.returncode == 2
    assert (
        "refuses the token, expected the cluster's: RAY_AUTH_MODE=token" in json.loads(done.stdout)["error"]
    )
    assert os.environ["RAY_AUTH_TOKEN"] not in done.stdout + done.stderr


def test_an_address_that_is_no_dashboard_is_one_line(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "job.yaml").write_text(yaml.safe_dump(small()))
    began = time.monotonic()
    with pytest.raises(InputError, match=r"--address: nothing answers at http://127.0.0.1:\d+ "):
        submit("job.yaml", address=f"http://127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(InputError, match=r"--address: got 'HEAD:6379', expected the URL of Ray's dashboard"):
        submit("job.yaml", address="HEAD:6379")
    monkeypatch.setenv("RAY_ADDRESS", "http://me:hunter2@[")
    with pytest.raises(InputError, match="RAY_ADDRESS: got ") as caught:
        submit("job.yaml")
    assert "hunter2" not in str(caught.value)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(InputError, match=r"--address: .* does not answer as Ray's dashboard"):
            submit("job.yaml", address=f"http://127.0.0.1:{other.server_port}")
        other.shutdown()
    assert time.monotonic() - began < 30
    assert os.environ.get("RAY_API_SERVER_ADDRESS") is None


def test_a_job_elsewhere_or_with_credentials_is_one_line(workplace: Path) -> None:
    (workplace / "job.yaml").write_text(yaml.safe_dump(small()))
    (workplace / "empty").mkdir()
    with pytest.raises(InputError, match=r"JOB: got 'job.yaml', which is outside the working folder"):
        submit("job.yaml", working_dir="empty")
    with pytest.raises(InputError, match=r"nowhere.yaml: cannot be read"):
        submit("nowhere.yaml")
    with pytest.raises(InputError, match=r"run.stepz: unknown key"):
        submit("job.yaml", ["run.stepz=3"])
    with pytest.raises(InputError, match=r"^JOB: missing"):
        submit(None, resume="auto")
    with pytest.raises(InputError, match=r"output: has credentials") as caught:
        submit("job.yaml", ["output=s3://me:hunter2@bucket/runs"])
    assert "hunter2" not in str(caught.value)


def test_the_drivers_command_line(workplace: Path) -> None:
    job = Job.parse(small(output="my runs"))
    line = entrypoint("a b.yaml", ["run.steps=3", "name=x y"], job, "runs/x", sweep=False)
    assert line.endswith("exec distmeta train 'a b.yaml' run.steps=3 'name=x y' output=\"$root\"/'my runs' "
                         '--resume "$root"/runs/x')  # fmt: skip
    kept = Job.parse(small(output="/shared/runs", run={**small()["run"], "address": "other:6379"}))
    line = entrypoint("job.yaml", [], kept, "auto", sweep=True)
    assert line.endswith("exec distmeta sweep job.yaml run.address=null --resume auto")


def test_mlflows_variables_go_along_and_its_secrets_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    from distmeta.cluster.submit import _variables

    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    said: list[str] = []
    carried = _variables(said.append)
    assert carried["MLFLOW_EXPERIMENT_NAME"] == "mine"
    assert carried["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert "MLFLOW_TRACKING_PASSWORD is a secret" in "".join(said)
    for uri, goes in (("http://me:hunter2@mlflow", False), ("sqlite:///mlflow.db", False), ("file:mlruns", False),
                      ("mlruns", False), ("/shared/mlruns", True), ("sqlite:////shared/mlflow.db", True),
                      ("file:///shared/mlruns", True), ("databricks", True), ("databricks://me", True)):  # fmt: skip
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert ("MLFLOW_TRACKING_URI" in _variables(said.append)) == goes, uri
    assert "hunter2" not in "".join(said) + str(carried)


def test_a_log_is_shown_once_however_often_its_connection_breaks() -> None:
    shown: list[str] = []
    tail = Tail(shown.append)
    log = "starting\nrun folder /x/runs/a\nstep 1\nerror: it broke\n"
    for pieces in ([log[:12]], [log[:5], log[5:30]], [log]):
        position = 0
        for piece in pieces:
            position = tail.take(position, piece)
    assert "".join(shown) == log
    assert (tail.run, tail.error) == ("/x/runs/a", "it broke")


@pytest.mark.slow
def test_a_sweep_is_submitted_too(head: str, workplace: Path) -> None:
    sweep = {"space": {"outer.lr": {"loguniform": [1e-3, 1e-1]}}, "trials": 2}
    settings = {"steps": 2, "eval_every": 1, "eval_tasks": 5, "name": "searched"}
    (workplace / "job.yaml").write_text(yaml.safe_dump(tree("maml", run=settings, sweep=sweep)))
    pieces: list[str] = []
    ended = submit("job.yaml", address=head, sweep=True, show=pieces.append)
    assert ended.exit_code == 0, "".join(pieces)
    (best,) = (HOME / "distmeta" / "runs").glob("searched*/sweep/best.yaml")
    assert ended.to_resume == f"distmeta submit job.yaml --sweep --address {head} --resume {best.parents[1]}"
    assert 1e-3 <= Job.load(best).outer.lr <= 1e-1
