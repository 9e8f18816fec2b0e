"""Damaged and hostile input of every kind gives a result or an InputError of one line, and never runs code.

A few hundred examples each; 10,000 by `pytest -m slow tests/fuzz`. tests/fuzz/atheris_fuzz.py is guided by coverage.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.small_files import write_small_episodes, write_small_store

import distmeta
from distmeta.config.job import Job
from distmeta.config.yaml_text import parse_yaml
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.tasks.fixed_episodes import read_episodes
from distmeta.tasks.store import TaskStore

EXAMPLES = pytest.mark.parametrize("examples", [200, pytest.param(10_000, marks=pytest.mark.slow)])


def fuzz(examples: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], Any]) -> None:
    """Run `check` on examples. It may raise only InputErrors of one line."""

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(example: Any) -> None:
        lines = 1
        try:
            check(example)
        except InputError as error:
            lines = len(str(error).splitlines())
        assert lines == 1

    run()


# --- Strategies ---------------------------------------------------------------------------------------------------


@st.composite
def damaged_bytes(draw: Any, data: bytes) -> bytes:
    """The bytes cut short, or with some of them changed, removed or doubled."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, max(len(result) - 1, 0)))
        damage = draw(st.sampled_from(["flip", "zero", "cut", "remove", "double", "random"]))
        length = draw(st.integers(1, 16))
        if damage == "flip" and result:
            result[position] ^= 1 << draw(st.integers(0, 7))
        elif damage == "zero":
            result[position : position + length] = bytes(min(length, len(result) - position))
        elif damage == "cut":
            del result[position:]
        elif damage == "remove":
            del result[position : position + length]
        elif damage == "double":
            result[position:position] = result[position : position + length]
        elif damage == "random":
            result[position : position + length] = draw(st.binary(max_size=16))
    return bytes(result)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats()
JSON = st.recursive(
    SCALARS | st.text(max_size=5) | st.sampled_from(["os:system", "maml"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed_trees(draw: Any, original: dict[str, Any]) -> dict[str, Any]:
    """The tree with something in it replaced, removed or added."""
    result = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        node: Any = result
        while isinstance(node, dict) and node:
            key = draw(st.sampled_from(sorted(node)))
            if not isinstance(node[key], dict) or not node[key] or draw(st.integers(0, 3)) == 0:
                break
            node = node[key]
        if isinstance(node, dict) and node:
            if draw(st.booleans()):
                node[key] = draw(JSON)
            elif draw(st.booleans()):
                del node[key]
            else:
                node[draw(st.text(max_size=5))] = draw(JSON)
    return result


SECTIONS = ["name", "seed", "model", "tasks", "algorithm", "outer", "run", "compute", "tracking", "output"]
OPTIONS = ["type", "hidden", "shots", "inner_lr", "inner_steps", "lr", "betas", "rates", "schedule", "steps"]
KEYS = st.sampled_from([*SECTIONS, *OPTIONS, "final", "shards"])
LEAVES = SCALARS | st.text(max_size=8) | st.dates()
LEAVES |= st.sampled_from(["mlp", "maml", "sinusoid", "os:sep", "linear", 10**400])
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYS | st.text(max_size=3) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)
DOTTED_KEYS = st.lists(KEYS | st.text(max_size=2), min_size=1, max_size=3).map(".".join)


# --- Jobs ---------------------------------------------------------------------------------------------------------


@EXAMPLES
def test_damaged_job_file_gives_one_line(examples: int) -> None:
    text = yaml.safe_dump(tree(run={"workers": {"min": 1, "max": 2}})).encode()

    def parse(data: bytes) -> None:
        Job.parse(parse_yaml(data.decode(errors="replace"), "file"))

    fuzz(examples, damaged_bytes(text), parse)
    fuzz(examples, changed_trees(tree()), Job.parse)


@EXAMPLES
def test_any_text_as_job_file_gives_one_line(examples: int) -> None:
    texts = st.text() | st.text(" \n:-[]{}#&*!|>'\"%@`,?=.0159eEabxyn~<", max_size=40)
    fuzz(examples, texts, lambda text: Job.parse(parse_yaml(text, "file")))


@EXAMPLES
def test_any_tree_as_job_gives_one_line(examples: int) -> None:
    sections = st.dictionaries(KEYS, TREES, max_size=3)

    def merge_sections(changes: dict[str, Any]) -> None:
        """Parse a valid job with additional keys in its sections."""
        job: dict[str, Any] = tree()
        for key, value in changes.items():
            if isinstance(job.get(key), dict) and isinstance(value, dict):
                job[key] = job[key] | value
        Job.parse(job)

    fuzz(examples, TREES, Job.parse)
    fuzz(examples, sections, lambda changes: Job.parse(tree() | changes))
    fuzz(examples, sections, merge_sections)


@EXAMPLES
def test_any_override_gives_one_line(examples: int) -> None:
    texts = st.text(max_size=30) | st.builds("{}={}".format, DOTTED_KEYS, st.text())
    fuzz(examples, st.lists(texts, min_size=1, max_size=2), lambda words: Job.parse(tree(), words))


def test_aliases_of_aliases_are_counted_without_writing_them_out() -> None:
    list_bomb = "a0: &a0 [x, x]\n"
    merge_bomb = "a0: &a0 {x: 1}\n"
    for i in range(1, 40):
        aliases = ", ".join([f"*a{i - 1}"] * 9)
        list_bomb += f"a{i}: &a{i} [{aliases}]\n"
        merge_bomb += f"a{i}: &a{i} {{<<: [{aliases}]}}\n"
    for text in (list_bomb, merge_bomb):
        with pytest.raises(
            InputError, match=r"file: .* keys and values with its aliases written out, expected at most"
        ):
            parse_yaml(text, "file")
    assert parse_yaml("a: &a [1]\nb: *a", "file") == {"a": [1], "b": [1]}


# --- Data ---------------------------------------------------------------------------------------------------------


@EXAMPLES
def test_damaged_store_gives_one_line(examples: int, tmp_path: Path) -> None:
    whole = write_small_store(tmp_path)
    path = tmp_path / "store.arrow"

    def check(data: bytes) -> None:
        path.unlink(missing_ok=True)  # the last one may still be mapped
        path.write_bytes(data)
        store = TaskStore.open(str(path))
        assert store.images.sum() >= 0
        assert len(store.images) == sum(store.counts)

    fuzz(examples, damaged_bytes(whole.read_bytes()), check)


@EXAMPLES
def test_damaged_episode_file_gives_one_line(examples: int, tmp_path: Path) -> None:
    whole = write_small_episodes(tmp_path)
    path = tmp_path / "episodes.parquet"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        for episode in read_episodes(str(path), (2,)):
            assert episode.support.x.isfinite().all()

    fuzz(examples, damaged_bytes(whole.read_bytes()), check)


# --- Checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(workplace: Path) -> Path:
    return distmeta.train(Job.parse(tree("maml", run={"steps": 2, "name": "whole"}))).run


def load_quietly(path: Path) -> None:
    distmeta.load(path, report=lambda text: None)


@EXAMPLES
def test_damaged_checkpoint_gives_one_line(examples: int, run: Path, workplace: Path) -> None:
    """Checksums find the damage."""
    whole = checkpoints.find(run)
    copy = workplace / "copy"
    shutil.copytree(whole, copy)

    def load_damaged(example: tuple[str, bytes]) -> None:
        name, data = example
        (copy / name).write_bytes(data)
        try:
            load_quietly(copy)
        finally:
            shutil.copy(whole / name, copy / name)

    names = sorted(path.name for path in whole.iterdir())
    for name in names:
        damaged_files = st.tuples(st.just(name), damaged_bytes((whole / name).read_bytes()))
        fuzz(examples // len(names), damaged_files, load_damaged)


@EXAMPLES
def test_forged_checkpoint_gives_one_line(examples: int, run: Path) -> None:
    """The checksums are right, so the content has to be checked."""
    path = checkpoints.find(run)
    theta = (path / "theta.safetensors").read_bytes()
    state = json.loads((path / "state.json").read_text())

    def load_forged(example: tuple[dict[str, Any], bytes]) -> None:
        state, theta = example
        (path / "theta.safetensors").write_bytes(theta)
        if isinstance(state.get("sha256"), dict):
            state["sha256"]["theta.safetensors"] = hashlib.sha256(theta).hexdigest()
        (path / "state.json").write_text(json.dumps(state))
        load_quietly(path)

    fuzz(examples, st.tuples(changed_trees(state), st.just(theta) | damaged_bytes(theta)), load_forged)


@EXAMPLES
def test_resume_from_forged_checkpoint_gives_one_line(examples: int, run: Path) -> None:
    path = checkpoints.find(run) / "state.json"
    state = json.loads(path.read_text())
    job = Job.load(run / "job.yaml")
    forged = {key: state[key] for key in ("outer", "progress", "examples", "format")}

    def resume(changes: dict[str, Any]) -> None:
        path.write_text(json.dumps({"job": state["job"], "sha256": state["sha256"], **changes}))
        distmeta.train(job, resume=path.parent)

    fuzz(examples, changed_trees(forged), resume)


def replace_section(run: Path, section: str, **options: Any) -> Path:
    """Replace a section of the job in a run's checkpoint, and return the checkpoint."""
    path = checkpoints.find(run) / "state.json"
    state = json.loads(path.read_text())
    state["job"][section] = options
    path.write_text(json.dumps(state))
    return path.parent


@pytest.mark.parametrize(
    ("section", "options"),
    [
        ("tasks", {"type": "os:system", "command": "touch harmed"}),
        ("model", {"type": "subprocess:Popen", "args": ["touch", "harmed"]}),
        ("model", {"type": "subprocess:check_output"}),
        ("algorithm", {"type": "pathlib:Path"}),
        ("tasks", {"type": "builtins:exec"}),
        ("model", {"type": "builtins:eval"}),
    ],
)
def test_checkpoint_of_a_stranger_calls_only_classes_of_the_right_kind(
    section: str, options: dict[str, Any], run: Path, workplace: Path
) -> None:
    checkpoint = replace_section(run, section, **options)
    reported: list[str] = []
    with pytest.raises(InputError, match=rf"^{section}.type: the checkpoint names .*, expected a"):
        distmeta.load(checkpoint, report=reported.append)
    module = options["type"].partition(":")[0]
    assert reported == [f"importing {module}, which the checkpoint names for its {section}"]
    assert not list(workplace.glob("harmed"))


def test_user_can_replace_a_part_of_a_checkpoint(run: Path) -> None:
    from distmeta.models.mlp import MLP

    checkpoint = replace_section(run, "model", type="nowhere:Net", hidden=[16, 16], activation="tanh")
    with pytest.raises(InputError, match=r"^model.type: cannot import 'nowhere'"):
        distmeta.load(checkpoint)
    adapted = distmeta.load(checkpoint, model=MLP).adapt([[0.0], [1.0]], [[0.0], [1.0]])
    assert adapted([[0.5]]).shape == (1, 1)
