"""An app with short runs and an ordinary view, for clients that keep their connections."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Flask, request

from flask_eventstream import EventStream

if TYPE_CHECKING:
    from collections.abc import Iterator

eventstream = EventStream("eventstream", __name__)


@eventstream.resumable("/run/<name>")
def run(name: str) -> Iterator[str]:
    text = request.get_data(as_text=True)
    for number in range(3):
        yield f"{name} {number} {text}"


def echo(name: str) -> str:
    return f"{name} {request.get_data(as_text=True)}"


def create_app() -> Flask:
    app = Flask(__name__)
    app.register_blueprint(eventstream)
    # Below the path for which the documented proxies keep their connections to the app.
    app.add_url_rule("/stream/echo/<name>", view_func=echo, methods=["POST"])
    return app
