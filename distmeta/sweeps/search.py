"""A `sweep:` section in Ray Tune's terms: space, search algorithm, scheduler, stopper and resources."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ray import tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Domain as TuneDomain

from distmeta.config.job import Job
from distmeta.config.search_space import Domain, SweepSection
from distmeta.seeding import stream_generator
from distmeta.sweeps.trial import RUN, SCORE, STEP, find_score, read_evaluations

DEFAULT_REDUCTION = 4
"""The reduction factor of ASHA."""


class Search(NamedTuple):
    """Arguments of Tune's experiment."""

    space: dict[str, Any]
    algorithm: OptunaSearch | None
    """None: the space lists every trial."""
    samples: int


def build_search(sweep: SweepSection, seed: int) -> Search:
    """Return the space and the search algorithm."""
    if sweep.search == "tpe":
        space = {"values": {key: to_tune_domain(domain) for key, domain in sweep.space.items()}}
        algorithm = OptunaSearch(
            OptunaSearch.convert_search_space(space), metric=SCORE, mode="max", seed=seed
        )
        return Search({}, algorithm, sweep.draws)
    return Search({"values": tune.grid_search(draw_points(sweep, seed))}, None, 1)


def draw_points(sweep: SweepSection, seed: int) -> list[dict[str, Any]]:
    """Return the values of every trial of a random or grid search, by dotted key.

    Draw i is a function of (seed, i) and the space, so a longer list of draws starts with the shorter one.
    """
    grid: list[dict[str, Any]] = [{}]
    for key, domain in sweep.space.items():
        if domain.kind == "grid":
            grid = [{**point, key: value} for point in grid for value in domain.values]
    random_keys = {key: domain for key, domain in sweep.space.items() if domain.kind != "grid"}
    points = []
    for i in range(sweep.draws):
        generator = stream_generator(seed, "sweep", i)
        draw = {}
        for key, domain in random_keys.items():
            value = to_tune_domain(domain).sample(random_state=generator)
            draw[key] = value.item() if isinstance(value, np.generic) else value
        for grid_point in grid:
            point = {**draw, **grid_point}
            points.append({key: point[key] for key in sweep.space})
    return points


def to_tune_domain(domain: Domain) -> TuneDomain:
    """Return the domain as an object of Tune."""
    values = domain.values
    if domain.kind == "choice":
        return tune.choice(values)
    low, high = values
    if domain.kind == "integers":
        return tune.randint(low, high + 1)
    if domain.kind == "loguniform":
        return tune.loguniform(low, high)
    return tune.uniform(low, high)


def build_scheduler(sweep: SweepSection, job: Job) -> TrialScheduler:
    """Return the scheduler of `sweep.scheduler`."""
    settings = sweep.scheduler
    steps = job.trial_steps
    if settings.type == "asha":
        return Asha(sweep, steps, settings.grace or job.run.eval_every)
    if settings.type == "pbt":
        return Pbt(sweep, steps, settings.interval or job.run.eval_every)
    return FIFOScheduler()


class Asha(AsyncHyperBandScheduler):
    """Tune's ASHA. It does not stop a trial at its last step, and it remembers reports from before a restart.

    Args:
        steps: steps of each trial.
        grace: steps before a trial may be stopped.
    """

    def __init__(self, sweep: SweepSection, steps: int, grace: int):
        self._section = sweep
        self._steps = steps
        super().__init__(
            time_attr=STEP,
            max_t=steps + 1,
            grace_period=min(grace, steps),
            reduction_factor=sweep.scheduler.reduction or DEFAULT_REDUCTION,
        )

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Enter what a restored trial reported before. Tune (2.60) does not save the state of a scheduler."""
        super().on_trial_add(tune_controller, trial)
        last = trial.last_result or {}
        if RUN not in last:
            return
        for row in read_evaluations(Path(last[RUN])):
            if row["step"] <= last[STEP]:
                score = find_score(row, self._section.metric, self._section.mode)
                report = {STEP: row["step"], SCORE: score.sign * score.value}
                self.on_trial_result(tune_controller, trial, report)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result[STEP] >= self._steps:
            return TrialScheduler.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)


class Pbt(PopulationBasedTraining):
    """Tune's population-based training. It keeps values in their ranges and does not change a trial at its last step.

    Args:
        steps: steps of each trial.
        interval: steps between perturbations.
    """

    def __init__(self, sweep: SweepSection, steps: int, interval: int):
        self._steps = steps
        super().__init__(
            time_attr=STEP,
            perturbation_interval=interval,
            hyperparam_mutations={
                "values": {key: to_tune_domain(domain) for key, domain in sweep.space.items()}
            },
            custom_explore_fn=RangeLimiter({key: domain.values for key, domain in sweep.space.items()}),
            require_attrs=False,  # a trial that fails at once has reported nothing
        )

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get(STEP, 0) >= self._steps:
            return TrialScheduler.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)


class RangeLimiter:
    """Moves perturbed values back into their ranges. A class, because Tune pickles it.

    Args:
        bounds: [low, high] by dotted key.
    """

    def __init__(self, bounds: dict[str, list[Any]]):
        self.bounds = bounds

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        values = {key: min(max(config["values"][key], low), high) for key, (low, high) in self.bounds.items()}
        return {**config, "values": values}


class Budget(tune.Stopper):
    """Ends the sweep when its trials have taken a number of steps together."""

    def __init__(self, steps: int):
        self.steps = steps
        self._spent: dict[str, int] = {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self._spent[trial_id] = result[STEP]
        return False

    def stop_all(self) -> bool:
        return sum(self._spent.values()) >= self.steps


def list_places(job: Job) -> list[dict[str, float]]:
    """Return what each process of a trial needs: the workers that it starts with, or its own process."""
    resources = {"CPU": float(job.run.cpus_per_worker), "GPU": float(job.run.gpus_per_worker)}
    needed = {key: value for key, value in resources.items() if value}
    return [needed] * max(job.run.min_workers, 1)


def list_bundles(job: Job) -> list[dict[str, float]]:
    """Return what Tune reserves for a trial: a bundle for its process and one per worker.

    The process itself needs nothing if workers compute. The group of `all-reduce` gets its places from Ray Train, all
    at once or none; Tune then reserves one byte of memory for the trial.
    """
    if job.strategy.type == "all-reduce":
        return [{"memory": 1.0}]
    places = list_places(job)
    return [{}, *places] if job.run.min_workers else places
