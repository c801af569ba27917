r"""What can be built reads back as it was; what could not be read back cannot be built.

The invariant, for events of any fields:

* One that the rules of ``event.py`` forbid is an ``InvalidFieldError`` that names a field which is
  wrong. Nothing else is refused.
* ``parse(encode(event)) == event``, but for its line ends, which are read as ``\n``; also of
  several in a row with heartbeats and comments between them, which nothing is dispatched for.
* The wire has no CR, and one blank line, at its end. It is the same on every way there is to encode
  an event, and the limit of its size is exact.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from flask_eventstream import EventStreamParser, ServerSentEvent
from flask_eventstream.errors import InvalidFieldError, TooLargeError
from flask_eventstream.event import HEARTBEAT, encode_comment, encode_data, with_id
from flask_eventstream.format import StreamFormat

from . import inputs

if TYPE_CHECKING:
    from random import Random

    Fields = tuple[Any, Any, Any, Any]
    """Data, type, id and retry."""

NUMBERS = (0, 7, -1, 3000, 2**63, 10**25, True, 1.5)
_format = StreamFormat(json.dumps, 1 << 20)


def generate(chance: Random) -> list[Fields]:
    """Return a case: the fields of a few events."""
    return [_fields(chance) for _ in range(chance.randint(1, 3))]


def _fields(chance: Random) -> Fields:
    data = _value(chance) if chance.random() < 0.3 else inputs.text(chance, 12, _is_fine(chance))
    id = chance.choice(NUMBERS) if chance.random() < 0.1 else _name(chance)
    return data, _name(chance), id, chance.choice(NUMBERS) if chance.random() < 0.2 else None


def _is_fine(chance: Random) -> bool:
    return chance.random() < 0.95


def _name(chance: Random) -> str | None:
    if chance.random() < 0.5:
        return None
    name = inputs.text(chance, 4, _is_fine(chance))
    # Most texts have a line break, and few events would be valid.
    return name if chance.random() < 0.1 else re.sub("[\r\n\0]", "", name)


def _value(chance: Random, depth: int = 0) -> Any:
    kind = chance.randrange(9 if depth < 3 else 6)
    if kind > 6:
        return [_value(chance, depth + 1) for _ in range(chance.randrange(3))]
    if kind == 6:
        return {inputs.text(chance, 3): _value(chance, depth + 1) for _ in range(2)}
    rare = b"bytes" if chance.random() < 0.05 else 1.5
    return (None, True, chance.randrange(-9, 9), rare, inputs.text(chance), "")[kind]


def check(case: list[Fields]) -> None:
    """Raise if the invariant does not hold."""
    events = [event for fields in case if (event := _built(fields)) is not None]
    wires = [event.encode() for event in events]
    for event, wire in zip(events, wires, strict=True):
        _check_wire(event, wire)
    parts = [wire + encode_comment(event.data) for event, wire in zip(events, wires, strict=True)]
    row = HEARTBEAT + b"".join(parts)
    # What brings no id has the last one.
    last, expected = None, []
    for event in events:
        last = last if event.id is None else event.id
        expected.append(_as_read(event, last))
    assert EventStreamParser().feed(row) == expected, row


def _built(fields: Fields) -> ServerSentEvent | None:
    wrong = _wrong_fields(*fields)
    refused: str | None = None
    try:
        event = ServerSentEvent(*fields)
    except InvalidFieldError as error:
        refused = error.field
    assert refused in wrong if wrong else refused is None, f"{refused} was refused of {fields}"
    if refused:
        return None
    if not isinstance(fields[0], str):
        assert json.loads(event.data) == json.loads(json.dumps(fields[0]))
    return event


def _wrong_fields(data: Any, type: Any, id: Any, retry: Any) -> set[str]:
    """Return which fields could not be sent, or not be read back, by the rules."""
    wrong = set()
    if _has_bytes(data) or (isinstance(data, str) and _has_any(data, _SURROGATES)):
        wrong.add("data")
    if isinstance(type, str) and _has_any(type, "\r\n" + _SURROGATES):
        wrong.add("type")
    is_number = isinstance(id, int) and not isinstance(id, bool)
    is_text = isinstance(id, str) and not _has_any(id, "\r\n\0" + _SURROGATES)
    if not (id is None or is_text or is_number):
        wrong.add("id")
    is_number = isinstance(retry, int) and not isinstance(retry, bool)
    if not (retry is None or (is_number and retry >= 0)):
        wrong.add("retry")
    return wrong


_SURROGATES = "\ud800\udfff"


def _has_any(text: str, characters: str) -> bool:
    return any(character in text for character in characters)


def _has_bytes(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, bytes) or (isinstance(value, list) and any(map(_has_bytes, value)))


def _check_wire(event: ServerSentEvent, wire: bytes) -> None:
    assert b"\r" not in wire, wire
    assert wire.endswith(b"\n\n"), wire
    assert wire.find(b"\n\n") == len(wire) - 2, wire
    assert EventStreamParser().feed(wire) == [_as_read(event, event.id)], wire
    assert event.encode(len(wire)) == _format.encode(event) == wire
    assert _is_refused(event, len(wire) - 1)
    _check_other_ways(event, wire)


def _is_refused(event: ServerSentEvent, limit: int) -> bool:
    try:
        event.encode(limit)
    except TooLargeError as error:
        return (error.value, error.limit) == (limit + 1, limit)
    return False


def _check_other_ways(event: ServerSentEvent, wire: bytes) -> None:
    data = encode_data(event.data)
    assert data == _format.encode(event.data) == ServerSentEvent(event.data).encode()
    if event.id is None:
        numbered = with_id(wire, b"run.7")
        assert numbered == event.with_id("run.7").encode()
        assert numbered == _format.encode_with_id(event, "run.7")


def _as_read(event: ServerSentEvent, id: str | None) -> ServerSentEvent:
    data = event.data.replace("\r\n", "\n").replace("\r", "\n")
    return ServerSentEvent(data, event.type, id, event.retry)
