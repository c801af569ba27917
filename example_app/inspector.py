"""A stream to look at closely, and the clock that its events are measured by."""

from __future__ import annotations

import time
from itertools import count
from typing import TYPE_CHECKING

from flask import current_app, request

from flask_eventstream import EventStream, ServerSentEvent, interval

if TYPE_CHECKING:
    from collections.abc import Iterator

inspector = EventStream("inspector", __name__, url_prefix="/inspector")

STREAMS = {
    "/inspector/pulse": "Pulse: a bit of everything",
    "/examples/clock": "Clock",
    "/examples/interval": "Interval and heartbeat",
    "/examples/numbers?last=200": "Numbers, which end",
    "/stream": "Broadcast, with the broker's heartbeats",
    "/log/lines": "Log",
    "/binary/frames?gzip=true": "Binary",
}
"""The streams to choose from, by their URLs."""


@inspector.stream("/pulse", methods=["GET"])
def pulse() -> Iterator[ServerSentEvent | None]:
    """Send events with the time they were made at, and heartbeats."""
    seen = request.headers.get("Last-Event-ID", 0, type=int)
    yield ServerSentEvent("Hello!\nTwo lines.", "greeting", retry=1000)
    for number, _ in zip(count(seen + 1), interval(current_app.config["PULSE_SECONDS"])):
        yield None  # a heartbeat
        now = {"number": number, "sent": round(time.time() * 1000)}
        yield ServerSentEvent(now, "pulse", id=number)


@inspector.get("/now")
def now() -> dict[str, float]:
    """Tell the server's time, for a browser to compare with its own."""
    return {"now": time.time() * 1000}
