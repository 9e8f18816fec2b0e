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
    from distmeta.cluster.submit import submit as submit
    from distmeta.config.job import Job as Job
    from distmeta.evaluation.evaluate import evaluate as evaluate
    from distmeta.evaluation.learner import load as load
    from distmeta.runtime.training import train as train
    from distmeta.sweeps.run import sweep as sweep

__version__ = "0.1.0"

_WHERE = {
    "Job": "distmeta.config.job",
    "train": "distmeta.runtime.training",
    "sweep": "distmeta.sweeps.run",
    "evaluate": "distmeta.evaluation.evaluate",
    "load": "distmeta.evaluation.learner",
    "submit": "distmeta.cluster.submit",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: `distmeta --help` needs neither torch, Ray nor MLflow."""
    if name not in _WHERE:
        raise AttributeError(f"module 'distmeta' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value
