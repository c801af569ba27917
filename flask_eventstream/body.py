"""The body of a subscriber's response: one thread or greenlet waits for each subscriber.

It sees bytes, and knows neither Flask nor events.
"""

from __future__ import annotations

import math
import random
import time
from typing import TYPE_CHECKING, Protocol

from . import endings
from .event import HEARTBEAT
from .members import patience
from .subscription import FRAME_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .members import Stay
    from .places import Place
    from .shutdown import Shutdown
    from .subscription import Subscription
    from .threads import Threads


_PROBE_SECONDS = 1.0
_PIECE_BYTES = 16 * 1024
"""The size of the first item: a server that is about to lose its socket must not wait."""
_UNREAD_BYTES = 64 * 1024
"""How much is sent at once although the client reads none of it: the least that machines hold."""


class Keeper(Protocol):
    """Who is told of the bodies that wait, of what they send, and of their end."""

    shutdown: Shutdown

    def connected(self, start: bytes) -> int:
        """Count a body, by what it starts with, and return its number."""

    def delivered(self, wire: bytes) -> None:
        """Count events that a server has taken for one subscriber."""

    def replayed(self, wire: bytes) -> None:
        """Count what history had for a subscriber besides what its stream starts with."""

    def closed(self, body: SubscriptionBody) -> None:
        """Take note, once, that a body is closed and its subscription off the books."""


class SubscriptionBody:
    """The body of a subscriber's response: waits for events in the thread that serves it.

    It holds no context of a request or app, which would pin what such contexts hold (a database
    connection) for as long as the client stays.

    :param subscription: what the client has to get.
    :param start: the first bytes, sent at once.
    :param heartbeat: the longest silence, in seconds.
    :param max_lifetime: after how many seconds it ends, jittered by 20 %; ``None`` for never.
    :param keeper: who is told of it.
    :param place: released at the end, if given.
    :ivar subscription: what the client has to get.
    :ivar deadline: when it ends at the latest, by :func:`time.monotonic`.
    :ivar number: which one of the process it is.
    :ivar begun: when it was made, by :func:`time.monotonic`.
    :ivar reason: why it has ended, see :mod:`endings`.
    :ivar threads: what has the server's threads, if it may not wait in any number of them.
    :ivar stay: that its client is present; ``None`` if it only reads.
    """

    # Only one of the roads needs more than these, and there may be many thousands of it.
    __slots__ = (
        "__weakref__",
        "_finish",
        "_first",
        "_heartbeat",
        "_is_last",
        "_is_open",
        "_keeper",
        "_place",
        "_room",
        "_silence",
        "_start",
        "begun",
        "deadline",
        "number",
        "reason",
        "stay",
        "subscription",
        "threads",
    )

    def __init__(
        self,
        subscription: Subscription,
        start: bytes,
        heartbeat: float,
        max_lifetime: float | None,
        keeper: Keeper,
        place: Place | None = None,
    ) -> None:
        self.subscription = subscription
        self.number = keeper.connected(start)
        self.begun = time.monotonic()
        self.deadline = math.inf if max_lifetime is None else self.begun + jittered(max_lifetime)
        self.reason = endings.LEFT
        self._first, self._start = start[:_PIECE_BYTES], start[_PIECE_BYTES:]
        self._heartbeat = heartbeat
        self._silence: Silence | None = None
        self._keeper = keeper
        if subscription.replay is not None:
            subscription.replay.count = keeper.replayed
        self._room = _UNREAD_BYTES - len(self._first)
        self._is_last = False
        self._is_open = True
        self._finish: Callable[[], None] | None = None
        self._place = place
        self.stay: Stay | None = None
        self.threads: Threads | None = None
        if place is not None:
            place.keep_for(self)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._first:
            first, self._first = self._first, b""
            return first
        if self._silence is None:
            self._silence = Silence(self._heartbeat)
            if self.threads is None or self.threads.take(self):
                self._keeper.shutdown.enter(self)
            else:
                self.reason = endings.REFUSED
        if self.threads is not None and self.reason == endings.REFUSED:
            return self._next_without_thread(self.threads)
        if self._start:
            return self.take_start()
        return self._next(self._silence)

    def _next(self, silence: Silence) -> bytes:
        pause = min(silence.pause, self.deadline - time.monotonic())
        is_replay = self.subscription.replay is not None
        # What history has besides may be much, and the client returns for it.
        is_over = pause <= 0 or (is_replay and self.reason == endings.STOPPED)
        events = None if is_over else self.subscription.take(pause, FRAME_BYTES)
        if events is None or (not events and self.reason == endings.STOPPED):
            return self._last_bytes(is_late=pause <= 0)
        if events and not is_replay:
            self._keeper.delivered(events)
        return silence.broken_by(events or HEARTBEAT)

    def _next_without_thread(self, threads: Threads) -> bytes:
        # What there is: the client returns for more, and maybe a thread is free then.
        is_new = not self._start and self.subscription.replay is None
        item = self.take_start() or (
            None if self._is_last else self.subscription.take(0, FRAME_BYTES)
        )
        self._is_last = is_new
        if not item or not (self._has_room(item) or threads.lend(self)):
            return self._last_bytes(is_late=False)
        if is_new:
            self._keeper.delivered(item)
        return item

    def _has_room(self, item: bytes) -> bool:
        if len(item) > self._room:
            return False
        self._room -= len(item)
        return True

    def _last_bytes(self, *, is_late: bool) -> bytes:
        if is_late:
            self.reason = endings.EXPIRED
        elif self.reason == endings.LEFT:
            self.reason = endings.ENDED if self.subscription.is_at_end else endings.LAGGED
        if self.reason in (endings.EXPIRED, endings.STOPPED) and not self._is_last:
            self._is_last = True
            return self._keeper.shutdown.farewell()
        self.close()
        raise StopIteration

    def stop(self) -> None:
        """Have it end with what is pending, since the server stops; from any thread."""
        self.reason = endings.STOPPED
        self.subscription.hurry()

    def end(self, reason: str) -> None:
        """End it for a reason; from any thread."""
        self.reason = reason
        self.close()

    @property
    def patience(self) -> float | None:
        """How long its client's machine may be silent, in seconds; ``None`` if it only reads."""
        return None if self.stay is None else patience(self._heartbeat)

    def take_start(self) -> bytes:
        """Take what is left of the first bytes, and return it."""
        start, self._first, self._start = self._first + self._start, b"", b""
        return start

    def finish(self) -> None:
        """End the stream since its user's rights were revoked; from any thread."""
        self.reason = endings.REVOKED
        (self._finish or self.subscription.close)()

    def finish_by(self, finish: Callable[[], None]) -> None:
        """Have the stream ended in another way, by whoever has the client's socket."""
        # Nobody else is ended alone, and there may be many thousands.
        if self._place is not None and self._place.user is not None:
            self._finish = finish
            if self._place.is_finished:
                finish()

    def close(self) -> None:
        """End the subscription; from any thread, more than once."""
        if self._place is not None:
            self._place.release()
        # It holds the hub's subscriber, which holds this.
        self._finish = None
        self.subscription.close()
        try:
            # One step, so that of many threads that close at once only one tells it.
            del self._is_open
        except AttributeError:
            return
        if self.threads is not None:
            self.threads.release(self)
        self._keeper.shutdown.leave(self)
        self._keeper.closed(self)


class ShortBody:
    """The body of a response that ends after its first bytes, so that the client comes again.

    :param start: the first bytes.
    """

    def __init__(self, start: bytes) -> None:
        self._start = start

    def __iter__(self) -> Iterator[bytes]:
        yield self._start


class Silence:
    """How long a stream may be silent before a heartbeat is due.

    The first write to a client that has left succeeds, and only makes its machine answer with a
    reset; the second one fails. So heartbeats come in pairs, of which the second ends the interval.

    :param heartbeat: the longest silence, in seconds.
    :ivar pause: how long to wait for something to send before the next heartbeat, in seconds.
    """

    def __init__(self, heartbeat: float) -> None:
        probe = min(_PROBE_SECONDS, heartbeat / 2)
        self._first, self._second = heartbeat - probe, probe
        self.pause = self._first

    def broken_by(self, wire: bytes) -> bytes:
        """Note what is sent, an event or a heartbeat, and return it."""
        is_first_beat = wire is HEARTBEAT and self.pause == self._first
        self.pause = self._second if is_first_beat else self._first
        return wire


def jittered(value: float) -> float:
    """Return a value within 20 % of the given one, so that many clients do not act at once."""
    return value * random.uniform(0.8, 1.2)
