"""Who gets which event: the contract of every broker."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from .errors import InvalidFieldError
from .event import MAX_EVENT_BYTES, ServerSentEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .channels import ChannelSet
    from .subscription import Subscription

    Encoded = tuple[str | None, str | None, bytes]
    """An event's own id, its key, and its wire, which lacks an id if it has none of its own."""

DEFAULT_CHANNEL = "sse"
"""The channel of those who name none (Flask-SSE's default, so that its users feel at home)."""

MAX_NAME_LENGTH = 255
"""The longest name of a channel, or of anything else that others choose, in characters."""

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
        *,
        key: str | None = None,
    ) -> str:
        """Send an event to the subscribers of one channel or of several.

        :param data: what :class:`ServerSentEvent` takes, or a whole ``ServerSentEvent``, which
            then has the other fields itself.
        :param type: the event type; ``"message"`` by default.
        :param id: an id of your own, which works as a cursor as long as it is unique in the history
            of its channels. By default the broker gives each event one.
        :param retry: the reconnection time in **milliseconds**.
        :param channel: a name or several; a subscriber of two of them gets the event once.
        :param key: what the event is the newest value of, such as the name of a share; 1 to 255
            characters. It takes the place of the event before it with that key in the same
            channel: a client that has not got that one yet, being slow or away, gets only this one.
        :returns: the event's id.
        :raises InvalidFieldError: if a field or a channel's name is not valid, or there is both an
            ``id`` and a key: as a cursor, an id must not be replaced.
        :raises TooLargeError: if the event is larger than ``max_event_bytes``.
        :raises BrokerClosedError: after :meth:`close`.
        """
        event = self._encode(data, type, id, retry, key)
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

    def _encode(
        self, data: Any, type: Any = None, id: Any = None, retry: Any = None, key: Any = None
    ) -> Encoded:
        if not isinstance(data, ServerSentEvent):
            data = ServerSentEvent(data, type, id, retry)
        elif not (type is id is retry is None):
            raise TypeError("publish() got a ServerSentEvent, which has type, id and retry itself")
        event_id = data.id
        if event_id == "":
            hint = "is empty and would make clients forget their cursor; leave it out"
            raise InvalidFieldError("id", "", hint)
        if key is not None:
            _check_key(key, event_id)
        return event_id, key, data.encode(self.max_event_bytes)

    def _append_many(self, names: Sequence[str], events: Sequence[Encoded]) -> list[str]:
        """Number some encoded events, as :meth:`_append` does for each."""
        return [self._append(names, *event) for event in events]

    @abstractmethod
    def _append(self, names: Sequence[str], id: str | None, key: str | None, wire: bytes) -> str:
        """Number an encoded event, keep it, wake who waits for it, and return its id.

        :param names: the channels, checked.
        :param id: the publisher's own id, which is on the wire already; ``None`` if the broker's
            own has to be put there.
        :param key: what it is the newest value of, if anything.
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
        check_name("channel", name)
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


def check_name(field: str, name: object) -> None:
    """Check a name that others choose.

    :param field: whose name it is, for the error.
    :param name: the name.
    :raises InvalidFieldError: if it is not a ``str`` of 1 to 255 characters without control
        characters.
    """
    if not isinstance(name, str):
        raise InvalidFieldError(field, name, "is not a str")
    if not 0 < len(name) <= MAX_NAME_LENGTH:
        hint = f"has {len(name):,} characters; use 1 to {MAX_NAME_LENGTH}"
        raise InvalidFieldError(field, name, hint)
    if not name.isprintable() and _UNFIT_FOR_A_NAME.search(name):
        raise InvalidFieldError(field, name, "has a control character or a surrogate")


def _check_key(key: object, id: str | None) -> None:
    check_name("key", key)
    if id is not None:
        hint = f"goes with an id of the broker's own, and there is id={id!r}; leave one of them out"
        raise InvalidFieldError("key", key, hint)
