"""An app that many processes serve, with its broker in Redis."""

from __future__ import annotations

import os

from flask import Flask

from flask_eventstream import EventStream

eventstream = EventStream("eventstream", __name__)


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["EVENTSTREAM_BROKER_URL"] = os.environ["REDIS_URL"]
    app.config["EVENTSTREAM_HEARTBEAT"] = 2
    app.register_blueprint(eventstream)

    @app.get("/count")
    def count() -> dict[str, int]:
        return {"count": eventstream.subscriber_count("sse"), "pid": os.getpid()}

    @app.post("/publish")
    def publish() -> dict[str, str]:
        return {"id": eventstream.publish("x", type="posted")}

    return app
