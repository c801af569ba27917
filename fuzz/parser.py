"""The parser reads any bytes as the standard says, however they are cut into chunks.

The invariant:

* The events, the comments, the last event id and the reconnection time are those that WHATWG HTML,
  section 9.2.6, leads to when it is followed by the letter.
* All that does not depend on the chunks, nor does it whether an event is too large.
* Nothing is raised but ``TooLargeError``, and that not for a stream that is no longer than the
  limit. What was read before it is the beginning of what is read without a limit.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from flask_eventstream import EventStreamParser, ServerSentEvent
from flask_eventstream.errors import TooLargeError

from . import inputs

if TYPE_CHECKING:
    from random import Random

    Case = tuple[bytes, list[int], str, int, bool]
    """A stream, where it is cut, the first id, the limit, and whether comments are heard."""


LONGEST_IN_SINGLE_BYTES = 500
MOST_DIGITS = 4300
"""How many Python converts by default; the parser ignores a ``retry`` that has more."""


class Read(NamedTuple):
    """What was read of a stream."""

    events: list[ServerSentEvent]
    comments: list[str]
    last_event_id: str
    reconnection_time: int | None
    is_too_large: bool


def generate(chance: Random) -> Case:
    """Return a case."""
    places = [chance.randrange(200) for _ in range(chance.randrange(6))]
    first = chance.choice(("", "", "first", "世界"))
    return inputs.stream(chance), places, first, chance.randrange(1, 120), chance.random() < 0.5


def check(case: Case) -> None:
    """Raise if the invariant does not hold."""
    stream, places, first, limit, hears = case
    expected = read_by_the_letter(stream, first)
    if not hears:
        expected = expected._replace(comments=[])
    chunkings = [[stream], cut(stream, places)]
    if len(stream) <= LONGEST_IN_SINGLE_BYTES:
        chunkings.append([stream[i : i + 1] for i in range(len(stream))])
    for chunks in chunkings:
        assert parse(chunks, hears=hears, id=first) == expected, chunks
    limited, *others = [parse(chunks, limit, hears, first) for chunks in chunkings]
    assert all(other == limited for other in others), others
    if not limited.is_too_large:
        assert limited == expected
    else:
        assert len(stream) > limit
        assert limited.events == expected.events[: len(limited.events)]
        assert limited.comments == expected.comments[: len(limited.comments)]


def parse(
    chunks: list[bytes], max_bytes: int = 1 << 20, hears: bool = True, id: str = "first"
) -> Read:
    """Return what the parser reads."""
    comments: list[str] = []
    on_comment = comments.append if hears else None
    parser = EventStreamParser(id, max_bytes=max_bytes, on_comment=on_comment)
    events: list[ServerSentEvent] = []
    is_too_large = False
    try:
        for chunk in [*chunks, b""]:
            events += parser.feed(chunk)
    except TooLargeError:
        is_too_large = True
    return Read(events, comments, parser.last_event_id, parser.reconnection_time, is_too_large)


def cut(stream: bytes, at: list[int]) -> list[bytes]:
    """Return a stream in chunks that end at some places."""
    places = [0, *sorted(place % (len(stream) + 1) for place in at), len(stream)]
    return [stream[start:end] for start, end in pairwise(places)]


def read_by_the_letter(stream: bytes, id: str) -> Read:
    """Do what WHATWG HTML, section 9.2.6, says, a line at a time and nothing faster."""
    text = stream.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]
    events, comments, retry, last_event_id = [], [], None, id
    data, type, own_retry, seen = "", "", None, bool(id)
    for line in lines:
        field, colon, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            last_event_id = id
            if data:
                fields = (data[:-1], type or "message", id if seen else None, own_retry)
                events.append(ServerSentEvent(*fields))
            data, type, own_retry = "", "", None
        elif not field and colon:
            comments.append(line[1:])
        elif field == "event":
            type = value
        elif field == "data":
            data += value + "\n"
        elif field == "id" and "\0" not in value:
            id, seen = value, True
        elif field == "retry" and value.isascii() and value.isdigit() and len(value) <= MOST_DIGITS:
            retry = own_retry = int(value)
    return Read(events, comments, last_event_id, retry, False)
