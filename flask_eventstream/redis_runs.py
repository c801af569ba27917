"""The runs of many processes: how each stands is kept in Redis, beside its log.

``eventstream:0:run:<key>``
    A hash: ``run``, the id; ``state``, ``last`` and ``producer``, as in a ``Standing``; ``bytes``,
    how much its log has. It expires some time after the run has ended, or was given up.
``eventstream:0:producer:<token>``
    The lease of a process that has active runs. Without it nothing is written for them.

The log of a run is a channel. What is written to it changes the hash in the same step, and only if
the run is active and, for its producer, the lease is there. So a process that stood still for too
long, and comes to life again, finds its writes refused.

A lease has to be renewed before it ends, and its end has to be seen, before ``lease`` seconds are
over: it ends after four fifths of them, is renewed each fifth, and looked at each tenth.
"""

from __future__ import annotations

import logging
import math
import secrets
from typing import TYPE_CHECKING, Any, NamedTuple

from . import concurrency
from .errors import BrokerUnavailableError
from .local_broker import LOG_PREFIX
from .redis_scripts import APPEND, STATE, Script
from .run_registry import ACTIVE, LOST, RunRegistry, Standing, Write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .redis_link import RedisLink
    from .redis_scripts import Keys

_MOST_ENTRIES = 1_000_000
"""More than fit into a log: it is its size in bytes that bounds it."""

_NO_LEASE = b"no lease"
_TORN = b"torn"
_logger = logging.getLogger(__name__)

BEGIN = """
-- Begins a run. KEYS: 1 its hash, 2 the lease.
-- ARGV: 1 the run, 2 the token of the producer, 3 how long to wait for its first write (ms).
-- Returns 1, or 0 if another one is active, or 'no lease'.
if redis.call('EXISTS', KEYS[2]) == 0 then
  return 'no lease'
end
local before = redis.call('HMGET', KEYS[1], 'run', 'state')
if before[1] == ARGV[1] then
  return 1
end
if before[2] == 'active' then
  return 0
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'run', ARGV[1], 'producer', ARGV[2],
  'state', 'active', 'last', 0, 'bytes', 0)
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""
"""Begins a run. If the answer is lost, so is its hash, soon."""

FIND = """
-- Tells how a run stands. KEYS[1]: its hash. ARGV[1]: what the names of leases begin with.
local found = redis.call('HMGET', KEYS[1], 'run', 'state', 'last', 'producer')
if not found[1] then
  return {}
end
found[5] = redis.call('EXISTS', ARGV[1] .. found[4])
return found
"""
"""Tells how a run stands, and whether its producer has its lease."""

WRITE = (
    STATE
    + """
-- Writes to the log of a run. KEYS: 3 the log, 4 the hash, 5 the lease.
-- ARGV: 1 how many entries a log keeps, 2 for how many seconds, 3 and how many bytes; 4 the run;
-- 5 '1' if the lease has to be there, '0' if it must not be, '' if that does not matter; 6 the
-- number of the last event, or '' for the next one, whose wire then lacks its id; 7 the state
-- afterwards; 8 the wire; 9 '1' if the hash is to be forgotten; 10 the number of events.
-- Returns the state, and 1 if this has made it so. It is 'torn' if events before these are missing.
local keep, seconds, nonce, most = tonumber(ARGV[1]), tonumber(ARGV[2]), '', tonumber(ARGV[3])
local found = redis.call('HMGET', KEYS[4], 'run', 'state', 'last', 'bytes')
if found[1] ~= ARGV[4] then
  return {'gone', 0}
end
if found[2] ~= 'active' then
  return {found[2], 0}
end
local lives = tostring(redis.call('EXISTS', KEYS[5]))
if ARGV[5] ~= '' and ARGV[5] ~= lives then
  return {lives == '1' and 'active' or 'lost', 0}
end
local last, wire = tonumber(ARGV[6]), ARGV[8]
if not last then
  last = tonumber(found[3]) + 1
  wire = string.format('%sid: %s.%.0f\\n\\n', string.sub(wire, 1, -2), ARGV[4], last)
elseif last <= tonumber(found[3]) then
  return {'active', 1}
elseif last - tonumber(ARGV[10]) > tonumber(found[3]) then
  return {'torn', 0}
end

local last_key, first, events = 3, 1, {string.format('%s.%.0f', ARGV[4], last), '', wire}
if ARGV[7] ~= 'active' then
  events[4], events[5], events[6] = '', '', ''
end
"""
    + APPEND
    + """
local bytes = tonumber(found[4]) + #wire + 256
while bytes > most do
  local oldest = redis.call('XRANGE', KEYS[3], '-', '+', 'COUNT', 1)[1]
  if tonumber(string.match(oldest[1], '%d+')) >= seq then
    break
  end
  redis.call('XDEL', KEYS[3], oldest[1])
  bytes = bytes - #oldest[2][8] - 256
end
redis.call('HSET', KEYS[4], 'state', ARGV[7], 'last', string.format('%.0f', last), 'bytes', bytes)
redis.call('EXPIRE', KEYS[4], seconds)
if ARGV[9] == '1' then
  redis.call('DEL', KEYS[4])
end
return {ARGV[7], 1}
"""
)
"""Writes to the log of a run, if its writer has the right to; the comments in it say how."""

_begin, _find, _write = Script(BEGIN), Script(FIND), Script(WRITE)


class _Own(NamedTuple):
    key: str
    token: str
    stop: Callable[[], None]
    lost: bytes


class RedisRegistry(RunRegistry):
    """The runs of many processes.

    :param link: the connections to Redis.
    :param keys: the names of the keys.
    :param count: returns how many subscribers a channel has in this process.
    :param seconds: how long a run is kept after its end, in seconds.
    :param lease: after how many seconds a producer that is not heard of is lost.
    :param max_bytes: how much of a log is kept, in bytes.
    """

    def __init__(
        self,
        link: RedisLink,
        keys: Keys,
        count: Callable[[str], int],
        seconds: float,
        lease: float,
        max_bytes: int,
    ) -> None:
        self._link = link
        self._keys = keys
        self._count = count
        self._seconds = math.ceil(seconds)
        self._lease_ms = int(lease * 800)
        self._pause = lease / 10
        self._max_bytes = max_bytes
        self._start()
        concurrency.call_after_fork(self._start)
        concurrency.call_at_exit(self.close)

    def _start(self) -> None:
        # Once more in every forked child, whose parent goes on with its runs.
        self._token = secrets.token_hex(8)
        self._own: dict[str, _Own] = {}
        self._watched: dict[str, tuple[str, str, bytes]] = {}
        self._rounds = 0
        self._keeper = concurrency.Waker(self._keep)

    def begin(self, key: str, run: str, stop: Callable[[], None], lost: bytes) -> bool:
        """Begin a run; see :meth:`RunRegistry.begin`."""
        while True:
            token = self._token
            keys = (self._keys.run(key), self._keys.producer(token))
            [reply] = self._link.call_many(_begin, [(keys, (run, token, self._lease_ms))])
            if reply != _NO_LEASE:
                break
            self._take_lease(token)
        if reply:
            self._own[run] = _Own(key, token, stop, lost)
            self._start_keeper()
        return bool(reply)

    def _start_keeper(self) -> None:
        self._keeper.start()
        # Should it be about to end, for want of runs, this keeps it.
        self._keeper.ring()

    def _take_lease(self, token: str) -> None:
        if token == self._token:
            # Never the old one again: what it was refused must stay refused.
            self._token = secrets.token_hex(8)
        lease = self._keys.producer(self._token)
        self._link.pipeline([("SET", lease, "", "PX", self._lease_ms)])

    def find(self, key: str) -> Standing | None:
        """Return how a run stands; see :meth:`RunRegistry.find`."""
        keys, values = (self._keys.run(key),), (self._keys.producer(""),)
        found = self._link.call(_find, keys, lambda _: values)
        if not found:
            return None
        run, state, last, producer, lives = found
        is_lost = state.decode() == ACTIVE and not lives
        return Standing(run.decode(), state.decode(), int(last), producer.decode(), is_lost)

    def write(self, writes: Sequence[Write]) -> list[bool]:
        """Write to logs; see :meth:`RunRegistry.write`."""
        pairs = [(write, self._own.get(write.run)) for write in writes]
        own = [(write, one) for write, one in pairs if one is not None]
        replies = self._link.call_many(_write, [self._call_of(*each) for each in own])
        for (write, one), (state, _) in zip(own, replies, strict=True):
            if state == _TORN:
                # A server has crashed, and came back without the newest events.
                self._end(one.key, write.run, LOST, one.lost)
            if state.decode() != ACTIVE:
                self._own.pop(write.run, None)
        return [write.run in self._own for write in writes]

    def _call_of(self, write: Write, own: _Own) -> tuple[Sequence[bytes], Sequence[Any]]:
        # The lease that the run was begun with, and not one that the process has by now.
        keys = self._keys_of(own.key, write.run, self._keys.producer(own.token))
        count = write.wire.count(b"\n\n")
        values = write.last, write.state, write.wire, int(write.is_forgotten), count
        return keys, (*self._limits(write.run), "1", *values)

    def _limits(self, run: str) -> tuple[int, int, int, str]:
        return _MOST_ENTRIES, self._seconds, self._max_bytes, run

    def _keys_of(self, key: str, run: str, lease: bytes) -> tuple[bytes, ...]:
        names = self._keys
        return names.state, names.marks, self._log(run), names.run(key), lease

    def _log(self, run: str) -> bytes:
        return self._keys.channel(LOG_PREFIX + run)

    def end(self, key: str, run: str, state: str, wire: bytes) -> bool:
        """End a run from outside; see :meth:`RunRegistry.end`."""
        if state != LOST:
            return self._end(key, run, state, wire)
        standing = self.find(key)
        return standing is not None and self._end(key, run, state, wire, standing.producer)

    def _end(self, key: str, run: str, state: str, wire: bytes, producer: str = "") -> bool:
        # With a producer, only if that has no lease.
        keys = self._keys_of(key, run, self._keys.producer(producer))
        values = *self._limits(run), "0" if producer else "", "", state, wire, 0, 1
        _, is_done = self._link.call(_write, keys, lambda _: values)
        if is_done:
            self._stop([run])
        return bool(is_done)

    def _stop(self, runs: Iterable[str]) -> None:
        for run in runs:
            own = self._own.pop(run, None)
            if own is not None:
                own.stop()

    def watch(self, key: str, standing: Standing, wire: bytes) -> None:
        """Have a run ended should its producer be lost; see :meth:`RunRegistry.watch`."""
        self._watched[standing.run] = key, standing.producer, wire
        self._start_keeper()

    def _keep(self) -> bool:
        try:
            if self._own and self._rounds % 2 == 0:
                self._renew()
            self._end_lost()
        except BrokerUnavailableError as error:
            # Whether that was too long for the lease will be seen when Redis is back.
            _logger.debug("the lease of this process may end: %s", error)
        except Exception:
            _logger.exception("Leases could not be looked after; that is tried again")
        self._rounds += 1
        concurrency.new_event().wait(self._pause)
        if self._own or self._watched:
            self._keeper.ring()
        return False

    def _renew(self) -> None:
        own = dict(self._own)
        hashes, seconds = [self._keys.run(one.key) for one in own.values()], self._seconds
        commands: list[tuple[Any, ...]] = [
            ("PEXPIRE", self._keys.producer(self._token), self._lease_ms),
            *[("HMGET", one, "run", "state") for one in hashes],
            *[("EXPIRE", one, seconds) for one in (*hashes, *map(self._log, own))],
        ]
        # One attempt, and the next round is the next one.
        lives, *found = self._link.pipeline(commands, begin=-math.inf)
        if not lives:
            _logger.warning("This process was not heard of in time: its %d runs are lost", len(own))
            self._stop(own)
        states = zip(own, found, strict=False)
        self._stop([run for run, state in states if state != [run.encode(), ACTIVE.encode()]])

    def _end_lost(self) -> None:
        for run in tuple(self._watched):
            if not self._count(LOG_PREFIX + run):
                del self._watched[run]
        watched = dict(self._watched)
        tokens = sorted({producer for _, producer, _ in watched.values()})
        if not tokens:
            return
        commands = [("EXISTS", self._keys.producer(token)) for token in tokens]
        lives = dict(zip(tokens, self._link.pipeline(commands, begin=-math.inf), strict=True))
        for run, (key, producer, wire) in watched.items():
            if not lives[producer]:
                self._end(key, run, LOST, wire, producer)
                self._watched.pop(run, None)

    def close(self) -> None:
        """Give up all runs of this process, so that others see at once that they are lost."""
        if not self._own:
            return
        try:
            self._link.pipeline([("DEL", self._keys.producer(self._token))], begin=-math.inf)
        except BrokerUnavailableError:
            # It ends in any case.
            _logger.debug("the lease could not be given back", exc_info=True)
