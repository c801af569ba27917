"""Who is present on which channel, and the events that tell of it.

The rules, which every registry keeps:

* A member is present once, with however many connections, in however many processes.
* ``join`` comes with the first connection, ``leave`` once the last one has gone and none has come
  back for a while.
* The change and its event are one step. So what the events say never differs from what is there.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Protocol

from . import concurrency, endings
from .broker import channel_names
from .errors import BrokerClosedError, BrokerUnavailableError, InvalidFieldError
from .event import ServerSentEvent

if TYPE_CHECKING:
    from collections.abc import Callable

    Pair = tuple[str, str]
    """A channel, and a member of it."""

JOIN = "join"
"""The type of the event that a member has come."""

LEAVE = "leave"
"""The type of the event that a member has gone."""

PRESENT = "present"
"""The type of the event that tells a newcomer who is there."""

PRESENCE_SECONDS = 5.0
"""For how long a member without connections is waited for by default, in seconds: browsers return
after a ``retry`` of 3 seconds and up to 20 % more, and then have to connect."""

STOP_SECONDS = 15.0
"""How long members are waited for at least whose server stops, in seconds: the clients of thousands
of streams that end at once return spread over seconds."""

LOOK_SECONDS = 5.0
"""How often a registry looks by itself for members that have gone, in seconds."""

_RETRY_SECONDS = 1.0
_MOST_NAMED = 100
_logger = logging.getLogger(__name__)


class Publish(Protocol):
    """What a registry needs of the broker in the same process."""

    def __call__(self, data: Any, type: str | None = None, *, channel: str) -> str:
        """Send an event; see :meth:`Broker.publish`."""


class Stay:
    """The presence of one connection, until :meth:`leave`; get it from :meth:`Members.enter`."""

    __slots__ = ("_left", "_pair", "_ring")

    def __init__(
        self, pair: Pair, left: deque[tuple[Pair, float | None]], ring: Callable[[], None]
    ) -> None:
        self._pair = pair
        self._left = left
        self._ring = ring

    def leave(self, seconds: float | None = None) -> None:
        """Take the connection off the books; from any thread, and more than once.

        :param seconds: for how long its member is waited for, in seconds; as long as the
            registry waits for everybody by default.
        """
        if self._leave(seconds):
            self._ring()

    def _leave(self, seconds: float | None = None) -> bool:
        try:
            left = self._left
            # One step, so that of many threads only one does it.
            del self._left
        except AttributeError:
            return False
        left.append((self._pair, seconds))
        return True

    def __del__(self) -> None:
        # A response may be dropped before any server iterates or closes it. The garbage collector
        # may do that while this very thread holds the bell's lock, so it is not rung: the keeper
        # looks by itself.
        self._leave()


class Members(ABC):
    """Knows who is present: the contract. Any thread and any greenlet may call it.

    :param seconds: for how long a member without connections is waited for, in seconds.

    What has to ask a server may raise :class:`BrokerUnavailableError`. A thread or greenlet looks
    after those that go, as long as somebody of this process is present or about to leave.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._start()
        concurrency.call_after_fork(self._start)

    def _start(self) -> None:
        # Once more in every forked child, which has none of its parent's subscribers: what its
        # copies of them take off the books goes to the copy of the parent's list.
        self._mutex = concurrency.new_mutex()
        self._left: deque[tuple[Pair, float | None]] = deque()
        self._here: Counter[Pair] = Counter()
        self._keeper = concurrency.Waker(self._keep)

    def enter(self, channel: str, member: str) -> Stay:
        """Have a member present on a channel, with one more connection.

        :param channel: the channel's name.
        :param member: the member's name, checked.
        :raises BrokerClosedError: if the broker is closed.
        :raises RuntimeError: if no thread can be started.
        """
        pair = channel, member
        with self._mutex:
            self._take_left()
            if not self._here[pair]:
                self._come(pair)
            self._here[pair] += 1
        stay = Stay(pair, self._left, self._keeper.ring)
        self._keeper.start()
        # Should it be about to end, for want of members, this keeps it.
        self._keeper.ring()
        return stay

    def _take_left(self) -> None:
        """Take those off the books that have left; under the mutex."""
        while self._left:
            pair, seconds = self._left.popleft()
            self._here[pair] -= 1
            if not self._here[pair]:
                del self._here[pair]
                self._go(pair, self.seconds if seconds is None else seconds)

    @abstractmethod
    def _come(self, pair: Pair) -> None:
        """Note that a member has its first connection of this process; under the mutex."""

    @abstractmethod
    def _go(self, pair: Pair, seconds: float) -> None:
        """Note that a member has lost its last connection of this process; under the mutex."""

    @abstractmethod
    def _look_after(self) -> float | None:
        """Do what is due; return when to do so again, in seconds, or ``None`` if it is over."""

    @abstractmethod
    def present(self, channel: str, limit: int | None = None) -> tuple[int, list[str]]:
        """Return how many are present on a channel, and the first ones of their sorted names.

        :param channel: the channel's name.
        :param limit: how many names to return at most; all by default.
        """

    def _keep(self) -> bool:
        pause: float | None = _RETRY_SECONDS
        try:
            pause = self._look_after()
        except BrokerUnavailableError as error:
            _logger.warning("Who is present could not be told, and is tried again: %s", error)
        except Exception:
            _logger.exception("Who has left could not be looked after; that is tried again")
        self._keeper.pause = pause
        return pause is not None


class MemoryMembers(Members):
    """Who is present in one process.

    :param publish: sends an event.
    :param seconds: for how long a member without connections is waited for, in seconds.
    :param clock: a clock in seconds that never goes back; :func:`time.monotonic` by default.
    """

    def __init__(
        self, publish: Publish, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._publish = publish
        self._clock = clock
        super().__init__(seconds)

    def _start(self) -> None:
        super()._start()
        self._names: dict[str, set[str]] = {}
        self._leaving: dict[Pair, float] = {}

    def _come(self, pair: Pair) -> None:
        channel, member = pair
        self._leaving.pop(pair, None)
        names = self._names.get(channel, set())
        if member not in names:
            self._tell(JOIN, pair, len(names) + 1)
            self._names.setdefault(channel, names).add(member)

    def _go(self, pair: Pair, seconds: float) -> None:
        self._leaving[pair] = self._clock() + seconds

    def _tell(self, type: str, pair: Pair, count: int) -> None:
        channel, member = pair
        self._publish({"member": member, "count": count}, type, channel=channel)

    def _look_after(self) -> float | None:
        with self._mutex:
            self._take_left()
            now = self._clock()
            for pair in [pair for pair, due in self._leaving.items() if due <= now]:
                self._say_goodbye(pair)
            if not (self._here or self._leaving):
                return None
            return min(LOOK_SECONDS, min(self._leaving.values(), default=math.inf) - now)

    def _say_goodbye(self, pair: Pair) -> None:
        channel, member = pair
        del self._leaving[pair]
        names = self._names[channel]
        names.remove(member)
        if not names:
            del self._names[channel]
        try:
            self._tell(LEAVE, pair, len(names))
        except BrokerClosedError:
            # Nobody is left who could hear it.
            _logger.debug("%r has left %r, which nobody reads any more", member, channel)

    def present(self, channel: str, limit: int | None = None) -> tuple[int, list[str]]:
        """Return who is present; see :meth:`Members.present`."""
        with self._mutex:
            names = list(self._names.get(channel, ()))
        # Without the mutex, as there may be many.
        return len(names), sorted(names)[:limit]


def member_name(name: str | None, user: str | None) -> str:
    """Return the name that others see of a member.

    :param name: the name that it is given.
    :param user: else the key of its user, if it is known. Who is nobody gets a name for this one
        connection.
    :raises InvalidFieldError: unless it is a ``str`` of 1 to 255 characters without control
        characters, as the name of a channel.
    """
    member = user if name is None else name
    if member is None:
        return f"anonymous-{secrets.token_hex(6)}"
    try:
        return channel_names((member,))[0]
    except InvalidFieldError as error:
        raise InvalidFieldError("member", member, error.reason) from error


def present_event(members: Members, channel: str) -> bytes:
    """Return the event that tells who is present on a channel: how many, and up to 100 names.

    It has no id: a client that has seen it, and loses the connection then, has the cursor that it
    had before.
    """
    count, names = members.present(channel, _MOST_NAMED)
    return ServerSentEvent({"count": count, "members": names}, PRESENT).encode()


def patience(heartbeat: float) -> float:
    """Return for how long the machine of a member may be silent, in seconds.

    :param heartbeat: the longest silence of a stream, in seconds. Silence is found out twice at
        the worst, once while nothing is sent and then once more while something is.
    """
    return heartbeat / 2


def grace(reason: str, seconds: float, heartbeat: float) -> float:
    """Return for how long a member is waited for whose connection has ended, in seconds.

    :param reason: why it has ended, see :mod:`endings`.
    :param seconds: for how long everybody is waited for, in seconds.
    :param heartbeat: the longest silence of a stream, in seconds.
    """
    if reason == endings.VANISHED:
        # Who was silent for so long has been waited for meanwhile.
        return max(0.0, seconds - patience(heartbeat))
    return max(seconds, STOP_SECONDS) if reason == endings.STOPPED else seconds
