"""The runs of many processes: how each stands is kept in Redis, beside its log.

``eventstream:0:run:<key>``
    A hash: ``run``, the id; ``state``, ``last`` and ``producer``, as in a ``Standing``; ``bytes``,
    how much its log has. It expires some time after the run has ended, or was given up.
``eventstream:0:producer:<token>``
    The lease of a process that has active runs. Without it nothing is written for them.
``eventstream:0:owner:<digest>``
    A sorted set: the runs of an owner whose producers have not ended, and until when each counts by
    the time of Redis (ms) if its process is not heard of any more.
``eventstream:0:ended``
    A sorted set: the runs that have ended, as ``<run> <bytes> <name of its hash>``, and when (ms).
    How much they have together is ``ended`` in ``eventstream:0:state``. Beyond a limit the oldest
    are forgotten.

The log of a run is a channel. What is written to it changes the hash in the same step, and only if
the run is active and, for its producer, the lease is there. So a process that stood still for too
long, and comes to life again, finds its writes refused.

A run is begun, counted for its owner, and its process' lease taken, in one step. A lease that has
ended is never taken again, as the runs that had it are lost: the process takes its next one, which
it has told with each call, so that calls at the same moment take the same.

A lease has to be renewed before it ends, and its end has to be seen, before ``lease`` seconds are
over: it ends after four fifths of them, is renewed each fifth, and looked at each tenth.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from typing import TYPE_CHECKING, Any

from . import concurrency
from .errors import BrokerUnavailableError
from .local_broker import LOG_PREFIX
from .redis_scripts import APPEND, STATE, Script
from .run_registry import (
    ACTIVE,
    LOST,
    MAX_RUNS_PER_OWNER,
    NoRoomError,
    RunRegistry,
    Standing,
    Write,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .redis_link import RedisLink
    from .redis_scripts import Keys

_MOST_ENTRIES = 1_000_000
"""More than fit into a log: it is its size in bytes that bounds it."""

_TORN = b"torn"
_logger = logging.getLogger(__name__)

STANDING = """
-- Returns what is known of a run: its id, state, last number, producer, and bytes. What was not
-- written here is nothing, and the next run takes its place.
local function standing(key)
  local found = redis.pcall('HMGET', key, 'run', 'state', 'last', 'producer', 'bytes')
  for n, pattern in ipairs({'^[%w%p]+$', '^[%l-]+$', '^%d+$', '^[%w%p]+$', '^%d+$'}) do
    if found.err or not string.match(found[n] or '', pattern) or #found[n] > 64 then
      return {}
    end
  end
  return found
end
"""

BEGIN = (
    STANDING
    + """
-- Begins a run. KEYS: 1 its hash, 2 the lease of its process, 3 the next one, which it takes if
-- that has ended, 4 the runs of its owner.
-- ARGV: 1 the run, 2 the token of the lease, 3 that of the next one, 4 what the names of leases
-- begin with, 5 for how long a lease lasts (ms), 6 how many runs the owner may have, or 0 for any
-- number.
-- Returns how the run stands that the key has now, as below; nothing if the owner has too many.
local found = standing(KEYS[1])
if found[1] == ARGV[1] or found[2] == 'active' then
  found[5] = redis.call('EXISTS', ARGV[4] .. found[4])
  return found
end
if ARGV[6] ~= '0' then
  local clock = redis.call('TIME')
  local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
  redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', now)
  if redis.call('ZCARD', KEYS[4]) >= tonumber(ARGV[6]) then
    return {}
  end
  redis.call('ZADD', KEYS[4], string.format('%.0f', now + ARGV[5]), ARGV[1])
  redis.call('PEXPIRE', KEYS[4], ARGV[5])
end
local token = ARGV[2]
if redis.call('PEXPIRE', KEYS[2], ARGV[5]) == 0 then
  redis.call('SET', KEYS[3], '', 'PX', ARGV[5])
  token = ARGV[3]
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'run', ARGV[1], 'producer', token,
  'state', 'active', 'last', 0, 'bytes', 0)
redis.call('PEXPIRE', KEYS[1], ARGV[5])
return {ARGV[1], 'active', '0', token, 1}
"""
)
"""Begins a run. If the answer is lost, it is soon forgotten, and counts no more."""

KEEP = """
-- Keeps a run whose producer goes on. KEYS: 1 its hash, 2 its log, 3 the runs of its owner.
-- ARGV: 1 the run, 2 for how many seconds it is kept, 3 for how long a lease lasts (ms).
-- Returns 1 if it is active.
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('ZADD', KEYS[3], 'XX', string.format('%.0f', now + ARGV[3]), ARGV[1])
redis.call('PEXPIRE', KEYS[3], ARGV[3])
local found = redis.call('HMGET', KEYS[1], 'run', 'state')
if found[1] ~= ARGV[1] or found[2] ~= 'active' then
  return 0
end
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[2])
return 1
"""
"""Keeps a run whose producer goes on; one that was cancelled only counts for its owner."""

FIND = (
    STANDING
    + """
-- Tells how a run stands. KEYS[1]: its hash. ARGV[1]: what the names of leases begin with.
local found = standing(KEYS[1])
if not found[1] then
  return {}
end
found[5] = redis.call('EXISTS', ARGV[1] .. found[4])
return found
"""
)
"""Tells how a run stands, and whether its producer has its lease."""

WRITE = (
    STATE
    + STANDING
    + """
-- Writes to the log of a run. KEYS: 3 the log, 4 the hash, 5 the lease, 6 the runs of its owner,
-- 7 those that have ended.
-- ARGV: 1 how many entries a log keeps, 2 for how many seconds, 3 and how many bytes; 4 the run;
-- 5 '1' if the lease has to be there, '0' if it must not be, '' if that does not matter; 6 the
-- number of the last event, or '' for the next one, whose wire then lacks its id; 7 the state
-- afterwards; 8 the wire; 9 '1' if the hash is to be forgotten; 10 the number of events; 11 '1' if
-- the producer has ended; 12 how many bytes of runs that have ended are kept.
-- Returns the state, and 1 if this has made it so. It is 'torn' if events before these are missing.
local keep, seconds, nonce, most = tonumber(ARGV[1]), tonumber(ARGV[2]), '', tonumber(ARGV[3])
if ARGV[11] == '1' then
  redis.call('ZREM', KEYS[6], ARGV[4])
end
local found = standing(KEYS[4])
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
local bytes = tonumber(found[5]) + #wire + 256
while bytes > most do
  local oldest = redis.call('XRANGE', KEYS[3], '-', '+', 'COUNT', 1)[1]
  if tonumber(string.match(oldest[1], '%d+')) >= seq then
    break
  end
  redis.call('XDEL', KEYS[3], oldest[1])
  bytes = bytes - #(oldest[2][8] or '') - 256
end
redis.call('HSET', KEYS[4], 'state', ARGV[7], 'last', string.format('%.0f', last), 'bytes', bytes)
redis.call('EXPIRE', KEYS[4], seconds)
if ARGV[9] == '1' then
  redis.call('DEL', KEYS[4])
end
if ARGV[7] ~= 'active' then
  local ended = redis.call('EXISTS', KEYS[7]) == 1 and redis.call('HGET', KEYS[1], 'ended') or 0
  local own = string.format('%s %.0f %s', ARGV[4], bytes + 1024, KEYS[4])
  redis.call('ZADD', KEYS[7], string.format('%.0f', now), own)
  redis.call('EXPIRE', KEYS[7], seconds)
  ended = ended + bytes + 1024
  local logs = string.sub(KEYS[3], 1, -#ARGV[4] - 1)
  while true do
    local oldest = redis.call('ZRANGE', KEYS[7], 0, 0, 'WITHSCORES')
    local is_old = tonumber(oldest[2]) <= now - seconds * 1000
    if oldest[1] == own or not is_old and ended <= tonumber(ARGV[12]) then
      break
    end
    local run, size, hash = string.match(oldest[1], '^(%S+) (%d+) (.*)$')
    redis.call('ZREM', KEYS[7], oldest[1])
    redis.call('DEL', logs .. run)
    if redis.call('HGET', hash, 'run') == run then
      redis.call('DEL', hash)
    end
    ended = ended - size
  end
  redis.call('HSET', KEYS[1], 'ended', string.format('%.0f', ended))
end
return {ARGV[7], 1}
"""
)
"""Writes to the log of a run, if its writer has the right to; the comments in it say how."""

_begin, _keep, _find, _write = Script(BEGIN), Script(KEEP), Script(FIND), Script(WRITE)


class _Own:
    # A run whose producer goes on, or whose last write is still to be made. It is over once
    # somebody else has ended it.
    __slots__ = ("is_over", "key", "lost", "owner", "stop", "token")

    def __init__(
        self, key: str, token: str, stop: Callable[[], None], lost: bytes, owner: str
    ) -> None:
        self.key = key
        self.token = token
        self.stop = stop
        self.lost = lost
        self.owner = owner
        self.is_over = False


class RedisRegistry(RunRegistry):
    """The runs of many processes.

    :param link: the connections to Redis.
    :param keys: the names of the keys.
    :param count: returns how many subscribers a channel has in this process.
    :param seconds: how long a run is kept after its end, in seconds.
    :param lease: after how many seconds a producer that is not heard of is lost.
    :param max_bytes: how much of a log is kept, in bytes.
    :param max_ended_bytes: how much is kept of the runs of all processes that have ended, in bytes.
    :param max_per_owner: how many runs one owner may have, in all processes.
    """

    def __init__(
        self,
        link: RedisLink,
        keys: Keys,
        count: Callable[[str], int],
        seconds: float,
        lease: float,
        max_bytes: int,
        max_ended_bytes: int,
        max_per_owner: int = MAX_RUNS_PER_OWNER,
    ) -> None:
        self._link = link
        self._keys = keys
        self._count = count
        self._seconds = math.ceil(seconds)
        self._lease_ms = int(lease * 800)
        self._times = self._seconds, self._lease_ms
        self._pause = lease / 10
        self._max_bytes = max_bytes
        self._max_ended_bytes = max_ended_bytes
        self._max_per_owner = max_per_owner
        self._start()
        concurrency.call_after_fork(self._start)
        concurrency.call_at_exit(self.close)

    def _start(self) -> None:
        # Once more in every forked child, whose parent goes on with its runs.
        # That of the lease, and that of the next one.
        self._tokens = secrets.token_hex(8), secrets.token_hex(8)
        self._mutex = concurrency.new_mutex()
        self._own: dict[str, _Own] = {}
        # Those of which it is not known whether they were begun, and until when that matters.
        self._doubtful: dict[str, tuple[float, _Own]] = {}
        self._watched: dict[str, tuple[str, str, bytes]] = {}
        self._rounds = 0
        self._keeper = concurrency.Waker(self._keep)

    def begin(
        self, key: str, run: str, stop: Callable[[], None], lost: bytes, owner: str = ""
    ) -> Standing:
        """Begin a run; see :meth:`RunRegistry.begin`."""
        tokens = self._tokens
        names = self._keys
        keys = names.run(key), *map(names.producer, tokens), names.owner(owner)
        limit = self._max_per_owner if owner else 0
        values = run, *tokens, names.producer(""), self._lease_ms, limit
        try:
            found = self._link.call(_begin, keys, lambda _: values)
        except BrokerUnavailableError:
            # It may have been begun nevertheless.
            until = time.monotonic() + self._lease_ms / 1000
            self._doubtful[run] = until, _Own(key, "", stop, lost, owner)
            self._start_keeper()
            raise
        if not found:
            raise NoRoomError
        standing = _standing(found)
        if standing.run == run:
            self._take_lease(standing.producer)
            self._own[run] = _Own(key, standing.producer, stop, lost, owner)
            self._start_keeper()
        return standing

    def _take_lease(self, token: str) -> None:
        with self._mutex:
            if token == self._tokens[1]:
                self._tokens = token, secrets.token_hex(8)

    def _start_keeper(self) -> None:
        self._keeper.start()
        # Should it be about to end, for want of runs, this keeps it.
        self._keeper.ring()

    def find(self, key: str) -> Standing | None:
        """Return how a run stands; see :meth:`RunRegistry.find`."""
        keys, values = (self._keys.run(key),), (self._keys.producer(""),)
        found = self._link.call(_find, keys, lambda _: values)
        return _standing(found) if found else None

    def write(self, writes: Sequence[Write]) -> list[bool]:
        """Write to logs; see :meth:`RunRegistry.write`."""
        pairs = [(write, self._own.get(write.run)) for write in writes]
        own = [
            (write, one)
            for write, one in pairs
            if one is not None and (write.state != ACTIVE or not one.is_over)
        ]
        replies = self._link.call_many(_write, [self._call_of(*each) for each in own])
        for (write, one), (state, _) in zip(own, replies, strict=True):
            if state == _TORN:
                # A server has crashed, and came back without the newest events.
                self._end(one.key, write.run, LOST, one.lost)
            one.is_over |= state.decode() != ACTIVE
            if write.state != ACTIVE:
                self._own.pop(write.run, None)
        return [one is not None and not one.is_over for _, one in pairs]

    def _call_of(self, write: Write, own: _Own) -> tuple[Sequence[bytes], Sequence[Any]]:
        # The lease that the run was begun with, and not one that the process has by now.
        keys = self._keys_of(own.key, write.run, own.token, own.owner)
        count, has_ended = write.wire.count(b"\n\n"), int(write.state != ACTIVE)
        values = write.last, write.state, write.wire, int(write.is_forgotten), count, has_ended
        return keys, (*self._limits(write.run), "1", *values, self._max_ended_bytes)

    def _limits(self, run: str) -> tuple[int, int, int, str]:
        return _MOST_ENTRIES, self._seconds, self._max_bytes, run

    def _keys_of(self, key: str, run: str, producer: str, owner: str) -> tuple[bytes, ...]:
        names = self._keys
        own = names.run(key), names.producer(producer), names.owner(owner)
        return names.state, names.marks, self._log(run), *own, names.ended

    def _log(self, run: str) -> bytes:
        return self._keys.channel(LOG_PREFIX + run)

    def end(self, key: str, run: str, state: str, wire: bytes) -> bool:
        """End a run from outside; see :meth:`RunRegistry.end`."""
        if state != LOST:
            return self._end(key, run, state, wire)
        standing = self.find(key)
        return standing is not None and self._end(key, run, state, wire, standing.producer)

    def _end(
        self,
        key: str,
        run: str,
        state: str,
        wire: bytes,
        producer: str = "",
        owner: str | None = None,
    ) -> bool:
        # With a producer, only if that has no lease; with an owner, for which it then counts no
        # more.
        keys = self._keys_of(key, run, producer, owner or "")
        flags = 0, 1, int(owner is not None), self._max_ended_bytes
        values = *self._limits(run), "0" if producer else "", "", state, wire, *flags
        _, is_done = self._link.call(_write, keys, lambda _: values)
        if is_done:
            self._stop([run])
        return bool(is_done)

    def _stop(self, runs: Iterable[str]) -> None:
        for run in runs:
            own = self._own.get(run)
            if own is not None and not own.is_over:
                own.is_over = True
                own.stop()

    def watch(self, key: str, standing: Standing, wire: bytes) -> None:
        """Have a run ended should its producer be lost; see :meth:`RunRegistry.watch`."""
        self._watched[standing.run] = key, standing.producer, wire
        self._start_keeper()

    def _keep(self) -> bool:
        try:
            if self._own and self._rounds % 2 == 0:
                self._renew()
            self._end_doubtful()
            self._end_lost()
        except BrokerUnavailableError as error:
            # Whether that was too long for the lease will be seen when Redis is back.
            _logger.debug("the lease of this process may end: %s", error)
        except Exception:
            _logger.exception("Leases could not be looked after; that is tried again")
        self._rounds += 1
        concurrency.new_event().wait(self._pause)
        if self._own or self._watched or self._doubtful:
            self._keeper.ring()
        return False

    def _renew(self) -> None:
        own, names = dict(self._own), self._keys
        tokens = sorted({one.token for one in own.values()})
        # One attempt, and the next round is the next one.
        leases = [("PEXPIRE", names.producer(token), self._lease_ms) for token in tokens]
        lives = dict(zip(tokens, self._link.pipeline(leases, begin=-math.inf), strict=True))
        lost = [run for run, one in own.items() if not (one.is_over or lives[one.token])]
        if lost:
            _logger.warning(
                "This process was not heard of in time: its %d runs are lost", len(lost)
            )
            self._stop(lost)
        calls = [
            ((names.run(one.key), self._log(run), names.owner(one.owner)), (run, *self._times))
            for run, one in own.items()
        ]
        found = self._link.call_many(_keep, calls, begin=-math.inf)
        self._stop([run for run, is_active in zip(own, found, strict=True) if not is_active])

    def _end_doubtful(self) -> None:
        for run, (until, one) in tuple(self._doubtful.items()):
            if time.monotonic() < until:
                self._end(one.key, run, LOST, one.lost, owner=one.owner)
            del self._doubtful[run]

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
        tokens = {one.token for one in tuple(self._own.values())}
        if not tokens:
            return
        try:
            self._link.pipeline([("DEL", *map(self._keys.producer, tokens))], begin=-math.inf)
        except BrokerUnavailableError:
            # It ends in any case.
            _logger.debug("the lease could not be given back", exc_info=True)


def _standing(found: Sequence[Any]) -> Standing:
    run, state, last, producer, lives = found
    is_lost = state.decode() == ACTIVE and not lives
    return Standing(run.decode(), state.decode(), int(last), producer.decode(), is_lost)
