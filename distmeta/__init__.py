"""distmeta: distributed meta-training with numbers that do not depend on the cluster.

job = distmeta.Job.load("jobs/digits-maml.yaml", ["run.workers=2"])
run = distmeta.train(job).run
distmeta.evaluate(run)
distmeta.load(run).adapt(x, y)(x_query)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distmeta.evaluation import evaluate as evaluate
    from distmeta.job import Job as Job
    from distmeta.learner import load as load
    from distmeta.runtime.driver import train as train
    from distmeta.submission import submit as submit
    from distmeta.sweeps.run import sweep as sweep

__version__ = "0.1.0"

_WHERE = {
    "Job": "distmeta.job",
    "train": "distmeta.runtime.driver",
    "sweep": "distmeta.sweeps.run",
    "evaluate": "distmeta.evaluation",
    "load": "distmeta.learner",
    "submit": "distmeta.submission",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: `distmeta --help` needs neither torch, Ray nor MLflow."""
    if name not in _WHERE:
        raise AttributeError(f"module 'distmeta' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value
