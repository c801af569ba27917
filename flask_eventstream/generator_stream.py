"""The body of a generator stream: what a view yields, as bytes, with its end and its failures.

It runs in the thread or greenlet that serves it, or, with heartbeats, on one of its own.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

from flask import current_app, got_request_exception, has_app_context

from . import concurrency
from .body import Silence
from .config import Config, check_seconds
from .contexts import StreamContext, carried, unwrapped
from .event import HEARTBEAT
from .producer import END, NOTHING, Producers, ticks
from .shutdown import Shutdown, StreamStopped, Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from .format import StreamFormat

_WITHOUT_BLUEPRINT = "eventstream.shutdown"


def merge(*sources: Iterable[Any]) -> Iterator[Any]:
    """Yield the items of several iterables in the order in which they come.

    Each source runs on a thread or greenlet of its own, with an app context of its own; see the
    page about generator streams for what it has of the request. One that is 16 items ahead of the
    client waits. What a source raises is raised here, and the others are closed at their next item,
    as they are when the client leaves.

    :param sources: the iterables; an endless one is fine.
    """
    producers = Producers(map(unwrapped, sources), carried)
    shutdown = shutdown_in_use() if has_app_context() else None
    if shutdown is not None:
        shutdown.enter(producers)
    try:
        while (item := producers.get()) is not END:
            yield item
        if producers.is_stopped:
            raise StreamStopped
    finally:
        if shutdown is not None:
            shutdown.leave(producers)
        producers.close()


def interval(seconds: float) -> Iterator[int]:
    """Count 0, 1, 2, … with a pause before each number, without drift.

    A tick that comes late is not made up for: the next one is due a whole pause after it at most.
    A stream's head waits for its first item, so yield one at once, or give the stream a
    ``heartbeat``, where the browser's ``onopen`` must not be late.

    :param seconds: the pause, in seconds, more than 0.
    :raises ConfigurationError: if ``seconds`` is no number that is more than 0.
    """
    check_seconds("seconds", seconds)
    return ticks(seconds, shutdown_in_use().sleep) if has_app_context() else ticks(seconds)


def body_of(stream: Iterable[Any], encoder: StreamFormat, heartbeat: float | None) -> GeneratorBody:
    """Return what a server sends of a stream; see :class:`EventStreamResponse`.

    :param stream: the items. What it raises before the first one is raised here.
    :param encoder: makes bytes of them.
    :param heartbeat: the longest silence, in seconds; ``None`` if it does not matter.
    """
    if isinstance(stream, (str, bytes, Mapping)):
        what = stream.__class__.__name__
        raise TypeError(f"the stream is a {what}; give an iterable of items, such as a generator")
    if heartbeat is None and concurrency.runs_in_event_loop():
        # An async view has a thread for itself, and the server another one.
        heartbeat = Config.heartbeat
    shutdown, turn = shutdown_in_use(), Turn()
    items = _encoded(stream, encoder, shutdown, turn)
    if heartbeat is None:
        shutdown.enter(turn, is_generated=True)
        return GeneratorBody(items, turn, is_whole=True)
    check_seconds("heartbeat", heartbeat)
    beats = _with_heartbeats(items, encoder, shutdown, turn, heartbeat)
    return GeneratorBody(beats, turn, is_whole=False)


class GeneratorBody:
    """The body of a generator stream, in the contexts of the current request.

    :param items: what is sent. The first one is taken at once.
    :param turn: knows what the view has raised.
    :param is_whole: whether the view runs where the server iterates this, and so needs the
        request until the end.
    """

    def __init__(self, items: Generator[bytes, None, None], turn: Turn, *, is_whole: bool) -> None:
        self._items = items
        self._turn = turn
        self._context = StreamContext()
        self._run = self._context.run
        self._is_whole = is_whole
        self._first: bytes = self._run(next, items)

    def __iter__(self) -> Iterator[bytes]:
        # In C, as it is done for each item.
        rest = map(self._run, repeat(next), repeat(self._items))
        return chain((self._first,), rest, self._at_end())

    def _at_end(self) -> Iterator[bytes]:
        # Not every server closes what it has iterated to its end.
        self.close()
        yield from ()

    def hold(self) -> None:
        """Put off the end of the request, as a server is about to send the stream."""
        self._turn.take()
        if self._is_whole:
            self._context.hold()

    def close(self) -> None:
        """Close the stream, and end the request that was put off; more than once is fine."""
        try:
            self._run(self._items.close)
        finally:
            self._context.release(self._turn.error)
            if self._is_whole:
                # It has the frames of the view, and they may have this.
                self._turn.error = None

    def __del__(self) -> None:
        # A server that drops it without closing it must not leave the request without its end.
        self.close()


def shutdown_in_use() -> Shutdown:
    """Return what ends the streams of the current app."""
    extensions = current_app.extensions
    if "eventstream" in extensions:
        shutdown: Shutdown = extensions["eventstream"].shutdown
        return shutdown
    # An app may have generator streams without a blueprint of ours.
    if _WITHOUT_BLUEPRINT not in extensions:
        extensions[_WITHOUT_BLUEPRINT] = Shutdown()
    found: Shutdown = extensions[_WITHOUT_BLUEPRINT]
    return found


def _encoded(
    stream: Iterable[Any], encoder: StreamFormat, shutdown: Shutdown, turn: Turn
) -> Generator[bytes, None, None]:
    encode = encoder.encode
    has_started = False
    try:
        for item in stream:
            wire = encode(item)
            has_started = True
            turn.is_producing = False
            yield wire
            if shutdown.has_begun:
                raise StreamStopped
            turn.is_producing = True
        turn.is_producing = False
        yield encoder.end()
    except StreamStopped:
        turn.is_producing = False
        yield encoder.stopped(shutdown.farewell())
    except BaseException as error:
        turn.is_producing = False
        turn.error = error
        if not has_started or concurrency.ends_thread(error):
            raise
        yield encoder.error(report_failure(error))
    finally:
        shutdown.leave(turn)
        close_stream(stream)


def _with_heartbeats(
    items: Iterator[bytes],
    encoder: StreamFormat,
    shutdown: Shutdown,
    turn: Turn,
    heartbeat: float,
) -> Generator[bytes, None, None]:
    def carry(produce: Callable[[], BaseException | None]) -> Callable[[], object]:
        return carried(lambda: produce() or turn.error)

    producers = Producers([items], carry)
    silence = Silence(heartbeat)
    has_started = False
    shutdown.enter(producers, is_generated=True)
    try:
        while (wire := producers.get(silence.pause)) is not END:
            yield silence.broken_by(HEARTBEAT if wire is NOTHING else wire)
            has_started = True
        if producers.is_stopped:
            yield encoder.stopped(shutdown.farewell())
    except BaseException as error:
        # Only what fails before the first item gets here, and the head may have left by then.
        if not has_started or concurrency.ends_thread(error):
            raise
        yield encoder.error(report_failure(error))
    finally:
        shutdown.leave(producers)
        producers.close()


def close_stream(stream: Iterable[Any]) -> None:
    """Close what a view returned, if it can be closed."""
    close = getattr(stream, "close", None)
    if close is not None:
        close()


def report_failure(error: BaseException) -> str:
    """Log what a view raised in mid-stream, and return what its client may know of it."""
    app = current_app._get_current_object()  # type: ignore[attr-defined]  # a proxy's own method
    app.log_exception(sys.exc_info())
    got_request_exception.send(app, _async_wrapper=app.ensure_sync, exception=error)
    if app.debug:
        return "".join(traceback.format_exception(error))
    return "The stream failed on the server."
