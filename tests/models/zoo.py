"""Models and data of users: a small one of each kind, with tasks that it fits.

Shapes: N rows, C channels or classes, L positions, H and W pixels, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from distmeta.protocols import Batch, Episode


class Kind(NamedTuple):
    """A model, its data and its loss."""

    build: Callable[[], nn.Module]
    draw: Callable[[torch.Generator, int], Any]
    """(generator, rows) -> a support or query set."""
    loss: Callable[[Any, Any], Tensor]
    """(outputs, support or query set) -> the loss."""
    inner_lr: float = 0.1
    has_equal_tasks: bool = True
    """Whether all tasks have as many rows."""
    package: str = "torch"
    """What must be installed."""
    build_plain: Callable[[], nn.Module] | None = None
    """The same function of the same parameters without activation checkpointing, which the loop by hand calls: what a
    checkpoint computes again in the backward pass reads the module's parameters at that time."""


class ZooTasks:
    """Tasks of one kind."""

    in_shape = (1,)
    out_features = 2

    def __init__(self, kind: str):
        self.kind = ALL[kind]

    def draw(self, split: str, ids: Any) -> list[Episode]:
        return [self.draw_task(int(task_id)) for task_id in ids]

    def draw_task(self, task_id: int) -> Episode:
        generator = torch.Generator().manual_seed(task_id % 2**62)
        further_rows = 0 if self.kind.has_equal_tasks else task_id % 3
        return Episode(self.kind.draw(generator, 4 + further_rows), self.kind.draw(generator, 3))

    def score(self, outputs: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.kind.loss(outputs, batch), {}


def build_model(kind: str) -> nn.Module:
    return ALL[kind].build()


# --- Data ---------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class WeightedBatch(NamedTuple):
    """Examples with a weight for each."""

    x: Tensor
    y: Tensor
    weight: Tensor


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def integers(generator: torch.Generator, stop: int, *shape: int) -> Tensor:
    return torch.randint(0, stop, shape, generator=generator)


def draw_vectors(generator: torch.Generator, rows: int) -> Batch:
    """Return x [N, 3] and targets [N, 2]."""
    x = normal(generator, rows, 3)
    return Batch(x, torch.sin(2 * x[:, :2] + x[:, 2:]))


def draw_scalars(generator: torch.Generator, rows: int) -> Batch:
    """Return x [N, 3] and targets [N]."""
    x = normal(generator, rows, 3)
    return Batch(x, x.square().sum(1))


def draw_tags(generator: torch.Generator, rows: int) -> Batch:
    """Return x [N, 3] and two independent labels [N, 2]."""
    x = normal(generator, rows, 3)
    return Batch(x, (x[:, :2] > 0).long())


def draw_ranks(generator: torch.Generator, rows: int) -> Batch:
    """Return x [N, 3] and ordered classes 0 … 3, [N]."""
    return Batch(normal(generator, rows, 3), integers(generator, 4, rows))


def draw_weighted(generator: torch.Generator, rows: int) -> WeightedBatch:
    x, y = draw_vectors(generator, rows)
    return WeightedBatch(x, y, torch.rand(rows, 1, generator=generator))


def draw_two_targets(generator: torch.Generator, rows: int) -> Batch:
    x, y = draw_vectors(generator, rows)
    return Batch(x, {"value": y, "class": (y[:, 0] > 0).long()})


def draw_structure(build: Callable[[Tensor], Any]) -> Callable[[torch.Generator, int], Batch]:
    """Return a function that draws vectors and builds the inputs from x [N, 3]."""

    def draw(generator: torch.Generator, rows: int) -> Batch:
        x, y = draw_vectors(generator, rows)
        return Batch(build(x), y)

    return draw


def draw_images(*sizes: int) -> Callable[[torch.Generator, int], Batch]:
    """Return a function that draws images [N, 1, *sizes] of three classes."""

    def draw(generator: torch.Generator, rows: int) -> Batch:
        return Batch(normal(generator, rows, 1, *sizes), integers(generator, 3, rows))

    return draw


def draw_masks(generator: torch.Generator, rows: int) -> Batch:
    """Return images [N, 1, 8, 8] and the class of each pixel [N, 8, 8]."""
    x = normal(generator, rows, 1, 8, 8)
    return Batch(x, (x[:, 0] > 0.3).long())


def draw_enlarged_images(generator: torch.Generator, rows: int) -> Batch:
    """Return images [N, 1, 4, 4] and the same with twice as many pixels on each axis."""
    y = normal(generator, rows, 1, 8, 8)
    return Batch(functional.avg_pool2d(y, 2), y)


def draw_series(generator: torch.Generator, rows: int) -> Batch:
    """Return series [N, 5, 3] and targets [N, 2]."""
    x = normal(generator, rows, 5, 3)
    return Batch(x, torch.sin(x.sum(1))[:, :2])


def draw_series_with_lengths(generator: torch.Generator, rows: int) -> Batch:
    x, y = draw_series(generator, rows)
    return Batch({"values": x, "length": 1 + integers(generator, 5, rows)}, y)


def draw_series_with_padding(generator: torch.Generator, rows: int) -> Batch:
    """Return series and a mask [N, 5] that is true at padding. The first position is never padding."""
    x, y = draw_series(generator, rows)
    length = 1 + integers(generator, 5, rows)
    return Batch({"values": x, "is_padding": torch.arange(5) >= length[:, None]}, y)


def draw_texts(generator: torch.Generator, rows: int) -> Batch:
    """Return tokens [N, 6] of a vocabulary of 11, and three classes."""
    return Batch(integers(generator, 11, rows, 6), integers(generator, 3, rows))


def draw_texts_with_mask(generator: torch.Generator, rows: int) -> Batch:
    """Return texts as a Hugging Face tokenizer does."""
    tokens, y = draw_texts(generator, rows)
    length = 2 + integers(generator, 5, rows)
    mask = (torch.arange(6) < length[:, None]).long()
    return Batch({"input_ids": tokens, "attention_mask": mask}, y)


def draw_next_tokens(generator: torch.Generator, rows: int) -> Batch:
    """Return tokens [N, 6] and the tokens that follow them [N, 6]."""
    tokens = integers(generator, 11, rows, 7)
    return Batch({"input_ids": tokens[:, :-1]}, tokens[:, 1:])


def draw_graphs(generator: torch.Generator, rows: int) -> Batch:
    """Return nodes [N, 5, 3] and adjacency matrices [N, 5, 5]."""
    nodes, y = draw_series(generator, rows)
    edges = (normal(generator, rows, 5, 5) > 0).float()
    return Batch({"nodes": nodes, "adjacency": torch.maximum(edges, edges.mT)}, y)


def draw_edges(generator: torch.Generator, rows: int) -> Batch:
    """Return one graph: nodes [N, 3], edges as pairs of nodes [2·N, 2], targets of the nodes [N, 2]."""
    nodes, y = draw_vectors(generator, rows)
    return Batch({"nodes": nodes, "edges": integers(generator, rows, 2 * rows, 2)}, y)


def draw_signals(generator: torch.Generator, rows: int) -> Batch:
    """Return complex signals [N, 4] and targets [N, 2]."""
    parts = normal(generator, rows, 4, 2)
    return Batch(torch.view_as_complex(parts), parts.sum(1))


def draw_dates(generator: torch.Generator, rows: int) -> Batch:
    """Return numbers and categories, as in a table."""
    x, y = draw_vectors(generator, rows)
    return Batch({"numbers": x, "categories": integers(generator, 5, rows, 2)}, y)


def draw_pairs(generator: torch.Generator, rows: int) -> Batch:
    """Return two views [N, 3] of each example; the target is which row of the other view belongs to it."""
    left = normal(generator, rows, 3)
    return Batch(Pair(left, left + 0.1 * normal(generator, rows, 3)), torch.arange(rows))


# --- Losses -------------------------------------------------------------------------------------------------------


def squared_error(outputs: Tensor, batch: Any) -> Tensor:
    return (outputs - batch.y).square().mean()


def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    return functional.cross_entropy(outputs, batch.y)


def cross_entropy_of_tokens(outputs: Tensor, batch: Any) -> Tensor:
    """Take outputs [N, L, C]."""
    return functional.cross_entropy(outputs.transpose(1, 2), batch.y)


def binary_cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs, batch.y.to(outputs.dtype))


def weighted_squared_error(outputs: Tensor, batch: Any) -> Tensor:
    return (batch.weight * (outputs - batch.y).square()).mean()


def two_losses(outputs: Any, batch: Any) -> Tensor:
    value = (outputs["value"] - batch.y["value"]).square().mean()
    return value + functional.cross_entropy(outputs["class"], batch.y["class"])


def ordinal_loss(outputs: Tensor, batch: Any) -> Tensor:
    """Take logits [N, 3] of "the class is larger than 0, 1, 2"."""
    is_larger = batch.y[:, None] > torch.arange(3)
    return functional.binary_cross_entropy_with_logits(outputs, is_larger.to(outputs.dtype))


def quantile_loss(outputs: Tensor, batch: Any) -> Tensor:
    """Take quantiles 0.1, 0.5 and 0.9 of targets [N]."""
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=outputs.dtype)
    error = batch.y[:, None] - outputs
    return torch.maximum(levels * error, (levels - 1) * error).mean() + outputs.square().mean()


def gaussian_loss(outputs: Pair, batch: Any) -> Tensor:
    mean, log_variance = outputs
    return ((mean - batch.y).square() * torch.exp(-log_variance) + log_variance).mean()


def mixture_loss(outputs: dict[str, Tensor], batch: Any) -> Tensor:
    """Return -log of a mixture of Gaussians with unit variance, with means [N, K, 2]."""
    distances = (outputs["means"] - batch.y[:, None]).square().sum(-1)
    return -torch.logsumexp(functional.log_softmax(outputs["logits"], -1) - distances / 2, -1).mean()


def info_nce(outputs: Pair, batch: Any) -> Tensor:
    left, right = (functional.normalize(part, dim=1) for part in outputs)
    return functional.cross_entropy(left @ right.T / 0.5, batch.y)


def pooled_cross_entropy(outputs: Any, batch: Any) -> Tensor:
    """Take what a Hugging Face model without a head returns."""
    return functional.cross_entropy(outputs.pooler_output[:, :3], batch.y)


# --- Vectors ------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Lambda(nn.Module):
    """A function without parameters."""

    def __init__(self, function: Callable[[Any], Any]):
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 8)
        self.value = nn.Linear(3, 8, bias=False)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(functional.silu(self.gate(x)) * self.value(x))


class Siren(nn.Module):
    """Sitzmann et al. 2020: sines instead of ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 8), nn.Linear(8, 8)])
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(3 * layer(x))
        return self.out(x)


class FourierFeatures(nn.Module):
    """Tancik et al. 2020: fixed random frequencies in a buffer."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(3, 6))
        self.out = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        phases = 2 * math.pi * x @ self.frequencies
        return self.out(torch.cat([phases.sin(), phases.cos()], -1))


class SoftMixture(nn.Module):
    """Every expert computes; a softmax weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 4)
        self.experts = nn.ModuleList([nn.Linear(3, 2) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        outputs = torch.stack([torch.tanh(expert(x)) for expert in self.experts], 1)
        return (weights[..., None] * outputs).sum(1)


class SparseMixture(nn.Module):
    """Each row goes to its best two experts. Which rows an expert gets depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 4)
        self.experts = nn.ModuleList([nn.Linear(3, 2) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        values, chosen = self.gate(x).topk(2, -1)
        weights = values.softmax(-1)
        outputs = torch.zeros(len(x), 2, dtype=x.dtype)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == number)
            outputs = outputs.index_add(0, rows, weights[rows, places, None] * expert(x[rows]))
        return outputs


class HyperNetwork(nn.Module):
    """A network that computes the weights of another, which it calls by `functional_call`."""

    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Linear(3, 2)
        for parameter in self.target.parameters():
            parameter.requires_grad_(False)
        self.embedding = nn.Parameter(torch.randn(4))
        self.weight = nn.Linear(4, 6)
        self.bias = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh(self.embedding)
        weights = {"weight": self.weight(code).view(2, 3), "bias": self.bias(code)}
        return torch.func.functional_call(self.target, weights, (x,))


class Exponential(nn.Module):
    """A parametrization: positive weights."""

    def forward(self, raw: Tensor) -> Tensor:
        return torch.exp(raw)


def build_weight_norm() -> nn.Module:
    first = parametrizations.weight_norm(nn.Linear(3, 8))
    return nn.Sequential(first, nn.Tanh(), parametrizations.weight_norm(nn.Linear(8, 2)))


def build_orthogonal() -> nn.Module:
    layer = parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley")
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 2))


def build_positive() -> nn.Module:
    layer = nn.Linear(3, 8)
    parametrize.register_parametrization(layer, "weight", Exponential())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 2))


def build_pruned() -> nn.Module:
    layer = nn.Linear(3, 8)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 2))


class Checkpointed(nn.Module):
    """Activations are computed again in the backward pass."""

    def __init__(self, is_checkpointed: bool = True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.out = nn.Linear(8, 2)
        self.is_checkpointed = is_checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_checkpointed:
            return self.out(self.body(x))
        features: Any = checkpoint(self.body, x, use_reentrant=False)
        return self.out(features)


class StraightThrough(torch.autograd.Function):
    """Round forward, identity backward: a classic autograd.Function, whose forward takes `ctx`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Cube(torch.autograd.Function):
    """x³, with a derivative that can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * 3 * x.square()


class PhysicsInformed(nn.Module):
    """Outputs are derivatives of a scalar field with respect to the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            points = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.field(points).sum(), points, create_graph=True)
        return slope[:, :2]


class TiedAutoencoder(nn.Module):
    """Two layers have the same Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.out(functional.linear(hidden, self.first.weight.T))


class WithParameterList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([0.5 * torch.randn(3, 8), 0.5 * torch.randn(8, 2)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.weights
        return torch.tanh(x @ first) @ second


class WithParameterDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({"in": 0.5 * torch.randn(3, 8), "out": 0.5 * torch.randn(8, 2)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weights["in"]) @ self.weights["out"]


class WithBilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Bilinear(3, 3, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.product(x, x.cos())))


class WithEinsum(nn.Module):
    """A third-order interaction with factors of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, 4) / 2)
        self.b = nn.Parameter(torch.randn(3, 4) / 2)
        self.c = nn.Parameter(torch.randn(4, 2) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,ir,nj,jr,ro->no", x, self.a, x, self.b, self.c)


class Spectral(nn.Module):
    """Filters in the frequency domain: complex intermediate values, real parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(2, 2))
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x, dim=-1) * torch.view_as_complex(self.filter)
        return self.out(torch.tanh(torch.fft.irfft(spectrum, n=3, dim=-1)))


class ComplexInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.real = nn.Linear(4, 8)
        self.imaginary = nn.Linear(4, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.real(x.real) + self.imaginary(x.imag)))


class WithScalars(nn.Module):
    """Parameters of shape []."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.offset = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) * self.temperature.exp() + self.offset


class WithDoubleBuffer(nn.Module):
    """A buffer in float64, for example statistics that numpy computed."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x - self.mean).to(x.dtype))


class FrozenBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
        self.backbone.requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class UnusedParameters(nn.Module):
    """One layer is never called, another only for large inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.never = nn.Linear(3, 2)
        self.rarely = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.tanh(self.layer(x))
        return outputs + self.rarely(x) if float(x.abs().max()) > 2 else outputs


class WritesInPlace(nn.Module):
    """In-place operations on intermediate values."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.second = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden += 0.1
        functional.elu_(hidden)
        outputs = torch.zeros(len(x), 2, dtype=x.dtype)
        outputs[:, :] = self.second(hidden)
        return outputs


class NeuralOde(nn.Module):
    """Four steps of the classical Runge-Kutta method."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = 0.25
        for _ in range(4):
            a = self.slope(x)
            b = self.slope(x + h / 2 * a)
            c = self.slope(x + h / 2 * b)
            d = self.slope(x + h * c)
            x = x + h / 6 * (a + 2 * b + 2 * c + d)
        return x[:, :2]


class RidgeLayer(nn.Module):
    """A closed-form solution inside the network: a linear system per forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.targets = nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.body(x))
        gram = features.T @ features + torch.eye(4, dtype=x.dtype)
        return features @ torch.linalg.solve(gram, self.targets)


class RadialBasis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(6, 3))
        self.log_width = nn.Parameter(torch.zeros(6))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        distances = (x[:, None] - self.centres).square().sum(-1)
        return self.out(torch.exp(-distances * self.log_width.exp()))


class Joining(nn.Module):
    """Takes inputs of any structure, and `read` says how to join them."""

    def __init__(self, read: Callable[[Any], Sequence[Tensor]]):
        super().__init__()
        self.read = read
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Any) -> Tensor:
        return self.body(torch.cat(list(self.read(x)), -1))


class SeveralArguments(nn.Module):
    """Embeddings of categories beside numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Linear(11, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        embedded = self.embedding(x["categories"]).flatten(1)
        return self.body(torch.cat([x["numbers"], embedded], 1))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 8)
        self.heads = nn.ModuleDict({"value": nn.Linear(8, 2), "class": nn.Linear(8, 2)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = torch.tanh(self.body(x))
        return {name: head(features) for name, head in self.heads.items()}


class MeanAndVariance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        self.log_variance = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Pair:
        return Pair(self.mean(x), self.log_variance(x))


class MixtureDensity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 8)
        self.means = nn.Linear(8, 6)
        self.logits = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = torch.tanh(self.body(x))
        return {"means": self.means(features).view(-1, 3, 2), "logits": self.logits(features)}


class Ordinal(nn.Module):
    """One score and ordered thresholds."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.gaps = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x) - functional.softplus(self.gaps).cumsum(0)


class Quantiles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        first, *further = self.body(x).unbind(-1)
        levels = [first]
        for step in further:
            levels.append(levels[-1] + functional.softplus(step))
        return torch.stack(levels, -1)


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
        self.right = nn.Linear(3, 4)

    def forward(self, x: Pair) -> Pair:
        return Pair(self.left(x.left), self.right(x.right))


# --- Images -------------------------------------------------------------------------------------------------------


def build_conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.AvgPool1d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def build_conv2d_layer_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.LayerNorm([4, 4, 4]),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def build_conv2d_instance_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.InstanceNorm2d(4, affine=True),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def build_conv3d_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 3, 3, padding=1),
        nn.BatchNorm3d(3, track_running_stats=False),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(192, 3),
    )


def build_fixed_batch_norm() -> nn.Module:
    """Statistics of an earlier training, in evaluation mode."""
    norm = nn.BatchNorm2d(4)
    norm.running_mean = torch.linspace(-0.2, 0.2, 4)
    norm.running_var = torch.linspace(0.5, 1.5, 4)
    norm.eval()
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(144, 3))


def build_separable() -> nn.Module:
    """Depthwise and pointwise convolutions with dilation and reflected borders."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 1),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, padding_mode="reflect"),
        nn.Hardswish(),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.GroupNorm(1, 6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def build_pixel_shuffle() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.PReLU(4), nn.Conv2d(4, 4, 1), nn.PixelShuffle(2))


class SmallResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.first = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(8, track_running_stats=False)
        self.shortcut = nn.Conv2d(4, 8, 1, stride=2, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.softplus(self.norm(self.stem(x)))
        x = functional.softplus(self.first_norm(self.first(x)) + self.shortcut(x))
        return self.head(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.squeeze = nn.Linear(6, 2)
        self.excite = nn.Linear(2, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.conv(x))
        gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(x.mean((2, 3))))))
        return self.head((x * gate[:, :, None, None]).amax((2, 3)))


class WeightStandardized(nn.Module):
    """Qiao et al. 2019: a convolution whose weights are normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        mean = weight.mean((1, 2, 3), keepdim=True)
        deviation = weight.std((1, 2, 3), keepdim=True)
        x = functional.conv2d(x, (weight - mean) / (deviation + 1e-5), self.conv.bias)
        return self.head(torch.tanh(x).mean((2, 3)))


class SmallUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 4, 3, padding=1)
        self.deep = nn.Conv2d(4, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.tanh(self.down(x))
        deep = torch.tanh(self.deep(functional.max_pool2d(skip, 2)))
        return self.out(torch.cat([skip, self.up(deep)], 1))


class SmallViT(nn.Module):
    """Patches, a class token, positions and one encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 4, stride=4)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, 8))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 5, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1)
        return self.head(self.layer(tokens + self.positions)[:, 0])


# --- Sequences ----------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """The last output of an RNN, LSTM or GRU."""

    def __init__(self, layer: nn.Module, size: int):
        super().__init__()
        self.layer = layer
        self.out = nn.Linear(size, 2)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.layer(x)
        return self.out(outputs[:, -1])


class PackedSequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 6, batch_first=True)
        self.out = nn.Linear(6, 2)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        packed = pack_padded_sequence(x["values"], x["length"], batch_first=True, enforce_sorted=False)
        outputs, _ = self.layer(packed)
        padded, _ = pad_packed_sequence(outputs, batch_first=True)
        return self.out(padded.sum(1) / x["length"][:, None])


class Cells(nn.Module):
    """A loop over time, written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(3, 6)
        self.start = nn.Parameter(torch.zeros(6))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.start.expand(len(x), -1)
        memory = torch.zeros_like(hidden)
        for step in x.unbind(1):
            hidden, memory = self.cell(step, (hidden, memory))
        return self.out(hidden)


class PaddedTransformer(nn.Module):
    """nn.TransformerEncoder with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.embed = nn.Linear(3, 8)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.out = nn.Linear(8, 2)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        outputs = self.encoder(self.embed(x["values"]), src_key_padding_mask=x["is_padding"])
        return self.out(outputs[:, 0])


class CausalTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation="gelu")
        self.embed = nn.Linear(3, 8)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.out(self.encoder(self.embed(x), mask=mask, is_causal=True)[:, -1])


class EncoderDecoder(nn.Module):
    """nn.Transformer with a learned query."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.query = nn.Parameter(torch.randn(1, 1, 8))
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query.expand(len(x), -1, -1)
        return self.out(self.transformer(self.embed(x), query)[:, 0])


class HandWrittenAttention(nn.Module):
    def __init__(self, is_fused: bool):
        super().__init__()
        self.project = nn.Linear(3, 24)
        self.out = nn.Linear(8, 2)
        self.is_fused = is_fused

    def forward(self, x: Tensor) -> Tensor:
        shape = (len(x), x.shape[1], 2, 4)
        query, key, value = (part.reshape(shape).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        if self.is_fused:
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            is_future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            scores = (query @ key.mT / 2).masked_fill(is_future, -math.inf)
            mixed = scores.softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).flatten(2).mean(1))


class CausalConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 6, 2)
        self.second = nn.Conv1d(6, 6, 2, dilation=2)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(functional.pad(x.mT, (1, 0))))
        x = torch.tanh(self.second(functional.pad(x, (2, 0))))
        return self.out(x[:, :, -1])


class TokenTagger(nn.Module):
    """An output for each token, [N, L, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=0)
        self.layer = nn.LSTM(6, 4, batch_first=True, bidirectional=True)
        self.out = nn.Linear(8, 11)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        outputs, _ = self.layer(self.embedding(x["input_ids"]))
        return self.out(outputs)


class MeanOfEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, sparse=True)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embedding(x).mean(1)))


class BagOfEmbeddings(nn.Module):
    """torch (2.13) has no second derivative of an embedding bag."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(11, 6, mode="mean")
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embedding(x)))


# --- Sets and graphs ----------------------------------------------------------------------------------------------


class DeepSets(nn.Module):
    """Zaheer et al. 2017, with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.element = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8))
        self.whole = nn.Linear(8, 2)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        elements = self.element(x["values"]).masked_fill(x["is_padding"][..., None], 0)
        return self.whole(torch.tanh(elements.sum(1)))


class PointNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8))
        self.whole = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(self.point(x).max(1).values)


class DenseGraphNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.second = nn.Linear(6, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        adjacency = x["adjacency"] / x["adjacency"].sum(-1, keepdim=True).clamp(min=1)
        nodes = torch.tanh(self.first(adjacency @ x["nodes"]) + self.first(x["nodes"]))
        nodes = torch.tanh(self.second(adjacency @ nodes))
        return self.out(nodes.mean(1))


class MessagePassing(nn.Module):
    """One graph as a list of edges: rows of the inputs differ from leaf to leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.message = nn.Linear(6, 4)
        self.update = nn.Linear(7, 2)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        source, target = x["edges"].unbind(-1)
        nodes = x["nodes"]
        messages = torch.tanh(self.message(torch.cat([nodes[source], nodes[target]], -1)))
        received = torch.zeros(len(nodes), 4, dtype=nodes.dtype).index_add(0, target, messages)
        return self.update(torch.cat([nodes, received], -1))


# --- Hugging Face -------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """The logits of a Hugging Face model."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Any) -> Tensor:
        outputs = self.net(**x) if isinstance(x, dict) else self.net(x)
        return outputs.logits


class KeywordArguments(nn.Module):
    """What a Hugging Face model returns, as it is."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: dict[str, Tensor]) -> Any:
        return self.net(**x)


class EncodedMean(nn.Module):
    """The mean of the encoder's last layer."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.out = nn.Linear(8, 3)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        mask = x["attention_mask"][..., None]
        return self.out((self.net(**x).last_hidden_state * mask).sum(1) / mask.sum(1))


BERT = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 8,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}


def build_bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return Logits(BertForSequenceClassification(BertConfig(**BERT)))


def build_bert_without_head() -> nn.Module:
    from transformers import BertConfig, BertModel

    return KeywordArguments(BertModel(BertConfig(**BERT)))


def build_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, **options)
    return Logits(GPT2LMHeadModel(config))


def build_llama(is_checkpointed: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    net = LlamaForCausalLM(config)
    if is_checkpointed:
        # transformers 5.24 renamed it
        enable = getattr(net, "activation_checkpointing_enable", None) or net.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return Logits(net)


def build_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    options = {key: value for key, value in BERT.items() if "vocab" not in key and "position" not in key}
    return Logits(ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, **options)))


def build_t5_encoder() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
    return EncodedMean(T5EncoderModel(config))


# --- All of them --------------------------------------------------------------------------------------------------


def kind_of_vectors(build: Callable[[], nn.Module]) -> Kind:
    return Kind(build, draw_vectors, squared_error)


def kind_of_images(build: Callable[[], nn.Module], *sizes: int) -> Kind:
    return Kind(build, draw_images(*sizes), cross_entropy)


def kind_of_series(build: Callable[[], nn.Module]) -> Kind:
    return Kind(build, draw_series, squared_error)


def kind_of_structures(split: Callable[[Tensor], Any], read: Callable[[Any], Sequence[Tensor]]) -> Kind:
    return Kind(lambda: Joining(read), draw_structure(split), squared_error)


def build_mlp(outputs: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs))


def build_residual() -> nn.Module:
    return nn.Sequential(
        Residual(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 3))), nn.Linear(3, 2)
    )


def build_batch_norm() -> nn.Module:
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    return nn.Sequential(nn.Linear(3, 8), norm, nn.Tanh(), nn.Linear(8, 2))


def build_with_function(function: type[torch.autograd.Function]) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), Lambda(function.apply), nn.Linear(8, 2))


def build_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2))


def build_lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


ZOO: dict[str, Kind] = {
    # vectors
    "mlp": kind_of_vectors(build_mlp),
    "tasks of different sizes": Kind(build_mlp, draw_vectors, squared_error, has_equal_tasks=False),
    "residual blocks with layer norm": kind_of_vectors(build_residual),
    "gated units": kind_of_vectors(Gated),
    "batch norm of the batch": kind_of_vectors(build_batch_norm),
    "siren": kind_of_vectors(Siren),
    "Fourier features": kind_of_vectors(FourierFeatures),
    "soft mixture of experts": kind_of_vectors(SoftMixture),
    "sparse mixture of experts": kind_of_vectors(SparseMixture),
    "hypernetwork": kind_of_vectors(HyperNetwork),
    "weight norm": kind_of_vectors(build_weight_norm),
    "orthogonal": kind_of_vectors(build_orthogonal),
    "own parametrization": kind_of_vectors(build_positive),
    "pruned": kind_of_vectors(build_pruned),
    "activation checkpointing": Kind(
        Checkpointed, draw_vectors, squared_error, build_plain=lambda: Checkpointed(is_checkpointed=False)
    ),
    "straight-through Function": kind_of_vectors(lambda: build_with_function(StraightThrough)),
    "Function with saved tensors": kind_of_vectors(lambda: build_with_function(Cube)),
    "physics-informed": kind_of_vectors(PhysicsInformed),
    "tied weights": kind_of_vectors(TiedAutoencoder),
    "ParameterList": kind_of_vectors(WithParameterList),
    "ParameterDict": kind_of_vectors(WithParameterDict),
    "bilinear": kind_of_vectors(WithBilinear),
    "einsum": kind_of_vectors(WithEinsum),
    "fft": kind_of_vectors(Spectral),
    "parameters without axes": kind_of_vectors(WithScalars),
    "buffer in float64": kind_of_vectors(WithDoubleBuffer),
    "dropout": kind_of_vectors(build_dropout),
    "frozen backbone": kind_of_vectors(FrozenBackbone),
    "unused parameters": kind_of_vectors(UnusedParameters),
    "in-place operations": kind_of_vectors(WritesInPlace),
    "neural ODE": kind_of_vectors(NeuralOde),
    "linear solve": kind_of_vectors(RidgeLayer),
    "radial basis functions": kind_of_vectors(RadialBasis),
    # structures of inputs and outputs, and losses
    "dict": kind_of_structures(lambda x: {"a": x[:, :1], "b": x[:, 1:]}, lambda x: [x["a"], x["b"]]),
    "tuple": kind_of_structures(lambda x: (x[:, :1], x[:, 1:]), lambda x: x),
    "NamedTuple": kind_of_structures(lambda x: Pair(x[:, :1], x[:, 1:]), lambda x: [x.left, x.right]),
    "nested": kind_of_structures(
        lambda x: {"a": Pair(x[:, :1], x[:, 1:2]), "b": (x[:, 2:],)}, lambda x: [*x["a"], *x["b"]]
    ),
    "numbers and categories": Kind(SeveralArguments, draw_dates, squared_error),
    "complex inputs": Kind(ComplexInputs, draw_signals, squared_error),
    "two heads": Kind(TwoHeads, draw_two_targets, two_losses),
    "loss with a third field": Kind(build_mlp, draw_weighted, weighted_squared_error),
    "multi-label": Kind(build_mlp, draw_tags, binary_cross_entropy),
    "regression without a target axis": Kind(
        lambda: nn.Sequential(build_mlp(1), nn.Flatten(0)), draw_scalars, squared_error, 0.02
    ),
    "ordinal": Kind(Ordinal, draw_ranks, ordinal_loss),
    "quantiles": Kind(Quantiles, draw_scalars, quantile_loss),
    "mean and variance": Kind(MeanAndVariance, draw_vectors, gaussian_loss, 0.05),
    "mixture density": Kind(MixtureDensity, draw_vectors, mixture_loss),
    "contrastive loss": Kind(TwoTowers, draw_pairs, info_nce),
    # images
    "conv1d with group norm": kind_of_images(build_conv1d, 8),
    "conv2d with layer norm": kind_of_images(build_conv2d_layer_norm, 8, 8),
    "conv2d with instance norm": kind_of_images(build_conv2d_instance_norm, 8, 8),
    "conv3d with batch norm": kind_of_images(build_conv3d_batch_norm, 4, 4, 4),
    "batch norm with fixed statistics": kind_of_images(build_fixed_batch_norm, 8, 8),
    "separable convolutions": kind_of_images(build_separable, 8, 8),
    "ResNet": kind_of_images(SmallResNet, 8, 8),
    "squeeze and excite": kind_of_images(SqueezeExcite, 8, 8),
    "weight standardization": kind_of_images(WeightStandardized, 8, 8),
    "ViT": kind_of_images(SmallViT, 8, 8),
    "lazy layers": kind_of_images(build_lazy, 8, 8),
    "U-Net": Kind(SmallUNet, draw_masks, cross_entropy),
    "pixel shuffle": Kind(build_pixel_shuffle, draw_enlarged_images, squared_error),
    # sequences
    "rnn": kind_of_series(lambda: Recurrent(nn.RNN(3, 6, batch_first=True), 6)),
    "lstm": kind_of_series(lambda: Recurrent(nn.LSTM(3, 6, batch_first=True), 6)),
    "gru": kind_of_series(
        lambda: Recurrent(nn.GRU(3, 4, num_layers=2, batch_first=True, bidirectional=True), 8)
    ),
    "cells": kind_of_series(Cells),
    "packed sequences": Kind(PackedSequences, draw_series_with_lengths, squared_error),
    "transformer with a padding mask": Kind(PaddedTransformer, draw_series_with_padding, squared_error),
    "transformer with a causal mask": kind_of_series(CausalTransformer),
    "encoder and decoder": kind_of_series(EncoderDecoder),
    "hand-written attention": kind_of_series(lambda: HandWrittenAttention(is_fused=False)),
    "fused attention": kind_of_series(lambda: HandWrittenAttention(is_fused=True)),
    "causal convolutions": kind_of_series(CausalConvolutions),
    "tags of tokens": Kind(TokenTagger, draw_next_tokens, cross_entropy_of_tokens),
    "mean of sparse embeddings": Kind(MeanOfEmbeddings, draw_texts, cross_entropy),
    # sets and graphs
    "deep sets": Kind(DeepSets, draw_series_with_padding, squared_error),
    "point net": kind_of_series(PointNet),
    "dense graph network": Kind(DenseGraphNet, draw_graphs, squared_error),
    "message passing": Kind(MessagePassing, draw_edges, squared_error),
    # Hugging Face
    "BERT": Kind(build_bert, draw_texts_with_mask, cross_entropy, package="transformers"),
    "BERT without a head": Kind(
        build_bert_without_head, draw_texts_with_mask, pooled_cross_entropy, package="transformers"
    ),
    "GPT-2": Kind(build_gpt2, draw_next_tokens, cross_entropy_of_tokens, package="transformers"),
    "Llama": Kind(build_llama, draw_next_tokens, cross_entropy_of_tokens, package="transformers"),
    "Hugging Face ViT": Kind(build_vit, draw_images(8, 8), cross_entropy, package="transformers"),
    "T5 encoder": Kind(build_t5_encoder, draw_texts_with_mask, cross_entropy, package="transformers"),
    "Llama with activation checkpointing": Kind(
        lambda: build_llama(is_checkpointed=True),
        draw_next_tokens,
        cross_entropy_of_tokens,
        package="transformers",
        build_plain=build_llama,
    ),
}
REFUSED: dict[str, Kind] = {"bag of embeddings": Kind(BagOfEmbeddings, draw_texts, cross_entropy)}
"""What torch cannot differentiate twice."""
ALL = ZOO | REFUSED
