"""MAML as the users of three other tools write it: a Python loop over tasks, on a model of theirs.

Each peer is made once, `peer = higher_peer(module, inner)`, and then called with episodes: `peer(episodes)`
adds the gradient of the mean query loss after adaptation to the `.grad` of the module's parameters, and gives
that loss. An outer step is `train_step(peer, optimizer, episodes)`, with any torch optimizer.

They run on the module of a distmeta job (`peer_module`), so that all start at the same weights. They compute
what MAML needs and nothing more: no accuracy, no loss before adaptation. A tool is imported when its peer is made.

Shapes: episodes stacked over tasks, [T, ...]; S support and Q query rows of one task.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distmeta.protocols import Episode, Theta
from distmeta.runtime.problem import Problem

PREFIX = "model."
"""What distmeta writes before a parameter's name in theta."""


class Inner(NamedTuple):
    """The inner loop: `steps` of gradient descent at rate `lr` on `loss(outputs, targets)`."""

    loss: Callable[[Tensor, Tensor], Tensor]
    lr: float
    steps: int


Peer = Callable[[Episode], Tensor]


def higher_peer(module: nn.Module, inner: Inner) -> Peer:
    """higher 0.2.1: a differentiable copy of the module and of SGD for each task."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is of 2020, and warns of escape sequences in its docstrings
        import higher

    optimizer = torch.optim.SGD(module.parameters(), lr=inner.lr)

    def accumulate(episodes: Episode) -> Tensor:
        total, count = torch.zeros((), device=episodes.query.x.device), len(episodes.query.y)
        for x_s, y_s, x_q, y_q in tasks_of(episodes):
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
    """TorchOpt 0.7.3: MetaSGD changes the module itself, whose state is put back after each task."""
    import torchopt

    optimizer = torchopt.MetaSGD(module, lr=inner.lr)

    def accumulate(episodes: Episode) -> Tensor:
        total, count = torch.zeros((), device=episodes.query.x.device), len(episodes.query.y)
        initial = torchopt.extract_state_dict(module, by="reference", detach_buffers=True)
        initial_optimizer = torchopt.extract_state_dict(optimizer, by="reference")
        for x_s, y_s, x_q, y_q in tasks_of(episodes):
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
    """PyTorch alone: torch.func.grad of a function that holds a torch.func.grad."""
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
        total, count = torch.zeros((), device=episodes.query.x.device), len(episodes.query.y)
        theta = {name: value.detach() for name, value in parameters.items()}
        for task in tasks_of(episodes):
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


def train_step(peer: Peer, optimizer: torch.optim.Optimizer, episodes: Episode) -> Tensor:
    """One outer step; the mean query loss."""
    optimizer.zero_grad()
    loss = peer(episodes)
    optimizer.step()
    return loss


def tasks_of(episodes: Episode) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """One task after the other: support x and y, query x and y."""
    return zip(*episodes.support, *episodes.query, strict=True)


def peer_module(problem: Problem) -> nn.Module:
    """The job's model at its initial weights, an ordinary module of the peer's own."""
    return copy.deepcopy(problem.model.module)


def inner_of(problem: Problem, loss: Callable[[Tensor, Tensor], Tensor]) -> Inner:
    """The job's inner loop. `problem.algorithm` is a MAML."""
    return Inner(loss, problem.algorithm.inner_lr, problem.algorithm.inner_steps)


def gradient_of(peer: Peer, module: nn.Module, episodes: Episode) -> Theta:
    """A peer's meta-gradient under distmeta's names."""
    parameters = dict(module.named_parameters())
    for parameter in parameters.values():
        parameter.grad = None
    peer(episodes)
    return {PREFIX + name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def theta_of(module: nn.Module) -> Theta:
    """The module's parameters as distmeta's theta."""
    return {PREFIX + name: value.detach().clone() for name, value in module.named_parameters()}
