"""What an evaluation looks like: its curve, the task family's own figures, a film; also in MLflow.

A task family may have

    figures(ids, episodes) -> {name: matplotlib.figure.Figure}      of a few tasks, stacked as `draw` stacks them
    film() -> tasks.rollout.Film                                    where what is collected can be seen
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from distmeta.compute.episodes import episodes_of, to_device
from distmeta.errors import InputError
from distmeta.evaluation.learner import Learner
from distmeta.protocols import Episodes
from distmeta.seeding import task_ids
from distmeta.tracking.mlflow_store import send_files

SHOWN = 6
"""Tasks in a family's figures."""
FORMATS = (".gif", ".mp4")


def draw_curve(
    metric: str, means: Sequence[float], spreads: Sequence[float | None], tasks: int, path: Path
) -> None:
    """A metric against inner steps, with its interval at each."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(range(len(means)), means, [spread or 0.0 for spread in spreads], capsize=3, marker="o")
    axes.set(xlabel="inner steps", ylabel=metric, title=f"{tasks} unseen tasks, mean and 95 % interval")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)


def draw_tasks(learner: Learner, folder: Path) -> list[Path]:
    """The family's own figures of the first test tasks, where it has any."""
    family: Any = learner.problem.family
    if not hasattr(family, "figures"):
        return []
    ids = task_ids(learner.problem.job.seed, "test", 0, SHOWN)
    paths = []
    for name, figure in family.figures(ids, to_device(_collected(learner, family, ids), "cpu")).items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def check_video(learner: Learner, path: Path) -> None:
    """Before anything is computed.

    Raises:
        InputError: tasks without a film, another format, no folder.
    """
    if not hasattr(learner.problem.family, "film"):
        raise InputError(
            f"--video: {learner.problem.job.tasks.type} has nothing to film, expected tasks of gym"
        )
    if path.suffix not in FORMATS:
        raise InputError(f"--video: got {path.name!r}, expected a file that ends with {' or '.join(FORMATS)}")
    if path.suffix == ".mp4" and not (find_spec("imageio") and find_spec("imageio_ffmpeg")):
        raise InputError(
            f"--video: got {path.name!r}, which needs imageio-ffmpeg: pip install imageio imageio-ffmpeg, or use .gif"
        )
    if not path.absolute().parent.is_dir():
        raise InputError(f"--video: the folder of {str(path)!r} does not exist")


def film(learner: Learner, path: Path) -> None:
    """One test task: a trajectory before adaptation, then one after each inner step."""
    family: Any = learner.problem.family
    filming = family.film()
    _collected(learner, filming.family, task_ids(learner.problem.job.seed, "test", 0, 1))
    titles = ["before", *(f"after {k} step{'s' * (k > 1)}" for k in range(1, len(filming.scenes)))]
    frames = [
        _titled(frame, title) for title, scene in zip(titles, filming.scenes, strict=True) for frame in scene
    ]
    if path.suffix == ".gif":
        first, *others = frames
        first.save(path, save_all=True, append_images=others, duration=max(20, 1000 // filming.rate), loop=0)
        return
    import imageio

    imageio.mimwrite(path, [np.asarray(frame) for frame in frames], fps=filming.rate, macro_block_size=2)


def send(learner: Learner, paths: Sequence[Path], say: Callable[[str], None]) -> None:
    """To the run's artifacts in MLflow, folder `evaluation`, where the run is there; otherwise says that it is not."""
    run_id = learner.checkpoint.progress.tracking_id
    if run_id is None or learner.problem.job.tracking.type == "none":
        return
    failure = send_files(run_id, paths, "evaluation")
    if failure:
        say(f"tracking: {', '.join(path.name for path in paths)} not sent ({failure})")


def _collected(learner: Learner, family: Any, ids: np.ndarray) -> Episodes:
    problem = learner.problem
    with learner.ready():
        return episodes_of(
            family, problem.algorithm, learner.theta, "test", ids, learner.steps, problem.device
        )


def _titled(frame: np.ndarray, title: str) -> Any:
    from PIL import Image, ImageDraw

    image = Image.fromarray(frame)
    ImageDraw.Draw(image).text((8, 6), title, fill="white", stroke_width=2, stroke_fill="black", font_size=20)
    return image
