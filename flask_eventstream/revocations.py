"""Whose rights were revoked, and when: the tokens and the streams of a user.

Each process has a copy of what it needs for that. With Redis there is a stream of all revocations,
which a process reads once a second while it has streams of users that are known, and otherwise
when it is asked about a user.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from itertools import islice
from typing import TYPE_CHECKING

from . import concurrency
from .errors import BrokerUnavailableError
from .tokens import MAX_AGE

if TYPE_CHECKING:
    from .places import Places
    from .redis_link import RedisLink

_POLL_SECONDS = 1.0
_CLOCKS_DIFFER_SECONDS = 3600
_KEPT_SECONDS = MAX_AGE + _CLOCKS_DIFFER_SECONDS
_READ_AT_ONCE = 10_000
_SWEPT_AT_ONCE = 16

_logger = logging.getLogger(__name__)


class RevocationLog:
    """The revocations of all processes, in Redis.

    :param link: the connections.
    :param key: the key of the stream. Its entries are kept for as long as tokens live.
    """

    def __init__(self, link: RedisLink, key: bytes) -> None:
        self._link = link
        self._key = key
        self.address = link.address

    def add(self, user: str, when: float) -> None:
        """Enter that a user's rights were revoked at a time (seconds since the epoch of Unix).

        :raises BrokerUnavailableError: if Redis did not answer, or refused.
        """
        oldest = int((time.time() - _KEPT_SECONDS) * 1000)
        # A key that an app has from JSON may have lone surrogates.
        key = user.encode("utf-8", "surrogatepass")
        # By its own clock Redis gives each entry a place behind all others, so that none is
        # overlooked. It does no harm to have one twice.
        self._link.pipeline(
            [
                ("XADD", self._key, "MINID", "~", oldest, "*", "user", key, "at", repr(when)),
                ("EXPIRE", self._key, _KEPT_SECONDS),
            ]
        )

    def behind(self, last: bytes) -> tuple[list[tuple[str, float] | None], bytes]:
        """Return the next users and times behind an entry, and the id of the last one of them.

        Each entry that is no revocation is ``None``.

        :raises BrokerUnavailableError: if Redis did not answer, or refused.
        """
        first = b"(" + last if last else b"-"
        command = ("XRANGE", self._key, first, "+", "COUNT", _READ_AT_ONCE)
        # Requests wait for this: it is not tried for as long as what is to be published.
        begin = time.monotonic() - self._link.patience
        [entries] = self._link.read([command], begin)
        found = [self._revocation(fields) for _, fields in entries or ()]
        return found, entries[-1][0] if entries else last

    def _revocation(self, fields: dict[bytes, bytes]) -> tuple[str, float] | None:
        try:
            when = float(fields[b"at"])
            # Nor is it one if it would hold for ever.
            if 0 <= when <= time.time() + _CLOCKS_DIFFER_SECONDS:
                return fields[b"user"].decode("utf-8", "surrogatepass"), when
        except (KeyError, ValueError):
            pass
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
            return issued <= self._times.get(user, -math.inf)

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
            found, self._last = log.behind(self._last)
            for user, when in filter(None, found):
                self._note(user, when)
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
        self._places.finish(user, when)

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
