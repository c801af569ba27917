"""What it costs to turn a value into the bytes of an event, through each package's own public way.

Three comparisons, like with like:

* *Build and encode*: from a value to the wire through an object, once for each event. FastAPI's and
  our objects check their fields; sse-starlette removes line breaks from them in silence; Flask-SSE
  does neither, so that its line is the price of no checks.
* *Encode alone*: of an object that is there already, as for an event that is sent twice. FastAPI's
  objects cannot encode themselves; its routing hands their fields to ``format_sse_event``, and so
  does this file.
* *Text to bytes, without an object*: what an item of a stream of plain text goes through. Ours is
  ``encode_data``, which a view's ``str`` items take; FastAPI's ``format_sse_event``, which checks
  nothing; sse-starlette's ``ensure_bytes``, which makes an object of its own inside. Of a type and
  an id only FastAPI's function knows: there is nothing of ours to compare it with.

Not quite the same: sse-starlette ends lines with CRLF, Flask-SSE leaves out the space after the
colon, and both Flask-SSE and FastAPI write the id after the data. What each one writes is parsed
before it is timed, and has to be the event that was meant.
"""

from __future__ import annotations

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

from flask_eventstream import EventStreamParser, ServerSentEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Imported = tuple[Any, dict[str, Any]]

BAR = 2.0
OURS = "flask_eventstream"
DISTRIBUTIONS = ("flask-eventstream", "sse-starlette", "fastapi", "pydantic", "flask-sse")


class Peer(NamedTuple):
    """A package's way from fields to bytes, as Python source."""

    imports: str
    build: str
    build_with_type_and_id: str
    encode: str


class Function(NamedTuple):
    """A package's way without an object, as Python source."""

    imports: str
    encode: str
    encode_with_type_and_id: str = ""


PEERS = {
    OURS: Peer(
        "from flask_eventstream import ServerSentEvent",
        "ServerSentEvent(data)",
        "ServerSentEvent(data, type, id)",
        "event.encode()",
    ),
    "sse-starlette": Peer(
        "from sse_starlette import ServerSentEvent",
        "ServerSentEvent(data)",
        "ServerSentEvent(data, event=type, id=id)",
        "event.encode()",
    ),
    "FastAPI": Peer(
        "from fastapi.sse import ServerSentEvent, format_sse_event",
        "ServerSentEvent(raw_data=data)",
        "ServerSentEvent(raw_data=data, event=type, id=id)",
        "format_sse_event(data_str=event.raw_data, event=event.event, id=event.id)",
    ),
    "Flask-SSE (unchecked)": Peer(
        "from flask_sse import Message",
        "Message(data)",
        "Message(data, type, id)",
        "str(event).encode()",
    ),
}
FUNCTIONS = {
    f"{OURS}, encode_data": Function(
        "from flask_eventstream.event import encode_data", "encode_data(data)"
    ),
    "FastAPI, format_sse_event": Function(
        "from fastapi.sse import format_sse_event",
        "format_sse_event(data_str=data)",
        "format_sse_event(data_str=data, event=type, id=id)",
    ),
    "sse-starlette, ensure_bytes": Function(
        "from sse_starlette.event import ensure_bytes", 'ensure_bytes(data, "\\r\\n")'
    ),
}

_JSON = (
    '{"id": 1042, "name": "Ada Lovelace", '
    '"text": "The engine weaves patterns of numbers.", "is_ok": true}'
)
_LOG = "\n".join(f"2025-01-01 12:00:0{n} INFO request {n} took 12 ms" for n in range(10))
_JSON_64K = '{"text": "' + "x" * (65536 - 12) + '"}'
WORKLOADS: dict[str, tuple[str, str | None, str | None]] = {
    "a token": ("Hello", None, None),
    "100 bytes of JSON": (_JSON, None, None),
    "the same, type and id": (_JSON, "update", "3f9a-1042"),
    "ten lines": (_LOG, None, None),
    "Chinese and emoji": ("服务器推送事件：你好，世界 🌍🚀", None, None),
    "64 KiB of JSON": (_JSON_64K, None, None),
}


def main() -> None:
    arguments = options("Compare how fast events are encoded.", rounds=15)
    machine = print_machine(DISTRIBUTIONS)
    peers = load({name: partial(_imported, peer) for name, peer in PEERS.items()})
    functions = load({name: partial(_imported, one) for name, one in FUNCTIONS.items()})
    rounds = arguments.rounds
    tables = [
        _table("Build and encode an event", peers, _build_and_encode, rounds),
        _table("Encode an event that is built", peers, _encode_alone, rounds),
        _table("Text to bytes, without an object", functions, _without_object, rounds),
    ]
    for table in tables:
        table.print()
    bars = print_speed_bar(tables, BAR)
    write_json(arguments.json, machine, tables, bars)


def _imported(way: Peer | Function) -> Imported:
    names: dict[str, Any] = {}
    exec(way.imports, names)
    return way, names


def _build_and_encode(peer: Peer, is_typed: bool) -> tuple[str, str]:
    build = peer.build_with_type_and_id if is_typed else peer.build
    return "", f"event = {build}; wire = {peer.encode}"


def _encode_alone(peer: Peer, is_typed: bool) -> tuple[str, str]:
    build = peer.build_with_type_and_id if is_typed else peer.build
    return f"event = {build}", f"wire = {peer.encode}"


def _without_object(function: Function, is_typed: bool) -> tuple[str, str]:
    encode = function.encode_with_type_and_id if is_typed else function.encode
    return "", encode and f"wire = {encode}"


def _table(
    title: str,
    ways: Mapping[str, Imported],
    statements: Callable[[Any, bool], tuple[str, str]],
    rounds: int,
) -> Table:
    rows = {}
    for workload, (data, type, id) in WORKLOADS.items():
        timers = {}
        for name, (way, imported) in ways.items():
            setup, statement = statements(way, type is not None)
            if statement:
                names = {**imported, "data": data, "type": type, "id": id}
                exec(setup, names)
                _check(name, statement, names)
                timers[name] = timer(statement, names)
        rows[workload] = best_of_rounds(timers, rounds)
    return Table(title, next(iter(ways)), rows)


def _check(name: str, statement: str, names: dict[str, Any]) -> None:
    exec(statement, names)
    expected = [ServerSentEvent(names["data"], names["type"], names["id"])]
    found = EventStreamParser().feed(names["wire"])
    if found != expected:
        raise SystemExit(f"{name} did other work: {found} and not {expected}")


if __name__ == "__main__":
    main()
