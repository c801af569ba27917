"""Runs: producers that go on without their clients, and write what they produce to a log.

A producer has a thread or greenlet of its own. It hands its events to a *joiner*, one for all runs
of a process, which writes what has gathered. So a log has few large entries where a model yields
many small tokens, and the first token waits for nothing. The rules:

* Only the joiner writes to logs, so a run's events stay in order.
* What a producer has handed over and is not written yet is bounded; at the bound it waits.
* A run that was ended from outside learns that when something of it is written: its producer is
  closed at its next item.
"""

from __future__ import annotations

import secrets
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from . import concurrency
from .format import FAILED
from .producer import close_source
from .run_registry import ACTIVE, CANCELLED, LOST, Write
from .shutdown import StreamStopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .format import StreamFormat

_ENTRY_BYTES = 16 * 1024
_MOST_UNWRITTEN = 256 * 1024

MESSAGES = {
    FAILED: "The stream failed on the server.",
    CANCELLED: "The run was cancelled.",
    LOST: "The server that produced this was lost.",
}
"""What clients are told of a run that has not come to its end."""


class _End(NamedTuple):
    state: str
    wire: bytes
    is_forgotten: bool


class Run:
    """A producer, and what it has produced that is not written yet.

    :param key: what its clients ask for.
    :param owner: whose it is.
    :param encoder: the format of its events.
    :param report: logs what the producer raises, and returns what clients may know of it.
    :ivar id: its id, which nobody can guess.
    :ivar started: set once there is something to read, or nothing more will come.
    :ivar is_over: whether nothing more can be written.
    :ivar error: what the producer raised before its first item, if :meth:`wait` is to tell.
    """

    def __init__(
        self, key: str, owner: str, encoder: StreamFormat, report: Callable[[BaseException], str]
    ) -> None:
        self.id = secrets.token_urlsafe(9)
        self.key = key
        self.owner = owner
        self.started = concurrency.new_event()
        self.is_over = False
        self.is_due = False
        self.error: BaseException | None = None
        self.encoder = encoder
        self._report = report
        # Whoever takes this out, the one who waits or the producer, sees to an early error.
        self._early = [True]
        self._events: deque[bytes | _End] = deque()
        self._writes: list[Write] = []
        self._last = self._written = self._given = self._taken = 0
        self._room = concurrency.new_event()

    def wait(self, timeout: float) -> None:
        """Wait for the first item, as long as ``timeout`` seconds.

        :raises BaseException: what the producer raised before it.
        """
        if not self.started.wait(timeout) and self._take_early():
            return
        # What was raised is told once the log is closed; there may be nobody to close it.
        self.started.wait(timeout)
        if self.error is not None:
            raise self.error

    def _take_early(self) -> bool:
        try:
            self._early.pop()
        except IndexError:
            return False
        return True

    def stop(self) -> None:
        """Have the producer closed at its next item; from any thread."""
        self.is_over = True
        self.started.set()
        self._room.set()

    def produce(
        self,
        source: Iterable[Any],
        hand_over: Callable[[Run], None],
        leave: Callable[[Run], None],
    ) -> BaseException | None:
        """Run the producer to its end, and return what it raised; on a thread of its own.

        :param source: what it yields.
        :param hand_over: has the joiner look at this run.
        :param leave: is told that the producer has ended, before any client can see that.
        """
        raised: BaseException | None = None
        try:
            for item in source:
                if not self.is_over:
                    self._take(item, hand_over)
                if self.is_over:
                    break
            end = self._ending("end")
        except StreamStopped:
            end = self._ending(LOST)
        except BaseException as error:  # noqa: BLE001  # its clients must hear of it, whatever it is
            raised = error
            end = self._failure(error)
        close_source(source)
        leave(self)
        self._events.append(end)
        hand_over(self)
        return raised

    def fail(self) -> Write:
        """Return the end of a run that cannot be produced."""
        end = self._ending(FAILED, MESSAGES[FAILED])
        return Write(self.key, self.id, self._last, end.wire, end.state)

    def _take(self, item: Any, hand_over: Callable[[Run], None]) -> None:
        if item is None:
            # Its clients have heartbeats of their own; this only says that it has begun.
            self.started.set()
            return
        wire = self.encoder.encode_with_id(item, f"{self.id}.{self._last + 1}")
        self._last += 1
        self._given += len(wire)
        self._events.append(wire)
        hand_over(self)
        if self._given - self._taken > _MOST_UNWRITTEN:
            self._wait_for_room()

    def _wait_for_room(self) -> None:
        while True:
            self._room.clear()
            if self.is_over or self._given - self._taken <= _MOST_UNWRITTEN:
                return
            self._room.wait()

    def _failure(self, error: BaseException) -> _End:
        if self._last == 0 and not self.started.is_set() and self._take_early():
            # It becomes the answer to the request that started it, as if there had been no run.
            self.error = error
            return self._ending(FAILED, is_forgotten=True)
        return self._ending(FAILED, self._report(error))

    def _ending(self, state: str, message: str = "", is_forgotten: bool = False) -> _End:
        self._last += 1
        event = self.encoder.last(state, message or MESSAGES.get(state, ""))
        return _End(state, event.with_id(f"{self.id}.{self._last}").encode(), is_forgotten)

    def take_writes(self) -> list[Write]:
        """Take what was handed over, which stays with the run until it is :meth:`done`."""
        wires: list[bytes] = []
        size = 0
        for _ in range(len(self._events)):
            event = self._events.popleft()
            self._written += 1
            if isinstance(event, _End):
                self._add_write([*wires, event.wire], event.state, event.is_forgotten)
                return self._writes
            wires.append(event)
            size += len(event)
            if size >= _ENTRY_BYTES:
                self._add_write(wires)
                wires, size = [], 0
        if wires:
            self._add_write(wires)
        return self._writes

    def take_last_writes(self) -> list[Write]:
        """Take what was handed over, and with it the end: whoever produces is about to be lost."""
        writes = self.take_writes()
        if not writes or writes[-1].state == ACTIVE:
            self._written += 1
            event = self.encoder.last(LOST, MESSAGES[LOST]).with_id(f"{self.id}.{self._written}")
            self._add_write([event.encode()], LOST)
        return writes

    def _add_write(self, wires: list[bytes], *state: Any) -> None:
        self._writes.append(Write(self.key, self.id, self._written, b"".join(wires), *state))

    def done(self, goes_on: bool) -> None:
        """Take note that what was taken is written, and whether more can be."""
        for write in self._writes:
            self._taken += len(write.wire)
        self._writes = []
        if not goes_on:
            self.stop()
            return
        # Both are looked at first, as to set an event costs more, and most are set already.
        if not self.started.is_set():
            self.started.set()
        if not self._room.is_set():
            self._room.set()
