"""The vocabulary: what an algorithm, a task family and an episode are. Imports torch alone.

An algorithm is a few pure functions of `theta` and the data of **one** task; the gradient of its
`meta_loss` in `theta` is the meta-gradient. Who unrolls, differentiates, vectorises and distributes it
is decided elsewhere (`compute/`, `runtime/`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Theta = dict[str, Tensor]
"""Everything the outer optimizer moves, by dotted name: `model.<parameter>`, `inner_lr.<parameter>`, …"""

State = Any
"""What an algorithm carries through a task: phi, phi and optimizer state, prototypes, a memory. A pytree."""

Metrics = dict[str, Tensor]
"""Named scalars of one task."""

SPLITS = ("train", "val", "test")

PADDING = -1
"""The class index of a row that only fills a batch up."""


class Batch(NamedTuple):
    """Examples of one task: `x` [N, ...], `y` [N] class indices or [N, D] targets.

    Where tasks differ in size, class indices of `PADDING` mark rows that fill a smaller task up; they
    count nowhere but in the statistics of a batch norm.
    """

    x: Tensor
    y: Tensor


class Episode(NamedTuple):
    """The data drawn for one task. For several (`Episodes`), every leaf is stacked over tasks, [T, ...].

    `support` is a pytree, usually a `Batch`, that every inner step sees whole; or `PerStep`.
    """

    support: Any
    query: Any


Episodes = Episode | list[Episode]
"""Of several tasks: stacked over them, [T, ...]; where they differ in shape a list, one a task, without that axis."""


class PerStep(NamedTuple):
    """A support set whose data differ from one inner step to the next (collected trajectories)."""

    batches: tuple[Any, ...]


def support_at(support: Any, k: int) -> Any:
    """The support data that inner step `k` sees; past the last collected step, the last."""
    if isinstance(support, PerStep):
        return support.batches[min(k, len(support.batches) - 1)]
    return support


Score = Callable[[Any, Any], tuple[Tensor, Metrics]]
"""(outputs, batch) -> (loss, metrics), both of one task. That of a classification has an attribute `ways`: the classes
of the task at hand, which may be others in evaluation than in training (`ways_of`)."""

Unroll = Callable[..., Any]
"""unroll(algorithm, theta, support, steps=None, detach=False, every=False) -> the state after the inner loop; with
`every`, the list of those after each step; with `detach`, as constants. A `meta_loss` runs its inner loops by this
alone, from the theta it was given, and always the same ones: how they are differentiated is not its business."""


class Model(Protocol):
    """A network as a pure function of its parameters (see `models.functional.Functional`)."""

    head: tuple[str, ...]
    """Keys of the last linear layer in theta; empty where there is none."""
    head_init: str
    """How a task's head starts: `linear`, `shared` or `prototype`."""
    adaptable: tuple[str, ...]
    """The keys of phi: what an inner loop may move."""
    module: torch.nn.Module

    def init(self, generator: torch.Generator) -> Theta:
        """The trainable parameters at the start, keys `model.<parameter>`."""
        ...

    def init_body(self) -> Theta:
        """Those without the head's."""
        ...

    def begin(self, theta: Mapping[str, Tensor], support: Any = None, ways: int | None = None) -> Theta:
        """phi before the first inner step, with a head for `ways` classes."""
        ...

    def features(self, phi: Mapping[str, Tensor], x: Any) -> Tensor:
        """What enters the head, [N, F]; phi need not have the head."""
        ...

    def __call__(self, phi: Mapping[str, Tensor], x: Any) -> Any:
        """Outputs for inputs `x` under the parameters `phi`."""
        ...


@runtime_checkable
class Algorithm(Protocol):
    """What a meta-learner is. Pure functions; one task; pytrees of tensors.

    The constructor gets the job's `algorithm:` keys, and `model` (a callable `model(phi, x)`, with
    `model.init(generator)`) and `score` (the task family's) where it accepts them.

    An optional fifth method replaces `query_loss`:

        def meta_loss(self, theta, episode, unroll, score) -> tuple[Tensor, Metrics]

    It returns a scalar whose gradient in `theta` is the meta-gradient, and metrics of which `loss` is the
    true query loss. With `group_size` 2 it is given the episodes of two tasks, stacked on the first axis, and
    its metrics hold one number a task, [2].

    An optional sixth, `at(step) -> Algorithm`, gives the algorithm as it trains in outer step `step` (from 0), for
    what changes on a schedule. Evaluation uses the algorithm itself. Numbers that change are best held as tensors in
    one attribute, `scheduled` (a pytree): compiled code takes them as arguments, and one program serves all steps.
    Where another attribute differs (first order or not, terms left out) there is another program.

    An optional attribute `outer_epochs` is the number of steps that the outer optimizer takes on the episodes of one
    step of the run: those of the theta that the step began with.

    An optional seventh, `act(theta, state, x) -> (outputs, state)`, is for policies with a memory: it predicts one time
    step while data are collected and gives the state to act from next; `predict` has the same outputs for all time
    steps at once.
    """

    group_size: int
    """Tasks that one loss needs at once: 1, or 2 for pairwise losses."""
    inner_steps: int
    """Steps of the inner loop while training; 0 for methods that do not iterate (ProtoNet, memories)."""

    def init(self, generator: torch.Generator) -> Theta:
        """The meta-parameters at the start."""
        ...

    def begin(self, theta: Theta, support: Any) -> State:
        """The state before the first inner step: phi (+ inner optimizer state) | prototypes | memory."""
        ...

    def step(self, theta: Theta, state: State, support: Any, k: int, /) -> State:
        """Inner step `k`. Past the trained steps, a learned rate per step stays at its last."""
        ...

    def predict(self, theta: Theta, state: State, x: Any, /) -> Any:
        """The outputs for query inputs `x`."""
        ...


@runtime_checkable
class TaskFamily(Protocol):
    """A distribution over tasks. `theta` never enters, but through `collect`.

    What `distmeta evaluate` can show of its tasks, two optional methods: `pictures`. An optional attribute
    `fingerprint`, a text that is another one where the data are: workers and resumes with other data are refused.
    """

    in_shape: tuple[int, ...]
    """Shape of one example, without a batch axis."""
    out_features: int
    """Outputs a model must have: targets of a regression, ways of a classification."""

    def draw(self, split: str, ids: Any) -> Episodes:
        """Episodes of the tasks `ids` (uint64, [T]), stacked over tasks; a pure function of its arguments.

        Where tasks differ in size: a list of their episodes, which are computed shape by shape (`compute.buckets`).
        `split` is "train", "val" or "test"; the last two use the evaluation's ways and shots.
        """
        ...

    def score(self, outputs: Any, batch: Any) -> tuple[Tensor, Metrics]:
        """Loss and metrics of one task's outputs. The first of accuracy, return, loss is what `best` means."""
        ...


def query_loss(
    algorithm: Algorithm, theta: Theta, episode: Episode, unroll: Unroll, score: Score
) -> tuple[Tensor, Metrics]:
    """The default `meta_loss`: L_query(φ_K), with φ_K the state after the inner loop on the support set."""
    state = unroll(algorithm, theta, episode.support)
    loss, metrics = score(widened(algorithm.predict(theta, state, episode.query.x)), episode.query)
    return loss, {"loss": loss, **metrics}


def widened(outputs: Any) -> Any:
    """Outputs as float32 where autocast made them bfloat16: losses and distances are not for eight bits."""
    if not isinstance(outputs, Tensor):
        return tree_map(lambda leaf: widened(leaf) if isinstance(leaf, Tensor) else leaf, outputs)
    return outputs.float() if outputs.dtype == torch.bfloat16 else outputs


def ways_of(score: Score) -> int | None:
    """Classes of the task at hand; None for tasks without classes."""
    return getattr(score, "ways", None)


def one_hot(y: Tensor, ways: int, dtype: torch.dtype | None = None) -> Tensor:
    """Class indices [N] -> [N, ways], zero in the rows of padding; float unless told. Runs under vmap."""
    classes = torch.arange(ways, device=y.device)
    return (y[..., None] == classes).to(dtype or torch.get_default_dtype())


def select(theta: Mapping[str, Tensor], prefix: str) -> Theta:
    """The entries of `theta` whose names start with `prefix`."""
    return {name: value for name, value in theta.items() if name.startswith(prefix)}
