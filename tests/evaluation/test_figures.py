"""Figures and videos of an evaluation. The run in MLflow gets them too."""

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
from distmeta.evaluation import figures
from distmeta.evaluation.learner import load
from distmeta.seeding import task_ids
from distmeta.tracking.mlflow import import_mlflow

LAMP = '''
import gymnasium, numpy as np

class Lamp(gymnasium.Env):
    """Turn the lamp to the brightness that the task wants. A frame is as bright as the lamp."""

    observation_space = gymnasium.spaces.Box(-9, 9, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, generator, render_mode=None):
        self.wanted = generator.random()
        self.render_mode = render_mode

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

def ignores_render_mode(generator, render_mode=None):
    return Lamp(generator)

def has_no_render_mode(generator):
    return Lamp(generator)
'''
OVERRIDES = ["run.eval_tasks=3", "algorithm.inner_steps=2"]
LAMP_OVERRIDES = ["tasks.make=lamp:Lamp", *OVERRIDES]


def train(job: dict[str, Any]) -> Path:
    return distmeta.train(Job.parse(job)).run


def navigation_job(**tracking: Any) -> dict[str, Any]:
    tasks = {"type": "navigation", "trajectories": 4, "horizon": 6}
    return tree("maml-rl", tasks=tasks, run={"steps": 1, "eval_tasks": 5}, **tracking)


def image_width(path: Path) -> int:
    with Image.open(path) as image:
        return image.width


def file_names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_figures_of_a_run(workplace: Path) -> None:
    run = train(navigation_job())
    overrides = ["algorithm.inner_steps=3"]
    evaluation = distmeta.evaluate(run, overrides, figures="f/g")
    assert file_names("f/g") == ["curve.png", "evaluation.json", "trajectories.png"]
    record = json.loads(Path("f/g/evaluation.json").read_text())
    assert record["tasks"] == 5
    assert record["step"] == 1
    assert record["overrides"] == overrides
    assert record["curve"]["return"] == evaluation.curve["return"]
    assert record["curve_ci95"] == evaluation.curve_ci95

    distmeta.evaluate(run, figures="one")
    three_steps = image_width(Path("f/g/trajectories.png"))
    one_step = image_width(Path("one/trajectories.png"))
    assert three_steps > 1.2 * one_step  # there is a panel for every inner step


def test_figures_folder_that_is_a_file_is_refused(workplace: Path) -> None:
    run = train(tree(run={"steps": 1, "eval_tasks": 2}))
    Path("file").touch()
    with pytest.raises(InputError, match=r"^--figures: got 'file', expected a folder that can be made"):
        distmeta.evaluate(run, figures="file")


def test_tasks_without_curve_and_figures_have_only_the_record(workplace: Path) -> None:
    run = train(tree("rl2", run={"steps": 1, "eval_tasks": 3}))
    distmeta.evaluate(run, figures="f")
    assert file_names("f") == ["evaluation.json"]


def test_mlflow_run_gets_the_figures_and_does_not_change_otherwise(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/mlflow.db")
    run = train(navigation_job(tracking={"type": "mlflow"}))
    import_mlflow()
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    run_id = load(run).checkpoint.progress.tracking_ids["mlflow"]
    before = client.get_run(run_id)
    messages: list[str] = []
    distmeta.evaluate(run, figures="f", report=messages.append)
    names = {Path(entry.path).name for entry in client.list_artifacts(run_id, "evaluation")}
    assert names == {"curve.png", "trajectories.png", "evaluation.json"}
    assert client.get_run(run_id).info.status == before.info.status == "FINISHED"
    assert client.get_run(run_id).data.metrics == before.data.metrics
    assert messages == []

    client.delete_run(run_id)
    distmeta.evaluate(run, figures="f", report=messages.append)
    assert f"not sent to mlflow (run {run_id} is not in" in messages[-1]

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/other.db")
    distmeta.evaluate(run, figures="f", report=messages.append)
    assert "not sent to mlflow (there is no sqlite:///" in messages[-1]
    assert not Path("other.db").exists()

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    distmeta.evaluate(run, figures="f", report=messages.append)
    assert messages[-1].startswith(
        "tracking: evaluation.json, curve.png, trajectories.png not sent to mlflow ("
    )
    assert capsys.readouterr().out == ""


@pytest.fixture
def lamp(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run in an environment that renders itself without a display."""
    pytest.importorskip("gymnasium", reason="needs the extra rl")
    (workplace / "lamp.py").write_text(LAMP)
    monkeypatch.syspath_prepend(str(workplace))
    tasks = {"type": "gym", "make": "lamp:Lamp", "trajectories": 3, "horizon": 8}
    return train(tree("maml-rl", tasks=tasks, run={"steps": 1}))


def test_frames_show_the_collected_trajectories(lamp: Path) -> None:
    """They show the first trajectory of the first task. Its data are the same as without a camera."""
    learner = load(lamp, LAMP_OVERRIDES)
    family: Any = learner.problem.family

    def policy(x: torch.Tensor) -> torch.Tensor:
        return learner.problem.model(learner.theta, x).detach()

    ids = task_ids(0, "test", 0, 2)
    film = family.film()
    for k in range(2):
        unfilmed = family.collect("test", ids, k, policy)
        filmed = film.family.collect("test", ids, k, policy)
        assert torch.equal(unfilmed.x, filmed.x)
        assert torch.equal(unfilmed.total, filmed.total)
        positions = unfilmed.x[0, 0, :, 0].tolist()
        frames = film.scenes[k]
        assert len(frames) == 9
        brightness = [int(frame[-1, -1, 0]) for frame in frames[:8]]
        assert brightness == [round(255 * position) for position in positions]
    assert len(film.scenes) == 2
    assert film.rate == 10


def test_video_shows_a_trajectory_before_and_after_each_step(lamp: Path) -> None:
    unfilmed = distmeta.evaluate(lamp, LAMP_OVERRIDES)
    assert distmeta.evaluate(lamp, LAMP_OVERRIDES, video="v.gif") == unfilmed
    milliseconds = 0
    heights = set()
    with Image.open("v.gif") as image:
        for k in range(getattr(image, "n_frames")):  # noqa: B009 - Pillow's types lack the attribute
            image.seek(k)
            milliseconds += image.info["duration"]
            heights.add(image.height)
    assert milliseconds == 3 * 9 * 100  # a GIF stores equal neighbours as one frame with a longer duration
    assert heights == {64}


def test_video_as_mp4(lamp: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="needs imageio-ffmpeg")
    distmeta.evaluate(lamp, LAMP_OVERRIDES, video="v.mp4")
    assert ffmpeg.count_frames_and_secs("v.mp4") == (27, pytest.approx(2.7))


@pytest.mark.parametrize(
    ("video", "expected"),
    [
        ("v.avi", r"^--video: got 'v.avi', expected a file that ends with .gif or .mp4"),
        ("nowhere/v.gif", r"^--video: the folder of 'nowhere/v.gif' does not exist"),
        ("v.mp4", r"^--video: got 'v.mp4', which needs imageio-ffmpeg: pip install"),
    ],
)
def test_wrong_video_files_are_refused(
    lamp: Path, video: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=expected):
        distmeta.evaluate(lamp, LAMP_OVERRIDES, video=video)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        ("has_no_render_mode", r"^--video: tasks.make takes generator, expected make\(generator, re"),
        ("ignores_render_mode", r"^--video: the environment cannot be drawn \(RuntimeError: no disp"),
    ],
)
def test_environments_that_cannot_be_drawn_are_refused(lamp: Path, make: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        distmeta.evaluate(lamp, [f"tasks.make=lamp:{make}", *OVERRIDES], video="v.gif")


def test_video_of_tasks_without_film_is_refused(workplace: Path) -> None:
    waves = train(tree(run={"steps": 1, "eval_tasks": 2}))
    with pytest.raises(InputError, match=r"^--video: sinusoid has nothing to film, expected tasks of gym"):
        distmeta.evaluate(waves, video="v.gif")


def test_cheetah_is_drawn_without_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mujoco", reason="needs the extra rl")
    from distmeta.tasks.gym import Gym

    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))
    film = Gym("half-cheetah-velocity", trajectories=1, horizon=2).film()
    try:
        film.family.collect("test", task_ids(0, "test", 0, 1), 0, lambda x: torch.zeros(1, 1, 12))
    except InputError as error:
        if "--video: the environment cannot be drawn" not in str(error):
            raise
        pytest.skip(f"no OpenGL without a display here: {error}")
    frames: list[np.ndarray] = film.scenes[0]
    assert [frame.shape for frame in frames] == [(480, 480, 3)] * 3
    assert len({frame.tobytes() for frame in frames}) == 3
