"""What a process follows of the sequence in Redis, entered into its books.

No I/O and no lock: the broker's mutex is held around every call. The rules:

* Positions are those of the books, which never go back: the number in Redis plus an offset, which
  changes with the epoch.
* ``books.position`` says up to where *every* channel that is followed is complete. It moves by
  messages only, which come in the order of the sequence over one connection.
* A stream is read in pages, so that nobody waits for all of it. Its channel is ready with the last
  page, which reaches up to the sequence number that was asked for before; what is newer comes by
  messages. A page that does not continue the one before is of no use, and the stream is read anew.
* Who may have missed something ends with a ``reset``, and the channel is begun anew.
* What nobody reads any more is not followed, but kept for a while as it is. It is as a stream of
  which only the first pages were read: who comes back has the rest of it read.
"""

from __future__ import annotations

from collections import deque
from itertools import islice, pairwise
from typing import TYPE_CHECKING

from .broker import encode_reset
from .event import with_id
from .history import Entry
from .local_broker import LOG_PREFIX, seq_of_minted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .channels import Channels
    from .redis_scripts import Message, Record, Sync

MARGIN_SECONDS = 60
"""How much longer Redis keeps events than clients are promised: a process that is cut off from it
for no longer than that misses nothing that it still has to send."""

LEAST_KEPT = 256
"""How many events of a channel Redis keeps at least, so that a short loss of the connection is made
good even without any history for clients."""

_EPOCHS = 8
_STREAMS_AT_ONCE = 16
_MOST_DOUBLINGS = 10


class BrokenChainError(Exception):
    """A message does not continue what came before: the streams have to be read."""


class Feed:
    """One channel that is followed.

    :ivar users: how many are about to subscribe to it.
    :ivar last: the number of its latest event.
    :ivar place: the number and the time of the latest entry that is known of its stream; ``None``
        if none is.
    :ivar loaded: the position up to which its stream was read; ``None`` if not all of it was.
    :ivar restarts: how often its stream was begun anew before all of it was read.
    :ivar bytes: what it counts while it is kept for those who come back, in bytes.
    :ivar left: since when it is.
    """

    __slots__ = ("bytes", "last", "left", "loaded", "place", "restarts", "users")

    def __init__(self) -> None:
        self.users = self.last = self.restarts = self.bytes = 0
        self.left = 0.0
        self.place: tuple[int, int] | None = None
        self.loaded: int | None = None


def _missing(records: list[Record], until: int) -> int:
    """Return the number up to which a stream may lack something from among its records.

    That is a join or a leave, since newer ones push out the older ones alone.
    """
    holes = [
        min(later.prev, until)
        for one, later in pairwise(records)
        if one.seq < min(later.prev, until) and not later.is_foreign
    ]
    return max(holes, default=0)


class Feeds:
    """The channels that a process follows.

    :param books: where their events are entered.
    :param clock: a clock in seconds.
    :param seconds: how long a channel is kept that nobody reads, in seconds.
    :param max_idle_bytes: how much is kept in all of those, in bytes. The ones that were left
        longest ago are forgotten first.
    :ivar epoch: the epoch of the server, ``""`` as long as it is not known.
    :ivar unloaded: the names of the channels whose streams have to be read, in the order in which
        they have a page read.
    :ivar changed: the names of those whose number of subscribers may have changed.
    """

    def __init__(
        self, books: Channels, clock: Callable[[], float], seconds: float, max_idle_bytes: int
    ) -> None:
        self.epoch = ""
        self.unloaded: dict[str, None] = {}
        self.changed: set[str] = set()
        self._books = books
        self._clock = clock
        self._seconds = seconds
        self._max_idle_bytes = max_idle_bytes
        self._offset = 0
        self._base = 0
        self._feeds: dict[str, Feed] = {}
        # What is kept of channels that are not followed, in the order in which they were left.
        self._idle: dict[str, Feed] = {}
        self._idle_bytes = 0
        # The first one has no cursors that anybody knows.
        self._epochs: deque[tuple[int, str]] = deque([(0, "none")], maxlen=_EPOCHS)

    def __iter__(self) -> Iterator[str]:
        return iter(self._feeds)

    def __contains__(self, name: str) -> bool:
        return name in self._feeds

    def use(self, names: Sequence[str]) -> None:
        """Follow some channels, at least until :meth:`release`."""
        for name in names:
            feed = self._feeds.get(name)
            if feed is None:
                feed = self._feeds[name] = self._kept(name)
                self.unloaded[name] = None
            feed.users += 1

    def _kept(self, name: str) -> Feed:
        feed = self._idle.pop(name, None)
        if feed is None:
            return Feed()
        self._idle_bytes -= feed.bytes
        # The books have forgotten what has expired.
        return feed if self._books.size_of(name) else Feed()

    def release(self, names: Sequence[str]) -> None:
        """Follow some channels only as long as they have subscribers."""
        for name in names:
            self._feeds[name].users -= 1
        self.changed.update(names)

    def are_ready(self, names: Sequence[str]) -> bool:
        """Tell whether the books have all of some channels, up to their position."""
        loaded = [self._feeds[name].loaded for name in names]
        return all(one is not None and one <= self._books.position for one in loaded)

    def has_reached(self, epoch: str, seq: int) -> bool:
        """Tell whether the books are complete up to a number."""
        return epoch == self.epoch and self._offset + seq <= self._books.position

    def mint(self, position: int) -> str:
        """Return the cursor that stands for a position."""
        epochs = [one for one in self._epochs if one[0] <= position] or [self._epochs[0]]
        offset, epoch = epochs[-1]
        return f"{epoch}-{max(0, position - offset)}"

    def position_of(self, id: str) -> int | None:
        """Return the position of an id that :meth:`mint` makes in this epoch."""
        seq = seq_of_minted(id, self.epoch) if self.epoch else None
        return None if seq is None else self._offset + seq

    def begin(self, sync: Sync) -> bool:
        """Take note of the epoch. If it is new, all who read end with a ``reset``.

        :returns: whether it is new, so that nothing goes on that was begun before.
        """
        if sync.epoch == self.epoch:
            return False
        for name in tuple(self._idle):
            self._forget(name)
        if self.epoch:
            # One more, so that a position tells the epoch.
            self._books.advance(max([0, *map(self.start_over, self._feeds)]))
            self._offset = self._books.position + 1
        self.epoch, self._base = sync.epoch, sync.base
        self._epochs.append((self._offset, sync.epoch))
        return True

    def start_over(self, name: str) -> int:
        """End who reads a channel with a ``reset``, and have its stream read anew.

        :returns: the position of the ``reset``.
        """
        feed = self._feeds[name]
        position = self._offset + self._entered(feed)
        cursor = self.mint(position)
        # Its id is the place before it: who returns with that is told again, and then gets what
        # there is.
        wire = encode_reset(cursor, None, cursor)
        self._books.discard(name, Entry(position + 1, self._clock(), None, wire))
        feed.loaded, feed.last, feed.place = None, 0, None
        feed.restarts += 1
        self._put_behind(name)
        return position + 1

    def _put_behind(self, name: str) -> None:
        # Behind the others, so that who asks for much does not keep them waiting.
        self.unloaded.pop(name, None)
        self.unloaded[name] = None

    def _entered(self, feed: Feed) -> int:
        # If the connection is lost again soon, more was read than has become visible.
        return max(feed.last, self._books.position - self._offset)

    def connect(self) -> list[str]:
        """Return the names of all channels, whose messages may have been missed."""
        # First those that the others' events wait for: the position is that of all of them.
        ready = [name for name, feed in self._feeds.items() if feed.loaded is not None]
        self.unloaded = dict.fromkeys([*ready, *self._feeds])
        return list(self._feeds)

    def next_missed(self) -> list[str]:
        """Return some of the channels that have to be complete before any message is heard."""
        missed = (name for name in self.unloaded if self._feeds[name].loaded is not None)
        return list(islice(missed, _STREAMS_AT_ONCE))

    def next_unloaded(self) -> list[str]:
        """Return those of the channels that have a page read next."""
        return list(islice(self.unloaded, _STREAMS_AT_ONCE))

    def first_wanted(self, name: str) -> str:
        """Return the id of the entry from which on the stream of a channel has to be read."""
        # What is known already is read once more: if it is still there, nothing is gone behind it.
        return "{}-{}".format(*(self._feeds[name].place or (0, 0)))

    def page_scale(self, names: Sequence[str]) -> int:
        """Return how many times larger than usual a page has to be that begins with a channel."""
        # If events come faster than pages, what was read is gone before the next page is.
        restarts = [self._feeds[name].restarts for name in names[:1]]
        return 1 << min(_MOST_DOUBLINGS, sum(restarts))

    def load(self, name: str, sync: Sync, records: list[Record], is_whole: bool) -> None:
        """Enter a page of the stream of a channel, from :meth:`first_wanted` on.

        If it does not continue what the books have, the stream has to be read anew.

        :param name: the name of the channel.
        :param sync: what was asked for before.
        :param records: the entries.
        :param is_whole: whether they reach to the end of the stream.
        """
        feed = self._feeds[name]
        # What came after the number that was asked for comes by messages, even if the stream has
        # lost it already.
        before = min(abs(records[0].prev) if records else sync.bound, sync.seq)
        if feed.loaded is None and feed.place is None:
            self._books.open(name, self._clock(), self._offset + before)
            feed.last = before
        elif before > (feed.last if feed.loaded is None else self._entered(feed)):
            self.start_over(name)
            return
        self._enter_page(name, feed, sync, records)
        self._put_behind(name)
        if is_whole:
            feed.loaded, feed.restarts = self._offset + sync.seq, 0
            del self.unloaded[name]

    def _enter_page(self, name: str, feed: Feed, sync: Sync, records: list[Record]) -> None:
        known = feed.place or (0, 0)
        for record in [one for one in records if one.place > known and one.seq <= sync.seq]:
            if not record.is_foreign:
                self._enter([name], record, self._clock() - (sync.time - record.time) / 1000)
            feed.last, feed.place = record.seq, record.place
        for history in self._books.histories([name]):
            history.thinned = max(history.thinned, self._offset + _missing(records, sync.seq))

    def hear(self, message: Message) -> bool:
        """Enter an event that a message brought; tell whether there is something new to read.

        :raises BrokenChainError: if the epoch is another, or an event is missing before it.
        """
        self._check_epoch(message.epoch)
        position = self._offset + message.seq
        names = []
        for name, prev in message.prevs:
            feed = self._feeds.get(name)
            if feed is None or feed.loaded is None or position <= feed.loaded:
                continue
            if prev > feed.last:
                raise BrokenChainError(f"{name!r}: {prev} is missing after {feed.last}")
            # An event of several channels comes once for each of them.
            if feed.last < message.seq:
                feed.last, feed.place = message.seq, (message.seq, message.time)
                names.append(name)
        self._enter(names, message, self._clock())
        return self._books.advance(position)

    def _check_epoch(self, epoch: str) -> None:
        if epoch != self.epoch:
            raise BrokenChainError(f"the epoch is {epoch}, and was {self.epoch}")

    def _enter(self, names: Sequence[str], event: Message | Record, time: float) -> None:
        position = self._offset + event.seq
        if not event.wire:
            for name in names:
                # A log has one end; later readers read up to it.
                is_log = name.startswith(LOG_PREFIX)
                end = self._books.finish_channel if is_log else self._books.end_channel
                end(name, position)
            return
        # What is older than the epoch may lack something behind it: no cursor for its id.
        own_id = event.id if event.seq > self._base else None
        wire = event.wire
        if event.id is None:
            wire = with_id(wire, f"{self.epoch}-{event.seq}".encode())
        self._books.append(names, Entry(position, time, own_id, wire, event.key))

    def take_changed(self) -> dict[str, int]:
        """Return how many subscribers the channels have whose number may have changed.

        Those that nobody reads are not followed any longer.
        """
        changed, self.changed = self.changed, set()
        counts = {name: self._books.count(name) for name in changed}
        for name, count in counts.items():
            feed = self._feeds.get(name)
            if feed is not None and not count and not feed.users:
                self._leave(name, feed)
        self._forget_idle()
        return counts

    def _leave(self, name: str, feed: Feed) -> None:
        del self._feeds[name]
        self.unloaded.pop(name, None)
        feed.bytes = self._books.size_of(name)
        if feed.place is None or not feed.bytes:
            self._books.discard(name)
            return
        feed.loaded, feed.left = None, self._clock()
        self._idle[name] = feed
        self._idle_bytes += feed.bytes

    def _forget_idle(self) -> None:
        oldest = self._clock() - self._seconds
        while self._idle:
            name, feed = next(iter(self._idle.items()))
            # The newest one stays, however large, or each who returns to it has it read again.
            is_too_much = self._idle_bytes > self._max_idle_bytes and len(self._idle) > 1
            if feed.left >= oldest and not is_too_much:
                return
            self._forget(name)

    def _forget(self, name: str) -> None:
        self._idle_bytes -= self._idle.pop(name).bytes
        self._books.discard(name)
