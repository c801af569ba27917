"""The channels of one process: what each of them keeps, and who reads it.

Who reads the same channels shares one :class:`ChannelSet`, so that what is done for an event is
done once for each set, and not for each subscriber.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from heapq import merge
from itertools import accumulate
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol

from .history import Entry, History, in_order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from . import concurrency

_SWEPT_AT_ONCE = 16
_CHANNEL_BYTES = 1024
"""What a channel counts besides its name and its events, in bytes; it has less on CPython 3.11."""

_FEW = 16
"""So many new events of each of some channels are sorted; of more, one after another is taken."""

_MANY = 500
"""The same if only one of them has any. It keeps fewer by default."""

_seq_of, _wire_of = attrgetter("seq"), attrgetter("wire")


class Channel:
    """A channel that somebody reads or that has a history.

    :param name: its name.
    :param history: its recent events.
    :param now: the time of the broker's clock, in seconds.
    :ivar end: the position where it has ended for good; ``None`` as long as it goes on.
    """

    __slots__ = ("bytes", "end", "history", "name", "sets", "touched")

    def __init__(self, name: str, history: History, now: float) -> None:
        self.name = name
        self.history = history
        self.touched = now
        self.sets: set[ChannelSet] = set()
        # What it counts among those that nobody reads.
        self.bytes = 0
        self.end: int | None = None


class Owner(Protocol):
    """What a channel set needs of the broker that it belongs to."""

    def read(
        self,
        channel_set: ChannelSet,
        after: int,
        until: int | None,
        max_bytes: int | None,
        floors: Sequence[int] | None,
    ) -> tuple[bytes, int] | None:
        """See :meth:`ChannelSet.read`."""

    def leave(self, channel_set: ChannelSet) -> None:
        """See :meth:`ChannelSet.leave`."""

    def mint(self, position: int) -> str:
        """Return the cursor that stands for a position."""

    def settle(self) -> None:
        """Wait until what this process has published is in the books."""

    def wait(self, ready: concurrency.Event, timeout: float) -> None:
        """Wait for an event that is set when there may be news (seconds)."""


class ChannelSet:
    """One channel or several, as all who subscribe to just these share them.

    A position is a place in the broker's sequence of events, as a number. Who has read up to a
    position has every event of the channels up to it.

    :param owner: the broker.
    :param books: where the set is entered.
    :param channels: the channels.
    :ivar names: their names.
    :ivar size: how many subscriptions it has.
    :ivar end: the position of the last event that is read; ``None`` as long as it goes on.
    :ivar waiting: the events of those who wait for news on a thread or greenlet of their own.
    """

    __slots__ = ("books", "channels", "end", "names", "owner", "size", "waiting")

    def __init__(self, owner: Owner, books: Channels, channels: Sequence[Channel]) -> None:
        self.owner = owner
        self.books = books
        self.channels = channels
        self.names = tuple([channel.name for channel in channels])
        self.size = 0
        self.end: int | None = None
        self.waiting: set[concurrency.Event] = set()

    def read(
        self,
        after: int,
        until: int | None = None,
        max_bytes: int | None = None,
        floors: Sequence[int] | None = None,
    ) -> tuple[bytes, int] | None:
        """Return the events behind a position, and the position behind them.

        :param after: the position.
        :param until: the position where to stop; the latest by default.
        :param max_bytes: stop with the event that reaches this size; if the bytes returned are
            fewer, there was no more to read. With ``until``, a large event comes alone, whatever is
            before it, so that all who are sent it share its bytes.
        :param floors: of each channel, the position up to which its events are left out; joins and
            leaves may be missing then, of which the client is told in another way.
        :returns: whole events as bytes, ``b""`` if there are none, and the new position; ``None``
            if they have ended, or if some of the events are gone.
        """
        return self.owner.read(self, after, until, max_bytes, floors)

    def leave(self) -> None:
        """Take one subscription off the books, at once or with the next call."""
        self.owner.leave(self)


class _Watch:
    __slots__ = ("ring", "stirred")

    def __init__(self, ring: Callable[[], None]) -> None:
        self.ring = ring
        self.stirred: set[Channel] = set()


def _size_of(channel: Channel) -> int:
    return _CHANNEL_BYTES + len(channel.name) + channel.history.bytes


class Channels:
    """The books of a broker. They have no lock: the broker's is held around every call but rings.

    :param new_history: makes the history of a channel, given its name and the highest number in
        the sequence that may have been dropped from it before.
    :param seconds: how long a channel is kept that nobody touches, in seconds.
    :param max_idle_bytes: how much is kept in all of channels that nobody reads; without limit by
        default. Those that were used longest ago are forgotten first.
    :ivar position: the place in the sequence up to which the books are complete.
    :ivar subscriptions: how many there are.
    """

    def __init__(
        self,
        new_history: Callable[[str, int], History],
        seconds: float,
        max_idle_bytes: float = math.inf,
    ) -> None:
        self.position = 0
        self.subscriptions = 0
        self._new_history = new_history
        self._seconds = seconds
        self._forgotten = 0
        # In the order in which they were last touched, so that what has expired is found in front.
        self._channels: OrderedDict[str, Channel] = OrderedDict()
        # Of these, the ones that nobody reads, in the same order.
        self._idle: OrderedDict[str, Channel] = OrderedDict()
        self._idle_bytes = 0
        self._max_idle_bytes = max_idle_bytes
        self._sets: dict[tuple[str, ...], ChannelSet] = {}
        self._watches: list[_Watch] = []
        self._ahead: list[tuple[int, Channel]] = []

    def __iter__(self) -> Iterator[str]:
        return iter(self._channels)

    def count(self, name: str) -> int:
        """Return how many subscriptions a channel has."""
        channel = self._channels.get(name)
        return sum(one.size for one in channel.sets) if channel else 0

    def size_of(self, name: str) -> int:
        """Return how much a channel takes, in bytes; 0 if it is not on the books."""
        channel = self._channels.get(name)
        return _size_of(channel) if channel else 0

    def sets(self) -> list[ChannelSet]:
        """Return the sets that are read."""
        return list(self._sets.values())

    def histories(self, names: Iterable[str]) -> list[History]:
        """Return what is kept of those of some channels that are in use."""
        return [self._channels[name].history for name in names if name in self._channels]

    def touch(self, name: str, now: float) -> Channel:
        """Return a channel, new or in use, which is used at the time ``now`` (seconds)."""
        channel = self._channels.get(name)
        if channel is None:
            return self.open(name, now, self._forgotten)
        channel.touched = now
        self._channels.move_to_end(name)
        return channel

    def open(self, name: str, now: float, dropped: int) -> Channel:
        """Begin a channel, of which what came up to the position ``dropped`` is gone."""
        channel = self._channels[name] = Channel(name, self._new_history(name, dropped), now)
        return channel

    def discard(self, name: str, last: Entry | None = None) -> None:
        """Take a channel off the books. Who reads it gets one last event, and ends with it."""
        channel = self._channels.get(name)
        if channel is not None:
            self._remove(channel)
        if channel is not None and last is not None and channel.sets:
            channel.history.append(last, keep_tail=True)
            self.end(channel.sets, last.seq)

    def append(self, names: Sequence[str], entry: Entry) -> bool:
        """Add an event to some channels; tell whether anybody reads them.

        What lies ahead of the position is read once that gets there.
        """
        is_read = False
        for name in names:
            channel = self.touch(name, entry.time)
            history = channel.history
            before = history.bytes
            history.append(entry, keep_tail=bool(channel.sets))
            if channel.sets:
                is_read = True
                self._stir(channel, entry.seq)
            elif channel.bytes:
                # For each event that nobody reads: what it weighs is not counted anew.
                grown = history.bytes - before
                channel.bytes += grown
                self._idle_bytes += grown
                self._idle.move_to_end(name)
            elif history.expires:
                self._weigh(channel)
        if self._idle_bytes > self._max_idle_bytes:
            self._forget_oldest()
        return is_read

    def advance(self, position: int) -> bool:
        """Move the position on; tell whether there is something to read that was not before."""
        self.position = max(self.position, position)
        ahead, self._ahead = self._ahead, []
        for seq, channel in ahead:
            self._stir(channel, seq)
        return len(self._ahead) < len(ahead)

    def join(self, owner: Owner, channels: Sequence[Channel]) -> ChannelSet:
        """Add a subscription to the set of some channels, and return the set."""
        names = tuple([channel.name for channel in channels])
        channel_set = self._sets.get(names)
        if channel_set is None:
            channel_set = ChannelSet(owner, self, channels)
            channel_set.end = min(
                [one.end for one in channels if one.end is not None], default=None
            )
            if channel_set.end is None:
                self._sets[names] = channel_set
            for channel in channels:
                channel.sets.add(channel_set)
                self._weigh(channel)
        channel_set.size += 1
        self.subscriptions += 1
        return channel_set

    def leave(self, channel_set: ChannelSet, now: float) -> None:
        """Take a subscription off a set, at the time ``now`` (seconds)."""
        if channel_set.books is not self:
            # A forked child's garbage collector drops what its parent has open.
            return
        self.subscriptions -= 1
        channel_set.size -= 1
        if channel_set.size:
            return
        if channel_set.end is None:
            del self._sets[channel_set.names]
        for channel in channel_set.channels:
            channel.sets.discard(channel_set)
            channel.history.trim(now, keep_tail=bool(channel.sets))
            self._forget_if_idle(channel)
        self._forget_oldest()

    def end(self, channel_sets: Iterable[ChannelSet], position: int) -> int:
        """End some sets at a position, and return how many subscriptions they have."""
        ended = 0
        for channel_set in channel_sets:
            ended += channel_set.size
            if channel_set.end is None:
                channel_set.end = position
                # Who subscribes from now on joins another.
                del self._sets[channel_set.names]
            channel_set.end = min(position, channel_set.end)
            for channel in channel_set.channels:
                self._stir(channel, position)
        return ended

    def end_channel(self, name: str, position: int) -> int:
        """End the sets of a channel at a position; return how many subscriptions they have."""
        channel = self._channels.get(name)
        return self.end(channel.sets, position) if channel else 0

    def finish_channel(self, name: str, position: int) -> None:
        """End the sets of a channel at a position, and those that read it from now on."""
        channel = self._channels.get(name)
        if channel is not None and channel.end is None:
            channel.end = position
            self.end(channel.sets, position)

    def end_all(self, position: int) -> None:
        """End every set at a position."""
        self.end(list(self._sets.values()), position)

    def sweep(self, now: float) -> None:
        """Forget a bounded number of channels that have expired at the time ``now`` (seconds)."""
        # A million channels that expire together must not make one publisher wait for all of them.
        for _ in range(_SWEPT_AT_ONCE):
            channel = next(iter(self._channels.values()), None)
            if channel is None or now - channel.touched <= self._seconds:
                return
            channel.history.trim(now, keep_tail=bool(channel.sets))
            channel.touched = now
            self._channels.move_to_end(channel.name)
            self._forget_if_idle(channel)

    def _forget_if_idle(self, channel: Channel) -> None:
        if self._channels.get(channel.name) is not channel:
            return
        if channel.history or channel.sets:
            self._weigh(channel)
        else:
            self._forget(channel)

    def _forget(self, channel: Channel) -> None:
        self._forgotten = max(self._forgotten, channel.history.newest)
        self._remove(channel)
        for watch in self._watches:
            watch.stirred.discard(channel)

    def _remove(self, channel: Channel) -> None:
        del self._channels[channel.name]
        self._idle.pop(channel.name, None)
        self._idle_bytes -= channel.bytes
        channel.bytes = 0

    def _weigh(self, channel: Channel) -> None:
        history, before = channel.history, channel.bytes
        is_idle = not channel.sets and history.expires
        channel.bytes = _size_of(channel) if is_idle else 0
        self._idle_bytes += channel.bytes - before
        if is_idle and not before:
            self._idle[channel.name] = channel
        elif before and not is_idle:
            del self._idle[channel.name]

    def _forget_oldest(self) -> None:
        # The newest one stays, however large it is.
        while self._idle_bytes > self._max_idle_bytes and len(self._idle) > 1:
            self._forget(next(iter(self._idle.values())))

    def watch(self, ring: Callable[[], None]) -> _Watch:
        """Have a function called by :meth:`ring`, and note for :meth:`news` what was stirred."""
        self._watches.append(_Watch(ring))
        return self._watches[-1]

    def _stir(self, channel: Channel, seq: int) -> None:
        if seq > self.position:
            # Whoever looks now would find nothing, and not look again.
            self._ahead.append((seq, channel))
            return
        for watch in self._watches:
            watch.stirred.add(channel)

    def ring(self) -> None:
        """Tell all who watch that there is news. No lock is needed."""
        for watch in self._watches:
            watch.ring()

    def news(self, watch: _Watch) -> set[ChannelSet]:
        """Return the sets with news since the last time."""
        stirred, watch.stirred = watch.stirred, set()
        return set().union(*[channel.sets for channel in stirred])


def read(
    channel_set: ChannelSet,
    after: int,
    until: int,
    max_bytes: int | None,
    floors: Sequence[int] | None = None,
) -> tuple[list[Entry], int] | None:
    """See :meth:`ChannelSet.read`; the entries are not joined yet."""
    end = channel_set.end
    if end is not None and after >= end:
        return None
    last = until if end is None else min(until, end)
    limit = None if max_bytes is None else _MANY
    kept, is_long = [], False
    for number, channel in enumerate(channel_set.channels):
        history = channel.history
        if floors is None:
            since, gone, entries_after = after, history.thinned, history.after
        else:
            since, gone = max(after, floors[number]), history.dropped
            entries_after = history.replayable_after
        if gone > since:
            return None
        if history.newest > since:
            entries = entries_after(since, limit)
            kept.append(entries)
            if limit is not None:
                is_long = is_long or len(entries) >= _FEW
                # The first that has any may be the only one.
                limit = _FEW
    if max_bytes is not None and is_long and (len(kept) > 1 or len(kept[0]) == _MANY):
        return _merged(channel_set, after, last, max_bytes, floors)
    found, position = up_to(last, kept), max(after, last)
    if max_bytes is None or len(found) < 2:
        # The most common case by far: the newest event of one channel.
        return found, position
    return _cut(found, position, max_bytes)


def _cut(found: list[Entry], position: int, max_bytes: int) -> tuple[list[Entry], int]:
    sizes = list(accumulate(map(len, map(_wire_of, found))))
    if sizes[-1] < max_bytes:
        return found, position
    number = bisect_left(sizes, max_bytes) + 1
    return found[:number], found[number - 1].seq


def _merged(
    channel_set: ChannelSet,
    after: int,
    last: int,
    max_bytes: int,
    floors: Sequence[int] | None,
) -> tuple[list[Entry], int]:
    # One after another, since there may be far more of them than fit.
    histories = [channel.history for channel in channel_set.channels]
    if floors is None:
        kept = [history.each_after(after) for history in histories]
    else:
        since = [max(after, floor) for floor in floors]
        kept = [one.each_replayable_after(seq) for one, seq in zip(histories, since, strict=True)]
    found: list[Entry] = []
    size = 0
    for entry in merge(*kept, key=_seq_of):
        if entry.seq > last:
            break
        if not found or entry.seq != found[-1].seq:
            found.append(entry)
            size += len(entry.wire)
        if size >= max_bytes:
            return found, entry.seq
    return found, max(after, last)


def up_to(last: int, histories: Iterable[list[Entry]]) -> list[Entry]:
    """Join the entries of several channels up to a position into one sequence, each event once."""
    found = in_order(histories)
    if found and found[-1].seq > last:
        found = [entry for entry in found if entry.seq <= last]
    return found
