"""distmeta: distributed meta-learning whose results do not depend on the cluster.

job = distmeta.Job.load("jobs/digits-maml.yaml", ["run.workers=2"])
run = distmeta.train(job).run
distmeta.evaluate(run)
distmeta.load(run).adapt(x, y)(x_query)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distmeta.cluster.submit import submit as submit
    from distmeta.compute.inner_gradient import inner_gradient as inner_gradient
    from distmeta.config.job import Job as Job
    from distmeta.errors import InputError as InputError
    from distmeta.evaluation.evaluate import evaluate as evaluate
    from distmeta.evaluation.learner import load as load
    from distmeta.protocols import Batch as Batch
    from distmeta.protocols import Episode as Episode
    from distmeta.runtime.training import Run as Run
    from distmeta.runtime.training import train as train
    from distmeta.sweeps.run import sweep as sweep

__version__ = "0.1.0"

MODULES = {
    "train": "distmeta.runtime.training",
    "sweep": "distmeta.sweeps.run",
    "evaluate": "distmeta.evaluation.evaluate",
    "load": "distmeta.evaluation.learner",
    "submit": "distmeta.cluster.submit",
    "Job": "distmeta.config.job",
    "Run": "distmeta.runtime.training",
    "Batch": "distmeta.protocols",
    "Episode": "distmeta.protocols",
    "InputError": "distmeta.errors",
    "inner_gradient": "distmeta.compute.inner_gradient",
}
"""The public names, and the modules that define them."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used. `distmeta --help` needs neither torch, Ray nor MLflow."""
    if name not in MODULES:
        raise AttributeError(f"module 'distmeta' has no attribute {name!r}")
    value = getattr(importlib.import_module(MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES})
