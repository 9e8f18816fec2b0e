"""Checkpoints: safetensors and JSON, written whole or not at all. Loading one never unpickles anything.

RUN/checkpoints/step-00000200/   theta, constants and optimizer as .safetensors; state.json
RUN/checkpoints/latest, best     one-line text files with a folder's name
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
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

FORMAT = 3


@dataclass(frozen=True)
class Progress:
    """Where a run stands, besides theta and the optimizer."""

    step: int
    loss: float | None = None
    """Mean query loss after adaptation in the last step."""
    best: float | None = None
    """Best validation figure so far."""
    best_step: int | None = None
    stale: int = 0
    """Evaluations since the best one."""
    pending: dict[str, Any] | None = None
    """The last step's record, while its evaluation is still to come."""
    tracking_id: str | None = None


class TrainingState(NamedTuple):
    """theta and the outer optimizer: one format, whoever held which part of them."""

    theta: Theta
    optimizer: dict[str, torch.Tensor]
    """`<parameter>/<quantity>`."""
    outer: dict[str, Any]
    """The schedule's clock, as plain data."""


@dataclass(frozen=True)
class Checkpoint:
    """A run's state after a step, and the job it belongs to."""

    job: dict[str, Any]
    theta: Theta
    constants: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    outer: dict[str, Any]
    progress: Progress
    examples: dict[str, Any] | None = None
    """What the tasks' examples are (`runtime.problem.examples_of`), for use without their data."""
    data: str | None = None
    """The fingerprint of the data that the tasks are drawn from."""

    @property
    def state(self) -> TrainingState:
        return TrainingState(self.theta, self.optimizer, self.outer)


class SaveError(RuntimeError):
    """The run folder cannot be written to: a full disk, most of the time."""

    def __init__(self, message: str):
        super().__init__(message)  # one argument: survives pickling


def save(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes RUN/checkpoints/step-…, then points `latest` at it, then deletes all but the last `keep` and the best.

    Raises:
        SaveError: it could not be written; the last one is as it was.
    """
    folder = run / "checkpoints"
    part = folder / f".writing-step-{checkpoint.progress.step:08d}"
    try:
        return _save(run, folder, part, checkpoint, keep)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        latest = folder / "latest"
        kept = latest.read_text().strip() if latest.exists() else "none"
        raise SaveError(
            f"{folder}: step {checkpoint.progress.step} cannot be saved ({error}); the last whole checkpoint is "
            f"{kept}: make room, then distmeta train --resume {run}"
        ) from error


def _save(run: Path, folder: Path, part: Path, checkpoint: Checkpoint, keep: int) -> Path:
    final = folder / f"step-{checkpoint.progress.step:08d}"
    old = folder / f".old-{final.name}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _write(part, checkpoint)
    if final.exists():  # saved before its evaluation, or before an interruption
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(part, final)
    flush_to_disk(folder)
    shutil.rmtree(old, ignore_errors=True)
    point(run, "latest", final.name)
    if checkpoint.progress.best_step == checkpoint.progress.step:
        point(run, "best", final.name)
    _prune(folder, keep)
    return final


def point(run: Path, name: str, target: str) -> None:
    """Makes RUN/checkpoints/NAME, a text file, say `target`; at once or not at all."""
    write_atomically(run / "checkpoints" / name, target + "\n")


def clear(run: Path) -> None:
    """Deletes what a process that was killed left half-done; the run folder has one writer, so nobody is at it."""
    for old in (run / "checkpoints").glob(".old-step-*"):
        final = old.with_name(old.name.removeprefix(".old-"))
        if final.exists():  # renamed there as a whole
            shutil.rmtree(old)
        else:
            os.rename(old, final)
    for path in [*run.glob(".writing-*"), *(run / "checkpoints").glob(".writing-*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def rewind(run: Path, step: int, best_step: int | None) -> None:
    """Drops the checkpoints after a step that a run goes on from; `latest` and `best` then point at what is left."""
    folder = run / "checkpoints"
    for path in sorted(folder.glob("step-*")):
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    if (folder / f"step-{step:08d}").exists():
        point(run, "latest", f"step-{step:08d}")
    if best_step is not None and (folder / f"step-{best_step:08d}").exists():
        point(run, "best", f"step-{best_step:08d}")
    else:
        (folder / "best").unlink(missing_ok=True)


def untrack(checkpoint: Path) -> None:
    """Makes a checkpoint go on in a new MLflow run."""
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    state["progress"]["tracking_id"] = None
    write_atomically(path, json.dumps(state, indent=1))


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    save_file(dict(checkpoint.theta), folder / "theta.safetensors")
    save_file({n: v.contiguous() for n, v in checkpoint.constants.items()}, folder / "constants.safetensors")
    save_file(checkpoint.optimizer, folder / "optimizer.safetensors")
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        flush_to_disk(path)
    state = {
        "format": FORMAT,
        "progress": asdict(checkpoint.progress),
        "outer": checkpoint.outer,
        "examples": checkpoint.examples,
        "data": checkpoint.data,
        "sha256": files,
        "job": checkpoint.job,
    }
    with (folder / "state.json").open("w") as file:
        json.dump(state, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    flush_to_disk(folder)


def find(path: str | Path) -> Path:
    """The checkpoint folder that a path means: a checkpoint, RUN (its latest), RUN/checkpoints/latest or …/best.

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


def load_whole(path: str | Path, say: Callable[[str], None]) -> tuple[Path, Checkpoint]:
    """The checkpoint that a path means, and its folder; where that one is damaged, the newest whole one of its run.

    A checkpoint that is named itself is taken or refused; RUN and its `latest` mean the last state there is.

    Raises:
        InputError: no whole one is left.
    """
    path = Path(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path.parent
    if folder == path.parent and path.name != "latest":
        return find(path), load(path)
    try:
        return find(path), load(path)
    except InputError as error:
        damaged = str(error)
    # `.old-` is a checkpoint whose successor of the same step was about to take its place
    found = [*folder.glob("step-*"), *folder.glob(".old-step-*")]
    for candidate in sorted(found, key=lambda f: f.name.removeprefix(".old-"), reverse=True):
        try:
            checkpoint = load(candidate)
        except InputError:
            continue
        say(f"passed over: {damaged}")
        say(f"going on from step {checkpoint.progress.step}, the last whole checkpoint")
        return candidate, checkpoint
    raise InputError(damaged)


def load(path: str | Path) -> Checkpoint:
    """Reads a checkpoint, also behind a URI, and checks every file against its checksum.

    Raises:
        InputError: no checkpoint, a truncated one, one of another format.
    """
    if is_uri(path):
        with tempfile.TemporaryDirectory() as scratch:
            return load(fetch_checkpoint(str(path), Path(scratch)))
    folder = find(path)
    try:
        state = json.loads((folder / "state.json").read_text())
        if state["format"] != FORMAT:
            raise InputError(f"{folder}: checkpoint format {state['format']}, expected {FORMAT}")
        for name, digest in state["sha256"].items():
            if hashlib.sha256((folder / Path(name).name).read_bytes()).hexdigest() != digest:
                raise InputError(
                    f"{folder}: {name} is damaged (its checksum differs): use an older checkpoint"
                )
        return Checkpoint(
            state["job"],
            load_file(folder / "theta.safetensors"),
            load_file(folder / "constants.safetensors"),
            load_file(folder / "optimizer.safetensors"),
            state["outer"],
            _progress(state["progress"]),
            state["examples"],
            None if state["data"] is None else str(state["data"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder}: not a whole checkpoint ({type(error).__name__}: {error})") from None


def _progress(plain: Any) -> Progress:
    """Raises ValueError where it cannot be a run's: the file may be anybody's."""
    progress = TypeAdapter(Progress).validate_json(json.dumps(plain), strict=True)
    pending = progress.pending
    if not 0 <= progress.step < 2**63 or (pending is not None and pending.get("step") != progress.step):
        raise ValueError("a progress that no run makes")
    return progress


def _prune(folder: Path, keep: int) -> None:
    best = folder / "best"
    kept = {best.read_text().strip()} if best.exists() else set()
    steps = sorted(path.name for path in folder.glob("step-*"))
    for name in steps[:-keep]:
        if name not in kept:
            shutil.rmtree(folder / name)
