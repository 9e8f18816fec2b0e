"""What `import distmeta` offers."""

from __future__ import annotations

import subprocess
import sys

import pytest

import distmeta

PROGRAM = """
import sys
import distmeta
assert not {"torch", "ray", "mlflow", "numpy"} & set(sys.modules)
from distmeta import Batch, Episode, InputError, Job, Run
assert not {"ray", "mlflow"} & set(sys.modules)
"""


def test_every_public_name_can_be_imported() -> None:
    verbs = {"train", "sweep", "evaluate", "load", "submit", "inner_gradient"}
    types = {"Job", "Run", "Batch", "Episode", "InputError"}
    assert set(distmeta.MODULES) == verbs | types
    for name, module in distmeta.MODULES.items():
        value = getattr(distmeta, name)
        assert value.__module__ == module
        assert value.__name__ == name


def test_import_of_the_package_and_its_types_is_light() -> None:
    process = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_unknown_name_is_an_attribute_error() -> None:
    assert "train" in dir(distmeta)
    with pytest.raises(AttributeError, match="module 'distmeta' has no attribute 'trian'"):
        distmeta.trian  # noqa: B018
