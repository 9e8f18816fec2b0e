"""A hypernetwork that emits the last layer: after CNAPs, Requeima et al. 2019, arXiv 1906.07697, §2; Ha et al. 2017.

Shapes: S support rows, F features, W ways, D targets, H hidden units.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as functional
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.adaptation import adapted_names
from distmeta.algorithms.class_features import class_means, head_shape, without_absent
from distmeta.protocols import Batch, Model, Score, Theta, select_prefix, ways_of


class Emitted(NamedTuple):
    """phi with the task's own last layer."""

    phi: Theta
    counts: Tensor | None
    """Support rows of each class, [W]; None for a regression."""


class Hypernet:
    """A network reads the support set and emits the weights of the model's last layer, one forward pass a task.

        classes:     (w_c, b_c) = (μ_c, 0) + g(μ_c, μ̄),   μ_c = mean features of class c, μ̄ = mean of the μ_c
        regression:  (W, b) = h(mean_n g(features of x_n, y_n)),   a deep set

    phi is theta's body with this layer as its head. A class's row depends on the class's examples and on μ̄ alone, so
    the number of ways is free, renaming classes renames outputs, and the order of the support rows does not matter.
    Rows of padding count nowhere; classes without a support row get logits of as good as −∞. On top, `inner_steps`
    steps of gradient descent on the support loss may follow, φ ← φ − α∇L_support(φ), through which the meta-gradient
    goes exactly.

    g has two hidden layers and h one, with ELU after each. The paper emits the classifier's rows so, from μ_c
    alone, with separate networks for weight and bias; μ_c + … is the authors' code. Deviations: μ̄; the body is not
    modulated (no FiLM layers); it is trained with the rest, not beforehand. Regression and gradient steps are ours.
    Hypernetworks: Ha, Dai & Le 2017, arXiv 1609.09106.

    Args:
        hidden: H; null: as many as the model has features (as the authors' code).
        inner_steps: gradient steps after the emission; 0, the paper's: none.
        inner_lr: their rate α.
        adapt: what they move: `head`, `all`, `body`, or a glob over parameter names.

    Raises:
        InputError: the model has no last linear layer, or `adapt` matches nothing.
    """

    group_size = 1

    def __init__(
        self,
        model: Model,
        score: Score,
        hidden: Annotated[int, Field(ge=1)] | None = None,
        inner_steps: Annotated[int, Field(ge=0)] = 0,
        inner_lr: Annotated[float, Field(gt=0)] = 0.1,
        adapt: str = "head",
    ):
        self.model, self.score = model, score
        self.shape = head_shape(model, "hypernet")
        self.hidden, self.inner_steps, self.inner_lr = hidden, inner_steps, inner_lr
        names = adapted_names(model, adapt)
        self.names = names if inner_steps > 0 else ()

    def init(self, generator: torch.Generator) -> Theta:
        theta = self.model.init_body()
        targets, features = self.shape
        row = features + len(self.model.head) - 1  # a head may lack a bias
        hidden = self.hidden or features
        if ways_of(self.score) is None:
            sizes = [features + targets, hidden, hidden, hidden, targets * row]
        else:
            sizes = [2 * features, hidden, hidden, row]
        for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            bound = fan_in**-0.5  # torch.nn.Linear's own
            for name, shape in (("weight", (fan_in, fan_out)), ("bias", (fan_out,))):
                uniform = 2 * torch.rand(shape, generator=generator) - 1
                theta[f"hypernet.{layer}.{name}"] = bound * uniform
        return theta

    def begin(self, theta: Theta, support: Batch) -> Emitted:
        features_SF = self.model.features(theta, support.x)
        ways = ways_of(self.score)
        if ways is None:
            rows, counts_W = emit_regressor(theta, features_SF, support.y), None
        else:
            means_WF, counts_W = class_means(features_SF, support.y, ways)
            rows = emit_classifier(theta, means_WF, counts_W)
        weight, bias = rows[:, : features_SF.shape[1]], rows[:, features_SF.shape[1] :].flatten()
        head = dict(zip(self.model.head, (weight, bias), strict=False))
        return Emitted(select_prefix(theta, "model.") | head, counts_W)

    def step(self, theta: Theta, state: Emitted, support: Any, k: int) -> Emitted:
        def loss(moving: Theta) -> Tensor:
            outputs = self.predict(theta, state._replace(phi=state.phi | moving), support.x)
            return self.score(outputs, support)[0]

        gradient = torch.func.grad(loss)({name: state.phi[name] for name in self.names})
        moved = {name: state.phi[name] - self.inner_lr * g for name, g in gradient.items()}
        return state._replace(phi=state.phi | moved)

    def predict(self, theta: Theta, state: Emitted, x: Tensor) -> Tensor:
        outputs = self.model(state.phi, x)
        return outputs if state.counts is None else without_absent(outputs, state.counts)


def emit_classifier(theta: Theta, means_WF: Tensor, counts_W: Tensor) -> Tensor:
    """The last layer's rows (w_c, b_c), [W, F + 1] (or F); the mean over classes is over those with a support row."""
    present_W1 = (counts_W > 0).to(means_WF.dtype)[:, None]
    context_F = (means_WF * present_W1).sum(0) / present_W1.sum().clamp(min=1)
    rows = network(theta, torch.cat([means_WF, context_F.expand_as(means_WF)], 1), 0, 3)
    return rows + functional.pad(means_WF, (0, rows.shape[1] - means_WF.shape[1]))


def emit_regressor(theta: Theta, features_SF: Tensor, y_SD: Tensor) -> Tensor:
    """The last layer's rows, [D, F + 1] (or F)."""
    summary_H = functional.elu(network(theta, torch.cat([features_SF, y_SD], 1), 0, 2)).mean(0)
    return network(theta, summary_H, 2, 4).view(y_SD.shape[1], -1)


def network(theta: Theta, x: Tensor, first: int, end: int) -> Tensor:
    """The layers `first` … `end` − 1, with ELU between them."""
    for layer in range(first, end):
        x = x @ theta[f"hypernet.{layer}.weight"] + theta[f"hypernet.{layer}.bias"]
        if layer < end - 1:
            x = functional.elu(x)
    return x
