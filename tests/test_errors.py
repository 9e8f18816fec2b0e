"""The text of errors: one line, without credentials."""

from __future__ import annotations

from distmeta.errors import LONGEST_LINE, InputError, did_you_mean, first_line, summarize_error


def test_first_line_is_short_and_has_no_credentials() -> None:
    error = OSError("\n  cannot reach http://me:hunter2@host/x?token=abc&y=1\nmore")
    assert first_line(error) == "cannot reach http://host/x?token=***&y=1"
    assert len(first_line(OSError("x" * 999))) == LONGEST_LINE


def test_error_without_a_message_is_named_by_its_type() -> None:
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert summarize_error(MemoryError()) == "MemoryError"


def test_summary_begins_with_the_type() -> None:
    assert summarize_error(ValueError("no such thing\nat all")) == "ValueError: no such thing"


def test_input_error_is_one_line() -> None:
    assert str(InputError("model.type: got 'a\nb'")) == "model.type: got 'a b'"


def test_similar_names_are_suggested() -> None:
    assert did_you_mean("mamll", ["maml", "reptile"]) == "did you mean 'maml'?"
    assert did_you_mean("xyz", ["b", "a"]) == "known: a, b"
    assert did_you_mean("xyz", [f"name{i:02}" for i in range(13)]).endswith("name11, …")
