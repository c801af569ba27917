"""The streams: generator views, and what is published to every tab.

The pages show the source of these functions beside what they do.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING, Any

from flask import Blueprint, abort, current_app, request

from flask_eventstream import (
    EventStream,
    EventStreamResponse,
    ServerSentEvent,
    eventstream,
    interval,
    merge,
)
from flask_eventstream.errors import BrokerUnavailableError

from .model import answer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    from flask import Response

MAX_CHARACTERS = 500
MAX_NUMBERS = 10_000

examples = EventStream("examples", __name__, url_prefix="/examples")
messages = Blueprint("messages", __name__)


@examples.stream("/typewriter/<uuid:conversation>")
def typewriter(conversation: UUID) -> Iterator[str]:
    """Answer a prompt, and tell what becomes of this generator."""
    channel = f"typewriter:{conversation}"
    prompt = field("prompt")  # a 400 from here is a normal answer
    tokens, outcome = 0, "closed"
    eventstream.publish("", type="started", channel=channel)
    try:
        for token in answer(prompt):
            tokens += 1
            yield token
            time.sleep(current_app.config["TOKEN_SECONDS"])
        outcome = "finished"
    finally:
        # At the end, and as soon as the client has left (GeneratorExit).
        report = {"tokens": tokens, "outcome": outcome}
        eventstream.publish(report, type="ended", channel=channel)


@examples.get("/typewriter/<uuid:conversation>/report")
def typewriter_report(conversation: UUID) -> EventStreamResponse:
    """Let who knows the random id read: the view is the authorization."""
    return eventstream.subscribe(f"typewriter:{conversation}")


@examples.resumable("/resume/<uuid:conversation>")
def resume(conversation: UUID) -> Iterator[str | ServerSentEvent]:
    """Answer a prompt to its end, whoever is there to read it.

    It has no owner: who knows the random id may read it, and stop it.
    """
    prompt = field("prompt")  # a 400 from here is a normal answer
    about = {"prompt": prompt, "process": os.getpid()}
    yield ServerSentEvent(about, "started")
    for token in answer(prompt):
        yield token
        time.sleep(current_app.config["TOKEN_SECONDS"])


@examples.after_request
def name_process(response: Response) -> Response:
    """Tell which of several processes has answered."""
    response.headers["X-Process"] = str(os.getpid())
    return response


@examples.stream("/clock")
def clock() -> Iterator[ServerSentEvent]:
    """Tell the time; a browser that lost its connection counts on."""
    seen = request.headers.get("Last-Event-ID", 0, type=int)
    for number in count(seen + 1):
        now = {"milliseconds": round(time.time() * 1000)}
        yield ServerSentEvent(now, "customEvent", id=number, retry=1000)
        time.sleep(current_app.config["CLOCK_SECONDS"])


@examples.stream("/interval")
def ticks() -> Iterator[ServerSentEvent]:
    """Merge two generators, of which neither waits for the other."""

    def each(seconds: float, type: str) -> Iterator[ServerSentEvent]:
        for number in interval(seconds):
            yield ServerSentEvent({"number": number}, type)

    pace = current_app.config
    return merge(
        each(pace["DATA_SECONDS"], "data"),
        each(pace["HEARTBEAT_SECONDS"], "heartbeat"),
    )


@examples.stream("/numbers")
def numbers() -> Iterator[int]:
    """Count; what is not text is sent as JSON."""
    first = request.args.get("first", 1, type=int)
    last = request.args.get("last", 10, type=int)
    if not 0 <= last - first < MAX_NUMBERS:
        abort(400, f"Count upwards, at most {MAX_NUMBERS:,} numbers.")
    for number in range(first, last + 1):
        yield number
        time.sleep(current_app.config["NUMBER_SECONDS"])


@messages.route("/send_message", methods=["GET", "POST"])
def send_message() -> dict[str, str]:
    """Publish; GET too, so that the address bar is enough."""
    message = {"message": field("message"), "at": time.time()}
    return {"id": eventstream.publish(message)}


@messages.get("/messages/<uuid:tab>")
def message_stream(tab: UUID) -> EventStreamResponse:
    """Stream all messages, and tell the tab which process does."""
    response = eventstream.subscribe("sse", f"tab:{tab}")
    # Without a broker the stream ends at once, and the tab returns.
    with suppress(BrokerUnavailableError):
        served = {"process": os.getpid()}
        eventstream.publish(served, type="served", channel=f"tab:{tab}")
    return response


@messages.get("/now")
def now() -> dict[str, float]:
    """Tell a tab that goes online what is older than that."""
    return {"now": time.time()}


def field(name: str) -> str:
    """Return what the client sent under a name as JSON, in a form or in the query."""
    sent: Any = request.get_json(silent=True)
    value = (sent if isinstance(sent, dict) else request.values).get(name)
    if not isinstance(value, str) or not value.strip():
        abort(400, f"The {name} is empty.")
    if len(value) > MAX_CHARACTERS:
        abort(400, f"The {name} is longer than {MAX_CHARACTERS} characters.")
    # JSON can carry half a character ("\ud83d"), which UTF-8 cannot.
    return value.encode(errors="replace").decode()
