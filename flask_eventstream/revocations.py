"""Whose rights were revoked, and when: the tokens and the streams of a user.

Each process has a copy of what it needs for that. With Redis there is a stream of all revocations,
which a process reads once a second while it has streams of users that are known, and otherwise
when it is asked about a user.

A limited number of users is remembered, each with the latest time. Beyond that the oldest one is
forgotten, and its time becomes the *floor*: a token that is no younger may have been revoked, and
is refused.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from . import concurrency
from .errors import BrokerUnavailableError
from .redis_scripts import Script
from .tokens import MAX_AGE

if TYPE_CHECKING:
    from .places import Places
    from .redis_link import RedisLink

_POLL_SECONDS = 1.0
_CLOCKS_DIFFER_SECONDS = 3600
_KEPT_SECONDS = MAX_AGE + _CLOCKS_DIFFER_SECONDS
_READ_AT_ONCE = 10_000
_SWEPT_AT_ONCE = 16

MAX_USERS = 100_000
"""How many users are remembered whose rights were revoked."""

ADD = """
-- Enters that a user's rights were revoked. KEYS: 1 the stream, 2 a hash that has the latest entry
-- of each user and its time; the floor; and the latest entry that was forgotten for it.
-- ARGV: 1 the user, 2 the time, 3 for how many seconds it is kept, 4 how many users are remembered,
-- 5 by how many seconds clocks may differ.
local clock = redis.call('TIME')
local user, at, index = ARGV[1], ARGV[2], 'user:' .. ARGV[1]
local before, was = string.match(redis.call('HGET', KEYS[2], index) or '', '^(%d+%-%d+) ([%d.]+)$')
if (tonumber(was) or 0) > tonumber(at) then
  at = was
end
-- By its own clock Redis gives each entry a place behind all others, so that none is overlooked.
local id = redis.call('XADD', KEYS[1], '*', 'user', user, 'at', at)
redis.call('HSET', KEYS[2], index, id .. ' ' .. at)
if before then
  redis.call('XDEL', KEYS[1], before)
end
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 16)) do
  local is_old = tonumber(string.match(entry[1], '%d+')) < (clock[1] - ARGV[3]) * 1000
  if not is_old and redis.call('XLEN', KEYS[1]) <= tonumber(ARGV[4]) then
    break
  end
  local name, time = 'user:' .. (entry[2][2] or ''), entry[2][4] or ''
  redis.call('XDEL', KEYS[1], entry[1])
  if redis.call('HGET', KEYS[2], name) == entry[1] .. ' ' .. time then
    redis.call('HDEL', KEYS[2], name)
  end
  if not is_old then
    local floor = tonumber(redis.call('HGET', KEYS[2], 'floor') or 0) or 0
    local when = tonumber(time) or 0
    if when > floor and when <= clock[1] + ARGV[5] then
      redis.call('HSET', KEYS[2], 'floor', time)
    end
    redis.call('HSET', KEYS[2], 'forgotten', entry[1])
  end
end
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[3])
return id
"""
"""Enters a revocation, and forgets what is too old or too much. Twice does no harm."""

_add = Script(ADD)

_logger = logging.getLogger(__name__)


class Floor(NamedTuple):
    """Up to when tokens may have been revoked without that it is known.

    ``time`` is in seconds since the epoch of Unix, ``entry`` the id of the latest entry that was
    forgotten for it.
    """

    time: float
    entry: tuple[int, ...]


NO_FLOOR = Floor(-math.inf, ())
"""As long as nothing was forgotten."""


class RevocationLog:
    """The revocations of all processes, in Redis.

    :param link: the connections.
    :param key: the key of the stream. Its entries are kept for as long as tokens live.
    """

    def __init__(self, link: RedisLink, key: bytes) -> None:
        self._link = link
        self._key = key
        self._index = key + b":users"
        self.address = link.address

    def add(self, user: str, when: float) -> None:
        """Enter that a user's rights were revoked at a time (seconds since the epoch of Unix).

        :raises BrokerUnavailableError: if Redis did not answer, or refused.
        """
        # A key that an app has from JSON may have lone surrogates.
        entry = user.encode("utf-8", "surrogatepass"), repr(when)
        arguments = *entry, _KEPT_SECONDS, MAX_USERS, _CLOCKS_DIFFER_SECONDS
        self._link.call(_add, (self._key, self._index), lambda _: arguments)

    def behind(self, last: bytes) -> tuple[list[tuple[str, float] | None], bytes, Floor]:
        """Return the next users and times behind an entry, the id of the last one, and the floor.

        Each entry that is no revocation is ``None``.

        :raises BrokerUnavailableError: if Redis did not answer, or refused.
        """
        first = b"(" + last if last else b"-"
        command = ("XRANGE", self._key, first, "+", "COUNT", _READ_AT_ONCE)
        # Requests wait for this: it is not tried for as long as what is to be published.
        begin = time.monotonic() - self._link.patience
        # The floor is asked for behind them: what is forgotten in between is in one of both.
        ask_floor = ("HMGET", self._index, "floor", "forgotten")
        entries, floor = self._link.read([command, ask_floor], begin)
        found = [self._revocation(fields) for _, fields in entries or ()]
        return found, entries[-1][0] if entries else last, self._floor(*(floor or (None, None)))

    def _floor(self, at: bytes | None, entry: bytes | None) -> Floor:
        if at is None or entry is None:
            return NO_FLOOR
        try:
            first, _, second = entry.partition(b"-")
            when = _time(at)
            return Floor(when, (int(first), int(second)))
        except ValueError:
            self._link.leave_out(self._index)
            return NO_FLOOR

    def _revocation(self, fields: dict[bytes, bytes]) -> tuple[str, float] | None:
        try:
            return fields[b"user"].decode("utf-8", "surrogatepass"), _time(fields[b"at"])
        except (KeyError, ValueError):
            self._link.leave_out(self._key)
            return None


class Revocations:
    """Whose rights were revoked, as far as this process knows.

    :param places: the places of the process, by which it finds the streams of a user.
    :param log: the revocations of all processes; ``None`` if there is only this one.
    """

    def __init__(self, places: Places, log: RevocationLog | None = None) -> None:
        self._places = places
        self._log = log
        self._last = b""
        self._times: dict[str, float] = {}
        self._floor = -math.inf
        self._start()
        concurrency.call_after_fork(self._start)

    def _start(self) -> None:
        self._mutex = concurrency.new_mutex()
        self._is_followed = False
        self._fresh_until = self._away_until = -math.inf

    def revoke(self, user: str) -> None:
        """End all streams of a user, and refuse the tokens that were issued to it before.

        :param user: the user's key.
        :raises BrokerUnavailableError: if Redis did not answer, or refused. In this process it is
            in force all the same.
        """
        now = time.time()
        self._note(user, now)
        if self._log is not None:
            self._log.add(user, now)

    def is_revoked(self, user: str, issued: float) -> bool:
        """Tell whether a token was revoked, as far as is known; see :meth:`refresh`.

        :param user: the key of its user.
        :param issued: when it was issued, by :func:`time.time`.
        """
        with self._mutex:
            return issued <= max(self._floor, self._times.get(user, -math.inf))

    def refresh(self) -> None:
        """Learn what others have revoked, unless that was done within the last second.

        :raises BrokerUnavailableError: if Redis did not answer, or refused. For a second, those who
            come next are told so at once.
        """
        now = time.monotonic()
        if self._log is None or now < self._fresh_until:
            return
        if now < self._away_until:
            reason = "the revocations could not be read a moment ago"
            raise BrokerUnavailableError(self._log.address, reason)
        try:
            self._read(self._log)
        except BrokerUnavailableError:
            self._away_until = time.monotonic() + _POLL_SECONDS
            raise
        self._fresh_until = now + _POLL_SECONDS

    def _read(self, log: RevocationLog) -> None:
        while True:
            before = self._last
            found, self._last, floor = log.behind(before)
            for user, when in filter(None, found):
                self._note(user, when)
            self._note_floor(floor, before)
            if len(found) < _READ_AT_ONCE:
                return

    def _note(self, user: str, when: float) -> None:
        with self._mutex:
            if when <= self._times.get(user, -math.inf):
                return
            self._times.pop(user, None)
            self._times[user] = when
            oldest = time.time() - _KEPT_SECONDS
            for other, time_of_other in tuple(islice(self._times.items(), _SWEPT_AT_ONCE)):
                if time_of_other < oldest:
                    del self._times[other]
            while len(self._times) > MAX_USERS:
                forgotten = self._times.pop(next(iter(self._times)))
                self._floor = max(self._floor, forgotten)
        self._places.finish(user, when)

    def _note_floor(self, floor: Floor, last: bytes) -> None:
        with self._mutex:
            self._floor = max(self._floor, floor.time)
        if floor.entry > tuple(map(int, last.split(b"-") if last else ())):
            # Something was forgotten before this process has read it.
            self._places.finish(None, floor.time)

    def follow(self) -> None:
        """Have the streams of users end as soon as others revoke their rights.

        To be called once a place is taken; it goes on for as long as users have places.

        :raises RuntimeError: if no thread can be started; the next call tries again.
        """
        if self._log is None:
            return
        with self._mutex:
            is_followed, self._is_followed = self._is_followed, True
        if is_followed:
            return
        try:
            # In a greenlet redis-py would block the hub, unless it is patched, and then such a
            # thread is a greenlet.
            threading.Thread(target=self._run, args=[self._log], daemon=True).start()
        except RuntimeError:
            self._is_followed = False
            raise

    def _run(self, log: RevocationLog) -> None:
        while not self._is_over():
            time.sleep(_POLL_SECONDS)
            begin = time.monotonic()
            try:
                self._read(log)
            except BrokerUnavailableError:
                # The broker's own reader has given a warning, and the next round makes it good.
                _logger.debug("The revocations could not be read", exc_info=True)
            except Exception:
                # Whatever it is: the streams of those who are revoked next have to end.
                _logger.exception("The revocations could not be read, and are tried again")
            else:
                self._fresh_until = begin + _POLL_SECONDS

    def _is_over(self) -> bool:
        with self._mutex:
            self._is_followed = self._places.has_users
            return not self._is_followed


def _time(text: bytes) -> float:
    when = float(text)
    # It is none if it would hold for ever.
    if not 0 <= when <= time.time() + _CLOCKS_DIFFER_SECONDS:
        raise ValueError(text)
    return when
