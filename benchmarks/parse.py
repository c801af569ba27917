"""What it costs to turn the bytes of an event stream into events.

Each parser gets the same chunks of bytes, and makes a list of all the events. The peers:

* httpx-sse through its public ``EventSource(response).iter_sse()``; the response is made of the
  chunks, so that httpx's own decoding of text is part of it, as it is for every user. The decoders
  that it is made of are a second peer; they take text, so an incremental decoder of UTF-8 is put
  before them, which is the least that anyone would have to do.
* sseclient-py, which takes any iterable of chunks.
* The ``openai`` client's own decoder, below its typed objects.

The streams: one line for each event; an id, a type and 100 bytes of JSON; ten lines; tokens and
typed events between heartbeats; and what other servers write, whose field order or line ends are
not ours. The chunks: one event each, as a live stream comes; 1 KiB and 64 KiB, as a busy one does.
Chunks of 64 bytes are the worst case, in a table of their own that the bar does not speak of.

Not quite the same: ours bounds the size of an event and handles a byte order mark, which none of
the peers does. What each one reads is compared with what was meant before it is timed; the type is
``"message"`` in ours and sseclient-py, and empty in the others.
"""

from __future__ import annotations

import codecs
import json
import random
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from measuring import (
    Table,
    best_of_rounds,
    load,
    options,
    print_machine,
    print_speed_bar,
    timer,
    write_json,
)

from flask_eventstream import EventStreamParser

if TYPE_CHECKING:
    from collections.abc import Callable

    Reader = Callable[[list[bytes]], list[Any]]
    Fields = tuple[str, str, str]

BAR = 2.0
PARTS = "httpx-sse's decoders"
EVENTS = 500
DISTRIBUTIONS = ("flask-eventstream", "httpx", "httpx-sse", "sseclient-py", "openai")


class Stream(NamedTuple):
    """A stream as one piece of wire for each event, and what it means: data, type, id."""

    wire: list[bytes]
    events: list[Fields]


def ours() -> Reader:
    def read(chunks: list[bytes]) -> list[Any]:
        parser = EventStreamParser()
        events = []
        for chunk in chunks:
            events += parser.feed(chunk)
        return events

    return read


def httpx_sse() -> Reader:
    import httpx
    from httpx_sse import EventSource

    headers = {"Content-Type": "text/event-stream"}

    def read(chunks: list[bytes]) -> list[Any]:
        response = httpx.Response(200, headers=headers, content=iter(chunks))
        return list(EventSource(response).iter_sse())

    return read


def httpx_sse_decoders() -> Reader:
    from httpx_sse._decoders import SSEDecoder, SSELineDecoder

    def read(chunks: list[bytes]) -> list[Any]:
        to_text = codecs.getincrementaldecoder("utf-8")("replace").decode
        lines_of, event_of = SSELineDecoder().decode, SSEDecoder().decode
        events = []
        for chunk in chunks:
            for line in lines_of(to_text(chunk)):
                event = event_of(line)
                if event is not None:
                    events.append(event)
        return events

    return read


def sseclient_py() -> Reader:
    from sseclient import SSEClient

    def read(chunks: list[bytes]) -> list[Any]:
        return list(SSEClient(iter(chunks)).events())

    return read


def openai() -> Reader:
    from openai._streaming import SSEDecoder

    def read(chunks: list[bytes]) -> list[Any]:
        return list(SSEDecoder().iter_bytes(iter(chunks)))

    return read


PEERS: dict[str, Callable[[], Reader]] = {
    "flask_eventstream": ours,
    "httpx-sse": httpx_sse,
    PARTS: httpx_sse_decoders,
    "sseclient-py": sseclient_py,
    "openai": openai,
}


def main() -> None:
    arguments = options("Compare how fast event streams are parsed.", rounds=9)
    machine = print_machine(DISTRIBUTIONS)
    readers = load(PEERS)
    measured = partial(_table, readers, arguments.rounds)
    cuts = {"an event a chunk": None, "1 KiB chunks": 1024, "64 KiB chunks": 65536}
    worst: dict[str, int | None] = {"64-byte chunks": 64}
    own, foreign = own_streams(), foreign_streams()
    tables = [
        measured("Parse an event, as this package writes it", own, cuts),
        measured("Parse an event, as others write it", foreign, cuts),
        measured("The worst case, not judged", own | foreign, worst)._replace(is_judged=False),
    ]
    for table in tables:
        table.print()
    bars = print_speed_bar(tables, BAR)
    write_json(arguments.json, machine, tables, bars)


def own_streams() -> dict[str, Stream]:
    dice = random.Random(1)
    tokens = [("".join(dice.choices(_SYLLABLES, k=2)), "", "") for _ in range(EVENTS)]
    typed = [(_json(number), "update", f"3f9a-{number}") for number in range(EVENTS)]
    logs = [(_log(number), "", "") for number in range(EVENTS)]
    mixed = [tokens[n] if n % 4 else (_json(n), "usage", "") for n in range(EVENTS)]
    return {
        "tokens": Stream([b"data: %b\n\n" % data.encode() for data, *_ in tokens], tokens),
        "type, id, 100 bytes": Stream([_wire(*event) for event in typed], typed),
        "ten lines": Stream([_wire(*event) for event in logs], logs),
        "with heartbeats": Stream(
            [b":\n" * (n % 3) + _wire(*e) for n, e in enumerate(mixed)], mixed
        ),
    }


def foreign_streams() -> dict[str, Stream]:
    typed = [(_json(number), "update", f"3f9a-{number}") for number in range(EVENTS)]
    crlf = [_wire(*event).replace(b"\n", b"\r\n") for event in typed]
    order = "event: {1}\ndata: {0}\nid: {2}\n\n"
    no_space = "event:{1}\ndata:{0}\nid:{2}\n\n"
    return {
        "sse-starlette's (CRLF)": Stream(crlf, typed),
        "FastAPI's (the id last)": Stream([order.format(*e).encode() for e in typed], typed),
        "Flask-SSE's (no space)": Stream([no_space.format(*e).encode() for e in typed], typed),
    }


_SYLLABLES = (" the", "ing", "er", " a", "tion", " stream", "服务", "🌍", " of", "ed")


def _json(number: int) -> str:
    text = json.dumps({"number": number, "text": ""})
    return json.dumps({"number": number, "text": "x" * (100 - len(text))})


def _log(number: int) -> str:
    return "\n".join(f"2025-01-01 12:00:0{n} INFO request {number} took {n} ms" for n in range(10))


def _wire(data: str, type: str, id: str) -> bytes:
    head = f"id: {id}\n" * bool(id) + f"event: {type}\n" * bool(type)
    lines = "".join(f"data: {line}\n" for line in data.split("\n"))
    return f"{head}{lines}\n".encode()


def _table(
    readers: dict[str, Reader],
    rounds: int,
    title: str,
    streams: dict[str, Stream],
    cuts: dict[str, int | None],
) -> Table:
    rows = {}
    for stream_name, stream in streams.items():
        for cut_name, size in cuts.items():
            chunks = stream.wire if size is None else _cut(b"".join(stream.wire), size)
            for name, read in readers.items():
                _check(name, read(chunks), stream.events)
            timers = {name: timer(partial(read, chunks)) for name, read in readers.items()}
            best = best_of_rounds(timers, rounds)
            row = {name: seconds / len(stream.events) for name, seconds in best.items()}
            rows[f"{stream_name}, {cut_name}"] = row
    return Table(title, next(iter(readers)), rows, parts=(PARTS,) if PARTS in readers else ())


def _cut(wire: bytes, size: int) -> list[bytes]:
    return [wire[start : start + size] for start in range(0, len(wire), size)]


def _check(name: str, found: list[Any], expected: list[Fields]) -> None:
    fields = [(e.data, _type(e), e.id or "") for e in found]
    if fields != expected:
        raise SystemExit(f"{name} did other work: {fields[:3]} and not {expected[:3]}")


def _type(event: Any) -> str:
    type = event.type if hasattr(event, "type") else event.event
    return "" if type in (None, "message") else type


if __name__ == "__main__":
    main()
