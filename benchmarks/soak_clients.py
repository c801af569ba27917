"""The subscribers of ``soak.py``, in a process of their own: ``soak_clients.py PORT SUBSCRIBERS``.

Each reads the channel that all read, and the one of its group. The data of an event is
``CHANNEL NUMBER PADDING``, and the numbers of a channel have no gaps. So each client knows, on a
connection and after it has returned with its cursor, what the next event of a channel has to be.

A ``reset`` may come only if something is gone. Then the next event of one of its channels, at
least, has a number higher than the one that was to come.

It answers ``{}`` on its input with a line of figures. Another object is the last number of each
channel, and the end: all come back, and have to get the rest.
"""

from __future__ import annotations

import heapq
import json
import random
import select
import socket
import sys
import time
from collections import Counter
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.faults import PATIENCE, Client
from tests.stress import close, is_ready, request, say

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask_eventstream import ServerSentEvent

GROUPS = 8
SHARED = "shared"
CHANNELS_OF_EACH = 2
SMALL_BUFFER = 4096
PIECE, PIECE_EVERY = 2048, 0.25
"""How many bytes a slow client reads, and after how many seconds again: sometimes too slowly."""
STANDS_STILL = 25.0
AWAY = 2.0
LONG_AWAY, LONG_AWAY_SHARE = 90.0, 0.02
"""Some return so late that what they missed is gone (seconds, and the share of all returns)."""
CONNECTED_A_SECOND = 150
"""At the beginning."""
IN_MID_HEAD = 0.1
"""The share of those who come and leave before they have sent their request."""
MOST_FAULTS = 10
"""How many are told in full."""


class Role(NamedTuple):
    """How a client behaves.

    :param share: how many are like this.
    :param stays: for how long it is connected, on the average, in seconds.
    :param is_new: whether it is somebody else, without a cursor, who comes after it.
    """

    name: str
    share: float
    stays: float
    is_new: bool = False


STAYS = Role("stays", 0.7, 60)
PASSES = Role("passes", 0.2, 10, is_new=True)
SLOW = Role("slow", 0.06, 60)
STANDS = Role("stands still", 0.04, 60)
ROLES = (STAYS, PASSES, SLOW, STANDS)


class Member(Client):
    """A subscriber of two channels.

    :param number: chooses its group.
    :param role: how it behaves.
    :ivar is_connected: whether it is.
    :ivar has_stood_still: whether it has read nothing for long, on this connection.
    :ivar events: how many it has got.
    :ivar expected: for each channel of which it has got an event, the number of the next one.
    """

    def __init__(self, port: int, number: int, role: Role) -> None:
        group = f"group:{number % GROUPS}"
        path = f"/stream?channel={SHARED}&channel={group}"
        super().__init__(port, path, SMALL_BUFFER if role in {SLOW, STANDS} else 0)
        self.role = role
        self.is_connected = self.has_stood_still = False
        self.events = 0
        self.expected: dict[str, int] = {}
        # Since a reset: what came next before it, of each channel that has sent nothing since.
        self._owed: dict[str, int] = {}
        self._has_gap = False
        self._requested = ""

    def connect(self) -> socket.socket:
        self._sent_cursor = self._cursor
        self.has_stood_still = False
        connection = super().connect()
        self.is_connected = True
        return connection

    @property
    def cursor(self) -> str:
        """What it returns with."""
        return self._cursor

    def is_behind(self, last: dict[str, int]) -> bool:
        """Tell whether it still has to get events of channels, given the last number of each."""
        return any(number <= last[channel] for channel, number in self.expected.items())

    def _check(self, event: ServerSentEvent) -> None:
        self._cursor = event.id or self._cursor
        if event.type == "reset":
            self._note_reset(json.loads(event.data)["requested"])
            return
        channel, number, _ = event.data.split(" ")
        self._compare(channel, int(number))
        self.expected[channel] = int(number) + 1
        self.events += 1

    def _note_reset(self, requested: str) -> None:
        self.resets += 1
        self._requested = requested
        if not self._sent_cursor or requested != self._sent_cursor:
            self.faults.append(f"a reset of {requested!r}; it had asked {self._sent_cursor!r}")
        # History comes next, of which it may have a part already. One that has been told so before
        # may have got only some of that.
        self._owed |= self.expected
        self.expected = {}
        # Of a channel that it has never read nobody knows what is gone.
        self._has_gap = len(self._owed) < CHANNELS_OF_EACH

    def _compare(self, channel: str, number: int) -> None:
        expected = self.expected.get(channel, number)
        if number != expected:
            self.faults.append(f"{channel}: {number} instead of {expected}, cursor {self._cursor}")
        if channel in self._owed:
            self._has_gap |= number > self._owed.pop(channel)
            if not self._owed and not self._has_gap:
                self.faults.append(
                    f"a reset for {self._requested}, and nothing was gone up to {self._cursor}"
                )


class Crowd:
    """All subscribers, and when each of them does what."""

    def __init__(self, port: int, size: int) -> None:
        self._port = port
        self._chance = random.Random(size)
        self._numbers = count()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._members: set[Member] = set()
        self._by_descriptor: dict[int, Member] = {}
        self._epoll = select.epoll()
        self._epoll.register(sys.stdin.fileno(), select.EPOLLIN)
        self._counted: Counter[str] = Counter()
        self._faults: list[str] = []
        self._is_ending = False
        roles = self._chance.choices(ROLES, [role.share for role in ROLES], k=size)
        for place, role in enumerate(roles):
            self._later(place / CONNECTED_A_SECOND, partial(self._come, role))

    def run(self) -> None:
        """Come and leave, and tell what came whenever that is asked."""
        last = None
        while last is None:
            last = self._turn()
            if last is not None and not last:
                say(self._figures())
                last = None
        self._end(last)
        say(self._figures())

    def _turn(self) -> dict[str, int] | None:
        """Do what is due, and return what is asked, if anything."""
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()
        asked = None
        for descriptor, _ in self._epoll.poll(0.02):
            if descriptor == sys.stdin.fileno():
                asked = json.loads(sys.stdin.readline())
            elif descriptor in self._by_descriptor:
                self._read(self._by_descriptor[descriptor])
        return asked

    def _come(self, role: Role) -> None:
        if role.is_new and self._chance.random() < IN_MID_HEAD:
            self._leave_in_mid_head()
        member = Member(self._port, next(self._numbers), role)
        self._members.add(member)
        self._connect(member)

    def _leave_in_mid_head(self) -> None:
        with socket.create_connection(("127.0.0.1", self._port), 20) as connection:
            connection.sendall(request()[:20])
            self._counted["left in mid-head"] += 1
            close(connection, self._chance.random() < 0.5)

    def _connect(self, member: Member) -> None:
        if member.is_connected:
            return
        try:
            member.connect()
        except OSError:
            self._counted["not connected"] += 1
            self._later(1, lambda: self._connect(member))
            return
        self._counted["connections"] += 1
        self._counted["returns"] += member.connects > 1
        self._while_connected(member, self._chance.expovariate(1 / member.role.stays), self._leave)
        if member.role is SLOW and not self._is_ending:
            self._read_piece(member)
        elif member.role is STANDS and not self._is_ending:
            self._while_connected(member, STANDS_STILL, self._read_again)
        else:
            self._watch(member)

    def _watch(self, member: Member) -> None:
        if member.socket.fileno() in self._by_descriptor:
            # At the end all are watched, and who stands still by then is about to read again.
            return
        self._by_descriptor[member.socket.fileno()] = member
        self._epoll.register(member.socket, select.EPOLLIN)

    def _read_piece(self, member: Member) -> None:
        if is_ready(member.socket, select.POLLIN, 0) and not member.read(PIECE):
            self._on_end(member)
        elif member.socket.fileno() not in self._by_descriptor:
            self._while_connected(member, PIECE_EVERY, self._read_piece)

    def _read_again(self, member: Member) -> None:
        self._counted["stood still"] += 1
        member.has_stood_still = True
        self._watch(member)

    def _read(self, member: Member) -> None:
        if not member.read():
            self._on_end(member)

    def _on_end(self, member: Member) -> None:
        is_slow = member.role is SLOW or member.has_stood_still
        self._counted["slow ones cut" if is_slow else "ended by the server"] += 1
        self._disconnect(member, rudely=False)
        self._return_after(member, self._chance.uniform(0, AWAY))

    def _leave(self, member: Member) -> None:
        if self._is_ending:
            return
        rudely = self._chance.random() < 0.5
        self._counted["left rudely" if rudely else "left politely"] += 1
        self._disconnect(member, rudely)
        if member.role.is_new:
            self._count_out(member)
            self._come(member.role)
        else:
            is_long = self._chance.random() < LONG_AWAY_SHARE
            seconds = LONG_AWAY if is_long else self._chance.uniform(0, AWAY)
            self._return_after(member, seconds)

    def _return_after(self, member: Member, seconds: float) -> None:
        self._later(seconds, lambda: self._connect(member))

    def _disconnect(self, member: Member, rudely: bool) -> None:
        member.is_connected = False
        if self._by_descriptor.pop(member.socket.fileno(), None):
            self._epoll.unregister(member.socket)
        close(member.socket, rudely)

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), act))

    def _while_connected(
        self, member: Member, seconds: float, act: Callable[[Member], None]
    ) -> None:
        connection = member.connects

        def act_on_the_same() -> None:
            if member.is_connected and member.connects == connection:
                act(member)

        self._later(seconds, act_on_the_same)

    def _end(self, last: dict[str, int]) -> None:
        """Have all come back, and wait until they have got all there is."""
        self._is_ending = True
        for member in tuple(self._members):
            self._connect(member)
            if member.is_connected and member.socket.fileno() not in self._by_descriptor:
                self._watch(member)
        deadline = time.monotonic() + PATIENCE
        while self._behind(last) and time.monotonic() < deadline:
            self._turn()
        for member in self._behind(last):
            member.faults.append(f"has only {member.expected} of {last}, cursor {member.cursor}")

    def _behind(self, last: dict[str, int]) -> list[Member]:
        return [one for one in self._members if one.is_behind(last)]

    def _count_out(self, member: Member) -> None:
        self._members.discard(member)
        self._counted["deliveries"] += member.events
        self._counted["resets"] += member.resets
        self._counted["faults"] += len(member.faults)
        self._faults += member.faults[: MOST_FAULTS - len(self._faults)]
        member.events = member.resets = 0
        member.faults.clear()

    def _figures(self) -> dict[str, Any]:
        everybody = self._members.copy()
        for member in everybody:
            self._count_out(member)
        self._members = everybody
        connected = sum(one.is_connected for one in everybody)
        return {**self._counted, "examples": self._faults, "connected": connected}


if __name__ == "__main__":
    Crowd(int(sys.argv[1]), int(sys.argv[2])).run()
