"""What a client sends and no stream can carry is its error; what an app does is the app's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from flask import Flask, abort, jsonify, request, session

import example_app
import flask_eventstream
from flask_eventstream import EventStream, ServerSentEvent, refusals
from flask_eventstream.errors import InvalidFieldError, TooLargeError
from flask_eventstream.flask_sse import ServerSentEventsBlueprint

from .blocks import blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from werkzeug.test import TestResponse

BAD_NAMES = ["", "x" * 256, "x" * 70_000, "a\nb", "a\0b", "\x7f", "\x9fa"]
SURROGATE = '"a\\ud800"'


@pytest.fixture
def stream() -> EventStream:
    return EventStream("stream", __name__)


@pytest.fixture
def app(stream: EventStream) -> Flask:
    app = Flask(__name__)
    app.secret_key = "secret"
    app.config["EVENTSTREAM_MAX_EVENT_BYTES"] = 1000
    app.register_blueprint(stream)
    app.add_url_rule("/act", "act", lambda: "", methods=["GET", "POST"])
    return app


def status_of(app: Flask, act: Callable[[], Any], *arguments: Any, **options: Any) -> int:
    """Return how a view that does something answers a request."""

    def respond() -> Any:
        done = act()
        return done if isinstance(done, app.response_class) else jsonify(done)

    app.view_functions["act"] = respond
    answer: TestResponse = app.test_client().open("/act", *arguments, **options)
    answer.close()
    return answer.status_code


def name_of_request() -> str:
    return request.values["name"]


ACTS: dict[str, Callable[[EventStream, str], Any]] = {
    "member": lambda stream, name: stream.subscribe("room", presence=True, member=name),
    "channel of subscribe": lambda stream, name: stream.subscribe(name),
    "one of several channels": lambda stream, name: stream.subscribe("news", name),
    "channel of publish": lambda stream, name: stream.publish("x", channel=name),
    "one of several channels of publish": lambda stream, name: stream.publish(
        "x", channel=["news", name]
    ),
    "channel of publish_many": lambda stream, name: stream.publish_many(["x"], channel=name),
    "key": lambda stream, name: stream.publish("x", key=name),
    "present": lambda stream, name: stream.present(name),
    "count": lambda stream, name: stream.subscriber_count(name),
    "cursor": lambda stream, name: stream.last_event_id(name),
    "disconnect": lambda stream, name: stream.disconnect(name),
    "token": lambda stream, name: stream.token(name),
}


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("act", ACTS)
def test_a_name_that_cannot_be_is_an_error_of_who_sends_it(
    app: Flask, stream: EventStream, act: str, name: str
) -> None:
    def with_name() -> Any:
        return ACTS[act](stream, name_of_request())

    assert status_of(app, with_name, method="POST", data={"name": name}) == 400
    if len(name) < 70_000:
        assert status_of(app, with_name, query_string={"name": name}) == 400

    def with_json() -> Any:
        return ACTS[act](stream, request.json["name"])

    assert status_of(app, with_json, method="POST", json={"name": name}) == 400
    body = f'{{"name": {SURROGATE}}}'
    json = "application/json"
    assert status_of(app, with_json, method="POST", data=body, content_type=json) == 400
    assert status_of(app, with_json, method="POST", json={"name": "fine"}) == 200


def test_a_client_cannot_have_a_long_name_compared_with_much_else(
    app: Flask, stream: EventStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []
    monkeypatch.setattr(refusals, "_explains", lambda text, *_: compared.append(text))
    body = {"name": "x" * 200_000, "junk": [str(n) for n in range(100)]}

    def with_json() -> Any:
        return stream.subscribe(request.json["name"])

    assert status_of(app, with_json, method="POST", json=body) == 400
    assert compared == []


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("act", ACTS)
def test_the_same_name_is_an_error_of_the_app_that_makes_it_up(
    app: Flask, stream: EventStream, act: str, name: str
) -> None:
    app.config["PROPAGATE_EXCEPTIONS"] = False

    def made_up() -> Any:
        return ACTS[act](stream, name)

    assert status_of(app, made_up, query_string={"name": "visitor", "x": "x"}) == 500
    with app.test_request_context(), pytest.raises(InvalidFieldError):
        made_up()


def test_a_part_of_a_name_is_enough(app: Flask, stream: EventStream) -> None:
    def publish() -> str:
        return stream.publish("x", channel=f"room:{name_of_request().upper()}")

    assert status_of(app, publish, query_string={"name": "a\nb"}) == 400
    assert status_of(app, publish, query_string={"name": "x" * 251}) == 400
    assert status_of(app, publish, query_string={"name": "x" * 250}) == 200

    def stripped() -> str:
        return stream.publish("x", channel=name_of_request().strip())

    assert status_of(app, stripped, query_string={"name": "  "}) == 400


def test_names_of_paths_cookies_headers_and_the_session_are_sent(
    app: Flask, stream: EventStream
) -> None:
    @app.get("/rooms/<room>/<path:rest>")
    def of_path(room: str, rest: str) -> str:
        return stream.publish("x", channel=f"room:{room}")

    @app.get("/remembered")
    def remembered() -> Any:
        session["name"] = request.args["name"]
        return stream.subscribe("room", presence=True, member=session["name"])

    @app.get("/known")
    def known() -> Any:
        return stream.subscribe("room", presence=True, member=session["name"])

    client, long = app.test_client(), "x" * 300
    assert client.get("/rooms/a%0Ab/c").status_code == 400
    assert client.get(f"/rooms/{long}/c").status_code == 400
    assert client.get("/rooms/fine/c").status_code == 200

    def of_header() -> str:
        return stream.publish("x", channel=request.headers["X-Name"])

    assert status_of(app, of_header, headers={"X-Name": long}) == 400

    def of_cookie() -> str:
        return stream.publish("x", channel=request.cookies["name"])

    assert status_of(app, of_cookie, headers={"Cookie": f"name={long}"}) == 400

    assert client.get("/remembered?name=").status_code == 400
    with client.session_transaction() as values:
        values["name"] = "a\nb"
    assert client.get("/known").status_code == 400


@pytest.mark.parametrize("value", [5, 1.5, True, ["a"], {"a": 1}])
def test_json_of_another_kind_is_an_error_of_who_sends_it(
    app: Flask, stream: EventStream, value: Any
) -> None:
    def member() -> Any:
        sent = request.json["name"]
        return stream.subscribe("room", presence=True, member=sent)

    assert status_of(app, member, method="POST", json={"name": value}) == 400
    assert status_of(app, member, method="POST", json={"name": value, "others": [value]}) == 400


def test_fields_of_events_are_sent_too(app: Flask, stream: EventStream) -> None:
    def typed() -> str:
        return stream.publish("x", type=request.args["type"])

    assert status_of(app, typed, query_string={"type": "a\nb"}) == 400
    assert status_of(app, typed, query_string={"type": "x" * 1000 + "\n"}) == 400

    def numbered() -> str:
        return stream.publish("x", id=request.args["id"])

    assert status_of(app, numbered, query_string={"id": "a\nb"}) == 400
    assert status_of(app, numbered, query_string={"id": ""}) == 400

    def after() -> str:
        return stream.publish("x", retry=request.args.get("retry", type=int))

    assert status_of(app, after, query_string={"retry": "-1"}) == 400

    def said() -> str:
        return stream.publish(request.json["text"])

    body = f'{{"text": {SURROGATE}}}'
    options = {"method": "POST", "content_type": "application/json"}
    assert status_of(app, said, data=body, **options) == 400
    app.config["PROPAGATE_EXCEPTIONS"] = False
    assert status_of(app, lambda: stream.publish("\ud800"), query_string={"a": "b"}) == 500


def test_what_is_sent_and_too_large_is_413(app: Flask, stream: EventStream) -> None:
    def said() -> str:
        return stream.publish({"text": request.form["text"]})

    assert status_of(app, said, method="POST", data={"text": "x" * 1000}) == 413
    assert status_of(app, said, method="POST", data={"text": "👩" * 90}) == 413
    assert status_of(app, said, method="POST", data={"text": "x" * 900}) == 200

    def raw() -> str:
        return stream.publish(request.get_data(as_text=True))

    assert status_of(app, raw, method="POST", data=b"\n" * 200) == 413

    def many() -> Any:
        return stream.subscribe(*request.args.getlist("channel"))

    channels = [("channel", str(number)) for number in range(65)]
    assert status_of(app, many, query_string=channels) == 413
    app.config["PROPAGATE_EXCEPTIONS"] = False
    assert status_of(app, lambda: stream.publish("x" * 1000), query_string={"a": "b"}) == 500
    made_up = [str(number) for number in range(65)]
    assert status_of(app, lambda: stream.subscribe(*made_up), query_string={"a": "x" * 99}) == 500
    with app.test_request_context(), pytest.raises(TooLargeError, match="at most 64 is allowed"):
        stream.subscribe(*made_up)


def test_an_app_may_catch_what_is_sent_and_outside_of_requests_it_is_a_plain_error(
    app: Flask, stream: EventStream
) -> None:
    with app.test_request_context("/?name=a%0Ab"):
        with pytest.raises(InvalidFieldError, match="has a control character") as caught:
            stream.publish("x", channel=name_of_request())
        assert (caught.value.field, caught.value.value) == ("channel", "a\nb")
    with app.app_context():
        with pytest.raises(InvalidFieldError) as plain:
            stream.publish("x", channel="a\nb")
        assert type(plain.value) is InvalidFieldError
        with pytest.raises(TooLargeError) as too_large:
            stream.publish("x" * 1000)
        assert type(too_large.value) is TooLargeError


def test_the_first_item_of_a_stream_is_looked_at_too(app: Flask) -> None:
    stream = EventStream("another", __name__, url_prefix="/another")

    @stream.stream("/typed")
    def typed() -> Iterator[ServerSentEvent]:
        yield ServerSentEvent("x", request.args["type"])

    app.register_blueprint(stream)
    assert app.test_client().get("/another/typed?type=a%0Ab").status_code == 400


def test_the_publish_of_flask_sse_answers_alike(app: Flask) -> None:
    sse = ServerSentEventsBlueprint("sse", __name__)
    sse.add_url_rule("", view_func=sse.stream)
    app.config["EVENTSTREAM_BROKER_URL"] = "memory://"
    app.register_blueprint(sse, url_prefix="/sse")

    def publish() -> Any:
        return sse.publish("x", channel=name_of_request())

    assert status_of(app, publish, query_string={"name": "a\nb"}) == 400
    assert app.test_client().get("/sse?channel=a%0Ab").status_code == 400


def test_a_body_that_the_view_has_not_read_is_left_where_it_is(
    app: Flask, stream: EventStream
) -> None:
    app.config["PROPAGATE_EXCEPTIONS"] = False

    class Body:
        def read(self, size: int = -1) -> bytes:
            raise AssertionError("it was read")

        readline = readlines = __iter__ = read

    def publish() -> str:
        return stream.publish("x", channel="")

    environ = {"wsgi.input": Body(), "CONTENT_LENGTH": "9"}
    assert status_of(app, publish, method="POST", environ_overrides=environ) == 500


# --- The apps that people read


FIELDS = (
    *("name", "text", "to", "until", "user", "room", "message", "prompt", "secret", "conversation"),
    *("cursor", "first", "last", "limit", "model", "messages", "stream", "stream_options"),
    *("channel", "lastEventId", "dot", "sent", "x", "y", "seconds", "token", "member", "gzip"),
)
VALUES: list[Any] = [*BAD_NAMES, "a\ud800", "\u2028", 5, -1, 1e400, None, [], {}, ["a\nb"]]


def requests_of(value: Any) -> Iterator[dict[str, Any]]:
    """Yield ways to send a value under all names that a view may ask for."""
    fields = dict.fromkeys(FIELDS, value)
    yield {"data": json.dumps(fields), "content_type": "application/json"}
    yield {"data": json.dumps(value), "content_type": "application/json"}
    if isinstance(value, str) and value.isprintable() and len(value) < 1000:
        yield {"query_string": fields}
        yield {"data": fields}
        yield {"headers": {"Last-Event-ID": value, "Authorization": f"Bearer {value}"}}


def paths_of(app: Flask, value: Any) -> Iterator[tuple[str, str]]:
    """Yield each method and path of an app, with a value wherever a path takes text."""
    text = value.encode(errors="replace").decode() if value and isinstance(value, str) else "fine"
    with app.test_request_context():
        urls = app.create_url_adapter(request)
        assert urls is not None
        for rule in app.url_map.iter_rules():
            ids = {name: uuid4() for name in rule.arguments if f"<uuid:{name}>" in rule.rule}
            texts = dict.fromkeys(rule.arguments - ids.keys() - (rule.defaults or {}).keys(), text)
            for method in sorted((rule.methods or set()) & {"GET", "POST", "DELETE"}):
                values = {**ids, **texts, **(rule.defaults or {})}
                yield method, urls.build(rule.endpoint, values, method)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: ascii(value)[:20])
def test_no_view_of_the_example_app_fails_by_what_it_is_sent(value: Any, tmp_path: Path) -> None:
    config = {"LOG_FILE": str(tmp_path / "log"), "EVENTSTREAM_BROKER_URL": "memory://"}
    pace = {name: 0.001 for name in example_app.PACE if name.endswith("_SECONDS")}
    app = example_app.create_app({**pace, **config, "PROPAGATE_EXCEPTIONS": False})
    client = app.test_client()
    client.get("/chat-room")
    for options in requests_of(value):
        for method, path in paths_of(app, value):
            answer = client.open(path, method=method, **options)
            answer.close()
            assert answer.status_code < 500, (method, path, options)


def documented(page: str, part: str, monkeypatch: pytest.MonkeyPatch) -> Flask:
    """Return the app that a page of the documentation makes."""
    own = EventStream("eventstream", __name__)
    monkeypatch.setattr(flask_eventstream, "eventstream", own)
    names: dict[str, Any] = {"__name__": __name__, "abort": abort, "request": request}
    names |= {"app": Flask(__name__), "eventstream": own}
    [text] = [it.text for it in blocks(page) if part in it.text and it.directive != "doctest"]
    exec(text, names)  # it is our own
    made: Flask = names["app"]
    made.config.update(SECRET_KEY="docs", PROPAGATE_EXCEPTIONS=False, TESTING=False)
    if "eventstream" not in made.extensions:
        made.register_blueprint(own, url_prefix="/stream")
    return made


@pytest.mark.parametrize("value", VALUES, ids=lambda value: ascii(value)[:20])
@pytest.mark.parametrize(
    ("page", "part"),
    [
        ("presence.rst", '@app.get("/rooms/<room>/events")'),
        ("tutorials/chat-room.rst", '@app.post("/login")'),
        ("tutorials/notifications.rst", '@app.post("/login")'),
    ],
)
def test_no_view_of_the_documentation_fails_by_what_it_is_sent(
    page: str, part: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = documented(page, part, monkeypatch)
    client = app.test_client()
    for options in requests_of(value):
        for method, path in paths_of(app, value):
            with client.session_transaction() as signed_in:
                signed_in.update(name="ada", user="ada")
            if isinstance(value, str) and "\ud800" not in value and len(value) < 1000:
                client.post("/login", data={"name": value})
                with client.session_transaction() as signed_in:
                    signed_in["name"] = value
            answer = client.open(path, method=method, **options)
            answer.close()
            assert answer.status_code < 500, (method, path, options)
