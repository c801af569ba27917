from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flask_eventstream import EventStreamParser, ServerSentEvent
from flask_eventstream.history import Entry
from flask_eventstream.run_log import new_key, number_in, rest_of
from flask_eventstream.run_registry import ACTIVE, Standing

texts = st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8)


def log_of(data: list[str], first: int = 1) -> list[bytes]:
    events = [ServerSentEvent(text, id=f"run.{n}") for n, text in enumerate(data, first)]
    return [event.encode() for event in events]


def entries_of(log: list[bytes], sizes: list[int] | None = None) -> list[Entry]:
    """Return entries of so many events each; of one each by default."""
    entries: list[Entry] = []
    left = list(log)
    for size in [*(sizes or []), *[1] * len(log)]:
        if left[:size]:
            entries.append(Entry(3 * len(entries), 0, None, b"".join(left[:size])))
        del left[:size]
    return entries


def rest(log: list[Entry], last: int, number: int, cursor: str) -> bytes:
    """Return what a client gets of a log."""
    start, left_out = rest_of(standing(last), number, cursor, log)
    return start + b"".join(entry.wire for entry in log[left_out:])


def standing(last: int, state: str = ACTIVE) -> Standing:
    return Standing("run", state, last)


def read(wire: bytes) -> list[tuple[str, str | None, str]]:
    return [(event.type, event.id, event.data) for event in EventStreamParser().feed(wire)]


def test_a_key_is_of_one_url_and_one_owner() -> None:
    pairs = [("a/b", ""), ("a/b", "1"), ("a/b1", ""), ("a", "/b"), ("a\nb", "c"), ("a", "b\nc")]
    assert len({new_key(*pair) for pair in pairs}) == len(pairs)
    assert new_key("a", "b") == new_key("a", "b")


def test_an_owner_may_have_lone_surrogates() -> None:
    assert len({new_key("a", owner) for owner in ("\ud800", "\udfff", "\ufffd", "?")}) == 4


@pytest.mark.parametrize(
    ("cursor", "number"),
    [
        ("run.1", 1),
        ("run.0", 0),
        ("run.123456", 123456),
        ("run.", None),
        ("run", None),
        ("other.1", None),
        ("run.1.1", None),
        ("run.-1", None),
        ("run.+1", None),
        ("run.1_0", None),
        ("run. 1", None),
        ("run.²", None),
        ("run.١", None),
        ("run." + "9" * 5000, None),
        ("abcd0123-7", None),
        ("", None),
    ],
)
def test_only_an_id_of_the_run_has_a_number(cursor: str, number: int | None) -> None:
    assert number_in(cursor, "run") == number


@given(texts, st.integers(0, 8), st.lists(st.integers(1, 4)))
@example(["a\nid: run.1\nb", "id: run.2", "\nid: run.1\n", ""], 2, [3])
@example(["\r\n\r\nid: run.1\r\n", "x", "y"], 1, [2])
def test_a_client_gets_exactly_what_came_after_its_cursor(
    data: list[str], number: int, sizes: list[int]
) -> None:
    number = min(number, len(data))
    log = entries_of(log_of(data), sizes)
    found = rest(log, len(data), number, f"run.{number}")
    assert found == b"".join(log_of(data)[number:])


def test_only_the_entry_that_a_client_has_a_part_of_is_cut() -> None:
    log = entries_of(log_of(["x" * 1000] * 30), [10, 10, 10])
    assert rest_of(standing(30), 10, "run.10", log) == (b"", 1)
    start, left_out = rest_of(standing(30), 17, "run.17", log)
    assert (start.count(b"\n\n"), left_out) == (3, 2)
    assert rest_of(standing(30), 30, "run.30", log) == (b"", 3)


@given(texts, st.integers(0, 5))
def test_a_client_that_missed_what_is_gone_gets_a_reset_and_what_is_left(
    data: list[str], number: int
) -> None:
    wires = log_of(data, first=number + 2)
    log, last = entries_of(wires), number + 1 + len(data)
    reset, *left = read(rest(log, last, number, f"run.{number}"))
    assert reset[:2] == ("reset", f"run.{number + 1}")
    assert json.loads(reset[2]) == {
        "requested": f"run.{number}",
        "earliest": f"run.{number + 2}",
    }
    assert left == read(b"".join(wires))
    # Who loses the connection right after the reset goes on behind it.
    assert rest(log, last, number + 1, f"run.{number + 1}") == b"".join(wires)


def test_of_a_log_that_is_gone_there_is_only_a_reset() -> None:
    assert rest([], 0, 0, "") == b""
    assert rest([], 7, 7, "run.7") == b""
    [(type, id, data)] = read(rest([], 7, 3, "run.3"))
    assert (type, id, json.loads(data)["earliest"]) == ("reset", "run.7", None)


def test_an_event_with_a_retry_is_found_too() -> None:
    event = ServerSentEvent("a", id="run.1", retry=5).encode()
    log = [event, *log_of(["b"], 2)]
    assert rest(entries_of(log, [2]), 2, 1, "run.1") == log[1]
    assert rest(entries_of(log), 1, 0, "") == b"".join(log)
