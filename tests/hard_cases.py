"""The protocol's hard cases as a user would bring them, `hard_cases:Name` in a job: nothing in runtime/ knows them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distmeta.errors import InputError
from distmeta.protocols import Batch, Episode, Metrics, Model, Score, Theta, Unroll
from distmeta.seeding import task_generator


class Memory:
    """A memory-augmented regressor: writes each support pair into a memory by a recurrent cell, reads it for a query.

    No inner loop (`inner_steps` 0); theta holds the controller beside an unused `model`.
    """

    group_size = 1
    inner_steps = 0

    def __init__(self, score: Score, cells: int = 8):
        self.score, self.cells = score, cells

    def init(self, generator: torch.Generator) -> Theta:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) / shape[0] ** 0.5

        return {"write.weight": normal(self.cells + 2, self.cells), "read.weight": normal(self.cells + 1, 1)}

    def begin(self, theta: Theta, support: Batch) -> Tensor:
        memory = support.x.new_zeros(self.cells)
        for x, y in zip(support.x, support.y, strict=True):
            memory = torch.tanh(torch.cat([memory, x, y]) @ theta["write.weight"])
        return memory

    def step(self, theta: Theta, state: Tensor, support: Batch, k: int) -> Tensor:
        raise AssertionError("there is no inner step")

    def predict(self, theta: Theta, memory: Tensor, x: Tensor) -> Tensor:
        read = torch.cat([memory.expand(len(x), -1), x], 1)
        return read @ theta["read.weight"]


class Pairwise:
    """MAML whose loss compares two tasks: adapted parameters of different tasks are pushed a margin apart."""

    group_size = 2
    inner_steps = 1

    def __init__(self, model: Model, score: Score, margin: float = 1.0):
        self.model, self.score, self.margin = model, score, margin

    def init(self, generator: torch.Generator) -> Theta:
        return self.model.init(generator)

    def begin(self, theta: Theta, support: Batch) -> Theta:
        return dict(theta)

    def step(self, theta: Theta, phi: Theta, support: Batch, k: int) -> Theta:
        gradient = torch.func.grad(lambda p: self.score(self.model(p, support.x), support)[0])(phi)
        return {name: phi[name] - 0.05 * gradient[name] for name in phi}

    def predict(self, theta: Theta, phi: Theta, x: Tensor) -> Tensor:
        return self.model(phi, x)

    def meta_loss(
        self, theta: Theta, episode: Episode, unroll: Unroll, score: Score
    ) -> tuple[Tensor, Metrics]:
        losses, adapted = [], []
        for g in range(2):
            support, query = Batch(*(v[g] for v in episode.support)), Batch(*(v[g] for v in episode.query))
            phi = unroll(self, theta, support)
            losses.append(score(self.predict(theta, phi, query.x), query)[0])
            adapted.append(torch.cat([value.flatten() for value in phi.values()]))
        distance = (adapted[0] - adapted[1]).square().sum().add(1e-12).sqrt()
        rows = torch.stack(losses)
        return rows.mean() + torch.relu(self.margin - distance), {"loss": rows}


class Trajectories(NamedTuple):
    """Bandit pulls: x [N, 1] ones, action [N], advantage [N]."""

    x: Tensor
    action: Tensor
    advantage: Tensor
    payoff: Tensor


class Bandit:
    """Two-armed Bernoulli bandits: collect, then replay. Noise is data from the task's stream."""

    in_shape = (1,)
    out_features = 2

    def __init__(self, pulls: int = 20):
        self.pulls = pulls

    def collect(self, split: str, ids: Any, k: int, policy: Any) -> Trajectories:
        x = torch.ones(len(ids), self.pulls, 1)
        probability = policy(x).softmax(-1)[..., 1]
        noise = np.stack([task_generator(i).random((k + 1, 2 * self.pulls + 1))[-1] for i in ids])
        better = np.stack([task_generator(i).random() < 0.5 for i in ids])
        noise = torch.from_numpy(noise).float()
        action = (noise[:, : self.pulls] < probability).long()
        hit = torch.from_numpy(better)[:, None] == (action == 1)
        payoff = (noise[:, self.pulls : -1] < torch.where(hit, 0.9, 0.1)).float()
        return Trajectories(x, action, payoff - payoff.mean(1, keepdim=True), payoff)

    def score(self, outputs: Tensor, batch: Trajectories) -> tuple[Tensor, Metrics]:
        log_p = outputs.log_softmax(-1).gather(-1, batch.action[..., None])[..., 0]
        return -(log_p * batch.advantage).mean(), {"return": batch.payoff.mean()}


class Dropout(nn.Sequential):
    """A model that draws random numbers."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__(nn.Linear(in_shape[0], 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, out_features))


class RunningNorm(nn.Sequential):
    """A model that changes its buffers."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__(nn.Linear(in_shape[0], 4), nn.BatchNorm1d(4), nn.Linear(4, out_features))


class Attention(nn.Module):
    """Fused attention, which has no second derivative."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__()
        self.qkv, self.out = nn.Linear(in_shape[0], 24), nn.Linear(8, out_features)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[None, None].chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v)[0, 0])


class Unequal:
    """Sine-like tasks of 3 to 5 support and 2 to 3 query rows, by `ids`; those of an even number first with `pairs`.

    bad: tasks of this many support rows have a NaN in training.
    """

    in_shape = (1,)
    out_features = 1

    def __init__(self, pairs: bool = False, bad: int = 0):
        self.pairs, self.bad = pairs, bad

    def draw(self, split: str, ids: Any) -> list[Episode]:
        ids = np.asarray(ids)
        return [self._one(split, i, ids[n - n % 2] if self.pairs else i) for n, i in enumerate(ids)]

    def _one(self, split: str, i: int, like: int) -> Episode:
        n, q = 3 + int(like) % 3, 2 + int(like) // 3 % 2
        x, shift = np.split(task_generator(i).random((2 * (n + q), 1)).astype(np.float32), 2)
        y = np.sin(6 * x) + shift[0]
        if n == self.bad and split == "train":
            y[0] = np.nan
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        return Episode(Batch(x[:n], y[:n]), Batch(x[n:], y[n:]))

    def score(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        return (outputs - batch.y).square().mean(), {}


class Poisoned:
    """Sine-like tasks of which one in four has a NaN."""

    in_shape = (1,)
    out_features = 1

    def draw(self, split: str, ids: Any) -> Episode:
        values = np.stack([task_generator(i).random((4, 5, 1)) for i in ids]).astype(np.float32)
        if split == "train":
            values[np.asarray(ids) % 4 == 0, 1, 0, 0] = np.nan
        x_s, y_s, x_q, y_q = torch.from_numpy(values).unbind(1)
        return Episode(Batch(x_s, y_s), Batch(x_q, y_q))

    def score(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        return (outputs - batch.y).square().mean(), {}


class AllBad(Poisoned):
    """Tasks that are all NaN in training."""

    def draw(self, split: str, ids: Any) -> Episode:
        episode = super().draw(split, ids)
        if split == "train":
            episode.support.y.fill_(torch.nan)
        return episode


class Lethal(Poisoned):
    """A family whose draw kills the process once a flag file says so; it removes the flag first."""

    def __init__(self, flag: str, always: bool = False):
        self.flag, self.always = flag, always

    def draw(self, split: str, ids: Any) -> Episode:
        import os
        import signal

        if os.path.exists(self.flag):
            if not self.always:
                os.remove(self.flag)
            os.kill(os.getpid(), signal.SIGKILL)
        values = np.stack([task_generator(i).random((4, 5, 1)) for i in ids]).astype(np.float32)
        x_s, y_s, x_q, y_q = torch.from_numpy(values).unbind(1)
        return Episode(Batch(x_s, y_s), Batch(x_q, y_q))


class Faulty(Lethal):
    """A family that does harm on workers: `times` in all, whichever workers meet it, counted by files in `folder`.

    kill: "build", or the split whose draw ends the process; fail: the error a training draw raises; sleep: the seconds
    one takes. `after`: training draws of a process that go well first.
    """

    def __init__(
        self,
        folder: str,
        kill: str | None = None,
        fail: str | None = None,
        sleep: float = 0.0,
        times: int = 0,
        after: int = 0,
    ):
        super().__init__("/nonexistent")
        self.folder, self.times, self.after = folder, times, after
        self.kill, self.fail, self.sleep, self.draws = kill, fail, sleep, 0
        if kill == "build" and self._turn():
            self._end()

    def draw(self, split: str, ids: Any) -> Episode:
        import builtins
        import time

        self.draws += split == "train"
        hit = self.kill in (None, split) and self.draws > self.after and self._turn()
        if hit and self.kill:
            self._end()
        if hit and self.fail:
            raise getattr(builtins, self.fail)("as a test asked for")
        if hit:
            time.sleep(self.sleep)
        return super().draw(split, ids)

    def _turn(self) -> bool:
        """Whether harm is to be done, by this process, now."""
        import os
        import sys

        on_a_worker = sys.argv[0].endswith("default_worker.py")
        for number in range(self.times if on_a_worker else 0):
            try:
                os.close(os.open(f"{self.folder}/fault-{number}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            return True
        return False

    def _end(self) -> None:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)


class Paced(Lethal):
    """A family whose draws take a moment on Ray workers, so that a run lasts long enough to be harmed."""

    def __init__(self, seconds: float):
        super().__init__("/nonexistent")
        self.seconds = seconds

    def draw(self, split: str, ids: Any) -> Episode:
        import sys
        import time

        if sys.argv[0].endswith("default_worker.py"):
            time.sleep(self.seconds)
        return super().draw(split, ids)


class Slow(Lethal):
    """A family that takes `seconds` for every draw but the first."""

    def __init__(self, seconds: float):
        super().__init__("/nonexistent")
        self.seconds, self.draws = seconds, 0

    def draw(self, split: str, ids: Any) -> Episode:
        import time

        self.draws += 1
        if self.draws > 1:  # the first is the driver's own look at the job
            time.sleep(self.seconds)
        return super().draw(split, ids)


class Vanishing(Lethal):
    """A family whose data go away once a flag file says so."""

    def draw(self, split: str, ids: Any) -> Episode:
        import os

        if os.path.exists(self.flag):
            raise InputError("tasks.path: the store is gone")
        return super().draw(split, ids)


class OnlyHere(Lethal):
    """A family that only the driver's process can make, as where a node lacks the data."""

    def __init__(self, pid: int):
        import os

        super().__init__("/nonexistent")
        if os.getpid() != pid:
            raise InputError("tasks.path: not on this node")


class Huge(Lethal):
    """Tasks with finite gradients whose sum overflows float32."""

    def __init__(self):
        super().__init__("/nonexistent")

    def score(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        return outputs.mean() * 1e38, {}


class Tokens(nn.Module):
    """A model on integers."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__()
        self.embed, self.out = nn.Embedding(10, 8), nn.Linear(8, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x).mean(1))


class Sums:
    """Regress the sum of three digits, given as tokens."""

    in_shape = (3,)
    out_features = 1

    def draw(self, split: str, ids: Any) -> Episode:
        digits = torch.from_numpy(np.stack([task_generator(i).integers(0, 10, (2, 6, 3)) for i in ids]))
        totals = digits.sum(-1, keepdim=True).float() / 27
        return Episode(Batch(digits[:, 0], totals[:, 0]), Batch(digits[:, 1], totals[:, 1]))

    def score(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        return (outputs - batch.y).square().mean(), {}
