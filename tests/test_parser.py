from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flask_eventstream import EventStreamParser, ServerSentEvent
from flask_eventstream.errors import TooLargeError
from fuzz.parser import check, cut, parse, read_by_the_letter

CASES: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("parser_cases.json").read_text(encoding="utf-8")
)
FIELDS = "data: x|data:x|data|data:  y|data: 数🎉|Data: x|data : x|id: 1|id|id: \0|event: t|event"
RETRIES = "|retry: 7|retry: -1|: c| "
BROKEN = [b"\n", b"\n\n", b"\r", b"\r\n", b"\xef\xbb\xbf", b"\xff", b"\xe4\xb8"]
pieces = st.sampled_from([*(FIELDS + RETRIES).encode().split(b"|"), *BROKEN])
lines = st.sampled_from((FIELDS + RETRIES + "|:||").encode().split(b"|"))
well_cut = st.lists(lines, max_size=30).map(lambda some: b"".join(line + b"\n" for line in some))
streams = st.lists(pieces).map(b"".join) | st.binary() | well_cut


def read(case: dict[str, Any], chunks: list[bytes]) -> dict[str, Any]:
    comments: list[str] = []
    parser = EventStreamParser(case.get("initial_last_event_id", ""), on_comment=comments.append)
    events = [event for chunk in chunks for event in parser.feed(chunk)]
    return {
        "events": [{"event": e.type, "data": e.data, "id": e.id or ""} for e in events],
        "retry": parser.reconnection_time,
        "last_event_id": parser.last_event_id,
        "comments": comments,
    }


def expected(case: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    demanded = {key: case[key] for key in ("events", "retry", "last_event_id")}
    if "unspecified" in case.get("note", ""):
        demanded["retry"] = found["retry"]
    demanded["comments"] = case.get("comments", found["comments"])
    return demanded


def cuts(case: dict[str, Any]) -> list[list[bytes]]:
    chunks = [base64.b64decode(chunk) for chunk in case["chunks"]]
    whole = b"".join(chunks)
    single = [whole[i : i + 1] for i in range(len(whole))]
    twice = [[whole[:i], whole[i:]] for i in range(len(whole) + 1)]
    sizes = [
        [whole[i : i + size] for i in range(0, len(whole), size)]
        for size in case.get("rechunk", ())
    ]
    return [chunks, [whole], single, *sizes, *twice]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['source']}: {case['name']}")
def test_a_stream_of_a_public_suite_reads_as_the_standard_demands(case: dict[str, Any]) -> None:
    for chunks in cuts(case):
        found = read(case, chunks)
        assert found == expected(case, found)


def test_the_comments_of_a_public_suite_lose_one_space_where_it_strips_one() -> None:
    stripping = [case for case in CASES if "comments_one_space_stripped" in case]
    assert len(stripping) == 2
    for case in stripping:
        comments = read(case, cuts(case)[0])["comments"]
        assert [c.removeprefix(" ") for c in comments] == case["comments_one_space_stripped"]


@given(streams, st.lists(st.integers(min_value=0), max_size=9), st.integers(1, 40))
@example(b"data: x\n\n" * 3, [9], 8)
@example(b"data: x\n\ndata: yy\n\n", [], 8)
@example(b"\ndata: x\n", [1], 8)
@example(b"data: x\n\n:\n", [9], 1)
def test_the_events_do_not_depend_on_the_chunks(
    stream: bytes, at: list[int], max_bytes: int
) -> None:
    single = [stream[i : i + 1] for i in range(len(stream))]
    for limit in (1 << 20, max_bytes):
        assert parse([stream], limit) == parse(cut(stream, at), limit) == parse(single, limit)


@given(streams, st.lists(st.integers(min_value=0), max_size=9), st.booleans())
def test_it_reads_what_the_standard_says_by_the_letter(
    stream: bytes, at: list[int], hears: bool
) -> None:
    events, comments, *rest = read_by_the_letter(stream, "first")
    expected = (events, comments if hears else [], *rest)
    assert parse(cut(stream, at), hears=hears) == expected


def test_an_event_that_brings_no_id_has_the_last_one() -> None:
    [first, second] = EventStreamParser().feed(b"id: 1\ndata: a\n\ndata: b\n\n")
    assert first.id == second.id == "1"


def test_an_event_has_no_id_before_the_first_one_and_the_initial_one_if_there_is_one() -> None:
    assert EventStreamParser().feed(b"data: a\n\n")[0].id is None
    assert EventStreamParser("7").feed(b"data: a\n\n")[0].id == "7"


def test_an_empty_id_forgets_the_last_one() -> None:
    parser = EventStreamParser("7")
    assert parser.feed(b"id\ndata: a\n\n")[0].id == ""
    assert parser.last_event_id == ""


def test_the_reconnection_time_is_known_at_its_line() -> None:
    parser = EventStreamParser()
    assert parser.feed(b":\nretry: 2500\n") == []
    assert parser.reconnection_time == 2500


def test_heartbeats_are_reported_without_waiting_for_an_event() -> None:
    beats: list[str] = []
    EventStreamParser(on_comment=beats.append).feed(b":\n:\n")
    assert beats == ["", ""]


def test_a_retry_with_more_digits_than_python_converts_is_ignored() -> None:
    parser = EventStreamParser()
    [event] = parser.feed(b"retry: 5\nretry: " + b"9" * 100_000 + b"\ndata: x\n\n")
    assert event.retry == parser.reconnection_time == 5


def test_an_event_that_has_no_end_is_refused_at_the_limit() -> None:
    parser = EventStreamParser(max_bytes=100)
    for _ in range(100):
        parser.feed(b"x")
    with pytest.raises(TooLargeError) as caught:
        parser.feed(b"x")
    assert (caught.value.value, caught.value.limit) == (101, 100)
    with pytest.raises(TooLargeError):
        parser.feed(b"\n\ndata: never read\n\n")


def test_many_short_lines_of_one_event_are_refused_at_the_limit_too() -> None:
    parser = EventStreamParser(max_bytes=80)
    for _ in range(10):
        parser.feed(b"data: x\n")
    with pytest.raises(TooLargeError):
        parser.feed(b"data: x\n")


def test_what_was_complete_before_the_limit_is_returned_first() -> None:
    parser = EventStreamParser(max_bytes=20)
    events = parser.feed(b"data: whole\n\ndata: " + b"x" * 30)
    assert [event.data for event in events] == ["whole"]
    with pytest.raises(TooLargeError):
        parser.feed(b"")


def test_a_stream_of_any_length_is_no_unfinished_event() -> None:
    parser = EventStreamParser(max_bytes=20)
    assert len(parser.feed(b"data: 123456789\n\n" * 1000)) == 1000


def test_a_line_that_comes_byte_by_byte_is_joined_once() -> None:
    parser = EventStreamParser()
    events: list[ServerSentEvent] = []
    wire = ServerSentEvent("x" * 200_000).encode()
    for i in range(len(wire)):
        events += parser.feed(wire[i : i + 1])
    assert [len(event.data) for event in events] == [200_000]


def test_a_cr_before_a_crlf_ends_an_event_also_in_a_chunk_that_begins_one() -> None:
    check((b"rtxxx\n\r\nevent:g\r\r\ndata\n\n", [8], "", 0, False))
