"""Flask-SSE, which has a connection to Redis for each subscriber."""

from __future__ import annotations

from flask import Flask, request
from flask_sse import sse


def create_app(redis_url: str) -> Flask:
    """Return the app.

    :param redis_url: where Redis listens.
    """
    app = Flask("flask_sse_app")
    app.config["REDIS_URL"] = redis_url
    app.register_blueprint(sse, url_prefix="/stream")
    app.add_url_rule("/publish", view_func=publish, methods=["POST"])
    app.add_url_rule("/burst", view_func=burst, methods=["POST"])
    return app


def publish() -> tuple[str, int]:
    """Publish the body."""
    sse.publish(request.get_data(as_text=True))
    return "", 204


def burst() -> tuple[str, int]:
    """Publish the body ``n`` times, each with its number in front."""
    data = request.get_data(as_text=True)
    for number in range(request.args.get("n", type=int)):
        sse.publish(f"{number}@{data}")
    return "", 204
