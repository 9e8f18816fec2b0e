"""Episodes drawn before they are asked for, on a thread of their own while others are computed with."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from distmeta.protocols import Episodes

if TYPE_CHECKING:
    from distmeta.runtime.worker import Shard


class Ahead:
    """Guesses a worker's next shard: the one that came after this one in the last step, of the step that it then is.

    Tasks depend on the step and the shard alone, so a wrong guess costs time and nothing else. A task family is used by
    one thread at a time, but not always by the same one.
    """

    def __init__(self, threads: int):
        self._thread = ThreadPoolExecutor(1, "draw", torch.set_num_threads, (threads,))
        self._seen: dict[int, Shard] = {}
        self._after: dict[int, int] = {}
        self._last: Shard | None = None
        self._drawn: tuple[Shard, Future[Episodes]] | None = None

    def draw(self, shard: Shard, draw: Callable[[Shard], Episodes]) -> Episodes:
        """The shard's episodes, as `draw` makes them or has made them; those of the next shard are begun."""
        episodes, guessed = None, self._drawn
        self._drawn = None
        if guessed is not None:
            guess, drawing = guessed
            error = drawing.exception()  # waits for it
            if replace(guess, version=shard.version) == shard and error is None:
                episodes = drawing.result()
        if episodes is None:
            episodes = draw(shard)
        following = self._next(shard)
        if following is not None:
            self._drawn = following, self._thread.submit(draw, following)
        return episodes

    def wait(self) -> None:
        """Until nobody uses the task family."""
        if self._drawn is not None:
            self._drawn[1].exception()

    def _next(self, shard: Shard) -> Shard | None:
        if self._last is not None:
            self._after[self._last.index] = shard.index
        self._seen[shard.index], self._last = shard, shard
        following = self._seen.get(self._after.get(shard.index, -1))
        if following is None:
            return None
        return replace(following, step=shard.step + (following.index <= shard.index), phase=shard.phase)
