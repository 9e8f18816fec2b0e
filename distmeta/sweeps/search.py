"""A `sweep:` section in Ray Tune's terms: space, search, scheduler, stopper, resources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from distmeta.sweeps.trial import RUN, SCORE, STEP, evaluations_of, figure_of


def points(sweep: SweepSection, seed: int) -> list[dict[str, Any]]:
    """The values of every trial of a random or grid search: draw i is a function of (seed, i) and the space.

    A longer list of draws starts with the shorter one.
    """
    grid: list[dict[str, Any]] = [{}]
    for key, domain in sweep.space.items():
        if domain.kind == "grid":
            grid = [{**point, key: value} for point in grid for value in domain.values]
    drawn = {key: domain for key, domain in sweep.space.items() if domain.kind != "grid"}
    found = []
    for i in range(sweep.draws):
        generator = stream_generator(seed, "sweep", i)
        draw = {key: _plain(as_tune(domain).sample(random_state=generator)) for key, domain in drawn.items()}
        found += [{key: {**draw, **point}[key] for key in sweep.space} for point in grid]
    return found


def as_tune(domain: Domain) -> TuneDomain:
    values = domain.values
    if domain.kind == "choice":
        return tune.choice(values)
    low, high = values
    if domain.kind == "integers":
        return tune.randint(low, high + 1)
    return tune.loguniform(low, high) if domain.kind == "loguniform" else tune.uniform(low, high)


def search(sweep: SweepSection, seed: int) -> tuple[dict[str, Any], Any, int]:
    """Tune's param_space, its search algorithm (None: as listed) and its number of samples."""
    if sweep.search == "tpe":
        space = {"values": {key: as_tune(domain) for key, domain in sweep.space.items()}}
        algorithm = OptunaSearch(
            OptunaSearch.convert_search_space(space), metric=SCORE, mode="max", seed=seed
        )
        return {}, algorithm, sweep.draws
    return {"values": tune.grid_search(points(sweep, seed))}, None, 1


def scheduler(sweep: SweepSection, job: Job) -> TrialScheduler:
    settings, steps = sweep.scheduler, job.trial_steps
    if settings.type == "asha":
        return Asha(sweep, steps, settings.grace or job.run.eval_every)
    if settings.type == "pbt":
        return Pbt(sweep, steps, settings.interval or job.run.eval_every)
    return FIFOScheduler()


class Asha(AsyncHyperBandScheduler):
    """Tune's; it leaves a trial at its last step alone, and knows after a restart what was reported before."""

    def __init__(self, sweep: SweepSection, steps: int, grace: int):
        self._section, self._steps = sweep, steps
        super().__init__(
            time_attr=STEP,
            max_t=steps + 1,
            grace_period=min(grace, steps),
            reduction_factor=sweep.scheduler.reduction or 4,
        )

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """What a restored trial reported before counts in the rungs: Tune keeps no scheduler's state."""
        super().on_trial_add(tune_controller, trial)
        last = trial.last_result or {}
        for row in evaluations_of(Path(last[RUN])) if RUN in last else ():
            if row["step"] <= last[STEP]:
                _, value, sign = figure_of(row, self._section.metric, self._section.mode)
                self.on_trial_result(tune_controller, trial, {STEP: row["step"], SCORE: sign * value})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result[STEP] >= self._steps:
            return TrialScheduler.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)


class Pbt(PopulationBasedTraining):
    """Tune's, with values kept in their ranges; a trial at its last step is left alone."""

    def __init__(self, sweep: SweepSection, steps: int, interval: int):
        self._steps = steps
        super().__init__(
            time_attr=STEP,
            perturbation_interval=interval,
            hyperparam_mutations={"values": {key: as_tune(domain) for key, domain in sweep.space.items()}},
            custom_explore_fn=Within({key: domain.values for key, domain in sweep.space.items()}),
            require_attrs=False,  # a trial that fails at once has reported nothing
        )

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get(STEP, 0) >= self._steps:
            return TrialScheduler.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)


class Within:
    """Keeps perturbed values in their ranges."""

    def __init__(self, bounds: dict[str, list[Any]]):
        self.bounds = bounds

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        values = {key: min(max(config["values"][key], low), high) for key, (low, high) in self.bounds.items()}
        return {**config, "values": values}


class Budget(tune.Stopper):
    """Ends the sweep once its trials have spent a number of steps."""

    def __init__(self, steps: int):
        self.steps = steps
        self._spent: dict[str, int] = {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self._spent[trial_id] = result[STEP]
        return False

    def stop_all(self) -> bool:
        return sum(self._spent.values()) >= self.steps


def places(job: Job) -> list[dict[str, float]]:
    """Where a trial computes: the workers that it starts with, or its own process."""
    one = {"CPU": float(job.run.cpus_per_worker), "GPU": float(job.run.gpus_per_worker)}
    return [{key: value for key, value in one.items() if value}] * max(job.run.min_workers, 1)


def bundles(job: Job) -> list[dict[str, float]]:
    """What Tune reserves for a trial: its process, which needs nothing where workers compute, and their places.

    The group of `all-reduce` has its places from Ray Train, all at once or none; a byte stands for the trial here.
    """
    if job.strategy.type == "all-reduce":
        return [{"memory": 1.0}]
    return [{}, *places(job)] if job.run.min_workers else places(job)


def _plain(value: Any) -> Any:
    """A Python number for numpy's."""
    return value.item() if isinstance(value, np.generic) else value
