"""What a subscriber of a broker holds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from . import concurrency

if TYPE_CHECKING:
    from .channels import ChannelSet


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
