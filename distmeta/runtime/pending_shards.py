"""Which shards of a step or an evaluation are still to be computed. Plain bookkeeping, without Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from distmeta.runtime.failure_policy import is_straggler

Result = TypeVar("Result")


class PendingShards(Generic[Result]):
    """The shards at positions 0 … count−1. Each is unassigned, with one or two workers, or answered.

    If two workers compute the same shard, the first answer counts. Both would be equal.
    """

    def __init__(self, count: int):
        self.results: dict[int, Result] = {}
        """The answers so far, by position."""
        self.failures = [0] * count
        """Workers that each shard has cost."""
        self._count = count
        self._unassigned = deque(range(count))
        self._copies = [0] * count  # workers that have the shard now
        self._since = [0.0] * count  # when it was first assigned
        self._unseen: deque[int] = deque()  # answered, but not returned by `new_results` yet

    @property
    def done(self) -> bool:
        """Whether every shard is answered."""
        return len(self.results) == self._count

    @property
    def remaining(self) -> int:
        """Number of shards without an answer."""
        return self._count - len(self.results)

    @property
    def unassigned(self) -> int:
        """Number of shards that no worker has."""
        return len(self._unassigned)

    def in_order(self) -> list[Result]:
        """Return all answers by position. Call it when `done`."""
        return [self.results[position] for position in range(self._count)]

    def next_unassigned(self) -> int | None:
        """Return the next position that no worker has."""
        return self._unassigned[0] if self._unassigned else None

    def straggler(self, now: float, peer_seconds: Sequence[float]) -> int | None:
        """Return the position that a worker has had longest, if that is too long compared with similar shards."""
        running = [p for p in range(self._count) if self._copies[p] and p not in self.results]
        slow = [p for p in running if is_straggler(now - self._since[p], peer_seconds, self._copies[p])]
        return min(slow, key=lambda position: self._since[position], default=None)

    def assign(self, position: int, now: float) -> None:
        """Note that a worker has the shard."""
        if position in self._unassigned:
            self._unassigned.remove(position)
            self._since[position] = now
        self._copies[position] += 1

    def answer(self, position: int, result: Result) -> bool:
        """Note a worker's answer. Return whether it is the first one for this shard."""
        self._copies[position] -= 1
        is_first = position not in self.results
        if is_first:
            self.results[position] = result
            self._unseen.append(position)
        return is_first

    def new_results(self) -> Iterator[tuple[int, Result]]:
        """Yield each answer once, with its position, in order of arrival."""
        while self._unseen:
            position = self._unseen.popleft()
            yield position, self.results[position]

    def reject(self, position: int) -> None:
        """Drop an answer, so that the shard is computed again."""
        del self.results[position]
        if not self._copies[position]:
            self._unassigned.appendleft(position)

    def lose(self, position: int, blamed: bool) -> int:
        """Note that a worker that had the shard is lost. Return how many workers the shard has cost.

        Args:
            blamed: whether the loss counts against this shard.
        """
        self._copies[position] -= 1
        self.failures[position] += blamed
        if position not in self.results and not self._copies[position]:
            self._unassigned.appendleft(position)
        return self.failures[position]
