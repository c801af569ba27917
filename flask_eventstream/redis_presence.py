"""How many subscribers each process has, told to the others through Redis.

A process has a hash of its own, with the number of subscribers of each channel that it serves, and
under the empty name the number of all. The hash lives as long as its lease, which is renewed
meanwhile. A process that dies is counted out when its lease ends.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from .redis_link import RedisLink
    from .redis_scripts import Keys

LEASE_SECONDS = 15
"""For how long a process counts that does not say anything any more, in seconds."""

_DIGITS = 17
"""More than any number of subscribers has."""

RENEWAL_SECONDS = 5.0
"""How often a lease is renewed, in seconds."""


class Presence:
    """What this process tells of its subscribers, and what the others do.

    :param link: the connections to Redis.
    :param keys: the names of the keys.
    :param on_members: called with each renewal, if members are present somewhere.
    :ivar key: the key of this process, and the name of the messages that only it gets.
    """

    def __init__(
        self, link: RedisLink, keys: Keys, on_members: Callable[[], object] = bool
    ) -> None:
        self._token = secrets.token_hex(8)
        self._link = link
        self._keys = keys
        self._on_members = on_members
        self.key = keys.process(self._token)
        self._counts: dict[str, int] = {}
        self._untold: set[str] = set()
        self._next_renewal = 0.0
        self._has_failed = False

    def tell(self, changed: Mapping[str, int], total: int) -> None:
        """Tell the numbers that have changed, and renew the lease if it is time.

        :param changed: the number of subscribers of each channel where it may have changed.
        :param total: how many there are in all.
        :raises BrokerUnavailableError: if Redis did not answer, or refused. It is not asked again
            before the next renewal.
        """
        self.note(changed)
        now = time.monotonic()
        if now < self._next_renewal and (self._has_failed or not self._untold):
            return
        self._next_renewal, self._has_failed = now + RENEWAL_SECONDS, True
        gone = [name for name in self._untold if name not in self._counts]
        lives, *_, members = self._link.pipeline(
            [
                ("EXPIRE", self.key, LEASE_SECONDS),
                *([("HDEL", self.key, *gone)] if gone else []),
                ("HSET", self.key, "", total, *self._numbers_of(self._untold)),
                ("EXPIRE", self.key, LEASE_SECONDS),
                ("SADD", self._keys.processes, self._token),
                ("EXISTS", self._keys.leases, self._keys.leaving),
            ]
        )
        if not lives and self._counts:
            # The hash is new, or was lost: then all has to be told.
            self._link.pipeline([("HSET", self.key, *self._numbers_of(self._counts))])
        self._untold.clear()
        self._has_failed = False
        if members:
            self._on_members()

    def note(self, changed: Mapping[str, int]) -> None:
        """Take note of numbers that have changed, to be told next time."""
        for name, count in changed.items():
            if count != self._counts.get(name, 0):
                self._counts[name] = count
                self._untold.add(name)
            if not count:
                self._counts.pop(name, None)

    def _numbers_of(self, names: Iterable[str]) -> list[Any]:
        known = [name for name in names if name in self._counts]
        return [each for name in known for each in (name, self._counts[name])]

    def leave(self) -> None:
        """Be counted out at once.

        :raises BrokerUnavailableError: if Redis did not answer, or refused.
        """
        commands = [("DEL", self.key), ("SREM", self._keys.processes, self._token)]
        # One attempt: a process that ends has no time for more.
        self._link.pipeline(commands, begin=-math.inf)

    def count_others(self, channel: str) -> int:
        """Return how many subscribers the other processes have: of a channel, or (``""``) in all.

        :raises BrokerUnavailableError: if Redis did not answer, or refused.
        """
        return sum(self._count_of(count) for _, count in self._ask_others("HMGET", "", channel))

    def counts_of_others(self) -> Counter[str]:
        """Return how many subscribers of each channel the other processes have.

        :raises BrokerUnavailableError: if Redis did not answer, or refused.
        """
        counts: Counter[str] = Counter()
        for told in self._ask_others("HGETALL"):
            # A name that is no text is none that anybody can ask for.
            names = {name: name.decode(errors="replace") for name in told if name}
            counts.update({text: self._count_of(told[name]) for name, text in names.items()})
        return counts

    def _count_of(self, told: bytes | None) -> int:
        if told is None or (told.isdigit() and len(told) < _DIGITS):
            return int(told or 0)
        self._link.leave_out(self._keys.processes)
        return 0

    def _ask_others(self, command: str, *fields: str) -> list[Any]:
        names = [("SMEMBERS", self._keys.processes)]
        [members] = self._link.read(names)
        tokens = sorted(set(members or ()) - {self._token.encode()})
        keys = [self._keys.process("") + token for token in tokens]
        commands = [(command, key, *fields) for key in keys]
        replies = self._link.read(commands)
        told_by = zip(tokens, replies, strict=True)
        dead = [token for token, told in told_by if told in (None, {}, [None, None])]
        if dead:
            self._link.pipeline([("SREM", self._keys.processes, *dead)])
        return [reply for reply in replies if reply is not None]
