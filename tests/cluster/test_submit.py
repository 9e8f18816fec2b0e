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
from support.outcomes import read_theta
from support.ray_head import find_free_ports, start_ray_head

import distmeta
from distmeta.cluster.jobs_client import LogTail, Submission, connect, follow
from distmeta.cluster.submit import build_entrypoint, select_variables, submit
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
    """Return the dashboard's URL of a Ray cluster with two CPUs."""
    with start_ray_head(cpus=2) as address:
        yield address


def small_job(**changes: Any) -> dict[str, Any]:
    return tree("maml", run={"workers": 1}) | changes


def write_job(job: dict[str, Any], folder: Path = Path()) -> None:
    (folder / "job.yaml").write_text(yaml.safe_dump(job))


def submit_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "distmeta.cli.main", "submit", *arguments]


def test_submitted_job_gives_the_same_bits_as_a_local_one(
    head: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working folder is another one than the current one, and has the user's own module and a secret."""
    project = workplace / "project"
    (project / "nets").mkdir(parents=True)
    (project / "nets" / "tiny.py").write_text(NET)
    (project / ".env").write_text("PASSWORD=hunter2")
    write_job(small_job(model={"type": "nets.tiny:Net"}), project)
    (workplace / "elsewhere").mkdir()
    monkeypatch.chdir(workplace / "elsewhere")
    arguments = ["job.yaml", "run.name=submitted", "--working-dir", "../project", "--address", head, "--json"]
    process = subprocess.run(submit_command(*arguments), capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    answer = json.loads(process.stdout)
    assert set(answer) == {"submission_id", "status"}
    assert answer["status"] == "SUCCEEDED"
    assert answer["submission_id"].startswith("small-")
    for line in ("small: maml on sinusoid, 1 Ray worker", "step 6/6: loss", "done: step 6"):
        assert line in process.stderr
    assert "not packaged, because their names suggest secrets: .env" in process.stderr
    unpacked = list(HOME.glob("submit/*/runtime_resources/working_dir_files/*/*"))
    names = {path.name for path in unpacked}
    assert names >= {"job.yaml", "nets"}
    assert ".env" not in names

    monkeypatch.chdir(project)
    local_run = distmeta.train(Job.load("job.yaml", ["run.workers=0"])).run
    assert read_theta(HOME / "distmeta" / "runs" / "submitted") == read_theta(local_run)


def test_job_continues_after_ctrl_c_and_can_be_stopped_and_resumed(head: str, workplace: Path) -> None:
    write_job(tree("maml"))
    arguments = ["job.yaml", "run.name=long", "run.steps=1000000", "--address", head, "--json"]
    command = submit_command(*arguments)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    shown = ""
    while "step 1/" not in shown:
        line = process.stderr.readline()
        assert line, shown
        shown += line
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    answer = json.loads(out)
    name = answer["submission_id"]
    run = str(HOME / "distmeta" / "runs" / "long")
    assert answer["status"] == "RUNNING"
    for hint in (
        f"ray job logs --follow --address {head} {name}",
        f"ray job stop --address {head} {name}",
        f"distmeta submit job.yaml run.name=long run.steps=1000000 --address {head} --resume {run}",
    ):
        assert hint in err

    client = connect(head)
    assert client.get_job_status(name) == "RUNNING"
    client.stop_job(name)
    pieces: list[str] = []
    stopped = follow(client, Submission(name, head, "RUNNING"), pieces.append)
    assert stopped.status == "STOPPED"
    assert stopped.exit_code == 130
    assert stopped.run == run
    assert "is saved; resume with:" in "".join(pieces)
    step = checkpoints.load(run).progress.step
    assert step > 0

    # a relative run is on the cluster and contains its job
    ended = submit(None, [f"run.steps={step + 3}"], address=head, resume="runs/long")
    assert ended.status == "SUCCEEDED"
    assert ended.exit_code == 0
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, step + 4)]


def test_module_that_the_cluster_lacks_is_a_users_mistake(
    head: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "installed").mkdir()
    (workplace / "installed" / "only_here.py").write_text(NET)
    (workplace / "project").mkdir()
    monkeypatch.chdir(workplace / "project")
    write_job(small_job(model={"type": "only_here:Net"}))
    command = submit_command("job.yaml", "--address", head, "--json")
    environment = os.environ | {"PYTHONPATH": f"{workplace}/installed:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert process.returncode == 2, process.stderr
    answer = json.loads(process.stdout)
    assert "model.type: cannot import 'only_here'" in answer["error"]
    assert answer["status"] == "FAILED"


@pytest.mark.slow
def test_exit_code_is_the_drivers(head: str) -> None:
    client = connect(head)
    expected_codes = {"exit 3": 1, "exit 130": 130, "exec no-such-distmeta": 2}
    names = {line: client.submit_job(entrypoint=line) for line in expected_codes}
    for line, code in expected_codes.items():
        ended = follow(client, Submission(names[line], head, "PENDING"), lambda text: None)
        assert ended.exit_code == code, (line, ended)
        assert ended.status == "FAILED"
        assert ended.message
        assert ("no `distmeta` on the PATH" in ended.message) == line.startswith("exec")


def test_wrong_token_is_one_line(head: str, workplace: Path) -> None:
    write_job(small_job())
    command = submit_command("job.yaml", "--address", head, "--json")
    environment = os.environ | {"RAY_AUTH_TOKEN": "0" * 32}
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert process.returncode == 2
    error = json.loads(process.stdout)["error"]
    assert "refuses the token, expected the cluster's: RAY_AUTH_MODE=token" in error
    assert os.environ["RAY_AUTH_TOKEN"] not in process.stdout + process.stderr


def test_address_without_a_listener_is_refused(workplace: Path) -> None:
    write_job(small_job())
    started = time.monotonic()
    with pytest.raises(InputError, match=r"--address: nothing answers at http://127.0.0.1:\d+ "):
        submit("job.yaml", address=f"http://127.0.0.1:{find_free_ports(1)[0]}")
    assert time.monotonic() - started < 30


def test_address_that_is_not_a_url_is_refused(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_job(small_job())
    with pytest.raises(InputError, match=r"--address: got 'HEAD:6379', expected the URL of Ray's dashboard"):
        submit("job.yaml", address="HEAD:6379")
    monkeypatch.setenv("RAY_ADDRESS", "http://me:hunter2@[")
    with pytest.raises(InputError, match="RAY_ADDRESS: got ") as caught:
        submit("job.yaml")
    assert "hunter2" not in str(caught.value)


def test_address_of_another_server_is_refused(workplace: Path) -> None:
    write_job(small_job())
    started = time.monotonic()
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(InputError, match=r"--address: .* does not answer as Ray's dashboard"):
            submit("job.yaml", address=f"http://127.0.0.1:{other.server_port}")
        other.shutdown()
    assert time.monotonic() - started < 30
    assert os.environ.get("RAY_API_SERVER_ADDRESS") is None


def test_wrong_job_is_refused_before_connecting(workplace: Path) -> None:
    write_job(small_job())
    (workplace / "empty").mkdir()
    with pytest.raises(InputError, match=r"JOB: got 'job.yaml', which is outside the working folder"):
        submit("job.yaml", working_dir="empty")
    with pytest.raises(InputError, match=r"nowhere.yaml: cannot be read"):
        submit("nowhere.yaml")
    with pytest.raises(InputError, match=r"run.stepz: unknown key"):
        submit("job.yaml", ["run.stepz=3"])
    with pytest.raises(InputError, match=r"^JOB: missing"):
        submit(None, resume="auto")


def test_job_with_credentials_is_refused(workplace: Path) -> None:
    write_job(small_job())
    with pytest.raises(InputError, match=r"output: has credentials") as caught:
        submit("job.yaml", ["output=s3://me:hunter2@bucket/runs"])
    assert "hunter2" not in str(caught.value)


def test_relative_paths_in_the_entrypoint_are_below_root() -> None:
    job = Job.parse(small_job(output="my runs"))
    line = build_entrypoint("a b.yaml", ["run.steps=3", "name=x y"], job, "runs/x", sweep=False)
    assert line.endswith(
        "exec distmeta train 'a b.yaml' run.steps=3 'name=x y' output=\"$root\"/'my runs' --resume \"$root\"/runs/x"
    )


def test_absolute_paths_in_the_entrypoint_stay() -> None:
    run = {**small_job()["run"], "address": "other:6379"}
    job = Job.parse(small_job(output="/shared/runs", run=run))
    line = build_entrypoint("job.yaml", [], job, "auto", sweep=True)
    assert line.endswith("exec distmeta sweep job.yaml run.address=null --resume auto")


def test_the_default_mlflow_store_outlives_the_job() -> None:
    line = build_entrypoint("job.yaml", [], Job.parse(small_job()), None)
    assert '; export MLFLOW_TRACKING_URI="${MLFLOW_TRACKING_URI:-sqlite:///$root/mlflow.db}"; exec ' in line


def test_wandb_variables_are_sent_except_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    messages: list[str] = []
    variables = select_variables(Job.parse(small_job()), messages.append)
    assert variables["WANDB_PROJECT"] == "mine"
    assert "WANDB_API_KEY is a secret" in "".join(messages)
    assert "hunter2" not in "".join(messages) + str(variables)


def test_mlflow_variables_are_sent_except_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    messages: list[str] = []
    variables = select_variables(None, messages.append)
    assert variables["MLFLOW_EXPERIMENT_NAME"] == "mine"
    assert variables["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert "MLFLOW_TRACKING_PASSWORD is a secret" in "".join(messages)
    assert "hunter2" not in "".join(messages) + str(variables)


@pytest.mark.parametrize(
    ("uri", "is_sent"),
    [
        ("http://me:hunter2@mlflow", False),
        ("sqlite:///mlflow.db", False),
        ("file:mlruns", False),
        ("mlruns", False),
        ("/shared/mlruns", True),
        ("sqlite:////shared/mlflow.db", True),
        ("file:///shared/mlruns", True),
        ("databricks", True),
        ("databricks://me", True),
    ],
)
def test_tracking_uri_is_sent_if_the_cluster_can_use_it(
    uri: str, is_sent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    messages: list[str] = []
    variables = select_variables(None, messages.append)
    assert ("MLFLOW_TRACKING_URI" in variables) == is_sent
    assert "hunter2" not in "".join(messages) + str(variables)


def test_log_is_shown_once_if_its_connection_breaks() -> None:
    shown: list[str] = []
    tail = LogTail(shown.append)
    log = "starting\nrun folder /x/runs/a\nstep 1\nerror: it broke\n"
    for pieces in ([log[:12]], [log[:5], log[5:30]], [log]):
        position = 0
        for piece in pieces:
            position = tail.add(position, piece)
    assert "".join(shown) == log
    assert tail.run == "/x/runs/a"
    assert tail.error == "it broke"


@pytest.mark.slow
def test_sweep_is_submitted(head: str, workplace: Path) -> None:
    sweep = {"space": {"outer.lr": {"loguniform": [1e-3, 1e-1]}}, "trials": 2}
    settings = {"steps": 2, "eval_every": 1, "eval_tasks": 5, "name": "searched"}
    write_job(tree("maml", run=settings, sweep=sweep))
    pieces: list[str] = []
    ended = submit("job.yaml", address=head, sweep=True, show=pieces.append)
    assert ended.exit_code == 0, "".join(pieces)
    (best,) = (HOME / "distmeta" / "runs").glob("searched*/sweep/best.yaml")
    expected = f"distmeta submit job.yaml --sweep --address {head} --resume {best.parents[1]}"
    assert ended.resume_command == expected
    assert 1e-3 <= Job.load(best).outer.lr <= 1e-1
