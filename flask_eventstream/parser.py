"""Bytes in, events out: the parsing rules of the WHATWG HTML standard, section 9.2.6. No I/O.

What holds for every stream, and is fuzzed:

* The events do not depend on how the stream was cut into chunks.
* Nothing is raised but :class:`TooLargeError`: malformed fields are ignored, and malformed UTF-8
  becomes U+FFFD, as the standard demands.
* Each byte is looked at a bounded number of times, however small the chunks are.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .errors import TooLargeError
from .event import parsed_event

if TYPE_CHECKING:
    from collections.abc import Callable

    from .event import ServerSentEvent

_BOM = b"\xef\xbb\xbf"
_BLANK_LINES = (b"\n\n", b"\r\n\r\n")
# As numbers: to look for a number takes a tenth of the time that bytes take (13 and 143 ns).
_CR, _LF = b"\r\n"
# An event with its fields in an order that servers use; what is left of its lines; any other block.
# In a pattern without DOTALL, "." is anything but LF: just what a field's value may hold.
_EVENT = r"(id: ?([^\n\0]*)\n)?(?:event: ?(.*)\n)?data: ?(.*(?:\ndata: .*)*)"
_REST = r"(\nid: ?([^\n\0]*))?((?:\n.+)*)"
_OTHER = r"((?:.+|\n.+)(?:\n.+)*)"
_HEARTBEATS = r"(?::\n)*"
_blocks = re.compile(rf"(?:{_EVENT}{_REST}|{_OTHER})\n\n").findall
_blocks_without_heartbeats = re.compile(rf"(?:{_HEARTBEATS}{_EVENT}{_REST}|{_OTHER})\n\n").findall
_retry_field = re.compile(r"retry: ?([0-9]+)").fullmatch
_READ_AT_ONCE = (b":", b"retry")
_line_to_read_at_once = re.compile(rb"\n(?::|retry)").search


class EventStreamParser:
    """An incremental parser of one event stream; use a new one for each connection.

    :param last_event_id: the id that the connection was opened with, which is that of events that
        bring none.
    :param max_bytes: how much of an unfinished event is kept, in bytes; 16 MiB by default. It
        includes field names and line ends.
    :param on_comment: called with each comment, the text after the colon as it came.

    >>> parser = EventStreamParser()
    >>> parser.feed(b"id: 7\\ndata: Hel")
    []
    >>> parser.feed(b"lo\\n\\n")
    [ServerSentEvent(data='Hello', type='message', id='7', retry=None)]
    >>> parser.last_event_id
    '7'
    """

    def __init__(
        self,
        last_event_id: str = "",
        *,
        max_bytes: int = 16 * 1024 * 1024,
        on_comment: Callable[[str], None] | None = None,
    ) -> None:
        self._max_bytes = max_bytes
        self._on_comment = on_comment
        # Comments that nobody asks for need no look of their own.
        self._blocks = _blocks if on_comment else _blocks_without_heartbeats
        self._last_event_id = last_event_id
        self._id: str | None = last_event_id or None
        self._reconnection_time: int | None = None
        self._bom: bytes | None = b""
        self._after_cr = False
        self._is_between_events = False
        # Of an event whose blank line has not come yet: its whole lines, then the start of a line.
        self._lines: list[bytes] = []
        self._line: list[bytes] = []
        self._unfinished_bytes = 0
        self._error: TooLargeError | None = None

    @property
    def last_event_id(self) -> str:
        """What a reconnect has to send as ``Last-Event-ID``; empty if it has to send none."""
        return self._last_event_id

    @property
    def reconnection_time(self) -> int | None:
        """The stream's latest ``retry``, in **milliseconds**; ``None`` if it sent none."""
        return self._reconnection_time

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Take the next bytes of the stream and return the events that they complete.

        :param chunk: any number of bytes, cut anywhere.
        :returns: the events in order. The ``type`` is ``"message"`` where the stream named none;
            the ``id`` is the last event id at that moment, ``None`` as long as there was none;
            ``retry`` is the one of the event's own block.
        :raises TooLargeError: if an unfinished event is larger than ``max_bytes``. Events that were
            complete before it are returned first; then every further call raises.
        """
        is_whole = self._is_between_events and chunk.endswith(_BLANK_LINES)
        # Not put in the place of the chunk: what is read below it has to find each CR as it came.
        whole = chunk.replace(b"\r\n", b"\n") if is_whole and _CR in chunk else chunk
        if is_whole and _CR not in whole and len(whole) <= self._max_bytes:
            # What a live stream brings is one event a chunk, as a rule (benchmarks/parse.py).
            if whole.startswith(b"data: ") and whole.find(_LF) == len(whole) - 2:
                text = whole[6:-2].decode("utf-8", "replace")
                return [parsed_event(text, "message", self._id, None)]
            return self._events(whole.decode("utf-8", "replace"))
        events: list[ServerSentEvent] = []
        if self._bom is not None:
            chunk = self._without_bom(self._bom, chunk)
        if self._after_cr or _CR in chunk:
            chunk = self._with_lf_only(chunk)
        if self._error is None:
            self._feed(chunk, events)
            is_in_line = self._unfinished_bytes or self._after_cr or self._bom is not None
            self._is_between_events = not is_in_line
        if self._error is not None and not events:
            raise self._error
        return events

    def _without_bom(self, start: bytes, chunk: bytes) -> bytes:
        start += chunk
        if len(start) < len(_BOM) and _BOM.startswith(start):
            self._bom = start
            return b""
        self._bom = None
        return start.removeprefix(_BOM)

    def _with_lf_only(self, chunk: bytes) -> bytes:
        if self._after_cr and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._after_cr = False
        # A CR ends its line at once, so that an event is not held back until the next chunk
        # tells whether an LF follows.
        self._after_cr = self._after_cr or chunk.endswith(b"\r")
        chunk = chunk.replace(b"\r\n", b"\n")
        return chunk.replace(b"\r", b"\n") if _CR in chunk else chunk

    def _feed(self, chunk: bytes, events: list[ServerSentEvent]) -> None:
        if self._unfinished_bytes + len(chunk) > self._max_bytes:
            self._feed_line_by_line(chunk, events)
            return
        end = chunk.rfind(b"\n\n") + 2
        if end == 1:
            end = 1 if chunk.startswith(b"\n") and not self._line else 0
        if end:
            events += self._events(self._finished(chunk[:end]))
        if end < len(chunk):
            self._keep(chunk[end:])

    def _feed_line_by_line(self, chunk: bytes, events: list[ServerSentEvent]) -> None:
        # So that the event that is too large is the same for every chunking.
        for line in chunk.splitlines(keepends=True):
            is_blank = line == b"\n" and not self._line
            if not is_blank and self._unfinished_bytes + len(line) > self._max_bytes:
                self._fail(self._unfinished_bytes + len(line))
                return
            if is_blank:
                events += self._events(self._finished(line))
            else:
                self._keep(line)

    def _fail(self, size: int) -> None:
        advice = "Raise max_bytes, or close the connection: its sender does not end its events."
        self._error = TooLargeError("unfinished data in bytes", size, self._max_bytes, advice)
        self._unfinished_bytes = size
        self._lines.clear()
        self._line.clear()

    def _finished(self, chunk: bytes) -> str:
        if self._unfinished_bytes:
            chunk = b"".join([*self._lines, *self._line, chunk])
            self._lines.clear()
            self._line.clear()
            self._unfinished_bytes = 0
        return chunk.decode("utf-8", "replace")

    def _keep(self, rest: bytes) -> None:
        self._unfinished_bytes += len(rest)
        end = rest.rfind(_LF) + 1
        if end:
            lines = b"".join([*self._line, rest[:end]])
            self._line.clear()
            if lines.startswith(_READ_AT_ONCE) or _line_to_read_at_once(lines):
                lines = self._read_at_once(lines)
            self._lines.append(lines)
        if end < len(rest):
            self._line.append(rest[end:])

    def _read_at_once(self, lines: bytes) -> bytes:
        # A heartbeat is heard, and a reconnection time holds, before the event's blank line.
        kept = []
        for line in lines.splitlines(keepends=True):
            if line.startswith(b":"):
                self._hear(line.decode("utf-8", "replace")[1:-1])
                self._unfinished_bytes -= len(line)
            else:
                self._retry(line.decode("utf-8", "replace")[:-1], None)
                kept.append(line)
        return b"".join(kept)

    def _events(self, text: str) -> list[ServerSentEvent]:
        # The hottest loop of the parser (benchmarks/parse.py): one match for a whole event costs
        # less than a look at each of its lines.
        events: list[ServerSentEvent] = []
        for id_line, id, type, data, last_line, last_id, rest, other in self._blocks(text):
            if rest or other:
                block = other or f"{id_line}event: {type}\ndata: {data}{last_line}{rest}"
                self._read_block(block, events)
                continue
            if last_line:
                self._id = last_id
            elif id_line:
                self._id = id
            if "\n" in data:
                data = data.replace("\ndata: ", "\n")
            events.append(parsed_event(data, type or "message", self._id, None))
        self._last_event_id = self._id or ""
        return events

    def _read_block(self, block: str, events: list[ServerSentEvent]) -> None:
        data: list[str] = []
        type, retry = "", None
        for line in block.split("\n"):
            name, colon, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                data.append(value)
            elif name == "event":
                type = value
            elif name == "id" and "\0" not in value:
                self._id = value
            elif name == "retry":
                retry = self._retry(line, retry)
            elif colon and not name:
                self._hear(line[1:])
        if data:
            text = "\n".join(data)
            events.append(parsed_event(text, type or "message", self._id, retry))

    def _hear(self, comment: str) -> None:
        if self._on_comment is not None:
            self._on_comment(comment)

    def _retry(self, line: str, otherwise: int | None) -> int | None:
        field = _retry_field(line)
        if field is None:
            return otherwise
        try:
            self._reconnection_time = int(field[1])
        except ValueError:
            # More digits than Python converts: no client waits for that long, so it is ignored
            # like any other value that cannot be used.
            return otherwise
        return self._reconnection_time
