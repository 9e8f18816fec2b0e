"""A user's tracker is one file outside the package, named in the job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tree
from support.outcomes import read_theta

import distmeta
from distmeta.config.job import Job
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.tracking import background

JSON_LINES = '''
import json
from pathlib import Path


class JsonLines:
    """Appends each step to a file, as a line of JSON."""

    def __init__(self, run, path: str, digits: int = 4):
        self.run_id = run.run_id or run.name
        self.path = Path(path)
        self.digits = digits
        self.last_step = 0

    def open(self):
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                self.last_step = max(self.last_step, json.loads(line)["step"])

    def log_step(self, record):
        values = {name: round(value, self.digits) for name, value in record.values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": record.step, **values}) + "\\n")

    def log_artifact(self, path, folder):
        pass

    def close(self, status):
        self.path.with_suffix(".status").write_text(status)
'''


@pytest.fixture
def job_dict(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A small job with the user's tracker, whose module is in the working folder."""
    monkeypatch.syspath_prepend(str(workplace))
    (workplace / "json_lines.py").write_text(JSON_LINES)
    settings = {"steps": 6, "name": "mine", "eval_every": 3, "eval_tasks": 5, "checkpoint_every": 3}
    return tree("maml", run=settings) | {"tracking": {"type": "json_lines:JsonLines", "path": "steps.jsonl"}}


def read_lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_own_tracker_gets_every_step_once_also_after_a_resume(job_dict: dict[str, Any]) -> None:
    run = distmeta.train(Job.parse(job_dict)).run
    lines = read_lines("steps.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"loss_after", "grad_norm"} <= set(lines[0])
    assert [line["step"] for line in lines if "val_loss_after" in line] == [3, 6]
    assert Path("steps.status").read_text() == "FINISHED"
    assert checkpoints.load(run).progress.tracking_ids == {"json_lines:JsonLines": "mine"}

    # as if the process had been killed after step 6 was sent and before it was saved
    (run / "checkpoints" / "latest").write_text("step-00000003\n")
    distmeta.train(Job.load(run / "job.yaml", ["run.steps=8"]), resume=run)
    again = read_lines("steps.jsonl")
    assert [line["step"] for line in again] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert again[:6] == lines


def test_own_tracker_gets_what_an_earlier_process_did_not_send(job_dict: dict[str, Any]) -> None:
    run = distmeta.train(Job.parse(job_dict)).run
    lines = Path("steps.jsonl").read_text().splitlines(keepends=True)
    Path("steps.jsonl").write_text("".join(lines[:2]))
    distmeta.train(Job.load(run / "job.yaml", ["run.steps=7"]), resume=run)
    assert [line["step"] for line in read_lines("steps.jsonl")] == [1, 2, 3, 4, 5, 6, 7]


def test_several_trackers_each_get_every_step(job_dict: dict[str, Any]) -> None:
    job_dict["tracking"] = [
        {"type": "json_lines:JsonLines", "path": "a.jsonl"},
        {"type": "json_lines:JsonLines", "path": "b.jsonl", "digits": 1},
        {"type": "none"},
    ]
    run = distmeta.train(Job.parse(job_dict)).run
    for path in ("a.jsonl", "b.jsonl"):
        assert [line["step"] for line in read_lines(path)] == [1, 2, 3, 4, 5, 6]
    ids = checkpoints.load(run).progress.tracking_ids
    assert ids == {"json_lines:JsonLines": "mine", "json_lines:JsonLines-2": "mine"}


def test_options_of_an_own_tracker_are_checked(job_dict: dict[str, Any]) -> None:
    job_dict["tracking"]["digits"] = "four"
    with pytest.raises(InputError, match=r"^tracking\.digits: got 'four'"):
        Job.parse(job_dict)
    job_dict["tracking"] = {"type": "json_lines:JsonLines", "paht": "x"}
    with pytest.raises(InputError, match=r"^tracking\.paht: unknown key"):
        Job.parse(job_dict)


def test_a_tracker_with_a_bug_does_not_change_the_training(
    job_dict: dict[str, Any], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = distmeta.train(Job.parse(job_dict)).run
    monkeypatch.setattr(background, "CLOSE_SECONDS", 0.5)
    broken = JSON_LINES.replace("values = {", "values = undefined_name or {").replace("JsonLines", "Broken")
    (workplace / "broken_tracker.py").write_text(broken)
    job_dict["tracking"]["type"] = "broken_tracker:Broken"
    job_dict["tracking"]["path"] = "broken.jsonl"
    job_dict["run"]["name"] = "broken"
    shaken = distmeta.train(Job.parse(job_dict)).run
    assert not Path("broken.jsonl").exists()
    assert read_theta(shaken) == read_theta(calm)
