"""RL²: a recurrent policy that learns in its memory (Duan et al. 2016, 1611.02779; Wang et al. 2016, 1611.05763)."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.class_features import head_shape
from distmeta.errors import InputError
from distmeta.protocols import Model, Score, Theta


class RL2:
    """A gated recurrent unit goes through all episodes of a trajectory; what it learns of the task is in its memory.

        r, z = σ(W x + U h + b),   n = tanh(W_n x + b_n + r ⊙ (U_n h + c)),   h ← (1 − z) ⊙ n + z ⊙ h
        outputs = V h + d                                                       (Cho et al. 2014, arXiv 1406.1078)

    There is no inner loop: theta is trained by the policy gradient of the whole trajectory's return. The tasks must
    show the policy what it did and what came of it: `tasks.history: true`. x is the model's features, the input itself
    where it has no hidden layer (`model: {type: mlp, hidden: []}`); its last layer is not used but for its number
    of outputs. W starts as torch.nn.GRU's, U orthogonal, V near zero, so that all actions start alike; the first h
    is learned.

    Deviation: plain policy gradient and the job's optimizer; the papers have TRPO and A3C. The baseline is the task
    family's, theirs are recurrent.

    Args:
        memory: numbers of h.
    """

    group_size = 1
    inner_steps = 0

    def __init__(self, model: Model, score: Score, memory: Annotated[int, Field(ge=1)] = 64):
        self.model, self.score, self.memory = model, score, memory
        self.shape = head_shape(model, "rl2")

    def init(self, generator: torch.Generator) -> Theta:
        outputs, features = self.shape
        size, bound = self.memory, self.memory**-0.5

        def uniform(*shape: int) -> Tensor:
            return bound * (2 * torch.rand(shape, generator=generator) - 1)

        squares = [torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(3)]
        return self.model.init_body() | {
            "rl2.input": uniform(features, 3 * size),
            "rl2.input_bias": torch.zeros(3 * size),
            "rl2.recurrent": torch.cat(squares, 1),
            "rl2.recurrent_bias": torch.zeros(size),
            "rl2.start": torch.zeros(size),
            "rl2.out": 0.1 * uniform(size, outputs),
            "rl2.out_bias": torch.zeros(outputs),
        }

    def begin(self, theta: Theta, support: Any) -> Tensor:
        """The memory before the first step, [memory]."""
        return theta["rl2.start"]

    def step(self, theta: Theta, state: Tensor, support: Any, k: int) -> Tensor:
        raise AssertionError("there is no inner step")

    def act(self, theta: Theta, state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One time step of all trajectories, x [N, O]: outputs and memory [N, memory]."""
        memory = advance(theta, state.expand(len(x), self.memory), self._read(theta, x))
        return memory @ theta["rl2.out"] + theta["rl2.out_bias"], memory

    def predict(self, theta: Theta, state: Tensor, x: Tensor) -> Tensor:
        """Outputs of whole trajectories, x [N, H, O]: [N, H, ·]."""
        if x.dim() != 3:
            raise InputError(
                f"algorithm.type: got rl2 for inputs of shape {list(x.shape)}, expected trajectories [N, H, O]: tasks "
                "of reinforcement learning"
            )
        memory, along = state.expand(len(x), self.memory), []
        for entering in self._read(theta, x).unbind(1):
            memory = advance(theta, memory, entering)
            along.append(memory)
        return torch.stack(along, 1) @ theta["rl2.out"] + theta["rl2.out_bias"]

    def _read(self, theta: Theta, x: Tensor) -> Tensor:
        """What x gives to the gates r and z and to n, [..., 3 · memory]."""
        return self.model.features(theta, x) @ theta["rl2.input"] + theta["rl2.input_bias"]


def advance(theta: Theta, memory: Tensor, entering: Tensor) -> Tensor:
    """The memory after one more input, [N, memory]."""
    read_r, read_z, read_n = entering.chunk(3, -1)
    kept_r, kept_z, kept_n = (memory @ theta["rl2.recurrent"]).chunk(3, -1)
    r, z = torch.sigmoid(read_r + kept_r), torch.sigmoid(read_z + kept_z)
    n = torch.tanh(read_n + r * (kept_n + theta["rl2.recurrent_bias"]))
    return (1 - z) * n + z * memory
