"""The failure policy, without Ray."""

from __future__ import annotations

from distmeta.runtime.failure import Loss, Replace, Stop, after_loss


def loss(failures: int, in_a_row: int) -> Loss:
    return Loss(3, range(12, 16), failures, in_a_row, "ActorDiedError: killed")


def test_the_first_loss_is_replaced_at_once() -> None:
    assert after_loss(loss(1, 1), 3) == Replace(0.0)


def test_losses_in_a_row_back_off_up_to_a_limit() -> None:
    delays = [action.delay for n in range(2, 12) if isinstance(action := after_loss(loss(1, n), 99), Replace)]
    assert delays[:4] == [0.5, 1.0, 2.0, 4.0]
    assert max(delays) == delays[-1] == 30.0


def test_a_shard_that_keeps_killing_stops_the_run_and_is_named() -> None:
    action = after_loss(loss(3, 3), 3)
    assert isinstance(action, Stop)
    for part in ("shard 3", "tasks 12 to 15", "3 workers", "ActorDiedError", "run.max_shard_failures is 3"):
        assert part in action.message
