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
from .event import ServerSentEvent

if TYPE_CHECKING:
    from collections.abc import Callable

# Fields that were read are valid by their syntax; the constructor would check them again.
_new_event = tuple.__new__
_BOM = b"\xef\xbb\xbf"
# In a pattern without DOTALL, "." is anything but LF: just what a field's value may hold.
_head = re.compile(r"(?:id: ([^\n\0]*)\n)?(?:event: (.*)\n)?data: ").match


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
        self._last_event_id = last_event_id
        self._reconnection_time: int | None = None
        self._head: bytes | None = b""
        self._after_cr = False
        self._unfinished_line: list[bytes] = []
        self._block_bytes = 0
        self._error: TooLargeError | None = None
        self._data: list[str] = []
        self._type = ""
        self._id: str | None = last_event_id or None
        self._retry: int | None = None

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
        if self._error is not None:
            raise self._error
        if self._head is not None:
            chunk = self._without_bom(self._head, chunk)
        if self._after_cr or b"\r" in chunk:
            chunk = self._with_lf_only(chunk)
        events: list[ServerSentEvent] = []
        end = chunk.rfind(b"\n") + 1
        if end:
            self._read_lines(chunk[:end], events)
        self._keep(chunk[end:])
        if self._error is not None and not events:
            raise self._error
        return events

    def _without_bom(self, head: bytes, chunk: bytes) -> bytes:
        head += chunk
        if len(head) < len(_BOM) and _BOM.startswith(head):
            self._head = head
            return b""
        self._head = None
        return head.removeprefix(_BOM)

    def _with_lf_only(self, chunk: bytes) -> bytes:
        if self._after_cr and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._after_cr = False
        # A CR ends its line at once, so that an event is not held back until the next chunk
        # tells whether an LF follows.
        self._after_cr = self._after_cr or chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _keep(self, rest: bytes) -> None:
        if rest and self._error is None:
            self._unfinished_line.append(rest)
            self._block_bytes += len(rest)
            if self._block_bytes > self._max_bytes:
                self._fail()

    def _fail(self) -> None:
        advice = "Raise max_bytes, or close the connection: its sender does not end its events."
        what = "unfinished data in bytes"
        self._error = TooLargeError(what, self._block_bytes, self._max_bytes, advice)
        self._unfinished_line.clear()
        self._data.clear()

    def _read_lines(self, lines: bytes, events: list[ServerSentEvent]) -> None:
        if self._unfinished_line:
            self._block_bytes -= sum(map(len, self._unfinished_line))
            lines = b"".join([*self._unfinished_line, lines])
            self._unfinished_line.clear()
        if self._block_bytes + len(lines) > self._max_bytes:
            self._read_bounded(lines, events)
            return
        self._read(lines.decode("utf-8", "replace"), events)
        blank = lines.rfind(b"\n\n")
        if blank >= 0 or lines.startswith(b"\n"):
            self._block_bytes = len(lines) - (blank + 2 if blank >= 0 else 1)
        else:
            self._block_bytes += len(lines)

    def _read_bounded(self, lines: bytes, events: list[ServerSentEvent]) -> None:
        # Line by line, so that the event that is too large is the same for every chunking.
        for line in lines.splitlines(keepends=True):
            self._block_bytes = 0 if line == b"\n" else self._block_bytes + len(line)
            if self._block_bytes > self._max_bytes:
                self._fail()
                return
            self._read(line.decode("utf-8", "replace"), events)

    def _read(self, text: str, events: list[ServerSentEvent]) -> None:
        *blocks, unfinished = text.split("\n\n")
        if blocks and (self._data or self._type or self._retry is not None):
            self._read_block(blocks.pop(0), events)
        for block in blocks:
            # The hottest lines of the parser (benchmarks/parse.py). Almost all events have their
            # data last, as ours do, and are read without a look at each of their lines.
            if block.startswith("data: "):
                data, type = block[6:], None
            elif head := _head(block):
                id, type = head.groups()
                data = block[head.end() :]
                if id is not None:
                    self._id = id
            else:
                self._read_block(block, events)
                continue
            if "\n" in data:
                if data.count("\n") != data.count("\ndata: "):
                    self._read_block(block, events)
                    continue
                data = data.replace("\ndata: ", "\n")
            events.append(_new_event(ServerSentEvent, (data, type or "message", self._id, None)))
        if blocks:
            self._last_event_id = self._id or ""
        if unfinished:
            self._read_fields(unfinished[:-1], events)

    def _read_block(self, block: str, events: list[ServerSentEvent]) -> None:
        self._read_fields(block, events)
        self._dispatch(events)

    def _read_fields(self, lines: str, events: list[ServerSentEvent]) -> None:
        for line in lines.split("\n"):
            name, _, value = line.partition(": ")
            if name == "data":
                self._data.append(value)
            elif name == "event":
                self._type = value
            elif name == "id" and "\0" not in value:
                self._id = value
            elif line:
                self._read_unusual_field(line)
            else:
                self._dispatch(events)

    def _read_unusual_field(self, line: str) -> None:
        name, _, value = line.partition(":")
        if not name and self._on_comment is not None:
            self._on_comment(value)
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._type = value
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            self._read_retry(value)

    def _read_retry(self, digits: str) -> None:
        try:
            self._retry = self._reconnection_time = int(digits)
        except ValueError:
            # More digits than Python converts: no client waits for that long, so it is ignored
            # like any other value that cannot be used.
            return

    def _dispatch(self, events: list[ServerSentEvent]) -> None:
        self._last_event_id = self._id or ""
        if self._data:
            data = "\n".join(self._data)
            fields = (data, self._type or "message", self._id, self._retry)
            events.append(_new_event(ServerSentEvent, fields))
            self._data.clear()
        self._type = ""
        self._retry = None
