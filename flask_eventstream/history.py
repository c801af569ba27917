"""The recent events of one channel, as the bytes that go over the wire.

Three questions are answered here, each by a number: what came after a sequence number, since which
number that answer is complete, and which number a publisher's own id stands for.

Two spans are kept apart. *Replay* gives a client that returns what the configuration promises: the
newest ``size`` events, no older than ``seconds``. The *tail* behind it holds a little more while
somebody is connected, so that a burst larger than the history does not cut off subscribers whose
thread or greenlet has not had its turn yet, nor those that are still reading what was replayable
when they came. It is shared by all of them and bounded in bytes and in seconds, so that one who
stands still costs no more than that.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

_DROPPED_AT_ONCE = 16
_seq_of = attrgetter("seq")

_ENTRY_OVERHEAD = 256
"""What an entry counts besides its wire, in bytes: 176 on CPython 3.11, and room for an own id."""


class Entry(NamedTuple):
    """One published event.

    ``seq`` is its place in the broker's sequence, ``time`` the broker's clock in seconds, ``id``
    the publisher's own id, if any, ``wire`` the whole event as bytes, and ``key`` what it is the
    newest value of, if anything.
    """

    seq: int
    time: float
    id: str | None
    wire: bytes
    key: str | None = None


class History:
    """The last events of one channel. It has no lock: the broker's is held around every call.

    :param size: the number of events that are replayed, at least 0.
    :param seconds: the age up to which an event is replayed, in seconds.
    :param tail_bytes: how much is kept beyond that for subscribers that are connected.
    :param tail_seconds: and for how long, in seconds.
    :param dropped: the highest sequence number that may have been dropped before.
    :param max_bytes: how much is kept in all, but for a single event; without limit by default.
    :ivar dropped: the highest sequence number that is gone, for connected subscribers too.
    :ivar newest: the highest sequence number there was.
    :ivar expires: whether what is kept is forgotten after a while.
    """

    __slots__ = (
        "_bytes",
        "_entries",
        "_first",
        "_hidden_bytes",
        "_keys",
        "_max_bytes",
        "_replayed_at",
        "_seconds",
        "_size",
        "_tail_bytes",
        "_tail_seconds",
        "_window",
        "dropped",
        "expires",
        "newest",
    )

    def __init__(
        self,
        size: int,
        seconds: float,
        tail_bytes: int,
        tail_seconds: float,
        dropped: int = 0,
        max_bytes: float = math.inf,
    ) -> None:
        self._size = size
        self._seconds = seconds
        self.expires = seconds < math.inf
        self._tail_bytes = tail_bytes
        self._tail_seconds = tail_seconds
        self._max_bytes = max_bytes
        self.dropped = self.newest = dropped
        self._bytes = self._hidden_bytes = 0
        self._replayed_at = -math.inf
        # A list, in which a position is found by bisection; those before the first are dropped
        # some at a time. From the first to the window is the tail, and behind it what is replayed.
        self._entries: list[Entry] = []
        self._first = self._window = 0
        # Of each key, the number of the only entry that it has.
        self._keys: dict[str, int] = {}

    @property
    def bytes(self) -> int:
        """How much is kept, in bytes."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._entries) - self._first

    def append(self, entry: Entry, keep_tail: bool) -> None:
        """Add the newest event.

        :param entry: the event; its ``seq`` is higher than that of every other.
        :param keep_tail: whether somebody is connected who may still have to get older events.
        """
        if entry.key is not None:
            self._replace(entry.key, entry.seq)
        self._entries.append(entry)
        self.newest = entry.seq
        self._bytes += len(entry.wire) + _ENTRY_OVERHEAD
        self.trim(entry.time, keep_tail)

    def _replace(self, key: str, seq: int) -> None:
        # Taken out and not skipped by its readers, so that values which nobody wants any more do
        # not push out others.
        before = self._keys.get(key)
        self._keys[key] = seq
        if before is not None:
            index = bisect_left(self._entries, before, self._first, key=_seq_of)
            size = len(self._entries.pop(index).wire) + _ENTRY_OVERHEAD
            self._bytes -= size
            if index < self._window:
                self._window -= 1
                self._hidden_bytes -= size

    def trim(self, now: float, keep_tail: bool) -> None:
        """Drop what nobody can ask for any more at the time ``now`` (seconds)."""
        self._hide(now)
        entries = self._entries
        while self._first < self._window and not (keep_tail and self._has_to_wait(now)):
            entry = entries[self._first]
            self._first += 1
            size = len(entry.wire) + _ENTRY_OVERHEAD
            self._bytes -= size
            self._hidden_bytes -= size
            self.dropped = entry.seq
            if entry.key is not None:
                del self._keys[entry.key]
        if self._first > _DROPPED_AT_ONCE + len(entries) // 64 or self._first == len(entries):
            del entries[: self._first]
            self._window -= self._first
            self._first = 0

    def _hide(self, now: float) -> None:
        entries = self._entries
        while self._window < len(entries):
            oldest, count = entries[self._window], len(entries) - self._window
            is_recent = count <= self._size and now - oldest.time <= self._seconds
            if is_recent and (self._bytes - self._hidden_bytes <= self._max_bytes or count == 1):
                return
            self._hidden_bytes += len(oldest.wire) + _ENTRY_OVERHEAD
            self._window += 1

    def _has_to_wait(self, now: float) -> bool:
        oldest = self._entries[self._first]
        # The newest event stays, however large it is: nobody can have taken it yet.
        is_small = self._bytes <= self._tail_bytes or self._first == len(self._entries) - 1
        if is_small and now - oldest.time <= self._tail_seconds:
            return True
        is_replayed = now - self._replayed_at <= self._tail_seconds
        return is_replayed and self._hidden_bytes <= self._tail_bytes

    def replay_begins(self, now: float) -> None:
        """Take note that somebody reads all that is replayable at the time ``now`` (seconds)."""
        self._replayed_at = now

    def after(self, seq: int, limit: int | None = None) -> list[Entry]:
        """Return what is kept after a sequence number, in order.

        It is complete if ``seq`` is at least :attr:`dropped`.

        :param seq: the sequence number.
        :param limit: the number of entries to return at most.
        """
        entries = self._entries
        # What a reader lacks who keeps up is the newest one.
        if not entries or entries[-1].seq <= seq:
            return []
        if len(entries) - self._first > 1 and entries[-2].seq <= seq:
            return entries[-1:]
        start = bisect_right(entries, seq, self._first, key=_seq_of)
        return entries[start : None if limit is None else start + limit]

    def replayable(self, now: float) -> list[Entry]:
        """Return what a client that returns at the time ``now`` (seconds) may still get."""
        self._hide(now)
        return self._entries[self._window :]

    def complete_since(self, now: float) -> int:
        """Return the lowest sequence number after which :meth:`replayable` lacks nothing."""
        self._hide(now)
        is_hidden = self._window > self._first
        return self._entries[self._window - 1].seq if is_hidden else self.dropped

    def positions(self, id: str) -> list[int]:
        """Return the sequence numbers of the events that were published with this id."""
        return [entry.seq for entry in self._entries[self._first :] if entry.id == id]


def in_order(histories: Iterable[list[Entry]]) -> list[Entry]:
    """Join the entries of several channels into one sequence, each event once."""
    kept = [entries for entries in histories if entries]
    if len(kept) < 2:
        return kept[0] if kept else []
    return sorted({entry.seq: entry for entries in kept for entry in entries}.values())


def joined(entries: Iterable[Entry]) -> bytes:
    """Return the bytes of some entries as they go over the wire."""
    return b"".join([entry.wire for entry in entries])
