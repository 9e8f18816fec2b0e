"""Damaged and hostile input of every kind: a result, or an InputError of one line; never a traceback, never code run.

A few hundred examples each here, 10,000 by `pytest -m slow tests/test_fuzz.py`; tests/atheris_fuzz.py goes by
coverage.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import distmeta
from distmeta.config.job import Job
from distmeta.config.yaml_text import parse_yaml
from distmeta.errors import InputError
from distmeta.runtime import checkpoint as checkpoints
from distmeta.tasks.fixed_episodes import read_episodes
from distmeta.tasks.image_preparation import Preparation
from distmeta.tasks.store import Store, write_store

EXAMPLES = pytest.mark.parametrize("examples", [200, pytest.param(10_000, marks=pytest.mark.slow)])


def fuzz(examples: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], Any]) -> None:
    """Runs `check` on examples; it may raise InputErrors of one line, nothing else."""

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


@st.composite
def damage(draw: Any, data: bytes) -> bytes:
    """The bytes cut short, or with some of them changed, taken out or doubled."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(result) - 1, 0)))
        kind, length = (
            draw(st.sampled_from(["flip", "zero", "cut", "take", "double", "random"])),
            draw(st.integers(1, 16)),
        )
        if kind == "flip" and result:
            result[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "zero":
            result[at : at + length] = bytes(min(length, len(result) - at))
        elif kind == "cut":
            del result[at:]
        elif kind == "take":
            del result[at : at + length]
        elif kind == "double":
            result[at:at] = result[at : at + length]
        elif kind == "random":
            result[at : at + length] = draw(st.binary(max_size=16))
    return bytes(result)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["os:system", "maml"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw: Any, plain: dict[str, Any]) -> dict[str, Any]:
    """A tree with something in it replaced, taken out or added."""
    result = json.loads(json.dumps(plain))
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


@EXAMPLES
def test_job_files(examples: int) -> None:
    text = yaml.safe_dump(tree(run={"workers": {"min": 1, "max": 2}})).encode()
    fuzz(examples, damage(text), lambda data: Job.parse(parse_yaml(data.decode(errors="replace"), "file")))
    fuzz(examples, changed(tree()), Job.parse)


KEYS = st.sampled_from(
    ["name", "seed", "model", "tasks", "algorithm", "outer", "run", "compute", "tracking", "output", "type", "hidden",
     "shots", "inner_lr", "inner_steps", "lr", "betas", "rates", "schedule", "steps", "final", "shards"]
)  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
LEAVES |= st.sampled_from(["mlp", "maml", "sinusoid", "os:sep", "linear", 10**400])
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYS | st.text(max_size=3) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)
DOTTED = st.lists(KEYS | st.text(max_size=2), min_size=1, max_size=3).map(".".join)


@EXAMPLES
def test_any_text_as_a_job_file(examples: int) -> None:
    texts = st.text() | st.text(" \n:-[]{}#&*!|>'\"%@`,?=.0159eEabxyn~<", max_size=40)
    fuzz(examples, texts, lambda text: Job.parse(parse_yaml(text, "file")))


@EXAMPLES
def test_any_plain_tree_as_a_job(examples: int) -> None:
    fuzz(examples, TREES, Job.parse)
    fuzz(examples, st.dictionaries(KEYS, TREES, max_size=3), lambda sections: Job.parse(tree() | sections))

    def merged(sections: dict[str, Any]) -> None:
        """With keys of a section's own."""
        whole: dict[str, Any] = tree()
        for key, value in sections.items():
            if isinstance(whole.get(key), dict) and isinstance(value, dict):
                whole[key] = whole[key] | value
        Job.parse(whole)

    fuzz(examples, st.dictionaries(KEYS, TREES, max_size=3), merged)


@EXAMPLES
def test_overrides(examples: int) -> None:
    texts = st.text(max_size=30) | st.builds("{}={}".format, DOTTED, st.text())
    fuzz(examples, st.lists(texts, min_size=1, max_size=2), lambda words: Job.parse(tree(), words))


def test_aliases_of_aliases_are_counted_not_followed() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40)
    )
    merged = "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {{<<: [{f'*a{i - 1}, ' * 9}]}}\n" for i in range(1, 40)
    )
    for text in (bomb, merged):
        with pytest.raises(
            InputError, match=r"file: .* keys and values with its aliases written out, expected at most"
        ):
            parse_yaml(text, "file")
    assert parse_yaml("a: &a [1]\nb: *a", "file") == {"a": [1], "b": [1]}


def small_store(folder: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (9, 1, 4, 4), dtype=np.uint8)
    write_store(
        folder / "whole.arrow", images, ["a", "b", "c"], ["g", "g", "h"], [3, 2, 4], Preparation(size=4)
    )
    return folder / "whole.arrow"


def small_episodes(folder: Path) -> Path:
    columns = {"episode": [0] * 4, "split": ["support", "support", "query", "query"], "label": [3, 5, 3, 5]}
    pq.write_table(pa.table({**columns, "x": [[0.1, 0.2]] * 4}), folder / "whole.parquet")
    return folder / "whole.parquet"


@EXAMPLES
def test_stores(examples: int, tmp_path: Path) -> None:
    whole, path = small_store(tmp_path), tmp_path / "store.arrow"

    def check(data: bytes) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        store = Store.open(str(path))
        assert store.images.sum() >= 0
        assert len(store.images) == sum(store.counts)

    fuzz(examples, damage(whole.read_bytes()), check)


@EXAMPLES
def test_episode_files(examples: int, tmp_path: Path) -> None:
    whole, path = small_episodes(tmp_path), tmp_path / "episodes.parquet"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        for episode in read_episodes(str(path), (2,)):
            assert episode.support.x.isfinite().all()

    fuzz(examples, damage(whole.read_bytes()), check)


@pytest.fixture
def run(workplace: Path) -> Path:
    return distmeta.train(Job.parse(tree("maml", run={"steps": 2, "name": "whole"}))).run


def loads(path: Path) -> None:
    distmeta.load(path, say=lambda text: None)


@EXAMPLES
def test_checkpoints(examples: int, run: Path, workplace: Path) -> None:
    """Damaged files are met by their checksums; a stranger's state that has the right ones is met by its contents."""
    whole, copy = checkpoints.find(run), workplace / "copy"
    shutil.copytree(whole, copy)
    files = sorted(path.name for path in whole.iterdir())

    def damaged(example: tuple[str, bytes]) -> None:
        name, data = example
        (copy / name).write_bytes(data)
        try:
            loads(copy)
        finally:
            shutil.copy(whole / name, copy / name)

    for name in files:
        strategy = damage((whole / name).read_bytes()).map(lambda data, name=name: (name, data))
        fuzz(examples // len(files), strategy, damaged)

    def forged(example: tuple[dict[str, Any], bytes]) -> None:
        state, theta = example
        (copy / "theta.safetensors").write_bytes(theta)
        if isinstance(state.get("sha256"), dict):
            state["sha256"]["theta.safetensors"] = hashlib.sha256(theta).hexdigest()
        (copy / "state.json").write_text(json.dumps(state))
        loads(copy)

    theta = (whole / "theta.safetensors").read_bytes()
    state = json.loads((whole / "state.json").read_text())
    fuzz(examples, st.tuples(changed(state), st.just(theta) | damage(theta)), forged)


@EXAMPLES
def test_resumed_checkpoints(examples: int, run: Path) -> None:
    """What comes from a stranger's optimizer and progress, too."""
    path = checkpoints.find(run) / "state.json"
    state, job = json.loads(path.read_text()), Job.load(run / "job.yaml")
    rest = {key: state[key] for key in ("outer", "progress", "examples", "format")}

    def check(changes: dict[str, Any]) -> None:
        path.write_text(json.dumps({"job": state["job"], "sha256": state["sha256"], **changes}))
        distmeta.train(job, resume=path.parent)

    fuzz(examples, changed(rest), check)


def renamed(run: Path, section: str, **change: Any) -> Path:
    """The run's checkpoint with something else in a section of its job."""
    path = checkpoints.find(run) / "state.json"
    state = json.loads(path.read_text())
    state["job"][section] = change
    path.write_text(json.dumps(state))
    return path.parent


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("tasks", {"type": "os:system", "command": "touch harmed"}),
        ("model", {"type": "subprocess:Popen", "args": ["touch", "harmed"]}),
        ("model", {"type": "subprocess:check_output"}),
        ("algorithm", {"type": "pathlib:Path"}),
        ("tasks", {"type": "builtins:exec"}),
        ("model", {"type": "builtins:eval"}),
    ],
)
def test_a_strangers_checkpoint_calls_nothing_but_classes_of_the_kind(
    section: str, change: dict[str, Any], run: Path, workplace: Path
) -> None:
    checkpoint, said = renamed(run, section, **change), list[str]()
    with pytest.raises(InputError, match=rf"^{section}.type: the checkpoint names .*, expected a"):
        distmeta.load(checkpoint, say=said.append)
    assert said == [
        f"importing {change['type'].partition(':')[0]}, which the checkpoint names for its {section}"
    ]
    assert not list(workplace.glob("harmed"))


def test_a_class_of_ones_own_instead(run: Path, workplace: Path) -> None:
    import distmeta.models.mlp as mlp

    checkpoint = renamed(run, "model", type="nowhere:Net", hidden=[16, 16], activation="tanh")
    with pytest.raises(InputError, match=r"^model.type: cannot import 'nowhere'"):
        distmeta.load(checkpoint)
    adapted = distmeta.load(checkpoint, model=mlp.MLP).adapt([[0.0], [1.0]], [[0.0], [1.0]])
    assert adapted([[0.5]]).shape == (1, 1)
