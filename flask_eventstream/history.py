"""The recent events of one channel, as the bytes that go over the wire.

Three questions are answered here, each by a number: what came after a sequence number, since which
number that answer is complete, and which number a publisher's own id stands for.

Two spans are kept apart. *Replay* gives a client that returns what the configuration promises: the
newest ``size`` events, no older than ``seconds``. The *tail* behind it holds a little more while
somebody is connected, so that a burst larger than the history does not cut off subscribers whose
thread or greenlet has not had its turn yet, nor those that are still reading what was replayable
when they came. It is shared by all of them and bounded in bytes and in seconds, so that one who
stands still costs no more than that.

Anybody may come and go as often as it likes, so joins and leaves (entries with the key
:data:`PRESENCE`) take no room from the other events: the newest 1,024 of them, or ``size`` if that
is more, are kept beside these. What is beyond that is kept for those who are connected, within
the limits of the tail.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_DROPPED_AT_ONCE = 16
_seq_of = attrgetter("seq")

_ENTRY_OVERHEAD = 256
"""What an entry counts besides its wire, in bytes: 176 on CPython 3.11, and room for an own id."""

PRESENCE = "\x01"
"""The key of joins and leaves, which no publisher can give."""

MOST_PRESENCE = 1024
"""How many joins and leaves of a channel are kept, unless its history is larger."""


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
    :ivar bytes: how much is kept.
    :ivar dropped: the sequence number up to which all is gone, for connected subscribers too.
    :ivar thinned: the highest sequence number that is gone: that, or the one of a join or leave
        which was among other events.
    :ivar newest: the highest sequence number there was.
    :ivar expires: whether what is kept is forgotten after a while.
    """

    __slots__ = (
        "_entries",
        "_first",
        "_has_ids",
        "_hidden_bytes",
        "_keys",
        "_max_bytes",
        "_presence",
        "_presence_shown",
        "_replayed_at",
        "_seconds",
        "_size",
        "_tail_bytes",
        "_tail_seconds",
        "_window",
        "bytes",
        "dropped",
        "expires",
        "newest",
        "thinned",
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
        self.dropped = self.thinned = self.newest = dropped
        self.bytes = self._hidden_bytes = 0
        self._replayed_at = -math.inf
        # A list, in which a position is found by bisection; those before the first are dropped
        # some at a time. From the first to the window is the tail, and behind it what is replayed,
        # once _hide() has moved it on.
        self._entries: list[Entry] = []
        self._first = self._window = 0
        # Whether any was published with an id of its own.
        self._has_ids = False
        # Of each key, the number of the only entry that it has.
        self._keys: dict[str, int] = {}
        # The joins and leaves, if there are any, and how many of them are replayed.
        self._presence: deque[Entry] | None = None
        self._presence_shown = 0

    def __len__(self) -> int:
        return len(self._entries) - self._first

    def append(self, entry: Entry, keep_tail: bool) -> None:
        """Add the newest event.

        :param entry: the event; its ``seq`` is higher than that of every other.
        :param keep_tail: whether somebody is connected who may still have to get older events.
        """
        if entry.key is not None:
            self._note(entry.key, entry)
        if entry.id is not None:
            self._has_ids = True
        self._entries.append(entry)
        self.newest = entry.seq
        self.bytes += len(entry.wire) + _ENTRY_OVERHEAD
        self.trim(entry.time, keep_tail)

    def _note(self, key: str, entry: Entry) -> None:
        if key == PRESENCE:
            self._presence = self._presence or deque()
            self._presence.append(entry)
            self._presence_shown += 1
            return
        # Taken out and not skipped by its readers, so that values which nobody wants any more do
        # not push out others.
        before = self._keys.get(key)
        self._keys[key] = entry.seq
        if before is not None:
            self._take_out(before)

    def _thin(self, presence: deque[Entry], now: float, keep_tail: bool) -> None:
        most = self._most_presence
        while len(presence) > most and not (keep_tail and self._has_room(presence[0], now)):
            self.thinned = presence.popleft().seq
            self._presence_shown -= self._take_out(self.thinned)

    def _has_room(self, oldest: Entry, now: float) -> bool:
        return self.bytes <= self._tail_bytes and now - oldest.time <= self._tail_seconds

    def _take_out(self, seq: int) -> bool:
        """Take an entry out of the middle; tell whether it was replayed."""
        index = bisect_left(self._entries, seq, self._first, key=_seq_of)
        size = len(self._entries.pop(index).wire) + _ENTRY_OVERHEAD
        self.bytes -= size
        if index >= self._window:
            return True
        self._window -= 1
        self._hidden_bytes -= size
        return False

    def trim(self, now: float, keep_tail: bool) -> None:
        """Drop what nobody can ask for any more at the time ``now`` (seconds)."""
        if not (keep_tail and self._fits_in_tail(now)):
            self._drop(now, keep_tail)
        if self._presence:
            self._thin(self._presence, now, keep_tail)

    def _drop(self, now: float, keep_tail: bool) -> None:
        # For each event that is published: what it looks at often is at hand.
        self._hide(now)
        entries, first, window = self._entries, self._first, self._window
        if first == window:
            return
        while first < window and not (keep_tail and self._has_to_wait(now)):
            entry = entries[first]
            self._first = first = first + 1
            size = len(entry.wire) + _ENTRY_OVERHEAD
            self.bytes -= size
            self._hidden_bytes -= size
            self.dropped = entry.seq
            if self.thinned < entry.seq:
                self.thinned = entry.seq
            if entry.key is not None:
                self._forget(entry.key)
        if first > _DROPPED_AT_ONCE + len(entries) // 64 or first == len(entries):
            del entries[:first]
            self._window -= first
            self._first = 0

    def _forget(self, key: str) -> None:
        if key == PRESENCE and self._presence:
            self._presence.popleft()
        else:
            del self._keys[key]

    def _hide(self, now: float) -> None:
        entries, window, shown = self._entries, self._window, self._presence_shown
        end, size, since = len(entries), self._size, now - self._seconds
        kept = self.bytes - self._hidden_bytes
        while window < end:
            oldest = entries[window]
            # In front of the others, there are no more joins and leaves than of these at most.
            has_room = end - window - shown <= size and (shown <= size or oldest.key != PRESENCE)
            if has_room and oldest.time >= since and (kept <= self._max_bytes or window == end - 1):
                break
            kept -= len(oldest.wire) + _ENTRY_OVERHEAD
            window += 1
            if shown and oldest.key == PRESENCE:
                shown -= 1
        self._window, self._presence_shown = window, shown
        self._hidden_bytes = self.bytes - kept

    def _has_to_wait(self, now: float) -> bool:
        # What was replayable when somebody began to read it stays a little longer.
        is_replayed = now - self._replayed_at <= self._tail_seconds
        return (is_replayed and self._hidden_bytes <= self._tail_bytes) or self._fits_in_tail(now)

    def _fits_in_tail(self, now: float) -> bool:
        entries, first = self._entries, self._first
        # The newest event stays, however large it is: nobody can have taken it yet.
        is_small = self.bytes <= self._tail_bytes or first >= len(entries) - 1
        return is_small and (not entries or now - entries[first].time <= self._tail_seconds)

    def replay_begins(self, now: float) -> None:
        """Take note that somebody reads all that is replayable at the time ``now`` (seconds)."""
        self._replayed_at = now

    def after(self, seq: int, limit: int | None = None) -> list[Entry]:
        """Return what is kept after a sequence number, in order.

        It is complete if ``seq`` is at least :attr:`thinned`.

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
        """Return what a client that returns at the time ``now`` (seconds) may still get.

        The joins and leaves that are kept for connected subscribers alone are left out.
        """
        self._hide(now)
        return list(self._without_surplus(self._entries[self._window :]))

    def replayable_after(self, seq: int, limit: int | None = None) -> list[Entry]:
        """Return what :meth:`after` does, without the joins and leaves left out of a replay."""
        if len(self._presence or ()) <= self._most_presence:
            return self.after(seq, limit)
        return list(islice(self.each_replayable_after(seq), limit))

    def each_after(self, seq: int) -> Iterator[Entry]:
        """Yield what :meth:`after` returns. What is not taken costs nothing.

        Nothing may be added or dropped meanwhile.
        """
        entries = self._entries
        start = bisect_right(entries, seq, self._first, key=_seq_of)
        return map(entries.__getitem__, range(start, len(entries)))

    def each_replayable_after(self, seq: int) -> Iterator[Entry]:
        """Yield what :meth:`replayable_after` returns, as :meth:`each_after` does."""
        return iter(self._without_surplus(self.each_after(seq)))

    def oldest(self, now: float) -> Entry | None:
        """Return the first event of :meth:`replayable`, if there is one."""
        return next(self.each_replayable_after(self.hidden_until(now)), None)

    def replayable_last(self, now: float, count: int, until: int) -> list[Entry]:
        """Return the last events of :meth:`replayable` up to a sequence number.

        With the joins and leaves among them, and all of these if the others are fewer.

        :param now: the time of the broker's clock, in seconds.
        :param count: how many, besides joins and leaves.
        :param until: the sequence number.
        """
        self._hide(now)
        entries = self._entries
        start = end = bisect_right(entries, until, self._window, key=_seq_of)
        while start > self._window and count > 0:
            start -= 1
            count -= entries[start].key != PRESENCE
        return list(self._without_surplus(entries[start:end]))

    def _without_surplus(self, entries: Iterable[Entry]) -> Iterable[Entry]:
        presence = self._presence
        if presence is None or len(presence) <= self._most_presence:
            return entries
        first = presence[-self._most_presence].seq
        return (entry for entry in entries if entry.seq >= first or entry.key != PRESENCE)

    @property
    def _most_presence(self) -> int:
        return max(self._size, MOST_PRESENCE)

    def complete_since(self, now: float) -> int:
        """Return the lowest sequence number after which :meth:`replayable` lacks nothing."""
        return max(self.hidden_until(now), self.thinned)

    def hidden_until(self, now: float) -> int:
        """Return the sequence number behind which :meth:`replayable` begins."""
        self._hide(now)
        is_hidden = self._window > self._first
        return self._entries[self._window - 1].seq if is_hidden else self.dropped

    def positions(self, id: str) -> list[int]:
        """Return the sequence numbers of the events that were published with this id."""
        if not self._has_ids:
            # Anybody may come with whatever id, and there may be many entries.
            return []
        return [entry.seq for entry in self._entries[self._first :] if entry.id == id]


def in_order(histories: Iterable[list[Entry]]) -> list[Entry]:
    """Join the entries of several channels into one sequence, each event once."""
    kept = [entries for entries in histories if entries]
    if len(kept) < 2:
        return kept[0] if kept else []
    return sorted({entry.seq: entry for entries in kept for entry in entries}.values())


def newest(entries: list[Entry], count: int) -> list[Entry]:
    """Return the last events of some entries, with the joins and leaves among them."""
    places = [place for place, entry in enumerate(entries) if entry.key != PRESENCE][-count:]
    return entries[min([max(0, len(entries) - count), *places[:1]]) :]


def joined(entries: Iterable[Entry]) -> bytes:
    """Return the bytes of some entries as they go over the wire."""
    return b"".join([entry.wire for entry in entries])
