"""The tracker against real MLflow stores: SQLite files in tmp_path, one real server, one closed port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest

from distmeta.errors import InputError, redact
from distmeta.tracking import mlflow as tracking
from distmeta.tracking.mlflow import Step, first_batch, open_tracker, points
from distmeta.tracking.mlflow_store import flatten, import_mlflow


@pytest.fixture
def said(tmp_path, monkeypatch):
    """A working folder of its own, a clean environment, and what the tracker says."""
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    return []


def start(said, run_id=None, experiment="few-shot", **params):
    return open_tracker(
        "mlflow",
        run_name="sinusoid-1",
        experiment=experiment,
        params=params or {"run": {"steps": 3}},
        tags={"distmeta.folder": "runs/sinusoid-1"},
        run_id=run_id,
        say=said.append,
    )


def client():
    import_mlflow()  # here too, for the warnings of its first import are errors
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{Path('mlflow.db').absolute()}")


def steps_of(run_id, key="loss_after", store=None):
    return [metric.step for metric in (store or client()).get_metric_history(run_id, key)]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_flatten_gives_dotted_names_and_json_texts():
    model = {"type": "mlp", "hidden": [40, 40]}
    assert flatten({"seed": 0, "run": {"steps": 3, "shards": None}, "model": model, "x": {}}) == {
        "seed": "0",
        "run.steps": "3",
        "run.shards": "null",
        "model.type": "mlp",
        "model.hidden": "[40, 40]",
        "x": "{}",
    }
    assert len(flatten({"a": "y" * 7000})["a"]) == 6000
    assert flatten({"a": Path("b"), "q?": True}) == {"a": '"b"', "q_": "true"}


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
def test_redact_removes_credentials(uri, shown):
    assert redact(uri) == shown


def test_points_skip_by_name_what_was_sent():
    step = Step(200, 0, {"step": 200, "loss_after": 1.0, "val_loss": 2.0, "grad_norm": None})
    assert points(step, {}) == [("loss_after", 1.0), ("val_loss", 2.0)]
    assert points(step, {"loss_after": 200, "val_loss": 100}) == [("val_loss", 2.0)]


def test_a_batch_holds_whole_steps_within_the_limit():
    steps = deque(Step(i, 0, dict.fromkeys(map(str, range(300)), 0.0)) for i in range(5))
    assert [step.step for step in first_batch(steps)] == [0, 1, 2]
    assert len(first_batch(deque([Step(0, 0, dict.fromkeys(map(str, range(3000)), 0.0))]))) == 1


def test_the_module_imports_without_mlflow_and_torch():
    code = (
        "import sys, distmeta.tracking.mlflow; sys.exit(any(m in sys.modules for m in ('mlflow', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_none_does_nothing(said):
    tracker = open_tracker(
        "none", run_name="a", experiment="b", params={}, tags={}, run_id=None, say=said.append
    )
    tracker.log_step({"step": 0, "loss_after": 1.0})
    tracker.log_artifact(Path("missing"))
    tracker.close("FINISHED")
    assert tracker.run_id is None
    assert said == []
    assert list(Path().iterdir()) == []


def test_metrics_params_tags_artifacts_and_status_arrive(said, capfd, recwarn):
    Path("job.yaml").write_text("name: sinusoid")
    Path("best").mkdir()
    Path("best/theta.json").write_text("{}")
    tracker = start(said, run={"steps": 3}, **{f"p{i}": i for i in range(150)})
    assert tracker.run_id is not None
    for step in range(300):  # more metrics than one call takes
        extra = {"val_loss": 0.5} if step % 100 == 0 else {}
        record = {f"m{i}": float(i) for i in range(5)}
        tracker.log_step({"step": step, "loss_after": float(step), "grad_norm": None, **record, **extra})
    tracker.log_artifact(Path("job.yaml"))
    tracker.log_artifact(Path("best"), "checkpoints")
    tracker.log_artifact(Path("missing"))
    tracker.close("FINISHED")
    tracker.close("FAILED")  # the first stands

    store = client()
    run = store.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "sinusoid-1"
    assert run.data.params["run.steps"] == "3"
    assert len(run.data.params) == 151
    assert run.data.tags["distmeta.folder"] == "runs/sinusoid-1"
    assert steps_of(tracker.run_id) == list(range(300))
    assert steps_of(tracker.run_id, "val_loss") == [0, 100, 200]
    assert "grad_norm" not in run.data.metrics
    history = store.get_metric_history(tracker.run_id, "m1")
    assert abs(history[0].timestamp - time.time() * 1000) < 120_000
    assert run.info.artifact_uri.startswith(Path("mlartifacts/few-shot").absolute().as_uri())
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    assert (artifacts / "job.yaml").read_text() == "name: sinusoid"
    assert (artifacts / "checkpoints/best/theta.json").exists()
    assert len(said) == 2  # the file that was missing, when it was and at the end
    assert "missing" in said[0]
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert [str(w.message) for w in recwarn] == []


def test_resume_continues_the_run_and_sends_no_step_twice(said):
    tracker = start(said, run={"steps": 3, "workers": 1})
    for step in range(6):
        tracker.log_step({"step": step, "loss_after": 1.0, "val_loss": 1.0 if step == 3 else None})
    tracker.close("KILLED")
    assert client().get_run(tracker.run_id).info.status == "KILLED"

    again = start(said, tracker.run_id, run={"steps": 9, "workers": 1})  # from a checkpoint at step 2
    assert again.run_id == tracker.run_id
    assert client().get_run(again.run_id).info.status == "RUNNING"
    for step in range(2, 9):
        again.log_step({"step": step, "loss_after": 1.0, "val_loss": 1.0 if step in (3, 6) else None})
    again.close("FINISHED")
    run = client().get_run(tracker.run_id)
    assert steps_of(tracker.run_id) == list(range(9))
    assert steps_of(tracker.run_id, "val_loss") == [3, 6]
    assert run.info.status == "FINISHED"
    assert run.data.params["run.steps"] == "3"
    assert run.data.tags["distmeta.resumed.run.steps"] == "9"
    assert said == []


def test_a_process_that_died_is_continued_without_duplicates(said):
    code = """
import os, time
from distmeta.tracking.mlflow import open_tracker
t = open_tracker("mlflow", run_name="a", experiment="e", params={}, tags={}, run_id=None, say=print)
for step in range(8): t.log_step({"step": step, "loss_after": 1.0})
time.sleep(2.5)
print(t.run_id, flush=True)
os._exit(9)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    run_id = done.stdout.strip()
    assert done.returncode == 9
    assert done.stderr == ""
    assert steps_of(run_id) == list(range(8))
    tracker = start(said, run_id)
    for step in range(5, 10):
        tracker.log_step({"step": step, "loss_after": 1.0})
    tracker.close("FAILED")
    assert steps_of(run_id) == list(range(10))
    assert client().get_run(run_id).info.status == "FAILED"


@pytest.mark.parametrize("how", ["deleted", "unknown"])
def test_a_run_that_is_gone_is_replaced(said, how):
    old = "0" * 32
    if how == "deleted":
        first = start(said)
        first.close("FINISHED")
        old = first.run_id
        client().delete_run(old)
    tracker = start(said, old)
    tracker.log_step({"step": 7, "loss_after": 1.0})
    tracker.close("FINISHED")
    assert tracker.run_id not in (None, old)
    assert client().get_run(tracker.run_id).data.tags["distmeta.resumed_from"] == old
    assert steps_of(tracker.run_id) == [7]
    assert len(said) == 1
    assert old in said[0]


def test_mlflows_own_variables_name_the_experiment(said, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    tracker = start(said)
    tracker.close("FINISHED")
    found = client().get_experiment_by_name("mine")
    assert client().get_run(tracker.run_id).info.experiment_id == found.experiment_id
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
    tracker = start(said)
    tracker.close("FINISHED")
    assert client().get_run(tracker.run_id).info.experiment_id == "0"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "777")
    with pytest.raises(InputError, match=r"MLFLOW_EXPERIMENT_ID: got '777'"):
        start(said)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    client().delete_experiment(found.experiment_id)
    with pytest.raises(InputError, match=r"MLFLOW_EXPERIMENT_NAME: got 'mine'"):
        start(said)


@pytest.mark.parametrize(
    "uri", ["file:/tmp/x", "./mlruns", "foo://me:pw@host", "sqlite:////proc/none/mlflow.db"]
)
def test_a_wrong_address_is_the_users_mistake(said, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI") as caught:
        start(said)
    assert "pw" not in str(caught.value)
    assert said == []


def test_a_mistake_that_shows_too_late_does_not_stop_training(said, monkeypatch):
    monkeypatch.setattr(tracking, "OPEN_SECONDS", 0.0)
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 1.0)
    monkeypatch.setattr(tracking, "open_client", refuse_slowly)
    tracker = start(said)
    tracker.log_step({"step": 0, "loss_after": 1.0})
    time.sleep(0.6)
    tracker.close("FINISHED")
    assert len(said) == 2
    assert "no answer" in said[0]
    assert "1 steps" in said[1]
    assert "no such account" in said[1]


def refuse_slowly(uri):
    time.sleep(0.3)
    raise PermissionError("no such account")


def test_two_processes_share_a_new_store_and_experiment(said):
    code = """
from distmeta.tracking.mlflow import open_tracker
t = open_tracker("mlflow", run_name="a", experiment="e", params={}, tags={}, run_id=None, say=print)
for step in range(50): t.log_step({"step": step, "loss_after": 1.0})
t.close("FINISHED")
print(t.run_id)
"""
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ids = [process.communicate(timeout=90)[0].strip() for process in both]
    assert [steps_of(run_id) for run_id in ids] == [list(range(50))] * 2


def test_a_refused_step_does_not_hold_up_the_others(said):
    tracker = start(said)
    for step in range(3):
        tracker.log_step({"step": step, "loss_after": 1.0, **({"a/../b": 1.0} if step == 1 else {})})
    tracker.close("FINISHED")
    assert steps_of(tracker.run_id) == [0, 2]
    assert len(said) == 2
    assert "step 1 was refused" in said[0]
    assert "1 steps" in said[1]


def test_a_server_that_never_comes_costs_training_nothing(said, monkeypatch, capfd):
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 2.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:pw@127.0.0.1:{free_port()}")
    began = time.monotonic()
    tracker = start(said, run_id="0" * 32)
    for step in range(20_000):
        tracker.log_step({"step": step, "loss_after": 1.0})
    assert time.monotonic() - began < 10
    assert tracker.run_id == "0" * 32  # as far as anyone knows
    began = time.monotonic()
    tracker.close("FINISHED")
    assert time.monotonic() - began < 4
    assert len(said) == 2
    assert "is away" in said[0]
    assert "20000 steps" in said[1]
    assert "pw" not in "".join(said)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_server_that_comes_late_gets_everything(said, monkeypatch, tmp_path, capfd):
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(tracking, "LONGEST_BACKOFF", 1.0)
    tracker = start(said)
    for step in range(50):
        tracker.log_step({"step": step, "loss_after": 1.0})
    Path("job.yaml").write_text("a: 1")
    tracker.log_artifact(Path("job.yaml"))
    assert tracker.run_id is None
    where = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    command = [sys.executable, "-m", "mlflow", "server", *where, *store]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    server = subprocess.Popen(command, **quiet)
    try:
        deadline = time.monotonic() + 90
        while len(said) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        tracker.log_step({"step": 50, "loss_after": 1.0})
        tracker.close("FINISHED")
        assert len(said) == 2, said
        assert "is away" in said[0]
        assert "answers again" in said[1]
        from mlflow.tracking import MlflowClient

        remote = MlflowClient(tracking_uri=f"http://127.0.0.1:{port}")
        assert steps_of(tracker.run_id, store=remote) == list(range(51))
        assert remote.get_run(tracker.run_id).info.status == "FINISHED"
        assert [item.path for item in remote.list_artifacts(tracker.run_id)] == ["job.yaml"]
    finally:
        os.killpg(server.pid, 9)  # its own session: the server and its worker
        server.wait(10)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
