"""Checkpoints: safetensors and JSON, written completely or not at all. Loading one never unpickles anything.

RUN/checkpoints/step-00000200/   theta, constants and optimizer as .safetensors; state.json
RUN/checkpoints/latest, best     text files of one line: the name of a checkpoint
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from distmeta.errors import InputError
from distmeta.files import flush_to_disk, write_atomically
from distmeta.protocols import Theta
from distmeta.runtime.remote_copy import fetch_checkpoint, is_uri

FORMAT = 4
"""Version of the layout. Checkpoints of another version are refused."""


@dataclass(frozen=True)
class Progress:
    """How far a run is, besides theta and the optimizer."""

    step: int
    """Completed steps."""
    loss: float | None = None
    """Mean query loss after adaptation in the last step."""
    best: float | None = None
    """Best validation score so far."""
    best_step: int | None = None
    stale: int = 0
    """Evaluations since the best one."""
    pending: dict[str, Any] | None = None
    """The record of the last step, as long as its evaluation is still to come."""
    tracking_ids: dict[str, str] = field(default_factory=dict)
    """The run's id in each tracker's store, by the tracker's name (`tracking.trackers.name_trackers`)."""

    @property
    def last_recorded_step(self) -> int:
        """The last step that has a line in metrics.jsonl."""
        return self.step if self.pending is None else self.step - 1


class TrainingState(NamedTuple):
    """theta and the state of the outer optimizer, in one form for all strategies."""

    theta: Theta
    optimizer: dict[str, torch.Tensor]
    """`<parameter>/<quantity>`."""
    outer: dict[str, Any]
    """The schedule's clock, as plain data."""


@dataclass(frozen=True)
class Checkpoint:
    """A run's state after a step, and the job that it belongs to."""

    job: dict[str, Any]
    theta: Theta
    constants: dict[str, torch.Tensor]
    """The model's frozen parameters and buffers."""
    optimizer: dict[str, torch.Tensor]
    outer: dict[str, Any]
    progress: Progress
    examples: dict[str, Any] | None = None
    """What the tasks' examples are like, for using the learner without the tasks' data."""
    data: str | None = None
    """The fingerprint of the tasks' data."""

    @property
    def state(self) -> TrainingState:
        return TrainingState(self.theta, self.optimizer, self.outer)


class SaveError(RuntimeError):
    """The run folder cannot be written to. Usually the disk is full."""

    def __init__(self, message: str):
        super().__init__(message)  # a constructor with one argument survives pickling


def save(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint, let `latest` (and `best`, if it is) name it, and delete all but the last `keep` and the best.

    Returns:
        The checkpoint's folder, RUN/checkpoints/step-….

    Raises:
        SaveError: it could not be written. The last checkpoint is unchanged.
    """
    folder = run / "checkpoints"
    final = folder / f"step-{checkpoint.progress.step:08d}"
    part = folder / f".writing-{final.name}"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _write_files(part, checkpoint)
        _move_into_place(part, final)
        set_pointer(run, "latest", final.name)
        if checkpoint.progress.best_step == checkpoint.progress.step:
            set_pointer(run, "best", final.name)
        _delete_old(folder, keep)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        latest = folder / "latest"
        kept = latest.read_text().strip() if latest.exists() else "none"
        raise SaveError(
            f"{folder}: step {checkpoint.progress.step} cannot be saved ({error}); the last complete checkpoint is "
            f"{kept}: make room, then distmeta train --resume {run}"
        ) from error
    return final


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    constants = {name: value.contiguous() for name, value in checkpoint.constants.items()}
    save_file(dict(checkpoint.theta), folder / "theta.safetensors")
    save_file(constants, folder / "constants.safetensors")
    save_file(checkpoint.optimizer, folder / "optimizer.safetensors")
    checksums = {}
    for path in sorted(folder.iterdir()):
        checksums[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        flush_to_disk(path)
    state = {
        "format": FORMAT,
        "progress": asdict(checkpoint.progress),
        "outer": checkpoint.outer,
        "examples": checkpoint.examples,
        "data": checkpoint.data,
        "sha256": checksums,
        "job": checkpoint.job,
    }
    with (folder / "state.json").open("w") as file:
        json.dump(state, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    flush_to_disk(folder)


def _move_into_place(part: Path, final: Path) -> None:
    """Rename a written checkpoint. One of the same step, from before an evaluation or an interruption, is replaced."""
    old = final.with_name(f".old-{final.name}")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(part, final)
    flush_to_disk(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _delete_old(folder: Path, keep: int) -> None:
    best = folder / "best"
    best_name = best.read_text().strip() if best.exists() else None
    names = sorted(path.name for path in folder.glob("step-*"))
    for name in names[:-keep]:
        if name != best_name:
            shutil.rmtree(folder / name)


def set_pointer(run: Path, name: str, target: str) -> None:
    """Let RUN/checkpoints/`name` ("latest" or "best") name a checkpoint."""
    write_atomically(run / "checkpoints" / name, target + "\n")


def clear(run: Path) -> None:
    """Delete what a killed process left unfinished. Call it with the lock on the run folder."""
    for old in (run / "checkpoints").glob(".old-step-*"):
        final = old.with_name(old.name.removeprefix(".old-"))
        if final.exists():  # complete, because it was moved there by a rename
            shutil.rmtree(old)
        else:
            os.rename(old, final)
    for path in [*run.glob(".writing-*"), *(run / "checkpoints").glob(".writing-*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def rewind(run: Path, step: int, best_step: int | None) -> None:
    """Delete the checkpoints after `step`, and let `latest` and `best` name what is left."""
    folder = run / "checkpoints"
    for path in sorted(folder.glob("step-*")):
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    if (folder / f"step-{step:08d}").exists():
        set_pointer(run, "latest", f"step-{step:08d}")
    if best_step is not None and (folder / f"step-{best_step:08d}").exists():
        set_pointer(run, "best", f"step-{best_step:08d}")
    else:
        (folder / "best").unlink(missing_ok=True)


def forget_trackers(checkpoint: Path) -> None:
    """Make a run that resumes from this checkpoint open new runs in its trackers."""
    _change_tracking_ids(checkpoint, lambda ids: {})


def add_tracking_ids(checkpoint: Path, new_ids: Mapping[str, str]) -> bool:
    """Make a run that resumes from this checkpoint continue these runs of its trackers. Return whether any is new."""
    return _change_tracking_ids(checkpoint, lambda ids: {**ids, **new_ids})


def _change_tracking_ids(checkpoint: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> bool:
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    ids = state["progress"]["tracking_ids"]
    changed_ids = change(ids)
    if changed_ids == ids:
        return False
    state["progress"]["tracking_ids"] = changed_ids
    write_atomically(path, json.dumps(state, indent=1))
    return True


def find(path: str | Path) -> Path:
    """Return the folder of a checkpoint.

    Args:
        path: a checkpoint, a run (its latest checkpoint), RUN/checkpoints/latest or RUN/checkpoints/best.

    Raises:
        InputError: there is none.
    """
    path = Path(path)
    if (path / "state.json").is_file():
        return path
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints" / "latest"
    if path.is_file() and path.name in ("latest", "best"):
        name = path.read_text().strip()
        target = path.parent / name
        if name and "/" not in name and (target / "state.json").is_file():
            return target
        raise InputError(f"{path}: names {name!r}, which is not a checkpoint beside it")
    raise InputError(f"{path}: got no checkpoint, expected a run folder or RUN/checkpoints/step-…")


def load_newest_intact(path: str | Path, report: Callable[[str], None]) -> tuple[Path, Checkpoint]:
    """Load the checkpoint that a path names. For a run or its `latest`, skip damaged checkpoints.

    A checkpoint that is named itself is loaded or refused.

    Returns:
        The checkpoint's folder and the checkpoint.

    Raises:
        InputError: the named checkpoint is damaged, or the run has no intact one.
    """
    path = Path(path)
    is_run = (path / "checkpoints").is_dir()
    try:
        return find(path), load(path)
    except InputError as error:
        if not is_run and path.name != "latest":
            raise
        damage = str(error)
    folder = path / "checkpoints" if is_run else path.parent
    # a checkpoint is `.old-` while its successor of the same step takes its place
    candidates = [*folder.glob("step-*"), *folder.glob(".old-step-*")]
    candidates.sort(key=lambda candidate: candidate.name.removeprefix(".old-"), reverse=True)
    for candidate in candidates:
        try:
            checkpoint = load(candidate)
        except InputError:
            continue
        report(f"skipping a damaged checkpoint: {damage}")
        report(f"continuing from step {checkpoint.progress.step}, the last complete checkpoint")
        return candidate, checkpoint
    raise InputError(damage)


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint and compare every file with its checksum.

    Args:
        path: as in `find`, or such a path behind a URI.

    Raises:
        InputError: there is no checkpoint, or it is damaged or of another format.
    """
    if is_uri(path):
        with tempfile.TemporaryDirectory() as scratch:
            return load(fetch_checkpoint(str(path), Path(scratch)))
    folder = find(path)
    try:
        state = json.loads((folder / "state.json").read_text())
        if state["format"] != FORMAT:
            raise InputError(f"{folder}: checkpoint format {state['format']}, expected {FORMAT}")
        for name, checksum in state["sha256"].items():
            if hashlib.sha256((folder / Path(name).name).read_bytes()).hexdigest() != checksum:
                raise InputError(
                    f"{folder}: {name} is damaged (its checksum differs): use an older checkpoint"
                )
        return Checkpoint(
            job=state["job"],
            theta=load_file(folder / "theta.safetensors"),
            constants=load_file(folder / "constants.safetensors"),
            optimizer=load_file(folder / "optimizer.safetensors"),
            outer=state["outer"],
            progress=_parse_progress(state["progress"]),
            examples=state["examples"],
            data=None if state["data"] is None else str(state["data"]),
        )
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(f"{folder}: not a complete checkpoint ({type(error).__name__}: {error})") from None


def _parse_progress(plain: Any) -> Progress:
    """Return the progress in a state file. Raises ValueError if no run can have written it."""
    progress = TypeAdapter(Progress).validate_json(json.dumps(plain), strict=True)
    pending = progress.pending
    if not 0 <= progress.step < 2**63 or (pending is not None and pending.get("step") != progress.step):
        raise ValueError("no run can have this progress")
    return progress
