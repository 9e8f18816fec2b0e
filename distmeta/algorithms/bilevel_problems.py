"""The bilevel problems that come with distmeta: reweighting examples, a learned loss, data distillation.

Shapes: N examples of a batch, S synthetic images.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distmeta.algorithms.class_features import describe_targets
from distmeta.errors import InputError
from distmeta.protocols import PADDING, Metrics, Model, Score, Theta


class Reweighting:
    """Weight training examples with noisy labels by a small network of their loss.

        L_lower = Σ_i v_i ℓ_i / Σ_i v_i,   v_i = sigmoid(net_u(sg(ℓ_i))),   L_upper = the loss on clean examples

    The network starts with equal weights: step 0 is plain training. The normalised weights are those of Ren et al.
    2018, arXiv 1803.09050, eq. 9; the network is that of Meta-Weight-Net: Shu et al. 2019, arXiv 1902.07379, §3.

    Args:
        hidden: units of the weight network's hidden layer.
    """

    def __init__(self, model: Model, score: Score, hidden: int = 32) -> None:
        self.model = model
        self.score = score
        self.hidden = hidden

    def init_upper(self, generator: torch.Generator) -> Theta:
        return {
            "weight1": torch.randn(self.hidden, generator=generator),
            "bias1": torch.randn(self.hidden, generator=generator),
            "weight2": torch.zeros(self.hidden),
        }

    def init_lower(self, generator: torch.Generator) -> Theta:
        return draw_parameters(self.model, generator)

    def weigh(self, upper: Theta, loss_N: Tensor) -> Tensor:
        """Return the weights [N] of examples with these losses. Their mean is 1."""
        hidden_NH = torch.tanh(loss_N.detach()[:, None] * upper["weight1"] + upper["bias1"])
        weight_N = torch.sigmoid(hidden_NH @ upper["weight2"])
        return weight_N / weight_N.mean()

    def lower_loss(self, upper: Theta, lower: Theta, support: Any) -> Tensor:
        check_class_indices(support.y)
        outputs = self.model(lower, support.x)
        loss_N = F.cross_entropy(outputs, support.y, reduction="none", ignore_index=PADDING)
        weight_N = self.weigh(upper, loss_N) * (support.y != PADDING)
        return (weight_N * loss_N).sum() / weight_N.sum()

    def upper_loss(self, upper: Theta, lower: Theta, query: Any) -> tuple[Tensor, Metrics]:
        return self.score(self.model(lower, query.x), query)

    def predict(self, upper: Theta, lower: Theta, x: Any) -> Tensor:
        return self.model(lower, x)


class LearnedLoss:
    """Learn the loss function of a regression: a network of prediction and target.

        L_lower = mean_i softplus(net_u(ŷ_i, y_i)),   L_upper = the real loss on the query set

    Reference: Bechtle et al. 2021, "Meta-learning via learned loss", arXiv 1906.05374, §3.1.

    Args:
        hidden: units of each of the loss network's two hidden layers.
    """

    def __init__(self, model: Model, score: Score, hidden: int = 40) -> None:
        self.model = model
        self.score = score
        self.hidden = hidden

    def init_upper(self, generator: torch.Generator) -> Theta:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

        return {
            "weight1": draw(self.hidden, 2),
            "bias1": torch.zeros(self.hidden),
            "weight2": draw(self.hidden, self.hidden),
            "bias2": torch.zeros(self.hidden),
            "weight3": draw(1, self.hidden),
        }

    def init_lower(self, generator: torch.Generator) -> Theta:
        return draw_parameters(self.model, generator)

    def lower_loss(self, upper: Theta, lower: Theta, support: Any) -> Tensor:
        check_single_target(support.y)
        pairs_N2 = torch.cat([self.model(lower, support.x), support.y], -1)
        hidden_NH = F.elu(F.linear(pairs_N2, upper["weight1"], upper["bias1"]))
        hidden_NH = F.elu(F.linear(hidden_NH, upper["weight2"], upper["bias2"]))
        return F.softplus(F.linear(hidden_NH, upper["weight3"])).mean()

    def upper_loss(self, upper: Theta, lower: Theta, query: Any) -> tuple[Tensor, Metrics]:
        return self.score(self.model(lower, query.x), query)

    def predict(self, upper: Theta, lower: Theta, x: Any) -> Tensor:
        return self.model(lower, x)


class Distillation:
    """Learn a few synthetic images such that a network trained on them alone does well on real ones.

        L_lower = cross entropy on the images u with fixed labels,   L_upper = the loss on real examples

    With `learn_inner_lr` the rate is learned too. Reference: Wang et al. 2018, "Dataset distillation", arXiv
    1811.10959, Algorithm 1.

    Args:
        in_shape: shape of one image.
        classes: number of classes.
        per_class: synthetic images per class.
    """

    def __init__(
        self, model: Model, score: Score, in_shape: list[int], classes: int = 10, per_class: int = 1
    ) -> None:
        self.model = model
        self.score = score
        self.in_shape = in_shape
        self.classes = classes
        self.per_class = per_class

    def init_upper(self, generator: torch.Generator) -> Theta:
        count = self.classes * self.per_class
        return {"images": torch.rand(count, *self.in_shape, generator=generator)}

    def init_lower(self, generator: torch.Generator) -> Theta:
        return draw_parameters(self.model, generator)

    def lower_loss(self, upper: Theta, lower: Theta, support: Any) -> Tensor:
        images_S = upper["images"]
        label_S = torch.arange(len(images_S), device=images_S.device) % self.classes
        return F.cross_entropy(self.model(lower, images_S), label_S)

    def upper_loss(self, upper: Theta, lower: Theta, query: Any) -> tuple[Tensor, Metrics]:
        return self.score(self.model(lower, query.x), query)

    def predict(self, upper: Theta, lower: Theta, x: Any) -> Tensor:
        return self.model(lower, x)


def check_class_indices(y: Any) -> None:
    """Refuse targets that `Reweighting` cannot take the cross entropy of."""
    if not isinstance(y, Tensor) or y.dim() != 1 or y.is_floating_point():
        raise InputError(
            f"algorithm.problem: got reweighting with {describe_targets(y)}, expected class indices [N], because it "
            "takes the cross entropy of each example: use a problem of your own (package.module:Name)"
        )


def check_single_target(y: Any) -> None:
    """Refuse targets that the network of `LearnedLoss` cannot read beside a prediction."""
    if not isinstance(y, Tensor) or y.dim() != 2 or y.shape[1] != 1:
        raise InputError(
            f"algorithm.problem: got learned-loss with {describe_targets(y)}, expected one tensor [N, 1], because its "
            "network reads a prediction and a target: use a problem of your own (package.module:Name)"
        )


def draw_parameters(model: Model, generator: torch.Generator) -> Theta:
    """Draw new weights of the model's shapes, uniform within ±1/√inputs as torch's linear and convolution layers are.

    Parameters with fewer than two axes (biases, norm layers) keep the values that the module was built with.
    """
    drawn = {}
    for name, value in model.init(generator).items():
        if value.dim() < 2:
            drawn[name] = value
            continue
        bound = 1 / math.sqrt(value[0].numel())
        uniform = torch.rand(value.shape, generator=generator)
        drawn[name] = (2 * uniform - 1) * bound
    return drawn
