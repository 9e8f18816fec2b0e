"""The sweep itself: a folder, Tune's search over it, MLflow's parent run, and what was found.

FOLDER/job.yaml              the job with its sweep, as it was settled
FOLDER/trials/trial-00003/   the trials' run folders
FOLDER/sweep/best.yaml       the best trial's job; trials.parquet, trials.json, curves.png, values.png
FOLDER/tune/                 Tune's own state. It is pickled: go on only with sweeps that you trust as code.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from distmeta.config.job import Job
from distmeta.config.search_space import SweepSection
from distmeta.errors import InputError
from distmeta.files import write_atomically
from distmeta.runtime.interruption import InterruptedRun
from distmeta.runtime.startup import resolve_job
from distmeta.sweeps import NothingFoundError
from distmeta.sweeps.results import Trial, best_job, best_of, draw, trials_of, write_table
from distmeta.sweeps.tracking import (
    finish_tracking,
    open_sweep_run,
    save_ids,
    tracker_environment,
    trial_trackers,
)
from distmeta.tracking.interface import Status
from distmeta.tracking.trackers import Trackers

TUNE = "tune"
"""Tune's folder within the sweep's."""
RETRIES = 2
"""Further starts of a trial whose process or node was lost."""
SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_TUNE_DISABLE_AUTO_CALLBACK_SYNCER": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # it prints on stdout
}
"""What Tune reads from the environment; a user's own values stay."""


class View(Protocol):
    """Who watches the trials."""

    def begin(self, folder: Path, count: int) -> None: ...
    def trial(
        self, name: str, status: str, values: Mapping[str, Any], figures: Mapping[str, Any]
    ) -> None: ...
    def say(self, text: str) -> None: ...
    def end(self) -> None: ...


class NoView:
    """Nobody watches."""

    def begin(self, folder: Path, count: int) -> None: ...
    def trial(
        self, name: str, status: str, values: Mapping[str, Any], figures: Mapping[str, Any]
    ) -> None: ...
    def say(self, text: str) -> None: ...
    def end(self) -> None: ...


@dataclass(frozen=True)
class SweepSummary:
    """What a sweep leaves behind."""

    folder: Path
    best_run: Path
    best: dict[str, Any]
    """The best trial's values."""
    value: float
    """Its figure."""
    metric: str
    trials: list[Trial]


def sweep(job: Job | str | Path, resume: str | Path | None = None, view: View | None = None) -> SweepSummary:
    """Searches the space of a job's `sweep:` section; FOLDER/sweep/best.yaml is ready to train.

    Args:
        resume: a sweep's folder: finished trials are kept, the others go on from their checkpoints.

    Raises:
        InputError: the job has no sweep, the cluster has no room for one trial, the folder is another job's; nothing
            was written.
        InterruptedRun: Ctrl-C or SIGTERM; what was found so far is written, the sweep can go on.
        NothingFoundError: no trial came to an evaluation.
    """
    job = job if isinstance(job, Job) else Job.load(job)
    if job.sweep is None:
        raise InputError("sweep: the job has no such section, expected one with a space")
    view = view or NoView()
    folder = _new_folder(job) if resume is None else _same_job(Path(resume).absolute(), job)
    with ExitStack() as stack:
        room = _join_ray(job, stack)
        if resume is None:
            job = _settled(job, view.say)
            _write_job(folder, job)
        else:
            job = Job.load(folder / "job.yaml")
        parent = open_sweep_run(job, folder, view.say)
        stack.callback(parent.close, "FAILED")
        view.begin(folder, _section(job).count)
        stack.callback(view.end)
        with _sigterm_as_sigint():
            results = _tuner(job, folder, parent.ids, view, resume is not None, room).fit()
        trials = trials_of(results, folder, job)
        ended = len(trials) == _section(job).count and all(t.status != "unfinished" for t in trials)
        if sum(trial.steps for trial in trials) >= (_section(job).budget or math.inf):
            ended, trials = (
                True,
                [t._replace(status="stopped") if t.status == "unfinished" else t for t in trials],
            )
        view.end()
        return _conclude(job, folder, trials, parent, ended, view.say)


def _section(job: Job) -> SweepSection:
    assert job.sweep is not None
    return job.sweep


def _new_folder(job: Job) -> Path:
    name = job.run.name or f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    if "://" in job.output:
        raise InputError(f"output: got {job.output!r}, expected a folder (that all nodes see) for a sweep")
    folder = Path(job.output).absolute() / name
    if folder.exists() and any(folder.iterdir()):
        raise InputError(
            f"run.name: the folder {folder} exists already: go on with --resume {folder}, or take another name"
        )
    return folder


def _same_job(folder: Path, job: Job) -> Path:
    """The folder to go on in, if it is of this job; what the sweep settled at its start may be open in the job."""
    path = folder / "job.yaml"
    if not (folder / TUNE).is_dir() or not path.is_file():
        raise InputError(f"--resume: {folder} is not a sweep's folder")
    stored = Job.load(path)
    old = flatten_values(stored.to_dict())
    new = flatten_values(_with_settled(job, stored).to_dict())
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            raise InputError(
                f"{key}: got {new.get(key)}, but the sweep to go on with has {old.get(key)}: take its own job, or "
                "start anew"
            )
    return folder


def flatten_values(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the values of a job as JSON texts by dotted key."""
    values: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            values |= flatten_values(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return values


def _settled(job: Job, say: Callable[[str], None]) -> Job:
    """What measuring decides is decided once; a schedule is as long as the job's full length, whatever a trial's is.

    Also builds the job's parts: what is missing shows before anything is written. Trials compute, so that this process
    needs a GPU only to measure on it.
    """
    import torch

    device = None if job.compute.execution == "measure" else torch.device("cpu")
    return _with_settled(job, resolve_job(job, say, device).job)


def _with_settled(job: Job, found: Job) -> Job:
    outer, compute = {}, {}
    if job.trial_steps < job.run.steps:
        length = job.outer.schedule.steps or found.outer.schedule.steps
        outer = {"schedule": job.outer.schedule.model_dump() | {"steps": length}}
    if job.compute.execution == "measure":
        compute = {"execution": found.compute.execution, "chunk": found.compute.chunk}
    return job.replace(compute=compute, outer=outer)


def _write_job(folder: Path, job: Job) -> None:
    for part in ("trials", "sweep", TUNE):
        (folder / part).mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "job.yaml", job.to_yaml())


def _join_ray(job: Job, stack: ExitStack) -> int:
    """Joins or starts a cluster with room for a trial; for how many there is room now (at least one).

    Raises:
        InputError: the cluster has no room for one, ever.
    """
    from distmeta.runtime.ray_cluster import can_autoscale, connect, import_ray

    os.environ |= {key: os.environ.get(key, value) for key, value in SETTINGS.items()}
    ray = import_ray(job.run.address)
    from distmeta.sweeps import search

    wanted = search.places(job)
    one, count = wanted[0], len(wanted)
    stack.callback(connect(ray, job.run.address, math.ceil(count * one.get("CPU", 0.0))))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    places = sum(min(int(node.get(key, 0.0) / value) for key, value in one.items()) for node in nodes)
    if places < count and not can_autoscale(ray):
        have = {key: sum(node.get(key, 0.0) for node in nodes) for key in ("CPU", "GPU")}
        raise InputError(
            f"run.workers: {job.run.min_workers}: a trial needs {count} place{'s' * (count > 1)} of "
            f"{one.get('CPU', 0):g} CPU and {one.get('GPU', 0):g} GPU, but the cluster has {places}: "
            f"{have['CPU']:g} CPU and {have['GPU']:g} GPU on {len(nodes)} node{'s' * (len(nodes) != 1)}"
        )
    return max(places // count, 1)


def _tuner(job: Job, folder: Path, parent_ids: Mapping[str, str], view: View, restored: bool, room: int) -> Any:
    """Tune's experiment, new or restored.

    Args:
        room: trials that the cluster has places for, where Tune does not see what they take.
    """
    from ray import tune

    from distmeta.sweeps import search
    from distmeta.sweeps.trial import SCORE, run_trial
    from distmeta.sweeps.watch import Watch

    section = _section(job)
    concurrent = section.concurrent
    if job.strategy.type == "all-reduce":
        concurrent = min(concurrent or room, room)
    Watch.view = view
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, spec=_spec(job, folder, parent_ids)),
        tune.PlacementGroupFactory(search.bundles(job)),
    )
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if restored and (folder / TUNE / "tuner.pkl").exists():  # else it was killed before it began
        return tune.Tuner.restore(str(folder / TUNE), trainable=trainable, resume_errored=True)
    seed = job.seed if section.seed is None else section.seed
    space, algorithm, samples = search.search(section, seed)
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=SCORE,
            mode="max",
            search_alg=algorithm,
            scheduler=search.scheduler(section, job),
            num_samples=samples,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
            trial_dirname_creator=_trial_id,
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=str(folder),
            stop=search.Budget(section.budget) if section.budget else None,
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[Watch(str(folder))],
            verbose=0,
        ),
    )


def _trial_id(trial: Any) -> str:
    return trial.trial_id


def _spec(job: Job, folder: Path, parent_ids: Mapping[str, str]) -> Any:
    from distmeta.sweeps.trial import TrialSpec

    section = _section(job)
    asked = job.run
    tree = job.to_dict() | {"sweep": None, "output": str(folder / "trials")}
    changing = section.scheduler.type == "pbt"
    tree["run"] |= {
        "steps": job.trial_steps,
        "checkpoint_every": asked.eval_every,
        "keep": asked.steps if changing else max(asked.keep, 2),  # any may be another trial's start
        "address": None,  # a trial is on the cluster already
        "workers": asked.min_workers,  # its placement group has room for no more
    }
    tree["tracking"] = trial_trackers(job, parent_ids)
    return TrialSpec(
        tree,
        str(folder),
        os.getcwd(),
        tracker_environment(job),
        section.metric,
        section.mode,
        changing,
    )


def _conclude(
    job: Job, folder: Path, trials: Sequence[Trial], parent: Trackers, ended: bool, say: Callable[[str], None]
) -> SweepSummary:
    """Writes what was found, here and in MLflow.

    Raises:
        InterruptedRun: the sweep has not ended.
        NothingFoundError: no trial came to an evaluation.
    """
    place = folder / "sweep"
    best = best_of(trials)
    write_table(trials, place / "trials.parquet")
    files = [place / "trials.parquet", place / "trials.json", folder / "job.yaml"]
    if best is not None:
        found = f"# {best.metric} {best.value:.4f} at step {best.best_step}: {best.name} of {folder.name}\n"
        (place / "best.yaml").write_text(found + best_job(best, job).to_yaml(), encoding="utf-8")
        files += [place / "best.yaml", *draw(trials, job, place)]
    status: Status = "KILLED" if not ended else "FINISHED" if best is not None else "FAILED"
    save_ids(folder, parent)
    parent.close(status)
    finish_tracking(job, folder, trials, best if ended else None, files, status, say)
    if not ended:
        raise InterruptedRun(str(folder), sum(trial.steps for trial in trials))
    if best is None or best.run is None or best.value is None:
        reasons = sorted({trial.reason for trial in trials if trial.reason})
        raise NothingFoundError(
            f"no trial came to an evaluation: {reasons[0] if reasons else 'none was run'}"
        )
    return SweepSummary(folder, best.run, best.values, best.value, best.metric, list(trials))


@contextmanager
def _sigterm_as_sigint() -> Iterator[None]:
    """Tune ends an experiment in order on SIGINT; a scheduler's SIGTERM means the same."""
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    except ValueError:  # not the main thread
        yield
        return
    sigint = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, sigint)
