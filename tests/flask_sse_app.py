"""An app that used Flask-SSE, and one that still does."""

from __future__ import annotations

import importlib
import os
from typing import Any

from flask import Flask, Response, abort, render_template_string, request


def create_app(module: str = "flask_eventstream.flask_sse", **config: Any) -> Flask:
    """Return an app that differs in one import: ``flask_sse`` is the other name."""
    flask_sse = importlib.import_module(module)
    sse = flask_sse.ServerSentEventsBlueprint("sse", __name__)
    sse.add_url_rule(rule="", endpoint="stream", view_func=sse.stream)
    app = Flask(__name__)
    app.config.update(config)

    def refuse() -> None:
        if request.args.get("channel", "").startswith("secret"):
            abort(403)

    sse.before_request(refuse)
    app.register_blueprint(sse, url_prefix="/events")
    app.extensions["sse"] = sse

    @app.get("/")
    def index() -> str:
        return render_template_string("{{ url_for('sse.stream', channel='news') }}")

    @app.post("/publish")
    def publish() -> dict[str, Any]:
        return {"id": sse.publish(**(request.json or {}))}

    @app.after_request
    def name_process(response: Response) -> Response:
        response.headers["X-Process"] = str(os.getpid())
        return response

    return app


def served_app() -> Flask:
    return create_app(
        SSE_REDIS_URL=os.environ["REDIS_URL"],
        EVENTSTREAM_KEY_PREFIX=os.environ["KEY_PREFIX"],
        EVENTSTREAM_HEARTBEAT=2,
    )
