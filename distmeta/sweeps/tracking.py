"""A sweep in its trackers: one run for the sweep, with the trials' runs under it.

This concerns the trackers that provide `GroupsRuns`. With any other tracker the trials are tracked like other runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distmeta.config.job import Job
from distmeta.files import write_atomically
from distmeta.sweeps.results import TrialResult
from distmeta.tracking.interface import GroupsRuns, ReadsEnvironment, Status, TrackedRun
from distmeta.tracking.trackers import NamedTracker, Trackers, name_trackers, open_trackers

IDS_FILE = "sweep/tracking.json"
"""The ids of the sweep's runs, by the tracker's name."""


def open_sweep_run(
    job: Job, folder: Path, report: Callable[[str], None], best: Mapping[str, Any] | None = None
) -> Trackers:
    """Open the sweep's own run in each tracker that groups runs: the existing one, or a new one.

    Args:
        best: the best trial's values, once the sweep has ended. They are added to the job's values, which a store may
            not let change.
    """
    path = folder / IDS_FILE
    known_ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if best is None:
        params = job.to_dict()
    elif best:
        params = {"best": best}
    else:
        params = {}
    run = TrackedRun(
        name=folder.name,
        folder=folder,
        report=report,
        experiment=job.name,
        params=params,
        tags={"distmeta.sweep": str(folder)},
        tables=("trials.json",),
    )
    trackers = open_trackers(grouping_trackers(job), run, known_ids)
    save_ids(folder, trackers)
    return trackers


def grouping_trackers(job: Job) -> dict[str, NamedTracker]:
    """Return the job's trackers that show runs under a parent, by name."""
    named = name_trackers(job.trackers)
    return {name: section for name, section in named.items() if isinstance(section.part, GroupsRuns)}


def save_ids(folder: Path, trackers: Trackers) -> None:
    """Save the ids of the sweep's runs. A slow store may give one late."""
    write_atomically(folder / IDS_FILE, json.dumps(trackers.ids))


def trial_trackers(job: Job, sweep_ids: Mapping[str, str]) -> dict[str, Any] | list[dict[str, Any]]:
    """Return the `tracking` section of the trials' jobs. Their runs are shown under the sweep's."""
    if not job.trackers:
        return {"type": "none"}
    grouping = grouping_trackers(job)
    sections: list[dict[str, Any]] = []
    for name, section in name_trackers(job.trackers).items():
        options = dict(section.options)
        if name in grouping and name in sweep_ids:
            options |= build_unopened(section).child_options(sweep_ids[name])
        sections.append({"type": section.type, **options})
    return sections[0] if len(sections) == 1 else sections


def tracker_environment(job: Job) -> dict[str, str]:
    """Return the environment variables that the job's trackers read."""
    parts = [section.part for section in job.trackers]
    prefixes = tuple(
        prefix for part in parts if isinstance(part, ReadsEnvironment) for prefix in part.environment_prefixes
    )
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}


def finish_tracking(
    job: Job,
    folder: Path,
    trials: Sequence[TrialResult],
    best: TrialResult | None,
    files: Sequence[Path],
    status: Status,
    report: Callable[[str], None],
) -> None:
    """Send the best values and the files to the sweep's run, and to the trials' runs how they ended.

    A trial that was killed could not say that itself: its run is still marked as running.
    """
    best_values: dict[str, Any] = {}
    if best is not None:
        best_values = {**best.values, "trial": best.name, best.metric: best.value}
    trackers = open_sweep_run(job, folder, report, best_values)
    sections = grouping_trackers(job)
    left_running = {
        name: find_running_children(sections[name], sweep_id) for name, sweep_id in trackers.ids.items()
    }
    for path in files:
        trackers.log_artifact(path)
    trackers.close(status)
    for name, section in sections.items():
        by_id = {trial.tracking_ids[name]: trial for trial in trials if name in trial.tracking_ids}
        for run_id in left_running.get(name, set()):
            finish_trial_run({name: section}, job, run_id, by_id.get(run_id), report)
        tag_trial_runs(section, by_id)


def find_running_children(section: NamedTracker, sweep_id: str) -> set[str]:
    """Return the ids of the trials' runs that are still marked as running; none if the store does not answer."""
    try:
        return build_unopened(section).running_children(sweep_id)
    except Exception:  # a tracker may raise anything; the sweep's own run has reported the outage
        return set()


def tag_trial_runs(section: NamedTracker, trials: Mapping[str, TrialResult]) -> None:
    """Set tags with the status of each trial, by its run's id; do nothing if the store does not answer."""
    tags: dict[str, dict[str, str]] = {}
    for run_id, trial in trials.items():
        tags[run_id] = {"distmeta.trial": trial.status}
        if trial.reason:
            tags[run_id]["distmeta.reason"] = trial.reason
    try:
        build_unopened(section).tag_runs(tags)
    except Exception:  # a tracker may raise anything; the sweep's own run has reported the outage
        return


def finish_trial_run(
    sections: Mapping[str, NamedTracker],
    job: Job,
    run_id: str,
    trial: TrialResult | None,
    report: Callable[[str], None],
) -> None:
    """Send the steps that a trial's run lacks, and how the trial ended.

    Args:
        trial: None: the trial continued from another trial's checkpoint, in another run.
    """
    (name,) = sections
    run = TrackedRun(name="", folder=Path(), report=report, experiment=job.name)
    trackers = open_trackers(sections, run, {name: run_id})
    status: Status = "KILLED"
    if trial is not None:
        ends: dict[str, Status] = {"failed": "FAILED", "finished": "FINISHED"}
        status = ends.get(trial.status, "KILLED")
    if trial is not None and trial.run is not None:
        for line in (trial.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            trackers.log_step(json.loads(line))
    trackers.close(status)


def build_unopened(section: NamedTracker) -> GroupsRuns:
    """Build a tracker to ask it about other runs than its own."""
    run = TrackedRun(name="", folder=Path(), report=lambda text: None)
    return section.part(run, **section.options)
