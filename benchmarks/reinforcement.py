"""Meta-reinforcement learning: does what is trained adapt, and what does collecting cost?

    python benchmarks/reinforcement.py navigation   MAML against a policy pre-trained on all goals, and none
    python benchmarks/reinforcement.py bandit       RL² against Thompson sampling
    python benchmarks/reinforcement.py cheetah      environment steps a second against a plain Gymnasium loop

Every system of a comparison meets the same test tasks; `±` is 1.96·s/√n over the n tasks. `--run RUN` scores the last
checkpoint of a run of the job instead of training one; `--quick` is a smoke run.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import report
import torch
from training import said, scores, trained

import distmeta
from distmeta.config.job import Job
from distmeta.protocols import Theta
from distmeta.runtime.problem import Problem, build
from distmeta.seeding import task_ids
from distmeta.trajectories import Trajectories

JOBS = report.ROOT / "jobs"
UPDATES = 3
RATES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The grid that the rate of fine-tuning is chosen from, on validation tasks, for every number of updates."""
SHOWN = 6
"""Goals in the plot."""


# navigation


def navigation(given: argparse.Namespace) -> dict[str, Any]:
    """Return after 0 … 3 updates on goals never met: MAML, a pre-trained policy, a random one."""
    job = Job.load(JOBS / "navigation-maml.yaml", overrides(given))
    problem, theta = learned(given, job)
    pretrained = joint(given, job)
    tasks, own = given.tasks, dict.fromkeys(range(UPDATES + 1), problem.algorithm.inner_lr)  # type: ignore[attr-defined]
    meta = scores(problem, theta, "return", "test", tasks, UPDATES)
    rows = [row("MAML", meta, own)]
    for name, start in (("pre-trained on all goals", pretrained), ("random", problem.init())):
        returns, rates = fine_tuned(problem, start, tasks)
        rows += [row(name, returns, rates), row(f"MAML less {name}, task by task", meta - returns, {})]
    header = ["return", "before", *(f"after {k}" for k in range(1, UPDATES + 1))]
    cells = [[r["system"], *(report.plain(r["updates"][str(k)]) for k in range(UPDATES + 1))] for r in rows]
    print(report.table(header, cells))
    if not given.quick:
        plot(problem, theta, rows)
    return {"rows": rows, "test_tasks": tasks, "job": job.tree()}


def joint(given: argparse.Namespace, job: Job) -> Theta:
    """A policy trained on all goals: Reptile with one inner step, which is the gradient of the mean return."""
    if given.pretrained:
        return distmeta.load(given.pretrained).theta
    said("pre-training on all goals")
    algorithm = {"type": "reptile", "inner_steps": 1, "inner_optimizer": "sgd", "inner_lr": 0.1}
    return trained(Job.parse(job.tree() | {"algorithm": algorithm}))[1]


def fine_tuned(problem: Problem, theta: Theta, tasks: int) -> tuple[np.ndarray, dict[int, float]]:
    """Returns on test tasks [tasks, 4], after k updates at the rate that is best for k on as many validation tasks."""
    grid = {rate: scores(at_rate(problem, rate), theta, "return", "val", tasks, UPDATES) for rate in RATES}
    best = {k: max(RATES, key=lambda rate, k=k: grid[rate][:, k].mean()) for k in range(1, UPDATES + 1)}
    found = {
        r: scores(at_rate(problem, r), theta, "return", "test", tasks, UPDATES) for r in set(best.values())
    }
    columns = [found[best[1]][:, 0], *(found[rate][:, k] for k, rate in best.items())]
    return np.stack(columns, 1), best


def at_rate(problem: Problem, rate: float) -> Problem:
    """The problem with another inner rate; it is halved after the first update, as MAML's is."""
    algorithm: Any = copy.copy(problem.algorithm)
    algorithm.inner_lr, algorithm.later_lr = rate, rate / 2
    return dataclasses.replace(problem, algorithm=algorithm)


def row(system: str, returns: np.ndarray, rates: dict[int, float]) -> dict[str, Any]:
    updates = {str(k): report.interval(returns[:, k]) for k in range(UPDATES + 1)}
    return {"system": system, "updates": updates, "rates": {str(k): rate for k, rate in rates.items() if k}}


def plot(problem: Problem, theta: Theta, rows: list[dict[str, Any]]) -> None:
    """results/navigation.png: trajectories of MAML before and after an update, and return against updates."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    from distmeta.compute.episodes import episodes_of

    family: Any = problem.family
    ids = task_ids(problem.job.seed, "test", 0, SHOWN)
    episode = episodes_of(family, problem.algorithm, theta, "test", ids, 1)
    figure, axes = plt.subplots(1, 3, figsize=(12, 4))
    sets = (("before", episode.support.batches[0]), ("after one update", episode.query))
    for axis, (name, batch) in zip(axes, sets, strict=False):
        for t, goal in enumerate(family.goals(ids)):
            for n in range(3):
                path = batch.x[t, n][batch.real[t, n] > 0]
                axis.plot(path[:, 0], path[:, 1], color=f"C{t}", linewidth=0.7)
            axis.plot(*goal, "*", color=f"C{t}", markersize=12, markeredgecolor="black")
        axis.set(title=name, xlim=(-0.8, 0.8), ylim=(-0.8, 0.8), aspect="equal")
    for r in (r for r in rows if r["rates"]):
        figures = [r["updates"][str(k)] for k in range(UPDATES + 1)]
        means, spread = [f["mean"] for f in figures], [f["ci95"] for f in figures]
        axes[2].errorbar(range(UPDATES + 1), means, spread, label=r["system"], capsize=3)
    axes[2].set(title="return", xlabel="updates", xticks=range(UPDATES + 1))
    axes[2].legend()
    figure.tight_layout()
    figure.savefig(report.RESULTS / "navigation.png", dpi=100, metadata={"Software": None})
    plt.close(figure)


# bandit


def bandit(given: argparse.Namespace) -> dict[str, Any]:
    """Reward of 100 pulls of bandits never met."""
    job = Job.load(JOBS / "bandit-rl2.yaml", overrides(given))
    problem, theta = learned(given, job)
    family: Any = problem.family
    copies = job.tasks.options["trajectories"]
    paid = family.payoffs(task_ids(job.seed, "test", 0, given.tasks), 0, copies).numpy()
    rng = np.random.default_rng(0)
    rules: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "Thompson sampling": lambda hits, misses: rng.beta(1 + hits, 1 + misses).argmax(-1),
        "greedy in the posterior mean": lambda hits, misses: ((1 + hits) / (2 + hits + misses)).argmax(-1),
        "random": lambda hits, misses: rng.integers(hits.shape[-1], size=hits.shape[:-1]),
    }
    rows = {"RL²": report.interval(scores(problem, theta, "return", "test", given.tasks, 0)[:, 0])}
    rows |= {name: report.interval(played(paid, rule)) for name, rule in rules.items()}
    print(report.table(["reward", "100 pulls"], [[name, report.plain(r)] for name, r in rows.items()]))
    ratio = rows["RL²"]["mean"] / rows["Thompson sampling"]["mean"]
    print(f"\nRL² / Thompson sampling: {ratio:.3f}")
    return {"rows": rows, "ratio_to_thompson": ratio, "test_tasks": given.tasks, "job": job.tree()}


def played(paid_TNHA: np.ndarray, rule: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Mean reward of each bandit, [T], by a rule that sees how often each arm hit and missed."""
    hits = np.zeros((*paid_TNHA.shape[:2], paid_TNHA.shape[3]))
    misses, total = np.zeros_like(hits), np.zeros(hits.shape[:2])
    for t in range(paid_TNHA.shape[2]):
        arm = rule(hits, misses)[..., None]
        reward = np.take_along_axis(paid_TNHA[:, :, t], arm, -1)
        pulled = np.arange(hits.shape[-1]) == arm
        hits, misses, total = (
            hits + pulled * reward,
            misses + pulled * (1 - reward),
            total + reward[..., 0],
        )
    return total.mean(1)


# cheetah


def cheetah(given: argparse.Namespace) -> dict[str, Any]:
    """Environment steps a second, one core: a shard's collection against SyncVectorEnv and the same policy, the module
    called as it is.
    """
    import gymnasium

    from distmeta.tasks.mujoco import half_cheetah_velocity

    job = Job.load(JOBS / "cheetah-velocity-maml.yaml")
    problem = build(job)
    shard = job.run.tasks_per_step // (job.run.shards or 1)
    copies, horizon = job.tasks.options["trajectories"], job.tasks.options["horizon"]
    ids, theta, model = task_ids(0, "probe", 0, shard), problem.init(), problem.model
    family: Any = problem.family

    def policy(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(theta, x)

    def ours() -> Trajectories:
        return family.collect("train", ids, 0, policy)

    made = [lambda: half_cheetah_velocity(np.random.default_rng(0))] * (shard * copies)
    vector = gymnasium.vector.SyncVectorEnv(made)

    def plain() -> None:
        seen, _ = vector.reset(seed=0)
        for _ in range(horizon):
            with torch.no_grad():
                mean, log_std = model.module(torch.from_numpy(seen).float()).chunk(2, -1)
            action = torch.normal(mean, log_std.exp()).clamp(-1, 1)
            seen, *_ = vector.step(action.numpy())

    def adapting() -> None:
        from distmeta.compute.episodes import episodes_of

        episodes_of(family, problem.algorithm, theta, "train", ids, 1)

    torch.set_num_threads(1)
    steps = shard * copies * horizon
    ways = {"collect": (ours, steps), "adapt and collect": (adapting, 2 * steps), "plain": (plain, steps)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.repeats + 1):  # in turn; the first is thrown away
        for name, (way, count) in ways.items():
            started = time.process_time()
            way()
            rates[name].append(count / (time.process_time() - started))
    measured = {name: np.array(values[1:]) for name, values in rates.items()}
    medians = {name: float(np.median(values)) for name, values in measured.items()}
    print(report.table(["environment steps/s", "one core"], [[n, f"{v:,.0f}"] for n, v in medians.items()]))
    rounds = {name: measured[name] / measured["plain"] for name in ways if name != "plain"}
    ratios = {name: [float(v) for v in np.quantile(r, [0.5, 0.25, 0.75])] for name, r in rounds.items()}
    print("\nagainst the plain loop, round by round, median and quartiles:")
    print("\n".join(f"  {name} {m:.2f} ({low:.2f}–{high:.2f})" for name, (m, low, high) in ratios.items()))
    return {
        "steps_per_processor_second": medians,
        "ratios": ratios,
        "environments": shard * copies,
        "rounds": given.repeats,
    }


def learned(given: argparse.Namespace, job: Job) -> tuple[Problem, Theta]:
    if given.run:
        learner = distmeta.load(given.run)
        return learner.problem, learner.theta
    problem, theta, seconds = trained(job)
    said(f"trained in {seconds:.0f} s")
    return problem, theta


def overrides(given: argparse.Namespace) -> list[str]:
    return [f"run.steps={given.steps}"] if given.steps else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("verb", choices=["navigation", "bandit", "cheetah"])
    parser.add_argument("--run", help="a run of the job to score, instead of training one")
    parser.add_argument("--pretrained", help="navigation: a run of the job with algorithm.type=reptile")
    parser.add_argument("--steps", type=int, help="default: the job's")
    parser.add_argument("--tasks", type=int, help="test tasks; default: 100 goals, 600 bandits")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    given.tasks = given.tasks or {"navigation": 100, "bandit": 600, "cheetah": 0}[given.verb]
    if given.quick:
        given.steps, given.tasks, given.repeats = 2, 4, 1
    start = report.environment()
    result = {"navigation": navigation, "bandit": bandit, "cheetah": cheetah}[given.verb](given)
    report.write(given.verb, start, result, given.quick)


if __name__ == "__main__":
    main()
