from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from flask_eventstream.signals import (
    event_published,
    subscriber_connected,
    subscriber_disconnected,
)
from flask_eventstream.testing import client_stream

if TYPE_CHECKING:
    from flask import Flask
    from flask.testing import FlaskClient

    from flask_eventstream import EventStream


def test_what_happens_is_told(app: Flask, client: FlaskClient, eventstream: EventStream) -> None:
    told: list[tuple[str, Flask, dict[str, Any]]] = []
    receivers = {
        signal.name: lambda sender, *, name=signal.name, **extra: told.append((name, sender, extra))
        for signal in (subscriber_connected, subscriber_disconnected, event_published)
    }
    subscriber_connected.connect(receivers["eventstream-subscriber-connected"])
    subscriber_disconnected.connect(receivers["eventstream-subscriber-disconnected"])
    event_published.connect(receivers["eventstream-event-published"])
    with client_stream(client, "/stream", headers={"Last-Event-ID": "7"}) as stream:
        with app.app_context():
            id = eventstream.publish("x", channel=["sse", "audit"])
        assert stream.next().type == "reset"
    of_stream = {"channels": ("sse",), "connection": f"{os.getpid()}-1"}
    assert told == [
        ("eventstream-subscriber-connected", app, {**of_stream, "last_event_id": "7"}),
        ("eventstream-event-published", app, {"channels": ("sse", "audit"), "id": id}),
        ("eventstream-subscriber-disconnected", app, {**of_stream, "reason": "left"}),
    ]


def test_publishing_needs_no_receiver_and_takes_channels_from_any_iterable(
    app: Flask, client: FlaskClient, eventstream: EventStream
) -> None:
    with client_stream(client, "/stream") as stream, app.app_context():
        eventstream.publish("x", channel=(name for name in ["audit", "sse"]))
        assert stream.next().data == "x"


def test_a_subscriber_is_off_the_books_when_its_leaving_is_told(
    app: Flask, client: FlaskClient, eventstream: EventStream
) -> None:
    left: list[int] = []

    def count(sender: Flask, **extra: Any) -> None:
        with app.app_context():
            left.append(eventstream.subscriber_count())

    with subscriber_disconnected.connected_to(count), client_stream(client, "/stream"):
        pass
    assert left == [0]
