"""An app for pages that import eventstream.js; it tells what it was asked for."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from itertools import count
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, current_app, request

from flask_eventstream import EventStream, ServerSentEvent
from flask_eventstream.response import cursor

if TYPE_CHECKING:
    from collections.abc import Iterator

eventstream = EventStream("eventstream", __name__)
GATES: dict[str, threading.Event] = defaultdict(threading.Event)
ANSWERS: dict[str, list[int]] = {}
"""Of each name, the statuses of the next answers, before it streams; 200 is one that breaks off."""

PAGE = '<!doctype html><title>page</title><script type="module" src="/page.js"></script>'
DOCS_PAGE = """<!doctype html><output id="text"></output><output id="state"></output><ol></ol>
<script>
  const shown = [], cursor = "", conversation = "docs", list = document.querySelector("ol");
  const show = (line) => shown.push(line);
  const row = (line) => Object.assign(document.createElement("li"), { textContent: line });
</script>"""
SCRIPT = """
import { EventStream } from "/stream/eventstream.js";

Object.assign(window, { EventStream, seen: [], told: [], follow });

function follow(url, options) {
  const stream = (window.stream = new EventStream(url, options));
  const see = ({ type, data, lastEventId }) => seen.push([type, data, lastEventId]);
  for (const type of ["end", "stream-error", "cancelled", "lost"]) {
    stream.addEventListener(type, see);
  }
  stream.onmessage = stream.onreset = see;
  stream.onopen = () => told.push("open");
  stream.onerror = ({ status, message }) => {
    told.push([status ?? null, message, stream.readyState, performance.now()]);
  };
}
"""


@eventstream.authorize
def may_read(channel: str) -> bool:
    return True


@eventstream.stream("/answers/<name>")
def answers(name: str) -> Any:
    """Answer as the test says; after that, stream an event and wait."""
    status = ANSWERS[name].pop(0) if ANSWERS.get(name) else None
    if status not in (None, 200):
        return Response("no", status, {"Retry-After": "1"} if status == 503 else {})
    retry = request.args.get("retry", 100, int)
    data = request.get_data(as_text=True) or "data"
    event = ServerSentEvent(data, retry=retry, id=request.args.get("id"))
    if status is None:
        return waiting(event, name)
    return Response(event.encode(), mimetype="text/event-stream")


def waiting(event: ServerSentEvent, name: str) -> Iterator[ServerSentEvent]:
    yield event
    GATES[name].wait()


@eventstream.stream("/silent/<name>", heartbeat=0.1)
def with_heartbeats(name: str) -> Iterator[str]:
    yield "once"
    GATES[name].wait()


@eventstream.stream("/finished/<type>")
def finished(type: str) -> Iterator[str]:
    yield "one"
    if type == "stream-error":
        raise ValueError


@eventstream.resumable("/chat/<name>")
def run(name: str) -> Iterator[str]:
    yield f"{request.get_json()['prompt']} {request.headers.get('X-Page', '')}"
    GATES[name].wait()
    yield "the end"


def publish() -> dict[str, str]:
    return {"id": eventstream.publish(**request.get_json())}


def flood(channel: str) -> str:
    """Publish 0, 1, 2, … at speed until the test says ``/go``, and then "over"."""
    app: Any = current_app._get_current_object()  # type: ignore[attr-defined]

    def work() -> None:
        with app.app_context():
            for number in count():
                if GATES[channel].wait(0.002):
                    break
                eventstream.publish(str(number), channel=channel)
            eventstream.publish("over", channel=channel)

    threading.Thread(target=work, daemon=True).start()
    return ""


def publish_many(channel: str) -> list[str]:
    return eventstream.publish_many(map(str, range(260)), channel)


def token(channel: str) -> str:
    return eventstream.token(channel, max_age=float(request.args.get("max_age", 60)))


def create_app() -> Flask:
    app = Flask(__name__)
    app.config.update(SECRET_KEY="secret", EVENTSTREAM_RETRY=50, EVENTSTREAM_HISTORY=100_000)
    app.register_blueprint(eventstream)
    asked: list[dict[str, Any]] = []

    @app.after_request
    def note(response: Response) -> Response:
        if request.path.startswith("/stream"):
            headers = request.headers
            asked.append(
                {
                    "url": request.full_path.rstrip("?"),
                    "method": request.method,
                    "cursor": cursor(),
                    "header": headers.get("Last-Event-ID"),
                    "token": headers.get("Authorization"),
                    "cookie": headers.get("Cookie"),
                    "status": response.status_code,
                    "time": time.monotonic(),
                }
            )
        if request.path == "/":
            response.headers["Content-Security-Policy"] = (
                "default-src 'self'; connect-src 'self' http://localhost:*"
            )
        response.headers["Access-Control-Allow-Origin"] = "*"
        return response

    def answer(name: str) -> str:
        ANSWERS[name] = request.get_json()
        return ""

    def go(name: str) -> str:
        GATES[name].set()
        return ""

    def end(channel: str) -> list[int]:
        return [eventstream.disconnect(channel)]

    def script() -> Response:
        return Response(SCRIPT, mimetype="text/javascript")

    def subscribers(channel: str) -> str:
        return str(eventstream.subscriber_count(channel))

    app.add_url_rule("/", "page", lambda: PAGE)
    app.add_url_rule("/docs", "docs", lambda: DOCS_PAGE)
    app.add_url_rule("/stream-token", "stream_token", lambda: token("docs"), methods=["POST"])
    app.add_url_rule("/page.js", view_func=script)
    app.add_url_rule("/asked", "asked", lambda: asked)
    app.add_url_rule("/publish", view_func=publish, methods=["POST"])
    app.add_url_rule("/publish-many/<channel>", view_func=publish_many, methods=["POST"])
    app.add_url_rule("/flood/<channel>", view_func=flood, methods=["POST"])
    app.add_url_rule("/token/<channel>", view_func=token)
    app.add_url_rule("/answer/<name>", view_func=answer, methods=["POST"])
    app.add_url_rule("/go/<name>", view_func=go, methods=["POST"])
    app.add_url_rule("/end/<channel>", view_func=end, methods=["POST"])
    app.add_url_rule("/subscribers/<channel>", view_func=subscribers)
    app.add_url_rule("/cursor", "cursor", eventstream.last_event_id)
    return app
