"""The body of a subscriber's response: one thread or greenlet waits for each subscriber.

It sees bytes, and knows neither Flask nor events.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

from .event import HEARTBEAT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .broker import Subscription

_PROBE_SECONDS = 1.0


class SubscriptionBody:
    """The body of a subscriber's response: waits for events in the thread that serves it.

    It holds no context of a request or app, which would pin what such contexts hold (a database
    connection) for as long as the client stays.

    :param subscription: what the client has to get.
    :param start: the first bytes, sent at once.
    :param heartbeat: the longest silence, in seconds.
    :param max_lifetime: after how many seconds it ends, jittered by 20 %; ``None`` for never.
    :param on_close: called once with this body, when the subscription is off the books.
    """

    def __init__(
        self,
        subscription: Subscription,
        start: bytes,
        heartbeat: float,
        max_lifetime: float | None,
        on_close: Callable[[SubscriptionBody], None],
    ) -> None:
        self._subscription = subscription
        self._start = start
        self._silence = Silence(heartbeat)
        lifetime = float("inf") if max_lifetime is None else jittered(max_lifetime)
        self._end = time.monotonic() + lifetime
        self._on_close = [on_close]

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._start:
            start, self._start = self._start, b""
            return start
        pause = min(self._silence.pause, self._end - time.monotonic())
        events = None if pause <= 0 else self._subscription.take(pause)
        if events is None:
            self.close()
            raise StopIteration
        return self._silence.broken_by(events or HEARTBEAT)

    def close(self) -> None:
        """End the subscription; from any thread, more than once."""
        self._subscription.close()
        try:
            on_close = self._on_close.pop()
        except IndexError:
            # To pop is one step, so that of many threads that close at once only one tells it.
            return
        on_close(self)


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
