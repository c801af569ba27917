"""What a subscriber of a broker holds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from . import concurrency

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .channels import ChannelSet

FRAME_BYTES = 32 * 1024
"""How many bytes of history are joined into one frame, unless a single event is larger."""


class Replay:
    """What history still has for a subscriber when it begins, read frame by frame.

    It holds a position in what all subscribers share, and no events.

    :param channel_set: the channels.
    :param position: the place in the broker's sequence from which on events are read.
    :param until: and up to which: what comes behind it is new to the subscriber.
    :param floors: of each channel, the position up to which its events are left out.
    :ivar then: bytes that come behind all of it.
    :ivar count: is told of each frame that is read.
    """

    __slots__ = ("_channel_set", "_floors", "_position", "_until", "count", "then")

    def __init__(
        self, channel_set: ChannelSet, position: int, until: int, floors: Sequence[int] | None
    ) -> None:
        self._channel_set = channel_set
        self._position = position
        self._until = until
        self._floors = floors
        self.then = b""
        self.count: Callable[[bytes], object] = bytes

    @property
    def is_over(self) -> bool:
        """Whether all of it was read."""
        return self._position >= self._until

    def read(self, max_bytes: int | None) -> bytes | None:
        """Return the next events, joined.

        :param max_bytes: stop with the event that reaches this size.
        :returns: ``b""`` if there is nothing more, ``None`` if a part of it is gone from history.
        """
        found = self._channel_set.read(self._position, self._until, max_bytes, self._floors)
        if found is None:
            return None
        wire, self._position = found
        if self.is_over:
            wire, self.then = wire + self.then, b""
        self.count(wire)
        return wire


class Subscription:
    """What one subscriber still has to get.

    It holds a position in the broker's sequence and no events: what is pending is read from the
    history that all subscribers share, so a slow one costs no memory of its own.

    :param channel_set: the channels.
    :param position: the place in the broker's sequence from which on events are new to it.
    :param start: what the client has to get first, as bytes: a ``reset`` if there has to be one,
        and the first 32 KiB of what it missed, or of what history still has, but for an event that
        is larger. The events that :meth:`take` returns come after it.
    :param resumed: whether it continues right after the cursor it was opened with. If not, the
        client's picture has to be drawn anew: on a first connect, or after a ``reset``.
    :param replay: what history has for it besides ``start``, if there is more.
    """

    __slots__ = (
        "_is_closed",
        "_is_hurried",
        "_ready",
        "channel_set",
        "position",
        "replay",
        "resumed",
        "start",
    )

    def __init__(
        self,
        channel_set: ChannelSet,
        position: int,
        start: bytes,
        resumed: bool,
        replay: Replay | None = None,
    ) -> None:
        self.channel_set = channel_set
        self.position = position
        self.start = start
        self.resumed = resumed
        self.replay = replay
        self._is_closed = self._is_hurried = False
        # Only who waits needs one; it is larger than all the rest.
        self._ready: concurrency.Event | None = None

    @property
    def channels(self) -> tuple[str, ...]:
        """The names of the channels."""
        return self.channel_set.names

    @property
    def cursor(self) -> str:
        """The cursor of what was taken so far, at least of all that history had at first."""
        return self.channel_set.owner.mint(self.position)

    @property
    def is_at_end(self) -> bool:
        """Whether it has all that there will ever be."""
        return self.replay is None and self.position == self.channel_set.end

    def put_behind(self, wire: bytes) -> None:
        """Have some bytes come behind what history has, and before what is new."""
        if self.replay is None:
            self.start += wire
        else:
            self.replay.then += wire

    def take(self, timeout: float, max_bytes: int | None = None) -> bytes | None:
        """Wait for events and return all that are pending, joined.

        One thread or greenlet at a time may call it.

        :param timeout: how long to wait for the first one, in seconds; 0 does not wait.
        :param max_bytes: stop with the event that reaches this size, in bytes; by default all that
            are pending are returned.
        :returns: whole events as bytes; ``b""`` if there was none in time; ``None`` once the
            subscription has ended: it was closed or disconnected, the broker was closed, or it fell
            behind what the broker keeps.
        """
        while self.replay is not None and not self._is_closed:
            wire = self.replay.read(max_bytes)
            if self.replay.is_over:
                self.replay = None
            if wire != b"":
                return wire
        return self._wait(time.monotonic() + timeout, max_bytes)

    def _wait(self, deadline: float, max_bytes: int | None) -> bytes | None:
        if self._ready is None:
            self._ready = concurrency.new_event()
        self.channel_set.owner.settle()
        waiting = self.channel_set.waiting
        waiting.add(self._ready)
        try:
            return self._take(self._ready, deadline, max_bytes)
        finally:
            waiting.discard(self._ready)

    def _take(
        self, ready: concurrency.Event, deadline: float, max_bytes: int | None
    ) -> bytes | None:
        while True:
            ready.clear()
            found = None
            if not self._is_closed:
                found = self.channel_set.read(self.position, max_bytes=max_bytes)
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
