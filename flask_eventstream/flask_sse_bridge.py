"""What Flask-SSE sends comes over to the broker, and what the broker gets goes over to Flask-SSE.

Flask-SSE publishes with Redis' ``PUBLISH``, in which there is no room for an id, so that nothing
tells two equal messages apart, or whose they are. All processes hear the same messages in the same
order, though, and so they can count. The rules:

* Every process that serves subscribers hears the channels of Flask-SSE's that these read. Each
  offers every message to the broker, which takes it from the first one. So if one is killed, the
  others do what they did anyway.
* What counts as the same message: the *n*-th of its channel in its round. A round begins for all
  processes with a note, which whoever begins to hear a channel sends. It hears others' messages
  before that, and leaves them to those who have been there. They may not have come as far yet,
  and so it waits a while with its first offers: it must not overtake them.
* A copy of our own is sent in one step with a note before it. The message behind that note is the
  copy, and nobody offers it.
"""

from __future__ import annotations

import logging
import math
import random
import re
import secrets
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from . import concurrency
from .broker import channel_names
from .errors import BrokerUnavailableError, EventStreamError, InvalidFieldError
from .flask_sse_scripts import COPY, TAKE
from .local_broker import MINTED_HINT
from .redis_feeds import LEAST_KEPT, MARGIN_SECONDS
from .redis_link import LOST, MintedIdError, RedisLink, told
from .redis_scripts import Keys, Script

if TYPE_CHECKING:
    from collections.abc import Callable

    from .config import Config
    from .event import ServerSentEvent
    from .local_broker import LocalBroker
    from .redis_link import Listener

_TIMEOUT, _CONNECTIONS = 5, 8
_TICK_SECONDS, _SWEEP_SECONDS = 0.5, 5.0
_SILENCE_SECONDS = 2.0
_LONGEST_PAUSE = 5.0
_MESSAGES_IN_A_ROW = 256
_LEAST_PATIENCE = 20.0
_HOLD_SECONDS = 0.25
_MOST_IDLE = 10_000

_LEFT_OUT = "What came from Flask-SSE on %r was left out: %s"
_LOST_MEANWHILE = "Flask-SSE is not heard; what it sends meanwhile others may hear, or nobody: %s"

_TOKEN = re.compile(b"[0-9a-f]{16}")
_logger = logging.getLogger(__name__)
_take, _copy = Script(TAKE), Script(COPY)


class Bridge:
    """Between an app's broker and those who still use Flask-SSE.

    :param broker: the broker, in Redis.
    :param config: the app's configuration.
    :param url: the Redis server that Flask-SSE uses.
    :param as_event: makes an event of what Flask-SSE sends.

    A channel is heard from its first subscriber in this process on, and as long after its last one
    as that may come back for what it missed: ``EVENTSTREAM_HISTORY_SECONDS``.
    """

    def __init__(
        self,
        broker: LocalBroker,
        config: Config,
        url: str,
        as_event: Callable[[bytes], ServerSentEvent],
    ) -> None:
        self._broker = broker
        self._as_event = as_event
        self._prefix = config.key_prefix
        # At least: who has had it followed may not have subscribed yet.
        self._patience = max(config.history_seconds, _LEAST_PATIENCE)
        self._keep = max(config.history, LEAST_KEPT)
        self._seconds = math.ceil(config.history_seconds) + MARGIN_SECONDS
        self._link = RedisLink(url, _TIMEOUT, _CONNECTIONS)
        is_same = url == config.broker_url
        self._home = self._link if is_same else RedisLink(config.broker_url, _TIMEOUT, _CONNECTIONS)
        self._keys = Keys(config.key_prefix, self._home.database)
        # Of its own, so that who seeds the common one for a test, or forks, has no part in it.
        self._chance = random.Random()
        self._start()
        concurrency.call_after_fork(self._start)
        concurrency.call_at_exit(self.stop)

    def _start(self) -> None:
        # Once more in every forked child, which has neither the thread nor the connections.
        self._mutex = concurrency.new_mutex()
        self._progress = concurrency.Progress()
        self._stopping = threading.Event()
        self._is_started = self._has_failed = False
        # The time at which each was last read, by the monotonic clock.
        self._followed: dict[str, float] = {}
        self._heard: set[str] = set()
        self._ready: set[str] = set()
        # Until when which channel waits, and what waits: all of a channel for the same time.
        self._holds: dict[str, float] = {}
        self._held: list[tuple[float, str, str, int, bytes]] = []
        self._own = self._keys.process(secrets.token_hex(8))

    def copy(self, channel: str, text: str) -> None:
        """Send a copy of an event that the broker has.

        :param channel: its channel.
        :param text: the event, as Flask-SSE sends it.
        """
        arguments = [self._keys.notes, b"copy " + channel.encode(), channel, text]
        try:
            self._link.call(_copy, (), lambda _: arguments, begin=-math.inf)
        except BrokerUnavailableError as error:
            # An error would have the caller publish again what the broker has already. Those who
            # hear copies are promised nothing, by Flask-SSE neither.
            _logger.warning("No copy was sent to Flask-SSE: %s", error)

    def check(self, channel: str) -> None:
        """Refuse a channel that nobody may hear.

        :raises InvalidFieldError: if its name is not valid, or one that the broker itself uses.
        """
        channel_names(channel)
        if channel.startswith(self._prefix):
            raise InvalidFieldError("channel", channel, "is a name that the broker itself uses")

    def follow(self, channel: str) -> None:
        """Hear a channel of Flask-SSE's from now on, and wait until that is so.

        While Redis is away it is not waited for: the channel is heard once that is back.
        """
        with self._mutex:
            self._followed[channel] = time.monotonic()
            if channel in self._ready:
                return
        self._start_thread()
        self._wake()
        self._progress.wait_until(
            lambda: channel in self._ready or self._has_failed, self._link.patience
        )

    def stop(self) -> None:
        """Stop to hear, soon."""
        self._stopping.set()

    def _start_thread(self) -> None:
        with self._mutex:
            is_started, self._is_started = self._is_started, True
        if is_started:
            return
        try:
            # In a greenlet redis-py would block the hub, unless it is patched, and then such a
            # thread is a greenlet.
            threading.Thread(target=self._run, daemon=True, name="eventstream-flask-sse").start()
        except RuntimeError:
            self._is_started = False
            raise

    def _wake(self) -> None:
        try:
            self._link.pipeline([("PUBLISH", self._own, b"")], begin=-math.inf)
        except BrokerUnavailableError:
            # It wakes by itself within half a second, and says what is wrong with Redis.
            _logger.debug("not woken", exc_info=True)

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                self._hear_on(self._link.listen())
            except (*LOST, BrokerUnavailableError) as error:
                if not self._has_failed:
                    _logger.warning(_LOST_MEANWHILE, told(error))
            except Exception:
                # Whatever it is: what comes next has to be heard nevertheless.
                _logger.exception("Flask-SSE could not be heard, and is tried again")
            failures = min(failures + 1, 10) if self._has_failed else 0
            self._has_failed = True
            self._progress.notify()
            self._stopping.wait(self._chance.uniform(0, min(_LONGEST_PAUSE, 0.05 * 2**failures)))
        self._link.close()
        self._home.close()

    def _hear_on(self, listener: Listener) -> None:
        self._round, self._copied = "", b""
        self._joining: dict[str, list[str]] = {}
        self._counts: Counter[str] = Counter()
        self._next_sweep, self._last_heard, self._has_asked = 0.0, time.monotonic(), False
        try:
            listener.connect()
            listener.send("SUBSCRIBE", [self._keys.notes, self._own])
            while not self._stopping.is_set():
                self._turn(listener)
        finally:
            with self._mutex:
                self._heard, self._ready = set(), set()
            listener.close()

    def _turn(self, listener: Listener) -> None:
        self._join(listener)
        if listener.has_message(_HOLD_SECONDS / 5 if self._held else _TICK_SECONDS):
            self._hear_all(listener)
        self._offer_held()
        silence = time.monotonic() - self._last_heard
        if silence >= 2 * _SILENCE_SECONDS and self._has_asked:
            raise ConnectionError(f"nothing was heard for {silence:.1f} s")
        if silence >= _SILENCE_SECONDS and not self._has_asked:
            self._has_asked = True
            self._wake()
        if time.monotonic() >= self._next_sweep:
            self._leave_idle(listener)

    def _join(self, listener: Listener) -> None:
        with self._mutex:
            names = [name for name in self._followed if name not in self._heard]
            self._heard.update(names)
        if not names:
            return
        listener.send("SUBSCRIBE", [name.encode() for name in names])
        awaited = {name.encode() for name in names}
        while awaited:
            message = listener.read()
            self._hear(message)
            if message[0] == b"subscribe":
                awaited.discard(message[1])
        token = secrets.token_hex(8)
        self._joining[token] = names
        note = ("PUBLISH", self._keys.notes, f"round {token}")
        [processes] = self._link.pipeline([note], begin=-math.inf)
        until = time.monotonic() + (_HOLD_SECONDS if processes > 1 else 0)
        self._holds.update(dict.fromkeys(names, until))

    def _hear_all(self, listener: Listener) -> None:
        for _ in range(_MESSAGES_IN_A_ROW):
            self._hear(listener.read())
            if not listener.has_message(0):
                break
        else:
            # What never waits never lets other greenlets run.
            time.sleep(0)

    def _hear(self, message: list[Any]) -> None:
        self._last_heard, self._has_asked = time.monotonic(), False
        kind, name, text = message
        copied, self._copied = self._copied, b""
        if kind != b"message" or name in (self._own, copied):
            return
        if name == self._keys.notes:
            self._note(text)
        elif (channel := name.decode()) in self._ready:
            self._counts[channel] += 1
            due = self._holds[channel]
            self._held.append((due, channel, self._round, self._counts[channel], text))
            if due <= self._last_heard:
                self._offer_held()

    def _note(self, text: bytes) -> None:
        what, _, value = text.partition(b" ")
        if what == b"copy":
            self._copied = value
            return
        if what != b"round" or not _TOKEN.fullmatch(value):
            # Of another round each process would count anew, and take for old what is new.
            self._link.leave_out(self._keys.notes)
            return
        self._round = value.decode()
        self._counts.clear()
        with self._mutex:
            self._ready.update(self._heard.intersection(self._joining.pop(self._round, ())))
        self._has_failed = False
        self._progress.notify()

    def _offer_held(self) -> None:
        now = time.monotonic()
        due = [each for each in self._held if each[0] <= now]
        self._held = [each for each in self._held if each[0] > now]
        for each in due:
            self._offer(*each[1:])

    def _offer(self, channel: str, round: str, number: int, text: bytes) -> None:
        known = self._keys
        taken = known.taken(round, channel)
        keys = (known.state, known.marks, known.channel(channel), taken)
        try:
            event = self._as_event(text)
            wire = event.encode(self._broker.max_event_bytes)
            arguments = [self._keep, self._seconds, number, event.id or "", wire]
            self._home.call(_take, keys, lambda _: arguments)
        except MintedIdError as error:
            _logger.warning(_LEFT_OUT, channel, f"id={error.id!r} {MINTED_HINT}")
        except (EventStreamError, ValueError, RecursionError) as error:
            if isinstance(error, BrokerUnavailableError) and not error.is_refusal:
                raise
            _logger.warning(_LEFT_OUT, channel, error)

    def _leave_idle(self, listener: Listener) -> None:
        now = time.monotonic()
        self._next_sweep = now + _SWEEP_SECONDS
        read = [name for name in list(self._followed) if self._broker.local_count(name)]
        with self._mutex:
            self._followed.update(dict.fromkeys(read, now))
            idle = sorted((since, name) for name, since in self._followed.items() if since < now)
            # Not more than so many: anybody may make up names, one after another.
            left = idle[:-_MOST_IDLE] or [each for each in idle if each[0] < now - self._patience]
            names = [name for _, name in left]
            for name in names:
                del self._followed[name]
                self._holds.pop(name, None)
            self._ready.difference_update(names)
            self._heard.difference_update(names)
        if names:
            listener.send("UNSUBSCRIBE", [name.encode() for name in names])
