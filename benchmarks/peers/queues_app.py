"""Bare Flask with a queue and a greenlet for each subscriber, as tutorials have it."""

from __future__ import annotations

import queue
from itertools import count
from typing import TYPE_CHECKING

from flask import Flask, Response, request

if TYPE_CHECKING:
    from collections.abc import Iterator

queues: set[queue.SimpleQueue[str]] = set()
ids = count(1)


def create_app() -> Flask:
    """Return the app."""
    app = Flask("queues_app")
    app.add_url_rule("/stream", view_func=stream)
    app.add_url_rule("/publish", view_func=publish, methods=["POST"])
    app.add_url_rule("/burst", view_func=burst, methods=["POST"])
    return app


def stream() -> Response:
    """Answer a subscriber."""
    headers = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
    return Response(_events(), mimetype="text/event-stream", headers=headers)


def _events() -> Iterator[str]:
    own: queue.SimpleQueue[str] = queue.SimpleQueue()
    queues.add(own)
    try:
        yield ":\nretry: 3000\n"
        while True:
            yield own.get()
    finally:
        queues.discard(own)


def publish() -> tuple[str, int]:
    """Publish the body."""
    _send(request.get_data(as_text=True))
    return "", 204


def burst() -> tuple[str, int]:
    """Publish the body ``n`` times, each with its number in front."""
    data = request.get_data(as_text=True)
    for number in range(request.args.get("n", type=int)):
        _send(f"{number}@{data}")
    return "", 204


def _send(data: str) -> None:
    event = f"id: {next(ids)}\ndata: {data}\n\n"
    for each in list(queues):
        each.put(event)
