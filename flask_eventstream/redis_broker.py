"""The broker of many processes and machines, which meet in a Redis server."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from . import concurrency
from .broker import DEFAULT_CHANNEL, channel_names
from .errors import BrokerUnavailableError, InvalidFieldError
from .event import MAX_EVENT_BYTES
from .local_broker import LOG_PREFIX, MAX_IDLE_BYTES, MAX_RUN_BYTES, MINTED_HINT, LocalBroker
from .members import PRESENCE_SECONDS
from .redis_feeds import LEAST_KEPT, MARGIN_SECONDS, Feeds
from .redis_link import DOUBT_SECONDS, KEY_PREFIX, MintedIdError, RedisLink, Repeats
from .redis_members import RedisMembers
from .redis_presence import Presence
from .redis_reader import RedisReader
from .redis_runs import RedisRegistry
from .redis_scripts import PUBLISH, Keys, Script
from .revocations import RevocationLog
from .run_registry import MAX_RUNS_PER_OWNER

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterator, Sequence

    from .broker import Encoded
    from .channels import ChannelSet
    from .subscription import Subscription

_EVENTS_AT_ONCE = 100
_SETTLE_SECONDS = 1.0
_publish = Script(PUBLISH)


class RedisBroker(LocalBroker):
    """A broker for many processes and machines, which meet in a Redis server.

    It works with or without an app: a script or a Celery task publishes with one of its own.

    :param url: ``redis://``, ``rediss://`` or ``unix://``, with user, password and database, as
        redis-py reads it.
    :param key_prefix: what the names of all keys begin with; ``"eventstream:"`` by default.
    :param history: how many events of a channel are kept for clients that return; 256 by default.
    :param history_seconds: and for how long, in seconds; 300 by default.
    :param max_event_bytes: the largest event accepted, in bytes on the wire; 1 MiB by default.
    :param max_lag: for how many seconds events beyond ``history`` are kept for subscribers that are
        connected; 30 by default.
    :param max_run_bytes: how much of a run's log is kept; 8 MiB by default.
    :param max_idle_bytes: how much is kept of runs that have ended, of all processes together, and
        in each process of channels that it has no subscribers of any more, each in bytes; 64 MiB by
        default. The oldest are forgotten first.
    :param timeout: how long ``publish`` waits for Redis at most, in seconds; 5 by default. What has
        to ask more than once may wait as often.
    :param max_connections: the size of the pool for commands; 8 by default. One connection more
        hears what is published, as soon as there is a subscriber.
    :raises ConfigurationError: if the URL cannot be used.

    All processes have to be given the same prefix and history. Redis is first spoken to when
    something is published or subscribed to.

    *Redis away.* ``publish`` raises :class:`BrokerUnavailableError` within ``timeout``, and so does
    ``subscribe``, as a rule sooner, if it needs Redis. Subscriptions stay; the connection is tried
    again without end, every five seconds at least, and then continues where it was.

    *Greenlets* need gevent's monkey patching, or a call to Redis holds up the whole process.
    """

    def __init__(
        self,
        url: str,
        *,
        key_prefix: str = KEY_PREFIX,
        history: int = 256,
        history_seconds: float = 300,
        max_event_bytes: int = MAX_EVENT_BYTES,
        max_lag: float = 30,
        max_run_bytes: int = MAX_RUN_BYTES,
        max_idle_bytes: int = MAX_IDLE_BYTES,
        timeout: float = 5,
        max_connections: int = 8,
    ) -> None:
        self._timeout = timeout
        self._link = RedisLink(url, timeout, max_connections)
        self._keys = Keys(key_prefix, self._link.database)
        self._keep = max(history, LEAST_KEPT)
        self._seconds = math.ceil(history_seconds) + MARGIN_SECONDS
        # How far the clock of Redis is ahead of ours, in seconds; not known yet.
        self._clock_ahead = math.nan
        self._repeats = Repeats(timeout + DOUBT_SECONDS)
        self._max_run_bytes = max_run_bytes
        self._max_idle_bytes = max_idle_bytes
        self._idle_seconds = history_seconds
        super().__init__(
            history=history,
            history_seconds=history_seconds,
            max_event_bytes=max_event_bytes,
            max_lag=max_lag,
            max_run_bytes=max_run_bytes,
        )
        self.revocation_log = RevocationLog(self._link, self._keys.revoked)
        # For those that only read, and tell of members whose process has died.
        self.members(PRESENCE_SECONDS)
        concurrency.call_at_exit(self._leave)

    def _start(self) -> None:
        super()._start()
        idle = self._idle_seconds, self._max_idle_bytes
        self._feeds = Feeds(self._channels, self._clock, *idle)
        self._presence = Presence(self._link, self._keys, lambda: self._members.sweep())
        self._expected = 0
        self._progress = concurrency.Progress()
        self._reader = RedisReader(
            self._link,
            self._keys,
            self._presence,
            self._feeds,
            self._mutex,
            self._seconds,
            lambda: self.subscriptions,
            self._on_change,
        )

    def _append(self, names: Sequence[str], id: str | None, key: str | None, wire: bytes) -> str:
        [event_id] = self._send(names, [(id, key, wire)])
        return event_id

    def _append_many(self, names: Sequence[str], events: Sequence[Encoded]) -> list[str]:
        ids: list[str] = []
        for start in range(0, len(events), _EVENTS_AT_ONCE):
            some = events[start : start + _EVENTS_AT_ONCE]
            try:
                ids += self._send(names, some)
            except BrokerUnavailableError as error:
                error.published = ids
                raise
        return ids

    def _send(self, names: Sequence[str], events: Sequence[Encoded]) -> list[str]:
        self._check_open()
        nonce, is_doubtful = self._repeats.begin((names, events))
        head = [self._keep, self._seconds, nonce]
        tail = [each or "" for event in events for each in event]

        def arguments(is_repeated: bool) -> list[Any]:
            return [*head, self._latest_time(), int(is_doubtful or is_repeated), *tail]

        try:
            epoch, last = self._publish(names, arguments)
        except MintedIdError as error:
            raise InvalidFieldError("id", error.id, MINTED_HINT) from error
        self._repeats.end()
        # The one without a wire ends subscriptions.
        self._note(names, f"{epoch}-{last}", sum(bool(wire) for _, _, wire in events))
        first = last - len(events) + 1
        return [id or f"{epoch}-{first + n}" for n, (id, _, _) in enumerate(events)]

    def _latest_time(self) -> str:
        # A command that waited in a server that stood still must not be done once we have given it
        # up and sent another. It is Redis that looks at the clock, so it is told in its time, as of
        # its latest answer. What that took makes it too early, and never too late.
        latest = time.monotonic() + self._link.patience + self._clock_ahead
        return str(int(latest * 1000))

    def _publish(
        self, names: Sequence[str], arguments: Callable[[bool], list[Any]]
    ) -> tuple[str, int]:
        keys = (self._keys.state, self._keys.marks, *[self._keys.channel(name) for name in names])
        begin = time.monotonic()
        if math.isnan(self._clock_ahead):
            [[seconds, microseconds]] = self._link.pipeline([("TIME",)], begin)
            self._clock_ahead = seconds + microseconds / 1e6 - time.monotonic()
        while True:
            epoch, last, now = self._link.call(_publish, keys, arguments, begin)
            self._clock_ahead = now / 1000 - time.monotonic()
            if epoch:
                return epoch.decode(), last
            if time.monotonic() > begin + self._timeout / 2:
                raise BrokerUnavailableError(self._link.address, "was too slow to take the event")

    def _note(self, names: Sequence[str], last_id: str, events: int) -> None:
        with self._mutex:
            self._published += events
            position = self._feeds.position_of(last_id)
            if position is not None and any(name in self._feeds for name in names):
                self._expected = max(self._expected, position)

    def settle(self) -> None:
        """Wait until what this process has published has come back to it from Redis."""
        is_behind = self._channels.position < self._expected
        if is_behind and not self._progress.wait_until(self._is_settled, _SETTLE_SECONDS):
            # It may never come, from a server that has lost it. Once is enough to wait for it.
            self._expected = 0

    def _is_settled(self) -> bool:
        is_there = self._channels.position >= self._expected
        return is_there or not self._reader.is_connected

    def subscribe(
        self, *channels: str, last_event_id: str | None = None, history: int = 0
    ) -> Subscription:
        """Start to receive; see :meth:`Broker.subscribe`.

        :raises BrokerUnavailableError: if Redis is needed for that and does not answer: for the
            first subscriber of a channel in this process, or for a cursor that it does not know.
        """
        names = channel_names(channels or DEFAULT_CHANNEL)
        with self._followed(names):
            self._prepare(names, last_event_id)
            return super().subscribe(*names, last_event_id=last_event_id, history=history)

    def subscribe_log(self, run: str, last: int, *begin: Any, **options: Any) -> Subscription:
        """Start to receive the log of a run; see :meth:`LocalBroker.subscribe_log`."""
        names = (LOG_PREFIX + run,)
        with self._followed(names):
            self._prepare(names, f"{run}.{last}")
            return super().subscribe_log(run, last, *begin, **options)

    def registry(
        self,
        seconds: float,
        lease: float,
        max_ended: int,
        max_per_owner: int = MAX_RUNS_PER_OWNER,
    ) -> RedisRegistry:
        """Return what knows of the runs, which Redis keeps; see :meth:`LocalBroker.registry`."""
        limits = self._max_run_bytes, self._max_idle_bytes, max_per_owner
        return RedisRegistry(self._link, self._keys, self.local_count, seconds, lease, *limits)

    def members(self, seconds: float) -> RedisMembers:
        """Return what knows who is present, which Redis keeps; see :meth:`LocalBroker.members`."""
        self._members = RedisMembers(self._link, self._keys, self._keep, self._seconds, seconds)
        return self._members

    @contextmanager
    def _followed(self, names: Sequence[str]) -> Iterator[None]:
        with self._mutex:
            self._check_open()
            self._feeds.use(names)
        self._reader.start()
        try:
            yield
        finally:
            with self._mutex:
                self._feeds.release(names)

    def _prepare(self, names: Sequence[str], cursor: str | None) -> None:
        with self._mutex:
            is_ready = self._feeds.are_ready(names) and self._knows(names, cursor)
        if is_ready:
            self.settle()
            return
        deadline = time.monotonic() + self._timeout
        # While it is not connected, each of many subscribers would only wait for an answer.
        wait_until, patience = self._progress.wait_until, self._link.patience
        is_connected = wait_until(lambda: self._reader.is_connected, patience)
        sync = self._reader.sync() if is_connected else None

        def is_prepared() -> bool:
            with self._mutex:
                is_there = sync is not None and self._feeds.has_reached(sync.epoch, sync.seq)
                return is_there and self._feeds.are_ready(names)

        is_heard = is_connected and wait_until(is_prepared, deadline - time.monotonic())
        if not is_heard:
            raise BrokerUnavailableError(self._link.address, "nothing is heard of it")

    def _knows(self, names: Sequence[str], cursor: str | None) -> bool:
        # What another process has sent already may still be on its way to this one.
        if not cursor:
            return True
        seq = self._seq_of(cursor, self._channels.histories(names))
        return seq is not None and seq <= self._channels.position

    def _on_change(self, is_read: bool) -> None:
        if is_read:
            self._channels.ring()
        self._progress.notify()

    def _seq_of_minted(self, id: str) -> int | None:
        return self._feeds.position_of(id)

    def mint(self, position: int) -> str:
        """Return the cursor that stands for a position."""
        return self._feeds.mint(position)

    def _note_leaving(self, channel_set: ChannelSet) -> None:
        self._feeds.changed.update(channel_set.names)

    def last_event_id(self, channel: str = DEFAULT_CHANNEL) -> str:
        """Return the current cursor; see :meth:`Broker.last_event_id`.

        :raises BrokerUnavailableError: if Redis does not answer.
        """
        channel_names(channel)
        sync = self._reader.sync()
        return f"{sync.epoch}-{sync.seq}"

    def subscriber_count(self, channel: str | None = None) -> int:
        """Return how many subscriptions there are in all processes.

        The others tell theirs within a second. One that died is counted for 15 seconds more.

        :raises BrokerUnavailableError: if Redis does not answer.
        """
        return self._own_count(channel) + self._presence.count_others(channel or "")

    def _counts(self) -> Counter[str]:
        return super()._counts() + self._presence.counts_of_others()

    def ping(self) -> float:
        """Ask Redis for an answer; see :meth:`Broker.ping`."""
        return self._link.ping()

    def server_info(self) -> dict[str, Any]:
        """Return what Redis says of itself and of its memory (``INFO``).

        :raises BrokerUnavailableError: if Redis does not answer, or refuses.
        """
        return self._link.info()

    def disconnect(self, channel: str) -> int:
        """End every subscription of a channel, in all processes; see :meth:`Broker.disconnect`.

        :raises BrokerUnavailableError: if Redis does not answer.
        """
        names = channel_names(channel)
        count = self.subscriber_count(channel)
        self._send(names, [(None, None, b"")])
        return count

    def _leave(self) -> None:
        self._reader.leave()

    def close(self) -> None:
        """End every subscription of this process, and its connections, and accept nothing more."""
        self.settle()
        super().close()
        self._members.close()
        self._reader.stop()
