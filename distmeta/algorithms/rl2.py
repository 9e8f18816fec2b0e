"""RL²: Duan et al. 2016, arXiv 1611.02779; Wang et al. 2016, arXiv 1611.05763.

Shapes: N trajectories, H time steps, O observation features.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from distmeta.algorithms.class_features import find_head_shape
from distmeta.errors import InputError
from distmeta.protocols import Model, Score, Theta


class RL2:
    """Train a recurrent policy that learns a task in its hidden state, across all episodes of a trajectory.

        r, z = σ(W x + U h + b),   n = tanh(W_n x + b_n + r ⊙ (U_n h + c)),   h ← (1 − z) ⊙ n + z ⊙ h
        outputs = V h + d                                                       (Cho et al. 2014, arXiv 1406.1078)

    There is no inner loop. θ is trained by the policy gradient of the whole trajectory's return. The observations must
    contain the previous action and reward: `tasks.history: true`. x are the model's features, which are the
    observations themselves for a model without hidden layers (`model: {type: mlp, hidden: []}`). The model's last layer
    only tells the number of outputs. W starts like that of torch.nn.GRU, U orthogonal, and V near zero, so that all
    actions are equally likely at the start. The first h is learned.

    Deviations: plain policy gradient and the job's optimizer; the papers have TRPO and A3C. The baseline is the task
    family's; theirs are recurrent.

    Args:
        memory: size of h, ≥ 1.

    Raises:
        InputError: the model has no last linear layer.
    """

    group_size = 1
    inner_steps = 0

    def __init__(self, model: Model, score: Score, memory: Annotated[int, Field(ge=1)] = 64):
        self.model = model
        self.score = score
        self.memory = memory
        self.outputs, self.features = find_head_shape(model, "rl2")

    def init(self, generator: torch.Generator) -> Theta:
        size = self.memory
        bound = size**-0.5

        def uniform(*shape: int) -> Tensor:
            return bound * (2 * torch.rand(shape, generator=generator) - 1)

        orthogonal = [torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(3)]
        return self.model.init_body() | {
            "rl2.input": uniform(self.features, 3 * size),
            "rl2.input_bias": torch.zeros(3 * size),
            "rl2.recurrent": torch.cat(orthogonal, 1),
            "rl2.recurrent_bias": torch.zeros(size),
            "rl2.start": torch.zeros(size),
            "rl2.out": 0.1 * uniform(size, self.outputs),
            "rl2.out_bias": torch.zeros(self.outputs),
        }

    def begin(self, theta: Theta, support: Any) -> Tensor:
        """Return h before the first time step, [memory]."""
        return theta["rl2.start"]

    def step(self, theta: Theta, state: Tensor, support: Any, k: int) -> Tensor:
        raise AssertionError("there is no inner step")

    def predict(self, theta: Theta, state: Tensor, x: Tensor) -> Tensor:
        """Return the outputs along whole trajectories x [N, H, O]: [N, H, ·]."""
        if x.dim() != 3:
            raise InputError(
                f"algorithm.type: got rl2 for inputs of shape {list(x.shape)}, expected trajectories [N, H, O] of a "
                "reinforcement learning task"
            )
        h = state.expand(len(x), self.memory)
        steps = []
        for inputs in self._project_inputs(theta, x).unbind(1):
            h = step_gru(theta, h, inputs)
            steps.append(h)
        return torch.stack(steps, 1) @ theta["rl2.out"] + theta["rl2.out_bias"]

    def act(self, theta: Theta, state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs and h [N, memory] after one time step of all trajectories, x [N, O]."""
        h = step_gru(theta, state.expand(len(x), self.memory), self._project_inputs(theta, x))
        return h @ theta["rl2.out"] + theta["rl2.out_bias"], h

    def _project_inputs(self, theta: Theta, x: Tensor) -> Tensor:
        """Return W x + b for r and z and W_n x + b_n for n, [..., 3 · memory]."""
        return self.model.features(theta, x) @ theta["rl2.input"] + theta["rl2.input_bias"]


def step_gru(theta: Theta, h: Tensor, inputs: Tensor) -> Tensor:
    """Return h after one time step, [N, memory]."""
    input_r, input_z, input_n = inputs.chunk(3, -1)
    recurrent_r, recurrent_z, recurrent_n = (h @ theta["rl2.recurrent"]).chunk(3, -1)
    r = torch.sigmoid(input_r + recurrent_r)
    z = torch.sigmoid(input_z + recurrent_z)
    n = torch.tanh(input_n + r * (recurrent_n + theta["rl2.recurrent_bias"]))
    return (1 - z) * n + z * h
