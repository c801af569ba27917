"""What a process counts of its streams: plain numbers, which are read when somebody asks."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from . import concurrency

DELAYS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""The upper bounds of the classes of :attr:`Deliveries.delays`, in seconds."""


class Deliveries:
    """What was sent to subscribers, counted by one thread or under a lock.

    :ivar events: how many events, each as often as there were subscribers who got it.
    :ivar bytes: and how many bytes these are, without the chunks' framing.
    :ivar delays: how often it took as long as in each class of :data:`DELAYS`, or longer than all
        of them, from the first event that was published to the last subscriber that has it.
    :ivar delay_sum: all of these times together, in seconds.
    """

    __slots__ = ("_events_of_last", "_last", "bytes", "delay_sum", "delays", "events")

    def __init__(self) -> None:
        self.events = self.bytes = self._events_of_last = 0
        self._last = b""
        self.delays = [0] * (len(DELAYS) + 1)
        self.delay_sum = 0.0

    def add(self, wire: bytes, subscribers: int) -> None:
        """Count whole events that some subscribers got."""
        if wire is not self._last:
            # A large one may come once for each set of channels, and is looked through once.
            self._last = wire
            # Exact, since no line of an event is empty but its last one.
            self._events_of_last = wire.count(b"\n\n")
        self.events += self._events_of_last * subscribers
        self.bytes += len(wire) * subscribers

    def observe(self, seconds: float) -> None:
        """Count how long it took."""
        self.delays[bisect_left(DELAYS, seconds)] += 1
        self.delay_sum += seconds


class Figures:
    """What an app counts in one process.

    :ivar connects: how many subscriptions there were.
    :ivar ends: how many have ended, for each reason.
    :ivar replayed: how many events clients got of what they had missed, or as history.
    """

    def __init__(self) -> None:
        self._start()
        concurrency.call_after_fork(self._start)

    def _start(self) -> None:
        # A forked child counts what is its own; its parent goes on with the rest.
        self._mutex = concurrency.new_mutex()
        self.connects = 0
        self.replayed = 0
        self.ends: Counter[str] = Counter()
        self.iterated = Deliveries()

    def connected(self, start: bytes) -> int:
        """Count a subscription, by what it starts with, and return its number."""
        with self._mutex:
            self.connects += 1
            self.replayed += start.count(b"\n\n")
            return self.connects

    def replay(self, wire: bytes) -> None:
        """Count what one gets besides of what it missed, or as history."""
        with self._mutex:
            self.replayed += wire.count(b"\n\n")

    def ended(self, reason: str) -> None:
        """Count the end of one."""
        with self._mutex:
            self.ends[reason] += 1

    def delivered(self, wire: bytes) -> None:
        """Count what a server has taken for one subscriber, where the hub does not have it."""
        with self._mutex:
            self.iterated.add(wire, 1)
