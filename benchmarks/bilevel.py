"""Compare `bilevel` with Betty (Choe et al. 2023, arXiv 2207.02849) on problems of Betty's published examples.

Betty's package is not one of distmeta's dependencies. Run in an environment that has both, here and betty-ml 0.1.1:

    python benchmarks/bilevel.py

- `weight decays` (Betty's example logistic_regression_hpo): 1,000 points with 20 features, half for training and half
  for validation; lower loss: cross entropy + ½ Σ_i u_i w_i²; upper loss: cross entropy on the validation half.
- `reweighting` (Betty's example learning_to_reweight, Meta-Weight-Net): a linear classifier of sklearn's digits, 40 %
  of whose training labels are wrong; the upper parameters are a network that weighs examples by their loss.

Both libraries get the same functions, data and starting values, in float64. `distance` is the relative distance of the
two hypergradients. Conjugate gradients of Betty 0.1.1 differ, because `betty/hypergradient/cg.py` builds each search
direction from the residual before the step instead of after it; `repaired` is the distance with that line corrected.
Times are of one outer step with all its inner steps, in turns, medians over rounds.
"""

from __future__ import annotations

import inspect
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from raw_results import describe_environment, save_section
from torch import Tensor

from distmeta.algorithms.bilevel import Bilevel
from distmeta.algorithms.bilevel_problems import Reweighting
from distmeta.compute.gradient import differentiate, unroll
from distmeta.protocols import Batch, Episode, Metrics, Theta
from distmeta.tasks.noisy_digits import NoisyDigits

POINTS = 1000
FEATURES = 20
CLASSES = 10
SOLVER_STEPS = 20
ROUNDS = 20


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


class LinearClassifier:
    """A model of digits as a function of its parameters."""

    def __call__(self, lower: Theta, x: Tensor) -> Tensor:
        return x.flatten(1) @ lower["weight"] + lower["bias"]


class DigitWeights(Reweighting):
    """The shipped problem `reweighting` with a linear classifier that starts at zero."""

    def __init__(self) -> None:
        model: Any = LinearClassifier()
        super().__init__(model, score_classes)

    def init_upper(self, generator: torch.Generator) -> Theta:
        upper = super().init_upper(generator)
        return upper | {
            "weight2": torch.randn(self.hidden, generator=generator)
        }  # at 0 most of the gradient is 0

    def init_lower(self, generator: torch.Generator) -> Theta:
        return {"weight": torch.zeros(64, CLASSES), "bias": torch.zeros(CLASSES)}


def score_classes(outputs: Any, batch: Any) -> tuple[Tensor, Metrics]:
    return F.cross_entropy(outputs, batch.y), {}


def draw_points() -> Episode:
    """Return the training and the validation half."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(POINTS, FEATURES, generator=generator, dtype=torch.float64)
    true_weight = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(POINTS, generator=generator, dtype=torch.float64)
    y = (x @ true_weight + noise > 0).double()
    half = POINTS // 2
    return Episode(Batch(x[:half], y[:half]), Batch(x[half:], y[half:]))


def draw_digits() -> Episode:
    """Return one task of the shipped job digits-reweighting."""
    support, query = NoisyDigits().draw("train", [0])
    return Episode(Batch(support.x[0].double(), support.y[0]), Batch(query.x[0].double(), query.y[0]))


class Case:
    """A problem, its data and its inner loop.

    Args:
        problem: class of a bilevel problem in this file.
        solver: of the implicit hypergradient.
    """

    def __init__(
        self, problem: type[Any], data: Episode, inner_lr: float, inner_steps: int, solver: str
    ) -> None:
        self.problem = problem()
        self.data = data
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.solver = solver
        generator = torch.Generator().manual_seed(0)
        self.upper = to_float64(self.problem.init_upper(generator))
        self.lower = to_float64(self.problem.init_lower(generator))


def to_float64(parameters: Theta) -> Theta:
    return {name: value.double() for name, value in parameters.items()}


def build_cases() -> dict[str, Case]:
    points = draw_points()
    digits = draw_digits()
    return {
        "weight decays, conjugate gradients": Case(WeightDecays, points, 1.0, 100, "conjugate-gradients"),
        "weight decays, Neumann series": Case(WeightDecays, points, 1.0, 100, "neumann"),
        "reweighting, Neumann series": Case(DigitWeights, digits, 0.5, 50, "neumann"),
    }


class Distmeta:
    """A case in distmeta."""

    def __init__(self, case: Case) -> None:
        unused: Any = None
        solver: Any = case.solver
        self.case = case
        self.algorithm = Bilevel(
            unused,
            unused,
            problem=f"{__name__}:{type(case.problem).__name__}",
            inner_lr=case.inner_lr,
            inner_steps=case.inner_steps,
            hypergradient=solver,
            implicit_steps=SOLVER_STEPS,
        )
        self.algorithm.problem = case.problem

    def run(self) -> Theta:
        """Return the hypergradient after the inner loop."""
        score: Any = None
        theta = {f"upper.{name}": value for name, value in self.case.upper.items()}
        theta |= {f"lower.{name}": value for name, value in self.case.lower.items()}
        gradient, _ = differentiate(
            lambda t: self.algorithm.meta_loss(t, self.case.data, unroll, score), theta
        )
        return {name: gradient[f"upper.{name}"] for name in self.case.upper}


class Parameters(torch.nn.Module):
    """Parameters by name, as a module for Betty."""

    def __init__(self, values: Theta) -> None:
        super().__init__()
        self.values = torch.nn.ParameterDict({name: value.clone() for name, value in values.items()})

    def forward(self) -> Theta:
        return dict(self.values.items())


class Betty:
    """A case with Betty's problems and engine. The upper optimizer is SGD with rate 1, so its step is the gradient."""

    def __init__(self, case: Case) -> None:
        from betty.configs import Config, EngineConfig
        from betty.engine import Engine
        from betty.problems import ImplicitProblem

        class Upper(ImplicitProblem):
            def training_step(self, batch: Any) -> Tensor:
                return case.problem.upper_loss(self.module(), self.lower.module(), Batch(*batch))[0]

        class Lower(ImplicitProblem):
            def training_step(self, batch: Any) -> Tensor:
                return case.problem.lower_loss(self.upper.module(), self.module(), Batch(*batch))

        self.case = case
        self.upper = Parameters(case.upper)
        self.lower = Parameters(case.lower)
        config = Config(
            type={"conjugate-gradients": "cg", "neumann": "neumann"}[case.solver],
            cg_iterations=SOLVER_STEPS,
            neumann_iterations=SOLVER_STEPS,
            neumann_alpha=case.inner_lr,
            unroll_steps=case.inner_steps,
        )
        upper = build_betty_problem(Upper, "upper", self.upper, 1.0, case.data.query, Config())
        lower = build_betty_problem(Lower, "lower", self.lower, case.inner_lr, case.data.support, config)
        dependencies = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
        engine_config = EngineConfig(train_iters=case.inner_steps, valid_step=10**9)
        self.engine = Engine(problems=[upper, lower], config=engine_config, dependencies=dependencies)

    def run(self) -> Theta:
        """Train the lower parameters from their start, step the upper ones, and return by how much these moved."""
        with torch.no_grad():
            for module, values in ((self.upper, self.case.upper), (self.lower, self.case.lower)):
                for name, value in values.items():
                    module.values[name].copy_(value)
        self.engine.run()
        return {name: value - self.upper.values[name].detach() for name, value in self.case.upper.items()}


def build_betty_problem(
    kind: Callable[..., Any], name: str, module: Parameters, rate: float, batch: Any, config: Any
) -> Any:
    return kind(
        name=name,
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=rate),
        train_data_loader=[tuple(batch)],
        config=config,
        device="cpu",
    )


def repair_conjugate_gradients() -> None:
    """Let Betty's conjugate gradients build each search direction from the residual after the step."""
    from betty import hypergradient

    source = inspect.getsource(hypergradient.cg)
    wrong = "p_new = [rr + beta * pp for rr, pp in zip(r, p)]"
    assert wrong in source
    module: Any = inspect.getmodule(hypergradient.cg)
    exec(source.replace(wrong, wrong.replace("zip(r, p)", "zip(r_new, p)")), module.__dict__)
    for name, value in hypergradient.jvp_fn_mapping.items():
        if value is hypergradient.cg:
            hypergradient.jvp_fn_mapping[name] = module.cg


def find_distance(found: Theta, expected: Theta) -> float:
    squared = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return (squared / sum(float(value.square().sum()) for value in expected.values())) ** 0.5


def compare(name: str, case: Case) -> dict[str, Any]:
    """Return the relative distance of the two hypergradients, and the times of an outer step."""
    ours = Distmeta(case)
    theirs = Betty(case)
    row: dict[str, Any] = {"case": name, "distance": find_distance(theirs.run(), ours.run())}
    seconds: dict[str, list[float]] = {"seconds": [], "betty_seconds": []}
    for _ in range(ROUNDS):
        for key, run in (("seconds", ours.run), ("betty_seconds", theirs.run)):
            start = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - start)
    pairs = zip(seconds["seconds"], seconds["betty_seconds"], strict=True)
    row |= {key: statistics.median(values) for key, values in seconds.items()}
    row["ratio"] = statistics.median(our / their for our, their in pairs)
    return row


def main() -> None:
    torch.set_num_threads(1)
    environment = describe_environment()
    cases = build_cases()
    rows = [compare(name, case) for name, case in cases.items()]
    repair_conjugate_gradients()
    for row, case in zip(rows, cases.values(), strict=True):
        row["repaired"] = find_distance(Betty(case).run(), Distmeta(case).run())
        print(json.dumps(row))
    save_section("bilevel", "betty", environment, rows)


if __name__ == "__main__":
    main()
