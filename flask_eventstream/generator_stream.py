"""The body of a generator stream: what a view yields, as bytes, with its end and its failures.

It runs in the thread or greenlet that serves it, or, with heartbeats, on one of its own.
"""

from __future__ import annotations

import contextvars
import sys
import traceback
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from flask import (
    copy_current_request_context,
    current_app,
    g,
    got_request_exception,
    has_app_context,
    has_request_context,
    stream_with_context,
)

from .body import Silence
from .config import check_seconds
from .event import HEARTBEAT
from .producer import END, NOTHING, Producers, ticks
from .shutdown import Shutdown, StreamStopped, Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from .format import StreamFormat

_WITHOUT_BLUEPRINT = "eventstream.shutdown"


def merge(*sources: Iterable[Any]) -> Iterator[Any]:
    """Yield the items of several iterables in the order in which they come.

    Each source runs on a thread or greenlet of its own with a copy of the request's context. One
    that is 16 items ahead of the client waits. What a source raises is raised here, and the others
    are closed at their next item, as they are when the client leaves.

    :param sources: the iterables; an endless one is fine.
    """
    producers = Producers(sources, carry_context)
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


def carry_context(function: Callable[[], None]) -> Callable[[], None]:
    """Wrap a function to run on another thread as it would here.

    It gets the context variables, a copy of the request's context, and what ``g`` has.
    """
    context = contextvars.copy_context()
    if not has_request_context():
        return partial(context.run, function)
    values = {name: g.get(name) for name in g}

    @copy_current_request_context
    def run() -> None:
        for name, value in values.items():
            setattr(g, name, value)
        function()

    return partial(context.run, run)


def body_of(
    stream: Iterable[Any], encoder: StreamFormat, heartbeat: float | None
) -> Generator[bytes, None, None]:
    """Return what a server sends of a stream; see :class:`EventStreamResponse`.

    :param stream: the items.
    :param encoder: makes bytes of them.
    :param heartbeat: the longest silence, in seconds; ``None`` if it does not matter.
    """
    if isinstance(stream, (str, bytes, Mapping)):
        what = stream.__class__.__name__
        raise TypeError(f"the stream is a {what}; give an iterable of items, such as a generator")
    shutdown, turn = shutdown_in_use(), Turn()
    items = _encoded(stream, encoder, shutdown, turn)
    if heartbeat is not None:
        check_seconds("heartbeat", heartbeat)
        return _with_heartbeats(items, encoder, shutdown, heartbeat)
    shutdown.enter(turn, is_generated=True)
    return cast("Generator[bytes, None, None]", stream_with_context(items))


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
    except Exception as error:
        if not has_started:
            raise
        turn.is_producing = False
        yield encoder.error(report_failure(error))
    finally:
        shutdown.leave(turn)
        close_stream(stream)


def _with_heartbeats(
    items: Iterator[bytes], encoder: StreamFormat, shutdown: Shutdown, heartbeat: float
) -> Generator[bytes, None, None]:
    report = copy_current_request_context(report_failure)
    producers = Producers([items], carry_context)
    silence = Silence(heartbeat)
    has_started = False
    shutdown.enter(producers, is_generated=True)
    try:
        while (wire := producers.get(silence.pause)) is not END:
            yield silence.broken_by(HEARTBEAT if wire is NOTHING else wire)
            has_started = True
        if producers.is_stopped:
            yield encoder.stopped(shutdown.farewell())
    except Exception as error:
        # Only what fails before the first item gets here, and the head may have left by then.
        if not has_started:
            raise
        yield encoder.error(report(error))
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
