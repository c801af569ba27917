"""The broker of one process: publishers and subscribers are its threads and greenlets."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from .broker import DEFAULT_CHANNEL, channel_names
from .errors import InvalidFieldError
from .event import with_id
from .history import PRESENCE, Entry
from .local_broker import LOG_PREFIX, MAX_IDLE_BYTES, MINTED_HINT, LocalBroker, seq_of_minted
from .members import MemoryMembers
from .run_registry import MAX_RUNS_PER_OWNER, MemoryRegistry

if TYPE_CHECKING:
    from collections.abc import Sequence


class MemoryBroker(LocalBroker):
    """A broker for one process: publishers and subscribers are its threads and greenlets.

    :param history: how many events of a channel are kept for clients that return; 256 by default.
    :param history_seconds: and for how long, in seconds; 300 by default.
    :param max_event_bytes: the largest event accepted, in bytes on the wire; 1 MiB by default.
    :param max_lag: for how many seconds events beyond ``history`` are kept for subscribers that are
        connected; 30 by default.
    :param max_run_bytes: how much of a run's log is kept; 8 MiB by default.
    :param max_idle_bytes: how much is kept in all of channels that nobody reads, and how much of
        runs that have ended; 64 MiB each by default. The oldest are forgotten first.
    :param clock: a clock in seconds that never goes back; :func:`time.monotonic` by default.

    What is kept beyond ``history`` is at most four times ``max_event_bytes`` for each channel. A
    channel without subscribers and without events in its history is forgotten.

    >>> broker = MemoryBroker()
    >>> subscription = broker.subscribe("news")
    >>> id = broker.publish("Hello!", channel="news")
    >>> subscription.take(timeout=1) == f"data: Hello!\\nid: {id}\\n\\n".encode()
    True
    >>> subscription.close()
    """

    def __init__(self, *, max_idle_bytes: int = MAX_IDLE_BYTES, **options: Any) -> None:
        self._max_idle_bytes = max_idle_bytes
        super().__init__(max_idle_bytes=max_idle_bytes, **options)

    def _start(self) -> None:
        super()._start()
        # With its parent's, a forked child would give other events the same ids.
        self._epoch = secrets.token_hex(4)
        self._logged = 0

    def _append(self, names: Sequence[str], id: str | None, key: str | None, wire: bytes) -> str:
        with self._mutex:
            self._check_open()
            if id is not None and self._seq_of_minted(id) is not None:
                raise InvalidFieldError("id", id, MINTED_HINT)
            now = self._clock()
            self._channels.position = seq = self._channels.position + 1
            event_id = id
            if event_id is None:
                event_id = self.mint(seq)
                wire = with_id(wire, event_id.encode())
            is_read = self._channels.append(names, Entry(seq, now, id, wire, key))
            self._channels.sweep(now)
        if is_read:
            self._channels.ring()
        return event_id

    @property
    def published(self) -> int:
        """How many events were published; whoever does so has nothing more to count."""
        with self._mutex:
            return self._channels.position - self._logged

    def _seq_of_minted(self, id: str) -> int | None:
        return seq_of_minted(id, self._epoch)

    def mint(self, position: int) -> str:
        """Return the id, and the cursor, of a place in the sequence."""
        return f"{self._epoch}-{position}"

    def last_event_id(self, channel: str = DEFAULT_CHANNEL) -> str:
        """Return the current cursor, which is the same for all channels."""
        channel_names(channel)
        with self._mutex:
            return self.mint(self._channels.position)

    def subscriber_count(self, channel: str | None = None) -> int:
        """Return how many subscriptions there are; see :meth:`Broker.subscriber_count`."""
        return self._own_count(channel)

    def registry(
        self,
        seconds: float,
        lease: float,
        max_ended: int,
        max_per_owner: int = MAX_RUNS_PER_OWNER,
    ) -> MemoryRegistry:
        """Return what knows of the runs; see :meth:`LocalBroker.registry`."""
        # No lease: who could be told that this process is gone is gone with it.
        return MemoryRegistry(
            self, seconds, max_ended, max_per_owner, self._max_idle_bytes, self._clock
        )

    def members(self, seconds: float) -> MemoryMembers:
        """Return what knows who is present; see :meth:`LocalBroker.members`."""
        return MemoryMembers(self._announce, seconds, self._clock)

    def _announce(self, data: Any, type: str | None = None, *, channel: str) -> str:
        _, _, wire = self._encode(data, type)
        return self._append((channel,), None, PRESENCE, wire)

    def write_log(self, run: str, wire: bytes) -> None:
        """Append some events to the log of a run."""
        with self._mutex:
            self._check_open()
            self._channels.position = seq = self._channels.position + 1
            self._logged += 1
            entry = Entry(seq, self._clock(), None, wire)
            is_read = self._channels.append((LOG_PREFIX + run,), entry)
        if is_read:
            self._channels.ring()

    def end_log(self, run: str) -> int:
        """End all who read the log of a run, now or later; return how much it has, in bytes."""
        name = LOG_PREFIX + run
        with self._mutex:
            self._channels.finish_channel(name, self._channels.position)
        self._channels.ring()
        with self._mutex:
            return sum(one.bytes for one in self._channels.histories([name]))

    def forget_log(self, run: str) -> None:
        """Forget what the log of a run has; who reads it goes on."""
        with self._mutex:
            self._channels.discard(LOG_PREFIX + run)

    def disconnect(self, channel: str) -> int:
        """End every subscription of a channel; see :meth:`Broker.disconnect`."""
        channel_names(channel)
        return self._end(channel)

    def _end(self, channel: str) -> int:
        with self._mutex:
            self._remove_leaving()
            ended = self._channels.end_channel(channel, self._channels.position)
        self._channels.ring()
        return ended
