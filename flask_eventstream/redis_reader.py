"""Hears for a process what is published in Redis, on a thread or greenlet of its own.

One connection hears the channels that the process has subscribers of. If it is lost, or may be, a
new one takes its place, for as long as it takes, and what was published meanwhile is read from the
streams. A subscriber does not notice.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from itertools import islice
from typing import TYPE_CHECKING, Any

from .errors import BrokerUnavailableError
from .redis_feeds import BrokenChainError
from .redis_link import LOST, told
from .redis_scripts import SYNC, MalformedError, Message, Record, Script, Sync

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .concurrency import Mutex
    from .redis_feeds import Feeds
    from .redis_link import Listener, RedisLink
    from .redis_presence import Presence
    from .redis_scripts import Keys

_SILENCE_SECONDS = 2.0
"""After that much silence Redis is asked for a message, which has to come within as much again."""

_TICK_SECONDS = 0.5
_LONGEST_PAUSE = 5.0
_MESSAGES_IN_A_ROW = 256
_NAMES_AT_ONCE = 1000
_ENTRIES_OF_PAGE = 250
_BYTES_OF_PAGE = 256 * 1024

_logger = logging.getLogger(__name__)
_sync = Script(SYNC)


class RedisReader:
    """Follows the sequence in Redis for a broker.

    :param link: the connections.
    :param keys: the names of the keys.
    :param presence: where the number of subscribers is told.
    :param feeds: what is followed.
    :param mutex: held whenever ``feeds`` are touched.
    :param seconds: for how long a channel keeps events in Redis, in seconds.
    :param total: returns how many subscribers there are in all.
    :param on_change: called without the mutex when the books have changed; is told whether there
        may be something to send.
    :ivar is_connected: whether it hears what is published.
    """

    def __init__(
        self,
        link: RedisLink,
        keys: Keys,
        presence: Presence,
        feeds: Feeds,
        mutex: Mutex,
        seconds: int,
        total: Callable[[], int],
        on_change: Callable[[bool], None],
    ) -> None:
        self.is_connected = False
        self._link = link
        self._keys = keys
        self._presence = presence
        self._feeds = feeds
        self._mutex = mutex
        self._seconds = seconds
        self._total = total
        self._on_change = on_change
        self._is_started = False
        self._heard: set[str] = set()
        self._last_heard = self._next_tick = 0.0
        self._has_asked = False
        self._stopping = threading.Event()
        # Of its own, so that who seeds the common one for a test, or forks, has no part in it.
        self._chance = random.Random()

    def start(self) -> None:
        """Start to hear, unless it does already.

        :raises RuntimeError: if no thread can be started; the next call tries again.
        """
        with self._mutex:
            is_started, self._is_started = self._is_started, True
        if is_started:
            return
        try:
            # In a greenlet redis-py would block the hub, unless it is patched, and then such a
            # thread is a greenlet.
            threading.Thread(target=self._run, daemon=True, name="eventstream-redis").start()
        except RuntimeError:
            self._is_started = False
            raise

    def stop(self) -> None:
        """Stop to hear, soon. The connections are closed then."""
        self._stopping.set()
        with self._mutex:
            is_started, self._is_started = self._is_started, True
        if not is_started:
            self._link.close()

    def leave(self) -> None:
        """Stop to hear, and be counted out at once; for a process that is about to end."""
        self._stopping.set()
        if self.is_connected:
            self._leave()

    def sync(self) -> Sync:
        """Return where the sequence is, and be told so behind all that was before.

        :raises BrokerUnavailableError: if Redis did not answer, or refused.
        """
        return Sync.of(self._ask((), (0, 0)))

    def _ask(self, names: Sequence[str], page: tuple[Any, ...]) -> list[Any]:
        channels = [self._keys.channel(name) for name in names]
        keys = (self._keys.state, self._keys.marks, self._presence.key, *channels)
        reply: list[Any] = self._link.call(_sync, keys, lambda _: (self._seconds, *page))
        return reply

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                self._hear_on(self._link.listen())
            except (*LOST, BrokenChainError) as error:
                failures = 0 if self.is_connected else min(failures + 1, 10)
                if failures < 2:
                    _logger.warning("Redis is not heard, and is tried again: %s", told(error))
            except Exception:
                # Whatever it is: a stream whose broker hears nothing any more must not look alive.
                _logger.exception("Redis could not be read, and is tried again")
                failures = min(failures + 1, 10)
            self._set_connected(False)
            # Otherwise who comes and goes in vain would leave its channels here.
            self._presence.note(self._take_changed())
            self._stopping.wait(self._chance.uniform(0, min(_LONGEST_PAUSE, 0.05 * 2**failures)))
        self._leave()

    def _leave(self) -> None:
        try:
            self._presence.leave()
        except BrokerUnavailableError:
            # Its lease ends in any case.
            _logger.debug("not counted out", exc_info=True)
        self._link.close()

    def _set_connected(self, is_connected: bool) -> None:
        if is_connected and not self.is_connected:
            _logger.info("Redis at %s is heard", self._link.address)
        self.is_connected = is_connected
        self._on_change(True)

    def _hear_on(self, listener: Listener) -> None:
        try:
            listener.connect()
            self._begin(listener)
            self._set_connected(True)
            while not self._stopping.is_set():
                self._turn(listener)
        finally:
            listener.close()

    def _begin(self, listener: Listener) -> None:
        listener.send("SUBSCRIBE", [self._presence.key])
        with self._mutex:
            names = self._feeds.connect()
        self._heard = set()
        # What is heard before the streams are read is in them.
        self._subscribe(listener, names, ignoring=True)
        while missed := self._next(self._feeds.next_missed):
            self._read_page(missed)
        # To be told of the epoch, if nothing was missed.
        self._read_page(())
        self._last_heard, self._has_asked = time.monotonic(), False

    def _next(self, choose: Callable[[], list[str]]) -> list[str]:
        with self._mutex:
            return choose()

    def _turn(self, listener: Listener) -> None:
        # What comes while streams are read is heard between two pages.
        wait = 0.0 if self._feeds.unloaded else self._next_tick - time.monotonic()
        if listener.has_message(max(0.0, wait)):
            self._hear_all(listener)
        if self._feeds.unloaded:
            self._follow_more(listener)
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + _TICK_SECONDS
            self._tick(listener, now)

    def _hear_all(self, listener: Listener) -> None:
        is_read = False
        for _ in range(_MESSAGES_IN_A_ROW):
            is_read |= self._hear(listener.read())
            if not listener.has_message(0):
                break
        else:
            # What never waits never lets other greenlets run.
            time.sleep(0)
        self._last_heard, self._has_asked = time.monotonic(), False
        self._on_change(is_read)

    def _hear(self, message: list[Any]) -> bool:
        if message[0] != b"message":
            return False
        try:
            heard = Message.of(message[2], self._keys)
        except MalformedError:
            self._link.leave_out(message[1])
            return False
        with self._mutex:
            return self._feeds.hear(heard)

    def _follow_more(self, listener: Listener) -> None:
        names = self._next(self._feeds.next_unloaded)
        self._subscribe(listener, [name for name in names if name not in self._heard])
        self._read_page(names)
        self._on_change(True)

    def _subscribe(self, listener: Listener, names: Sequence[str], ignoring: bool = False) -> None:
        for some in _parts(names, _NAMES_AT_ONCE):
            listener.send("SUBSCRIBE", [self._keys.channel(name) for name in some])
            awaited = len(some)
            while awaited:
                message = listener.read()
                awaited -= message[0] == b"subscribe" and message[1] != self._presence.key
                if not ignoring:
                    self._hear(message)
            self._heard.update(some)

    def _read_page(self, names: Sequence[str]) -> None:
        with self._mutex:
            firsts = [self._feeds.first_wanted(name) for name in names]
            scale = self._feeds.page_scale(names)
        size = _ENTRIES_OF_PAGE * scale, _BYTES_OF_PAGE * scale
        reply = self._ask(names, (*size, *firsts))
        sync, pages = Sync.of(reply), reply[-1]
        with self._mutex:
            if self._feeds.begin(sync):
                return
        # It may not have got to the last of them.
        for name, (is_whole, entries) in zip(names, pages, strict=False):
            self._load(name, sync, entries, bool(is_whole))
        # What never waits never lets other greenlets run.
        time.sleep(0)

    def _load(self, name: str, sync: Sync, entries: list[Any] | None, is_whole: bool) -> None:
        if entries is None:
            self._link.leave_out(self._keys.channel(name))
        records = [Record.of(_with_fields(*entry)) for entry in entries or ()]
        if any(record.is_foreign for record in records):
            self._link.leave_out(self._keys.channel(name))
        # The number of a foreign one may be of another sequence.
        own = [each for each in records if each.seq <= sync.seq or not each.is_foreign]
        is_over = is_whole or records[-1].seq > sync.seq
        with self._mutex:
            self._feeds.load(name, sync, own, is_over)

    def _tick(self, listener: Listener, now: float) -> None:
        counts = self._take_changed()
        with self._mutex:
            unread = [name for name in counts if name not in self._feeds and name in self._heard]
        for some in _parts(unread, _NAMES_AT_ONCE):
            listener.send("UNSUBSCRIBE", [self._keys.channel(name) for name in some])
            self._heard.difference_update(some)
        silence = now - self._last_heard
        if silence >= 2 * _SILENCE_SECONDS and self._has_asked:
            raise ConnectionError(f"nothing was heard for {silence:.1f} s")
        if silence >= _SILENCE_SECONDS and not self._has_asked:
            self._has_asked = True
            self.sync()
        self._tell(counts)

    def _take_changed(self) -> dict[str, int]:
        with self._mutex:
            return self._feeds.take_changed()

    def _tell(self, counts: dict[str, int]) -> None:
        try:
            self._presence.tell(counts, self._total())
        except BrokerUnavailableError as error:
            if not error.is_refusal:
                raise
            # A server that is full refuses this, and what it sends is heard nevertheless.
            _logger.warning("The number of subscribers could not be told: %s", error)


def _with_fields(id: bytes, pairs: list[bytes]) -> tuple[bytes, dict[bytes, bytes]]:
    return id, dict(zip(pairs[::2], pairs[1::2], strict=True))


def _parts(names: Sequence[str], size: int) -> Iterable[list[str]]:
    left = iter(names)
    while part := list(islice(left, size)):
        yield part
