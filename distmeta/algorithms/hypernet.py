"""A hypernetwork for the last layer: after CNAPs, Requeima et al. 2019, arXiv 1906.07697, §2; Ha et al. 2017.

Shapes: S support rows, F features, W ways, D targets, H hidden units.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as functional
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.adaptation import Adapt, select_adapted
from distmeta.algorithms.class_features import (
    average_by_class,
    find_head_shape,
    mask_absent_classes,
    require_rows,
)
from distmeta.compute.inner_gradient import inner_gradient
from distmeta.protocols import Batch, Model, Score, Theta, find_ways, select_prefix


class HypernetState(NamedTuple):
    phi: Theta
    """The body of theta and the last layer that was generated for the task."""
    counts: Tensor | None
    """Support rows per class, [W]; None for a regression."""


class Hypernet:
    """Generate the weights of the model's last layer from the support set, in one forward pass per task.

        classes:     (w_c, b_c) = (μ_c, 0) + g(μ_c, μ̄),   μ_c = mean features of class c, μ̄ = mean of the μ_c
        regression:  (W, b) = h(mean_n g(features of x_n, y_n)),   a deep set

    A class's row depends only on the examples of the class and on μ̄. Therefore any number of ways works, renaming the
    classes renames the outputs, and the order of the support rows does not matter. Rows of padding are ignored; classes
    without a support row get the lowest logits. Then `inner_steps` steps of gradient descent on the support loss may
    follow, φ ← φ − α∇L_support(φ). The meta-gradient goes through them exactly.

    g has two hidden layers and h has one, each followed by ELU. Hypernetworks: Ha, Dai & Le 2017, arXiv 1609.09106.

    Deviations: the paper generates rows from μ_c only, with separate networks for weight and bias; μ_c + … is the
    authors' code, and μ̄ is ours. The body is not modulated (no FiLM layers) and is trained together with the rest, not
    before it. Regression and gradient steps are ours.

    Args:
        hidden: H ≥ 1; null: the number of features, as in the authors' code.
        inner_steps: gradient steps after the generation; 0 is the paper's.
        inner_lr: their rate α > 0.
        adapt: the parameters that they change: `head`, `all`, `body`, or a glob over parameter names.

    Raises:
        InputError: the model has no last linear layer, or `adapt` matches no parameter.
    """

    group_size = 1

    def __init__(
        self,
        model: Model,
        score: Score,
        hidden: Annotated[int, Field(ge=1)] | None = None,
        inner_steps: Annotated[int, Field(ge=0)] = 0,
        inner_lr: Annotated[float, Field(gt=0)] = 0.1,
        adapt: Adapt = "head",
    ):
        self.model = model
        self.score = score
        self.targets, self.features = find_head_shape(model, "hypernet")
        self.hidden = hidden or self.features
        self.inner_steps = inner_steps
        self.inner_lr = inner_lr
        self.names = select_adapted(model, adapt)

    def init(self, generator: torch.Generator) -> Theta:
        theta = self.model.init_body()
        row = self.features + len(self.model.linear_head) - 1  # one more for the bias, if the head has one
        if find_ways(self.score) is None:
            hidden = [self.hidden] * 3
            sizes = [self.features + self.targets, *hidden, self.targets * row]
        else:
            hidden = [self.hidden] * 2
            sizes = [2 * self.features, *hidden, row]
        for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            bound = fan_in**-0.5  # as torch.nn.Linear starts
            for name, shape in (("weight", (fan_in, fan_out)), ("bias", (fan_out,))):
                uniform = 2 * torch.rand(shape, generator=generator) - 1
                theta[f"hypernet.{layer}.{name}"] = bound * uniform
        return theta

    def begin(self, theta: Theta, support: Batch) -> HypernetState:
        features_SF = self.model.features(theta, support.x)
        ways = find_ways(self.score)
        if ways is None:
            counts_W = None
            rows = generate_regressor(theta, features_SF, require_rows(support.y, "hypernet"))
        else:
            means_WF, counts_W = average_by_class(features_SF, support.y, ways)
            rows = generate_classifier(theta, means_WF, counts_W)
        weight = rows[:, : self.features]
        bias = rows[:, self.features :].flatten()
        head = dict(zip(self.model.linear_head, (weight, bias), strict=False))
        return HypernetState(select_prefix(theta, "model.") | head, counts_W)

    def step(self, theta: Theta, state: HypernetState, support: Any, k: int) -> HypernetState:
        def support_loss(adapted: Theta) -> Tensor:
            outputs = self.predict(theta, state._replace(phi=state.phi | adapted), support.x)
            return self.score(outputs, support)[0]

        gradient = inner_gradient(support_loss, {name: state.phi[name] for name in self.names})
        moved = {name: state.phi[name] - self.inner_lr * g for name, g in gradient.items()}
        return state._replace(phi=state.phi | moved)

    def predict(self, theta: Theta, state: HypernetState, x: Tensor) -> Tensor:
        outputs = self.model(state.phi, x)
        return outputs if state.counts is None else mask_absent_classes(outputs, state.counts)


def generate_classifier(theta: Theta, means_WF: Tensor, counts_W: Tensor) -> Tensor:
    """Return the rows (w_c, b_c) of the last layer, [W, F + 1], or [W, F] if it has no bias.

    μ̄ is the mean over the classes that have a support row.
    """
    present_W1 = (counts_W > 0).to(means_WF.dtype)[:, None]
    context_F = (means_WF * present_W1).sum(0) / present_W1.sum().clamp(min=1)
    rows = apply_layers(theta, torch.cat([means_WF, context_F.expand_as(means_WF)], 1), 0, 3)
    return rows + functional.pad(means_WF, (0, rows.shape[1] - means_WF.shape[1]))


def generate_regressor(theta: Theta, features_SF: Tensor, y_SD: Tensor) -> Tensor:
    """Return the rows of the last layer, [D, F + 1], or [D, F] if it has no bias."""
    pairs = torch.cat([features_SF, y_SD], 1)
    summary_H = functional.elu(apply_layers(theta, pairs, 0, 2)).mean(0)
    return apply_layers(theta, summary_H, 2, 4).view(y_SD.shape[1], -1)


def apply_layers(theta: Theta, x: Tensor, first: int, end: int) -> Tensor:
    """Apply the layers `first` … `end` − 1 of the hypernetwork, with ELU between them."""
    for layer in range(first, end):
        x = x @ theta[f"hypernet.{layer}.weight"] + theta[f"hypernet.{layer}.bias"]
        if layer < end - 1:
            x = functional.elu(x)
    return x
