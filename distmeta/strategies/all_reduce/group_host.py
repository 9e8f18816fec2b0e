"""The actor that the driver and the ranks of an `all-reduce` group meet at.

GroupHost (this actor)   runs the trainer; holds the driver's commands and the ranks' answers
  └ Ray Train's controller, which makes a new group if one of its ranks is lost
      └ ranks            each a replica of theta and the optimizer: asks the host for the next command, answers it
"""

from __future__ import annotations

import asyncio
from typing import Any

from distmeta.config.sections import RunSection
from distmeta.errors import summarize_error
from distmeta.strategies.all_reduce.messages import Leave, LostGroup, RankAnswer, RankError

ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # Ray Train's default is 2
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # ranks that wait for a lost one cannot leave by themselves
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one actor less; we do not save on notice
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "MALLOC_ARENA_MAX": "1",  # Ray Train computes on a second thread; glibc returns a second arena to the system
}
"""Environment variables of the host. Ray passes them on to everything that the host starts."""


class GroupHost:
    """Carries commands to all ranks, and their answers back. Whatever Ray Train starts is owned by it and ends with it.

    A group has a name, which rank 0 makes up. Messages of or for another group than the current one are ignored.
    """

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        """Notified whenever one of the attributes below changes."""
        self._group = ""
        """Name of the current group; empty: there is none."""
        self._members: dict[int, RankError | None] = {}
        """The ranks that have joined, and the error of each that could not build the job's parts."""
        self._world = 0
        """Ranks in the group."""
        self._commands: list[Any] = []
        self._answers: dict[int, dict[int, RankAnswer]] = {}
        """By number of the command, then by rank."""
        self._lost = LostGroup("it did not start yet")

    async def run_trainer(self, spec: list[Any], run: RunSection, shards_per_rank: int) -> None:
        """Run Ray Train until the group was told to leave, or Ray Train gives up."""
        import ray

        from distmeta.strategies.all_reduce.ray_train import run_trainer

        this_actor = ray.get_runtime_context().current_actor
        try:
            await asyncio.to_thread(run_trainer, this_actor, spec, run, shards_per_rank)
            reason = "it ended"
        except Exception as error:
            reason = summarize_error(error)
        await self._drop_group(f"Ray Train gave up ({reason})", ended=True)

    # --- Called by ranks ---

    async def join(self, group: str, rank: int, world: int, failure: RankError | None) -> None:
        """Add a rank to a group. Its first command is number 0.

        Args:
            failure: why the rank could not build the job's parts; None if it could.
        """
        async with self._changed:
            if group != self._group:
                if self._group:  # no rank was lost, so Ray Train has resized the group
                    reason = f"Ray Train resized it from {self._world} to {world} workers"
                    self._lost = LostGroup(reason, self._lost.count + 1)
                self._group = group
                self._world = world
                self._members = {}
                self._commands = []
                self._answers = {}
            self._members[rank] = failure
            self._changed.notify_all()

    async def next_command(self, group: str, number: int) -> Any:
        """Return a command as soon as there is one with this number."""
        async with self._changed:
            await self._changed.wait_for(lambda: group != self._group or number < len(self._commands))
            return self._commands[number] if group == self._group else Leave()

    async def answer(self, group: str, number: int, rank: int, answer: RankAnswer) -> None:
        """Store a rank's answer to a command."""
        async with self._changed:
            if group == self._group:
                self._answers.setdefault(number, {})[rank] = answer
                self._changed.notify_all()

    # --- Called by Ray Train's callback ---

    async def report_loss(self, reason: str) -> None:
        """Note that a rank is gone, and the group with it."""
        await self._drop_group(reason)

    # --- Called by the driver ---

    async def wait_for_group(self, known_losses: int) -> tuple[str, int, RankError | None] | LostGroup:
        """Wait until all ranks have joined.

        Args:
            known_losses: number of lost groups that the driver knows of.

        Returns:
            The group's name, its number of ranks, and the error of one that could not build the job's parts. If the
            driver does not know yet of the last lost group: that one.
        """

        def is_decided() -> bool:
            is_complete = bool(self._group) and len(self._members) == self._world
            return is_complete or self._lost.ended or self._lost.count > known_losses

        async with self._changed:
            await self._changed.wait_for(is_decided)
            if not self._group or self._lost.count > known_losses:
                return self._lost
            failures = [failure for failure in self._members.values() if failure is not None]
            return self._group, self._world, failures[0] if failures else None

    async def ask(self, group: str, command: Any) -> list[RankAnswer] | LostGroup:
        """Give a command to every rank and return their answers, by rank."""
        async with self._changed:
            number = len(self._commands)
            self._commands.append(command)
            self._changed.notify_all()
            await self._changed.wait_for(
                lambda: group != self._group or len(self._answers.get(number, ())) == self._world
            )
            if group != self._group:
                return self._lost
            self._commands[number] = None  # it may hold a whole state
            answers = self._answers.pop(number)
            return [answers[rank] for rank in range(self._world)]

    async def tell(self, group: str, command: Any) -> None:
        """Give a command that has no answer to every rank."""
        async with self._changed:
            if group == self._group:
                self._commands.append(command)
                self._changed.notify_all()

    async def _drop_group(self, reason: str, ended: bool = False) -> None:
        async with self._changed:
            self._group = ""
            self._members = {}
            self._lost = LostGroup(reason, self._lost.count + 1, ended)
            self._changed.notify_all()
