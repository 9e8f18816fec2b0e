"""The section `sweep` of a job: which values are tried, how they are found, and for how long."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distmeta.config.sections import Count, Positive, Section
from distmeta.errors import InputError

Finite = Annotated[float, Field(allow_inf_nan=False)]
FloatBounds = Annotated[list[Finite], Field(min_length=2, max_length=2)]
IntegerBounds = Annotated[list[int], Field(min_length=2, max_length=2)]
Values = Annotated[list[Any], Field(min_length=1)]
KINDS = "uniform: [low, high], loguniform: [low, high], integers: [low, high], choice: [a, b, …] or grid: [a, b, …]"
DEFAULT_DRAWS = 16


class Domain(Section):
    """The values of one key. Exactly one of these keys is given."""

    uniform: FloatBounds | None = None
    """[low, high]: uniform between the bounds."""
    loguniform: FloatBounds | None = None
    """[low, high]: uniform in the logarithm, for learning rates."""
    integers: IntegerBounds | None = None
    """[low, high]: low, low + 1, …, high."""
    choice: Values | None = None
    """One of these values, all equally likely."""
    grid: Values | None = None
    """Every one of these values, together with every draw of the rest of the space."""

    @property
    def kind(self) -> str:
        """The key that is given."""
        return self._given_kinds()[0]

    @property
    def values(self) -> list[Any]:
        """The bounds, or all values."""
        return getattr(self, self.kind)

    def _given_kinds(self) -> list[str]:
        return [name for name in Domain.model_fields if getattr(self, name) is not None]

    def check(self, key: str) -> None:
        """Raise InputError if not exactly one kind is given, or its bounds enclose nothing."""
        kinds = self._given_kinds()
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
    """The rule for which trials continue."""

    type: Literal["none", "asha", "pbt"] = "asha"
    """`none`: all run to the end. `asha`: at steps grace · reduction^k a trial continues if it is among the
    best 1/reduction of those that got there so far (Li et al. 2020, "A system for massively parallel hyperparameter
    tuning").
    `pbt`: every `interval` steps the worst quarter continues from the best quarter's checkpoints with perturbed values
    (Jaderberg et al. 2017, "Population based training of neural networks")."""
    grace: Positive | None = None
    """asha: steps before a trial may be stopped; null: run.eval_every."""
    reduction: Annotated[int, Field(ge=2)] | None = None
    """asha: the reduction factor; null: 4."""
    interval: Positive | None = None
    """pbt: steps between perturbations; null: run.eval_every."""

    @model_validator(mode="after")
    def _check_owners(self) -> SchedulerSection:
        for key, owner in (("grace", "asha"), ("reduction", "asha"), ("interval", "pbt")):
            value = getattr(self, key)
            if self.type != owner and value is not None:
                raise InputError(
                    f"sweep.scheduler.{key}: got {value} with sweep.scheduler.type: {self.type}, expected {owner}"
                )
        return self


class SweepSection(Section):
    """`distmeta sweep`: trials of the job with values from a space."""

    space: Annotated[dict[str, Domain], Field(min_length=1)]
    """The domains to search, by dotted key of the job, such as `outer.lr`."""
    metric: Annotated[str, Field(pattern=r"^val_\w+$")] | None = None
    """Metric of the evaluations that trials are compared by; null: val_accuracy_after, val_return_after or
    val_loss_after: the first of these that exists."""
    mode: Literal["min", "max"] | None = None
    """Whether less or more is better; null: less for a loss, else more."""
    trials: Positive | None = None
    """Draws of the space, each run at every point of its grid; null: 16, or 1 if all of the space is a grid."""
    concurrent: Positive | None = None
    """Trials at the same time; null: as many as the cluster has room for."""
    search: Literal["random", "tpe"] = "random"
    """Independent draws, or the tree-structured Parzen estimator (Bergstra et al. 2011) of Optuna."""
    scheduler: SchedulerSection = SchedulerSection()
    """Which trials continue."""
    seed: Count | None = None
    """Seed of the draws; null: the job's."""
    steps: Positive | None = None
    """Steps of each trial, at most run.steps; null: run.steps."""
    budget: Positive | None = None
    """Steps of all trials together, after which the sweep ends; null: no limit."""

    @model_validator(mode="after")
    def _check_search(self) -> SweepSection:
        for key, domain in self.space.items():
            domain.check(f"sweep.space.{key}")
        grid_keys = self._grid_keys()
        if grid_keys and self.search == "tpe":
            raise InputError(
                f"sweep.space.{grid_keys[0]}: got a grid with sweep.search: tpe, expected choice"
            )
        if self.scheduler.type == "pbt" and self.search == "tpe":
            raise InputError("sweep.search: got tpe with sweep.scheduler: pbt, which makes its own values")
        if self.scheduler.type == "pbt" and self.concurrent is not None:
            raise InputError(
                f"sweep.concurrent: got {self.concurrent} with sweep.scheduler: pbt, whose trials take turns on the "
                "cluster's resources: leave it out"
            )
        return self

    def _grid_keys(self) -> list[str]:
        return [key for key, domain in self.space.items() if domain.kind == "grid"]

    @property
    def draws(self) -> int:
        """Number of draws of the space."""
        all_grid = len(self._grid_keys()) == len(self.space)
        return self.trials or (1 if all_grid else DEFAULT_DRAWS)

    @property
    def count(self) -> int:
        """Number of trials: draws times points of the grid."""
        total = self.draws
        for key in self._grid_keys():
            total *= len(self.space[key].values)
        return total
