"""Draw the episodes of the next shard in a second thread, while this one is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from distmeta.protocols import Episodes
from distmeta.runtime.shards import Shard


class Prefetcher:
    """Guesses a worker's next shard: the one that followed this shard in the last step.

    Tasks only depend on the step and the shard, so a wrong guess only costs time. A task family is used by one thread
    at a time, but not always by the same one.
    """

    def __init__(self, threads: int):
        self._thread = ThreadPoolExecutor(1, "draw", torch.set_num_threads, (threads,))
        self._last_seen: dict[int, Shard] = {}
        """The last shard with each index."""
        self._successor: dict[int, int] = {}
        """The index that followed each index."""
        self._previous: Shard | None = None
        self._drawing: tuple[Shard, Future[Episodes]] | None = None

    def draw(self, shard: Shard, draw: Callable[[Shard], Episodes]) -> Episodes:
        """Return the shard's episodes, which may have been drawn ahead, and begin to draw those of the next shard."""
        episodes = self._take(shard)
        if episodes is None:
            episodes = draw(shard)
        guess = self._guess_next(shard)
        if guess is not None:
            self._drawing = (guess, self._thread.submit(draw, guess))
        return episodes

    def wait(self) -> None:
        """Wait until the second thread does not use the task family."""
        if self._drawing is not None:
            self._drawing[1].exception()

    def _take(self, shard: Shard) -> Episodes | None:
        """Wait for what is being drawn, and return it if it is this shard's.

        If drawing failed, the caller draws again, so that the error is raised there.
        """
        if self._drawing is None:
            return None
        guess, drawing = self._drawing
        self._drawing = None
        failed = drawing.exception() is not None
        is_same = replace(guess, version=shard.version) == shard
        return drawing.result() if is_same and not failed else None

    def _guess_next(self, shard: Shard) -> Shard | None:
        if self._previous is not None:
            self._successor[self._previous.index] = shard.index
        self._last_seen[shard.index] = shard
        self._previous = shard
        guess = self._last_seen.get(self._successor.get(shard.index, -1))
        if guess is None:
            return None
        starts_next_step = guess.index <= shard.index
        return replace(guess, step=shard.step + starts_next_step, phase=shard.phase)
