"""The example application: a page for each way of streaming to a browser.

Run it with ``gunicorn -k gevent "example_app:create_app()"``, or with
``gunicorn -k gthread --threads 32 "example_app:create_app()"``. With ``REDIS_URL``, for instance
``redis://127.0.0.1``, and ``SECRET_KEY`` in the environment, it may have as many worker processes
as you like.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flask import Flask, request
from werkzeug.exceptions import HTTPException

from flask_eventstream import eventstream

from . import binary, chat_room, game, inspector, log, notifications, progress, ticker
from .chat_api import api, in_json
from .pages import pages
from .streams import examples, messages

if TYPE_CHECKING:
    from flask import Response
    from werkzeug.wrappers import Response as AnyResponse

PACE = {
    "TOKEN_SECONDS": 0.03,
    "CLOCK_SECONDS": 1.0,
    "DATA_SECONDS": 1.0,
    "HEARTBEAT_SECONDS": 5.0,
    "NUMBER_SECONDS": 0.05,
    "LOG_SECONDS": 0.2,
    "STEP_SECONDS": 0.25,
    "FRAME_SECONDS": 1 / 15,
    "PULSE_SECONDS": 0.5,
    "RIGHT_SECONDS": 600,
    "TICK_SECONDS": 0.2,
    "REST_SECONDS": 5.0,
    "DOT_SECONDS": 3.0,
}
"""The pauses of the streams, in seconds; tests make them shorter."""

GALLERY = (
    notifications.notifications,
    log.log,
    progress.progress,
    binary.binary,
    inspector.inspector,
    ticker.ticker,
    game.game,
    chat_room.chat_room,
)
"""The blueprints of what people build."""


def create_app(config: dict[str, Any] | None = None) -> Flask:
    """Return a new app, so that each test can have one of its own with its own pace.

    :param config: what to change of :data:`PACE`, of Flask's configuration and of this
        extension's.
    """
    app = Flask(__name__)
    app.config.from_mapping(PACE)
    app.config["EVENTSTREAM_BROKER_URL"] = os.environ.get("REDIS_URL", "memory://")
    # All processes have to be given the same one. This one is good for a single process.
    app.config["SECRET_KEY"] = os.environ.get("SECRET_KEY") or secrets.token_hex()
    app.config["SESSION_COOKIE_SAMESITE"] = "Lax"
    app.config["LOG_FILE"] = str(Path(app.instance_path) / "example.log")
    app.config.from_mapping(config or {})
    app.register_blueprint(eventstream, url_prefix="/stream")
    for blueprint in (examples, messages, api, pages, *GALLERY):
        app.register_blueprint(blueprint)
    app.register_error_handler(HTTPException, _in_words)
    app.after_request(_keep_to_own_origin)
    return app


def _in_words(error: HTTPException) -> AnyResponse:
    if request.path.startswith(f"{api.url_prefix}/"):
        return in_json(error)
    # The pages show what the server says, and plain text needs no unwrapping.
    response = error.get_response()
    response.data = error.description or error.name
    response.content_type = "text/plain; charset=utf-8"
    return response


def _keep_to_own_origin(response: Response) -> Response:
    response.headers["Content-Security-Policy"] = "default-src 'self'"
    return response
