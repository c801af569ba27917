"""What the tests of both roads serve: one app that hijacks, one that iterates, and middleware."""

from __future__ import annotations

import threading
import zlib
from collections import Counter
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from flask import Flask, after_this_request, current_app, request, session
from werkzeug.debug import DebuggedApplication
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix

from flask_eventstream import ServerSentEvent
from flask_eventstream.signals import subscriber_connected, subscriber_disconnected

from . import apps
from .servers import DEADLINE, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from werkzeug.wrappers import Response

EARLIER = [
    ServerSentEvent("héllo 世界 🎉\u2028"),
    ServerSentEvent("first\n\nthird line", type="lines"),
    ServerSentEvent("x" * 200_000, id="large"),
    ServerSentEvent({"n": 1}, retry=7),
]
"""What is published before the client connects, which comes out of history."""

LIVE = [ServerSentEvent("live"), ServerSentEvent("y" * 200_000), ServerSentEvent("last")]
"""What is published once the client is subscribed."""


def play() -> dict[str, str]:
    """Publish before the client connects, while it is connected, and end its stream."""
    cursor = apps.eventstream.last_event_id()
    for event in EARLIER:
        apps.eventstream.publish(event)
    app = current_app._get_current_object()  # type: ignore[attr-defined]
    is_over = threading.Event()
    thread = threading.Thread(target=play_live, args=[app, is_over], daemon=True)
    app.config["PLAYING"] = thread, is_over
    thread.start()
    return {"cursor": cursor}


def end_play() -> dict[str, str]:
    """Have nothing published to those who come later, should nobody have been seen."""
    thread, is_over = current_app.config["PLAYING"]
    is_over.set()
    thread.join(DEADLINE)
    return {}


def play_live(app: Flask, is_over: threading.Event) -> None:
    def is_due() -> bool:
        return is_over.is_set() or apps.eventstream.subscriber_count() > 0

    with app.app_context():
        wait_for(is_due, what="somebody to subscribe")
        if is_over.is_set():
            return
        for event in LIVE:
            apps.eventstream.publish(event)
        apps.eventstream.disconnect("sse")


def subscribe() -> Response:
    """Subscribe as the query asks; of a body, read only what ``?json`` asks for."""
    channel = request.get_json()["channel"] if "json" in request.args else "sse"
    size = request.args.get("snapshot", 0, int)
    if "session" in request.args:
        session["user"] = "me"
    snapshot = (lambda: "s" * size) if size else None
    response = apps.eventstream.subscribe(channel, snapshot=snapshot)
    for n in range(request.args.get("cookies", 0, int)):
        response.set_cookie(f"cookie-{n}", "c" * 4000)
    for option in {"gzip", "coding", "closers"} & request.args.keys():
        after_this_request(AFTER_REQUEST[option])
    return response


def compress(response: Response) -> Response:
    response.response = zipped(response.response)  # type: ignore[arg-type]
    return set_coding(response)


def set_coding(response: Response) -> Response:
    response.headers["Content-Encoding"] = "gzip" if "gzip" in request.args else "identity"
    return response


def add_closers(response: Response) -> Response:
    counts = current_app.config["COUNTS"]
    response.call_on_close(lambda: counts.update(["closed", "first closer"]))
    response.call_on_close(lambda: counts.update(["second closer"]))
    return response


AFTER_REQUEST = {"gzip": compress, "coding": set_coding, "closers": add_closers}


def greet() -> str:
    current_app.config["COUNTS"]["greeted"] += 1
    return f"hello {request.args.get('name', '')}"


def counts() -> dict[str, int]:
    """Tell what has happened in this app, and how many streams are open, by road."""
    hub = current_app.extensions["eventstream"].hub
    return {
        **current_app.config["COUNTS"],
        "subscribers": apps.eventstream.subscriber_count(),
        "sockets": len(hub._members.all) if hub else 0,
    }


def count(app: Flask) -> None:
    """Have an app count the sockets that are hijacked, and the signals that are sent."""
    counts: Counter[str] = Counter()
    app.config["COUNTS"] = counts
    app.config["RECEIVERS"] = receivers = [
        lambda app, **_: counts.update(["connected"]),
        lambda app, **_: counts.update(["disconnected"]),
    ]
    subscriber_connected.connect(receivers[0], app)
    subscriber_disconnected.connect(receivers[1], app)
    hub = app.extensions["eventstream"].hub
    if hub is not None:
        hub.add = partial(count_and_add, counts, hub.add)


def count_and_add(counts: Counter[str], add: Callable[..., None], *arguments: Any) -> None:
    counts["hijacked"] += 1
    add(*arguments)


def create_app(**config: Any) -> Flask:
    defaults = {"EVENTSTREAM_RETRY": 0, "EVENTSTREAM_HEARTBEAT": 3600, "SECRET_KEY": "test"}
    defaults["EVENTSTREAM_MAX_EVENT_BYTES"] = 10_000_000
    app = apps.create_app(defaults | config)
    app.add_url_rule("/play", view_func=play, methods=["POST"])
    app.add_url_rule("/play/end", view_func=end_play, methods=["POST"])
    app.add_url_rule("/subscribe", view_func=subscribe, methods=["GET", "POST"])
    app.add_url_rule("/greeting", view_func=greet, methods=["GET", "POST"])
    app.add_url_rule("/counts", view_func=counts)
    count(app)
    return app


# Middleware


def items_of(app: WSGIApplication) -> Callable[..., WSGIApplication]:
    """Return what makes middleware of a function that takes the items and yields others."""

    def wrap(
        change: Callable[[Iterator[bytes]], Iterable[bytes]], *headers: Any
    ) -> WSGIApplication:
        def call(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
            def start(status: str, fields: list[Any], *exc_info: Any) -> Any:
                return start_response(status, [*fields, *headers], *exc_info)

            items = app(environ, start)
            try:
                yield from change(iter(items))
            finally:
                getattr(items, "close", int)()

        return call

    return wrap


def zipped(items: Iterable[bytes]) -> Iterator[bytes]:
    packer = zlib.compressobj(wbits=31)
    for item in items:
        yield packer.compress(item) + packer.flush(zlib.Z_SYNC_FLUSH)
    yield packer.flush()


def joined(items: Iterator[bytes]) -> Iterator[bytes]:
    while two := b"".join(islice(items, 2)):
        yield two


def prefetched(items: Iterator[bytes]) -> Iterator[bytes]:
    ahead = next(items)
    for item in items:
        yield ahead
        ahead = item
    yield ahead


def split(items: Iterator[bytes]) -> Iterator[bytes]:
    for item in items:
        yield item[:1]
        yield item[1:]


def introduced(items: Iterator[bytes]) -> Iterator[bytes]:
    yield b":hello\n"
    yield from items


def preceded_by_nothing(items: Iterator[bytes]) -> Iterator[bytes]:
    yield b""
    yield from items


def carelessly_passed_on(app: WSGIApplication) -> WSGIApplication:
    """Pass every item on, and never close what they come from."""

    def call(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        yield from app(environ, start_response)

    return call


CHANGING = {
    "joined": joined,
    "prefetched": prefetched,
    "split": split,
    "collected": list,
    "introduced": introduced,
    "preceded_by_nothing": preceded_by_nothing,
}
"""What gets other items out of the response, so that its socket stays with the server."""

PASSING = ["passed_on", "carelessly_passed_on", "proxy_fix", "debugged"]
"""What passes the items on as they are."""


def create_site() -> WSGIApplication:
    """Return the app that hijacks, and below their names the other one and all middleware."""
    app = create_app()
    wrap = items_of(app)
    return DispatcherMiddleware(
        app,
        {
            "/iterated": create_app(EVENTSTREAM_HIJACK=False),
            "/beating": create_app(EVENTSTREAM_HEARTBEAT=0.2),
            "/zipped": wrap(zipped, ("Content-Encoding", "gzip")),
            "/passed_on": wrap(iter),
            "/carelessly_passed_on": carelessly_passed_on(app),
            "/proxy_fix": ProxyFix(app),
            "/debugged": DebuggedApplication(app, evalex=True),
            **{f"/{name}": wrap(change) for name, change in CHANGING.items()},
        },
    )
