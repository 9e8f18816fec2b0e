"""Difficult algorithms, models and task families. Jobs in tests name them as `hard_cases:Name`."""

from __future__ import annotations

import builtins
import os
import signal
import sys
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distmeta.errors import InputError
from distmeta.protocols import Batch, Episode, Metrics, Model, Score, Theta, Unroll
from distmeta.seeding import task_generator


class MemoryRegressor:
    """A recurrent cell writes each support pair into a memory, which a query reads.

    It has no inner loop and does not use a model.
    """

    group_size = 1
    inner_steps = 0

    def __init__(self, score: Score, cells: int = 8):
        self.score = score
        self.cells = cells

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


class PairwiseMAML:
    """MAML with a loss that compares two tasks: it pushes their adapted parameters apart, up to a margin."""

    group_size = 2
    inner_steps = 1

    def __init__(self, model: Model, score: Score, margin: float = 1.0):
        self.model = model
        self.score = score
        self.margin = margin

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
        losses = []
        adapted = []
        for g in range(2):
            support = Batch(*(leaf[g] for leaf in episode.support))
            query = Batch(*(leaf[g] for leaf in episode.query))
            phi = unroll(self, theta, support)
            losses.append(score(self.predict(theta, phi, query.x), query)[0])
            adapted.append(torch.cat([value.flatten() for value in phi.values()]))
        distance = (adapted[0] - adapted[1]).square().sum().add(1e-12).sqrt()
        rows = torch.stack(losses)
        return rows.mean() + torch.relu(self.margin - distance), {"loss": rows}


class Pulls(NamedTuple):
    """Pulls of a bandit."""

    x: Tensor
    """Ones, [N, 1]."""
    action: Tensor
    """[N]."""
    advantage: Tensor
    """[N]."""
    payoff: Tensor
    """[N]."""


class TwoArmedBandit:
    """Two-armed Bernoulli bandits, which collect data with the policy. Their noise derives from the task id."""

    in_shape = (1,)
    out_features = 2

    def __init__(self, pulls: int = 20):
        self.pulls = pulls

    def collect(self, split: str, ids: Any, k: int, policy: Any) -> Pulls:
        x = torch.ones(len(ids), self.pulls, 1)
        probability = policy(x).softmax(-1)[..., 1]
        noise = np.stack([task_generator(i).random((k + 1, 2 * self.pulls + 1))[-1] for i in ids])
        better = np.stack([task_generator(i).random() < 0.5 for i in ids])
        noise = torch.from_numpy(noise).float()
        action = (noise[:, : self.pulls] < probability).long()
        hit = torch.from_numpy(better)[:, None] == (action == 1)
        payoff = (noise[:, self.pulls : -1] < torch.where(hit, 0.9, 0.1)).float()
        return Pulls(x, action, payoff - payoff.mean(1, keepdim=True), payoff)

    def score(self, outputs: Tensor, batch: Pulls) -> tuple[Tensor, Metrics]:
        log_p = outputs.log_softmax(-1).gather(-1, batch.action[..., None])[..., 0]
        return -(log_p * batch.advantage).mean(), {"return": batch.payoff.mean()}


class DropoutNet(nn.Sequential):
    """A model that uses random numbers."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__(nn.Linear(in_shape[0], 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, out_features))


class RunningStatisticsNet(nn.Sequential):
    """A model that changes its buffers."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__(nn.Linear(in_shape[0], 4), nn.BatchNorm1d(4), nn.Linear(4, out_features))


class BranchingNet(nn.Linear):
    """A model whose control flow depends on the data. vmap cannot run it."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__(in_shape[0], out_features)

    def forward(self, x: Tensor) -> Tensor:
        if x.detach().sum().item() > 0:
            return super().forward(x)
        return super().forward(2 * x)


class AttentionNet(nn.Module):
    """A model with fused attention, which has no second derivative."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__()
        self.qkv = nn.Linear(in_shape[0], 24)
        self.out = nn.Linear(8, out_features)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[None, None].chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v)[0, 0])


class UnequalTasks:
    """Sine-like tasks with 3 to 5 support rows and 2 to 3 query rows, depending on the id.

    Args:
        pairs: tasks 2n and 2n + 1 of a draw have the same size.
        bad: training tasks with this number of support rows contain a NaN.
    """

    in_shape = (1,)
    out_features = 1

    def __init__(self, pairs: bool = False, bad: int = 0):
        self.pairs = pairs
        self.bad = bad

    def draw(self, split: str, ids: Any) -> list[Episode]:
        ids = np.asarray(ids)
        sizes = [ids[n - n % 2] for n in range(len(ids))] if self.pairs else ids
        return [self._draw_task(split, i, int(size)) for i, size in zip(ids, sizes, strict=True)]

    def _draw_task(self, split: str, i: int, size: int) -> Episode:
        n = 3 + size % 3
        q = 2 + size // 3 % 2
        x, shift = np.split(task_generator(i).random((2 * (n + q), 1)).astype(np.float32), 2)
        y = np.sin(6 * x) + shift[0]
        if n == self.bad and split == "train":
            y[0] = np.nan
        x = torch.from_numpy(x)
        y = torch.from_numpy(y)
        return Episode(Batch(x[:n], y[:n]), Batch(x[n:], y[n:]))

    def score(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        return (outputs - batch.y).square().mean(), {}


class SineTasks:
    """Sine-like tasks. The base class of the families that misbehave."""

    in_shape = (1,)
    out_features = 1

    def draw(self, split: str, ids: Any) -> Episode:
        values = np.stack([task_generator(i).random((4, 5, 1)) for i in ids]).astype(np.float32)
        x_s, y_s, x_q, y_q = torch.from_numpy(values).unbind(1)
        return Episode(Batch(x_s, y_s), Batch(x_q, y_q))

    def score(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        return (outputs - batch.y).square().mean(), {}


class SomeTasksWithNaN(SineTasks):
    """One in four training tasks has a NaN among its support targets."""

    def draw(self, split: str, ids: Any) -> Episode:
        episode = super().draw(split, ids)
        if split == "train":
            episode.support.y[np.asarray(ids) % 4 == 0, 0, 0] = torch.nan
        return episode


class AllTasksWithNaN(SineTasks):
    """All support targets of training tasks are NaN."""

    def draw(self, split: str, ids: Any) -> Episode:
        episode = super().draw(split, ids)
        if split == "train":
            episode.support.y.fill_(torch.nan)
        return episode


class TasksThatKillTheProcess(SineTasks):
    """A draw kills the process if the file `flag` exists. It removes the file first, unless `always`."""

    def __init__(self, flag: str, always: bool = False):
        self.flag = flag
        self.always = always

    def draw(self, split: str, ids: Any) -> Episode:
        if os.path.exists(self.flag):
            if not self.always:
                os.remove(self.flag)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().draw(split, ids)


def is_ray_worker() -> bool:
    return sys.argv[0].endswith("default_worker.py")


class FaultyTasksOnWorkers(SineTasks):
    """Misbehaves on Ray workers, `times` times in total. Files in `folder` count the times of all workers.

    Args:
        kill: kill the process at "build", or at the draw of this split.
        fail: name of the built-in error that a training draw raises.
        sleep: seconds that a training draw takes.
        after: number of training draws per process that succeed first.
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
        self.folder = folder
        self.kill = kill
        self.fail = fail
        self.sleep = sleep
        self.times = times
        self.after = after
        self.draws = 0
        if kill == "build" and self._takes_turn():
            self._kill_process()

    def draw(self, split: str, ids: Any) -> Episode:
        self.draws += split == "train"
        misbehaves = self.kill in (None, split) and self.draws > self.after and self._takes_turn()
        if misbehaves and self.kill:
            self._kill_process()
        if misbehaves and self.fail:
            raise vars(builtins)[self.fail]("as a test asked for")
        if misbehaves:
            time.sleep(self.sleep)
        return super().draw(split, ids)

    def _takes_turn(self) -> bool:
        """Return whether this process misbehaves now. Creating a file claims one of the `times`."""
        if not is_ray_worker():
            return False
        for number in range(self.times):
            try:
                os.close(os.open(f"{self.folder}/fault-{number}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            return True
        return False

    def _kill_process(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class SlowTasksOnWorkers(SineTasks):
    """A draw on a Ray worker takes `seconds`, so that a run lasts long enough to be disturbed."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def draw(self, split: str, ids: Any) -> Episode:
        if is_ray_worker():
            time.sleep(self.seconds)
        return super().draw(split, ids)


class SlowTasks(SineTasks):
    """Every draw except the first takes `seconds`."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.draws = 0

    def draw(self, split: str, ids: Any) -> Episode:
        self.draws += 1
        if self.draws > 1:  # the driver draws once to inspect the job
            time.sleep(self.seconds)
        return super().draw(split, ids)


class TasksThatVanish(SineTasks):
    """A draw fails if the file `flag` exists, as if the data were gone."""

    def __init__(self, flag: str):
        self.flag = flag

    def draw(self, split: str, ids: Any) -> Episode:
        if os.path.exists(self.flag):
            raise InputError("tasks.path: the store is gone")
        return super().draw(split, ids)


class TasksOfOneProcess(SineTasks):
    """Only the process `pid` can build this family, as if other nodes lacked the data."""

    def __init__(self, pid: int):
        if os.getpid() != pid:
            raise InputError("tasks.path: not on this node")


class TasksWithOverflowingSum(SineTasks):
    """Every task has a finite gradient, but their sum overflows float32."""

    def score(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        return outputs.mean() * 1e38, {}


class TokenNet(nn.Module):
    """A model whose inputs are integers."""

    def __init__(self, in_shape: tuple[int, ...], out_features: int):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.out = nn.Linear(8, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x).mean(1))


class DigitSumTasks:
    """Tasks that ask for the sum of three digits, which are given as tokens."""

    in_shape = (3,)
    out_features = 1

    def draw(self, split: str, ids: Any) -> Episode:
        digits = torch.from_numpy(np.stack([task_generator(i).integers(0, 10, (2, 6, 3)) for i in ids]))
        totals = digits.sum(-1, keepdim=True).float() / 27
        return Episode(Batch(digits[:, 0], totals[:, 0]), Batch(digits[:, 1], totals[:, 1]))

    def score(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        return (outputs - batch.y).square().mean(), {}


class LargeImageTasks:
    """Images so large that a CPU should compute their feature maps task by task."""

    in_shape = (1, 600, 600)
    out_features = 1

    def draw(self, split: str, ids: Any) -> Episode:
        x = torch.zeros(len(ids), 2, *self.in_shape)
        return Episode(Batch(x[:, :1], x[:, :1, 0, 0, :1]), Batch(x, x[:, :, 0, 0, :1]))

    def score(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        return (outputs - batch.y).square().mean(), {}
