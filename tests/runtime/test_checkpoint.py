"""Checkpoints: complete or not there, found by every path, and never code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.runtime.checkpoint import Checkpoint, Progress


def make_checkpoint(step: int, best_step: int | None = None) -> Checkpoint:
    theta = {"model.w": torch.full((3,), float(step))}
    moments = {"model.w/exp_avg": torch.ones(3)}
    progress = Progress(step, best_step=best_step)
    return Checkpoint({"name": "x"}, theta, {"mean": torch.zeros(2)}, moments, {"clock": 7}, progress)


def test_loaded_checkpoint_equals_the_saved_one(tmp_path: Path) -> None:
    folder = checkpoints.save(tmp_path, make_checkpoint(7), keep=3)
    assert folder.name == "step-00000007"
    loaded = checkpoints.load(folder)
    assert loaded.progress == Progress(7)
    assert torch.equal(loaded.theta["model.w"], torch.full((3,), 7.0))
    assert set(loaded.constants) == {"mean"}
    assert set(loaded.optimizer) == {"model.w/exp_avg"}


def test_checkpoint_is_found_by_every_path(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, make_checkpoint(1, best_step=1), keep=3)
    last = checkpoints.save(tmp_path, make_checkpoint(2, best_step=1), keep=3)
    folder = tmp_path / "checkpoints"
    assert checkpoints.find(tmp_path) == checkpoints.find(folder / "latest") == checkpoints.find(last) == last
    assert checkpoints.find(folder / "best").name == "step-00000001"
    assert (folder / "best").read_text() == "step-00000001\n"


def test_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        checkpoints.save(tmp_path, make_checkpoint(step, best_step=1), keep=2)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == ["step-00000001", "step-00000005", "step-00000006"]


@pytest.mark.parametrize("name", ["theta", "optimizer", "constants"])
def test_damaged_file_is_one_clear_error(name: str, tmp_path: Path) -> None:
    folder = checkpoints.save(tmp_path, make_checkpoint(3), keep=3)
    path = folder / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match=rf"{name}.safetensors is damaged") as caught:
        checkpoints.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1, "sha256": 3}', "\x00"]
)
def test_bad_state_file_is_one_clear_error(text: str, tmp_path: Path) -> None:
    folder = checkpoints.save(tmp_path, make_checkpoint(3), keep=3)
    (folder / "state.json").write_text(text)
    with pytest.raises(InputError):
        checkpoints.load(tmp_path)


def test_latest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "a", make_checkpoint(3), keep=3)
    checkpoints.save(tmp_path / "b", make_checkpoint(3), keep=3)
    (tmp_path / "a" / "checkpoints" / "latest").write_text("../../b/checkpoints/step-00000003\n")
    with pytest.raises(InputError, match="not a checkpoint beside it"):
        checkpoints.load(tmp_path / "a")


def test_failed_save_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(tmp_path, make_checkpoint(1), keep=3)

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", fail)
    message = r"step 2 cannot be saved .*No space.* is step-00000001: make room"
    with pytest.raises(checkpoints.SaveError, match=message):
        checkpoints.save(tmp_path, make_checkpoint(2), keep=3)
    assert checkpoints.load(tmp_path).progress.step == 1
