"""Who is present in many processes: kept in Redis, beside the events that tell of it.

``eventstream:0:members:<channel>``
    A sorted set, all of the score 0: the members, those that are about to leave among them.
``eventstream:0:connected:<channel>``
    A hash: in how many processes a member has connections.
``eventstream:0:present:<token>``
    A hash: the members that a process has, as ``<channel>``, a line feed and the name; under the
    empty name the number of what it has told last.
``eventstream:0:leases``
    A sorted set: until when a process counts as alive that does not say anything more.
``eventstream:0:leaving``
    A sorted set: which members without connections leave when. Both times are those of Redis, in
    milliseconds.

A process tells which members it has, and never how they have changed. So it does no harm if it
tells so twice. What it tells has a number: should an older call come late, out of a server that
stood still, it changes nothing. Members of a process whose lease has ended leave, unless others
have them too. Each call also looks for what is due, of any process: whoever comes first announces.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from . import concurrency
from .errors import BrokerUnavailableError
from .members import LOOK_SECONDS, Members
from .redis_presence import LEASE_SECONDS
from .redis_scripts import APPEND, STATE, Script

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .members import Pair, Stay
    from .redis_link import RedisLink
    from .redis_scripts import Keys

_PAIRS_AT_ONCE = 250
_logger = logging.getLogger(__name__)

TELL = (
    STATE
    + r"""
-- Tells which members a process has, announces who has come and gone, and tells who is there.
-- KEYS: 3 the leases, 4 who is leaving. ARGV: 1 how many events a channel keeps, 2 for how many
-- seconds, 3 what all keys begin with, 4 the token of the process or '', 5 the number of this call,
-- 6 for how many milliseconds the process counts as alive, 7 a channel to be told of, 8 how many of
-- its members at most, or 0; then for each member a channel, the name, and '' if the process has it
-- or for how many milliseconds it is waited for.
-- Returns 1 if the process was alive, 1 if it has members, 1 if more is due, how many members the
-- channel has, and their names.
local keep, seconds, nonce = tonumber(ARGV[1]), tonumber(ARGV[2]), ''
local prefix, token, leases, leaving = ARGV[3], ARGV[4], KEYS[3], KEYS[4]

-- What is of another type was not written here. No member could come or go, on any channel.
local function fit(key, kind)
  local found = redis.pcall(kind == 'hash' and 'HLEN' or 'ZCARD', key)
  if type(found) == 'table' and found.err then
    redis.log(redis.LOG_WARNING, key .. ' was no ' .. kind .. ' and is begun anew')
    redis.call('DEL', key)
  end
  return key
end

-- Anybody may come and go as often as it likes, and must not push out what others have said.
local function make_room(channel)
  local told = fit(prefix .. 'told:' .. channel, 'zset')
  if redis.call('ZCOUNT', told, '(' .. string.format('%.0f', seq), '+inf') > 0 then
    -- Of a time that the state knows nothing of any more.
    redis.call('DEL', told)
  end
  redis.call('ZADD', told, seq + 1, string.format('%.0f-%.0f', seq + 1, now))
  redis.call('EXPIRE', told, seconds)
  if redis.call('ZCARD', told) > math.max(keep, 1024) then
    local oldest = redis.call('ZRANGE', told, 0, 0)[1]
    redis.call('ZREM', told, oldest)
    redis.pcall('XDEL', prefix .. 'channel:' .. channel, oldest)
  end
end

local function append(channel, wire)
  local KEYS, last_key = {KEYS[1], KEYS[2], prefix .. 'channel:' .. channel}, 3
  local events, first = {'', '\1', wire}, 1
"""
    + APPEND
    + r"""
end

local function announce(type, channel, member)
  local count = redis.call('ZCARD', prefix .. 'members:' .. channel)
  -- It is the only one that writes a slash as two characters.
  local name = string.gsub(cjson.encode(member), '\\/', '/')
  make_room(channel)
  append(channel, 'event: ' .. type .. '\ndata: {"member": ' .. name .. ', "count": ' .. count ..
    '}\n\n')
end

local function connect(channel, member, change)
  local connected = fit(prefix .. 'connected:' .. channel, 'hash')
  local count = (tonumber(redis.call('HGET', connected, member) or 0) or 0) + change
  -- Neither nothing, nor infinite.
  if count > 0 and count < 2^53 then
    redis.call('HSET', connected, member, string.format('%.0f', count))
    return true
  end
  redis.call('HDEL', connected, member)
end

local function come(pair, channel, member)
  connect(channel, member, 1)
  redis.call('ZREM', leaving, pair)
  if redis.call('ZADD', fit(prefix .. 'members:' .. channel, 'zset'), 0, member) == 1 then
    announce('join', channel, member)
  end
end

local function go(pair, channel, member, due)
  if not connect(channel, member, -1) then
    redis.call('ZADD', leaving, due, pair)
  end
end

fit(leases, 'zset')
fit(leaving, 'zset')
local lived, has = 0, 0
if token ~= '' then
  local own = prefix .. 'present:' .. token
  lived = redis.call('ZSCORE', leases, token) and 1 or 0
  if (tonumber(redis.call('HGET', fit(own, 'hash'), '') or 0) or 0) < tonumber(ARGV[5]) then
    redis.call('HSET', own, '', ARGV[5])
    for a = 9, #ARGV, 3 do
      local channel, member, wait = ARGV[a], ARGV[a + 1], ARGV[a + 2]
      local pair = channel .. '\n' .. member
      if wait == '' and redis.call('HSETNX', own, pair, '') == 1 then
        come(pair, channel, member)
      elseif wait ~= '' and redis.call('HDEL', own, pair) == 1 then
        go(pair, channel, member, now + tonumber(wait))
      end
    end
  end
  if redis.call('HLEN', own) > 1 then
    has = 1
    redis.call('ZADD', leases, now + tonumber(ARGV[6]), token)
    redis.call('PERSIST', own)
  else
    redis.call('ZREM', leases, token)
    redis.call('EXPIRE', own, 60)
  end
end

for _, dead in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now, 'LIMIT', 0, 1)) do
  local own = fit(prefix .. 'present:' .. dead, 'hash')
  redis.call('HDEL', own, '')
  for _, pair in ipairs(redis.call('HKEYS', own)) do
    local channel, member = string.match(pair, '^(.-)\n(.*)$')
    if channel then
      go(pair, channel, member, now)
    end
  end
  redis.call('DEL', own)
  redis.call('ZREM', leases, dead)
end

for _, pair in ipairs(redis.call('ZRANGEBYSCORE', leaving, '-inf', now, 'LIMIT', 0, 100)) do
  local channel, member = string.match(pair, '^(.-)\n(.*)$')
  redis.call('ZREM', leaving, pair)
  if channel and redis.call('ZREM', fit(prefix .. 'members:' .. channel, 'zset'), member) == 1 then
    announce('leave', channel, member)
  end
end

local due = redis.call('ZCOUNT', leases, '-inf', now) + redis.call('ZCOUNT', leaving, '-inf', now)
local members = fit(prefix .. 'members:' .. ARGV[7], 'zset')
return {lived, has, due > 0 and 1 or 0, redis.call('ZCARD', members),
  redis.call('ZRANGE', members, 0, tonumber(ARGV[8]) - 1)}
"""
)
"""Tells which members a process has, and who is there; the comments in it say how."""

_tell = Script(TELL)


class RedisMembers(Members):
    """Who is present in many processes.

    :param link: the connections to Redis.
    :param keys: the names of the keys.
    :param keep: how many events of a channel Redis keeps.
    :param keep_seconds: and for how long, in seconds.
    :param seconds: for how long a member without connections is waited for, in seconds.
    """

    def __init__(
        self, link: RedisLink, keys: Keys, keep: int, keep_seconds: int, seconds: float
    ) -> None:
        self._link = link
        self._keys = keys
        self._head = keep, keep_seconds, keys.prefix
        super().__init__(seconds)

    def _start(self) -> None:
        super()._start()
        self._token = secrets.token_hex(8)
        self._number = self._failures = 0
        self._has_lease = self._is_closed = False
        # Of each member that has come or gone, for how long it is waited for; None if it is here.
        self._untold: dict[Pair, float | None] = {}
        self._telling: dict[Pair, float | None] = {}
        self._due: list[float] = []
        self._next_call = 0.0
        self._progress = concurrency.Progress()

    def enter(self, channel: str, member: str) -> Stay:
        """Have a member present; see :meth:`Members.enter`.

        :raises BrokerUnavailableError: if Redis cannot be told.
        """
        failures, pair = self._failures, (channel, member)
        stay = super().enter(channel, member)

        def is_over() -> bool:
            return self._is_told(pair) or self._failures > failures

        self._progress.wait_until(is_over, 4 * self._link.patience)
        if not self._is_told(pair):
            stay.leave()
            raise BrokerUnavailableError(self._link.address, "cannot be told who is present")
        return stay

    def _is_told(self, pair: Pair) -> bool:
        with self._mutex:
            return pair not in self._untold and pair not in self._telling

    def _come(self, pair: Pair) -> None:
        self._untold[pair] = None

    def _go(self, pair: Pair, seconds: float) -> None:
        self._untold[pair] = seconds

    def sweep(self) -> None:
        """Announce who is due to leave, soon; for a process that has no members, and only reads."""
        if self._has_lease or self._is_closed:
            return
        self._next_call = 0.0
        try:
            self._keeper.start()
            self._keeper.ring()
        except RuntimeError:
            # There is no thread to be had. Another process announces it, or the next look.
            _logger.debug("nobody looks for members that are due", exc_info=True)

    def close(self) -> None:
        """Tell nothing any more. The members of this process leave when its lease ends."""
        self._is_closed = True
        self._keeper.ring()

    def _look_after(self) -> float | None:
        if self._is_closed:
            return None
        with self._mutex:
            self._take_left()
            telling = dict(islice(self._untold.items(), _PAIRS_AT_ONCE))
            self._telling = telling
            for pair in telling:
                del self._untold[pair]
        if telling or time.monotonic() >= self._next_call:
            self._tell(telling)
        with self._mutex:
            if not (self._here or self._untold or self._due):
                return None
            return 0 if self._untold else max(0, self._next_call - time.monotonic())

    def _tell(self, telling: Mapping[Pair, float | None]) -> None:
        begin = time.monotonic()
        try:
            lived, has_lease, is_more, *_ = self._call(telling)
        except BaseException:
            self._failures += 1
            self._note_told(telling)
            raise
        # A server that was flushed, or has counted this process out, has to be told everything.
        is_lost = self._has_lease and not lived
        self._has_lease = bool(has_lease)
        self._note_told(dict.fromkeys(tuple(self._here)) if is_lost else {})
        now = time.monotonic()
        self._due = [due for due in self._due if due > begin]
        self._due += [now + wait for wait in telling.values() if wait is not None]
        self._due += [now] if is_more else []
        self._next_call = min([now + LOOK_SECONDS, *self._due])

    def _note_told(self, again: Mapping[Pair, float | None]) -> None:
        with self._mutex:
            # What is newer is true.
            self._untold = {**again, **self._untold}
            self._telling = {}
        self._progress.notify()

    def _call(self, telling: Mapping[Pair, float | None]) -> list[Any]:
        if not telling and not self._has_lease:
            return self._ask(("", 0))
        self._number += 1
        told = [
            (*pair, "" if wait is None else math.ceil(wait * 1000))
            for pair, wait in telling.items()
        ]
        return self._ask((self._token, self._number), told=chain.from_iterable(told))

    def _ask(
        self, own: tuple[str, int], channel: str = "", limit: int = 0, told: Iterable[Any] = ()
    ) -> list[Any]:
        arguments = [*self._head, *own, LEASE_SECONDS * 1000, channel, limit, *told]
        keys = self._keys.state, self._keys.marks, self._keys.leases, self._keys.leaving
        reply: list[Any] = self._link.call(_tell, keys, lambda _: arguments)
        return reply

    def present(self, channel: str, limit: int | None = None) -> tuple[int, list[str]]:
        """Return who is present; see :meth:`Members.present`.

        :raises BrokerUnavailableError: if Redis does not answer, or refuses.
        """
        *_, count, names = self._ask(("", 0), channel, limit or 0)
        # What is no text was not written here.
        return count, [name.decode(errors="replace") for name in names]
