"""The HTTP response that carries an event stream, and the road that its bytes take.

Two kinds of body stand behind it. A generator sends what a view produces to the one client that
asked. A :class:`SubscriptionBody` sends what a subscription has to get, by one of two roads: the
server iterates it, or the hub has the client's socket. Nothing outside this file knows which.
"""

from __future__ import annotations

import json
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, cast

from flask import Response, current_app, request
from flask.json.provider import DefaultJSONProvider

from . import hijack
from .body import ShortBody, SubscriptionBody
from .contexts import RequestEnd, unwrapped
from .event import MAX_EVENT_BYTES
from .format import FINISHED_ID, stream_format
from .generator_stream import GeneratorBody, body_of, close_stream, shutdown_in_use
from .subscriber import Subscriber

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

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
        with an app context of its own; whenever it is silent for that long, a comment is sent,
        which also finds out whether the client has left. ``None`` by default.
    :param format: ``"sse"``, ``"openai"`` for clients of OpenAI's API, or ``"ai-sdk"`` for those of
        Vercel's AI SDK.
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
    _generated: GeneratorBody | None = None
    _max_lag = 0.0
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
        to_close: Iterable[Any] = unwrapped(stream)
        if isinstance(stream, SubscriptionBody):
            body = stream
            state = current_app.extensions["eventstream"]
            self._hub, self._max_lag = state.hub, state.config.max_lag
            request.environ.get(ON_SUBSCRIBED_KEY, _ignore)(stream)
        elif isinstance(stream, ShortBody):
            body = iter(stream)
        elif cursor() == FINISHED_ID:
            status = 204
        elif request.method != "HEAD":
            encoder = stream_format(format, json_dumps(), _max_event_bytes())
            body = to_close = self._generated = body_of(to_close, encoder, heartbeat)
        super().__init__(body, status, headers)
        for name, value in HEADERS.items():
            self.headers.setdefault(name, value)
        if self.status_code == 204:
            del self.headers["Content-Type"]
        # The body would be closed only by a server that has begun to iterate it.
        super().call_on_close(partial(close_stream, to_close))
        self._shutdown = shutdown_in_use()
        self._request_end = RequestEnd.of_request()
        self._request_end.add(self)

    def call_on_close(self, func: Callable[[], Any]) -> Callable[[], Any]:
        """Have a function called when the stream ends."""
        self._has_closers = True
        return super().call_on_close(func)

    def end(self, reason: str) -> None:
        """End the stream of a subscriber for a reason, and close the whole response."""
        cast("SubscriptionBody", self.response).reason = reason
        self.close()

    def get_app_iter(self, environ: WSGIEnvironment) -> Iterable[bytes]:
        """Return the body for a WSGI server: the place where its road is chosen."""
        app_iter = super().get_app_iter(environ)
        self._request_end.take(self)
        if self._generated is not None:
            self._generated.hold()
        stream, hub = self.response, self._hub
        bound = partial(self._bound, environ)
        # Both may be something else: the body after an after_request function, and () for HEAD.
        if hub is not None and isinstance(stream, SubscriptionBody) and app_iter != ():
            server = hijack.server_socket(environ) if self._is_plain() else None
            if server is not None:
                # Whoever wants to know when the stream ends may need the whole response for that.
                owner = self if self._has_closers else stream
                hand_over = partial(_hand_over, hub, stream, owner)
                items = _first_and_others(iter(app_iter), bound)
                watch = self._shutdown.watch
                return hijack.HijackingBody(server, items, hand_over, self.close, watch)
        bound()
        return app_iter

    def _bound(self, environ: WSGIEnvironment) -> None:
        # A server that waits for a client who takes nothing cannot be told that it has to stop.
        if isinstance(self.response, SubscriptionBody):
            hijack.prepare(environ, self._max_lag, self.response.patience)
        cut = hijack.cutter(environ)
        if cut is not None:
            super().call_on_close(self._shutdown.cut_late(cut))

    def _is_plain(self) -> bool:
        size = sum([len(name) + len(value) for name, value in self.headers])
        return size < hijack.MAX_HEAD_BYTES and "Content-Encoding" not in self.headers


@lru_cache(maxsize=32)
def _both(cls: Any, own: Any) -> Any:
    return type(cls.__name__, (cls, own), {})


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


def _has_own_dumps(provider: DefaultJSONProvider) -> bool:
    is_overridden = provider.__class__.dumps is not DefaultJSONProvider.dumps
    return is_overridden or "dumps" in vars(provider)


def _hand_over(
    hub: SocketHub,
    stream: SubscriptionBody,
    owner: SubscriptionBody | EventStreamResponse,
    hijacked: hijack.Hijacked,
) -> BaseException | None:
    subscription = stream.subscription
    subscriber = Subscriber(
        hijacked.descriptor,
        owner,
        subscription.channel_set,
        subscription.position,
        hijacked.head,
        hijacked.is_chunked,
        stream.deadline,
        subscription.replay,
        stream.take_start(),
    )
    subscription.replay = None
    stream.finish_by(partial(hub.end, subscriber))
    try:
        hub.add(subscriber, stream.patience)
        return None
    except BaseException as error:
        if hub.has(subscriber):
            return error
        raise


def _first_and_others(items: Iterator[bytes], bound: Callable[[], None]) -> Iterator[bytes]:
    # The others are asked for if the server keeps the socket.
    yield next(items)
    bound()
    yield from items


def _max_event_bytes() -> int:
    state = current_app.extensions.get("eventstream")
    return state.config.max_event_bytes if state else MAX_EVENT_BYTES


def _ignore(body: SubscriptionBody) -> None:
    pass
