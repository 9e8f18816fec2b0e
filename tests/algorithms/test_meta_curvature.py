"""Meta-Curvature, compared with MAML, with the Kronecker product and with higher."""

from __future__ import annotations

import warnings

import pytest
import torch
from oracles import VMAP, add_noise, build_setting, distance, gradient, iterate_tasks, loss, maml_gradient

from distmeta.algorithms.meta_curvature import transform


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "conv4"])
def test_identity_equals_maml(kind: str, learned: bool) -> None:
    options = {"inner_lr": 0.125, "inner_steps": 3}  # a learned rate is float32, which holds 0.125 exactly
    ours = gradient(build_setting({"type": "meta-curvature", "learn_inner_lr": learned, **options}, kind))
    theirs = maml_gradient(kind, **options)
    assert distance(ours, theirs) <= 1e-12
    assert any(name.startswith("inner_lr.") for name in ours) == learned
    assert all(bool(value.any()) for name, value in ours.items() if name.startswith("curvature."))


def test_theta_has_a_matrix_per_mode() -> None:
    theta = build_setting({"type": "meta-curvature"}, "conv4").theta
    shapes = {name: tuple(value.shape) for name, value in theta.items() if name.startswith("curvature.")}
    assert shapes["curvature.blocks.1.0.weight.out"] == (8, 8)
    assert shapes["curvature.blocks.0.0.weight.in"] == (1, 1)
    assert shapes["curvature.blocks.1.0.weight.filter"] == (9, 9)
    assert shapes["curvature.blocks.1.1.weight.scale"] == (8,)
    assert shapes["curvature.head.weight.out"] == (3, 3)
    assert shapes["curvature.head.weight.in"] == (8, 8)
    assert shapes["curvature.head.bias.scale"] == (3,)
    assert "curvature.head.weight.filter" not in shapes


def test_mode_products_equal_the_kronecker_product() -> None:
    """vec(MC(G)) = (M_o ⊗ M_i ⊗ M_f) vec(G) for row-major vec, and M_o G M_iᵀ for a linear layer."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    modes = {"out": draw(4, 4), "in": draw(3, 3), "filter": draw(6, 6)}
    g = draw(4, 3, 2, 3)
    dense = torch.kron(torch.kron(modes["out"], modes["in"]), modes["filter"])
    torch.testing.assert_close(transform(g, modes).flatten(), dense @ g.flatten())
    g = draw(4, 3)
    expected = modes["out"] @ g @ modes["in"].T
    torch.testing.assert_close(transform(g, {"out": modes["out"], "in": modes["in"]}), expected)
    torch.testing.assert_close(transform(g, {"in": modes["in"]}), g @ modes["in"].T)
    torch.testing.assert_close(transform(g[0], {"scale": g[1]}), g[0] * g[1])


@pytest.mark.parametrize("kind", ["mlp", "conv4"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_gradient_equals_higher(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """Random matrices. higher applies the dense product in a callback on its inner gradients."""
    higher = pytest.importorskip("higher")
    s = build_setting({"type": "meta-curvature", "inner_lr": 0.1, "inner_steps": 2}, kind, dtype)
    s = s._replace(theta=add_noise(s.theta, prefix="curvature."))
    net = s.problem.model.module
    names = [name for name, _ in net.named_parameters()]
    modes = {k: v.clone().requires_grad_() for k, v in s.theta.items() if k.startswith("curvature.")}

    def get_mode(name: str, mode: str, size: int) -> torch.Tensor:
        return modes.get(f"curvature.{name}.{mode}", torch.eye(size, dtype=dtype))

    def curve(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        curved = []
        for name, g in zip(names, gradients, strict=True):
            if g.dim() == 1:
                curved.append(modes[f"curvature.{name}.scale"] * g)
                continue
            rest = g[0, 0].numel()
            dense = torch.kron(get_mode(name, "out", g.shape[0]), get_mode(name, "in", g.shape[1]))
            curved.append((torch.kron(dense, get_mode(name, "filter", rest)) @ g.flatten()).reshape(g.shape))
        return curved

    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from higher
        for x_s, y_s, x_q, y_q in iterate_tasks(s.episodes):
            with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fnet, optimizer):
                for _ in range(2):
                    optimizer.step(loss(fnet(x_s), y_s), grad_callback=curve)
                loss(fnet(x_q), y_q).backward()
    theirs = {"model." + name: p.grad for name, p in net.named_parameters()}
    theirs |= {name: value.grad for name, value in modes.items()}
    assert distance(gradient(s), theirs) <= tolerance


@pytest.mark.parametrize("head", ["shared", "prototype"])
def test_head_with_free_ways_has_no_matrix_over_classes(head: str) -> None:
    s = build_setting({"type": "meta-curvature", "inner_lr": 0.1, "inner_steps": 2}, "conv4", head=head)
    curved = {k: tuple(v.shape) for k, v in s.theta.items() if k.startswith("curvature.head")}
    assert curved == {"curvature.head.weight.in": (8, 8), "curvature.head.bias.scale": (1,)}
    assert distance(gradient(s), gradient(s, execution=VMAP)) <= 1e-9
    options = {"inner_lr": 0.1, "inner_steps": 2}
    theirs = gradient(build_setting({"type": "maml", **options}, "conv4", head=head))
    assert distance(gradient(s), theirs) <= 1e-12
