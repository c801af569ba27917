"""When which subscribers of a hub get a heartbeat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .subscriber import framed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .subscriber import Subscriber

_TICK_SECONDS = 1.0


class Heartbeats:
    """Spreads heartbeats, so that no silence is longer than an interval.

    Everybody is visited once in three quarters of the interval, a part of them at each tick, and
    gets a beat after a quarter of silence. So the visits are spread, and nobody who is busy gets
    one.

    :param seconds: the interval.
    :param beat: what breaks the silence.
    :ivar wires: the beat as it goes over the wire, plain and in a chunk.
    :ivar next_tick: when it is time to look who is due, by the clock of :meth:`due`.
    """

    def __init__(self, seconds: float, beat: bytes) -> None:
        self.wires = (beat, framed(beat, True))
        self.next_tick = 0.0
        self._quiet = seconds / 4
        self._slots = max(1, round(seconds * 0.75 / min(_TICK_SECONDS, seconds / 8)))
        self._tick_seconds = seconds * 0.75 / self._slots
        self._slot = 0

    def due(self, subscribers: Mapping[int, Subscriber], now: float) -> list[Subscriber]:
        """Return those who are due at a tick.

        :param subscribers: all there are, by their descriptors.
        :param now: the time, in seconds.
        """
        self.next_tick = now + self._tick_seconds
        self._slot = (self._slot + 1) % self._slots
        return [
            one
            for descriptor, one in subscribers.items()
            if descriptor % self._slots == self._slot and one.group.sent <= now - self._quiet
        ]
