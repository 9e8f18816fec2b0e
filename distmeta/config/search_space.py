"""A job's `sweep:` section: what is searched, how, and for how long."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distmeta.config.sections import Count, Positive, Section
from distmeta.errors import InputError

Finite = Annotated[float, Field(allow_inf_nan=False)]
Bounds = Annotated[list[Finite], Field(min_length=2, max_length=2)]
Whole = Annotated[list[int], Field(min_length=2, max_length=2)]
Values = Annotated[list[Any], Field(min_length=1)]
KINDS = "uniform: [low, high], loguniform: [low, high], integers: [low, high], choice: [a, b, …] or grid: [a, b, …]"


class Domain(Section):
    """Where the values of one key come from: one of these."""

    uniform: Bounds | None = None
    loguniform: Bounds | None = None
    """Uniform in the logarithm: for rates."""
    integers: Whole | None = None
    """low, low + 1, …, high."""
    choice: Values | None = None
    grid: Values | None = None
    """Every one of them, with every draw of the rest of the space."""

    @property
    def kind(self) -> str:
        return next(name for name in Domain.model_fields if getattr(self, name) is not None)

    @property
    def values(self) -> list[Any]:
        """The bounds, or all the values."""
        return getattr(self, self.kind)

    def check(self, key: str) -> None:
        """Raises InputError where there is not exactly one kind, or nothing between its bounds."""
        kinds = [name for name in Domain.model_fields if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise InputError(f"{key}: got {' and '.join(kinds) or 'nothing'}, expected one of {KINDS}")
        if self.kind in ("choice", "grid"):
            return
        low, high = self.values
        if not low < high:
            raise InputError(f"{key}.{self.kind}: got [{low}, {high}], expected the lower bound first")
        if self.kind == "loguniform" and low <= 0:
            raise InputError(f"{key}.loguniform: got a lower bound of {low}, expected more than 0")


class SchedulerSection(Section):
    """Which trials go on."""

    type: Literal["none", "asha", "pbt"] = "asha"
    """none: all to the end. asha: at steps grace · reduction^k a trial goes on if it is among the best 1/reduction of
    those that came so far (Li et al. 2020, "A system for massively parallel hyperparameter tuning"). pbt: every
    `interval` steps the worst quarter go on from the best quarter's checkpoints, with perturbed values (Jaderberg et
    al. 2017, "Population based training of neural networks")."""
    grace: Positive | None = None
    """asha: steps before a trial may be stopped; null: run.eval_every."""
    reduction: Annotated[int, Field(ge=2)] | None = None
    """asha: null: 4."""
    interval: Positive | None = None
    """pbt: steps between perturbations; null: run.eval_every."""

    @model_validator(mode="after")
    def _check(self) -> SchedulerSection:
        for key, owner in (("grace", "asha"), ("reduction", "asha"), ("interval", "pbt")):
            if self.type != owner and getattr(self, key) is not None:
                raise InputError(f"sweep.scheduler.{key}: got {getattr(self, key)}, but it is {owner}'s")
        return self


class SweepSection(Section):
    """`distmeta sweep`: trials of a job with values from a space."""

    space: Annotated[dict[str, Domain], Field(min_length=1)]
    """By dotted key of the job: `outer.lr`."""
    metric: Annotated[str, Field(pattern=r"^val_\w+$")] | None = None
    """Of metrics.jsonl at evaluations; null: val_accuracy_after, val_return_after or val_loss_after."""
    mode: Literal["min", "max"] | None = None
    """null: min for a loss, max for the rest."""
    trials: Positive | None = None
    """Draws of the space, each run at every point of its grid; null: 16, or 1 where all of it is grid."""
    concurrent: Positive | None = None
    """Trials at once; null: as many as there is room for."""
    search: Literal["random", "tpe"] = "random"
    """tpe: tree-structured Parzen estimator (Bergstra et al. 2011), by Optuna."""
    scheduler: SchedulerSection = SchedulerSection()
    seed: Count | None = None
    """Of the draws; null: the job's."""
    steps: Positive | None = None
    """Of a trial, at most run.steps; null: run.steps."""
    budget: Positive | None = None
    """Steps of all trials together, after which the sweep ends; null: none."""

    @model_validator(mode="after")
    def _check(self) -> SweepSection:
        for key, domain in self.space.items():
            domain.check(f"sweep.space.{key}")
        grid = [key for key, domain in self.space.items() if domain.kind == "grid"]
        if grid and self.search == "tpe":
            raise InputError(f"sweep.space.{grid[0]}: got a grid with sweep.search: tpe, expected choice")
        if self.scheduler.type == "pbt" and self.search == "tpe":
            raise InputError("sweep.search: got tpe with sweep.scheduler: pbt, which makes its own values")
        if self.scheduler.type == "pbt" and self.concurrent is not None:
            raise InputError(
                f"sweep.concurrent: got {self.concurrent} with sweep.scheduler: pbt, whose population takes turns on "
                "what room there is: leave it out"
            )
        return self

    @property
    def draws(self) -> int:
        """Draws of the space."""
        return self.trials or (1 if all(d.kind == "grid" for d in self.space.values()) else 16)

    @property
    def count(self) -> int:
        """Trials: draws times points of the grid."""
        total = self.draws
        for domain in self.space.values():
            total *= len(domain.values) if domain.kind == "grid" else 1
        return total
