"""Figures and videos of an evaluation: its curve, the task family's own figures, a video of a policy.

A task family may provide `DrawsFigures` and `Films` (distmeta/protocols.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from distmeta.compute.episodes import make_episodes, to_device
from distmeta.errors import InputError
from distmeta.evaluation.learner import Learner
from distmeta.protocols import DrawsFigures, Episodes, Films, TaskFamily
from distmeta.seeding import task_ids

FIGURE_TASKS = 6
"""Tasks in a family's figures."""
VIDEO_FORMATS = (".gif", ".mp4")
DPI = 120
SHORTEST_FRAME = 20
"""Milliseconds. Browsers show a GIF with shorter frames too slowly."""


def draw_curve(
    metric: str, means: Sequence[float], intervals: Sequence[float | None], tasks: int, path: Path
) -> None:
    """Draw a metric against inner steps, with its interval at each step.

    Args:
        means: the metric's mean over tasks after 0, 1, … inner steps.
        intervals: half the width of the 95 % interval at each step; None: unknown.
        tasks: how many tasks the means are of.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    bars = [interval or 0.0 for interval in intervals]
    axes.errorbar(range(len(means)), means, bars, capsize=3, marker="o")
    axes.set(xlabel="inner steps", ylabel=metric, title=f"{tasks} tasks, mean and 95 % interval")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=DPI)


def draw_tasks(learner: Learner, folder: Path) -> list[Path]:
    """Write the family's own figures of the first test tasks, if it has any. Return the files."""
    family = learner.problem.family
    if not isinstance(family, DrawsFigures):
        return []
    ids = task_ids(learner.problem.job.seed, "test", 0, FIGURE_TASKS)
    episodes = to_device(_make_test_episodes(learner, learner.problem.family, ids), "cpu")
    paths = []
    for name, figure in family.figures(ids, episodes).items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=DPI)
        paths.append(path)
    return paths


def check_video(learner: Learner, path: Path) -> None:
    """Check that a video can be written, before anything is computed.

    Raises:
        InputError: the tasks cannot be filmed, the format is unknown or needs a package, or there is no such folder.
    """
    if not isinstance(learner.problem.family, Films):
        raise InputError(
            f"--video: {learner.problem.job.tasks.type} has nothing to film, expected tasks of gym"
        )
    if path.suffix not in VIDEO_FORMATS:
        raise InputError(
            f"--video: got {path.name!r}, expected a file that ends with {' or '.join(VIDEO_FORMATS)}"
        )
    if path.suffix == ".mp4" and not (find_spec("imageio") and find_spec("imageio_ffmpeg")):
        raise InputError(
            f"--video: got {path.name!r}, which needs imageio-ffmpeg: pip install imageio imageio-ffmpeg, or use .gif"
        )
    if not path.absolute().parent.is_dir():
        raise InputError(f"--video: the folder of {str(path)!r} does not exist")


def write_video(learner: Learner, path: Path) -> None:
    """Film one test task: a trajectory before adaptation, then one after each inner step."""
    family = learner.problem.family
    assert isinstance(family, Films), "check_video comes first"
    film = family.film()
    ids = task_ids(learner.problem.job.seed, "test", 0, 1)
    _make_test_episodes(learner, film.family, ids)
    frames = []
    for step, scene in enumerate(film.scenes):
        title = _title_scene(step)
        frames += [_add_title(frame, title) for frame in scene]
    if path.suffix == ".gif":
        duration = max(SHORTEST_FRAME, 1000 // film.rate)
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)
        return
    import imageio

    imageio.mimwrite(path, [np.asarray(frame) for frame in frames], fps=film.rate, macro_block_size=2)


def _make_test_episodes(learner: Learner, family: TaskFamily, ids: np.ndarray) -> Episodes:
    """Draw test episodes, or collect them with the policy as it adapts."""
    problem = learner.problem
    with learner.inference_settings():
        return make_episodes(
            family, problem.algorithm, learner.theta, "test", ids, learner.steps, problem.device
        )


def _title_scene(step: int) -> str:
    if step == 0:
        return "before"
    return "after 1 step" if step == 1 else f"after {step} steps"


def _add_title(frame: np.ndarray, title: str) -> Any:
    """Return the frame [height, width, 3] as a Pillow image with a title."""
    from PIL import Image, ImageDraw

    image = Image.fromarray(frame)
    ImageDraw.Draw(image).text((8, 6), title, fill="white", stroke_width=2, stroke_fill="black", font_size=20)
    return image
