"""Does meta-training on episodes with a domain shift help, if support and query come from different domains?

    python benchmarks/domains.py

`jobs/digits-domains.yaml`: MAML on digits, with support images as drawn and query images inverted, blurred, noisy or
slanted (distmeta/tasks/domains.py). Test digits are never trained on. For each shift, on the same test tasks:

    before               the network trained with the shift, without inner steps
    nearest_neighbour    the label of the nearest support image (Euclidean, on pixels)
    without, with        trained without and with the shift, tested with it
    gain                 the difference of the two, paired by task
"""

from __future__ import annotations

import argparse
import time
from typing import Any, get_args

import numpy as np
from raw_results import ROOT, describe_environment, interval, save_section
from training import note, score_nearest_neighbour, score_tasks, train_job

from distmeta.config.job import Job
from distmeta.protocols import Theta
from distmeta.runtime.problem import build_problem
from distmeta.tasks.domains import Domain

JOB = ROOT / "jobs" / "digits-domains.yaml"
UNSHIFTED = "original"


def load_job(given: argparse.Namespace, domain: str) -> Job:
    """Return the job with queries of one domain."""
    overrides = [f"seed={given.seed}", f"run.workers={given.workers}", f"tasks.query_domain={domain}"]
    if given.steps:
        overrides.append(f"run.steps={given.steps}")
    overrides.append(f"tasks.test_digits={given.test_digits}")
    return Job.load(JOB, overrides)


def train_on_domain(given: argparse.Namespace, domain: str) -> tuple[Theta, float]:
    """Return theta trained on a domain, and the processor seconds of the training."""
    note(f"training: query {domain}")
    started = time.process_time()
    _, theta, _ = train_job(load_job(given, domain))
    return theta, time.process_time() - started


def score_on_domain(given: argparse.Namespace, theta: Theta, domain: str) -> np.ndarray:
    """Return the accuracy of each test task after 0, 1, … inner steps."""
    problem = build_problem(load_job(given, domain))
    return score_tasks(problem, theta, "accuracy", "test", given.tasks, problem.eval_steps)


def compare(given: argparse.Namespace, domain: str, unshifted: Theta, shifted: Theta) -> dict[str, Any]:
    without = score_on_domain(given, unshifted, domain)
    with_shift = without if domain == UNSHIFTED else score_on_domain(given, shifted, domain)
    nearest = score_nearest_neighbour(build_problem(load_job(given, domain)), given.tasks)
    return {
        "query_domain": domain,
        "before": interval(with_shift[:, 0]),
        "nearest_neighbour": interval(nearest),
        "without": interval(without[:, -1]),
        "with": interval(with_shift[:, -1]),
        "gain": interval(with_shift[:, -1] - without[:, -1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shifts = [domain for domain in get_args(Domain) if domain != UNSHIFTED]
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    parser.add_argument("--tasks", type=int, default=600, help="test tasks")
    parser.add_argument("--steps", type=int, help="default: the job's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="does not change the result")
    parser.add_argument("--test-digits", type=int, nargs="+", default=[7, 8, 9])
    parser.add_argument("--domains", nargs="+", choices=shifts, default=shifts, help="of the query")
    given = parser.parse_args()
    if given.quick:
        given.steps = 3
        given.tasks = 25
    environment = describe_environment()
    unshifted, seconds = train_on_domain(given, UNSHIFTED)
    rows = [compare(given, UNSHIFTED, unshifted, unshifted) | {"cpu_seconds_training": seconds}]
    for domain in given.domains:
        shifted, seconds = train_on_domain(given, domain)
        rows.append(compare(given, domain, unshifted, shifted) | {"cpu_seconds_training": seconds})
    part = "digits " + " ".join(map(str, given.test_digits))
    save_section("domains", part, environment, rows, given.quick, test_tasks=given.tasks)


if __name__ == "__main__":
    main()
