"""Which runs there are, how each stands, and the only way to write to their logs.

The rules, which every registry keeps in one step with what it writes:

* A key has one run at a time, and another one only once that has ended.
* An owner has no more runs than are allowed. One counts from its beginning until its producer has
  ended, also if it was cancelled.
* The log of a run that has ended takes nothing more: its end is written once, by whoever is first.
* The events of a log are numbered 1, 2, 3, …; the id of the third one is ``<run>.3``.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Protocol

from . import concurrency
from .event import with_id

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ACTIVE = "active"
"""The state of a run that goes on. The others are the types of the events that end one."""

CANCELLED = "cancelled"
"""The state of a run that somebody has stopped."""

LOST = "lost"
"""The state of a run whose producer is not heard of any more."""

MAX_RUNS_PER_OWNER = 10
"""How many runs one owner may have by default."""


class NoRoomError(Exception):
    """A run cannot begin, as there are too many."""


class Standing(NamedTuple):
    """How a run stands.

    ``run`` is its id, ``state`` is :data:`ACTIVE` or how it has ended, ``last`` the number of its
    last event, and ``producer`` names the process that it runs in. It ``is_lost`` if that process
    is gone, but nobody has ended the run yet.
    """

    run: str
    state: str
    last: int
    producer: str = ""
    is_lost: bool = False

    @property
    def is_active(self) -> bool:
        """Whether it goes on."""
        return self.state == ACTIVE


class Write(NamedTuple):
    """Some events of a run, for its log.

    ``key`` and ``run`` are the run's, ``last`` is the number of the last of the events, ``wire``
    is all of them as bytes, with their ids. ``state`` is what the run is in afterwards. A run that
    ``is_forgotten`` can be attached to no more.
    """

    key: str
    run: str
    last: int
    wire: bytes
    state: str = ACTIVE
    is_forgotten: bool = False


class RunRegistry(ABC):
    """Knows the runs of a broker's logs: the contract. Any thread and any greenlet may call it.

    What has to ask a server may raise :class:`BrokerUnavailableError`.
    """

    @abstractmethod
    def begin(
        self, key: str, run: str, stop: Callable[[], None], lost: bytes, owner: str = ""
    ) -> Standing:
        """Begin a run, unless another one of the same key is active.

        :param key: what its clients ask for.
        :param run: its id, new and not to be guessed.
        :param stop: called when it is seen that the run was ended from outside; any thread may.
        :param lost: the event that ends it, without its id, should a part of its log be lost.
        :param owner: whose it is, ``""`` if it is not for one alone.
        :returns: how the run stands that the key has now: this one, or the one that is active.
        :raises NoRoomError: if its owner has too many. Nothing has happened then.
        """

    @abstractmethod
    def find(self, key: str) -> Standing | None:
        """Return how the latest run of a key stands; ``None`` if there is none."""

    @abstractmethod
    def write(self, writes: Sequence[Write]) -> list[bool]:
        """Write to logs, and tell of each whether its run goes on.

        For the producers of these runs alone. A write that is done already is not done again. The
        last one of a run, whose state is not :data:`ACTIVE`, says that its producer has ended, also
        if somebody else has ended the run before.
        """

    @abstractmethod
    def end(self, key: str, run: str, state: str, wire: bytes) -> bool:
        """End a run from outside; tell whether this did it.

        :param key: the run's key.
        :param run: its id.
        :param state: :data:`CANCELLED`, or :data:`LOST`, which a run does not become whose producer
            is alive.
        :param wire: the event that ends it, without its id.
        """

    @abstractmethod
    def watch(self, key: str, standing: Standing, wire: bytes) -> None:
        """Have a run that has clients in this process ended should its producer be lost.

        :param key: the run's key.
        :param standing: how it stands.
        :param wire: the event that says so, without its id.
        """


class Logs(Protocol):
    """What a registry needs of the broker in the same process."""

    def write_log(self, run: str, wire: bytes) -> None:
        """Append some events to a log."""

    def end_log(self, run: str) -> int:
        """End all who read a log, after what it has; return how much that is, in bytes."""

    def forget_log(self, run: str) -> None:
        """Forget what a log has."""


class MemoryRegistry(RunRegistry):
    """The runs of one process.

    :param logs: the broker.
    :param seconds: how long a run is kept after its end, in seconds.
    :param max_ended: how many runs that have ended are kept, however young they are.
    :param max_per_owner: how many runs one owner may have.
    :param max_ended_bytes: how much is kept of all runs that have ended; without limit by default.
        The oldest are forgotten first.
    :param clock: a clock in seconds that never goes back; :func:`time.monotonic` by default.
    """

    def __init__(
        self,
        logs: Logs,
        seconds: float,
        max_ended: int,
        max_per_owner: int = MAX_RUNS_PER_OWNER,
        max_ended_bytes: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logs = logs
        self._seconds = seconds
        self._max_ended = max_ended
        self._max_per_owner = max_per_owner
        self._max_ended_bytes = max_ended_bytes
        self._clock = clock
        self._start()
        concurrency.call_after_fork(self._start)

    def _start(self) -> None:
        # Once more in every forked child, where no producer runs.
        self._mutex = concurrency.new_mutex()
        self._standings: dict[str, Standing] = {}
        self._stops: dict[str, Callable[[], None]] = {}
        # Whose the runs are whose producers go on.
        self._owners: dict[str, str] = {}
        self._ended: deque[tuple[float, str, str]] = deque()
        # Of each run that has ended, what its log has.
        self._sizes: dict[str, int] = {}
        self._ended_bytes = 0

    def begin(
        self, key: str, run: str, stop: Callable[[], None], lost: bytes, owner: str = ""
    ) -> Standing:
        """Begin a run; see :meth:`RunRegistry.begin`."""
        with self._mutex:
            self._sweep()
            before = self._standings.get(key)
            if before is not None and before.is_active:
                return before
            self._count(run, owner)
            self._forget(key)
            self._standings[key] = standing = Standing(run, ACTIVE, 0)
            self._stops[run] = stop
            return standing

    def _count(self, run: str, owner: str) -> None:
        if not owner:
            return
        if list(self._owners.values()).count(owner) >= self._max_per_owner:
            raise NoRoomError
        self._owners[run] = owner

    def find(self, key: str) -> Standing | None:
        """Return how a run stands; see :meth:`RunRegistry.find`."""
        with self._mutex:
            self._sweep()
            return self._standings.get(key)

    def write(self, writes: Sequence[Write]) -> list[bool]:
        """Write to logs; see :meth:`RunRegistry.write`."""
        return [self._write(write) for write in writes]

    def _write(self, write: Write) -> bool:
        with self._mutex:
            if write.state != ACTIVE:
                # First, as what comes then may fail.
                self._owners.pop(write.run, None)
            standing = self._active(write.key, write.run)
            if standing is None:
                return False
            if write.last <= standing.last:
                return True
            self._logs.write_log(write.run, write.wire)
            self._note(write.key, Standing(write.run, write.state, write.last))
            if write.is_forgotten:
                self._forget(write.key)
            return write.state == ACTIVE

    def end(self, key: str, run: str, state: str, wire: bytes) -> bool:
        """End a run from outside; see :meth:`RunRegistry.end`."""
        with self._mutex:
            standing = self._active(key, run)
            if standing is None or state == LOST:
                return False
            last = standing.last + 1
            self._logs.write_log(run, with_id(wire, f"{run}.{last}".encode()))
            stop = self._stops[run]
            self._note(key, Standing(run, state, last))
        stop()
        return True

    def _active(self, key: str, run: str) -> Standing | None:
        standing = self._standings.get(key)
        return standing if standing and standing.run == run and standing.is_active else None

    def _note(self, key: str, standing: Standing) -> None:
        self._standings[key] = standing
        if not standing.is_active:
            del self._stops[standing.run]
            self._sizes[standing.run] = size = self._logs.end_log(standing.run)
            self._ended.append((self._clock(), key, standing.run))
            self._ended_bytes += size
            self._sweep()

    def _forget(self, key: str) -> None:
        standing = self._standings.pop(key, None)
        if standing is not None:
            self._ended_bytes -= self._sizes.pop(standing.run, 0)
            self._logs.forget_log(standing.run)

    def _sweep(self) -> None:
        ended, oldest = self._ended, self._clock() - self._seconds
        while ended and (ended[0][0] <= oldest or self._are_too_many()):
            _, key, run = ended.popleft()
            standing = self._standings.get(key)
            if standing is not None and standing.run == run:
                self._forget(key)

    def _are_too_many(self) -> bool:
        # The newest one stays, however large it is.
        is_too_large = self._ended_bytes > self._max_ended_bytes and len(self._ended) > 1
        return is_too_large or len(self._ended) > self._max_ended

    def watch(self, key: str, standing: Standing, wire: bytes) -> None:
        """Do nothing: who could be told that this process is gone is gone with it."""
