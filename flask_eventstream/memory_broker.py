"""The broker of one process: publishers and subscribers are its threads and greenlets."""

from __future__ import annotations

import secrets
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from . import concurrency
from .broker import DEFAULT_CHANNEL, Broker, Subscription, channel_names, encode_reset
from .channels import Channels, ChannelSet, read
from .errors import BrokerClosedError, InvalidFieldError
from .event import MAX_EVENT_BYTES
from .history import Entry, History, in_order, joined

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_TAIL_EVENTS = 4


class MemoryBroker(Broker):
    """A broker for one process: publishers and subscribers are its threads and greenlets.

    :param history: how many events of a channel are kept for clients that return; 256 by default.
    :param history_seconds: and for how long, in seconds; 300 by default.
    :param max_event_bytes: the largest event accepted, in bytes on the wire; 1 MiB by default.
    :param max_lag: for how many seconds events beyond ``history`` are kept for subscribers that are
        connected; 30 by default.
    :param clock: a clock in seconds that never goes back; :func:`time.monotonic` by default.

    What is kept beyond ``history`` is at most four times ``max_event_bytes`` for each channel. A
    channel without subscribers and without events in its history is forgotten.

    >>> broker = MemoryBroker()
    >>> subscription = broker.subscribe("news")
    >>> id = broker.publish("Hello!", channel="news")
    >>> subscription.take(timeout=1) == f"id: {id}\\ndata: Hello!\\n\\n".encode()
    True
    >>> subscription.close()
    """

    def __init__(
        self,
        *,
        history: int = 256,
        history_seconds: float = 300,
        max_event_bytes: int = MAX_EVENT_BYTES,
        max_lag: float = 30,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(max_event_bytes=max_event_bytes)
        tail_bytes = _TAIL_EVENTS * max_event_bytes
        new_history = partial(History, history, history_seconds, tail_bytes, max_lag)
        self._new_channels = partial(Channels, new_history, history_seconds)
        self._clock = clock
        self._is_closed = False
        self._rings: list[Callable[[], None]] = []
        self._start()
        self._waiting = self.watch(self._ring_waker)
        concurrency.call_after_fork(self._start)

    def _start(self) -> None:
        # Once more in every forked child: with its parent's sequence it would give other events
        # the same ids. So it starts anew, with an epoch of its own, and a mutex that is free.
        self._mutex = concurrency.new_mutex()
        self._epoch = secrets.token_hex(4)
        self._seq = 0
        self._channels = self._new_channels()
        self._watches = [self._channels.watch(ring) for ring in self._rings]
        self._leaving: deque[ChannelSet] = deque()
        self._waker = concurrency.Waker(self._wake_waiting)

    def _append(
        self, names: Sequence[str], id: str | None, before_id: bytes, after_id: bytes
    ) -> str:
        with self._mutex:
            self._check_open()
            if id is not None and self._seq_of_minted(id) is not None:
                hint = "has the form of this broker's own ids; choose another, or leave it out"
                raise InvalidFieldError("id", id, hint)
            now = self._clock()
            self._seq += 1
            event_id = id
            if event_id is None:
                event_id = self.mint(self._seq)
                after_id = b"id: %b\n%b" % (event_id.encode(), after_id)
            is_read = self._channels.append(names, Entry(self._seq, now, id, before_id + after_id))
            self._channels.sweep(now)
        if is_read:
            self._channels.ring()
        return event_id

    def subscribe(
        self, *channels: str, last_event_id: str | None = None, history: int = 0
    ) -> Subscription:
        """Start to receive; see :meth:`Broker.subscribe`."""
        names = channel_names(channels or DEFAULT_CHANNEL)
        with self._mutex:
            self._check_open()
            now = self._clock()
            self._remove_leaving()
            self._channels.sweep(now)
            read = [self._channels.touch(name, now) for name in names]
            kept = [channel.history for channel in read]
            start, resumed = self._replay(kept, last_event_id, history, now)
            channel_set = self._channels.join(self, read)
            subscription = Subscription(channel_set, self._seq, start, resumed)
        # Should the waker be about to end, for want of subscribers, this keeps it.
        self._waker.ring()
        return subscription

    def _replay(
        self, kept: list[History], cursor: str | None, history: int, now: float
    ) -> tuple[bytes, bool]:
        if not cursor:
            newest = in_order(one.replayable(now) for one in kept)[-history:] if history > 0 else []
            return joined(newest), False
        seq = self._seq_of(cursor, kept)
        if seq is not None and max(one.complete_since(now) for one in kept) <= seq <= self._seq:
            return joined(in_order(one.after(seq) for one in kept)), True
        left = in_order(one.replayable(now) for one in kept)
        earliest = (left[0].id or self.mint(left[0].seq)) if left else None
        position = left[0].seq - 1 if left else self._seq
        return encode_reset(cursor, earliest, self.mint(position)) + joined(left), False

    def _seq_of(self, cursor: str, kept: list[History]) -> int | None:
        minted = self._seq_of_minted(cursor)
        if minted is not None:
            return minted
        found = {seq for history in kept for seq in history.positions(cursor)}
        # An id that was given to two events does not tell which of them the client saw last.
        return found.pop() if len(found) == 1 else None

    def _seq_of_minted(self, id: str) -> int | None:
        epoch, _, seq = id.partition("-")
        if epoch != self._epoch or not (seq.isascii() and seq.isdigit() and len(seq) < 20):
            return None
        return int(seq)

    def mint(self, seq: int) -> str:
        """Return the id, and the cursor, of a place in the sequence."""
        return f"{self._epoch}-{seq}"

    def last_event_id(self, channel: str = DEFAULT_CHANNEL) -> str:
        """Return the current cursor, which is the same for all channels."""
        channel_names(channel)
        with self._mutex:
            return self.mint(self._seq)

    @property
    def subscriptions(self) -> int:
        """How many subscriptions there are."""
        with self._mutex:
            self._remove_leaving()
            return self._channels.subscriptions

    def subscriber_count(self, channel: str | None = None) -> int:
        """Return how many subscriptions there are; see :meth:`Broker.subscriber_count`."""
        if channel is None:
            return self.subscriptions
        with self._mutex:
            self._remove_leaving()
            found = self._channels.get(channel)
            return sum(one.size for one in found.sets) if found else 0

    def disconnect(self, channel: str) -> int:
        """End every subscription of a channel; see :meth:`Broker.disconnect`."""
        with self._mutex:
            self._remove_leaving()
            found = self._channels.get(channel)
            ended = self._channels.end(found.sets, self._seq) if found else 0
        self._channels.ring()
        return ended

    def close(self) -> None:
        """End every subscription; see :meth:`Broker.close`."""
        with self._mutex:
            self._is_closed = True
            self._channels.end_all(self._seq)
        self._channels.ring()

    def watch(self, ring: Callable[[], None]) -> Callable[[], set[ChannelSet]]:
        """Have a function called after every change; see :meth:`Broker.watch`."""
        number = len(self._rings)
        self._rings.append(ring)
        self._watches.append(self._channels.watch(ring))
        return partial(self._news, number)

    def _news(self, number: int) -> set[ChannelSet]:
        with self._mutex:
            self._remove_leaving()
            self._channels.sweep(self._clock())
            return self._channels.news(self._watches[number])

    def _check_open(self) -> None:
        if self._is_closed:
            raise BrokerClosedError

    def leave(self, channel_set: ChannelSet) -> None:
        """Take a subscription off the books, at once or with the next call."""
        # Not simply under the mutex: the garbage collector may close a stream at any point, also
        # while this very thread holds the mutex. Then the next one who gets it removes it.
        self._leaving.append(channel_set)
        if self._mutex.acquire(blocking=False):
            try:
                self._remove_leaving()
            finally:
                self._mutex.release()

    def _remove_leaving(self) -> None:
        while self._leaving:
            self._channels.leave(self._leaving.popleft(), self._clock())
            if not self._channels.subscriptions:
                self._waker.ring()

    def read(
        self, channel_set: ChannelSet, after: int, until: int | None, max_bytes: int | None
    ) -> tuple[bytes, int] | None:
        """Return events of a channel set; see :meth:`ChannelSet.read`."""
        with self._mutex:
            last = self._seq if until is None else until
            found = read(channel_set, after, last, max_bytes)
            if not (found and found[0]):
                self._channels.sweep(self._clock())
        return found and (joined(found[0]), found[1])

    def wait(self, ready: concurrency.Event, timeout: float) -> None:
        """Wait for an event that is set when there may be news (seconds)."""
        self._waker.start()
        ready.wait(timeout)

    def _ring_waker(self) -> None:
        self._waker.ring()

    def _wake_waiting(self) -> bool:
        # One thread or greenlet for all who wait on one of their own, as long as somebody is
        # subscribed. It walks through them, so that publish() does not have to.
        for channel_set in self._waiting():
            for ready in tuple(channel_set.waiting):
                ready.set()
        return bool(self._channels.subscriptions)
