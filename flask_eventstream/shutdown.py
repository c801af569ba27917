"""The end of a process: its streams end in order, and its server does not wait for them.

A server that is told to stop waits for open requests, and a stream is one that does not end by
itself. Nothing of a server's handling of signals is touched. A worker of gunicorn says in an
attribute of its own that it stops, for whatever reason (a signal, a reload, ``--max-requests``),
and that is looked at as long as there are streams. Other servers stop, and then the interpreter
ends.

1. Runs are given up: the end of each is written to its log.
2. The hub sends what there is, and ends its streams.
3. Who waits in a thread or greenlet of the server is woken, or thrown out of a view that waits.
4. Who has not left after a while is held up by a client that takes nothing: that is cut off.
"""

from __future__ import annotations

import random
import signal
from typing import TYPE_CHECKING, Any, Protocol

from . import concurrency

if TYPE_CHECKING:
    from collections.abc import Callable

RETRY = 3000
"""When clients return by default, in **milliseconds**."""

_LOOK_SECONDS = 0.1
_PATIENCE = 1.5
_PATIENCE_WITH_GREENLETS = 0.5
"""All views that wait have been thrown out then, and gunicorn looks only once a second whether
streams are left."""

_CUT_SECONDS = 0.3
_HANDLED = [
    getattr(signal, name)
    for name in ("SIGWINCH", "SIGUSR1", "SIGABRT", "SIGQUIT", "SIGTERM", "SIGINT")
    if hasattr(signal, name)
]
"""What gunicorn's workers handle; first what apps hardly do."""

_RETURNS_IN_A_SECOND = 1000
"""How many clients of one process return in a second. Each takes about half a millisecond."""


class StreamStopped(BaseException):
    """Raised where a view waits whose stream has to end, since its server stops.

    Like ``GeneratorExit`` it is no error, and views that catch errors do not stop it.
    """


class Stream(Protocol):
    """A stream that a thread or greenlet of the server waits for."""

    def stop(self) -> None:
        """Have it end soon; from any thread."""


class Part(Protocol):
    """What else has to be ended: the hub, and the runs."""

    @property
    def is_busy(self) -> bool:
        """Whether there is something to end."""

    def stop(self) -> None:
        """End it, and wait for that, for 2 seconds at most. It is called once."""


class Turn:
    """A generator stream, of which it is known whether the view or the server has its turn.

    :ivar is_producing: whether the view has it.
    :ivar error: what the view has raised; ``None`` for nothing.
    """

    __slots__ = ("_greenlet", "error", "is_producing")

    def __init__(self) -> None:
        self.is_producing = True
        self.error: BaseException | None = None
        self.take()

    def take(self) -> None:
        """Take note that the current greenlet runs the view from now on, if one does."""
        self._greenlet = concurrency.current_greenlet()

    def stop(self) -> None:
        """Throw the view out of its wait, if it is a greenlet's; a thread's ends at its next item.

        Never the server out of its own, who may be about to send.
        """
        if self._greenlet is not None:
            concurrency.throw_into(self._greenlet, StreamStopped(), lambda: self.is_producing)


class Shutdown:
    """Ends the streams of an app in this process, once its server stops.

    :param retry: when clients return, in **milliseconds**; jittered.
    :param parts: what has streams of its own, in the order in which these end.
    :ivar has_begun: whether the server stops. Streams that begin then end at once.
    """

    def __init__(self, retry: int = RETRY, *parts: Part) -> None:
        self._retry = retry
        self._parts = parts
        self._start()
        concurrency.call_after_fork(self._start)
        # The first, since threads of a server's pool wait in streams. Not every system has it.
        concurrency.call_before_threads_are_joined(self.begin)
        concurrency.call_at_exit(self.begin)

    def _start(self) -> None:
        self.has_begun = False
        self._is_over = self._is_watched = self._is_greenlet = False
        self._mutex = concurrency.new_mutex()
        self._progress = concurrency.Progress()
        # Each with whether it is all of a view's response.
        self._streams: dict[Stream, bool] = {}
        self._ending = 1
        self._cuts: set[Callable[[], None]] = set()

    def enter(self, stream: Stream, *, is_generated: bool = False) -> None:
        """Have a stream stopped, should the server stop before it leaves.

        :param stream: the stream.
        :param is_generated: whether it is a generator stream, and not a part of one.
        """
        self._streams[stream] = is_generated
        self.watch()
        if self.has_begun:
            stream.stop()

    def leave(self, stream: Stream) -> None:
        """Take note that a stream has ended; more than once does not matter."""
        self._streams.pop(stream, None)

    @property
    def generator_streams(self) -> int:
        """How many generator streams are open."""
        return sum(tuple(self._streams.values()))

    @property
    def is_greenlet(self) -> bool:
        """Whether the streams are served by greenlets, as far as there were any."""
        return self._is_greenlet

    def cut_late(self, cut: Callable[[], None]) -> Callable[[], None]:
        """Have a connection cut whose stream has not ended in time.

        :param cut: cuts it.
        :returns: what has to be called once the server has sent all of the stream.
        """
        self._cuts.add(cut)
        self.watch()

        def on_sent() -> None:
            self._cuts.discard(cut)
            if self.has_begun:
                # Or the server waits for another request on it: gunicorn for --keep-alive seconds.
                cut()

        return on_sent

    def watch(self) -> None:
        """Look at the server as long as there are streams; to be called once there is one."""
        worker = gunicorn_worker()
        with self._mutex:
            is_watched, self._is_watched = self._is_watched, worker is not None
        self._is_greenlet = concurrency.runs_in_greenlet()
        if worker is None or is_watched:
            return
        try:
            concurrency.spawn(self._watch, worker)
        except RuntimeError:
            # No thread is to be had. That must not end a stream, and the next one tries again.
            self._is_watched = False

    def _watch(self, worker: Any) -> None:
        pause = concurrency.new_event()
        while not self._is_unwatched():
            pause.wait(_LOOK_SECONDS)
            if not worker.alive:
                self.begin()

    def _is_unwatched(self) -> bool:
        with self._mutex:
            is_open = bool(self._streams or self._cuts)
            is_busy = is_open or any(part.is_busy for part in self._parts)
            self._is_watched = is_busy and not self.has_begun
            return not self._is_watched

    def sleep(self, seconds: float) -> None:
        """Wait, unless the server stops.

        :raises StreamStopped: if it does.
        """
        if self._progress.wait_until(lambda: self.has_begun, seconds):
            raise StreamStopped

    def farewell(self) -> bytes:
        """Return what a stream ends with since its server stops, see :func:`farewell`."""
        return farewell(self._retry, self._ending)

    def begin(self) -> None:
        """End all streams there are, and wait for that, for a few seconds at most."""
        with self._mutex:
            is_first, self.has_begun = not self.has_begun, True
        if is_first:
            self._end_all()
            self._is_over = True
        # The interpreter must not end while another thread is at it.
        concurrency.look_until(lambda: self._is_over, 4, in_greenlet=self._is_greenlet)

    def _end_all(self) -> None:
        for part in self._parts:
            part.stop()
        self._ending = len(self._streams)
        for stream in tuple(self._streams):
            stream.stop()
        self._progress.notify()
        self._wait_for_streams(_PATIENCE_WITH_GREENLETS if self._is_greenlet else _PATIENCE)
        for cut in tuple(self._cuts):
            cut()
        self._wait_for_streams(_CUT_SECONDS)

    def _wait_for_streams(self, seconds: float) -> None:
        def have_left() -> bool:
            # Of a stream that has left, the server may still have to send the end of the body.
            return not (self._streams or self._cuts)

        concurrency.look_until(have_left, seconds, in_greenlet=self._is_greenlet)


def farewell(retry: int, streams: int) -> bytes:
    """Return what a stream ends with that might go on: when its client returns, and no event.

    It leaves without a blank line: clients take the line for itself (WHATWG HTML, section 9.2.6),
    and forget the block that it begins. The more streams end at once, the longer it takes until
    all of their clients have returned.

    :param retry: when a client returns, in **milliseconds**; jittered by 20 % at least.
    :param streams: how many end at once.
    """
    spread = max(0.4 * retry, 1000 * streams / _RETURNS_IN_A_SECOND)
    return b"retry: %d\n" % (0.8 * retry + random.random() * spread)


def gunicorn_worker() -> Any:
    """Return gunicorn's worker, if this process is one."""
    # It is the owner of the handlers of its signals. An app may have put its own before some.
    for kind in _HANDLED:
        worker = getattr(signal.getsignal(kind), "__self__", None)
        if isinstance(getattr(worker, "alive", None), bool):
            return worker
    return None
