"""The app that the tests serve with real servers."""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING, Any

from flask import Flask, current_app, request

import flask_eventstream
from flask_eventstream import EventStream, EventStreamResponse, ServerSentEvent, interval, merge

if TYPE_CHECKING:
    from collections.abc import Iterator

eventstream = EventStream("eventstream", __name__)
HOME = os.path.dirname(flask_eventstream.__file__)


@eventstream.stream("/ticks")
def ticks() -> Iterator[int]:
    yield from interval(0.1)


@eventstream.stream("/silent", heartbeat=0.2)
def silent() -> Iterator[int]:
    yield from interval(0.4)


@eventstream.stream("/mute", heartbeat=3)
def mute() -> Iterator[int]:
    yield 0
    yield from interval(3600)


@eventstream.stream("/merged")
def merged() -> Iterator[int]:
    yield from merge(interval(0.1), interval(0.3))


@eventstream.stream("/count/<int:number>")
def count(number: int) -> Iterator[dict[str, int]]:
    current_app.config["STARTED"] = current_app.config.get("STARTED", 0) + 1
    for n in range(number):
        yield {"n": n}


def publish() -> dict[str, str]:
    data = request.get_json()
    return {"id": eventstream.publish(data["data"], **data.get("fields", {}))}


def state() -> dict[str, Any]:
    """Tell what the process holds because of streams, and what it holds at all."""
    gc.collect()
    gevent = sys.modules.get("gevent")
    greenlets = [one for one in gc.get_objects() if gevent and isinstance(one, gevent.Greenlet)]
    return {
        "subscribers": eventstream.subscriber_count(),
        "channels": len(list(current_app.extensions["eventstream"].broker._channels)),
        "threads": sum(is_ours(frame) for frame in sys._current_frames().values()),
        "greenlets": sum(not one.dead for one in greenlets),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


def started() -> str:
    """Tell how often a view was started."""
    return str(current_app.config.get("STARTED", 0))


def is_ours(frame: Any) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(HOME):
            return True
        frame = frame.f_back
    return False


def chunks() -> Iterator[Any]:
    """Write like OpenAI's API, but slowly enough for heartbeats, and with ids and types."""
    for token in ("Hel", "lo", " 世界"):
        yield {"choices": [{"index": 0, "delta": {"content": token}}]}
        yield None


def chat() -> Any:
    return raw() if "wire" in request.args else EventStreamResponse(chunks(), format="openai")


def with_ids() -> Iterator[Any]:
    for n in range(3):
        yield ServerSentEvent({"n": n}, id=n)
        yield None


def raw() -> Any:
    """Send bytes as they are, to show what a client makes of the wrong ones."""
    wire = request.args["wire"].encode("latin-1")
    return current_app.response_class(wire, mimetype="text/event-stream")


def create_app(config: dict[str, Any] | None = None) -> Flask:
    app = Flask(__name__)
    app.config.update(config or {})
    app.register_blueprint(eventstream)
    app.add_url_rule("/publish", view_func=publish, methods=["POST"])
    app.add_url_rule(
        "/disconnect", "disconnect", lambda: [eventstream.disconnect("sse")], methods=["POST"]
    )
    app.add_url_rule("/state", view_func=state)
    app.add_url_rule("/started", view_func=started)
    app.add_url_rule("/v1/chat/completions", "chat", chat, methods=["POST"])
    app.add_url_rule("/ids", "ids", lambda: EventStreamResponse(with_ids()))
    app.add_url_rule("/raw", view_func=raw)
    return app
