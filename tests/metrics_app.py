"""An app whose figures Prometheus asks for, for many processes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import prometheus_client
from flask import Flask
from prometheus_client import multiprocess

from flask_eventstream import EventStream, metrics

if TYPE_CHECKING:
    from typing import Any

    from flask.typing import ResponseReturnValue

eventstream = EventStream("eventstream", __name__)
# The tests have less time than Prometheus.
metrics._SECONDS = 0.1
# And as much as they need, when a process ends.
metrics._EXIT_SECONDS = 20


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["EVENTSTREAM_BROKER_URL"] = os.environ["REDIS_URL"]
    app.config["EVENTSTREAM_MAX_SUBSCRIBERS"] = 1000
    app.register_blueprint(eventstream)
    metrics.instrument(app)

    @app.get("/metrics")
    def scrape() -> ResponseReturnValue:
        registry = prometheus_client.CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        content_type = prometheus_client.CONTENT_TYPE_LATEST
        headers = {"Content-Type": content_type, "X-Pid": str(os.getpid())}
        return prometheus_client.generate_latest(registry), headers

    @app.post("/publish")
    def publish() -> str:
        return eventstream.publish("x")

    @app.get("/user/<name>")
    def user(name: str) -> ResponseReturnValue:
        response = eventstream.subscribe(f"user:{name}", "sse")
        response.headers["X-Pid"] = str(os.getpid())
        return response

    return app


def child_exit(server: Any, worker: Any) -> None:
    """Do as the documentation says; this module is gunicorn's configuration, too."""
    multiprocess.mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]
