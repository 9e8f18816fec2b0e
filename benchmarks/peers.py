"""MAML as users of three other tools write it: a Python loop over tasks, on their own model.

A peer is made once, `peer = higher_peer(module, inner)`. Then `peer(episodes)` adds the gradient of the mean query loss
after adaptation to the `.grad` of the module's parameters, and returns that loss. `train_step(peer, optimizer,
episodes)` is an outer step with any torch optimizer.

The peers use the module of a distmeta job (`peer_module`), so that all start at the same weights. They compute what
MAML needs and nothing else: no accuracy, no loss before adaptation. A tool is imported when its peer is made.

Shapes: episodes are stacked over tasks, [T, ...].
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distmeta.protocols import Episode, Theta
from distmeta.runtime.problem import Problem

PREFIX = "model."
"""The prefix of parameter names in distmeta's theta."""


class Inner(NamedTuple):
    """The inner loop: `steps` of gradient descent at rate `lr` on `loss(outputs, targets)`."""

    loss: Callable[[Tensor, Tensor], Tensor]
    lr: float
    steps: int


Peer = Callable[[Episode], Tensor]


def higher_peer(module: nn.Module, inner: Inner) -> Peer:
    """higher 0.2.1: a differentiable copy of the module and of SGD for each task."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # higher 0.2.1 has invalid escape sequences in its docstrings
        import higher

    optimizer = torch.optim.SGD(module.parameters(), lr=inner.lr)

    def accumulate(episodes: Episode) -> Tensor:
        total = torch.zeros((), device=episodes.query.x.device)
        count = len(episodes.query.y)
        for x_s, y_s, x_q, y_q in iterate_tasks(episodes):
            with higher.innerloop_ctx(
                module, optimizer, copy_initial_weights=False, track_higher_grads=True
            ) as (adapted, differentiable):
                for _ in range(inner.steps):
                    differentiable.step(inner.loss(adapted(x_s), y_s))
                loss = inner.loss(adapted(x_q), y_q) / count
                loss.backward()
            total += loss.detach()
        return total

    return accumulate


def torchopt_peer(module: nn.Module, inner: Inner) -> Peer:
    """TorchOpt 0.7.3: MetaSGD changes the module itself. Its state is restored after each task."""
    import torchopt

    optimizer = torchopt.MetaSGD(module, lr=inner.lr)

    def accumulate(episodes: Episode) -> Tensor:
        total = torch.zeros((), device=episodes.query.x.device)
        count = len(episodes.query.y)
        initial = torchopt.extract_state_dict(module, by="reference", detach_buffers=True)
        initial_optimizer = torchopt.extract_state_dict(optimizer, by="reference")
        for x_s, y_s, x_q, y_q in iterate_tasks(episodes):
            for _ in range(inner.steps):
                optimizer.step(inner.loss(module(x_s), y_s))
            loss = inner.loss(module(x_q), y_q) / count
            loss.backward()
            total += loss.detach()
            torchopt.recover_state_dict(module, initial)
            torchopt.recover_state_dict(optimizer, initial_optimizer)
        return total

    return accumulate


def functional_peer(module: nn.Module, inner: Inner) -> Peer:
    """Only PyTorch: torch.func.grad of a function that contains torch.func.grad."""
    parameters = dict(module.named_parameters())

    def loss_at(phi: Theta, x: Tensor, y: Tensor) -> Tensor:
        return inner.loss(torch.func.functional_call(module, phi, (x,)), y)

    def query_loss(theta: Theta, x_s: Tensor, y_s: Tensor, x_q: Tensor, y_q: Tensor) -> Tensor:
        phi = theta
        for _ in range(inner.steps):
            gradient = torch.func.grad(loss_at)(phi, x_s, y_s)
            phi = {name: phi[name] - inner.lr * gradient[name] for name in phi}
        return loss_at(phi, x_q, y_q)

    meta_gradient = torch.func.grad_and_value(query_loss)

    def accumulate(episodes: Episode) -> Tensor:
        total = torch.zeros((), device=episodes.query.x.device)
        count = len(episodes.query.y)
        theta = {name: value.detach() for name, value in parameters.items()}
        for task in iterate_tasks(episodes):
            gradient, loss = meta_gradient(theta, *task)
            for name, parameter in parameters.items():
                part = gradient[name] / count
                parameter.grad = part if parameter.grad is None else parameter.grad + part
            total += loss / count
        return total

    return accumulate


PEERS: dict[str, Callable[[nn.Module, Inner], Peer]] = {
    "higher": higher_peer,
    "torchopt": torchopt_peer,
    "torch.func": functional_peer,
}


def train_step(peer: Peer, optimizer: torch.optim.Optimizer, episodes: Any) -> Tensor:
    """Take one outer step and return the mean query loss."""
    optimizer.zero_grad()
    loss = peer(episodes)
    optimizer.step()
    return loss


def iterate_tasks(episodes: Episode) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield support x and y, query x and y of each task."""
    return zip(*episodes.support, *episodes.query, strict=True)


def peer_module(problem: Problem) -> nn.Module:
    """Return a copy of the job's model at its initial weights."""
    return copy.deepcopy(problem.model.module)


def inner_loop(problem: Problem, loss: Callable[[Tensor, Tensor], Tensor]) -> Inner:
    """Return the inner loop of a job with MAML."""
    algorithm: Any = problem.algorithm
    return Inner(loss, algorithm.inner_lr, algorithm.inner_steps)


def compute_gradient(peer: Peer, module: nn.Module, episodes: Episode) -> Theta:
    """Return a peer's meta-gradient by distmeta's names."""
    parameters = dict(module.named_parameters())
    for parameter in parameters.values():
        parameter.grad = None
    peer(episodes)
    return {PREFIX + name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def read_theta(module: nn.Module) -> Theta:
    """Return the module's parameters as distmeta's theta."""
    return {PREFIX + name: value.detach().clone() for name, value in module.named_parameters()}
