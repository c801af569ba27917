"""Iterators that run on threads or greenlets of their own, and what is made of them.

A plain generator is driven by the server that sends its items, and nothing can be sent while it
computes. On a thread of its own it can be silent while somebody else keeps the connection alive,
and several of them can feed one stream.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from . import concurrency

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

END = object()
"""What :meth:`Producers.get` returns once all sources have ended."""

NOTHING = object()
"""What :meth:`Producers.get` returns if no item came in time."""

_AHEAD = 16
_logger = logging.getLogger(__name__)


class Producers:
    """Runs sources side by side and hands over their items in the order in which they come.

    A source that is 16 items ahead waits, so that a slow reader slows it down. Everything is
    handed over by the producing thread itself, the failure of its source included.

    :param sources: the iterables; they are started, iterated and closed on their own threads.
    :param carry: wraps what runs on such a thread, to give it contexts. What is wrapped returns the
        error that it has ended with.
    :ivar is_stopped: whether items are left since the server stops.
    """

    def __init__(
        self,
        sources: Iterable[Iterable[Any]],
        carry: Callable[[Callable[[], BaseException | None]], Callable[[], object]],
    ) -> None:
        self._items: deque[tuple[_Producer, Any]] = deque()
        self._ready = concurrency.new_event()
        self._is_closed = self.is_stopped = False
        self._running = [_Producer(self, source) for source in sources]
        for producer in self._running:
            concurrency.spawn(producer.run, carry(producer.produce))

    def get(self, timeout: float | None = None) -> Any:
        """Return the next item of any source; :data:`END` after the last one of all.

        :param timeout: how long to wait for it, in seconds; without end by default.
        :returns: the item, or :data:`NOTHING` if none came in time.
        :raises BaseException: whatever a source raised, which may well be a ``TimeoutError``.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._running and not self.is_stopped:
            self._ready.clear()
            if self._items:
                producer, item = self._items.popleft()
                if item is not producer:
                    producer.took_one()
                    return item
                self._running.remove(producer)
                producer.reraise()
                continue
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                return NOTHING
            self._ready.wait(remaining)
        return END

    def hand_over(self, producer: _Producer, item: Any) -> bool:
        """Take an item from a producer; tell whether more is wanted."""
        self._items.append((producer, item))
        self._ready.set()
        return not self._is_closed

    def stop(self) -> None:
        """Have :meth:`get` return :data:`END` from now on, since the server stops."""
        self.is_stopped = True
        self._ready.set()

    def close(self) -> None:
        """Have every source closed, by its own thread, at its next item."""
        self._is_closed = True
        for producer in self._running:
            producer.stop()


class _Producer:
    def __init__(self, owner: Producers, source: Iterable[Any]) -> None:
        self._owner = owner
        self._source = source
        self._error: BaseException | None = None
        self._given = 0
        self._taken = 0
        self._is_stopped = False
        self._room = concurrency.new_event()

    def run(self, produce: Callable[[], object]) -> None:
        try:
            produce()
        finally:
            # A producer as the item of itself is its end. By then its contexts are torn down.
            self._owner.hand_over(self, self)

    def produce(self) -> BaseException | None:
        try:
            for item in self._source:
                if not self._wait_for_room() or not self._owner.hand_over(self, item):
                    break
                self._given += 1
        except BaseException as error:  # noqa: BLE001  # it is raised where the items are taken
            self._error = error
        close_source(self._source)
        return self._error

    def _wait_for_room(self) -> bool:
        while True:
            self._room.clear()
            if self._is_stopped:
                return False
            if self._given - self._taken < _AHEAD:
                return True
            self._room.wait()

    def took_one(self) -> None:
        self._taken += 1
        self._room.set()

    def stop(self) -> None:
        self._is_stopped = True
        self._room.set()

    def reraise(self) -> None:
        if self._error is not None:
            raise self._error


def close_source(source: object) -> None:
    """Close what a producer iterated, if it can be closed. If that fails, it is logged."""
    close = getattr(source, "close", None)
    if close is None:
        return
    try:
        close()
    except BaseException:
        # Nobody takes items any more who could be told, and whatever it is (SystemExit too), the
        # end must come, or the reader waits for ever.
        _logger.exception("Closing the source of a stream failed: %r", source)


def ticks(seconds: float, wait: Callable[[float], object] | None = None) -> Iterator[int]:
    """Count, with a pause before each number; see :func:`interval`.

    :param seconds: the pause.
    :param wait: waits for so many seconds.
    """
    # Not time.sleep(), which would stop a gevent server that is not monkey-patched.
    wait = wait or concurrency.new_event().wait
    due = time.monotonic()
    number = 0
    while True:
        due = max(due + seconds, time.monotonic())
        wait(due - time.monotonic())
        yield number
        number += 1
