"""What an evaluation draws and films, beside the figures it is of; the MLflow run it belongs to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tree
from PIL import Image

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.evaluation import figures as pictures
from distmeta.evaluation.learner import load
from distmeta.seeding import task_ids
from distmeta.tracking import mlflow_store

LAMP = '''
import gymnasium, numpy as np

class Lamp(gymnasium.Env):
    """Turn it as far as the task says. What is seen is as bright as it is turned, and fails where it is told to."""

    observation_space = gymnasium.spaces.Box(-9, 9, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, generator, render_mode=None):
        self.wanted, self.render_mode = generator.random(), render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.turned = 0.0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.turned = float(np.clip(self.turned + 0.2 * action[0], 0, 1))
        return np.array([self.turned], np.float32), -abs(self.turned - self.wanted), False, False, {}

    def render(self):
        if self.render_mode != "rgb_array":
            raise RuntimeError("no display")
        return np.full((64, 96, 3), round(255 * self.turned), np.uint8)

def blind(generator, render_mode=None):
    return Lamp(generator)

def dark(generator):
    return Lamp(generator)
'''
LINE = ["tasks.make=lamp:Lamp", "run.eval_tasks=3", "algorithm.inner_steps=2"]


def trained(job: dict[str, Any]) -> Path:
    return distmeta.train(Job.parse(job)).run


def navigation(**tracking: Any) -> dict[str, Any]:
    tasks = {"type": "navigation", "trajectories": 4, "horizon": 6}
    return tree("maml-rl", tasks=tasks, run={"steps": 1, "eval_tasks": 5}, **tracking)


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_figures_of_a_run(workplace: Path) -> None:
    run = trained(navigation())
    overrides = ["algorithm.inner_steps=3"]
    found = distmeta.evaluate(run, overrides, figures="f/g")
    record = json.loads(Path("f/g/evaluation.json").read_text())
    assert (record["tasks"], record["step"], record["overrides"]) == (5, 1, overrides)
    assert record["curve"]["return"] == found.curve["return"]
    assert record["curve_ci95"] == found.curve_ci95
    assert sorted(path.name for path in Path("f/g").iterdir()) == [
        "curve.png", "evaluation.json", "trajectories.png",
    ]  # fmt: skip
    wide, _ = size(Path("f/g/trajectories.png"))
    distmeta.evaluate(run, figures="one")
    assert wide > 1.2 * size(Path("one/trajectories.png"))[0]  # a panel for every update
    Path("file").touch()
    with pytest.raises(InputError, match=r"^--figures: got 'file', where no folder can be made"):
        distmeta.evaluate(run, figures="file")


def test_figures_of_tasks_without_a_curve_or_figures_of_their_own(workplace: Path) -> None:
    run = trained(tree("rl2", run={"steps": 1, "eval_tasks": 3}))
    distmeta.evaluate(run, figures="f")
    assert [path.name for path in Path("f").iterdir()] == ["evaluation.json"]


def test_mlflow_has_the_figures_and_its_run_stays_as_it_ended(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/mlflow.db")
    run = trained(navigation(tracking={"type": "mlflow"}))
    mlflow_store.import_mlflow()
    from mlflow.tracking import MlflowClient

    client, run_id = MlflowClient(), load(run).checkpoint.progress.tracking_id
    before = client.get_run(run_id)
    said: list[str] = []
    distmeta.evaluate(run, figures="f", say=said.append)
    names = {Path(entry.path).name for entry in client.list_artifacts(run_id, "evaluation")}
    assert names == {"curve.png", "trajectories.png", "evaluation.json"}
    assert client.get_run(run_id).info.status == before.info.status == "FINISHED"
    assert client.get_run(run_id).data.metrics == before.data.metrics
    assert said == []

    client.delete_run(run_id)
    distmeta.evaluate(run, figures="f", say=said.append)
    assert f"not sent (run {run_id} is not in" in said[-1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/other.db")
    distmeta.evaluate(run, figures="f", say=said.append)
    assert "not sent (there is no sqlite:///" in said[-1]
    assert not Path("other.db").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    distmeta.evaluate(run, figures="f", say=said.append)
    assert said[-1].startswith("tracking: evaluation.json, curve.png, trajectories.png not sent (")
    assert capsys.readouterr().out == ""


def test_a_store_that_does_not_answer_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    from threading import Event

    monkeypatch.setattr(mlflow_store, "SEND_SECONDS", 0.2)
    monkeypatch.setattr(mlflow_store, "open_client", lambda uri: Event().wait(60))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert mlflow_store.send_files("x", [], "evaluation") == "it does not answer"


@pytest.fixture
def lamp(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short training in an environment that draws itself without a display."""
    pytest.importorskip("gymnasium", reason="needs the extra rl")
    (workplace / "lamp.py").write_text(LAMP)
    monkeypatch.syspath_prepend(str(workplace))
    tasks = {"type": "gym", "make": "lamp:Lamp", "trajectories": 3, "horizon": 8}
    return trained(tree("maml-rl", tasks=tasks, run={"steps": 1}))


def brightness(frame: np.ndarray) -> int:
    return int(frame[-1, -1, 0])


def test_frames_are_of_what_was_collected(lamp: Path) -> None:
    """Of the first trajectory of the first task, whose data are the same as without a camera."""
    problem, theta = load(lamp, LINE).problem, load(lamp, LINE).theta

    def policy(x: torch.Tensor) -> torch.Tensor:
        return problem.model(theta, x).detach()

    ids, family = task_ids(0, "test", 0, 2), problem.family
    filming = family.film()
    plain = [family.collect("test", ids, k, policy) for k in range(2)]
    seen = [filming.family.collect("test", ids, k, policy) for k in range(2)]
    for k in range(2):
        assert torch.equal(plain[k].x, seen[k].x)
        assert torch.equal(plain[k].total, seen[k].total)
        turned = plain[k].x[0, 0, :, 0].tolist()
        assert len(filming.scenes[k]) == 9
        assert [brightness(frame) for frame in filming.scenes[k][:8]] == [round(255 * x) for x in turned]
    assert (len(filming.scenes), filming.rate) == (2, 10)


def test_a_video_shows_a_trajectory_before_and_after_each_step(lamp: Path) -> None:
    plain = distmeta.evaluate(lamp, LINE)
    assert distmeta.evaluate(lamp, LINE, video="v.gif") == plain
    milliseconds, heights = 0, set()
    with Image.open("v.gif") as image:
        for k in range(getattr(image, "n_frames")):  # noqa: B009 - not in Pillow's types
            image.seek(k)
            milliseconds += image.info["duration"]
            heights.add(image.height)
    assert milliseconds == 3 * 9 * 100  # a GIF has equal neighbours as one frame that lasts longer
    assert heights == {64}


def test_a_video_as_mp4(lamp: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="needs imageio-ffmpeg")
    distmeta.evaluate(lamp, LINE, video="v.mp4")
    assert ffmpeg.count_frames_and_secs("v.mp4") == (27, pytest.approx(2.7))


def test_what_cannot_be_filmed(lamp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in (
        ("v.avi", r"^--video: got 'v.avi', expected a file that ends with .gif or .mp4"),
        ("nowhere/v.gif", r"^--video: the folder of 'nowhere/v.gif' does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            distmeta.evaluate(lamp, LINE, video=name)
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^--video: got 'v.mp4', which needs imageio-ffmpeg: pip install"):
        distmeta.evaluate(lamp, LINE, video="v.mp4")
    with pytest.raises(
        InputError, match=r"^--video: tasks.make takes generator, expected make\(generator, re"
    ):
        distmeta.evaluate(lamp, ["tasks.make=lamp:dark", *LINE[1:]], video="v.gif")
    with pytest.raises(
        InputError, match=r"^--video: the environment cannot be drawn \(RuntimeError: no disp"
    ):
        distmeta.evaluate(lamp, ["tasks.make=lamp:blind", *LINE[1:]], video="v.gif")
    waves = trained(tree(run={"steps": 1, "eval_tasks": 2}))
    with pytest.raises(InputError, match=r"^--video: sinusoid has nothing to film, expected tasks of gym"):
        distmeta.evaluate(waves, video="v.gif")


def test_the_cheetah_is_drawn_without_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mujoco", reason="needs the extra rl")
    from distmeta.tasks.gym import Gym

    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))
    filming = Gym("half-cheetah-velocity", trajectories=1, horizon=2).film()
    try:
        filming.family.collect("test", task_ids(0, "test", 0, 1), 0, lambda x: torch.zeros(1, 1, 12))
    except InputError as error:
        if "--video: the environment cannot be drawn" not in str(error):
            raise
        pytest.skip(f"no OpenGL without a display here: {error}")
    assert [frame.shape for frame in filming.scenes[0]] == [(480, 480, 3)] * 3
    assert len({frame.tobytes() for frame in filming.scenes[0]}) == 3
