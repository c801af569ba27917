r"""Events to bytes, by the WHATWG HTML standard, section 9.2, and nothing else.

The rules of this file:

* UTF-8, LF, ``field: value`` with the space, an empty line ends the event.
* Lines end at CRLF, LF and CR only. U+2028 and the others of ``str.splitlines()`` are data.
* An event always has data, if only an empty line of it: clients treat a block without data
  each in their own way (one hands it on, another fails to decode it as JSON).
* ``retry`` is the first line and ``id`` the last one: a client that takes an id for seen as soon as
  it has read that line would else lose the event in which its connection breaks.
* An event that could not be read back cannot be built.

>>> ServerSentEvent("first\nsecond", type="log", id="7").encode()
b'event: log\ndata: first\ndata: second\nid: 7\n\n'
"""

from __future__ import annotations

import base64
import gzip as gzip_codec
import json
from typing import TYPE_CHECKING, Any

from .errors import InvalidFieldError, TooLargeError

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_EVENT_BYTES = 1024 * 1024
"""The default limit of an event on the wire, in bytes."""

HEARTBEAT = b":\n"
"""A comment line that keeps a silent connection open.

It ends in one LF and not in two: a blank line makes the ``openai`` Python client and httpx-sse
dispatch an empty event, and ``@microsoft/fetch-event-source`` call ``onmessage`` for nothing.
"""


_new_event = object.__new__
_dumps = json.JSONEncoder(allow_nan=False).encode


class ServerSentEvent:
    """One event, immutable, and valid once it is built.

    :param data: what to send. A ``str`` is sent as it is; ``None`` and all that JSON can express is
        sent as JSON. ``bytes`` are refused, see :meth:`binary`.
    :param type: the event type that a browser dispatches, without CR and LF. ``None`` and ``""``
        are the standard's default, ``"message"``, which needs no line on the wire.
    :param id: what a client sends back as ``Last-Event-ID``, without CR, LF and NUL. An ``int`` is
        written in decimal. ``None`` leaves the client's id as it is; ``""`` makes it forget its id.
    :param retry: the reconnection time in **milliseconds**, an ``int`` of at least 0.
    :param dumps: turns data that is not a ``str`` into JSON; :func:`json.dumps` without NaN by
        default. Inside an app, ``current_app.json.dumps`` knows dates and UUIDs too.
    :raises InvalidFieldError: if a value could not be sent, or not be read back.

    The rules are those of the WHATWG HTML standard, sections 9.2.5 and 9.2.6.

    >>> ServerSentEvent({"tokens": 3}, type="usage")
    ServerSentEvent(data='{"tokens": 3}', type='usage', id=None, retry=None)
    """

    # Plain slots behind properties: a namedtuple takes half as long again to build (295 against
    # 190 ns on CPython 3.11), and is a sequence and equal to tuples besides.
    __slots__ = ("_data", "_id", "_retry", "_type")

    def __init__(
        self,
        data: Any,
        type: str | None = None,
        id: str | int | None = None,
        retry: int | None = None,
        *,
        dumps: Callable[[Any], str] | None = None,
    ) -> None:
        # What is printable has neither line breaks, nor NUL, nor surrogates: most types and ids
        # need no closer look.
        if data.__class__ is not str:
            data = _checked_data(data, dumps)
        elif not data.isascii():
            _check_encodable("data", data)
        if not type:
            type = "message"
        elif type.__class__ is not str or not type.isprintable():
            type = _checked_type(type)
        if id is not None and (id.__class__ is not str or not id.isprintable()):
            id = _checked_id(id)
        if retry is not None:
            retry = _checked_retry(retry)
        self._data: str = data
        self._type: str = type
        self._id: str | None = id
        self._retry: int | None = retry

    @property
    def data(self) -> str:
        """The data as text, JSON included."""
        return self._data

    @property
    def type(self) -> str:
        """The event type, ``"message"`` if none was given."""
        return self._type

    @property
    def id(self) -> str | None:
        """The id, or ``None``."""
        return self._id

    @property
    def retry(self) -> int | None:
        """The reconnection time in **milliseconds**, or ``None``."""
        return self._retry

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ServerSentEvent):
            return NotImplemented
        return self._fields() == other._fields()

    def __hash__(self) -> int:
        return hash(self._fields())

    def __repr__(self) -> str:
        names = ("data", "type", "id", "retry")
        shown = (f"{name}={value!r}" for name, value in zip(names, self._fields(), strict=True))
        return f"ServerSentEvent({', '.join(shown)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return ServerSentEvent, self._fields()

    def _fields(self) -> tuple[str, str, str | None, int | None]:
        return self._data, self._type, self._id, self._retry

    def with_id(self, id: str) -> ServerSentEvent:
        """Return the same event with another id.

        :param id: as for the class.
        :raises InvalidFieldError: if clients could not keep the id.
        """
        return ServerSentEvent(self._data, self._type, id, self._retry)

    @classmethod
    def binary(
        cls,
        data: bytes,
        gzip: bool = False,
        type: str | None = None,
        id: str | int | None = None,
        retry: int | None = None,
    ) -> ServerSentEvent:
        """Build an event that carries binary data as base64, since the wire is text.

        :param data: the bytes.
        :param gzip: compress them first; the client decodes with ``DecompressionStream("gzip")``.
        :param type: as for the class; so are ``id`` and ``retry`` (milliseconds).
        :returns: the event; its data is base64 by RFC 4648, section 4, without line breaks.
        :raises InvalidFieldError: as the class does.

        >>> ServerSentEvent.binary(b"\\x00\\xff").data
        'AP8='
        """
        # mtime=0: the same bytes give the same event, whenever it is built.
        packed = gzip_codec.compress(data, mtime=0) if gzip else data
        return cls(base64.b64encode(packed).decode("ascii"), type, id, retry)

    def encode(self, max_bytes: int | None = None) -> bytes:
        """Return the event as it goes over the wire, its closing blank line included.

        :param max_bytes: the largest number of bytes allowed; without limit by default.
        :raises TooLargeError: if the event is larger.

        The order of the fields is ours (the standard demands none): ``retry``, type, data, id.
        """
        data = self._data
        if "\r" in data:
            data = data.replace("\r\n", "\n").replace("\r", "\n")
        if "\n" in data:
            data = data.replace("\n", "\ndata: ")
        head = "" if self._retry is None else f"retry: {self._retry}\n"
        if self._type != "message":
            head = f"{head}event: {self._type}\n"
        tail = "" if self._id is None else f"id: {self._id}\n"
        wire = f"{head}data: {data}\n{tail}\n".encode()
        if max_bytes is not None and len(wire) > max_bytes:
            raise_too_large(len(wire), max_bytes)
        return wire


def parsed_event(data: str, type: str, id: str | None, retry: int | None) -> ServerSentEvent:
    """Build an event from fields that a parser read, which are valid by their syntax."""
    event = _new_event(ServerSentEvent)
    event._data = data
    event._type = type
    event._id = id
    event._retry = retry
    return event


def with_id(wire: bytes, id: bytes) -> bytes:
    """Return an encoded event that has no id with one."""
    return b"%bid: %b\n\n" % (wire[:-1], id)


def encode_data(data: str, max_bytes: int | None = None) -> bytes:
    """Return an event that is nothing but data as it goes over the wire.

    The same as ``ServerSentEvent(data).encode(max_bytes)`` in a third of the time, for streams of
    text (benchmarks/encode.py).
    """
    if "\r" in data:
        data = data.replace("\r\n", "\n").replace("\r", "\n")
    if "\n" in data:
        data = data.replace("\n", "\ndata: ")
    try:
        wire = f"data: {data}\n\n".encode()
    except UnicodeEncodeError as error:
        raise _lone_surrogate("data", data, error) from error
    if max_bytes is not None and len(wire) > max_bytes:
        raise_too_large(len(wire), max_bytes)
    return wire


def encode_comment(text: str = "") -> bytes:
    """Return a comment, which clients skip, as it goes over the wire.

    :param text: the comment; each of its lines becomes a comment line.
    :returns: the comment lines, and no blank line (see :data:`HEARTBEAT`).
    :raises InvalidFieldError: if the text has lone surrogates.
    """
    lines = _checked_text("comment", text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "".join(f": {line}\n" if line else ":\n" for line in lines).encode()


def to_json(value: Any, dumps: Callable[[Any], str] | None = None) -> str:
    """Return a value as JSON.

    :param value: anything that JSON can express. NaN and the infinities are not: a browser's
        ``JSON.parse`` fails on them.
    :param dumps: the encoder; :func:`json.dumps` without NaN by default.
    :raises InvalidFieldError: if it is ``bytes``, or nothing that JSON can express.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        hint = "is binary, and the wire is text; send ServerSentEvent.binary(data)"
        raise InvalidFieldError("data", value, hint)
    try:
        return (dumps or _dumps)(value)
    except (TypeError, ValueError, RecursionError) as error:
        hint = f"cannot be sent as JSON ({error}); send a str, or what JSON can express"
        raise InvalidFieldError("data", value, hint) from error


def raise_too_large(size: int, limit: int) -> None:
    """Raise the error of an event that is larger than allowed (both in bytes)."""
    advice = "Send a link to the data, or raise EVENTSTREAM_MAX_EVENT_BYTES."
    raise TooLargeError("the event's size in bytes", size, limit, advice)


def _checked_data(data: Any, dumps: Callable[[Any], str] | None) -> str:
    return _checked_text("data", data if isinstance(data, str) else to_json(data, dumps))


def _checked_text(field: str, text: str) -> str:
    # str.__str__, since a subclass may escape what it is joined with (markupsafe.Markup) or
    # print as something else (an Enum of strings).
    plain = text if text.__class__ is str else str.__str__(text)
    _check_encodable(field, plain)
    return plain


def _check_encodable(field: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _lone_surrogate(field, text, error) from error


def _lone_surrogate(field: str, text: str, error: UnicodeEncodeError) -> InvalidFieldError:
    hint = f"has a lone surrogate at {error.start}, which UTF-8 cannot carry"
    return InvalidFieldError(field, text, hint)


def _checked_type(type: str) -> str:
    if not isinstance(type, str):
        raise InvalidFieldError("type", type, f"is a {type.__class__.__name__}; it must be a str")
    if "\n" in type or "\r" in type:
        raise InvalidFieldError("type", type, "has a line break, which would end the field")
    return _checked_text("type", type)


def _checked_id(id: str | int) -> str:
    if isinstance(id, int) and not isinstance(id, bool):
        return _decimal("id", id)
    if not isinstance(id, str):
        raise InvalidFieldError("id", id, f"is a {id.__class__.__name__}; it must be a str or int")
    if "\n" in id or "\r" in id or "\0" in id:
        raise InvalidFieldError("id", id, "has a line break or NUL; clients ignore such an id")
    return _checked_text("id", id)


def _checked_retry(retry: int) -> int:
    if not isinstance(retry, int) or isinstance(retry, bool) or retry < 0:
        raise InvalidFieldError("retry", retry, "must be an int of milliseconds, at least 0")
    _decimal("retry", retry)
    return int.__index__(retry)


def _decimal(field: str, number: int) -> str:
    try:
        return int.__str__(number)
    except ValueError as error:
        hint = "has more digits than Python writes (see sys.set_int_max_str_digits)"
        raise InvalidFieldError(field, "a huge int", hint) from error
