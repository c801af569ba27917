from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask, session

from flask_eventstream import EventStreamResponse, interval, testing
from flask_eventstream.testing import client_stream

from .servers import DEADLINE, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask.testing import FlaskClient

    from flask_eventstream import EventStream
    from flask_eventstream.testing import ClientStream


def test_an_endless_stream_is_read_with_a_deadline_and_left(
    make_app: Callable[..., Flask], eventstream: EventStream
) -> None:
    # A heartbeat that nobody could wait for.
    app = make_app(HEARTBEAT=3600)
    with client_stream(app.test_client(), "/stream") as stream:
        with app.app_context():
            id = eventstream.publish("x")
        assert stream.next(timeout=DEADLINE).data == "x"
        assert stream.last_event_id == id
        assert stream.reconnection_time is not None
        with pytest.raises(TimeoutError, match=r"nothing came from /stream for 0\.01 s"):
            stream.next(timeout=0.01)
    assert app.extensions["eventstream"].broker.subscriber_count() == 0


def test_a_stream_that_ends_can_be_iterated(app: Flask, client: FlaskClient) -> None:
    app.add_url_rule("/", view_func=lambda: EventStreamResponse(["a", "b"]))
    with client_stream(client, "/") as stream:
        assert [event.data for event in stream] == ["a", "b", "{}"]
        for _ in range(2):
            with pytest.raises(EOFError, match="the stream / has ended"):
                stream.next()


def test_a_generator_is_closed_when_the_stream_is_left(app: Flask, client: FlaskClient) -> None:
    closed: list[bool] = []

    def count() -> Any:
        try:
            yield from interval(0.01)
        finally:
            closed.append(True)

    app.add_url_rule("/", view_func=lambda: EventStreamResponse(count()))
    with client_stream(client, "/") as stream:
        assert stream.next().data == "0"
    wait_for(lambda: closed)


def test_an_answer_that_is_no_stream_is_shown(client: FlaskClient) -> None:
    with pytest.raises(AssertionError, match=r"403 FORBIDDEN.*is not allowed"):
        client_stream(client, "/stream?channel=secret")


def test_what_the_view_raises_is_raised_in_the_test(app: Flask, client: FlaskClient) -> None:
    app.testing = True
    app.add_url_rule("/", view_func=lambda: str(1 // 0))
    with pytest.raises(ZeroDivisionError):
        client_stream(client, "/")


def test_the_clients_cookies_are_used(app: Flask, client: FlaskClient) -> None:
    app.secret_key = "test"
    app.add_url_rule("/", view_func=lambda: EventStreamResponse([session["user"]]))
    with client.session_transaction() as cookie:
        cookie["user"] = "me"
    with client_stream(client, "/") as stream:
        assert stream.next().data == "me"


def test_a_client_that_keeps_its_context_can_open_a_stream(app: Flask, client: FlaskClient) -> None:
    app.add_url_rule("/", view_func=lambda: EventStreamResponse(["x"]))
    with client:
        client.get("/stream?channel=none")
        with client_stream(client, "/") as stream:
            assert stream.next().data == "x"


def test_what_open_takes_is_passed_on(app: Flask, client: FlaskClient) -> None:
    from flask import request

    def view() -> EventStreamResponse:
        return EventStreamResponse([request.method, request.get_json(), request.environ["x.y"]])

    app.add_url_rule("/", view_func=view, methods=["POST"])
    with client_stream(
        client, "/", method="POST", json={"a": 1}, environ_overrides={"x.y": "z"}
    ) as stream:
        assert [event.data for event in stream][:3] == ["POST", '{"a": 1}', "z"]


def test_the_fixture_opens_streams_of_the_client(
    app: Flask, eventstream: EventStream, event_stream: Callable[..., ClientStream]
) -> None:
    stream = event_stream("/stream", timeout=DEADLINE)
    with app.app_context():
        eventstream.publish("x")
    assert stream.next().data == "x"


def test_without_pytest_the_function_is_there_and_the_fixture_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    monkeypatch.delitem(testing.__dict__, "event_stream")
    assert not hasattr(importlib.reload(testing), "event_stream")
    assert testing.client_stream.__name__ == "client_stream"
    monkeypatch.undo()
    importlib.reload(testing)
