"""The bookkeeping of shards, without Ray."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distmeta.runtime.pending_shards import PendingShards

ASSIGN = "assign"
ANSWER = "answer"
LOSE = "lose"


@given(
    st.integers(1, 9),
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([ASSIGN, ASSIGN, ASSIGN, ANSWER, LOSE])), max_size=200
    ),
)
def test_every_shard_is_answered_once_whatever_happens(count: int, events: list[tuple[int, str]]) -> None:
    """Workers take shards (also those of stragglers), answer and are lost in any order."""
    pending: PendingShards[int] = PendingShards(count)
    held: dict[int, int] = {}  # worker -> position
    first_answers = 0
    last_events = [(0, event) for event in [ASSIGN, ANSWER, ASSIGN] * 3 * count]
    for now, (worker, event) in enumerate([*events, *last_events], start=1):
        if event == ASSIGN and worker not in held:
            position = pending.next_unassigned()
            if position is None:
                position = pending.straggler(now * 100.0, [1.0])
            if position is not None:
                assert position not in pending.results
                assert list(held.values()).count(position) < 2
                pending.assign(position, now * 100.0)
                held[worker] = position
        elif event == ANSWER and worker in held:
            first_answers += pending.answer(held.pop(worker), worker)
        elif event == LOSE and worker in held:
            pending.lose(held.pop(worker), blamed=True)
    for worker in list(held):
        first_answers += pending.answer(held.pop(worker), worker)
    while (position := pending.next_unassigned()) is not None:
        pending.assign(position, 1e9)
        first_answers += pending.answer(position, 0)
    assert pending.done
    assert first_answers == count == len(pending.in_order())
