from __future__ import annotations

import contextvars
import json
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from flask import (
    Flask,
    Response,
    abort,
    current_app,
    g,
    got_request_exception,
    request,
    session,
)
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import QueuePool, text

from flask_eventstream import (
    EventStream,
    EventStreamParser,
    EventStreamResponse,
    ServerSentEvent,
    interval,
    merge,
)
from flask_eventstream.errors import ConfigurationError
from flask_eventstream.response import cursor
from flask_eventstream.testing import client_stream

from .servers import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from flask.testing import FlaskClient

    Respond = Callable[..., FlaskClient]

END = "event: end\ndata: {}\nid: end\n\n"


@pytest.fixture
def serve(app: Flask) -> Respond:
    """Return what serves an iterable as the stream at ``/``."""

    def respond(stream: Callable[[], Iterable[Any]], **options: Any) -> FlaskClient:
        def view() -> EventStreamResponse:
            return EventStreamResponse(stream(), **options)

        app.add_url_rule("/", view_func=view, methods=["GET", "POST"])
        return app.test_client()

    return respond


@pytest.fixture(params=[None, 5], ids=["plain", "heartbeat"])
def heartbeat(request: pytest.FixtureRequest) -> float | None:
    value: float | None = request.param
    return value


class Closing:
    """A generator that tells whether it was started and closed."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.started = self.closed = False
        self.items = items

    def __call__(self) -> Iterator[Any]:
        self.started = True
        try:
            yield from self.items
        finally:
            self.closed = True


def test_the_head_says_what_proxies_and_browsers_need(serve: Respond) -> None:
    answer = serve(lambda: ["x"]).get("/")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-cache, no-transform"
    assert answer.headers["X-Accel-Buffering"] == "no"
    hop_by_hop = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer"}
    assert not hop_by_hop & {name.lower() for name, _ in answer.headers}


def test_status_and_headers_can_be_given(serve: Respond) -> None:
    headers = {"X-Run": "7", "Cache-Control": "private"}
    answer = serve(lambda: ["x"], status=201, headers=headers).post("/")
    assert (answer.status_code, answer.headers["X-Run"]) == (201, "7")
    assert answer.headers["Cache-Control"] == "private"


def test_items_are_sent_as_what_they_are(serve: Respond, heartbeat: float | None) -> None:
    items = ["text", None, {"a": 1}, ServerSentEvent("x", "t", "1", 2)]
    assert serve(lambda: items, heartbeat=heartbeat).get("/").text == (
        'data: text\n\n:\ndata: {"a": 1}\n\nretry: 2\nevent: t\ndata: x\nid: 1\n\n' + END
    )


def test_a_stream_of_nothing_is_an_end(serve: Respond, heartbeat: float | None) -> None:
    assert serve(list, heartbeat=heartbeat).get("/").text == END


def test_json_is_the_apps_own(app: Flask, serve: Respond) -> None:
    app.json.sort_keys = False  # type: ignore[attr-defined]
    assert serve(lambda: [{"b": 1, "a": 2}]).get("/").text.startswith('data: {"b": 1, "a": 2}')


def test_a_json_provider_that_dumps_in_its_own_way_does_so(app: Flask, serve: Respond) -> None:
    app.json.dumps = lambda value, **options: f"<{value}>"  # type: ignore[method-assign]
    assert serve(lambda: [{"a": 1}]).get("/").text.startswith("data: <{'a': 1}>")


@pytest.mark.parametrize("stream", ["text", b"bytes", {"a": 1}])
def test_a_stream_that_is_no_sequence_of_items_is_refused(app: Flask, stream: Any) -> None:
    with app.test_request_context("/"), pytest.raises(TypeError, match="such as a generator"):
        EventStreamResponse(stream)


def test_a_format_or_a_heartbeat_that_cannot_be_is_refused(app: Flask) -> None:
    with app.test_request_context("/"):
        with pytest.raises(ConfigurationError, match="format='xml'"):
            EventStreamResponse([], format="xml")
        with pytest.raises(ConfigurationError, match="heartbeat=0"):
            EventStreamResponse([], heartbeat=0)


def test_an_error_before_the_first_item_is_a_normal_answer(
    serve: Respond, heartbeat: float | None
) -> None:
    def stream() -> Iterator[str]:
        abort(404)
        yield "never"

    answer = serve(stream, heartbeat=heartbeat).get("/")
    assert (answer.status_code, answer.mimetype) == (404, "text/html")


def test_a_first_item_that_cannot_be_sent_is_a_normal_error(
    serve: Respond, heartbeat: float | None
) -> None:
    assert serve(lambda: [b"x"], heartbeat=heartbeat).get("/").status_code == 500


def failing() -> Iterator[str]:
    yield "before"
    raise ValueError("secret")


def test_an_error_in_mid_stream_ends_it_with_an_event_that_tells_nothing(
    app: Flask, serve: Respond, heartbeat: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    raised: list[tuple[Any, str]] = []

    def note(sender: Flask, exception: Exception, **extra: Any) -> None:
        raised.append((exception, request.path))

    with got_request_exception.connected_to(note, app):
        wire = serve(failing, heartbeat=heartbeat).get("/").data
    [before, error] = EventStreamParser().feed(wire)
    assert (before.data, error.type, error.id) == ("before", "stream-error", "end")
    assert json.loads(error.data) == {"message": "The stream failed on the server."}
    assert [(str(exception), path) for exception, path in raised] == [("secret", "/")]
    assert "Exception on / [GET]" in caplog.text
    assert "ValueError: secret" in caplog.text


def test_in_debug_mode_the_event_has_the_traceback(app: Flask, serve: Respond) -> None:
    app.debug = True
    assert "ValueError: secret" in serve(failing).get("/").text


def test_an_item_that_cannot_be_sent_is_an_error_in_mid_stream(
    serve: Respond, heartbeat: float | None
) -> None:
    answer = serve(lambda: ["x", b"y", "z"], heartbeat=heartbeat).get("/").text
    assert answer.startswith("data: x\n\nevent: stream-error\n")
    assert "z" not in answer


def test_an_item_over_the_limit_is_an_error_in_mid_stream(
    make_app: Callable[..., Flask],
) -> None:
    app = make_app(MAX_EVENT_BYTES=20)
    app.add_url_rule("/", view_func=lambda: EventStreamResponse(["x", "y" * 20]))
    assert "event: stream-error" in app.test_client().get("/").text


def test_without_the_blueprint_the_default_limit_holds() -> None:
    app = Flask(__name__)
    app.add_url_rule("/", view_func=lambda: EventStreamResponse(["x", "y" * (1 << 20)]))
    assert "event: stream-error" in app.test_client().get("/").text


def test_the_generator_has_the_request_its_app_and_g(
    app: Flask, serve: Respond, heartbeat: float | None
) -> None:
    app.secret_key = "test"
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")

    @app.before_request
    def prepare() -> None:
        g.user = "someone"
        session["n"] = 7
        variable.set("set")

    def stream() -> Iterator[Any]:
        for _ in range(2):
            yield [request.args["q"], g.user, session["n"], current_app.name, variable.get()]

    [one, two, _] = EventStreamParser().feed(serve(stream, heartbeat=heartbeat).get("/?q=5").data)
    assert one.data == two.data == json.dumps(["5", "someone", 7, app.name, "set"])


def test_the_generator_is_closed_when_the_client_leaves(
    serve: Respond, heartbeat: float | None
) -> None:
    stream = Closing(interval(0.01))
    with client_stream(serve(stream, heartbeat=heartbeat), "/") as open_stream:
        open_stream.next()
        assert not stream.closed
    wait_for(lambda: stream.closed)


def test_the_generator_is_closed_when_the_body_is_never_iterated(
    app: Flask, serve: Respond, heartbeat: float | None
) -> None:
    stream = Closing(interval(0.01))
    with app.test_request_context("/"):
        EventStreamResponse(stream(), heartbeat=heartbeat).close()
    wait_for(lambda: stream.closed)


def test_head_starts_no_generator(serve: Respond) -> None:
    stream = Closing(["x"])
    answer = serve(stream).head("/")
    assert answer.status_code == 200
    assert answer.mimetype == "text/event-stream"
    assert "Content-Length" not in answer.headers
    assert not stream.started


@pytest.mark.parametrize("query", ["", "?lastEventId=end", "?last_event_id=end"])
def test_a_stream_that_has_ended_stays_ended(serve: Respond, query: str) -> None:
    stream = Closing(["x"])
    headers = {} if query else {"Last-Event-ID": "end"}
    answer = serve(stream).get(f"/{query}", headers=headers)
    assert (answer.status_code, answer.data) == (204, b"")
    assert "Content-Type" not in answer.headers
    assert not stream.started


def test_asking_for_the_whole_body_is_an_error_and_no_hang(app: Flask) -> None:
    with app.test_request_context("/"):
        response = EventStreamResponse(interval(0.001))
        with pytest.raises(RuntimeError, match="implicit conversion was disabled"):
            response.get_data()
        response.close()


def test_a_late_first_item_lets_head_and_heartbeat_go_first(serve: Respond) -> None:
    go_on = threading.Event()

    def stream() -> Iterator[str]:
        go_on.wait(20)
        yield "late"

    with client_stream(serve(stream, heartbeat=0.01), "/") as open_stream:
        assert open_stream.status_code == 200
        go_on.set()
        assert open_stream.next().data == "late"
        assert open_stream.comments[0] == ""


def test_an_error_after_the_head_is_an_event_even_before_the_first_item(
    serve: Respond, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()

    def stream() -> Iterator[str]:
        go_on.wait(20)
        abort(404)
        yield "never"

    with client_stream(serve(stream, heartbeat=0.01), "/") as open_stream:
        go_on.set()
        assert open_stream.next().type == "stream-error"
    assert "Exception on / [GET]" in caplog.text


def test_a_timeout_of_the_view_itself_is_an_error_and_no_heartbeat(serve: Respond) -> None:
    def stream() -> Iterator[str]:
        yield "x"
        raise TimeoutError

    assert "event: stream-error" in serve(stream, heartbeat=5).get("/").text


def test_what_a_silent_view_still_computes_runs_apart_from_the_client(serve: Respond) -> None:
    threads: list[int] = []

    def stream() -> Iterator[str]:
        threads.append(threading.get_ident())
        yield "x"

    assert serve(stream, heartbeat=5).get("/").status_code == 200
    assert threads != [threading.get_ident()]


def test_merged_sources_have_the_request_too(serve: Respond) -> None:
    def source(name: str) -> Iterator[str]:
        yield f"{name} {request.args['q']}"

    answer = serve(lambda: merge(source("a"), source("b"))).get("/?q=5").text
    assert sorted(answer.removesuffix(END).split("\n\n")) == ["", "data: a 5", "data: b 5"]


def test_merging_needs_no_request() -> None:
    assert sorted(merge([1, 2], [3])) == [1, 2, 3]


def test_merged_sources_are_closed_when_one_fails_or_the_reader_leaves() -> None:
    def bad() -> Iterator[int]:
        yield 1
        raise ValueError("bad")

    endless = Closing(interval(0.001))
    with pytest.raises(ValueError, match="bad"):
        list(merge(endless(), bad()))
    wait_for(lambda: endless.closed)
    endless = Closing(interval(0.001))
    merged = merge(endless())
    assert next(merged) == 0
    merged.close()  # type: ignore[attr-defined]
    wait_for(lambda: endless.closed)


@pytest.mark.parametrize(
    ("path", "headers", "expected"),
    [
        ("/", {}, None),
        ("/", {"Last-Event-ID": "7"}, "7"),
        ("/", {"Last-Event-ID": "0"}, "0"),
        ("/", {"Last-Event-ID": ""}, None),
        ("/?lastEventId=8", {}, "8"),
        ("/?last_event_id=9", {}, "9"),
        ("/?lastEventId=8&last_event_id=9", {"Last-Event-ID": "7"}, "7"),
        ("/?lastEventId=", {}, None),
        ("/", {"Last-Event-ID": "…".encode().decode("latin-1")}, "…"),
        ("/", {"Last-Event-ID": b"\xff".decode("latin-1")}, "\ufffd"),
        ("/", {"Last-Event-ID": "数"}, "数"),
    ],
)
def test_where_the_cursor_comes_from(
    app: Flask, path: str, headers: dict[str, str], expected: str | None
) -> None:
    with app.test_request_context(path, headers=headers):
        assert cursor() == expected


@pytest.mark.parametrize("header", ["garbage", "x" * 100_000, "deadbeef-7"])
def test_a_cursor_that_tells_nothing_is_a_reset(client: FlaskClient, header: str) -> None:
    with client_stream(client, "/stream", headers={"Last-Event-ID": header}) as stream:
        reset = stream.next()
    assert reset.type == "reset"
    assert len(reset.data) < 1000


def test_the_first_bytes_leave_at_once_and_are_no_event(client: FlaskClient) -> None:
    with client_stream(client, "/stream") as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        with pytest.raises(TimeoutError):
            stream.next(timeout=0.01)
        assert stream.comments == [""]
        assert stream.reconnection_time is not None
        assert 2400 <= stream.reconnection_time <= 3600


def test_an_idle_stream_has_heartbeats(make_app: Callable[..., Flask]) -> None:
    begin = time.monotonic()
    with client_stream(make_app(HEARTBEAT=0.02).test_client(), "/stream") as stream:
        while len(stream.comments) < 10:
            with pytest.raises(TimeoutError):
                stream.next(timeout=0.05)
        # Two in an interval, and the comment that comes first.
        assert len(stream.comments) <= 1 + (time.monotonic() - begin) / 0.01


def test_events_that_are_pending_leave_together(
    app: Flask, client: FlaskClient, eventstream: EventStream
) -> None:
    answer = client.get("/stream", buffered=False)
    chunks: Iterator[bytes] = iter(answer.response)  # type: ignore[arg-type]
    next(chunks)
    with app.app_context():
        wire = [f"data: {n}\nid: {eventstream.publish(str(n))}\n\n" for n in range(100)]
    assert next(chunks).decode() == "".join(wire)
    answer.close()


@pytest.fixture
def database(app: Flask, tmp_path: Path) -> Iterator[SQLAlchemy]:
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path}/test.db"
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
        "poolclass": QueuePool,
        "pool_size": 1,
        "max_overflow": 0,
        "pool_timeout": 0.2,
    }
    database = SQLAlchemy(app)
    yield database
    with app.app_context():
        database.engine.dispose()


def test_a_waiting_subscriber_holds_no_database_connection(
    app: Flask, client: FlaskClient, eventstream: EventStream, database: SQLAlchemy
) -> None:
    def ask() -> int:
        answer: int = database.session.execute(text("select 1")).scalar_one()
        return answer

    @app.get("/subscribed")
    def subscribed() -> Response:
        return eventstream.subscribe(f"user:{ask()}", snapshot=ask)

    def holding() -> Iterator[int]:
        yield ask()
        yield from interval(0.01)

    app.add_url_rule("/held", "held", lambda: EventStreamResponse(holding()))

    app.add_url_rule("/ordinary", "ordinary", lambda: str(ask()))
    streams = [client_stream(client, "/subscribed") for _ in range(5)]
    assert [stream.next().data for stream in streams] == ["1"] * 5
    assert client.get("/ordinary").text == "1"
    for stream in streams:
        stream.close()
    # That the pool is as small as it is meant to be: a stream with a context does exhaust it.
    with client_stream(client, "/held") as stream:
        assert stream.next().data == "1"
        assert client.get("/ordinary").status_code == 500
    with app.app_context():
        wait_for(lambda: database.engine.pool.status().endswith("Checked out connections: 0"))
