"""Meta-reinforcement learning: does what is trained adapt, and what does collecting data cost?

    python benchmarks/reinforcement.py navigation   MAML against a policy pre-trained on all goals and a random one
    python benchmarks/reinforcement.py bandit       RL² against Thompson sampling
    python benchmarks/reinforcement.py cheetah      environment steps per second against a plain Gymnasium loop

Every system sees the same test tasks. `--run RUN` scores the last checkpoint of a run instead of training one.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from raw_results import ROOT, describe_environment, interval, save_section
from training import note, score_tasks, train_job

import distmeta
from distmeta.compute.episodes import make_episodes
from distmeta.config.job import Job
from distmeta.protocols import Theta
from distmeta.runtime.problem import Problem, build_problem
from distmeta.seeding import task_ids

JOBS = ROOT / "jobs"
UPDATES = 3
RATES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Rates for fine-tuning. For each number of updates the best on validation tasks is used."""

Rows = list[dict[str, Any]]
Rule = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(hits, misses) of each arm -> the arm to pull."""


# --- Navigation ---------------------------------------------------------------------------------------------------


def measure_navigation(given: argparse.Namespace) -> Rows:
    """Compare the return after 0 … 3 updates on unseen goals: MAML, a pre-trained policy, a random one."""
    job = load_job(given, "navigation-maml")
    problem, theta = load_or_train(given, job)
    algorithm: Any = problem.algorithm
    pretrained = pretrain(given, job)
    maml = score_tasks(problem, theta, "return", "test", given.tasks, UPDATES)
    own_rate = dict.fromkeys(range(1, UPDATES + 1), algorithm.inner_lr)
    rows = [describe_system("MAML", maml, own_rate)]
    for name, start in (("pre-trained on all goals", pretrained), ("random", problem.init())):
        returns, rates = fine_tune(problem, start, given.tasks)
        rows.append(describe_system(name, returns, rates))
        rows.append(describe_system(f"MAML less {name}, task by task", maml - returns, {}))
    return rows


def pretrain(given: argparse.Namespace, job: Job) -> Theta:
    """Train on all goals: Reptile with one inner step follows the gradient of the mean return."""
    if given.pretrained:
        return distmeta.load(given.pretrained).theta
    note("pre-training on all goals")
    algorithm = {"type": "reptile", "inner_steps": 1, "inner_optimizer": "sgd", "inner_lr": 0.1}
    _, theta, _ = train_job(Job.parse(job.to_dict() | {"algorithm": algorithm}))
    return theta


def fine_tune(problem: Problem, theta: Theta, tasks: int) -> tuple[np.ndarray, dict[int, float]]:
    """Return the returns on test tasks [tasks, 4] and, by number of updates, the rate that was best on validation."""
    validation = {
        rate: score_tasks(with_inner_rate(problem, rate), theta, "return", "val", tasks, UPDATES)
        for rate in RATES
    }
    returns = np.empty((tasks, UPDATES + 1))
    best_rates: dict[int, float] = {}
    for k in range(1, UPDATES + 1):
        best_rates[k] = max(RATES, key=lambda rate: validation[rate][:, k].mean())
        changed = with_inner_rate(problem, best_rates[k])
        tested = score_tasks(changed, theta, "return", "test", tasks, UPDATES)
        returns[:, 0] = tested[:, 0]
        returns[:, k] = tested[:, k]
    return returns, best_rates


def with_inner_rate(problem: Problem, rate: float) -> Problem:
    """Return the problem with another inner rate. It is halved after the first update, as MAML's is."""
    algorithm: Any = copy.copy(problem.algorithm)
    algorithm.inner_lr = rate
    algorithm.later_lr = rate / 2
    return dataclasses.replace(problem, algorithm=algorithm)


def describe_system(system: str, returns: np.ndarray, rates: Mapping[int, Any]) -> dict[str, Any]:
    updates = {str(k): interval(returns[:, k]) for k in range(UPDATES + 1)}
    return {"system": system, "updates": updates, "rates": {str(k): rate for k, rate in rates.items()}}


# --- Bandit -------------------------------------------------------------------------------------------------------


def measure_bandit(given: argparse.Namespace) -> Rows:
    """Compare the reward of 100 pulls of unseen bandits. All policies see the same payoffs."""
    job = load_job(given, "bandit-rl2")
    problem, theta = load_or_train(given, job)
    family: Any = problem.family
    trajectories = job.tasks.options["trajectories"]
    payoffs = family.draw_payoffs(task_ids(job.seed, "test", 0, given.tasks), 0, trajectories).numpy()
    random = np.random.default_rng(0)
    rules: dict[str, Rule] = {
        "Thompson sampling": lambda hits, misses: random.beta(1 + hits, 1 + misses).argmax(-1),
        "greedy in the posterior mean": lambda hits, misses: ((1 + hits) / (2 + hits + misses)).argmax(-1),
        "random": lambda hits, misses: random.integers(hits.shape[-1], size=hits.shape[:-1]),
    }
    learned = score_tasks(problem, theta, "return", "test", given.tasks, 0)[:, 0]
    rewards = {"RL²": learned} | {name: play(payoffs, rule) for name, rule in rules.items()}
    return [{"policy": name, "reward": interval(values)} for name, values in rewards.items()]


def play(payoffs_TNHA: np.ndarray, rule: Rule) -> np.ndarray:
    """Return the mean reward of each bandit [T] under a rule that sees how often each arm hit and missed.

    T bandits, N trajectories, H pulls, A arms.
    """
    tasks, trajectories, pulls, arms = payoffs_TNHA.shape
    hits = np.zeros((tasks, trajectories, arms))
    misses = np.zeros_like(hits)
    total = np.zeros((tasks, trajectories))
    for t in range(pulls):
        arm = rule(hits, misses)[..., None]
        reward = np.take_along_axis(payoffs_TNHA[:, :, t], arm, -1)
        pulled = np.arange(arms) == arm
        hits += pulled * reward
        misses += pulled * (1 - reward)
        total += reward[..., 0]
    return total.mean(1)


# --- Half-cheetah -------------------------------------------------------------------------------------------------


def measure_cheetah(given: argparse.Namespace) -> Rows:
    """Compare environment steps per second on one core: collecting for a shard, collecting with an update, and
    Gymnasium's SyncVectorEnv with the same policy called as a module."""
    import gymnasium

    from distmeta.tasks.mujoco import make_half_cheetah_velocity

    job = load_job(given, "cheetah-velocity-maml")
    problem = build_problem(job)
    shard = job.run.tasks_per_step // (job.run.shards or 1)
    environments = shard * job.tasks.options["trajectories"]
    horizon = job.tasks.options["horizon"]
    ids = task_ids(0, "probe", 0, shard)
    theta = problem.init()
    model = problem.model
    family: Any = problem.family

    def policy(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(theta, x)

    def collect() -> None:
        family.collect("train", ids, 0, policy)

    def adapt_and_collect() -> None:
        make_episodes(family, problem.algorithm, theta, "train", ids, 1)

    makers = [lambda: make_half_cheetah_velocity(np.random.default_rng(0))] * environments
    vector = gymnasium.vector.SyncVectorEnv(makers)

    def run_plain_loop() -> None:
        observations, _ = vector.reset(seed=0)
        for _ in range(horizon):
            with torch.no_grad():
                mean, log_std = model.module(torch.from_numpy(observations).float()).chunk(2, -1)
            action = torch.normal(mean, log_std.exp()).clamp(-1, 1)
            observations, *_ = vector.step(action.numpy())

    torch.set_num_threads(1)
    steps = environments * horizon
    loops = {
        "collect": (collect, steps),
        "adapt and collect": (adapt_and_collect, 2 * steps),
        "plain": (run_plain_loop, steps),
    }
    measured: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(given.repeats + 1):  # in turn; the first round does not count
        for name, (loop, count) in loops.items():
            started = time.process_time()
            loop()
            measured[name].append(count / (time.process_time() - started))
    rates = {name: np.array(values[1:]) for name, values in measured.items()}
    rows = []
    for name, values in rates.items():
        ratio = None
        if name != "plain":
            ratio = [float(value) for value in np.quantile(values / rates["plain"], [0.5, 0.25, 0.75])]
        rows.append({"loop": name, "steps_per_second": float(np.median(values)), "ratio": ratio})
    return rows


def load_or_train(given: argparse.Namespace, job: Job) -> tuple[Problem, Theta]:
    if given.run:
        learner = distmeta.load(given.run)
        return learner.problem, learner.theta
    problem, theta, seconds = train_job(job)
    note(f"trained in {seconds:.0f} s")
    return problem, theta


def load_job(given: argparse.Namespace, name: str) -> Job:
    overrides = [f"run.steps={given.steps}"] if given.steps else []
    return Job.load(JOBS / f"{name}.yaml", overrides)


MEASUREMENTS = {"navigation": measure_navigation, "bandit": measure_bandit, "cheetah": measure_cheetah}
TEST_TASKS = {"navigation": 100, "bandit": 600, "cheetah": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("verb", choices=list(MEASUREMENTS))
    parser.add_argument("--run", help="score this run of the job instead of training one")
    parser.add_argument("--pretrained", help="navigation: a run of the job with algorithm.type=reptile")
    parser.add_argument("--steps", type=int, help="default: the job's")
    parser.add_argument("--tasks", type=int, help="test tasks; default: 100 goals, 600 bandits")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of cheetah")
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes nothing")
    given = parser.parse_args()
    given.tasks = given.tasks or TEST_TASKS[given.verb]
    if given.quick:
        given.steps = 2
        given.tasks = 4
        given.repeats = 1
    environment = describe_environment()
    rows = MEASUREMENTS[given.verb](given)
    settings = {"rounds": given.repeats} if given.verb == "cheetah" else {"test_tasks": given.tasks}
    save_section("reinforcement", given.verb, environment, rows, given.quick, **settings)


if __name__ == "__main__":
    main()
