"""What users write against: episodes, algorithms, task families and models, with their optional capabilities.

An algorithm is a few pure functions of `theta` and the data of **one** task. The gradient of its meta-loss with respect
to `theta` is the meta-gradient. Other code decides how that is unrolled, differentiated, vectorised and distributed
(`compute/`, `runtime/`).

There is no base class and nothing to register. A class that has the methods of a protocol provides it. Code tests for
an optional capability with `isinstance(part, Capability)`. `distmeta check --run-one-task` lists the capabilities that
a job's parts provide. This module imports only torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

Theta = dict[str, Tensor]
"""Everything that the outer optimizer updates, by dotted name: `model.<parameter>`, `inner_lr.<parameter>`, …"""

State = Any
"""What an algorithm carries through a task: phi, phi with optimizer state, prototypes, a memory. A pytree."""

Metrics = dict[str, Tensor]
"""Named scalars of one task."""

SPLITS = ("train", "val", "test")

PADDING = -1
"""The class index of a row that only fills a batch."""


# --- Data ---------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Examples of one task: `x` [N, ...] and `y`, class indices [N] or targets [N, D].

    If tasks differ in size, rows with the class index `PADDING` fill the smaller ones. They have no effect except on
    the statistics of a batch norm.
    """

    x: Any
    y: Any


@runtime_checkable
class Examples(Protocol):
    """A support or query set of inputs and targets: a `Batch`, or a user's own NamedTuple with further fields."""

    x: Any
    y: Any


class Episode(NamedTuple):
    """The data drawn for one task. In `Episodes` of several tasks every tensor has a leading task axis, [T, ...].

    `support` is a pytree, usually a `Batch`, that every inner step sees as a whole; or it is a `PerStep`.
    """

    support: Any
    query: Any


Episodes = Episode | list[Episode]
"""Several tasks: one `Episode` stacked over tasks if all have the same shapes, else a list with one per task."""


class PerStep(NamedTuple):
    """A support set with different data for each inner step (collected trajectories)."""

    batches: tuple[Any, ...]


Score = Callable[[Any, Any], tuple[Tensor, Metrics]]
"""(outputs, batch) -> (loss, metrics) of one task. The score of a classification also provides `HasWays`."""

Unroll = Callable[..., Any]
"""unroll(algorithm, theta, support, steps=None, detach=False, every=False) -> the state after the inner loop.

With `every` it returns the list of states after each step; with `detach` the states are constants. A `meta_loss` runs
its inner loops only through this function, from the theta that it was given, and always the same loops. The caller
decides how they are differentiated.
"""


@runtime_checkable
class HasWays(Protocol):
    """A score of classes (`tasks.few_shot.ClassificationScore`). Metric methods and flexible heads read it."""

    ways: int
    """Number of classes of the task that is scored. Evaluation may have another number than training."""


@runtime_checkable
class MayLackClasses(Protocol):
    """A score of tasks that may have fewer classes than `ways`. Algorithms ask before they split a support set."""

    absent: bool


def find_ways(score: Score) -> int | None:
    """Return the number of classes of the scored task, or None if its targets are not classes."""
    return score.ways if isinstance(score, HasWays) else None


# --- Models -------------------------------------------------------------------------------------------------------


class Model(Protocol):
    """A network as a pure function of its parameters (`models.functional.FunctionalModel`)."""

    head: tuple[str, ...]
    """Keys of the last layer's parameters in theta; empty if there is none."""
    linear_head: tuple[str, ...]
    """The same for a plain linear layer: (weight,) or (weight, bias)."""
    head_init: str
    """How a task's head starts: `linear`, `shared` or `prototype`."""
    adaptable: tuple[str, ...]
    """The keys of phi: what an inner loop may change."""
    module: torch.nn.Module

    def init(self, generator: torch.Generator) -> Theta:
        """Return the trainable parameters at step 0, with keys `model.<parameter>`."""
        ...

    def init_body(self) -> Theta:
        """Return the trainable parameters at step 0 without those of the head."""
        ...

    def begin(self, theta: Mapping[str, Tensor], support: Any = None, ways: int | None = None) -> Theta:
        """Return phi before the first inner step, with a head for `ways` classes."""
        ...

    def features(self, phi: Mapping[str, Tensor], x: Any) -> Tensor:
        """Return the inputs of the head, [N, F]. `phi` does not need the head's parameters."""
        ...

    def __call__(self, phi: Mapping[str, Tensor], x: Any) -> Any:
        """Return the outputs for inputs `x` under the parameters `phi`."""
        ...


# --- Algorithms ---------------------------------------------------------------------------------------------------


@runtime_checkable
class Algorithm(Protocol):
    """A meta-learner, as pure functions of theta and the data of one task.

    The constructor receives the job's `algorithm:` keys. If it has parameters named `model` and `score`, it also
    receives the model (a `Model`) and the task family's score. What else it can do is in the capabilities below.
    """

    group_size: int
    """Tasks that one loss needs together: 1, or 2 for pairwise losses."""
    inner_steps: int
    """Inner steps during training; 0 for methods without an inner loop (ProtoNet, memory networks)."""

    def init(self, generator: torch.Generator) -> Theta:
        """Return the meta-parameters at step 0."""
        ...

    def begin(self, theta: Theta, support: Any) -> State:
        """Return the state before the first inner step."""
        ...

    def step(self, theta: Theta, state: State, support: Any, k: int, /) -> State:
        """Return the state after inner step `k`. A learned rate per step keeps its last value later."""
        ...

    def predict(self, theta: Theta, state: State, x: Any, /) -> Any:
        """Return the outputs for query inputs `x`."""
        ...


@runtime_checkable
class HasMetaLoss(Protocol):
    """An algorithm that defines its own meta-loss. `compute.gradient` calls it instead of the default, the query loss.

    If the meta-gradient is not the derivative of a loss (Reptile, iMAML), the meta-loss is a surrogate whose gradient
    is right. Its metrics then hold the true query loss as `loss`.
    """

    def meta_loss(
        self, theta: Theta, episode: Episode, unroll: Unroll, score: Score
    ) -> tuple[Tensor, Metrics]:
        """Return a scalar whose gradient in theta is the meta-gradient, and metrics with the query loss as `loss`.

        With `group_size` 2 the episode holds two tasks, stacked on the first axis, and each metric has shape [2].
        """
        ...


@runtime_checkable
class FirstOrder(Protocol):
    """An algorithm that may treat inner gradients as constants. `runtime.resolve` asks before it chooses how to
    differentiate: without second-order graphs there is nothing to save."""

    first_order: bool


@runtime_checkable
class ChangesOverTraining(Protocol):
    """An algorithm that changes with the outer step. The worker calls `at` before each training step.

    Evaluation uses the algorithm itself. If another attribute than `ScheduledValues.scheduled` differs between steps,
    compiled code is compiled again.
    """

    def at(self, step: int) -> Algorithm:
        """Return the algorithm as it trains in outer step `step`, counted from 0."""
        ...


@runtime_checkable
class ScheduledValues(Protocol):
    """Numbers that `ChangesOverTraining.at` changes. Compiled code takes them as arguments, so one program serves all
    steps."""

    scheduled: Any
    """A pytree of tensors."""


@runtime_checkable
class RepeatsOuterStep(Protocol):
    """An algorithm that takes several outer steps on the same episodes (as PPO does). The strategy reads it."""

    outer_epochs: int


@runtime_checkable
class ActsWithMemory(Protocol):
    """A policy with a memory (RL², SNAIL). `compute.episodes` calls `act` once per time step while it collects data.

    `predict` returns the same outputs for all time steps at once.
    """

    def act(self, theta: Theta, state: State, x: Any) -> tuple[Any, State]:
        """Return the outputs for one time step, and the state from which to act next."""
        ...


@runtime_checkable
class ScoresSupport(Protocol):
    """An algorithm that keeps the support loss as an attribute. Evaluation replaces it if the split has other ways."""

    score: Score


@runtime_checkable
class AdaptsParameters(Protocol):
    """An algorithm whose inner loop changes some of the model's parameters. `distmeta check` prints which ones."""

    names: tuple[str, ...]
    """Keys of phi."""


@runtime_checkable
class BilevelProblem(Protocol):
    """Two nested problems, as pure functions. The algorithm `bilevel` calls them; a job names the class.

    Upper parameters are what the outer optimizer updates. Lower parameters are trained in each task by an inner loop.
    The constructor receives `algorithm.options`, and the job's model and score if it has such parameters.
    """

    def init_upper(self, generator: torch.Generator) -> Theta:
        """Return the upper parameters at step 0. Called once per run."""
        ...

    def init_lower(self, generator: torch.Generator) -> Theta:
        """Return the lower parameters before the first inner step.

        Called once when the algorithm is built, and in every task with `lower_start: random`.
        """
        ...

    def lower_loss(self, upper: Theta, lower: Theta, support: Any, /) -> Tensor:
        """Return the loss that every inner step reduces, a scalar."""
        ...

    def upper_loss(self, upper: Theta, lower: Theta, query: Any, /) -> tuple[Tensor, Metrics]:
        """Return the loss of the trained lower parameters, a scalar, and metrics. Called once after the inner loop."""
        ...

    def predict(self, upper: Theta, lower: Theta, x: Any, /) -> Any:
        """Return the outputs for inputs `x`. Evaluation scores them by the task family's score."""
        ...


# --- Task families ------------------------------------------------------------------------------------------------


@runtime_checkable
class TaskFamily(Protocol):
    """A distribution over tasks. Theta never enters, except through `CollectsData`."""

    in_shape: tuple[int, ...]
    """Shape of one example, without a batch axis."""
    out_features: int
    """Number of outputs that a model needs: targets of a regression, ways of a classification."""

    def draw(self, split: str, ids: Any) -> Episodes:
        """Return the episodes of the tasks `ids` (uint64 [T]); a pure function of its arguments.

        Derive every random number from the ids. Then a task is the same on every worker. If all tasks have the same
        shapes, return one `Episode` with a leading task axis; else a list with one `Episode` per task. `split` is
        "train", "val" or "test".
        """
        ...

    def score(self, outputs: Any, batch: Any) -> tuple[Tensor, Metrics]:
        """Return the loss and the metrics of one task. `best` is decided by the first of accuracy, return and loss."""
        ...


@runtime_checkable
class ScoresPerSplit(Protocol):
    """A family whose evaluation tasks are scored differently (other ways). Workers call it once per split."""

    def scorer(self, split: str) -> Score:
        """Return the score for tasks of a split."""
        ...


@runtime_checkable
class CollectsData(Protocol):
    """A family whose data depend on a policy (reinforcement learning). `compute.episodes` calls it before any gradient.

    Once per inner step, and once more for the query data, it collects with the policy adapted so far. The result is
    then replayed as constants.
    """

    def collect(self, split: str, ids: Any, k: int, policy: Callable[[Any], Any]) -> Any:
        """Return the batch of inner step `k`, stacked over tasks; `policy(x)` returns outputs for all tasks."""
        ...


@runtime_checkable
class HasFingerprint(Protocol):
    """A family that identifies the content of its files. A worker or a resume with other data is refused."""

    fingerprint: str | None


@runtime_checkable
class HasEvaluationWays(Protocol):
    """A classification family that says how many of the model's outputs an evaluation task uses (`--predictions`)."""

    eval_ways: int


@runtime_checkable
class PredictsLabels(Protocol):
    """A family that says which predictions a model's outputs mean. `distmeta evaluate --predictions` asks it.

    Without it, float labels are predicted by the outputs themselves, and integer labels by the largest output along the
    class axis, or by the sign if outputs and labels have the same shape.
    """

    def predict_labels(self, outputs: Any, batch: Any) -> Any:
        """Return the predictions of one task's query set, a pytree like `batch.y`."""
        ...


@runtime_checkable
class NamesClasses(Protocol):
    """A family of named classes. Evaluation compares the tested ones with those that the run was trained on."""

    class_names: Mapping[str, Sequence[str]]
    """The names of each split's classes."""


@runtime_checkable
class HasPreparation(Protocol):
    """A family of images. Its preparation is stored in checkpoints, so that a learner can treat new images alike."""

    preparation: Any
    """A `tasks.image_preparation.Preparation`, or None."""


@runtime_checkable
class DrawsFigures(Protocol):
    """A family that can show its tasks. `distmeta evaluate --figures` calls it after the evaluation."""

    def figures(self, ids: Any, episodes: Episodes) -> Mapping[str, Any]:
        """Return named matplotlib figures of a few tasks, stacked as `draw` stacks them."""
        ...


@runtime_checkable
class Films(Protocol):
    """A family whose collected data can be watched. `distmeta evaluate --video` calls it."""

    def film(self) -> Any:
        """Return a `tasks.rollout.Film`: the family with a camera."""
        ...


# --- Any part of a job --------------------------------------------------------------------------------------------


@runtime_checkable
class ChecksJob(Protocol):
    """A part that has conditions on the rest of the job. Called once when a job is read, before anything is built."""

    @staticmethod
    def check_job(job: Any, options: Mapping[str, Any]) -> None:
        """Raise `InputError` if the part, with these options, does not fit the rest of the job."""
        ...


@runtime_checkable
class StrategyClass(Protocol):
    """What a job reads from the class of a strategy when it is parsed (`distmeta.runtime.strategy.Strategy`)."""

    requires_workers: bool
    """Whether the strategy needs Ray workers."""
    equals_driver: bool
    """Whether theta and the optimizer state are those of `driver` to the bit. A resume may change between these."""


CAPABILITIES: dict[str, tuple[type, ...]] = {
    "algorithm": (
        HasMetaLoss,
        FirstOrder,
        ChangesOverTraining,
        ScheduledValues,
        RepeatsOuterStep,
        ActsWithMemory,
        ScoresSupport,
        AdaptsParameters,
    ),
    "tasks": (
        ScoresPerSplit,
        CollectsData,
        HasFingerprint,
        HasEvaluationWays,
        PredictsLabels,
        NamesClasses,
        HasPreparation,
        DrawsFigures,
        Films,
    ),
}
"""The optional capabilities by the section of the job whose part may provide them."""


def list_capabilities(section: str, part: Any) -> list[str]:
    """Return the names of the capabilities that a part of this section provides."""
    return [capability.__name__ for capability in CAPABILITIES[section] if isinstance(part, capability)]


# --- Small helpers on these types ---------------------------------------------------------------------------------


def one_hot(y: Tensor, ways: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return class indices [N] as rows [N, ways]. Rows of padding are zero. Works under vmap."""
    classes = torch.arange(ways, device=y.device)
    return (y[..., None] == classes).to(dtype or torch.get_default_dtype())


def select_prefix(theta: Mapping[str, Tensor], prefix: str) -> Theta:
    """Return the entries of `theta` whose names start with `prefix`."""
    return {name: value for name, value in theta.items() if name.startswith(prefix)}
