from __future__ import annotations

import asyncio
import gc
import io
import logging
import sqlite3
import threading
from collections import OrderedDict, deque, namedtuple
from contextlib import closing
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import flask
import gevent
import pytest
from flask import (
    Flask,
    Response,
    abort,
    current_app,
    g,
    got_request_exception,
    has_app_context,
    request,
    stream_with_context,
)
from werkzeug.local import LocalProxy
from werkzeug.test import run_wsgi_app

from flask_eventstream import EventStream, EventStreamResponse, interval, merge
from flask_eventstream.contexts import RequestEnd, carried, unwrapped
from flask_eventstream.signals import subscriber_connected

from .servers import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flask.testing import FlaskClient

HOW: dict[str, Callable[[Any], Any]] = {
    "plain": EventStreamResponse,
    "heartbeat": lambda stream: EventStreamResponse(stream, heartbeat=60),
    "merge": lambda stream: EventStreamResponse(merge(stream)),
    "merge-heartbeat": lambda stream: EventStreamResponse(merge(stream), heartbeat=60),
}
every_way = pytest.mark.parametrize("way", HOW)
Pair = namedtuple("Pair", "one other")  # as apps have them


@dataclass(frozen=True)
class Account:
    name: str
    tags: list[str]


@dataclass
class Mapped:
    """As a library makes one that keeps its session beside the fields."""

    name: str

    def __post_init__(self) -> None:
        self._state = object()


class Torn:
    """What an app's teardown functions were told."""

    def __init__(self, app: Flask) -> None:
        self.requests: list[BaseException | None] = []
        self.apps: list[BaseException | None] = []
        app.teardown_request(self.requests.append)
        app.teardown_appcontext(self.apps.append)


@pytest.fixture
def torn(app: Flask) -> Torn:
    return Torn(app)


def carry(function: Callable[[], BaseException | None]) -> None:
    """Run a function as a stream's own thread does."""
    thread = threading.Thread(target=carried(function))
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


def carried_g(app: Flask, **values: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with app.test_request_context():
        for name, value in values.items():
            setattr(g, name, value)
        carry(lambda: found.update({name: g.get(name) for name in g}))
    return found


def row() -> Any:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.row_factory = sqlite3.Row
        return connection.execute("SELECT 7 AS id, 'ada' AS name").fetchone()


@pytest.mark.parametrize(
    "value",
    ["text", 7, None, True, {"a": [1, (2, {3})]}, Account("ada", ["x"]), Pair(1, "x"), row(),
     SimpleNamespace(a=1), frozenset([1])],
)  # fmt: skip
def test_plain_data_in_g_is_carried(app: Flask, value: Any) -> None:
    assert carried_g(app, value=value) == {"value": value}


def test_what_can_be_changed_is_copied(app: Flask) -> None:
    values = {"list": [[1]], "dict": {"a": [1]}, "account": Account("ada", ["x"])}
    found = carried_g(app, **values)
    found["list"][0].append(2)
    found["dict"]["a"].append(2)
    found["account"].tags.append("y")
    assert values == {"list": [[1]], "dict": {"a": [1]}, "account": Account("ada", ["x"])}


def endless() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    "value",
    [object(), [object()], io.StringIO(), threading.Lock(), Mapped("ada"), Pair(1, object()),
     LocalProxy(lambda: "text"), OrderedDict(), deque(), endless()],
)  # fmt: skip
def test_all_else_stays_with_the_request_and_an_error_says_so(app: Flask, value: Any) -> None:
    errors: list[str] = []

    def look() -> None:
        assert "value" not in g
        with pytest.raises(AttributeError, match="absent"):
            _ = g.absent
        with pytest.raises(AttributeError) as caught:
            _ = g.value
        errors.append(str(caught.value))

    with app.test_request_context():
        g.value = value
        carry(look)
    [error] = errors
    assert error.startswith(f"g.value is a {type(value).__name__} and stays with its request")
    assert "make it anew here" in error


def test_a_thread_of_a_command_has_an_app_context_of_its_own(app: Flask, torn: Torn) -> None:
    seen: list[Any] = []
    error = ValueError("x")
    with app.app_context():
        outer: Any = flask.globals.app_ctx
        outer = outer._get_current_object()

        def look() -> BaseException:
            own: Any = flask.globals.app_ctx
            seen.append(own._get_current_object())
            return error

        carry(look)
        assert torn.apps == [error]
    assert seen[0] is not outer
    assert seen[0].app is app


def test_without_an_app_a_thread_has_none() -> None:
    seen: list[bool] = []
    carry(lambda: seen.append(has_app_context()))
    assert seen == [False]


def test_a_teardown_function_that_fails_is_logged_and_the_stream_ends(
    app: Flask, client: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    @app.teardown_appcontext
    def fail(_: BaseException | None) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("teardown")

    app.add_url_rule("/", view_func=lambda: HOW["heartbeat"](iter([1])))
    with caplog.at_level(logging.ERROR):
        assert "event: end" in client.get("/").text
    assert "could not be torn down" in caplog.text


@every_way
def test_a_request_is_torn_down_once_with_what_its_stream_has_raised(
    app: Flask, client: FlaskClient, torn: Torn, way: str
) -> None:
    error = ValueError("x")

    def items() -> Iterator[int]:
        yield 1
        raise error

    app.add_url_rule("/", view_func=lambda: HOW[way](items()))
    assert "stream-error" in client.get("/").text
    assert torn.requests == [None if "heartbeat" in way else error]
    # Those of the request and of each thread of the stream.
    own_threads = {"plain": 0, "merge-heartbeat": 2}.get(way, 1)
    assert torn.apps.count(error) == (own_threads if "heartbeat" in way else own_threads + 1)
    assert len(torn.apps) == own_threads + 1


@every_way
@pytest.mark.parametrize(
    "error", [gevent.Timeout(7), asyncio.CancelledError(), BaseException("x")], ids=repr
)
def test_an_error_of_any_class_in_mid_stream_ends_it_and_is_told(
    app: Flask, client: FlaskClient, caplog: pytest.LogCaptureFixture, way: str, error: Any
) -> None:
    told: list[BaseException] = []

    def items() -> Iterator[int]:
        yield 1
        raise error

    def on_error(sender: Flask, exception: BaseException) -> None:
        told.append(exception)

    app.add_url_rule("/", view_func=lambda: HOW[way](items()))
    with got_request_exception.connected_to(on_error, app), caplog.at_level(logging.ERROR):
        text = client.get("/").text
    assert text.endswith("id: end\n\n")
    assert "event: stream-error" in text
    assert told == [error]
    assert type(error).__name__ in caplog.text


@every_way
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, gevent.GreenletExit])
def test_what_is_to_end_the_process_or_its_greenlet_is_not_held_up(
    app: Flask, client: FlaskClient, torn: Torn, way: str, error: type[BaseException]
) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise error

    app.add_url_rule("/", view_func=lambda: HOW[way](items()))
    # As a server closes it, whatever happens (PEP 3333).
    with pytest.raises(error), closing(client.get("/", buffered=False)) as answer:
        _ = answer.text
    assert len(torn.requests) == 1
    assert not has_app_context()


@every_way
def test_an_error_before_the_first_item_is_a_normal_answer(
    app: Flask, client: FlaskClient, torn: Torn, way: str
) -> None:
    def items() -> Iterator[int]:
        abort(404)
        yield 1

    app.add_url_rule("/", view_func=lambda: HOW[way](items()))
    assert client.get("/").status_code == 404
    assert len(torn.requests) == 1
    assert not has_app_context()


def left_by(app: Flask, way: str, how: str) -> list[str]:
    """Drop a response, and return what its stream has done."""
    done: list[str] = []

    def items() -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            done.append(f"closed in {current_app.name} by {request.path} with {g.mark}")

    @app.after_request
    def drop(response: Response) -> Response:
        if how == "raise" and request.path == "/":
            raise RuntimeError("dropped")
        return Response("other") if how == "replace" else response

    @app.get("/")
    def view() -> Any:
        g.mark = "alice"
        response = HOW[way](items())
        if how == "abort":
            abort(403)
        return response

    @app.get("/next")
    def other() -> str:
        return str(g.get("mark"))

    client = app.test_client()
    client.get("/")
    assert not has_app_context()
    assert client.get("/next").text == ("other" if how == "replace" else "None")
    return done


@every_way
@pytest.mark.parametrize("how", ["raise", "replace", "abort"])
def test_a_dropped_response_is_closed_with_its_request(
    app: Flask, torn: Torn, way: str, how: str
) -> None:
    gc.disable()
    try:
        done = left_by(app, way, how)
        wait_for(lambda: done)
    finally:
        gc.enable()
    assert done == [f"closed in {app.name} by / with alice"]
    assert len(torn.requests) == 2


def test_a_response_that_middleware_drops_is_torn_down(app: Flask, torn: Torn) -> None:
    app.add_url_rule("/", view_func=lambda: EventStreamResponse(iter([1, 2])))
    environ = app.test_request_context().request.environ
    body = iter(app.wsgi_app(environ, lambda *_: lambda _: None))
    assert next(body) == b"data: 1\n\n"
    assert torn.requests == []
    del body
    gc.collect()
    assert [type(error) for error in torn.requests] == [GeneratorExit]
    assert not has_app_context()


def test_a_client_that_preserves_contexts_has_them_until_its_end(app: Flask, torn: Torn) -> None:
    app.add_url_rule("/", view_func=lambda: EventStreamResponse(iter([1, 2])))
    with app.test_client() as client:
        assert "event: end" in client.get("/?a=b").text
        assert request.args["a"] == "b"
    assert torn.requests == [None]
    assert not has_app_context()


def test_a_stream_may_begin_inside_of_an_app_context(app: Flask, torn: Torn) -> None:
    app.add_url_rule("/", view_func=lambda: EventStreamResponse(iter([1, 2])))
    with app.app_context():
        answer = app.test_client().get("/", buffered=False)
        assert has_app_context()
    assert not has_app_context()
    assert torn.apps == []
    assert "event: end" in answer.text
    assert (torn.requests, torn.apps) == ([None], [None])


def test_a_response_that_is_sent_after_its_request_tears_nothing_down(
    app: Flask, torn: Torn
) -> None:
    with app.test_request_context():
        environ = request.environ
        response = EventStreamResponse(iter([1]))
        response._request_end.take(response)
    assert torn.requests == [None]
    parts, _, _ = run_wsgi_app(response, environ)
    assert b"".join(parts).startswith(b"data: 1\n\n")
    assert torn.requests == [None]


def test_a_response_whose_iterator_is_asked_for_twice_holds_its_request_once(
    app: Flask, torn: Torn
) -> None:
    with app.test_request_context():
        response = EventStreamResponse(iter([1]))
        response.get_app_iter(request.environ)
        response.get_app_iter(request.environ)
        assert len(torn.requests) == 0
    assert torn.requests == []
    response.close()
    response.close()
    assert len(torn.requests) == 1


@every_way
def test_a_stream_may_be_wrapped_in_a_context_of_its_own(
    app: Flask, client: FlaskClient, torn: Torn, way: str
) -> None:
    def items() -> Iterator[str]:
        yield request.args["a"]
        yield request.args["a"]

    app.add_url_rule("/", view_func=lambda: HOW[way](stream_with_context(items())))
    for _ in range(2):
        assert client.get("/?a=b").text.count("data: b\n") == 2
        assert not has_app_context()
    assert len(torn.requests) == 2


def test_a_stream_may_take_another_one_that_has_a_context_of_its_own(
    app: Flask, client: FlaskClient
) -> None:
    def inner() -> Iterator[str]:
        yield request.args["a"]
        yield request.args["a"]

    def items() -> Iterator[str]:
        yield from stream_with_context(inner())
        yield request.args["a"]

    app.add_url_rule("/", view_func=lambda: EventStreamResponse(items()))
    assert client.get("/?a=b").text.count("data: b\n") == 3
    assert not has_app_context()


def test_a_template_can_be_streamed(app: Flask, client: FlaskClient) -> None:
    source = "{{ request.args.a }}{% for n in [1, 2] %}{{ n }}{% endfor %}"
    app.add_url_rule("/", view_func=lambda: HOW["heartbeat"](flask.stream_template_string(source)))
    assert "data: b" in client.get("/?a=b").text


def test_only_what_has_not_begun_is_unwrapped(app: Flask) -> None:
    items = [1, 2]
    with app.test_request_context():
        assert unwrapped(items) is items
        assert list(unwrapped(stream_with_context(iter("ab")))) == ["a", "b"]
        begun = stream_with_context(iter("ab"))
        next(begun)
        assert unwrapped(begun) is begun
        begun.close()  # type: ignore[attr-defined]


@every_way
def test_uploaded_files_stay_open_as_long_as_the_stream(
    app: Flask, client: FlaskClient, way: str
) -> None:
    over = threading.Event()
    app.teardown_request(lambda _: over.set())
    files: list[Any] = []

    def items() -> Iterator[str]:
        files.append(request.files["csv"])
        yield "begun"
        assert "heartbeat" not in way or over.wait(20)
        yield files[0].read().decode()

    app.add_url_rule("/", view_func=lambda: HOW[way](items()), methods=["POST"])
    answer = client.post("/", data={"csv": (io.BytesIO(b"row"), "a.csv")})
    assert "data: row\n" in answer.text
    assert files[0].closed


def test_files_are_closed_once_and_with_their_last_user(app: Flask) -> None:
    closed: list[int] = []
    with app.test_request_context():
        end = RequestEnd(lambda: closed.append(1))
        end.enter()
        end()
        end()
        assert closed == []
        end.leave()
        assert closed == [1]
        end.enter()
        end.leave()
        assert closed == [1]


def test_the_end_of_a_copy_of_the_context_is_not_that_of_the_request(
    app: Flask, client: FlaskClient
) -> None:
    @app.after_request
    def audit(response: Response) -> Response:
        thread = threading.Thread(target=flask.copy_current_request_context(lambda: None))
        thread.start()
        thread.join(20)
        return response

    def items() -> Iterator[str]:
        yield "begun"
        yield request.files["csv"].read().decode()

    app.add_url_rule("/", view_func=lambda: EventStreamResponse(items()), methods=["POST"])
    answer = client.post("/", data={"csv": (io.BytesIO(b"row"), "a.csv")})
    assert "data: row\n" in answer.text


@pytest.mark.parametrize("fails_in", ["after_request", "receiver", "present"])
def test_a_subscriber_that_is_dropped_gives_its_place_back_at_once(
    make_app: Callable[..., Flask],
    eventstream: EventStream,
    monkeypatch: pytest.MonkeyPatch,
    fails_in: str,
) -> None:
    app = make_app(MAX_SUBSCRIBERS=2)
    app.add_url_rule("/in", view_func=lambda: eventstream.subscribe("room", presence=True))

    @app.after_request
    def fail(response: Response) -> Response:
        if fails_in == "after_request":
            raise RuntimeError("dropped")
        return response

    def refuse(sender: Flask, **_: Any) -> None:
        if fails_in == "receiver":
            raise RuntimeError("refused")

    if fails_in == "present":
        # Whatever it is: it takes no such arguments.
        monkeypatch.setattr("flask_eventstream.opening.present_event", bool)
    gc.disable()
    try:
        with subscriber_connected.connected_to(refuse, app):
            answers = [app.test_client().get("/in").status_code for _ in range(5)]
        state = app.extensions["eventstream"]
        assert answers == [500] * 5
        assert state.places.taken == state.broker.subscriptions == 0
        wait_for(lambda: not state.members._here)
    finally:
        gc.enable()


def test_a_run_has_the_body_of_its_request_however_late_it_reads(
    make_app: Callable[..., Flask], eventstream: EventStream
) -> None:
    over = threading.Event()
    body = io.BytesIO(b'{"a": 1}')

    @eventstream.resumable("/run")
    def run() -> Iterator[Any]:
        yield "begun"
        assert over.wait(20)
        yield request.json
        yield request.url

    app = make_app()

    @app.teardown_request
    def end(_: BaseException | None) -> None:
        body.close()
        over.set()

    answer = app.test_client().post(
        "/stream/run", input_stream=body, content_length=8, content_type="application/json"
    )
    assert 'data: {"a": 1}\n' in answer.text
    assert "data: http://localhost/stream/run\n" in answer.text


def test_what_a_stream_waits_for_in_merge_has_contexts_of_its_own(
    app: Flask, client: FlaskClient
) -> None:
    def one(name: str) -> Iterator[str]:
        g.name = name
        yield g.name
        yield f"{g.name} {request.path} {g.user}"

    def items() -> Iterator[Any]:
        g.user = "ada"
        yield from merge(one("a"), one("b"))

    app.add_url_rule("/", view_func=lambda: EventStreamResponse(items()))
    lines = client.get("/").text.splitlines()
    assert {"data: a / ada", "data: b / ada"} <= set(lines)


def test_a_stream_that_is_left_in_the_middle_is_torn_down(
    app: Flask, client: FlaskClient, torn: Torn
) -> None:
    def items() -> Iterator[int]:
        yield 1
        yield from interval(3600)

    app.add_url_rule("/", view_func=lambda: EventStreamResponse(items()))
    answer = client.get("/", buffered=False)
    assert torn.requests == []
    answer.close()
    # As stream_with_context() tells it.
    assert [type(error) for error in torn.requests] == [GeneratorExit]
    assert not has_app_context()
