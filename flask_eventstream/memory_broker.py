"""The broker of one process: publishers and subscribers are its threads and greenlets."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict, deque
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakSet

from . import concurrency
from .broker import DEFAULT_CHANNEL, Broker, Subscription, channel_names, encode_reset
from .errors import BrokerClosedError, InvalidFieldError
from .event import MAX_EVENT_BYTES
from .history import Entry, History, in_order, joined

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_TAIL_EVENTS = 4
_SWEPT_AT_ONCE = 16


class _Channel:
    __slots__ = ("history", "name", "subscriptions", "touched")

    def __init__(self, name: str, history: History, now: float) -> None:
        self.name = name
        self.history = history
        self.touched = now
        # Weak, so that a response that is dropped before any server iterates or closes it (an
        # after_request function raised) does not stay subscribed for ever.
        self.subscriptions: WeakSet[_MemorySubscription] = WeakSet()


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
        self._history_seconds = history_seconds
        tail_bytes = _TAIL_EVENTS * max_event_bytes
        self._new_history = partial(History, history, history_seconds, tail_bytes, max_lag)
        self._clock = clock
        self._is_closed = False
        self._start()
        concurrency.call_after_fork(self._start)

    def _start(self) -> None:
        # Once more in every forked child: with its parent's sequence it would give other events
        # the same ids. So it starts anew, with an epoch of its own, and a mutex that is free.
        self._mutex = concurrency.new_mutex()
        self._epoch = secrets.token_hex(4)
        self._seq = 0
        self._forgotten = 0
        # In the order in which they were last touched, so that what has expired is found in front.
        self._channels: OrderedDict[str, _Channel] = OrderedDict()
        self._subscriptions: WeakSet[_MemorySubscription] = WeakSet()
        self._leaving: deque[_MemorySubscription] = deque()
        self._stirred: set[_Channel] = set()
        self.waker = concurrency.Waker(self._wake_stirred)

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
            self._keep(names, Entry(self._seq, now, id, before_id + after_id))
            self._sweep(now)
            somebody_waits = bool(self._stirred)
        if somebody_waits:
            self.waker.ring()
        return event_id

    def _keep(self, names: Sequence[str], entry: Entry) -> None:
        for name in names:
            channel = self._touch(name, entry.time)
            has_subscribers = bool(channel.subscriptions)
            channel.history.append(entry, keep_tail=has_subscribers)
            if has_subscribers:
                self._stirred.add(channel)

    def _touch(self, name: str, now: float) -> _Channel:
        channel = self._channels.get(name)
        if channel is None:
            channel = _Channel(name, self._new_history(self._forgotten), now)
            self._channels[name] = channel
        channel.touched = now
        self._channels.move_to_end(name)
        return channel

    def subscribe(
        self, *channels: str, last_event_id: str | None = None, history: int = 0
    ) -> Subscription:
        """Start to receive; see :meth:`Broker.subscribe`."""
        names = channel_names(channels or DEFAULT_CHANNEL)
        with self._mutex:
            self._check_open()
            now = self._clock()
            self._remove_leaving()
            self._sweep(now)
            read = [self._touch(name, now) for name in names]
            start, resumed = self._replay(read, last_event_id, history, now)
            subscription = _MemorySubscription(self, read, self._seq, start, resumed)
            self._subscriptions.add(subscription)
            for channel in read:
                channel.subscriptions.add(subscription)
        # Should the waker be about to end, for want of subscribers, this keeps it.
        self.waker.ring()
        return subscription

    def _replay(
        self, channels: list[_Channel], cursor: str | None, history: int, now: float
    ) -> tuple[bytes, bool]:
        kept = [channel.history for channel in channels]
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

    def subscriber_count(self, channel: str | None = None) -> int:
        """Return how many subscriptions there are; see :meth:`Broker.subscriber_count`."""
        with self._mutex:
            self._remove_leaving()
            if channel is None:
                return len(self._subscriptions)
            found = self._channels.get(channel)
            return len(found.subscriptions) if found else 0

    def disconnect(self, channel: str) -> int:
        """End every subscription of a channel; see :meth:`Broker.disconnect`."""
        with self._mutex:
            self._remove_leaving()
            found = self._channels.get(channel)
            return self._end(found.subscriptions) if found else 0

    def close(self) -> None:
        """End every subscription; see :meth:`Broker.close`."""
        with self._mutex:
            self._is_closed = True
            self._end(self._subscriptions)

    def _check_open(self) -> None:
        if self._is_closed:
            raise BrokerClosedError

    def _end(self, subscriptions: WeakSet[_MemorySubscription]) -> int:
        for subscription in subscriptions:
            if subscription.end is None:
                subscription.end = self._seq
            subscription.wake()
        return len(subscriptions)

    def _sweep(self, now: float) -> None:
        # A bounded number at a time: a million channels that expire together must not make one
        # publisher wait for all of them.
        for _ in range(_SWEPT_AT_ONCE):
            channel = next(iter(self._channels.values()), None)
            if channel is None or now - channel.touched <= self._history_seconds:
                return
            channel.history.trim(now, keep_tail=bool(channel.subscriptions))
            channel.touched = now
            self._channels.move_to_end(channel.name)
            self._forget_if_idle(channel)

    def _forget_if_idle(self, channel: _Channel) -> None:
        if not channel.history and not channel.subscriptions:
            self._forgotten = max(self._forgotten, channel.history.dropped)
            self._channels.pop(channel.name, None)
            self._stirred.discard(channel)

    def leave(self, subscription: _MemorySubscription) -> None:
        """Take a subscription off the books, at once or with the next call."""
        # Not simply under the mutex: the garbage collector may close a stream at any point, also
        # while this very thread holds the mutex. Then the next one who gets it removes it.
        self._leaving.append(subscription)
        if self._mutex.acquire(blocking=False):
            try:
                self._remove_leaving()
            finally:
                self._mutex.release()

    def _remove_leaving(self) -> None:
        while self._leaving:
            subscription = self._leaving.popleft()
            self._subscriptions.discard(subscription)
            for channel in subscription.read:
                channel.subscriptions.discard(subscription)
                channel.history.trim(self._clock(), keep_tail=bool(channel.subscriptions))
                self._forget_if_idle(channel)
        if not self._subscriptions:
            self.waker.ring()

    def collect(self, subscription: _MemorySubscription) -> list[Entry] | None:
        """Return what a subscription has to get now, or ``None`` once it has ended."""
        with self._mutex:
            position = subscription.position
            end = self._seq if subscription.end is None else subscription.end
            if any(channel.history.dropped > position for channel in subscription.read):
                return None
            found = in_order(channel.history.after(position) for channel in subscription.read)
            subscription.position = max(position, end)
            if not found:
                self._sweep(self._clock())
        found = [entry for entry in found if entry.seq <= end]
        return found if found or subscription.end is None else None

    def _wake_stirred(self) -> bool:
        # One thread or greenlet for the whole broker, as long as somebody is subscribed. It walks
        # through the subscribers, so that publish() does not have to.
        with self._mutex:
            waiting = [one for channel in self._stirred for one in channel.subscriptions]
            self._stirred.clear()
            somebody_is_left = bool(self._subscriptions)
        for subscription in waiting:
            subscription.wake()
        return somebody_is_left


class _MemorySubscription(Subscription):
    __slots__ = ("__weakref__", "_broker", "_is_closed", "_ready", "end", "position", "read")

    def __init__(
        self,
        broker: MemoryBroker,
        read: list[_Channel],
        position: int,
        start: bytes,
        resumed: bool,
    ) -> None:
        super().__init__(tuple(channel.name for channel in read), start, resumed)
        self.read = read
        self.position = position
        self.end: int | None = None
        self._broker = broker
        self._is_closed = False
        self._ready = concurrency.new_event()

    @property
    def cursor(self) -> str:
        return self._broker.mint(self.position)

    def take(self, timeout: float) -> bytes | None:
        deadline = time.monotonic() + timeout
        while True:
            self._ready.clear()
            entries = None if self._is_closed else self._broker.collect(self)
            if entries is None:
                return None
            remaining = deadline - time.monotonic()
            if entries or remaining <= 0:
                return joined(entries)
            self._broker.waker.start()
            self._ready.wait(remaining)

    def wake(self) -> None:
        self._ready.set()

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._broker.leave(self)
            self._ready.set()
