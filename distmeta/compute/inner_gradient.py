"""Gradients inside a task: of the support loss, and whatever else a meta-loss differentiates.

Tasks that are computed one after the other (`loop`) use plain autograd here, which can differentiate every module.
Inside a transformation of `torch.func` (vmap, vjp), where plain autograd cannot run, `torch.func` takes the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distmeta.trees import tree_flatten, tree_map, tree_unflatten


def inner_gradient(
    loss: Callable[[Any], Any], phi: Any, has_aux: bool = False, first_order: bool = False
) -> Any:
    """Return ∂loss(φ)/∂φ, a pytree like φ. It is zero for tensors that the loss does not use.

    Only the dependence through the argument counts, as in `torch.func.grad`: if the loss also reads a tensor of φ from
    elsewhere, that is a constant. The gradient is itself differentiable if grad mode is on.

    Args:
        loss: φ -> a scalar; with `has_aux` -> (a scalar, anything else).
        phi: a pytree of float tensors.
        has_aux: return (gradient, anything else).
        first_order: return the gradient as a constant. No second-order graph is then built.
    """
    if is_inside_transform():
        result = torch.func.grad(loss, has_aux=has_aux)(phi)
        if not first_order:
            return result
        gradient, *aux = result if has_aux else (result,)
        gradient = tree_map(torch.Tensor.detach, gradient)
        return (gradient, *aux) if has_aux else gradient
    keeps_graph = torch.is_grad_enabled() and not first_order
    has_outer_graph = torch.is_grad_enabled()
    leaves, structure = tree_flatten(phi)
    with torch.enable_grad():
        inputs = [_make_input(leaf) for leaf in leaves]
        result = loss(tree_unflatten(inputs, structure))
    value, *aux = result if has_aux else (result,)
    # first-order code may still read what was computed on the way (aux), whose graph must then survive
    found = _differentiate(value, inputs, keeps_graph, retain_graph=keeps_graph or has_aux)
    gradient = tree_unflatten(found, structure)
    if not has_aux:
        return gradient
    if has_outer_graph:
        return (gradient, *aux)
    return (gradient, *tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, aux))


def inner_vjp(function: Callable[[Any], Any], phi: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return function(φ) and `pull_back`, which maps cotangents of the result to those of φ, as `torch.func.vjp` does.

    `pull_back` may be called any number of times. What it returns is a constant.
    """
    if is_inside_transform():
        result: tuple[Any, ...] = torch.func.vjp(function, phi)
        return result[0], lambda cotangents: tree_map(torch.Tensor.detach, result[1](cotangents)[0])
    leaves, structure = tree_flatten(phi)
    with torch.enable_grad():
        inputs = [leaf.detach().requires_grad_() for leaf in leaves]
        outputs = function(tree_unflatten(inputs, structure))
    output_leaves = tree_flatten(outputs)[0]

    def pull_back(cotangents: Any) -> Any:
        pairs = zip(output_leaves, tree_flatten(cotangents)[0], strict=True)
        # a sum of products instead of `grad_outputs`, for which torch 2.13 loads its symbolic shapes (30 MB)
        with torch.enable_grad():
            products = [(output * cotangent.detach()).sum() for output, cotangent in pairs]
            total = torch.stack(products).sum()
        return tree_unflatten(_differentiate(total, inputs, False, retain_graph=True), structure)

    return tree_map(torch.Tensor.detach, outputs), pull_back


def is_inside_transform() -> bool:
    """Return whether a transformation of `torch.func` is running. torch refuses `requires_grad_` there."""
    try:
        torch.empty(()).requires_grad_()
    except RuntimeError:
        return True
    return False


def _make_input(leaf: Tensor) -> Tensor:
    """Return a tensor whose gradient is that of this use of the leaf only, and which keeps the leaf's history."""
    return leaf.view_as(leaf) if leaf.requires_grad else leaf.detach().requires_grad_()


def _differentiate(
    value: Tensor, inputs: list[Tensor], create_graph: bool, retain_graph: bool
) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in inputs]
    found = torch.autograd.grad(
        value, inputs, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True
    )
    return [
        torch.zeros_like(leaf) if part is None else part for leaf, part in zip(inputs, found, strict=True)
    ]
