"""A room that tells who is there, served by one process or by many."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from flask import Flask

from flask_eventstream import EventStream, redis_members, redis_presence

if TYPE_CHECKING:
    from flask_eventstream import EventStreamResponse

eventstream = EventStream("eventstream", __name__)


def create_app(config: dict[str, Any]) -> Flask:
    vars(redis_members).update(LEASE_SECONDS=config.pop("LEASE", 15), LOOK_SECONDS=0.5)
    redis_presence.RENEWAL_SECONDS = 0.5
    app = Flask(__name__)
    app.config.update({f"EVENTSTREAM_{key}": value for key, value in config.items()})
    if "REDIS_URL" in os.environ:
        app.config["EVENTSTREAM_BROKER_URL"] = os.environ["REDIS_URL"]
    app.register_blueprint(eventstream)

    @app.get("/room/<member>")
    def room(member: str) -> EventStreamResponse:
        response = eventstream.subscribe("room", "news", presence=True, member=member)
        response.headers["X-Pid"] = os.getpid()
        return response

    @app.get("/watch")
    def watch() -> EventStreamResponse:
        response = eventstream.subscribe("room")
        response.headers["X-Pid"] = os.getpid()
        return response

    @app.post("/wait/<float:seconds>")
    def wait(seconds: float) -> dict[str, float]:
        app.extensions["eventstream"].members.seconds = seconds
        return {"seconds": seconds}

    @app.get("/present")
    def present() -> list[str]:
        return eventstream.present("room")

    return app
