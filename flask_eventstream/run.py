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

import logging
import secrets
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from . import concurrency
from .errors import BrokerUnavailableError
from .format import FAILED
from .producer import close_source
from .run_registry import CANCELLED, LOST, Write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .format import StreamFormat
    from .run_registry import RunRegistry, Standing

JOIN_SECONDS = 0.025
"""For how long tokens are joined. 40 writes a second look like a stream to the eye."""

_ENTRY_BYTES = 16 * 1024
_MOST_UNWRITTEN = 256 * 1024
_RETRY_SECONDS = 0.5
_logger = logging.getLogger(__name__)

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

    def produce(self, source: Iterable[Any], hand_over: Callable[[Run], None]) -> None:
        """Run the producer to its end; on a thread or greenlet of its own.

        :param source: what it yields.
        :param hand_over: has the joiner look at this run.
        """
        try:
            for item in source:
                if not self.is_over:
                    self._take(item, hand_over)
                if self.is_over:
                    break
            end = self._ending("end")
        except BaseException as error:  # noqa: BLE001  # its clients must hear of it, whatever it is
            end = self._failure(error)
        close_source(source)
        self._events.append(end)
        hand_over(self)

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


class Runs:
    """The runs that a process produces.

    :param registry: which runs there are, here and elsewhere.
    :param max_runs: how many may be active in this process.
    :param max_runs_per_owner: and how many of one owner.
    """

    def __init__(self, registry: RunRegistry, max_runs: int, max_runs_per_owner: int) -> None:
        self.registry = registry
        self._max_runs = max_runs
        self._max_runs_per_owner = max_runs_per_owner
        self._reset()
        concurrency.call_after_fork(self._reset)

    def _reset(self) -> None:
        # Once more in every forked child, where no producer runs.
        self._active: dict[str, Run] = {}
        self._due: deque[Run] = deque()
        self._urgent: concurrency.Event | None = None
        self._joiner = concurrency.Waker(self._join)

    def find(self, key: str, lost: bytes) -> Standing | None:
        """Return how the latest run of a key stands, after its end if its producer is lost.

        :param key: the key.
        :param lost: the event that says that it is lost, without its id.
        """
        standing = self.registry.find(key)
        if standing is not None and standing.is_lost:
            self.registry.end(key, standing.run, LOST, lost)
            standing = self.registry.find(key)
        return standing

    def has_room(self, owner: str) -> bool:
        """Tell whether one more run may begin.

        A run that was cancelled counts as the process's for as long as its producer goes on.
        """
        own = [run for run in tuple(self._active.values()) if run.owner == owner]
        is_full = bool(owner) and sum(not run.is_over for run in own) >= self._max_runs_per_owner
        return not is_full and len(self._active) < self._max_runs

    def begin(
        self,
        run: Run,
        source: Iterable[Any],
        carry: Callable[[Callable[[], None]], Callable[[], None]],
    ) -> bool:
        """Begin a run, unless another one of its key is active; tell whether it did.

        :param run: the run.
        :param source: what its producer yields.
        :param carry: wraps what runs on a thread of its own, to give it the caller's contexts.
        :raises BrokerUnavailableError: if the broker's server does not answer.
        :raises RuntimeError: if no thread can be started.
        """
        if not self.registry.begin(run.key, run.id, run.stop, last_words(run.encoder, LOST)):
            return False
        self._active[run.id] = run
        try:
            self._joiner.start()
            # Should it be about to end, for want of runs, this keeps it.
            self._joiner.ring()
            concurrency.spawn(carry(lambda: self._produce(run, source)))
        except RuntimeError:
            del self._active[run.id]
            self.registry.end(run.key, run.id, FAILED, last_words(run.encoder, FAILED))
            raise
        return True

    def _produce(self, run: Run, source: Iterable[Any]) -> None:
        try:
            run.produce(source, self._hand_over)
        finally:
            del self._active[run.id]
            self._joiner.ring()

    def _hand_over(self, run: Run) -> None:
        if run.is_due:
            return
        run.is_due = True
        self._due.append(run)
        self._joiner.ring()
        if self._urgent is not None and not run.started.is_set():
            self._urgent.set()

    def _join(self) -> bool:
        # One that is here twice was put back, and has handed over more since.
        due = list(dict.fromkeys([self._due.popleft() for _ in range(len(self._due))]))
        pause = self._urgent = concurrency.new_event()
        seconds = JOIN_SECONDS
        try:
            self._write(due)
        except BrokerUnavailableError as error:
            _logger.warning("The tokens of %d runs wait for their broker: %s", len(due), error)
            self._due.extendleft(reversed(due))
            seconds = _RETRY_SECONDS
        except Exception:
            _logger.exception("What %d runs produced could not be written; they are over", len(due))
            for run in due:
                run.done(goes_on=False)
        if due:
            pause.wait(seconds)
        if self._due:
            self._joiner.ring()
        return bool(self._active)

    def _write(self, due: Sequence[Run]) -> None:
        for run in due:
            # From now on it has to ask again, for what it adds after this.
            run.is_due = False
        writes = [write for run in due for write in run.take_writes()]
        goes_on = dict.fromkeys([run.id for run in due], True)
        for write, is_active in zip(writes, self.registry.write(writes), strict=True):
            goes_on[write.run] = is_active
        for run in due:
            run.done(goes_on[run.id])


def last_words(encoder: StreamFormat, state: str) -> bytes:
    """Return the event that ends a run from outside, without its id."""
    return encoder.last(state, MESSAGES[state]).encode()
