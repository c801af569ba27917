"""An app behind a proxy, with users: a header says whose a request is."""

from __future__ import annotations

import os

from flask import Flask, request
from werkzeug.middleware.proxy_fix import ProxyFix

from flask_eventstream import EventStream

eventstream = EventStream("eventstream", __name__)


@eventstream.identify
def user() -> str | None:
    return request.headers.get("X-User")


def create_app() -> Flask:
    app = Flask(__name__)
    app.config.update(SECRET_KEY="secret", EVENTSTREAM_MAX_SUBSCRIBERS_PER_ADDRESS=2)
    if "REDIS_URL" in os.environ:
        app.config.update(
            EVENTSTREAM_BROKER_URL=os.environ["REDIS_URL"],
            EVENTSTREAM_KEY_PREFIX=os.environ["PREFIX"],
            EVENTSTREAM_MAX_SUBSCRIBERS_PER_ADDRESS=None,
        )
    app.wsgi_app = ProxyFix(app.wsgi_app)  # type: ignore[method-assign]
    app.register_blueprint(eventstream)

    @app.get("/token")
    def token() -> str:
        return eventstream.token("news", user="me")

    @app.post("/revoke")
    def revoke() -> dict[str, int]:
        eventstream.revoke("me")
        return {"pid": os.getpid()}

    @app.get("/pid")
    def pid() -> dict[str, int]:
        return {"pid": os.getpid()}

    @app.after_request
    def name_process(response):  # type: ignore[no-untyped-def]
        response.headers["X-Pid"] = os.getpid()
        return response

    return app
