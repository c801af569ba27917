"""The app of the recipes, with what the tests need: a log of its streams, failures, libraries."""

from __future__ import annotations

import importlib
import sys
import time
from typing import TYPE_CHECKING, Any

from flask import Response, request, send_file

from flask_eventstream import EventStreamResponse, ServerSentEvent

from .npm import CLIENTS
from .servers import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

sys.path.insert(0, str(ROOT / "docs" / "recipes"))
recipes: Any = importlib.import_module("recipes")
app, eventstream = recipes.app, recipes.eventstream

MODULES = CLIENTS / "node_modules"
LIBRARIES = {
    "event-source-polyfill.js": MODULES / "event-source-polyfill/src/eventsource.js",
    "fetch-event-source.js": MODULES / "@microsoft/fetch-event-source/lib/esm/index.js",
    "fetch": MODULES / "@microsoft/fetch-event-source/lib/esm/fetch.js",
    "parse": MODULES / "@microsoft/fetch-event-source/lib/esm/parse.js",
    "htmx2.js": MODULES / "htmx.org/dist/htmx.js",
    "htmx-ext-sse.js": MODULES / "htmx-ext-sse/dist/sse.js",
    "htmx4.js": MODULES / "htmx4/dist/htmx.js",
    "hx-sse.js": MODULES / "htmx4/dist/ext/hx-sse.js",
    "turbo.js": MODULES / "@hotwired/turbo/dist/turbo.es2017-esm.js",
    "datastar.js": CLIENTS / "datastar/datastar-core.js",
}
IMPORTS = """<script type="importmap">
{"imports": {"@microsoft/fetch-event-source": "/static/fetch-event-source.js",
             "@hotwired/turbo": "/static/turbo.js"}}
</script>"""
STREAMS = ("/headlines", "/stream/", "/ask", "/raw", "/still/", "/finished")


class Log:
    """What was asked of the streams, and how many of the next answers are to fail."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.failing = 0
        self.status = 502

    def enter(self) -> Response | None:
        if not request.path.startswith(STREAMS):
            return None
        self.requests.append(
            {
                "method": request.method,
                "path": request.path,
                "authorization": request.headers.get("Authorization"),
                "header": request.headers.get("Last-Event-ID"),
                "query": request.args.get("lastEventId"),
            }
        )
        if not self.failing:
            return None
        self.failing -= 1
        return Response("no upstream", self.status)


log = Log()


def library(filename: str) -> Response:
    return send_file(LIBRARIES[filename], mimetype="text/javascript", max_age=60)


def told() -> list[dict[str, Any]]:
    return log.requests


def forget() -> dict[str, str]:
    log.requests.clear()
    log.failing = 0
    return {}


def fail() -> dict[str, str]:
    log.failing, log.status = int(request.args["times"]), int(request.args.get("status", 502))
    return {}


def call() -> dict[str, Any]:
    """Call one of the recipes' functions, or publish."""
    body = request.get_json()
    function = getattr(recipes, body["name"], None) or getattr(eventstream, body["name"])
    return {"returned": function(*body.get("args", []), **body.get("options", {}))}


def publish_datastar() -> dict[str, Any]:
    body = request.get_json()
    html = f"<li>{body['text']}</li>"
    patch = recipes.elements(html, selector="#headlines", mode="append")
    return {"id": eventstream.publish(patch, channel="headlines")}


def raw() -> Response:
    return Response(request.args["wire"], mimetype="text/event-stream")


def finished(client: str) -> Response:
    """Send one event and the end; a path for each client, since some ask on for ever."""
    return EventStreamResponse([ServerSentEvent("once", retry=50)])


def still(name: str) -> Response:
    """Send one event, and then nothing, like a connection that is dead."""

    def wire() -> Iterator[str]:
        yield "retry: 50\ndata: alive\nid: 7\n\n"
        time.sleep(30)

    return Response(wire(), mimetype="text/event-stream")


def with_imports(response: Response) -> Response:
    if request.path.startswith("/page/"):
        response.set_data(IMPORTS + response.get_data(as_text=True))
    return response


app.view_functions["static"] = library
app.before_request(log.enter)
app.after_request(with_imports)
app.add_url_rule("/page/blank", "blank", lambda: "<body></body>")
app.add_url_rule("/finished/<client>", view_func=finished)
app.add_url_rule("/still/<name>", view_func=still)
app.add_url_rule("/log", view_func=told)
app.add_url_rule("/forget", view_func=forget, methods=["POST"])
app.add_url_rule("/fail", view_func=fail, methods=["POST"])
app.add_url_rule("/call", view_func=call, methods=["POST"])
app.add_url_rule("/datastar", view_func=publish_datastar, methods=["POST"])
app.add_url_rule("/raw", view_func=raw, methods=["GET", "POST"])
