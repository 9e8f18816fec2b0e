"""ProtoNet, matching networks, relation networks and IMP, compared with computation by hand."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad
from torch.nn import functional

from distmeta.algorithms.imp import IMP, compute_distance_limit, infer_clusters
from distmeta.algorithms.matching import MatchingNet
from distmeta.algorithms.protonet import ProtoNet
from distmeta.algorithms.relation import RelationNet
from distmeta.compute.gradient import query_loss, unroll
from distmeta.errors import InputError
from distmeta.models.functional import FunctionalModel
from distmeta.protocols import PADDING, Batch, Episode, HasMetaLoss, Theta
from distmeta.tasks.few_shot import ClassificationScore
from distmeta.tasks.regression import Sinusoid

WAYS = 3
WIDTH = 4
SCORE = ClassificationScore(WAYS)


def build_embedding() -> FunctionalModel:
    """Build a linear embedding of four features without a head, in float64."""
    model = FunctionalModel(
        lambda: nn.Linear(5, WIDTH, bias=False), torch.Generator().manual_seed(0), out_features=99
    )
    return model.to(dtype=torch.float64)


def init_theta(algorithm: Any, seed: int = 1) -> Theta:
    return {name: v.double() for name, v in algorithm.init(torch.Generator().manual_seed(seed)).items()}


def draw_episode(seed: int = 0, shots: int = 2, queries: int = 2, spread: float = 1.0) -> Episode:
    generator = torch.Generator().manual_seed(seed)

    def rows(each: int) -> Batch:
        x = torch.randn(WAYS * each, 5, generator=generator, dtype=torch.float64) * spread
        return Batch(x, torch.arange(WAYS).repeat(each))

    return Episode(rows(shots), rows(queries))


def predict(algorithm: Any, theta: Theta, episode: Episode) -> Tensor:
    return algorithm.predict(theta, algorithm.begin(theta, episode.support), episode.query.x)


def loss_gradient(algorithm: Any, theta: Theta, episode: Episode) -> Theta:
    meta_loss = algorithm.meta_loss if isinstance(algorithm, HasMetaLoss) else partial(query_loss, algorithm)
    return grad(lambda t: meta_loss(t, episode, unroll, SCORE)[0])(theta)


# ProtoNet


def test_one_shot_protonet_equals_the_nearest_neighbour() -> None:
    algorithm = ProtoNet(build_embedding(), SCORE)
    episode = draw_episode(shots=1, queries=20)
    theta = init_theta(algorithm)
    weight = theta["model.weight"]
    distance = torch.cdist(episode.query.x @ weight.T, episode.support.x @ weight.T)
    found = predict(algorithm, theta, episode)
    torch.testing.assert_close(found, -distance.square())
    assert torch.equal(found.argmax(1), distance.argmin(1))


def test_protonet_gradient_matches_computation_by_hand() -> None:
    algorithm = ProtoNet(build_embedding(), SCORE)
    episode = draw_episode(shots=3, queries=4)
    theta = init_theta(algorithm)
    (x_s, _), (x_q, y_q) = episode
    weight = theta["model.weight"]
    means = x_s.view(3, WAYS, 5).mean(0)  # the embedding is linear, so prototypes are embedded means
    gap = (x_q @ weight.T)[:, None] - means @ weight.T  # [Q, W, F]
    slope = ((-gap.square().sum(-1)).softmax(1) - functional.one_hot(y_q, WAYS)) / len(y_q)
    slope_q = -2 * (slope[..., None] * gap).sum(1)
    slope_p = 2 * (slope[..., None] * gap).sum(0)
    expected = slope_q.T @ x_q + slope_p.T @ means
    torch.testing.assert_close(loss_gradient(algorithm, theta, episode)["model.weight"], expected)


def test_protonet_with_cosine_and_scale() -> None:
    episode = draw_episode()
    fixed = ProtoNet(build_embedding(), SCORE, distance="cosine", scale=7.0)
    learned = ProtoNet(build_embedding(), SCORE, distance="cosine", scale=7.0, learn_scale=True)
    theta = init_theta(fixed)
    assert set(init_theta(learned)) - set(theta) == {"metric.log_scale"}
    features_S, features_Q = (part.x @ theta["model.weight"].T for part in episode)
    means = features_S.view(2, WAYS, WIDTH).mean(0)
    cosine = functional.cosine_similarity(features_Q[:, None], means, dim=-1)
    torch.testing.assert_close(predict(fixed, theta, episode), 7 * (cosine - 1))
    torch.testing.assert_close(
        predict(learned, init_theta(learned), episode), 7 * (cosine - 1), rtol=1e-6, atol=1e-6
    )
    assert float(loss_gradient(learned, init_theta(learned), episode)["metric.log_scale"].abs()) > 1e-6
    zero = {"model.weight": torch.zeros_like(theta["model.weight"])}
    assert bool(torch.isfinite(loss_gradient(fixed, zero, episode)["model.weight"]).all())


# Matching networks


@pytest.mark.parametrize("scale", [1.0, 500.0])
def test_matching_equals_a_kernel_classifier(scale: float) -> None:
    algorithm = MatchingNet(build_embedding(), SCORE, scale=scale)
    episode = draw_episode(shots=3)
    theta = init_theta(algorithm)
    g, f = (part.x @ theta["model.weight"].T for part in episode)
    for q in range(len(f)):
        weights = [math.exp(scale * (float(functional.cosine_similarity(f[q], g_s, dim=0)) - 1)) for g_s in g]
        for c in range(WAYS):
            own = sum(w for w, y in zip(weights, episode.support.y.tolist(), strict=True) if y == c)
            found = float(predict(algorithm, theta, episode)[q, c])
            assert found == pytest.approx(math.log(own / sum(weights)), rel=1e-9)
    torch.testing.assert_close(
        predict(algorithm, theta, episode).logsumexp(1), torch.zeros(len(f)).double(), rtol=0, atol=1e-12
    )


def test_log_probabilities_are_finite_when_probabilities_underflow() -> None:
    algorithm = MatchingNet(build_embedding(), SCORE, scale=1e4)
    episode = draw_episode()
    found = predict(algorithm, init_theta(algorithm), episode)
    assert float(found.min()) < -1000
    assert bool(
        torch.isfinite(loss_gradient(algorithm, init_theta(algorithm), episode)["model.weight"]).all()
    )


def test_matching_regression_equals_nadaraya_watson() -> None:
    algorithm = MatchingNet(build_embedding(), Sinusoid().score, scale=3.0)
    episode = draw_episode()
    theta = init_theta(algorithm)
    targets = torch.randn(6, 2, dtype=torch.float64)
    found = predict(algorithm, theta, Episode(Batch(episode.support.x, targets), episode.query))
    g, f = (part.x @ theta["model.weight"].T for part in episode)
    kernel = (3 * functional.cosine_similarity(f[:, None], g, dim=-1)).exp()
    torch.testing.assert_close(found, kernel @ targets / kernel.sum(1, keepdim=True))


def build_full_context(steps: int = 3) -> MatchingNet:
    return MatchingNet(build_embedding(), SCORE, full_context=True, processing_steps=steps, features=WIDTH)


def test_full_context_equals_torch_lstms() -> None:
    algorithm = build_full_context()
    episode = draw_episode()
    theta = init_theta(algorithm)
    g, f = (part.x @ theta["model.weight"].T for part in episode)
    both = nn.LSTM(WIDTH, WIDTH, bidirectional=True, dtype=torch.float64)
    cell = nn.LSTMCell(3 * WIDTH, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        for name, suffix in (("forward", ""), ("backward", "_reverse")):
            weight = theta[f"context.{name}.weight"].T
            getattr(both, f"weight_ih_l0{suffix}").copy_(weight[:, :WIDTH])
            getattr(both, f"weight_hh_l0{suffix}").copy_(weight[:, WIDTH:])
            getattr(both, f"bias_ih_l0{suffix}").copy_(theta[f"context.{name}.bias"])
            getattr(both, f"bias_hh_l0{suffix}").zero_()
        cell.weight_ih.copy_(theta["context.attention.weight"].T)
        cell.weight_hh.zero_()  # the hidden state is part of the inputs: [f', h, r]
        cell.bias_ih.copy_(theta["context.attention.bias"])
        cell.bias_hh.zero_()
        both_directions = both(g)[0]
        g = g + both_directions[:, :WIDTH] + both_directions[:, WIDTH:]
        h = c = torch.zeros_like(f)
        for _ in range(3):
            read = (h @ g.T).softmax(1) @ g
            h, c = cell(torch.cat([f, h, read], 1), (h, c))
            h = h + f
        attention = functional.cosine_similarity(h[:, None], g, dim=-1).softmax(1)
        expected = (attention @ functional.one_hot(episode.support.y, WAYS).double()).log()
    torch.testing.assert_close(predict(algorithm, theta, episode), expected)


def test_only_full_context_depends_on_the_support_order() -> None:
    episode = draw_episode()
    flipped = episode._replace(support=Batch(*(part.flip(0) for part in episode.support)))
    for algorithm, is_same in ((MatchingNet(build_embedding(), SCORE), True), (build_full_context(), False)):
        theta = init_theta(algorithm)
        a, b = (predict(algorithm, theta, e) for e in (episode, flipped))
        assert torch.allclose(a, b, rtol=1e-9) is is_same


# Relation networks


def test_relation_scores_equal_a_network_on_pairs() -> None:
    algorithm = RelationNet(build_embedding(), SCORE, hidden=[6, 3], features=WIDTH)
    theta = init_theta(algorithm)
    episode = draw_episode(shots=3)
    layers = [nn.Linear(i, o, dtype=torch.float64) for i, o in ((2 * WIDTH, 6), (6, 3), (3, 1))]
    for k, layer in enumerate(layers):
        layer.weight.data = theta[f"relation.{k}.weight"].T
        layer.bias.data = theta[f"relation.{k}.bias"]
    network = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    features_S, features_Q = (part.x @ theta["model.weight"].T for part in episode)
    sums = features_S.view(3, WAYS, WIDTH).sum(0)
    expected = torch.stack([torch.stack([network(torch.cat([p, f]))[0] for p in sums]) for f in features_Q])
    found = predict(algorithm, theta, episode)
    torch.testing.assert_close(found, expected.detach())
    loss, metrics = algorithm.meta_loss(theta, episode, unroll, SCORE)
    one_hot = functional.one_hot(episode.query.y, WAYS).double()
    torch.testing.assert_close(loss, functional.mse_loss(found.sigmoid(), one_hot))
    assert torch.equal(metrics["mse"], loss)
    assert torch.equal(metrics["loss"], functional.cross_entropy(found, episode.query.y))
    assert metrics["accuracy"] == (found.argmax(1) == episode.query.y).float().mean()


def test_relation_mean_equals_sum_for_one_shot() -> None:
    episode = draw_episode(shots=1)
    by_sum = RelationNet(build_embedding(), SCORE, hidden=[6, 3], features=WIDTH)
    by_mean = RelationNet(build_embedding(), SCORE, hidden=[6, 3], combine="mean", features=WIDTH)
    theta = init_theta(by_sum)
    torch.testing.assert_close(predict(by_mean, theta, episode), predict(by_sum, theta, episode))


@pytest.mark.parametrize("loss", ["mse", "cross-entropy"])
def test_relation_gradient_equals_finite_differences(loss: Any) -> None:
    algorithm = RelationNet(build_embedding(), SCORE, hidden=[6], loss=loss, features=WIDTH)
    theta = init_theta(algorithm)
    episode = draw_episode()
    direction = {name: torch.randn_like(value) for name, value in theta.items()}

    def loss_at(h: float) -> float:
        at = {name: theta[name] + h * direction[name] for name in theta}
        return float(algorithm.meta_loss(at, episode, unroll, SCORE)[0])

    exact = loss_gradient(algorithm, theta, episode)
    slope = sum(float((exact[name] * direction[name]).sum()) for name in theta)
    assert (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5 == pytest.approx(slope, rel=1e-6)


# Infinite mixture prototypes


@pytest.mark.parametrize("options", [{"clusters": 1}, {"concentration": 1e-200}])
def test_one_cluster_per_class_equals_protonet(options: dict[str, Any]) -> None:
    """Either no cluster may be opened, or the distance limit is out of reach."""
    imp = IMP(build_embedding(), SCORE, sigma=0.5, learn_sigma=False, **options)
    protonet = ProtoNet(build_embedding(), SCORE)
    for seed in range(5):
        episode = draw_episode(seed, shots=5, spread=2.0)
        theta = init_theta(protonet, seed)
        assert set(init_theta(imp)) == set(theta)
        torch.testing.assert_close(predict(imp, theta, episode), predict(protonet, theta, episode))
        expected = loss_gradient(protonet, theta, episode)["model.weight"]
        torch.testing.assert_close(loss_gradient(imp, theta, episode)["model.weight"], expected)


def init_identity(algorithm: Any) -> Theta:
    return init_theta(algorithm) | {"model.weight": torch.eye(WIDTH, 5, dtype=torch.float64)}


def test_class_with_two_modes_gets_two_clusters() -> None:
    """Class 0 lies at both ends of a line. Class 1 lies in the middle, at the mean of class 0."""
    places = torch.tensor([-10.0, 0.5, 10.0, 0.2, -10.2, 0.3, 10.1, 0.4], dtype=torch.float64)
    support = Batch(functional.pad(places[:, None], (0, 4)), torch.arange(2).repeat(4))
    ask = torch.tensor([-9.0, 9.5, 10.5, 0.4, 1.0, -1.0], dtype=torch.float64)
    query = Batch(functional.pad(ask[:, None], (0, 4)), torch.tensor([0, 0, 0, 1, 1, 1]))
    episode = Episode(support, query)
    score = ClassificationScore(2)

    def accuracy(algorithm: Any) -> float:
        _, metrics = score(predict(algorithm, init_identity(algorithm), episode), query)
        return float(metrics["accuracy"])

    assert accuracy(ProtoNet(build_embedding(), score)) < 0.7
    assert accuracy(IMP(build_embedding(), score)) == 1
    found = infer_clusters(support.x[:, :WIDTH], support.y, 2, torch.tensor([5.0]).double(), 0.1, None)
    counts = [int((found.exists & (found.labels == c)).sum()) for c in range(2)]
    assert counts == [2, 1]  # the first cluster of class 0, at its mean, is empty in the end
    ends = found.centres[found.exists & (found.labels == 0)][:, 0]
    torch.testing.assert_close(ends, torch.tensor([-10.1, 10.05]).double(), rtol=1e-3, atol=1e-3)


def run_authors_loop(h: Tensor, y: Tensor, ways: int, sigma: float, alpha: float) -> list[tuple[Tensor, int]]:
    """Return (centre, label) of every cluster, computed like the authors' loop with growing lists."""
    rows = [(row, int(label)) for row, label in zip(h, y, strict=True) if label != PADDING]
    labels = [c for c in range(ways) if any(label == c for _, label in rows)]
    centres = [torch.stack([row for row, label in rows if label == c]).mean(0) for c in labels]
    rho = float(torch.stack(centres).var(0).mean())
    limit = -2 * sigma * math.log(alpha) + h.shape[1] * sigma * math.log(1 + rho / sigma)
    for row, label in rows:
        own = [m for m, c in zip(centres, labels, strict=True) if c == label]
        if min(float((row - m).square().sum()) for m in own) > limit:
            centres.append(row)
            labels.append(label)
    share = torch.zeros(len(rows), len(centres), dtype=h.dtype)
    for i, (row, label) in enumerate(rows):
        mass = [math.exp(-float((row - m).square().sum()) / 2 / sigma) * (c == label)
                for m, c in zip(centres, labels, strict=True)]  # fmt: skip
        share[i] = torch.tensor(mass) / sum(mass)
    held = share.sum(0)
    moved = share.T @ torch.stack([row for row, _ in rows])
    return [(moved[k] / held[k], labels[k]) for k in range(len(centres)) if held[k] > 1e-3]


def test_clusters_equal_those_of_the_authors_code() -> None:
    counts = set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        h = 2 * torch.randn(12, WIDTH, generator=generator, dtype=torch.float64)
        y = torch.randint(-1, WAYS, (12,), generator=generator)
        y[:2] = torch.tensor([0, 2])  # class 1 may be absent
        sigma = torch.tensor([1.5], dtype=torch.float64)
        found = infer_clusters(h, y, WAYS, sigma, 0.5, None)
        expected = run_authors_loop(h, y, WAYS, 1.5, 0.5)
        counts.add(len(expected))
        assert found.labels[found.exists].tolist() == [label for _, label in expected]
        torch.testing.assert_close(found.centres[found.exists], torch.stack([m for m, _ in expected]))
    assert len(counts) > 3
    y = torch.zeros(12, dtype=torch.long)
    h = torch.randn(12, WIDTH, dtype=torch.float64) * 100
    sigma = torch.ones(1, dtype=torch.float64)
    for most in (1, 2, 5):
        assert int(infer_clusters(h, y, 1, sigma, 0.5, most).exists.sum()) <= most


def test_distance_limit_matches_computation_by_hand() -> None:
    means = torch.tensor([[0.0, 0.0], [2.0, 4.0], [50.0, 50.0]], dtype=torch.float64)
    counts = torch.tensor([1.0, 3.0, 0.0])
    sigma = torch.tensor([5.0], dtype=torch.float64)
    rho = (2 + 8) / 2  # the third class is absent
    expected = -2 * 5 * math.log(0.1) + 2 * 5 * math.log(1 + rho / 5)
    assert float(compute_distance_limit(means, counts, sigma, 0.1)) == pytest.approx(expected, rel=1e-12)


def test_sigma_is_learned_from_the_logits() -> None:
    algorithm = IMP(build_embedding(), SCORE)
    episode = draw_episode()
    theta = init_theta(algorithm)
    assert float(theta["cluster.log_sigma"].exp()) == pytest.approx(5.0, rel=1e-6)
    distance = -predict(algorithm, theta, episode) * 2 * theta["cluster.log_sigma"].exp()
    at = theta["cluster.log_sigma"].clone().requires_grad_()
    loss = functional.cross_entropy(-distance / (2 * at.exp()), episode.query.y)
    expected = torch.autograd.grad(loss, at)[0]
    torch.testing.assert_close(loss_gradient(algorithm, theta, episode)["cluster.log_sigma"], expected)


# Errors


def test_number_of_features_is_needed_without_a_head() -> None:
    for make in (
        lambda: RelationNet(build_embedding(), SCORE),
        lambda: MatchingNet(build_embedding(), SCORE, full_context=True),
    ):
        with pytest.raises(InputError, match=r"algorithm\.features: missing, expected the number of outputs"):
            make()
    MatchingNet(build_embedding(), SCORE)  # does not need it
