"""Every shipped job trains two steps and is evaluated. At full length by hand (`pytest -m slow`)."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY
from support.small_texts import BERT, write_texts, write_tokenizer

import distmeta
from distmeta.config.job import Job

FOLDER = REPOSITORY / "jobs"
JOBS = sorted(FOLDER.glob("*.yaml"))
OMNIGLOT = Path(os.environ.get("DISTMETA_OMNIGLOT", REPOSITORY.parent / "shared" / "data" / "omniglot"))
SMALL = [
    "run.steps=2",
    "run.workers=0",
    "run.eval_tasks=4",
    "run.eval_inner_steps=2",
    "tracking.type=none",
    "compute.compile=false",  # takes a minute; tests/conformance/test_compiled.py tests it
]


@pytest.fixture(scope="session")
def omniglot_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task store of the real data, built once."""
    if not OMNIGLOT.is_dir():
        pytest.skip(f"no Omniglot data in {OMNIGLOT} (set DISTMETA_OMNIGLOT)")
    from distmeta.data.omniglot import build_omniglot

    path = tmp_path_factory.mktemp("data") / "omniglot.arrow"
    built = build_omniglot(str(OMNIGLOT), str(path))
    assert (built["classes"], built["examples"]) == (242, 4840)
    return path


def shrink_job(job: Job, request: pytest.FixtureRequest) -> list[str]:
    """Return overrides that make a shipped job small."""
    overrides = list(SMALL)
    if job.tasks.type == "arrow":
        overrides.append(f"tasks.path={request.getfixturevalue('omniglot_store')}")
        overrides += ["run.tasks_per_step=2", "run.shards=1"]
        if job.model.type == "conv4":
            overrides.append("model.width=16")
    if job.tasks.type == "texts":
        overrides += shrink_texts(request)
    if "trajectories" in job.tasks.options:
        overrides += ["tasks.trajectories=3", "tasks.horizon=10"]
    return overrides


def shrink_texts(request: pytest.FixtureRequest) -> list[str]:
    """Return overrides with which a job of texts needs neither Debian's fortunes nor a trained encoder."""
    pytest.importorskip("transformers", reason="needs the extra hf")
    folder = request.getfixturevalue("tmp_path")
    config = ", ".join(f"{key}: {value}" for key, value in BERT.items())
    return [
        f"tasks.path={write_texts(folder / 'texts')}",
        f"tasks.tokenizer={write_tokenizer(folder / 'tokenizer')}",
        "tasks.ways=2",
        "tasks.shots=2",
        "tasks.queries=3",
        "tasks.max_length=8",
        "tasks.test=3",
        "tasks.val=2",
        "model.name=null",
        f"model.config={{{config}}}",
    ]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_job_trains_two_steps(path: Path, workplace: Path, request: pytest.FixtureRequest) -> None:
    job = Job.load(path)
    assert job.name == path.stem
    if job.tasks.type == "gym":
        pytest.importorskip("mujoco", reason="needs the extra rl")
    run = distmeta.train(Job.load(path, shrink_job(job, request))).run
    evaluation_overrides = []
    if job.tasks.options.get("test", 1) is None:  # the job trains on all classes
        evaluation_overrides = ["tasks.split_by=group", "tasks.test=[Sanskrit]"]
    figures = distmeta.evaluate(run, evaluation_overrides).figures
    assert figures["loss_after"] is not None
    adapts = distmeta.load(run).problem.algorithm.inner_steps > 0
    assert (figures["loss_before"] is not None) == adapts


def test_readme_lists_every_job_once() -> None:
    text = (FOLDER / "README.md").read_text()
    linked = re.findall(r"\]\(([\w-]+)\.yaml\)", text)
    assert sorted(linked) == sorted(path.stem for path in JOBS)


def test_tables_of_the_readme_are_not_interrupted() -> None:
    """A blank line ends a table; what follows it would be shown as text with bars."""
    blocks = (FOLDER / "README.md").read_text().split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("|")]
    assert tables
    for lines in tables:
        assert set(lines[1]) <= set("|-: "), lines[0]
        assert len({line.count("|") for line in lines}) == 1, lines[0]


@pytest.mark.slow
@pytest.mark.parametrize(("split", "neighbour"), [("[7, 8, 9]", 0.791)])
def test_digits_maml_beats_the_nearest_neighbour(split: str, neighbour: float, workplace: Path) -> None:
    """1-nearest-neighbour on pixels has 0.784 ± 0.007 on the same tasks (benchmarks/accuracy.py)."""
    overrides = ["tracking.type=none", f"tasks.test_digits={split}"]
    run = distmeta.train(Job.load(FOLDER / "digits-maml.yaml", overrides)).run
    evaluation = distmeta.evaluate(run)
    before = evaluation.figures["accuracy_before"]
    after = evaluation.figures["accuracy_after"]
    assert evaluation.tasks == 600
    assert before is not None
    assert after is not None
    assert evaluation.ci95 is not None
    assert after - evaluation.ci95 > neighbour
    assert after > before + 0.5
