"""Compare `bilevel` with Betty on the logistic regression of its examples: one weight decay per feature.

Betty's package is not one of distmeta's dependencies. Run in an environment that has both, here and betty-ml 0.1.1:

    python benchmarks/bilevel.py

The problem (as in Betty's logistic regression example): 1,000 points with 20 features, half for training and half for
validation; lower loss: cross entropy + ½ Σ_i u_i w_i²; upper loss: cross entropy on the validation half. Both libraries
get the same data, the same w and the same number of conjugate gradient steps.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distmeta.algorithms.bilevel import Bilevel
from distmeta.compute.gradient import differentiate, unroll
from distmeta.protocols import Batch, Episode, Metrics, Theta

POINTS = 1000
FEATURES = 20
INNER_STEPS = 100
INNER_LR = 1.0
SOLVER_STEPS = 20
REPEATS = 20


class WeightDecays:
    """Learn one weight decay per feature of a logistic regression."""

    def init_upper(self, generator: torch.Generator) -> Theta:
        return {"decay": torch.full((FEATURES,), 0.1)}

    def init_lower(self, generator: torch.Generator) -> Theta:
        return {"weight": torch.zeros(FEATURES)}

    def lower_loss(self, upper: Theta, lower: Theta, support: Any) -> Tensor:
        penalty = (upper["decay"] * lower["weight"].square()).sum() / 2
        return F.binary_cross_entropy_with_logits(support.x @ lower["weight"], support.y) + penalty

    def upper_loss(self, upper: Theta, lower: Theta, query: Any) -> tuple[Tensor, Metrics]:
        return F.binary_cross_entropy_with_logits(query.x @ lower["weight"], query.y), {}

    def predict(self, upper: Theta, lower: Theta, x: Any) -> Tensor:
        return x @ lower["weight"]


def draw_data() -> Episode:
    """Return the training and the validation half."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(POINTS, FEATURES, generator=generator, dtype=torch.float64)
    true_weight = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(POINTS, generator=generator, dtype=torch.float64)
    y = (x @ true_weight + noise > 0).double()
    half = POINTS // 2
    return Episode(Batch(x[:half], y[:half]), Batch(x[half:], y[half:]))


def build_algorithm(hypergradient: str) -> Bilevel:
    unused: Any = None
    kind: Any = hypergradient
    return Bilevel(
        unused,
        unused,
        problem=f"{WeightDecays.__module__}:WeightDecays",
        inner_lr=INNER_LR,
        inner_steps=INNER_STEPS,
        hypergradient=kind,
        implicit_steps=SOLVER_STEPS,
    )


def run_distmeta(algorithm: Bilevel, decay: Tensor, data: Episode) -> Tensor:
    """Return the hypergradient after the inner loop from zero."""
    score: Any = None
    theta = {"upper.decay": decay}
    return differentiate(lambda t: algorithm.meta_loss(t, data, unroll, score), theta)[0]["upper.decay"]


class Betty:
    """The same problem with Betty's problems and engine; `run` returns what its upper optimizer receives."""

    def __init__(self, hypergradient: str, decay: Tensor, data: Episode) -> None:
        from betty.configs import Config, EngineConfig
        from betty.engine import Engine
        from betty.problems import ImplicitProblem

        class Weights(torch.nn.Module):
            def __init__(self, values: Tensor) -> None:
                super().__init__()
                self.values = torch.nn.Parameter(values.clone())

            def forward(self) -> Tensor:
                return self.values

        class Upper(ImplicitProblem):
            def training_step(self, batch: Any) -> Tensor:
                x, y = batch
                return F.binary_cross_entropy_with_logits(x @ self.lower.module(), y)

        class Lower(ImplicitProblem):
            def training_step(self, batch: Any) -> Tensor:
                x, y = batch
                weight = self.module()
                penalty = (self.upper.module() * weight.square()).sum() / 2
                return F.binary_cross_entropy_with_logits(x @ weight, y) + penalty

        upper_module = Weights(decay)
        self.decay = upper_module.values
        self.weight = Weights(torch.zeros_like(decay))
        config = Config(
            type={"conjugate-gradients": "cg", "neumann": "neumann"}[hypergradient],
            cg_iterations=SOLVER_STEPS,
            neumann_iterations=SOLVER_STEPS,
            neumann_alpha=INNER_LR,
            unroll_steps=INNER_STEPS,
        )
        upper = Upper(
            name="upper",
            module=upper_module,
            optimizer=torch.optim.SGD(upper_module.parameters(), lr=1.0),
            train_data_loader=[tuple(data.query)],
            config=Config(),
            device="cpu",
        )
        lower = Lower(
            name="lower",
            module=self.weight,
            optimizer=torch.optim.SGD(self.weight.parameters(), lr=INNER_LR),
            train_data_loader=[tuple(data.support)],
            config=config,
            device="cpu",
        )
        dependencies = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
        engine_config = EngineConfig(train_iters=INNER_STEPS, valid_step=10**9)
        self.engine = Engine(problems=[upper, lower], config=engine_config, dependencies=dependencies)

    def run(self) -> Tensor:
        """Train w for the inner steps, step the decay with rate 1, and return by how much it moved."""
        before = self.decay.detach().clone()
        self.engine.run()
        return before - self.decay.detach()


def measure(function: Any) -> tuple[float, Tensor]:
    """Return the least seconds of a few calls, and the last result."""
    seconds = []
    result = function()
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def compare(hypergradient: str) -> dict[str, Any]:
    """Return the relative distance of the two hypergradients, and the ratio of the times per outer step."""
    torch.set_num_threads(1)
    data = draw_data()
    decay = torch.full((FEATURES,), 0.1, dtype=torch.float64)
    ours = build_algorithm(hypergradient)
    our_gradient = run_distmeta(ours, decay, data)
    their_gradient = Betty(hypergradient, decay, data).run()
    distance = float((our_gradient - their_gradient).norm() / our_gradient.norm())
    timed = Betty(hypergradient, decay, data)
    our_seconds, _ = measure(lambda: run_distmeta(ours, decay, data))
    their_seconds, _ = measure(timed.run)
    return {
        "hypergradient": hypergradient,
        "distance": distance,
        "seconds": our_seconds,
        "betty_seconds": their_seconds,
        "ratio": our_seconds / their_seconds,
    }


if __name__ == "__main__":
    for kind in ("conjugate-gradients", "neumann"):
        print(json.dumps(compare(kind)))
