"""The MLflow tracker against real MLflow stores: SQLite files in tmp_path, one real server, one closed port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from distmeta.errors import InputError, redact
from distmeta.tracking import background, mlflow, trackers
from distmeta.tracking.interface import StepRecord, TrackedRun
from distmeta.tracking.mlflow import MlflowTracker, flatten_params, import_mlflow, take_batch
from distmeta.tracking.trackers import Trackers, attach_files, open_trackers


@dataclass
class Mlflow:
    """The section of a job that names MLflow."""

    type: str = "mlflow"
    part: Any = MlflowTracker
    options: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give the test an empty working folder and no MLflow variables. The list receives what the tracker reports."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    return []


def start(reported: list[str], run_id: str | None = None, **params: Any) -> Trackers:
    run = TrackedRun(
        name="sinusoid-1",
        folder=Path("runs/sinusoid-1"),
        report=reported.append,
        experiment="few-shot",
        params=params or {"run": {"steps": 3}},
        tags={"distmeta.folder": "runs/sinusoid-1"},
    )
    return open_trackers({"mlflow": Mlflow()}, run, {} if run_id is None else {"mlflow": run_id})


def client() -> Any:
    import_mlflow()  # here too, because the warnings of its first import are errors
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{Path('mlflow.db').absolute()}")


def logged_steps(run_id: str, key: str = "loss_after", store: Any = None) -> list[int]:
    return [metric.step for metric in (store or client()).get_metric_history(run_id, key)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_flatten_params_gives_dotted_names_and_json_texts() -> None:
    model = {"type": "mlp", "hidden": [40, 40]}
    tree = {"seed": 0, "run": {"steps": 3, "shards": None}, "model": model, "x": {}}
    assert flatten_params(tree) == {
        "seed": "0",
        "run.steps": "3",
        "run.shards": "null",
        "model.type": "mlp",
        "model.hidden": "[40, 40]",
        "x": "{}",
    }
    assert len(flatten_params({"a": "y" * 7000})["a"]) == 6000
    assert flatten_params({"a": Path("b"), "q?": True}) == {"a": '"b"', "q_": "true"}


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://me:pw@host:5000/x", "https://host:5000/x"),
        ("https://me:p@/w@host/x", "https://host/x"),
        ("mysql://host/db?user=me&password=pw&ssl=1", "mysql://host/db?user=***&password=***&ssl=1"),
        ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
        ("failed: http://me:pw@h/api (refused)", "failed: http://h/api (refused)"),
    ],
)
def test_redact_removes_credentials(uri: str, shown: str) -> None:
    assert redact(uri) == shown


def test_a_batch_holds_whole_steps_within_the_limit() -> None:
    records = [StepRecord(step, 0.0, dict.fromkeys(map(str, range(300)), 0.0)) for step in range(5)]
    assert [record.step for record in take_batch(records)] == [0, 1, 2]
    assert len(take_batch([StepRecord(0, 0.0, dict.fromkeys(map(str, range(3000)), 0.0))])) == 1


def test_module_imports_without_mlflow_and_torch() -> None:
    code = (
        "import sys, distmeta.tracking.mlflow; sys.exit(any(m in sys.modules for m in ('mlflow', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_metrics_params_tags_artifacts_and_status_arrive(
    reported: list[str], capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    Path("job.yaml").write_text("name: sinusoid")
    Path("best").mkdir()
    Path("best/theta.json").write_text("{}")
    tracking = start(reported, run={"steps": 3}, **{f"p{i}": i for i in range(150)})
    run_id = tracking.ids["mlflow"]
    for step in range(1, 301):  # more metrics than one call takes
        record = {f"m{i}": float(i) for i in range(5)}
        if step % 100 == 0:
            record["val_loss"] = 0.5
        tracking.log_step({"step": step, "loss_after": float(step), "grad_norm": None, **record})
    tracking.log_artifact(Path("job.yaml"))
    tracking.log_artifact(Path("best"), "checkpoints")
    tracking.log_artifact(Path("missing"))
    tracking.close("FINISHED")
    tracking.close("FAILED")  # the first status stands

    store = client()
    run = store.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "sinusoid-1"
    assert run.data.params["run.steps"] == "3"
    assert len(run.data.params) == 151
    assert run.data.tags["distmeta.folder"] == "runs/sinusoid-1"
    assert logged_steps(run_id) == list(range(1, 301))
    assert logged_steps(run_id, "val_loss") == [100, 200, 300]
    assert "grad_norm" not in run.data.metrics
    history = store.get_metric_history(run_id, "m1")
    assert abs(history[0].timestamp - time.time() * 1000) < 120_000
    assert run.info.artifact_uri.startswith(Path("mlartifacts/few-shot").absolute().as_uri())
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    assert (artifacts / "job.yaml").read_text() == "name: sinusoid"
    assert (artifacts / "checkpoints/best/theta.json").exists()
    assert len(reported) == 2  # the missing file, when its turn came and at the end
    assert "missing" in reported[0]
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert [str(warning.message) for warning in recwarn] == []


def test_resume_continues_the_run_and_sends_no_step_twice(reported: list[str]) -> None:
    tracking = start(reported, run={"steps": 3, "workers": 1})
    run_id = tracking.ids["mlflow"]
    for step in range(1, 7):
        tracking.log_step({"step": step, "loss_after": 1.0, "val_loss": 1.0 if step == 3 else None})
    tracking.close("KILLED")
    assert client().get_run(run_id).info.status == "KILLED"

    again = start(reported, run_id, run={"steps": 9, "workers": 1})  # from a checkpoint at step 2
    assert again.ids == {"mlflow": run_id}
    assert client().get_run(run_id).info.status == "RUNNING"
    for step in range(3, 10):
        again.log_step({"step": step, "loss_after": 1.0, "val_loss": 1.0 if step in (3, 7) else None})
    again.close("FINISHED")
    run = client().get_run(run_id)
    assert logged_steps(run_id) == list(range(1, 10))
    assert logged_steps(run_id, "val_loss") == [3, 7]
    assert run.info.status == "FINISHED"
    assert run.data.params["run.steps"] == "3"
    assert run.data.tags["distmeta.resumed.run.steps"] == "9"
    assert reported == []


def run_in_process(code: str) -> subprocess.Popen[str]:
    """Start a Python process that has opened a tracker as `t`."""
    opening = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, TESTS)
from test_mlflow import Mlflow
from distmeta.tracking.interface import TrackedRun
from distmeta.tracking.trackers import open_trackers
run = TrackedRun(name="a", folder=Path(), report=print, experiment="e")
t = open_trackers({"mlflow": Mlflow()}, run, {})
"""
    command = [sys.executable, "-c", opening.replace("TESTS", repr(str(Path(__file__).parent))) + code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_process_that_died_is_continued_without_duplicates(reported: list[str]) -> None:
    process = run_in_process("""
for step in range(1, 9): t.log_step({"step": step, "loss_after": 1.0})
time.sleep(2.5)
print(t.ids["mlflow"], flush=True)
os._exit(9)
""")
    output, errors = process.communicate(timeout=60)
    run_id = output.strip()
    assert process.returncode == 9
    assert errors == ""
    assert logged_steps(run_id) == list(range(1, 9))
    tracking = start(reported, run_id)
    for step in range(6, 11):
        tracking.log_step({"step": step, "loss_after": 1.0})
    tracking.close("FAILED")
    assert logged_steps(run_id) == list(range(1, 11))
    assert client().get_run(run_id).info.status == "FAILED"


@pytest.mark.parametrize("how", ["deleted", "unknown"])
def test_a_missing_run_is_replaced_by_a_new_one(reported: list[str], how: str) -> None:
    old = "0" * 32
    if how == "deleted":
        first = start(reported)
        first.close("FINISHED")
        old = first.ids["mlflow"]
        client().delete_run(old)
    tracking = start(reported, old)
    tracking.log_step({"step": 7, "loss_after": 1.0})
    tracking.close("FINISHED")
    run_id = tracking.ids["mlflow"]
    assert run_id != old
    assert client().get_run(run_id).data.tags["distmeta.resumed_from"] == old
    assert logged_steps(run_id) == [7]
    assert len(reported) == 1
    assert old in reported[0]


def test_mlflow_variables_name_the_experiment(reported: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    tracking = start(reported)
    tracking.close("FINISHED")
    found = client().get_experiment_by_name("mine")
    assert client().get_run(tracking.ids["mlflow"]).info.experiment_id == found.experiment_id
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
    tracking = start(reported)
    tracking.close("FINISHED")
    assert client().get_run(tracking.ids["mlflow"]).info.experiment_id == "0"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "777")
    with pytest.raises(InputError, match=r"MLFLOW_EXPERIMENT_ID: got '777'"):
        start(reported)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    client().delete_experiment(found.experiment_id)
    with pytest.raises(InputError, match=r"MLFLOW_EXPERIMENT_NAME: got 'mine'"):
        start(reported)


@pytest.mark.parametrize(
    "uri", ["file:/tmp/x", "./mlruns", "foo://me:pw@host", "sqlite:////proc/none/mlflow.db"]
)
def test_a_wrong_address_is_an_input_error(
    reported: list[str], monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI") as caught:
        start(reported)
    assert "pw" not in str(caught.value)
    assert reported == []


def test_a_mistake_found_after_the_start_does_not_stop_training(
    reported: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "OPEN_SECONDS", 0.0)
    monkeypatch.setattr(background, "CLOSE_SECONDS", 1.0)
    monkeypatch.setattr(mlflow, "open_client", refuse_slowly)
    tracking = start(reported)
    tracking.log_step({"step": 1, "loss_after": 1.0})
    time.sleep(0.6)
    tracking.close("FINISHED")
    assert len(reported) == 2
    assert "no answer" in reported[0]
    assert "1 steps" in reported[1]
    assert "no such account" in reported[1]


def refuse_slowly(uri: str) -> None:
    time.sleep(0.3)
    raise PermissionError("no such account")


@pytest.mark.slow
def test_two_processes_share_a_new_store_and_experiment(reported: list[str]) -> None:
    code = """
for step in range(1, 51): t.log_step({"step": step, "loss_after": 1.0})
t.close("FINISHED")
print(t.ids["mlflow"])
"""
    both = [run_in_process(code) for _ in range(2)]
    ids = [process.communicate(timeout=90)[0].strip() for process in both]
    assert [logged_steps(run_id) for run_id in ids] == [list(range(1, 51))] * 2


def test_a_refused_step_does_not_hold_up_the_others(reported: list[str]) -> None:
    tracking = start(reported)
    for step in range(1, 4):
        record = {"step": step, "loss_after": 1.0}
        if step == 2:
            record["a/../b"] = 1.0
        tracking.log_step(record)
    tracking.close("FINISHED")
    assert logged_steps(tracking.ids["mlflow"]) == [1, 3]
    assert len(reported) == 2
    assert "step 2 was refused" in reported[0]
    assert "1 steps" in reported[1]


def test_a_server_that_never_answers_costs_training_nothing(
    reported: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(background, "CLOSE_SECONDS", 2.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:pw@127.0.0.1:{free_port()}")
    began = time.monotonic()
    tracking = start(reported, run_id="0" * 32)
    for step in range(1, 20_001):
        tracking.log_step({"step": step, "loss_after": 1.0})
    assert time.monotonic() - began < 10
    assert tracking.ids == {"mlflow": "0" * 32}  # the run that a resume would look for
    began = time.monotonic()
    tracking.close("FINISHED")
    assert time.monotonic() - began < 4
    assert len(reported) == 2
    assert "is away" in reported[0]
    assert "20000 steps" in reported[1]
    assert "pw" not in "".join(reported)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.slow
def test_a_server_that_comes_late_gets_everything(
    reported: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(background, "LONGEST_PAUSE", 1.0)
    tracking = start(reported)
    for step in range(1, 51):
        tracking.log_step({"step": step, "loss_after": 1.0})
    Path("job.yaml").write_text("a: 1")
    tracking.log_artifact(Path("job.yaml"))
    assert tracking.ids == {}
    address = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *address, *store],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 300  # a server starts within seconds on a quiet machine
        while len(reported) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        tracking.log_step({"step": 51, "loss_after": 1.0})
        tracking.close("FINISHED")
        assert len(reported) == 2, reported
        assert "is away" in reported[0]
        assert "answers again" in reported[1]
        from mlflow.tracking import MlflowClient

        remote = MlflowClient(tracking_uri=f"http://127.0.0.1:{port}")
        run_id = tracking.ids["mlflow"]
        assert logged_steps(run_id, store=remote) == list(range(1, 52))
        assert remote.get_run(run_id).info.status == "FINISHED"
        assert [item.path for item in remote.list_artifacts(run_id)] == ["job.yaml"]
    finally:
        os.killpg(server.pid, 9)  # its whole session: the server and its worker
        server.wait(10)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_attaching_files_does_not_wait_long_for_a_store(
    reported: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "ATTACH_SECONDS", 0.2)
    monkeypatch.setattr(mlflow, "open_client", lambda uri: Event().wait(60))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    attach_files({"mlflow": Mlflow()}, {"mlflow": "x"}, [Path("a.png")], "evaluation", reported.append)
    assert reported == ["tracking: a.png not sent to mlflow (it does not answer)"]
