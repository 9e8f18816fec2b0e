"""The commands: exit codes, what goes to stdout and what to stderr, and that wrong input writes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from conftest import tree
from PIL import Image

from distmeta.cli import main as cli
from distmeta.runtime import training
from distmeta.runtime.interruption import InterruptedRun


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """Return the one line of stdout. It must be strict JSON."""
        assert self.out.count("\n") == 1, self.out

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is not JSON")

        return json.loads(self.out, parse_constant=refuse)


@pytest.fixture
def distmeta(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workplace: Path) -> Any:
    """Return a function that runs the command line in this process, in an empty folder."""

    def run_command(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["distmeta", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert isinstance(stop.value.code, int)
        return Outcome(stop.value.code, *capsys.readouterr())

    return run_command


def write_job(name: str = "job.yaml", **changes: Any) -> Path:
    path = Path(name)
    path.write_text(yaml.safe_dump(tree(**changes)))
    return path


def one_line_error(outcome: Outcome, code: int = 2) -> str:
    """Check that the command printed nothing except one line of an error, and return the line."""
    assert outcome.code == code
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert len(outcome.err.splitlines()) == 1
    return outcome.err.removeprefix("error: ").strip()


def test_train_prints_the_run_folder(distmeta: Any) -> None:
    outcome = distmeta("train", write_job(), "run.steps=3", "run.eval_every=3", "run.eval_tasks=4")
    assert outcome.code == 0
    run = Path(outcome.out.strip())
    assert outcome.out == f"{run}\n"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert f"run folder {run}" in outcome.err
    assert "step 3 validation: loss" in outcome.err
    assert "done: step 3, loss " in outcome.err
    assert f"next: distmeta evaluate {run}/checkpoints/best" in outcome.err


def test_train_with_json_and_resume(distmeta: Any) -> None:
    outcome = distmeta("train", write_job(), "--json", "run.name=mine", "run.steps=2")
    assert outcome.code == 0
    answer = outcome.json()
    rows = [json.loads(line) for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    assert list(answer) == ["run", "step", "loss"]
    assert answer == {"run": "runs/mine", "step": 2, "loss": rows[-1]["loss_after"]}
    assert "step 2/2" in outcome.err

    longer = distmeta("train", "--resume", "runs/mine", "run.steps=4", "--json").json()
    assert longer["run"] == "runs/mine"
    assert longer["step"] == 4
    again = distmeta("train", "job.yaml", "run.name=mine", "run.steps=4", "--resume", "auto", "--json")
    assert again.json() == longer
    assert "nothing to do" in distmeta("train", "--resume", "runs/mine").err

    refused = distmeta("train", "job.yaml", "run.name=mine", "--json")
    assert refused.code == 2
    assert "exists already" in refused.json()["error"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train"], "JOB: missing, expected a job file"),
        (["train", "--resume", "auto"], "JOB: missing, expected a job file"),
        (["train", "--resume", "nowhere"], "nowhere: got no checkpoint"),
        (["train", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["train", "job.yaml", "run.stepz=3"], "job.yaml: run.stepz: unknown key; did you mean 'steps'?"),
        (["train", "job.yaml", "run.steps=x"], "job.yaml: run.steps: got 'x', expected integer"),
        (["train", "job.yaml", "steps"], "job.yaml: override: got 'steps', expected key=value"),
        (["train", "job.yaml", "model.freeze=x*"], "model.freeze: got 'x*', which matches no parameter"),
        (["train", "job.yaml", "outer.groups={x: {lr: 1.0}}"], "outer.groups: 'x' matches nothing of theta"),
        (["train", "job.yaml", "run.gpus_per_worker=1"], "run.gpus_per_worker: got 1, but torch sees no GPU"),
        (["train", "job.yaml", "--resume", "auto"], "--resume auto: run.name is not set"),
        (["train", "job.yaml", "--fast"], "No such option: --fast"),
        (["sweep"], "JOB: missing, expected a job file"),
        (["submit"], "JOB: missing, expected a job file"),
        (["evaluate"], "Missing argument 'RUN_OR_CHECKPOINT'"),
        (["evaluate", "nowhere"], "nowhere: got no checkpoint"),
        (["check"], "Missing argument 'JOB"),
        (["check", "run.steps=3"], "JOB: missing, expected at least one job file"),
        (["check", "other.yaml", "job.yaml"], "other.yaml: cannot be read"),
        (
            ["data", "images", "--source", "nowhere", "--out", "o.arrow"],
            "--source: got 'nowhere', expected a",
        ),
        (["trian"], "No such command 'trian'"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    distmeta: Any, arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    write_job()
    assert expected in one_line_error(distmeta(*arguments))
    answer = distmeta(*arguments, "--json")
    assert answer.code == 2
    assert expected in answer.json()["error"]
    assert answer.err == ""
    assert os.listdir() == ["job.yaml"]


def test_unexpected_error_prints_a_traceback_and_exits_with_1(
    distmeta: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("a broken\nmachine")

    monkeypatch.setattr(training, "train", fail)
    outcome = distmeta("train", write_job())
    assert outcome.code == 1
    assert outcome.out == ""
    assert "Traceback" in outcome.err
    assert outcome.err.endswith("error: RuntimeError: a broken machine\n")
    answer = distmeta("train", "job.yaml", "--json")
    assert answer.code == 1
    assert answer.json() == {"error": "RuntimeError: a broken machine"}


def test_stop_at_nonfinite_gradient_exits_with_1_without_traceback(distmeta: Any) -> None:
    write_job(tasks={"type": "hard_cases:AllTasksWithNaN"}, run={"on_nonfinite": "stop"})
    outcome = distmeta("train", "job.yaml", "--json", "compute.execution=loop")
    assert outcome.code == 1
    expected = "NumericsError: step 1: non-finite meta-gradient of tasks [0, 1"
    assert outcome.json()["error"].startswith(expected)
    assert "Traceback" not in outcome.err


def test_interruption_with_a_checkpoint_exits_with_130_and_names_the_run(
    distmeta: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise InterruptedRun("runs/mine", 7)

    monkeypatch.setattr(training, "train", stop)
    outcome = distmeta("train", write_job())
    assert outcome.code == 130
    assert outcome.out == ""
    assert "the state after step 7 is saved" in outcome.err
    assert "distmeta train --resume runs/mine" in outcome.err
    answer = distmeta("train", "job.yaml", "--json")
    assert answer.code == 130
    assert answer.json() == {"error": "interrupted after step 7", "run": "runs/mine", "step": 7}


def test_interruption_without_a_checkpoint_exits_with_130(
    distmeta: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", stop)
    outcome = distmeta("train", write_job())
    assert outcome == Outcome(130, "", "error: interrupted\n")
    answer = distmeta("train", "job.yaml", "--json")
    assert answer.code == 130
    assert answer.json() == {"error": "interrupted"}


def test_evaluate(distmeta: Any) -> None:
    digits = {"type": "digits", "ways": 3, "queries": 3}
    write_job(algorithm={"type": "maml", "inner_steps": 1}, tasks=digits, run={"eval_tasks": 4})
    run = distmeta("train", "job.yaml", "run.steps=1").out.strip()

    outcome = distmeta("evaluate", run)
    assert outcome.code == 0
    assert "4 unseen tasks" in outcome.out
    assert "accuracy" in outcome.out
    assert outcome.out.count("±") == 5  # the title, and two metrics before and after

    answer = distmeta("evaluate", run, "tasks.shots=2", "--json", "--predictions", "p.parquet").json()
    figures = ["loss_before", "loss_after", "accuracy_before", "accuracy_after"]
    assert list(answer) == ["tasks", *figures, "ci95", "curve", "curve_ci95"]
    assert answer["tasks"] == 4
    assert 0 <= answer["accuracy_after"] <= 1
    assert Path("p.parquet").exists()
    assert distmeta("evaluate", f"{run}/checkpoints/latest", "tasks.shots=2", "--json").json() == answer

    assert distmeta("evaluate", run, "tasks.shots=2", "--json", "--figures", "drawn").json() == answer
    assert sorted(path.name for path in Path("drawn").iterdir()) == ["curve.png", "evaluation.json"]
    assert distmeta("evaluate", run, "run.eval_tasks=1", "--json").json()["ci95"] is None


def test_evaluate_refuses_wrong_options(distmeta: Any) -> None:
    write_job(run={"eval_tasks": 2})
    run = distmeta("train", "job.yaml", "run.steps=1").out.strip()
    no_film = one_line_error(distmeta("evaluate", run, "--video", "v.gif"))
    assert "--video: sinusoid has nothing to film" in no_film
    unknown_key = one_line_error(distmeta("evaluate", run, "tasks.shot=5"))
    assert "tasks.shot: unknown key" in unknown_key
    no_file = one_line_error(distmeta("evaluate", run, "--episodes", "nowhere.parquet"))
    assert "--episodes" in no_file


def test_json_has_null_for_numbers_that_are_not_finite(distmeta: Any) -> None:
    write_job(algorithm={"type": "maml", "inner_lr": 1e30, "inner_steps": 3}, run={"eval_tasks": 2})
    trained = distmeta("train", "job.yaml", "run.steps=1", "compute.execution=loop", "--json").json()
    assert trained["loss"] is None
    answer = distmeta("evaluate", trained["run"], "--json").json()
    assert answer["loss_after"] is None
    assert answer["curve"]["loss"][-1] is None
    assert answer["loss_before"] > 0


def test_check(distmeta: Any) -> None:
    one = write_job("one.yaml")
    two = write_job("two.yaml", algorithm="reptile")
    outcome = distmeta("check", one, two, "run.steps=9")
    assert outcome == Outcome(0, "one.yaml: ok\ntwo.yaml: ok\n", "")
    assert distmeta("check", one, two, "--json").json() == {"jobs": 2}
    assert "one.yaml: run.stps: unknown key" in one_line_error(distmeta("check", one, "run.stps=9"))
    assert sorted(os.listdir()) == ["one.yaml", "two.yaml"]


def test_check_runs_one_task(distmeta: Any) -> None:
    outcome = distmeta("check", write_job(), "--run-one-task")
    assert outcome.code == 0
    assert outcome.out == ""
    for part in (
        "episode: support.x [1, 5, 1] float32, support.y [1, 5, 1] float32",
        "theta: 6 tensors, 321 numbers",
        "pure:",
        "execution vmap",
        "metrics: loss_after",
    ):
        assert part in outcome.err
    answer = distmeta("check", "job.yaml", "--run-one-task", "--json")
    assert answer.code == 0
    assert answer.json() == {"jobs": 1}
    refused = distmeta(
        "check", "job.yaml", "--run-one-task", "model={type: 'hard_cases:RunningStatisticsNet'}"
    )
    assert "the forward pass changes '1.running_mean'" in one_line_error(refused)


def test_data_images(distmeta: Any) -> None:
    random = np.random.default_rng(0)
    for label in ("cat", "dog", "owl"):
        Path("pictures", label).mkdir(parents=True)
        for k in range(4):
            pixels = random.integers(0, 256, (6, 5, 3), np.uint8)
            Image.fromarray(pixels).save(f"pictures/{label}/{k}.png")
    command = ["data", "images", "--source", "pictures", "--out"]
    outcome = distmeta(*command, "o.arrow", "--size", "4")
    assert outcome.code == 0
    assert outcome.out == "o.arrow: 3 classes, 12 examples\n"
    Path("o.arrow").unlink()
    answer = distmeta(*command, "o.arrow", "--channels", "1", "--json")
    assert answer.json() == {"path": "o.arrow", "classes": 3, "examples": 12}
    refused = distmeta(*command, "b.arrow", "--channels", "2")
    assert "preparation.channels: got 2, expected 1 or 3" in one_line_error(refused)
    assert sorted(os.listdir()) == ["o.arrow", "pictures"]


def test_no_command_shows_the_help_without_an_error(distmeta: Any) -> None:
    outcome = distmeta()
    assert outcome.code == 2
    assert "Commands" in outcome.out + outcome.err
    assert "error" not in outcome.err


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["data", "images", "--help"]])
def test_help_imports_neither_torch_nor_ray_nor_mlflow(arguments: list[str], tmp_path: Path) -> None:
    program = (
        "import sys; from distmeta.cli import main as cli; sys.argv = ['distmeta', *sys.argv[1:]]\n"
        "try: cli.main()\n"
        "except SystemExit as stop: print(stop.code, {'torch', 'ray', 'mlflow', 'numpy'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "Usage: distmeta" in process.stdout
    assert process.stdout.splitlines()[-1] == "0 set()"


def test_module_runs_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distmeta.cli.main", "check", "nowhere.yaml", "--json"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert process.returncode == 2
    assert json.loads(process.stdout)["error"].startswith("nowhere.yaml: cannot be read")
    assert process.stderr == ""
