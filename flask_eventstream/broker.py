"""Who gets which event: the contract of every broker and of what a subscriber holds."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from . import concurrency
from .errors import InvalidFieldError
from .event import MAX_EVENT_BYTES, ServerSentEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .channels import ChannelSet

    Encoded = tuple[str | None, bytes]
    """An event's own id, and its wire, which lacks the broker's if it has none of its own."""

DEFAULT_CHANNEL = "sse"
"""The channel of those who name none (Flask-SSE's default, so that its users feel at home)."""

MAX_CHANNEL_LENGTH = 255
"""The longest name of a channel, in characters."""

_LONGEST_REQUESTED = 256
_UNFIT_FOR_A_NAME = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class Broker(ABC):
    """Takes events from publishers and holds them ready for subscribers: the contract.

    *Threads.* Every method may be called from any thread and any greenlet, in the request of any
    app or in none.

    *Order.* A broker puts all its events into one sequence. A subscriber gets the events of its
    channels in that order, each once, even if one was published to several of its channels.

    *Cost.* ``publish`` does the same work for one subscriber and for 10,000: it encodes the event,
    appends it, rings a bell, and returns. It never waits for a subscriber and never fails because
    of one.

    *Loss.* Within a subscription nothing is left out. One that falls behind what is kept ends,
    and its client returns with a cursor. A cursor gives exactly what came after it, or a
    ``reset`` event that says that something may be gone: never a hole without a word.

    *Close.* ``close`` ends every subscription after what was published before, and makes
    ``publish`` and ``subscribe`` raise :class:`BrokerClosedError`.

    :param max_event_bytes: the largest event accepted, in bytes on the wire; 1 MiB by default.
    """

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self.max_event_bytes = max_event_bytes

    def publish(
        self,
        data: Any,
        type: str | None = None,
        id: str | int | None = None,
        retry: int | None = None,
        channel: str | Iterable[str] = DEFAULT_CHANNEL,
    ) -> str:
        """Send an event to the subscribers of one channel or of several.

        :param data: what :class:`ServerSentEvent` takes, or a whole ``ServerSentEvent``, which
            then has the other fields itself.
        :param type: the event type; ``"message"`` by default.
        :param id: an id of your own, which works as a cursor as long as it is unique in the history
            of its channels. By default the broker gives each event one.
        :param retry: the reconnection time in **milliseconds**.
        :param channel: a name or several; a subscriber of two of them gets the event once.
        :returns: the event's id.
        :raises InvalidFieldError: if a field or a channel's name is not valid.
        :raises TooLargeError: if the event is larger than ``max_event_bytes``.
        :raises BrokerClosedError: after :meth:`close`.
        """
        event = self._encode(data, type, id, retry)
        return self._append(channel_names(channel), *event)

    def publish_many(
        self, events: Iterable[Any], channel: str | Iterable[str] = DEFAULT_CHANNEL
    ) -> list[str]:
        """Send some events, one after another, at less cost than one by one.

        :param events: of each, what :meth:`publish` takes as ``data``. All are looked at before the
            first one is sent.
        :param channel: a name or several; all events go to all of them.
        :returns: the events' ids.
        :raises EventStreamError: as :meth:`publish`.
        """
        names = channel_names(channel)
        return self._append_many(names, [self._encode(event) for event in events])

    def _encode(self, data: Any, type: Any = None, id: Any = None, retry: Any = None) -> Encoded:
        if not isinstance(data, ServerSentEvent):
            data = ServerSentEvent(data, type, id, retry)
        elif not (type is id is retry is None):
            raise TypeError("publish() got a ServerSentEvent, which has type, id and retry itself")
        if data.id == "":
            hint = "is empty and would make clients forget their cursor; leave it out"
            raise InvalidFieldError("id", "", hint)
        return data.id, data.encode(self.max_event_bytes)

    def _append_many(self, names: Sequence[str], events: Sequence[Encoded]) -> list[str]:
        """Number some encoded events, as :meth:`_append` does for each."""
        return [self._append(names, *event) for event in events]

    @abstractmethod
    def _append(self, names: Sequence[str], id: str | None, wire: bytes) -> str:
        """Number an encoded event, keep it, wake who waits for it, and return its id.

        :param names: the channels, checked.
        :param id: the publisher's own id, which is on the wire already; ``None`` if the broker's
            own has to be put there.
        :param wire: the event.
        """

    @abstractmethod
    def subscribe(
        self, *channels: str, last_event_id: str | None = None, history: int = 0
    ) -> Subscription:
        """Start to receive the events of some channels.

        :param channels: their names; the default channel if there are none.
        :param last_event_id: the cursor of a client that returns: what it missed comes first.
        :param history: for a client without a cursor, how many of the latest events come first.
        :returns: the subscription, which is in force when this returns; close it in the end.
        :raises InvalidFieldError: if a channel's name is not valid.
        :raises BrokerClosedError: after :meth:`close`.
        """

    @abstractmethod
    def watch(self, ring: Callable[[], None]) -> Callable[[], Iterable[ChannelSet]]:
        """Have a function called after every change that a subscriber may have to hear of.

        :param ring: called by whoever publishes, without arguments and from any thread; it has to
            return at once.
        :returns: a function that returns the channel sets with news since it was called last.
        """

    @property
    @abstractmethod
    def subscriptions(self) -> int:
        """How many subscriptions this process has."""

    @abstractmethod
    def last_event_id(self, channel: str = DEFAULT_CHANNEL) -> str:
        """Return the cursor from which a client gets all that is published from now on."""

    @abstractmethod
    def subscriber_count(self, channel: str | None = None) -> int:
        """Return how many subscriptions a channel has, or the whole broker without a channel.

        :raises InvalidFieldError: if the channel's name is not valid.
        """

    @abstractmethod
    def channels(self) -> dict[str, int]:
        """Return the channels that are read, and how many subscriptions each has.

        :raises BrokerUnavailableError: if the broker is a server that does not answer.
        """

    @abstractmethod
    def ping(self) -> float:
        """Ask the broker's server for an answer, and return how long it took, in seconds.

        :returns: 0 if there is no server.
        :raises BrokerUnavailableError: if it does not answer in time, or refuses.
        """

    @abstractmethod
    def disconnect(self, channel: str) -> int:
        """End every subscription that reads a channel, and return how many there were.

        They still get what was published before, and nothing after.

        :raises InvalidFieldError: if the channel's name is not valid.
        """

    @abstractmethod
    def close(self) -> None:
        """End every subscription and accept nothing more."""


class Subscription:
    """What one subscriber still has to get.

    It holds a position in the broker's sequence and no events: what is pending is read from the
    history that all subscribers share, so a slow one costs no memory of its own.

    :param channel_set: the channels.
    :param position: the place in the broker's sequence from which on events are taken.
    :param start: what the client has to get first, as bytes: what it missed, or a ``reset`` and
        what history still has. The events that :meth:`take` returns come after it.
    :param resumed: whether it continues right after the cursor it was opened with. If not, the
        client's picture has to be drawn anew: on a first connect, or after a ``reset``.
    """

    __slots__ = (
        "_is_closed",
        "_is_hurried",
        "_ready",
        "channel_set",
        "position",
        "resumed",
        "start",
    )

    def __init__(self, channel_set: ChannelSet, position: int, start: bytes, resumed: bool) -> None:
        self.channel_set = channel_set
        self.position = position
        self.start = start
        self.resumed = resumed
        self._is_closed = self._is_hurried = False
        # Only who waits needs one; it is larger than all the rest.
        self._ready: concurrency.Event | None = None

    @property
    def channels(self) -> tuple[str, ...]:
        """The names of the channels."""
        return self.channel_set.names

    @property
    def cursor(self) -> str:
        """The cursor of what was taken so far, :attr:`start` included."""
        return self.channel_set.owner.mint(self.position)

    def take(self, timeout: float) -> bytes | None:
        """Wait for events and return all that are pending, joined.

        One thread or greenlet at a time may call it.

        :param timeout: how long to wait for the first one, in seconds; 0 does not wait.
        :returns: whole events as bytes; ``b""`` if there was none in time; ``None`` once the
            subscription has ended: it was closed or disconnected, the broker was closed, or it fell
            behind what the broker keeps.
        """
        deadline = time.monotonic() + timeout
        if self._ready is None:
            self._ready = concurrency.new_event()
        self.channel_set.owner.settle()
        waiting = self.channel_set.waiting
        waiting.add(self._ready)
        try:
            return self._take(self._ready, deadline)
        finally:
            waiting.discard(self._ready)

    def _take(self, ready: concurrency.Event, deadline: float) -> bytes | None:
        while True:
            ready.clear()
            found = None if self._is_closed else self.channel_set.read(self.position)
            if found is None:
                return None
            wire, self.position = found
            if not wire and self.position == self.channel_set.end:
                continue
            remaining = deadline - time.monotonic()
            if wire or remaining <= 0 or self._is_hurried:
                return wire
            self.channel_set.owner.wait(ready, remaining)

    def hurry(self) -> None:
        """Have :meth:`take` wait for nothing any more, also one that waits in another thread."""
        self._is_hurried = True
        if self._ready is not None:
            self._ready.set()

    def close(self) -> None:
        """End the subscription. It may be called from anywhere and more than once.

        A ``take`` that waits in another thread returns at once.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self.channel_set.leave()
        if self._ready is not None:
            self._ready.set()

    def __del__(self) -> None:
        # A response that is dropped before any server iterates or closes it (an after_request
        # function raised) must not stay subscribed for ever.
        self.close()


def channel_names(channel: str | Iterable[str]) -> tuple[str, ...]:
    """Return the names of one channel or of several, each once, in order.

    :raises InvalidFieldError: if there is none, or one is not a ``str`` of 1 to 255 characters
        without control characters.
    """
    try:
        names = (channel,) if isinstance(channel, str) else tuple(dict.fromkeys(channel))
    except TypeError as error:
        hint = "is neither a str nor several"
        raise InvalidFieldError("channel", channel, hint) from error
    if not names:
        raise InvalidFieldError("channel", names, "names no channel; give at least one")
    for name in names:
        _check_channel_name(name)
    return names


def encode_reset(requested: str, earliest: str | None, position: str) -> bytes:
    """Return the event that tells a client that something may be gone.

    :param requested: the cursor that the client came with, of which 256 characters are shown.
    :param earliest: the id of the earliest event that it can still get, if any.
    :param position: a cursor from which that event comes next. It is the event's id: who loses the
        connection right after it has been told, and gets what history still has.
    """
    evidence = {"requested": requested[:_LONGEST_REQUESTED], "earliest": earliest}
    return ServerSentEvent(evidence, "reset", position).encode()


def _check_channel_name(name: str) -> None:
    if not isinstance(name, str):
        raise InvalidFieldError("channel", name, "is not a str")
    if not 0 < len(name) <= MAX_CHANNEL_LENGTH:
        hint = f"has {len(name):,} characters; use 1 to {MAX_CHANNEL_LENGTH}"
        raise InvalidFieldError("channel", name, hint)
    if not name.isprintable() and _UNFIT_FOR_A_NAME.search(name):
        raise InvalidFieldError("channel", name, "has a control character or a surrogate")
