from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flask_eventstream import EventStreamParser, ServerSentEvent
from flask_eventstream.run_log import has_end_of, new_key, number_in, rest_of
from flask_eventstream.run_registry import ACTIVE, Standing

texts = st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8)


def log_of(data: list[str], first: int = 1) -> bytes:
    events = [ServerSentEvent(text, id=f"run.{n}") for n, text in enumerate(data, first)]
    return b"".join(event.encode() for event in events)


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


@given(texts, st.integers(0, 8))
@example(["a\nid: run.1\nb", "id: run.2", "\nid: run.1\n", ""], 2)
@example(["\r\n\r\nid: run.1\r\n", "x", "y"], 1)
def test_a_client_gets_exactly_what_came_after_its_cursor(data: list[str], number: int) -> None:
    number = min(number, len(data))
    log = log_of(data)
    rest = rest_of(log, standing(len(data)), number, f"run.{number}")
    assert rest == log_of(data[number:], number + 1)


@given(texts, st.integers(0, 5))
def test_a_client_that_missed_what_is_gone_gets_a_reset_and_what_is_left(
    data: list[str], number: int
) -> None:
    log = log_of(data, first=number + 2)
    last = number + 1 + len(data)
    reset, *left = read(rest_of(log, standing(last), number, f"run.{number}"))
    assert reset[:2] == ("reset", f"run.{number + 1}")
    assert json.loads(reset[2]) == {
        "requested": f"run.{number}",
        "earliest": f"run.{number + 2}",
    }
    assert left == read(log)
    # Who loses the connection right after the reset goes on behind it.
    assert rest_of(log, standing(last), number + 1, f"run.{number + 1}") == log


def test_of_a_log_that_is_gone_there_is_only_a_reset() -> None:
    assert rest_of(b"", standing(0), 0, "") == b""
    assert rest_of(b"", standing(7), 7, "run.7") == b""
    [(type, id, data)] = read(rest_of(b"", standing(7), 3, "run.3"))
    assert (type, id, json.loads(data)["earliest"]) == ("reset", "run.7", None)


def test_an_event_with_a_retry_is_found_too() -> None:
    event = ServerSentEvent("a", id="run.1", retry=5).encode()
    assert rest_of(event + log_of(["b"], 2), standing(2), 1, "run.1") == log_of(["b"], 2)
    assert rest_of(event, standing(1), 0, "") == event


def test_a_log_has_an_end_once_the_last_event_is_in_it() -> None:
    assert has_end_of(log_of(["a", "b"]), standing(2, "end"))
    assert not has_end_of(log_of(["a", "b"]), standing(3, "end"))
    assert not has_end_of(log_of(["id: run.3"]), standing(3, "end"))
    assert not has_end_of(log_of(["a"] * 12)[:-30], standing(1_2, "end"))
