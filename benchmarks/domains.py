"""Domain adaptation: support from one domain, query from another. What does meta-training on such episodes gain?

    python benchmarks/domains.py

`jobs/digits-domains.yaml`: MAML on digits, support as drawn, query inverted, blurred, noisy or slanted (see
distmeta/tasks/domains.py); tested on digits never trained on. On the same 600 test tasks:

    before adaptation       the network trained on the shift, without its inner steps
    1-NN on pixels          the label of the nearest support image (Euclidean)
    trained without         the same training, support and query as drawn; tested on the shift
    trained with            trained and tested on the shift
    gain                    with minus without, paired by task

The first row is the task without a shift. `±` is 1.96·s/√n over the test tasks: it holds their choice, not that of a
seed. The last step's theta is scored. `--quick` is a smoke run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import report
from training import nearest_neighbour, said, scores, trained

from distmeta.config.job import Job
from distmeta.protocols import Theta
from distmeta.runtime.problem import build
from distmeta.tasks.domains import Domain

JOB = report.ROOT / "jobs" / "digits-domains.yaml"
UNSHIFTED = "original"
COLUMNS = {
    "before": "before adaptation",
    "nearest_neighbour": "1-NN on pixels",
    "without": "trained without",
    "with": "trained with",
    "gain": "gain, paired",
}


def job_of(given: argparse.Namespace, domain: str) -> Job:
    """The job with the queries of one domain."""
    steps = [f"run.steps={given.steps}"] if given.steps else []
    digits = [f"tasks.test_digits={given.test_digits}"] if given.test_digits else []
    return Job.load(
        JOB,
        [
            f"seed={given.seed}",
            f"run.workers={given.workers}",
            f"tasks.query_domain={domain}",
            *steps,
            *digits,
        ],
    )


def learned(given: argparse.Namespace, domain: str) -> tuple[Theta, float]:
    """theta trained on the domain, and the seconds of this process that it took."""
    said(f"training: query {domain}")
    started = time.process_time()
    theta = trained(job_of(given, domain))[1]
    return theta, time.process_time() - started


def tested(given: argparse.Namespace, theta: Theta, domain: str) -> np.ndarray:
    """Accuracy of each test task after 0, 1, … inner steps, its queries in the domain."""
    problem = build(job_of(given, domain))
    return scores(problem, theta, "accuracy", "test", given.tasks, problem.eval_steps)


def row_of(given: argparse.Namespace, domain: str, plain: Theta, theta: Theta) -> dict[str, Any]:
    """The figures of one domain. plain: trained without a shift; theta: with this one."""
    without = tested(given, plain, domain)
    with_shift = without if domain == UNSHIFTED else tested(given, theta, domain)
    neighbour = nearest_neighbour(build(job_of(given, domain)), given.tasks)
    columns = {
        "before": with_shift[:, 0],
        "nearest_neighbour": neighbour,
        "without": without[:, -1],
        "with": with_shift[:, -1],
        "gain": with_shift[:, -1] - without[:, -1],
    }
    return {"query_domain": domain} | {name: report.interval(values) for name, values in columns.items()}


def compared(given: argparse.Namespace) -> dict[str, Any]:
    """All domains, each with a network of its own."""
    plain, seconds = learned(given, UNSHIFTED)
    rows = [row_of(given, UNSHIFTED, plain, plain) | {"cpu_seconds_training": seconds}]
    for domain in given.domains:
        theta, seconds = learned(given, domain)
        rows.append(row_of(given, domain, plain, theta) | {"cpu_seconds_training": seconds})
    print(report.table(["query", *COLUMNS.values()], [cells_of(row) for row in rows]))
    job = job_of(given, given.domains[0])
    return {"rows": rows, "test_tasks": given.tasks, "job": job.tree()}


def cells_of(row: dict[str, Any]) -> Sequence[str]:
    shifted = row["query_domain"] != UNSHIFTED
    shown = [report.percent(row[name]) if shifted or name not in ("with", "gain") else "" for name in COLUMNS]
    return [row["query_domain"], *shown]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shifts = [domain for domain in get_args(Domain) if domain != UNSHIFTED]
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    parser.add_argument("--tasks", type=int, default=600, help="test tasks")
    parser.add_argument("--steps", type=int, help="default: the job's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="the figures do not depend on it")
    parser.add_argument("--test-digits", type=int, nargs="+", help="default: the job's")
    parser.add_argument("--domains", nargs="+", choices=shifts, default=shifts, help="of the query")
    given = parser.parse_args()
    if given.quick:
        given.steps, given.tasks = 3, 25
    start = report.environment()
    name = "-".join(["domains", *map(str, given.test_digits or [])])
    report.write(name, start, compared(given), given.quick)


if __name__ == "__main__":
    main()
