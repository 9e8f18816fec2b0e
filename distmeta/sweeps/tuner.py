"""The sweep in Ray Tune: the cluster, Tune's experiment, and what every trial is told."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ray import tune

from distmeta.config.job import Job
from distmeta.config.search_space import SweepSection
from distmeta.errors import InputError
from distmeta.runtime.ray_cluster import can_autoscale, connect, import_ray
from distmeta.sweeps.search import Budget, build_scheduler, build_search, list_bundles, list_places
from distmeta.sweeps.tracking import tracker_environment, trial_trackers
from distmeta.sweeps.trial import SCORE, TrialSpec, run_trial
from distmeta.sweeps.view import View, ViewCallback

RESTARTS = 2
"""How often a trial is started again if its process or node was lost."""
TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_TUNE_DISABLE_AUTO_CALLBACK_SYNCER": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints on stdout
}
"""Environment variables that Tune reads. A user's own values stay."""


def join_ray(job: Job, stack: ExitStack) -> int:
    """Join or start a cluster that has room for a trial. `stack` leaves or stops it.

    Returns:
        How many trials there is room for now, at least 1.

    Raises:
        InputError: the cluster will never have room for a trial.
    """
    os.environ |= {name: os.environ.get(name, value) for name, value in TUNE_SETTINGS.items()}
    ray = import_ray(job.run.address)
    needed = list_places(job)
    place = needed[0]
    stack.callback(connect(ray, job.run.address, math.ceil(len(needed) * place.get("CPU", 0.0))))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    available = sum(min(int(node.get(key, 0.0) / value) for key, value in place.items()) for node in nodes)
    if available < len(needed) and not can_autoscale(ray):
        cpus = sum(node.get("CPU", 0.0) for node in nodes)
        gpus = sum(node.get("GPU", 0.0) for node in nodes)
        raise InputError(
            f"run.workers: {job.run.min_workers}: a trial needs {len(needed)} place{'s' * (len(needed) > 1)} of "
            f"{place.get('CPU', 0):g} CPU and {place.get('GPU', 0):g} GPU, but the cluster has {available}: "
            f"{cpus:g} CPU and {gpus:g} GPU on {len(nodes)} node{'s' * (len(nodes) != 1)}"
        )
    return max(available // len(needed), 1)


def build_tuner(
    job: Job,
    sweep: SweepSection,
    folder: Path,
    sweep_ids: Mapping[str, str],
    view: View,
    is_resumed: bool,
    room: int,
) -> tune.Tuner:
    """Build Tune's experiment, or restore it.

    Args:
        folder: Tune's folder, within the sweep's.
        sweep_ids: the ids of the sweep's runs in trackers, by the tracker's name.
        room: how many trials the cluster has room for. Tune does not know this for `all-reduce`.
    """
    concurrent = sweep.concurrent
    if job.strategy.type == "all-reduce":
        concurrent = min(concurrent or room, room)
    ViewCallback.view = view
    spec = build_trial_spec(job, sweep, folder.parent, sweep_ids)
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, spec=spec), tune.PlacementGroupFactory(list_bundles(job))
    )
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if is_resumed and (folder / "tuner.pkl").exists():  # else it was killed before the search began
        return tune.Tuner.restore(str(folder), trainable=trainable, resume_errored=True)
    search = build_search(sweep, job.seed if sweep.seed is None else sweep.seed)
    return tune.Tuner(
        trainable,
        param_space=search.space,
        tune_config=tune.TuneConfig(
            metric=SCORE,
            mode="max",
            search_alg=search.algorithm,
            scheduler=build_scheduler(sweep, job),
            num_samples=search.samples,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
            trial_dirname_creator=_name_trial_folder,
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            stop=Budget(sweep.budget) if sweep.budget else None,
            failure_config=tune.FailureConfig(max_failures=RESTARTS),
            callbacks=[ViewCallback(str(folder.parent))],
            verbose=0,
        ),
    )


def _name_trial_folder(trial: Any) -> str:
    return trial.trial_id


def build_trial_spec(job: Job, sweep: SweepSection, folder: Path, sweep_ids: Mapping[str, str]) -> TrialSpec:
    """Return what all trials share. `folder`: the sweep's folder."""
    values_change = sweep.scheduler.type == "pbt"
    tree = job.to_dict() | {"sweep": None, "output": str(folder / "trials")}
    tree["tracking"] = trial_trackers(job, sweep_ids)
    tree["run"] |= {
        "steps": job.trial_steps,
        "checkpoint_every": job.run.eval_every,
        # with population-based training, another trial may continue from any checkpoint
        "keep": job.run.steps if values_change else max(job.run.keep, 2),
        "address": None,  # a trial is on the cluster already
        "workers": job.run.min_workers,  # its placement group has no room for more
    }
    return TrialSpec(
        job=tree,
        folder=str(folder),
        working_dir=os.getcwd(),
        environment=tracker_environment(job),
        metric=sweep.metric,
        mode=sweep.mode,
        values_change=values_change,
    )


@contextmanager
def treat_sigterm_as_sigint() -> Iterator[None]:
    """Raise SIGINT if a cluster's scheduler sends SIGTERM. Tune ends an experiment properly on SIGINT."""
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
