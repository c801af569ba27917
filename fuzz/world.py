"""A broker in memory, and a naive model of it that remembers all events there ever were."""

from __future__ import annotations

import json
import re
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from flask import Flask
from werkzeug.exceptions import NotFound

from flask_eventstream import EventStreamParser, ServerSentEvent
from flask_eventstream.errors import InvalidFieldError
from flask_eventstream.memory_broker import MemoryBroker
from flask_eventstream.response import cursor as cursor_of_request
from flask_eventstream.resumable import _number_of_last
from flask_eventstream.run_log import rest_of
from flask_eventstream.run_registry import ACTIVE, Standing

if TYPE_CHECKING:
    from flask_eventstream.subscription import Subscription

CHANNELS = ("a", "b", "c", "ab", "abc", "ca")
ROADS = ("header", "query", "no request")
RUN = "5eed"
MAX_RUN_BYTES = 1200
MINTED = re.compile("([0-9a-f]+)-([0-9]{1,19})")
OF_RUN = re.compile(rf"{RUN}\.([0-9]{{1,19}})")
UNFIT = re.compile("[\r\n\0\ud800-\udfff]")
_app = Flask(__name__)


class Published(NamedTuple):
    """An event as the model has it."""

    seq: int
    time: float
    channels: str
    id: str | None


class Clock:
    """A clock that a case moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@cache
def _broker(kind: type[MemoryBroker], size: int, seconds: int) -> tuple[MemoryBroker, Clock]:
    # One for all cases: a broker leaves a hook behind, for processes that are forked.
    clock = Clock()
    options: Any = {"history": size, "history_seconds": seconds, "max_run_bytes": MAX_RUN_BYTES}
    return kind(**options, clock=clock), clock


class World:
    """A broker, and a naive model of it: all events there ever were."""

    def __init__(self, size: int, seconds: int) -> None:
        self._size = size
        self._seconds = seconds
        self._broker, self._clock = _broker(MemoryBroker, size, seconds)
        # As in a child that is forked: a new epoch, and nothing in the books.
        self._broker._start()
        self._epoch = self._broker.mint(0).partition("-")[0]
        self._events: list[Published] = []
        self._last = 0
        self._open: list[tuple[str, Subscription, int]] = []

    # What happens

    def do_publish(self, place: int, own_id: str | None) -> None:
        """Publish an event, whose data is its number."""
        channels = CHANNELS[place]
        id = None if own_id is None else self._filled_in(own_id)
        is_refused = id is not None and (not id or self._minted(id) is not None or UNFIT.search(id))
        try:
            found = self._broker.publish(str(self._last + 1), id=id, channel=tuple(channels))
        except InvalidFieldError:
            assert is_refused, id
            return
        assert not is_refused, id
        self._last += 1
        assert found == (f"{self._epoch}-{self._last}" if id is None else id)
        self._events.append(Published(self._last, self._clock.now, channels, id))

    def do_wait(self, seconds: int) -> None:
        """Let time pass."""
        self._clock.now += seconds

    def do_return(self, place: int, cursor: bytes, road: int, history: int) -> None:
        """Subscribe, as one who returns; who comes without a cursor is there for the first time."""
        channels = CHANNELS[place]
        text = self._received(cursor, road)
        subscription = self._broker.subscribe(*channels, last_event_id=text, history=history)
        self._open.append((channels, subscription, self._last))
        found = read(subscription.start)
        if not text:
            promised = self._promised(channels)
            assert not subscription.resumed
            self._compare(found, promised[-history:] if history > 0 else [])
        elif subscription.resumed:
            self._check_resumed(channels, text, found)
        else:
            self._check_reset(channels, text, found)

    def do_take(self) -> None:
        """Let all who are subscribed take what has come."""
        still: list[tuple[str, Subscription, int]] = []
        for channels, subscription, position in self._open:
            wire = subscription.take(0)
            missed = self._after(channels, position)
            if wire is None:
                assert set(missed) - set(self._promised(channels)), "ended, and nothing was gone"
                continue
            self._compare(read(wire), missed)
            still.append((channels, subscription, self._last))
        self._open = still

    def do_leave(self) -> None:
        """Let all who are subscribed leave."""
        for _, subscription, _ in self._open:
            subscription.close()
        self._open.clear()

    def do_run(self, texts: list[str], cursor: bytes, road: int) -> None:
        """Return to a run that has written some texts."""
        written = [ServerSentEvent(each, id=f"{RUN}.{n}") for n, each in enumerate(texts, 1)]
        self._broker.forget_log(RUN)
        for event in written:
            self._broker.write_log(RUN, event.encode())
            self._last += 1
        left = self._read_log(len(texts))
        assert left == [_as_read(event) for event in written[len(written) - len(left) :]]
        self._check_run(texts, left, cursor, road)

    def _read_log(self, last: int, *begin: Any) -> list[ServerSentEvent]:
        subscription = self._broker.subscribe_log(RUN, last, *begin)
        events = read(subscription.start + (subscription.take(0) or b""))
        subscription.close()
        return events

    def _check_run(
        self, texts: list[str], left: list[ServerSentEvent], cursor: bytes, road: int
    ) -> None:
        standing = Standing(RUN, ACTIVE, len(texts))
        text = self._received(cursor, road) or ""
        match = OF_RUN.fullmatch(text)
        number = int(match[1]) if match else 0
        is_known = "." not in text or (match is not None and number <= len(texts))
        try:
            with _app.request_context(self._environ(cursor, road)):
                found = _number_of_last(standing)
        except NotFound:
            assert not is_known, text
            return
        assert is_known, text
        assert found == number
        events = self._read_log(len(texts), partial(rest_of, standing, number, text))
        first = len(texts) - len(left) + 1
        if number + 1 < first:
            reset, *events = events
            assert (reset.type, reset.id) == ("reset", f"{RUN}.{first - 1}")
            evidence = {"requested": text[:256], "earliest": f"{RUN}.{first}"}
            assert json.loads(reset.data) == evidence, (reset, evidence)
            assert events == left
        else:
            assert events == left[number + 1 - first :]

    # What has to come of it

    def _check_resumed(self, channels: str, text: str, found: list[ServerSentEvent]) -> None:
        of_own_id = {one.seq for one in self._promised(channels) if one.id == text}
        assert len(of_own_id) < 2, f"{text!r} names {of_own_id}"
        after = [self._after(channels, seq) for seq in self._positions(channels, text)]
        numbers = [event.data for event in found]
        assert numbers in [[str(one.seq) for one in each] for each in after], (numbers, after)
        self._compare(found, after[[len(each) for each in after].index(len(found))])

    def _check_reset(self, channels: str, text: str, found: list[ServerSentEvent]) -> None:
        assert not self._is_certain(channels, text), f"a reset of {text!r}; nothing was gone"
        promised = self._promised(channels)
        reset, *left = found
        earliest = self._id_of(promised[0]) if promised else None
        assert reset.type == "reset"
        evidence = {"requested": text[:256], "earliest": earliest}
        assert json.loads(reset.data) == evidence, (reset, evidence)
        self._compare(left, promised)
        with_its_id = self._broker.subscribe(*channels, last_event_id=reset.id)
        again = [event for event in read(with_its_id.start) if event.type != "reset"]
        with_its_id.close()
        self._compare(again, promised)

    def _is_certain(self, channels: str, text: str) -> bool:
        """Tell whether one event is named, and nothing that came after it can be gone."""
        positions = self._positions(channels, text)
        if len(positions) != 1:
            return False
        promised = self._promised(channels)
        gone = [one.seq for one in self._events if not self._is_promised(one)]
        is_kept = self._minted(text) is not None or any(one.id == text for one in promised)
        return is_kept and positions[0] >= max(gone, default=0)

    def _is_promised(self, event: Published) -> bool:
        return all(event in self._promised(channel) for channel in event.channels)

    def _positions(self, channels: str, text: str) -> list[int]:
        minted = self._minted(text)
        if minted is not None:
            return [minted] if minted <= self._last else []
        return [one.seq for one in self._after(channels, 0) if one.id == text]

    def _minted(self, text: str) -> int | None:
        match = MINTED.fullmatch(text)
        return int(match[2]) if match and match[1] == self._epoch else None

    def _after(self, channels: str, seq: int) -> list[Published]:
        return [one for one in self._events if one.seq > seq and set(one.channels) & set(channels)]

    def _promised(self, channels: str) -> list[Published]:
        """Return what a client can get that returns now: so many of each channel, so young."""
        found = set()
        for channel in channels:
            newest = self._after(channel, 0)[-self._size :] if self._size else []
            found |= {one for one in newest if self._clock.now - one.time <= self._seconds}
        return sorted(found)

    def _compare(self, found: list[ServerSentEvent], expected: list[Published]) -> None:
        assert [(event.data, event.id) for event in found] == [
            (str(one.seq), self._id_of(one)) for one in expected
        ]

    def _id_of(self, event: Published) -> str:
        return f"{self._epoch}-{event.seq}" if event.id is None else event.id

    # How a cursor comes

    def _filled_in(self, text: str) -> str:
        return text.replace("{epoch}", self._epoch).replace("{run}", RUN)

    def _received(self, cursor: bytes, road: int) -> str | None:
        text = self._filled_in(cursor.decode("utf-8", "replace"))
        if ROADS[road] == "no request":
            return text
        with _app.request_context(self._environ(cursor, road)):
            found = cursor_of_request()
        # Of what is no UTF-8 in a query, Werkzeug leaves the escapes.
        if ROADS[road] == "header" or _is_utf_8(cursor):
            assert (found or "") == text, (found, text)
        return found

    def _environ(self, cursor: bytes, road: int) -> dict[str, str]:
        wire = cursor.replace(b"{epoch}", self._epoch.encode()).replace(b"{run}", RUN.encode())
        carried = {"QUERY_STRING": f"lastEventId={quote(wire)}"}
        if ROADS[road] == "header":
            # As WSGI has it (PEP 3333).
            carried = {"QUERY_STRING": "", "HTTP_LAST_EVENT_ID": wire.decode("latin-1")}
        return {**_ENVIRON, **carried}


_ENVIRON = {
    "REQUEST_METHOD": "GET", "PATH_INFO": "/", "SCRIPT_NAME": "", "SERVER_NAME": "localhost",
    "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1", "wsgi.url_scheme": "http",
}  # fmt: skip


def _is_utf_8(wire: bytes) -> bool:
    return wire.decode("utf-8", "replace").encode() == wire


def read(wire: bytes) -> list[ServerSentEvent]:
    """Return the events of a whole stream."""
    return EventStreamParser().feed(wire)


def _as_read(event: ServerSentEvent) -> ServerSentEvent:
    return read(event.encode())[0]
