"""Shared by all tests: a temporary home and Ray folder, token authentication, one Ray cluster, small jobs."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HOME = Path(tempfile.mkdtemp(prefix="dm-", dir="/tmp"))  # short: Ray's socket paths have a limit
os.environ.update(
    HOME=str(HOME),
    XDG_CACHE_HOME=str(HOME / "cache"),
    RAY_TMPDIR=str(HOME),
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=secrets.token_hex(16),
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",  # with Ray's default of 15, workers would hardly start beside other tests
    OMP_NUM_THREADS="1",  # two test processes with two threads each would be a hundred times slower
)
for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
    os.environ.pop(name, None)

# If a shell starts the tests in the background, they and their child processes ignore Ctrl-C. Undo that.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).parents[1]

SHORT = ("algorithms", "benchmarks", "clusters", "config", "data", "models", "tasks")
"""Folders of short tests."""
LONG = ("test_notebooks.py",)
"""Long test files outside the folders of long tests."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run long tests first, so that parallel test processes end at about the same time."""

    def is_short(item: pytest.Item) -> bool:
        folder = item.path.parent.name
        return folder in SHORT or (folder == "tests" and item.path.name not in LONG)

    items.sort(key=is_short)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A real Ray cluster on this machine, joined by this process."""
    import logging

    import ray

    # Workers can then import the parts that tests name, and this clone instead of an installed distmeta.
    folders = [REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tests" / "models"]
    os.environ["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in folders)
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False
    )
    yield
    ray.shutdown()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def client(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of a new MLflow store, to which this process writes its runs."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/mlflow.db")
    from distmeta.tracking.mlflow import import_mlflow

    import_mlflow()
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{workplace}/mlflow.db")


ALGORITHMS: dict[str, dict[str, Any]] = {
    "maml": {"type": "maml", "inner_lr": 0.05, "inner_steps": 2},
    "fomaml": {"type": "maml", "inner_lr": 0.05, "inner_steps": 2, "first_order": True},
    "reptile": {
        "type": "reptile",
        "inner_lr": 0.05,
        "inner_steps": 3,
        "inner_batch": 4,
        "inner_optimizer": "sgd",
    },
    "imaml": {"type": "imaml", "inner_lr": 0.05, "inner_steps": 4, "lam": 2.0, "cg_steps": 3},
    "reptile-adam": {"type": "reptile", "inner_lr": 0.01, "inner_steps": 3, "inner_batch": 4},
    "maml-adam": {"type": "maml", "inner_lr": 0.01, "inner_steps": 3, "inner_optimizer": "adam", "eps": 1e-3},
    "maml-momentum": {"type": "maml", "inner_lr": 0.02, "inner_steps": 3, "inner_optimizer": "momentum"},
    "anil": {"type": "maml", "inner_lr": 0.05, "inner_steps": 2, "adapt": "head"},
    "boil": {"type": "maml", "inner_lr": 0.05, "inner_steps": 2, "adapt": "body"},
    "maml-plus-plus": {"type": "maml-plus-plus", "inner_lr": 0.05, "inner_steps": 3},
    "cavia": {"type": "cavia", "inner_lr": 0.5, "inner_steps": 2, "context": 4},
    "meta-sgd": {"type": "meta-sgd", "inner_steps": 2},
    "meta-curvature": {"type": "meta-curvature", "inner_lr": 0.05, "inner_steps": 2},
    "gradient-norm": {"type": "gradient-norm", "inner_lr": 0.05, "inner_steps": 2, "lam": 0.1},
    "bilevel": {"type": "bilevel", "problem": "learned-loss", "inner_lr": 0.05, "inner_steps": 2},
    "bilevel-implicit": {
        "type": "bilevel",
        "problem": "reweighting",
        "inner_lr": 0.1,
        "inner_steps": 3,
        "hypergradient": "conjugate-gradients",
        "implicit_steps": 3,
        "damping": 1.0,
    },
    "contrastive": {"type": "contrastive", "inner_lr": 0.05, "inner_steps": 2, "margin": 1.0},
    "hypernet": {"type": "hypernet", "hidden": 8, "inner_steps": 1},
    "hypernet-regression": {"type": "hypernet", "hidden": 8, "inner_steps": 0},
    "protonet": {"type": "protonet"},
    "matching": {"type": "matching"},
    "matching-fce": {"type": "matching", "full_context": True},
    "relation": {"type": "relation", "hidden": [16]},
    "imp": {"type": "imp"},
    "lstm": {"type": "lstm", "hidden": 5, "inner_steps": 3},
    "mann": {"type": "mann", "controller": 12, "slots": 8, "width": 6, "reads": 2},
    "mann-ntm": {"type": "mann", "memory": "ntm", "controller": 12, "slots": 8, "width": 6, "reads": 2},
    "mann-dnc": {"type": "mann", "memory": "dnc", "controller": 12, "slots": 8, "width": 6, "reads": 2},
    "maml-rl": {"type": "maml-rl", "inner_lr": 0.1, "inner_steps": 2},
    "e-maml": {"type": "maml-rl", "inner_lr": 0.1, "e_maml": True, "kl": 0.1},
    "meta-sgd-policy": {"type": "meta-sgd", "inner_steps": 2},
    "reptile-policy": {"type": "reptile", "inner_lr": 0.05, "inner_steps": 2, "inner_optimizer": "sgd"},
    "rl2": {"type": "rl2", "memory": 8},
    "snail": {"type": "snail", "length": 8, "filters": 8, "attention": [[8, 4], [8, 4]], "embedding": 8},
}
"""Every algorithm that a test runs over."""
CLASSES: dict[str, Any] = {
    "model": {"type": "mlp", "hidden": [12], "activation": "tanh"},
    "tasks": {"type": "digits", "ways": 3, "shots": 2, "queries": 3, "order": "random"},
}
POLICIES: dict[str, Any] = {
    "model": {"type": "gaussian", "hidden": [12], "activation": "tanh"},
    "tasks": {"type": "navigation", "trajectories": 4, "horizon": 6},
}
SETTINGS: dict[str, dict[str, Any]] = dict.fromkeys(
    ("protonet", "matching-fce", "relation", "imp", "mann", "mann-ntm", "mann-dnc", "snail", "hypernet"),
    CLASSES,
)
SETTINGS["bilevel-implicit"] = CLASSES
SETTINGS |= dict.fromkeys(("maml-rl", "e-maml", "meta-sgd-policy", "reptile-policy"), POLICIES)
SETTINGS["rl2"] = {"model": {"type": "mlp"}, "tasks": {"type": "bandit", "arms": 3, "horizon": 6}}
"""What else an algorithm's small job needs: those that learn classes, or policies."""


def tree(algorithm: str | dict[str, Any] = "maml", **changes: Any) -> dict[str, Any]:
    """A small job as plain data: sine waves, a small MLP. `changes` are merged into its sections."""
    job: dict[str, Any] = {
        "name": "small",
        "model": {"type": "mlp", "hidden": [16, 16], "activation": "tanh"},
        "tasks": {"type": "sinusoid", "shots": 5, "queries": 5},
        **(SETTINGS.get(algorithm, {}) if isinstance(algorithm, str) else {}),
        "algorithm": ALGORITHMS[algorithm] if isinstance(algorithm, str) else algorithm,
        "outer": {"lr": 0.01},
        "run": {"steps": 6, "tasks_per_step": 8, "shards": 4, "eval_every": 0, "checkpoint_every": 0},
        "tracking": {"type": "none"},
    }
    for section, value in changes.items():
        merges = isinstance(value, dict) and "type" not in value and isinstance(job.get(section), dict)
        job[section] = job[section] | value if merges else value
    return job
