"""The HTTP response that carries an event stream, and the road that its bytes take.

Two kinds of body stand behind it. A generator sends what a view produces to the one client that
asked. A :class:`SubscriptionBody` sends what a subscription has to get, by one of two roads: the
server iterates it, or the hub has the client's socket. Nothing outside this file knows which.
"""

from __future__ import annotations

import contextvars
import json
import sys
import traceback
from collections.abc import Mapping
from functools import lru_cache, partial
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

from flask import (
    Response,
    copy_current_request_context,
    current_app,
    g,
    got_request_exception,
    has_request_context,
    request,
    stream_with_context,
)
from flask.json.provider import DefaultJSONProvider

from . import hijack
from .body import ShortBody, Silence, SubscriptionBody
from .config import check_seconds
from .event import HEARTBEAT, MAX_EVENT_BYTES
from .format import FINISHED_ID, StreamFormat, stream_format
from .producer import END, NOTHING, Producers
from .subscriber import Subscriber, framed

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from _typeshed.wsgi import WSGIEnvironment

    from .hub import SocketHub

HEADERS = {
    # no-transform: a proxy that compresses would hold events back until its buffer is full.
    "Cache-Control": "no-cache, no-transform",
    # nginx holds a whole response back unless told not to.
    "X-Accel-Buffering": "no",
}

ON_SUBSCRIBED_KEY = "eventstream.on_subscribed"
"""Where a WSGI environment may have a function that takes the body of a subscriber's response.

A test client has one: it must end a body that waits on another thread.
"""


class EventStreamResponse(Response):
    """A response that sends what an iterable yields as an event stream.

    :param stream: an iterable, a generator as a rule. It runs up to its first item before this
        returns, so that ``abort(404)`` before the first ``yield`` is a normal answer, and then in
        the request's context. Its items: a ``str`` is sent as it is, ``None`` is a heartbeat, a
        :class:`ServerSentEvent` is itself, all else is sent as JSON by the app's provider.
    :param status: the HTTP status; 200 by default.
    :param headers: more headers. ``Cache-Control`` and ``X-Accel-Buffering`` are set unless given.
    :param heartbeat: with a number of seconds, the iterable runs on a thread or greenlet of its own
        with a copy of the request's context; whenever it is silent for that long, a comment is
        sent, which also finds out whether the client has left. ``None`` by default.
    :param format: ``"sse"``, or ``"openai"`` for clients of OpenAI's API.
    :raises ConfigurationError: if there is no such format, or ``heartbeat`` is not more than 0.
    :raises TypeError: if ``stream`` is a text or a mapping, whose items are hardly meant.

    A stream that ends sends a last event, ``end``, with the id ``end``. A browser's ``EventSource``
    reconnects then and sends that id; it gets 204, which tells it to stop (WHATWG HTML, section
    9.2.3). The iterable is not started for it, nor for HEAD.
    """

    default_mimetype = "text/event-stream"
    # What asks for the whole body of an endless stream gets an error and not a hung worker.
    implicit_sequence_conversion = False
    _hub: SocketHub | None = None
    _has_closers = False

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        """Make a response that is of the app's own class too.

        Flask turns every other into that class, which would know nothing of roads.
        """
        kind: Any = cls
        own: Any = current_app.response_class
        return object.__new__(kind if issubclass(kind, own) else _both(kind, own))

    def __init__(
        self,
        stream: Iterable[Any],
        status: int | str | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        heartbeat: float | None = None,
        format: str = "sse",
    ) -> None:
        # No sequence, or werkzeug would say that the stream has no content.
        body: Iterable[bytes] = iter(())
        to_close: Iterable[Any] = stream
        if isinstance(stream, SubscriptionBody):
            body = stream
            self._hub = current_app.extensions["eventstream"].hub
            request.environ.get(ON_SUBSCRIBED_KEY, _ignore)(stream)
        elif isinstance(stream, ShortBody):
            body = iter(stream)
        elif cursor() == FINISHED_ID:
            status = 204
        elif request.method != "HEAD":
            encoder = stream_format(format, json_dumps(), _max_event_bytes())
            to_close = items = _started(stream, encoder, heartbeat)
            body = chain((next(items),), items)
        super().__init__(body, status, headers)
        for name, value in HEADERS.items():
            self.headers.setdefault(name, value)
        if self.status_code == 204:
            del self.headers["Content-Type"]
        # The body would be closed only by a server that has begun to iterate it.
        super().call_on_close(partial(_close, to_close))

    def call_on_close(self, func: Callable[[], Any]) -> Callable[[], Any]:
        """Have a function called when the stream ends."""
        self._has_closers = True
        return super().call_on_close(func)

    def get_app_iter(self, environ: WSGIEnvironment) -> Iterable[bytes]:
        """Return the body for a WSGI server: the place where its road is chosen."""
        app_iter = super().get_app_iter(environ)
        stream, hub = self.response, self._hub
        # Both may be something else: the body after an after_request function, and () for HEAD.
        if hub is None or not isinstance(stream, SubscriptionBody) or app_iter == ():
            return app_iter
        server = hijack.server_socket(environ) if self._is_plain() else None
        if server is None:
            return app_iter
        # Whoever wants to know when the stream ends may need the whole response for that.
        owner = self if self._has_closers else stream
        hand_over = partial(_hand_over, hub, stream, owner)
        return hijack.HijackingBody(server, iter(app_iter), hand_over, self.close)

    def _is_plain(self) -> bool:
        size = sum([len(name) + len(value) for name, value in self.headers])
        return size < hijack.MAX_HEAD_BYTES and "Content-Encoding" not in self.headers


@lru_cache(maxsize=32)
def _both(cls: Any, own: Any) -> Any:
    return type(cls.__name__, (cls, own), {})


def merge(*sources: Iterable[Any]) -> Iterator[Any]:
    """Yield the items of several iterables in the order in which they come.

    Each source runs on a thread or greenlet of its own with a copy of the request's context. One
    that is 16 items ahead of the client waits. What a source raises is raised here, and the others
    are closed at their next item, as they are when the client leaves.

    :param sources: the iterables; an endless one is fine.
    """
    producers = Producers(sources, carry_context)
    try:
        while (item := producers.get()) is not END:
            yield item
    finally:
        producers.close()


def cursor() -> str | None:
    """Return the id of the last event that the client of the current request has seen.

    From the header ``Last-Event-ID``, else from the query: ``lastEventId`` (polyfills) or
    ``last_event_id`` (htmx), for clients that cannot set the header.
    """
    header = request.headers.get("Last-Event-ID")
    if not header:
        return request.args.get("lastEventId") or request.args.get("last_event_id") or None
    try:
        # Browsers send UTF-8 (WHATWG HTML, section 9.2.3), and WSGI hands it over as if it were
        # latin-1 (PEP 3333).
        return header.encode("latin-1").decode("utf-8", "replace")
    except UnicodeEncodeError:
        # A test client that bypasses WSGI's encoding: it is text already.
        return header


def json_dumps() -> Callable[[Any], str]:
    """Return the JSON encoder of the current app, without NaN, which browsers cannot parse."""
    provider = current_app.json
    if not isinstance(provider, DefaultJSONProvider) or _has_own_dumps(provider):
        return provider.dumps
    # What its dumps() does, which makes a new encoder for each value: a third of an item's time.
    return json.JSONEncoder(
        allow_nan=False,
        default=provider.default,
        ensure_ascii=provider.ensure_ascii,
        sort_keys=provider.sort_keys,
    ).encode


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


def _has_own_dumps(provider: DefaultJSONProvider) -> bool:
    is_overridden = provider.__class__.dumps is not DefaultJSONProvider.dumps
    return is_overridden or "dumps" in vars(provider)


def _hand_over(
    hub: SocketHub,
    stream: SubscriptionBody,
    owner: SubscriptionBody | EventStreamResponse,
    hijacked: hijack.Hijacked,
) -> None:
    subscription = stream.subscription
    start = stream.take_start()
    wire = framed(start, hijacked.is_chunked) if start else b""
    subscriber = Subscriber(
        hijacked.descriptor,
        owner,
        subscription.channel_set,
        subscription.position,
        hijacked.head + wire,
        hijacked.is_chunked,
        stream.end,
    )
    hub.add(subscriber)
    stream.finish_by(partial(hub.end, subscriber))


def _max_event_bytes() -> int:
    state = current_app.extensions.get("eventstream")
    return state.config.max_event_bytes if state else MAX_EVENT_BYTES


def _ignore(body: SubscriptionBody) -> None:
    pass


def _close(stream: Iterable[Any]) -> None:
    close = getattr(stream, "close", None)
    if close is not None:
        close()


def _started(
    stream: Iterable[Any], encoder: StreamFormat, heartbeat: float | None
) -> Generator[bytes, None, None]:
    if isinstance(stream, (str, bytes, Mapping)):
        what = stream.__class__.__name__
        raise TypeError(f"the stream is a {what}; give an iterable of items, such as a generator")
    items = _encoded(stream, encoder)
    if heartbeat is not None:
        check_seconds("heartbeat", heartbeat)
        return _with_heartbeats(items, encoder, heartbeat)
    return cast("Generator[bytes, None, None]", stream_with_context(items))


def _encoded(stream: Iterable[Any], encoder: StreamFormat) -> Generator[bytes, None, None]:
    encode = encoder.encode
    has_started = False
    try:
        for item in stream:
            wire = encode(item)
            has_started = True
            yield wire
        yield encoder.end()
    except Exception as error:
        if not has_started:
            raise
        yield encoder.error(report_failure(error))
    finally:
        _close(stream)


def _with_heartbeats(
    items: Iterator[bytes], encoder: StreamFormat, heartbeat: float
) -> Generator[bytes, None, None]:
    report = copy_current_request_context(report_failure)
    producers = Producers([items], carry_context)
    silence = Silence(heartbeat)
    has_started = False
    try:
        while (wire := producers.get(silence.pause)) is not END:
            yield silence.broken_by(HEARTBEAT if wire is NOTHING else wire)
            has_started = True
    except Exception as error:
        # Only what fails before the first item gets here, and the head may have left by then.
        if not has_started:
            raise
        yield encoder.error(report(error))
    finally:
        producers.close()


def report_failure(error: BaseException) -> str:
    """Log what a view raised in mid-stream, and return what its client may know of it."""
    app = current_app._get_current_object()  # type: ignore[attr-defined]  # a proxy's own method
    app.log_exception(sys.exc_info())
    got_request_exception.send(app, _async_wrapper=app.ensure_sync, exception=error)
    if app.debug:
        return "".join(traceback.format_exception(error))
    return "The stream failed on the server."
