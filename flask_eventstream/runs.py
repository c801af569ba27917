"""The runs that a process produces, and the joiner that writes for all of them."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Any

from . import concurrency
from .errors import BrokerUnavailableError
from .run import MESSAGES, Run
from .run_registry import LOST, NoRoomError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .format import StreamFormat
    from .run_registry import RunRegistry, Standing

    Carry = Callable[[Callable[[], BaseException | None]], Callable[[], object]]
    """Wraps what runs on a thread of its own, to give it contexts."""

JOIN_SECONDS = 0.025
"""For how long tokens are joined. 40 writes a second look like a stream to the eye."""

_RETRY_SECONDS = 0.5
_ROOM_SECONDS = 10.0
_STOP_SECONDS = 0.5
_logger = logging.getLogger(__name__)


class Runs:
    """The runs that a process produces.

    :param registry: which runs there are, here and elsewhere.
    :param max_runs: how many producers this process may have at once.
    """

    def __init__(self, registry: RunRegistry, max_runs: int) -> None:
        self.registry = registry
        self._max_runs = max_runs
        self._reset()
        concurrency.call_after_fork(self._reset)

    def _reset(self) -> None:
        # Once more in every forked child, where no producer runs.
        self._active: dict[str, Run] = {}
        self._mutex = concurrency.new_mutex()
        # Those that have room, and of these, those that may turn out not to need it.
        self._placed: set[str] = set()
        self._asking: set[str] = set()
        self._progress = concurrency.Progress()
        self._due: deque[Run] = deque()
        self._urgent: concurrency.Event | None = None
        self._is_stopped = self._is_greenlet = False
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

    def begin(
        self,
        run: Run,
        source: Iterable[Any],
        carry: Carry,
    ) -> Standing:
        """Begin a run, unless another one of its key is active.

        :param run: the run.
        :param source: what its producer yields.
        :param carry: wraps what runs on a thread of its own, to give it contexts.
        :returns: how the run stands that the key has now: this one, or the one that is active.
        :raises NoRoomError: if this process has too many, or its owner has.
        :raises BrokerUnavailableError: if the broker's server does not answer.
        :raises RuntimeError: if no thread can be started.
        """
        standing = self._begin(run)
        while standing.is_lost:
            self.registry.end(run.key, standing.run, LOST, last_words(run.encoder, LOST))
            standing = self._begin(run)
        if standing.run == run.id:
            self._start(run, source, carry)
        return standing

    def _begin(self, run: Run) -> Standing:
        if not self._progress.wait_until(lambda: self._takes_room(run), _ROOM_SECONDS):
            raise NoRoomError
        is_begun = False
        try:
            lost = last_words(run.encoder, LOST)
            standing = self.registry.begin(run.key, run.id, run.stop, lost, run.owner)
            is_begun = standing.run == run.id
            return standing
        finally:
            with self._mutex:
                self._asking.discard(run.id)
            if not is_begun:
                self._leave(run)
            self._progress.notify()

    def _takes_room(self, run: Run) -> bool:
        """Take room for a run, if there is some; tell whether that was done.

        Room that is taken by those whose key turns out to be busy is free again soon, and so it is
        not known yet whether there is none.

        :raises NoRoomError: if there is none.
        """
        with self._mutex:
            if len(self._placed) < self._max_runs:
                self._placed.add(run.id)
                self._asking.add(run.id)
                return True
            if not self._asking:
                raise NoRoomError
            return False

    def _leave(self, run: Run) -> None:
        with self._mutex:
            self._placed.discard(run.id)

    def _start(
        self,
        run: Run,
        source: Iterable[Any],
        carry: Carry,
    ) -> None:
        self._active[run.id] = run
        self._is_greenlet = concurrency.runs_in_greenlet()
        try:
            self._joiner.start()
            # Should it be about to end, for want of runs, this keeps it.
            self._joiner.ring()
            concurrency.spawn(carry(lambda: self._produce(run, source)))
        except RuntimeError:
            del self._active[run.id]
            self._leave(run)
            self.registry.write([run.fail()])
            raise

    @property
    def active(self) -> int:
        """How many there are whose producer goes on."""
        return len(self._active)

    @property
    def is_busy(self) -> bool:
        """Whether there is a run that goes on."""
        return bool(self._active)

    def stop(self) -> None:
        """Give up all runs, and wait until clients can read that, for half a second at most."""
        self._is_stopped = True
        given_up = [run for run in tuple(self._active.values()) if not run.is_over]
        self._due.extend(given_up)
        self._joiner.ring()
        concurrency.look_until(
            lambda: all(run.is_over for run in given_up),
            _STOP_SECONDS,
            in_greenlet=self._is_greenlet,
        )

    def _produce(self, run: Run, source: Iterable[Any]) -> BaseException | None:
        try:
            return run.produce(source, self._hand_over, self._leave)
        finally:
            self._leave(run)
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
        take = Run.take_last_writes if self._is_stopped else Run.take_writes
        writes = [write for run in due for write in take(run)]
        goes_on = dict.fromkeys([run.id for run in due], True)
        for write, is_active in zip(writes, self.registry.write(writes), strict=True):
            goes_on[write.run] = is_active
        for run in due:
            run.done(goes_on[run.id])


def last_words(encoder: StreamFormat, state: str) -> bytes:
    """Return the event that ends a run from outside, without its id."""
    return encoder.last(state, MESSAGES[state]).encode()
