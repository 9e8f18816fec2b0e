"""The wandb tracker with the real package, offline. The test reads the files that `wandb sync` would upload."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tree

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.tracking import background

BLOCK = 32768  # the file is a LevelDB log after a header of 7 bytes
FULL = 1
LAST = 4


@pytest.fixture(autouse=True)
def wandb_environment(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "CLOSE_SECONDS", 60.0)  # wandb.init takes up to 8 s on a busy machine
    monkeypatch.setenv("WANDB_CACHE_DIR", str(workplace / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(workplace / "data"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(workplace / "config"))
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_API_KEY", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)


def make_job(**options: Any) -> dict[str, Any]:
    settings = {"steps": 6, "name": "tracked", "eval_every": 3, "eval_tasks": 5, "checkpoint_every": 3}
    return tree("maml", run=settings) | {"tracking": {"type": "wandb", "mode": "offline", **options}}


def read_records(path: Path) -> Iterator[Any]:
    """Yield the protobuf records of a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    position = 7
    payload = b""
    while position + 7 <= len(data):
        left_in_block = BLOCK - position % BLOCK
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        position += 7
        payload += data[position : position + length]
        position += length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(payload)
            payload = b""
            yield record


def read_history(run: Path) -> list[dict[str, Any]]:
    """Return the logged steps of all offline runs in a run folder, in order of time."""
    history = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        wait_for_exit_record(path)
        for record in read_records(path):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                history.append(
                    {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
                )
    return history


def wait_for_exit_record(path: Path) -> None:
    """Wait until the file is complete: wandb's own process (0.31) writes the end after `finish` has returned."""
    deadline = time.monotonic() + 30
    while not any(record.WhichOneof("record_type") == "exit" for record in read_records(path)):
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.1)


def test_offline_every_step_is_there_once_also_after_a_resume(
    workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = distmeta.train(Job.parse(make_job(project="p"))).run
    history = read_history(run)
    assert [row["_step"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert [row["_step"] for row in history if "val_loss_after" in row] == [3, 6]
    run_id = checkpoints.load(run).progress.tracking_ids["wandb"]
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    assert path.name == f"run-{run_id}.wandb"
    records = {record.WhichOneof("record_type"): record for record in read_records(path)}
    assert records["run"].run.project == "p"
    assert records["run"].run.display_name == "tracked"
    config = {item.key: json.loads(item.value_json) for item in records["run"].run.config.update}
    assert config["algorithm"]["inner_lr"] == 0.05
    assert records["exit"].exit.exit_code == 0
    artifacts = [r.artifact.name for r in read_records(path) if r.WhichOneof("record_type") == "artifact"]
    assert artifacts == [f"job.yaml-{run_id}", f"checkpoint-{run_id}"]

    # as if the process had been killed after step 6 was sent and before it was saved
    (run / "checkpoints" / "latest").write_text("step-00000003\n")
    distmeta.train(Job.load(run / "job.yaml", ["run.steps=8"]), resume=run)
    assert [row["_step"] for row in read_history(run)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert checkpoints.load(run).progress.tracking_ids == {"wandb": run_id}
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert {path.name for path in workplace.iterdir()} <= {"runs", "cache", "data", "config"}


def test_disabled_writes_nothing(workplace: Path) -> None:
    run = distmeta.train(Job.parse(make_job(mode="disabled"))).run
    assert not list(run.glob("wandb/*run-*"))


def test_online_without_a_key_is_an_input_error(workplace: Path) -> None:
    with pytest.raises(InputError, match=r"^tracking: wandb has no API key; run `wandb login`"):
        distmeta.train(Job.parse(make_job(mode="online")))
    assert not Path("runs").exists()


def test_missing_package_is_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"^tracking\.type: wandb .*pip install 'distmeta\[wandb\]'$"):
        distmeta.train(Job.parse(make_job()))
