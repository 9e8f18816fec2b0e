"""What is still to be computed of one step (or evaluation): plain bookkeeping, without Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from distmeta.runtime.failure_policy import straggles

Result = TypeVar("Result")


class PendingShards(Generic[Result]):
    """Positions 0 … count−1, each waiting, with one worker or two, or answered. The first answer counts."""

    def __init__(self, count: int):
        self.results: dict[int, Result] = {}
        self.failures = [0] * count
        self._count = count
        self._waiting = deque(range(count))
        self._copies = [0] * count
        self._since = [0.0] * count
        self._fresh: deque[int] = deque()

    @property
    def done(self) -> bool:
        return len(self.results) == self._count

    @property
    def remaining(self) -> int:
        """Positions without an answer."""
        return self._count - len(self.results)

    @property
    def waiting(self) -> int:
        """Positions that nobody has."""
        return len(self._waiting)

    def in_order(self) -> list[Result]:
        return [self.results[position] for position in range(self._count)]

    def next(self) -> int | None:
        """The next position that nobody computes."""
        return self._waiting[0] if self._waiting else None

    def straggler(self, now: float, timed: Sequence[float]) -> int | None:
        """The position that has been with its worker longest, if that is too long."""
        running = [p for p in range(self._count) if self._copies[p] and p not in self.results]
        slow = [p for p in running if straggles(now - self._since[p], timed, self._copies[p])]
        return min(slow, key=lambda position: self._since[position], default=None)

    def given(self, position: int, now: float) -> None:
        """A worker has it."""
        if position in self._waiting:
            self._waiting.remove(position)
            self._since[position] = now
        self._copies[position] += 1

    def answered(self, position: int, result: Result) -> bool:
        """A worker returned it; whether it was the first to."""
        self._copies[position] -= 1
        first = position not in self.results
        if first:
            self.results[position] = result
            self._fresh.append(position)
        return first

    def fresh(self) -> Iterator[tuple[int, Result]]:
        """Answers that were not given out here before."""
        while self._fresh:
            position = self._fresh.popleft()
            yield position, self.results[position]

    def again(self, position: int) -> None:
        """Its answer is of no use."""
        del self.results[position]
        if not self._copies[position]:
            self._waiting.appendleft(position)

    def lost(self, position: int, blamed: bool) -> int:
        """A worker that had it is no more; how many it has cost."""
        self._copies[position] -= 1
        self.failures[position] += blamed
        if position not in self.results and not self._copies[position]:
            self._waiting.appendleft(position)
        return self.failures[position]
