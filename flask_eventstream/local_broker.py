"""What brokers have in common in their process: the books, and who reads them.

How an event gets into the books, and what its number and its id are, is each broker's own.
"""

from __future__ import annotations

import math
import sys
import time
from abc import abstractmethod
from collections import Counter, deque
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from . import concurrency
from .broker import DEFAULT_CHANNEL, Broker, channel_names, encode_reset
from .channels import Channels, ChannelSet, read, up_to
from .errors import BrokerClosedError
from .event import MAX_EVENT_BYTES
from .history import Entry, History, in_order, joined, newest
from .run_registry import MAX_RUNS_PER_OWNER
from .subscription import FRAME_BYTES, Replay, Subscription

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .members import Members
    from .revocations import RevocationLog
    from .run_registry import RunRegistry

    Begin = tuple[bytes, int, bool]
    """The bytes that a subscription begins with, the position behind which events follow, and
    whether it continues after its cursor."""

    BeginOfLog = Callable[[Sequence[Entry]], tuple[bytes, int]]

MINTED_HINT = "has the form of this broker's own ids; choose another, or leave it out"

MAX_RUN_BYTES = 8 * 1024 * 1024
"""How much of a run's log is kept by default, in bytes."""

MAX_IDLE_BYTES = 64 * 1024 * 1024
"""How much is kept by default of channels that nobody reads, and of runs that have ended, each in
bytes."""

LOG_PREFIX = "\x1frun:"
"""What the names of logs begin with. :func:`channel_names` refuses it, so no request and no
publisher can name a log."""

_TAIL_EVENTS = 4


def _whole(entries: Sequence[Entry]) -> tuple[bytes, int]:
    return b"", 0


class LocalBroker(Broker):
    """A broker whose subscribers read from books that are kept in their process.

    :param history: how many events of a channel are kept for clients that return; 256 by default.
    :param history_seconds: and for how long, in seconds; 300 by default.
    :param max_event_bytes: the largest event accepted, in bytes on the wire; 1 MiB by default.
    :param max_lag: for how many seconds events beyond ``history`` are kept for subscribers that are
        connected; 30 by default.
    :param max_run_bytes: how much of a run's log is kept; 8 MiB by default.
    :param max_idle_bytes: how much is kept of channels that nobody reads, in bytes; without limit
        by default.
    :param clock: a clock in seconds that never goes back; :func:`time.monotonic` by default.
    :ivar replays: how many subscriptions began with exactly what came after their cursor.
    :ivar resets: and how many with a ``reset``.
    :ivar revocation_log: what all processes know of revoked rights; ``None`` if there is only one.
    """

    revocation_log: RevocationLog | None = None

    def __init__(
        self,
        *,
        history: int = 256,
        history_seconds: float = 300,
        max_event_bytes: int = MAX_EVENT_BYTES,
        max_lag: float = 30,
        max_run_bytes: int = MAX_RUN_BYTES,
        max_idle_bytes: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(max_event_bytes=max_event_bytes)
        tail_bytes = _TAIL_EVENTS * max_event_bytes
        of_channel = partial(History, history, history_seconds, tail_bytes, max_lag)
        # A log is kept as a whole, and forgotten as a whole.
        of_log = partial(
            History, sys.maxsize, math.inf, tail_bytes, max_lag, max_bytes=max_run_bytes
        )

        def new_history(name: str, dropped: int) -> History:
            return (of_log if name.startswith(LOG_PREFIX) else of_channel)(dropped=dropped)

        self._new_channels = partial(Channels, new_history, history_seconds, max_idle_bytes)
        self._clock = clock
        self._is_closed = False
        self._rings: list[Callable[[], None]] = []
        self._start()
        self._waiting = self.watch(self._ring_waker)
        concurrency.call_after_fork(self._start)

    def _start(self) -> None:
        # Once more in every forked child, which has none of its parent's subscribers, and whose
        # copy of the mutex may be held by a thread that it does not have.
        self._mutex = concurrency.new_mutex()
        self._published = self.replays = self.resets = 0
        self._channels = self._new_channels()
        self._watches = [self._channels.watch(ring) for ring in self._rings]
        self._leaving: deque[ChannelSet] = deque()
        self._waker = concurrency.Waker(self._wake_waiting)

    def subscribe(
        self, *channels: str, last_event_id: str | None = None, history: int = 0
    ) -> Subscription:
        """Start to receive; see :meth:`Broker.subscribe`."""
        names = channel_names(channels or DEFAULT_CHANNEL)
        return self._open(names, partial(self._begin, last_event_id, history))

    def subscribe_log(
        self, run: str, last: int, begin: BeginOfLog = _whole, is_over: bool = False
    ) -> Subscription:
        """Start to receive the log of a run.

        :param run: the run's id.
        :param last: the number of the last event that was written to it. What is received reaches
            at least as far.
        :param begin: finds where to begin among the entries that are kept: returns bytes that come
            first, and how many entries are left out; all are received by default.
        :param is_over: whether nothing more will be written to it.
        """
        return self._open((LOG_PREFIX + run,), partial(self._begin_log, begin), is_over)

    @abstractmethod
    def registry(
        self,
        seconds: float,
        lease: float,
        max_ended: int,
        max_per_owner: int = MAX_RUNS_PER_OWNER,
    ) -> RunRegistry:
        """Return what knows of the runs whose logs are this broker's.

        :param seconds: how long a run is kept after its end, in seconds.
        :param lease: how long a producer that is not heard of counts as alive, in seconds.
        :param max_ended: how many runs that have ended this process keeps at most.
        :param max_per_owner: how many runs one owner may have, in all processes.
        """

    @abstractmethod
    def members(self, seconds: float) -> Members:
        """Return what knows who is present on this broker's channels.

        :param seconds: for how long a member without connections is waited for, in seconds.
        """

    def _open(
        self,
        names: tuple[str, ...],
        begin: Callable[[list[History], float], Begin],
        is_over: bool = False,
    ) -> Subscription:
        with self._mutex:
            self._check_open()
            now = self._clock()
            self._remove_leaving()
            self._channels.sweep(now)
            channels = [self._channels.touch(name, now) for name in names]
            if is_over:
                self._channels.finish_channel(names[0], self._channels.position)
            start, position, resumed = begin([channel.history for channel in channels], now)
            channel_set = self._channels.join(self, channels)
            until = self._channels.position if channel_set.end is None else channel_set.end
            frame, replay = _first_frame(channel_set, position, until, now, resumed)
            subscription = Subscription(channel_set, until, start + frame, resumed, replay)
        # Should the waker be about to end, for want of subscribers, this keeps it.
        self._waker.ring()
        return subscription

    def _begin(self, cursor: str | None, history: int, kept: list[History], now: float) -> Begin:
        last = self._channels.position
        if not cursor:
            some = in_order([one.replayable_last(now, history, last) for one in kept])
            return b"", _before(newest(some, history) if history > 0 else [], last), False
        seq = self._seq_of(cursor, kept)
        if seq is not None and max(one.complete_since(now) for one in kept) <= seq <= last:
            self.replays += 1
            return b"", seq, True
        self.resets += 1
        left = _oldest(kept, now, last)
        earliest = (left[0].id or self.mint(left[0].seq)) if left else None
        position = _before(left, last)
        return encode_reset(cursor, earliest, self.mint(position)), position, False

    def _begin_log(self, begin: BeginOfLog, kept: list[History], now: float) -> Begin:
        entries = up_to(self._channels.position, [one.replayable(now) for one in kept])
        start, left_out = begin(entries)
        return start, _before(entries[left_out:], self._channels.position), False

    def _seq_of(self, cursor: str, kept: list[History]) -> int | None:
        minted = self._seq_of_minted(cursor)
        if minted is not None:
            return minted
        found = {seq for history in kept for seq in history.positions(cursor)}
        # An id that was given to two events does not tell which of them the client saw last.
        return found.pop() if len(found) == 1 else None

    @abstractmethod
    def _seq_of_minted(self, id: str) -> int | None:
        """Return the position that :meth:`mint` gave an id to; ``None`` if it gave it to none."""

    @abstractmethod
    def mint(self, position: int) -> str:
        """Return the cursor that stands for a position."""

    @property
    def published(self) -> int:
        """How many events this process has published, each once."""
        return self._published

    @property
    def subscriptions(self) -> int:
        """How many subscriptions this process has."""
        with self._mutex:
            self._remove_leaving()
            return self._channels.subscriptions

    def _own_count(self, channel: str | None) -> int:
        if channel is None:
            return self.subscriptions
        return self.local_count(*channel_names(channel))

    def local_count(self, channel: str) -> int:
        """Return how many subscriptions a channel has in this process."""
        with self._mutex:
            self._remove_leaving()
            return self._channels.count(channel)

    def channels(self) -> dict[str, int]:
        """Return the channels that are read, and by how many; see :meth:`Broker.channels`."""
        counts = self._counts().items()
        return {name: count for name, count in counts if not name.startswith(LOG_PREFIX)}

    def _counts(self) -> Counter[str]:
        return self._count(lambda names: names)

    def prefixes(self) -> Counter[str]:
        """Return how many subscriptions of this process read channels of each prefix.

        The prefix is what comes before the first colon of a name, or all of it; that of logs is
        ``run``. Who reads several channels of a prefix counts once.
        """
        return self._count(lambda names: {_prefix(name) for name in names})

    def _count(self, keys: Callable[[tuple[str, ...]], Iterable[str]]) -> Counter[str]:
        with self._mutex:
            self._remove_leaving()
            channel_sets = self._channels.sets()
        counts: Counter[str] = Counter()
        # Without the mutex, as there may be many, and whoever publishes would wait.
        for channel_set in channel_sets:
            for key in keys(channel_set.names):
                counts[key] += channel_set.size
        return counts

    def ping(self) -> float:
        """Return 0, as there is no server; see :meth:`Broker.ping`."""
        return 0.0

    def server_info(self) -> dict[str, Any]:
        """Return what the broker's server says of itself: nothing, as there is none."""
        return {}

    def close(self) -> None:
        """End every subscription; see :meth:`Broker.close`."""
        with self._mutex:
            self._is_closed = True
            self._channels.end_all(self._channels.position)
        self._channels.ring()

    def watch(self, ring: Callable[[], None]) -> Callable[[], set[ChannelSet]]:
        """Have a function called after every change; see :meth:`Broker.watch`."""
        number = len(self._rings)
        self._rings.append(ring)
        self._watches.append(self._channels.watch(ring))
        return partial(self._news, number)

    def _news(self, number: int) -> set[ChannelSet]:
        with self._mutex:
            self._remove_leaving()
            self._channels.sweep(self._clock())
            return self._channels.news(self._watches[number])

    def _check_open(self) -> None:
        if self._is_closed:
            raise BrokerClosedError

    def leave(self, channel_set: ChannelSet) -> None:
        """Take a subscription off the books, at once or with the next call."""
        # Not simply under the mutex: the garbage collector may close a stream at any point, also
        # while this very thread holds the mutex. Then the next one who gets it removes it.
        self._leaving.append(channel_set)
        if self._mutex.acquire(blocking=False):
            try:
                self._remove_leaving()
            finally:
                self._mutex.release()

    def _remove_leaving(self) -> None:
        while self._leaving:
            channel_set = self._leaving.popleft()
            self._channels.leave(channel_set, self._clock())
            self._note_leaving(channel_set)
            if not self._channels.subscriptions:
                self._waker.ring()

    def _note_leaving(self, channel_set: ChannelSet) -> None:
        """Take note that a subscription is off the books; under the mutex."""

    def read(
        self,
        channel_set: ChannelSet,
        after: int,
        until: int | None,
        max_bytes: int | None,
        floors: Sequence[int] | None,
    ) -> tuple[bytes, int] | None:
        """Return events of a channel set; see :meth:`ChannelSet.read`."""
        with self._mutex:
            last = self._channels.position if until is None else until
            found = read(channel_set, after, last, max_bytes, floors)
            if not (found and found[0]):
                self._channels.sweep(self._clock())
        if found and until is not None and max_bytes is not None:
            found = _large_apart(*found)
        return found and (joined(found[0]), found[1])

    def settle(self) -> None:
        """Wait until what this process has published is in the books: it is, by default."""

    def wait(self, ready: concurrency.Event, timeout: float) -> None:
        """Wait for an event that is set when there may be news (seconds)."""
        self._waker.start()
        ready.wait(timeout)

    def _ring_waker(self) -> None:
        self._waker.ring()

    def _wake_waiting(self) -> bool:
        # One thread or greenlet for all who wait on one of their own, as long as somebody is
        # subscribed. It walks through them, so that publish() does not have to.
        for channel_set in self._waiting():
            for ready in tuple(channel_set.waiting):
                ready.set()
        return bool(self._channels.subscriptions)


def _prefix(name: str) -> str:
    return "run" if name.startswith(LOG_PREFIX) else name.partition(":")[0] or name


def _oldest(kept: list[History], now: float, last: int) -> list[Entry]:
    """Return what is replayed first, if anything."""
    # What the books have beyond their position is sent as news, once they are complete up to it.
    found = [entry for one in kept if (entry := one.oldest(now)) and entry.seq <= last]
    return sorted(found, key=attrgetter("seq"))[:1]


def _before(entries: Sequence[Entry], last: int) -> int:
    return entries[0].seq - 1 if entries else last


def _first_frame(
    channel_set: ChannelSet, position: int, until: int, now: float, resumed: bool
) -> tuple[bytes, Replay | None]:
    if position >= until:
        return b"", None
    kept = [channel.history for channel in channel_set.channels]
    hidden = None if resumed else [one.hidden_until(now) for one in kept]
    found = read(channel_set, position, until, FRAME_BYTES, hidden)
    assert found is not None, "what is replayable is there"
    entries, after = _large_apart(*found)
    if len(entries) == 1 and _is_large(entries[0]):
        entries, after = [], position
    if after >= until:
        return joined(entries), None
    for one in kept:
        one.replay_begins(now)
    return joined(entries), Replay(channel_set, after, until, hidden)


def _large_apart(entries: list[Entry], position: int) -> tuple[list[Entry], int]:
    # Joined to what comes before it, it would be a copy for each client that does not read.
    if len(entries) > 1 and _is_large(entries[-1]):
        return entries[:-1], entries[-2].seq
    return entries, position


def _is_large(entry: Entry) -> bool:
    return len(entry.wire) >= FRAME_BYTES


def seq_of_minted(id: str, epoch: str) -> int | None:
    """Return the number in an id of an epoch; ``None`` if it does not have that form."""
    prefix, _, seq = id.partition("-")
    if prefix != epoch or not (seq.isascii() and seq.isdigit() and len(seq) < 20):
        return None
    return int(seq)
