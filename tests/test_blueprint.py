from __future__ import annotations

import datetime
import gc
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from flask import Blueprint, Flask, abort, redirect, request, url_for
from werkzeug.exceptions import ServiceUnavailable

import flask_eventstream
from flask_eventstream import EventStream, MemoryBroker, ServerSentEvent, merge
from flask_eventstream.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    InvalidFieldError,
    NotRegisteredError,
    TooLargeError,
)
from flask_eventstream.signals import event_published
from flask_eventstream.testing import client_stream

from .servers import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flask.testing import FlaskClient
    from werkzeug.wrappers import Response

    from .redis_server import RedisServer

    MakeApp = Callable[..., Flask]


def subscribers(app: Flask) -> tuple[int, int]:
    state = app.extensions["eventstream"]
    return state.broker.subscriber_count(), state.broker.subscriptions


def test_what_is_published_arrives_in_every_open_stream(
    app: Flask, client: FlaskClient, eventstream: EventStream
) -> None:
    with client_stream(client, "/stream") as one, client_stream(client, "/stream") as two:
        with app.app_context():
            id = eventstream.publish({"message": "Hello!"}, type="greeting")
        events = [one.next(), two.next()]
    assert [json.loads(event.data) for event in events] == [{"message": "Hello!"}] * 2
    assert {(event.type, event.id) for event in events} == {("greeting", id)}
    wait_for(lambda: subscribers(app) == (0, 0))


def test_the_ready_made_blueprint_is_registered_like_any(eventstream: EventStream) -> None:
    app = Flask(__name__)
    app.register_blueprint(flask_eventstream.eventstream, url_prefix="/feed")
    with client_stream(app.test_client(), "/feed") as stream, app.app_context():
        flask_eventstream.eventstream.publish("x")
        assert stream.next().data == "x"


def test_a_blueprint_may_stand_below_another(eventstream: EventStream) -> None:
    app, parent = Flask(__name__), Blueprint("api", __name__, url_prefix="/api")
    parent.register_blueprint(eventstream)
    app.register_blueprint(parent)
    with client_stream(app.test_client(), "/api/stream") as stream, app.app_context():
        eventstream.publish("x")
        assert stream.next().data == "x"


def test_each_app_has_its_own_state(make_app: MakeApp, eventstream: EventStream) -> None:
    one, two = make_app(), make_app()
    with client_stream(one.test_client(), "/stream") as stream:
        with two.app_context():
            eventstream.publish("of another app")
        with one.app_context():
            eventstream.publish("mine")
        assert stream.next().data == "mine"


def test_all_blueprints_of_an_app_share_its_broker(app: Flask, eventstream: EventStream) -> None:
    other = EventStream("other", __name__, url_prefix="/other")
    app.register_blueprint(other)
    with client_stream(app.test_client(), "/other") as stream, app.app_context():
        eventstream.publish("x")
        assert stream.next().data == "x"


def test_an_app_without_the_blueprint_says_what_to_do(eventstream: EventStream) -> None:
    app = Flask("shop")
    with app.app_context(), pytest.raises(NotRegisteredError, match="register_blueprint"):
        eventstream.publish("x")
    with pytest.raises(RuntimeError, match="application context"):
        eventstream.publish("x")


def test_a_bad_configuration_is_an_error_at_registration(make_app: MakeApp) -> None:
    with pytest.raises(ConfigurationError, match="EVENTSTREAM_HEARTBEAT='15'"):
        make_app(HEARTBEAT="15")
    with pytest.raises(ConfigurationError, match="EVENTSTREAM_BROKER_URL='amqp://x'"):
        make_app(BROKER_URL="amqp://x")


def test_the_configuration_is_read_once(make_app: MakeApp, eventstream: EventStream) -> None:
    app = make_app()
    app.config["EVENTSTREAM_HEARTBEAT"] = "nonsense"
    app.register_blueprint(eventstream, name="again", url_prefix="/again")
    assert app.extensions["eventstream"].config.heartbeat == 15


def test_the_configuration_reaches_the_broker(make_app: MakeApp, eventstream: EventStream) -> None:
    app = make_app(HISTORY=1, MAX_EVENT_BYTES=100)
    with app.app_context():
        with pytest.raises(TooLargeError, match="EVENTSTREAM_MAX_EVENT_BYTES"):
            eventstream.publish("x" * 100)
        cursors = [eventstream.publish(str(n)) for n in range(3)]
    with client_stream(
        app.test_client(), "/stream", headers={"Last-Event-ID": cursors[0]}
    ) as stream:
        assert [stream.next().type, stream.next().data] == ["reset", "2"]


def test_publish_takes_its_arguments_in_flask_sses_order(
    app: Flask, client: FlaskClient, eventstream: EventStream
) -> None:
    with client_stream(client, "/stream") as stream, app.app_context():
        assert eventstream.publish("x", "tick", "7", 99, "sse") == "7"
        assert stream.next() == ServerSentEvent("x", "tick", "7", 99)


def test_publish_uses_the_apps_own_json(
    app: Flask, client: FlaskClient, eventstream: EventStream
) -> None:
    with client_stream(client, "/stream") as stream, app.app_context():
        eventstream.publish({"at": datetime.date(2030, 1, 2)})
        assert json.loads(stream.next().data) == {"at": "Wed, 02 Jan 2030 00:00:00 GMT"}


def test_a_json_provider_of_the_apps_own_is_asked_as_it_is(
    app: Flask, client: FlaskClient, eventstream: EventStream
) -> None:
    class Provider:
        def dumps(self, value: Any) -> str:
            return f"<{value}>"

    app.json = Provider()  # type: ignore[assignment]
    with client_stream(client, "/stream") as stream, app.app_context():
        eventstream.publish([1])
        assert stream.next().data == "<[1]>"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"data": b"x"}, InvalidFieldError),
        ({"data": object()}, InvalidFieldError),
        ({"data": float("nan")}, InvalidFieldError),
        ({"data": "x", "type": "a\nb"}, InvalidFieldError),
        ({"data": "x", "id": "\0"}, InvalidFieldError),
        ({"data": "x", "retry": "3"}, InvalidFieldError),
        ({"data": "x", "retry": -1}, InvalidFieldError),
        ({"data": "x", "retry": True}, InvalidFieldError),
        ({"data": "x", "channel": "a\nb"}, InvalidFieldError),
        ({"data": "x" * 2_000_000}, TooLargeError),
        ({"data": ServerSentEvent("x"), "id": "7"}, TypeError),
    ],
)
def test_bad_input_is_an_error_and_nothing_on_the_wire(
    app: Flask,
    client: FlaskClient,
    eventstream: EventStream,
    arguments: dict[str, Any],
    error: type[Exception],
) -> None:
    with client_stream(client, "/stream") as stream, app.app_context():
        with pytest.raises(error):
            eventstream.publish(**arguments)
        eventstream.publish("good")
        assert stream.next().data == "good"


def test_a_channel_that_is_not_open_is_403_in_words(client: FlaskClient) -> None:
    answer = client.get("/stream?channel=news")
    assert answer.status_code == 403
    assert "Reading the channel &#39;news&#39; is not allowed." in answer.text


def test_authorize_opens_channels_and_is_asked_at_every_connect(
    app: Flask, client: FlaskClient, eventstream: EventStream
) -> None:
    asked: list[str] = []

    @eventstream.authorize
    def may_read(channel: str) -> bool:
        asked.append(channel)
        return request.headers.get("X-Key") == "right"

    right = {"X-Key": "right"}
    with client_stream(client, "/stream?channel=a&channel=b", headers=right) as stream:
        with app.app_context():
            eventstream.publish("x", channel="b")
        assert stream.next().data == "x"
    assert client.get("/stream?channel=a").status_code == 403
    assert asked == ["a", "b", "a"]


def test_another_blueprint_does_not_open_what_one_of_them_guards(
    app: Flask, client: FlaskClient, eventstream: EventStream
) -> None:
    generators = EventStream("generators", __name__, url_prefix="/generators")
    app.register_blueprint(generators)
    with client_stream(client, "/generators"):
        pass
    eventstream.authorize(lambda channel: channel == "news")
    assert client.get("/generators").status_code == 403
    with client_stream(client, "/generators?channel=news"):
        pass
    generators.authorize(lambda channel: channel == "mine")
    assert client.get("/generators?channel=news").status_code == 403


def test_authorize_may_raise_an_answer_of_its_own(
    client: FlaskClient, eventstream: EventStream
) -> None:
    eventstream.authorize(lambda channel: abort(401))
    assert client.get("/stream").status_code == 401


def test_authorize_comes_before_any_replay(
    app: Flask, client: FlaskClient, eventstream: EventStream
) -> None:
    with app.app_context():
        cursor = eventstream.publish("1", channel="private")
        eventstream.publish("2", channel="private")
    answer = client.get(f"/stream?channel=private&lastEventId={cursor}")
    assert answer.status_code == 403
    assert subscribers(app) == (0, 0)


def test_too_many_channels_are_400_in_words(make_app: MakeApp) -> None:
    answer = make_app(MAX_CHANNELS=2).test_client().get("/stream?channel=a&channel=b&channel=c")
    assert answer.status_code == 400
    assert "at most 2 are allowed" in answer.text


def test_a_view_that_subscribes_to_too_many_channels_is_told_so(
    make_app: MakeApp, eventstream: EventStream
) -> None:
    app = make_app(MAX_CHANNELS=2)
    with app.test_request_context("/"), pytest.raises(TooLargeError, match="MAX_CHANNELS"):
        eventstream.subscribe("a", "b", "c")


def test_the_view_is_the_authorization(
    app: Flask, client: FlaskClient, eventstream: EventStream
) -> None:
    @app.get("/me")
    def mine() -> Response:
        return eventstream.subscribe("user:1", "news")

    with client_stream(client, "/me") as stream, app.app_context():
        eventstream.publish("x", channel=["user:1", "news"])
        eventstream.publish("y", channel="news")
        assert [stream.next().data, stream.next().data] == ["x", "y"]


def test_a_subscription_may_start_with_history(
    app: Flask, client: FlaskClient, eventstream: EventStream
) -> None:
    app.add_url_rule("/last", view_func=lambda: eventstream.subscribe(history=2))
    with app.app_context():
        for n in range(4):
            eventstream.publish(str(n))
    with client_stream(client, "/last") as stream:
        assert [stream.next().data, stream.next().data] == ["2", "3"]


class Dashboard:
    def __init__(self, app: Flask, eventstream: EventStream) -> None:
        self.item: Any = {"state": 1}
        self.eventstream = eventstream
        self.published = False
        app.add_url_rule("/board", view_func=self.view)

    def view(self) -> Response:
        return self.eventstream.subscribe(snapshot=self.snapshot)

    def snapshot(self) -> Any:
        if self.published:
            # Between the subscription and the snapshot, the worst moment there is.
            self.eventstream.publish("meanwhile")
        return self.item


@pytest.fixture
def dashboard(app: Flask, eventstream: EventStream) -> Dashboard:
    return Dashboard(app, eventstream)


def test_a_snapshot_comes_first_on_a_first_connect(
    dashboard: Dashboard, client: FlaskClient
) -> None:
    dashboard.published = True
    with client_stream(client, "/board") as stream:
        assert [stream.next().data, stream.next().data] == ['{"state": 1}', "meanwhile"]


def test_a_snapshot_is_a_cursor(
    app: Flask, dashboard: Dashboard, client: FlaskClient, eventstream: EventStream
) -> None:
    with client_stream(client, "/board") as stream:
        snapshot = stream.next()
    with app.app_context():
        eventstream.publish("missed")
    headers = {"Last-Event-ID": snapshot.id}
    with client_stream(client, "/board", headers=headers) as stream:
        assert stream.next().data == "missed"


def test_a_snapshot_comes_after_a_reset_and_what_history_has(
    app: Flask, dashboard: Dashboard, client: FlaskClient, eventstream: EventStream
) -> None:
    with app.app_context():
        eventstream.publish("old")
    with client_stream(client, "/board", headers={"Last-Event-ID": "unknown"}) as stream:
        received = [stream.next() for _ in range(3)]
    assert [event.type for event in received] == ["reset", "message", "message"]
    assert [event.data for event in received[1:]] == ["old", '{"state": 1}']


def test_a_snapshot_is_not_sent_to_who_continues(
    app: Flask, dashboard: Dashboard, client: FlaskClient, eventstream: EventStream
) -> None:
    with app.app_context():
        cursor = eventstream.publish("1")
    with client_stream(client, "/board", headers={"Last-Event-ID": cursor}) as stream:
        with app.app_context():
            eventstream.publish("2")
        assert stream.next().data == "2"


def test_a_snapshot_may_be_an_event_or_nothing(
    app: Flask, dashboard: Dashboard, client: FlaskClient, eventstream: EventStream
) -> None:
    dashboard.item = ServerSentEvent("x", "snapshot", "mine")
    with client_stream(client, "/board") as stream:
        event = stream.next()
        assert (event.data, event.type, event.id) == ("x", "snapshot", "mine")
    dashboard.item = None
    with client_stream(client, "/board") as stream, app.app_context():
        eventstream.publish("first")
        assert stream.next().data == "first"


def test_a_snapshot_that_fails_is_an_ordinary_error_and_leaves_nothing(
    app: Flask, client: FlaskClient, eventstream: EventStream
) -> None:
    app.add_url_rule("/fails", view_func=lambda: eventstream.subscribe(snapshot=lambda: 1 / 0))
    assert client.get("/fails").status_code == 500
    assert subscribers(app) == (0, 0)


def test_a_snapshot_over_the_limit_is_refused_and_leaves_nothing(
    make_app: MakeApp, eventstream: EventStream
) -> None:
    app = make_app(MAX_EVENT_BYTES=100)
    with app.test_request_context("/"), pytest.raises(TooLargeError):
        eventstream.subscribe(snapshot=lambda: "x" * 100)
    assert subscribers(app) == (0, 0)


def test_the_cursor_of_a_page_gets_what_came_between_page_and_stream(
    app: Flask, client: FlaskClient, eventstream: EventStream
) -> None:
    with app.app_context():
        eventstream.publish("before")
        cursor = eventstream.last_event_id()
        eventstream.publish("between")
    with client_stream(client, f"/stream?lastEventId={cursor}") as stream:
        assert stream.next().data == "between"


def test_disconnecting_ends_the_streams_of_a_channel(
    app: Flask, client: FlaskClient, eventstream: EventStream
) -> None:
    with client_stream(client, "/stream") as stream:
        with app.app_context():
            assert eventstream.subscriber_count("sse") == eventstream.subscriber_count() == 1
            assert eventstream.disconnect("sse") == 1
        assert list(stream) == []
    assert subscribers(app) == (0, 0)


def test_beyond_the_limit_a_stream_is_503_with_retry_after(make_app: MakeApp) -> None:
    client = make_app(MAX_SUBSCRIBERS=1).test_client()
    with client_stream(client, "/stream"):
        answer = client.get("/stream")
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert client.head("/stream").status_code == 200
    with client_stream(client, "/stream"):
        pass


def test_the_limit_is_taken_from_the_file_descriptors(
    app: Flask, eventstream: EventStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert app.extensions["eventstream"].places.max_all > 0
    app.extensions["eventstream"].places.max_all = 0
    with app.test_request_context("/"), pytest.raises(ServiceUnavailable):
        eventstream.subscribe()


def test_several_worker_processes_are_warned_of_once(
    client: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    for is_many in (False, True, True):
        environ = {"wsgi.multiprocess": is_many}
        with client_stream(client, "/stream", environ_overrides=environ):
            warnings = [text for text in caplog.messages if "EVENTSTREAM_BROKER_URL" in text]
            assert len(warnings) == is_many


def test_head_starts_nothing(app: Flask, client: FlaskClient) -> None:
    answer = client.head("/stream")
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert "Content-Length" not in answer.headers
    assert subscribers(app) == (0, 0)


def test_a_stream_that_no_server_iterates_or_closes_leaves_nothing(
    app: Flask, client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.after_request
    def fail(response: Response) -> Response:
        raise ValueError("in after_request")

    # pytest keeps the records, and with them the response.
    monkeypatch.setattr(app.logger, "disabled", True)
    assert client.get("/stream").status_code == 500
    gc.collect()  # Flask's own frames and the exception hold each other
    assert subscribers(app) == (0, 0)


def test_a_generator_view_streams_what_it_yields(
    make_app: MakeApp, eventstream: EventStream
) -> None:
    @eventstream.stream("/count/<int:to>")
    def count(to: int) -> Iterator[dict[str, int]]:
        for n in range(to):
            yield {"n": n, "plus": n + request.args.get("plus", 0, int)}

    client = make_app().test_client()
    for method in ("GET", "POST"):
        assert client.open("/stream/count/2?plus=7", method=method).text == (
            'data: {"n": 0, "plus": 7}\n\ndata: {"n": 1, "plus": 8}\n\n'
            "event: end\ndata: {}\nid: end\n\n"
        )


def test_a_generator_view_may_speak_openais_format(
    make_app: MakeApp, eventstream: EventStream
) -> None:
    @eventstream.stream("/chat", format="openai", methods=["POST"])
    def chat() -> Iterator[dict[str, int]]:
        yield {"n": 1}

    client = make_app().test_client()
    assert client.post("/stream/chat").text == 'data: {"n": 1}\n\ndata: [DONE]\n\n'
    assert client.get("/stream/chat").status_code == 405


def test_a_stream_view_that_returns_no_iterator_is_answered_as_any(
    make_app: MakeApp, eventstream: EventStream
) -> None:
    @eventstream.stream("/maybe")
    def maybe() -> Any:
        answers = {"r": redirect("/elsewhere"), "j": ({"error": "no"}, 400), "m": merge([1, 2])}
        return answers[request.args["a"]]

    client = make_app().test_client()
    assert client.get("/stream/maybe?a=r").status_code == 302
    assert client.get("/stream/maybe?a=j").json == {"error": "no"}
    assert client.get("/stream/maybe?a=m").text.startswith("data: 1\n\ndata: 2\n\n")


def test_the_state_of_an_app_is_in_its_extensions(app: Flask) -> None:
    assert isinstance(app.extensions["eventstream"].broker, MemoryBroker)


def test_without_its_broker_a_stream_ends_so_that_the_browser_returns(
    make_app: MakeApp, eventstream: EventStream
) -> None:
    # Nobody listens there. An EventSource that got an error would give up for good.
    app = make_app(BROKER_URL="redis://127.0.0.1:1")
    with app.app_context(), pytest.raises(BrokerUnavailableError):
        eventstream.publish("x")
    answer = app.test_client().get("/stream")
    assert answer.status_code == 200
    assert answer.mimetype == "text/event-stream"
    assert re.fullmatch(r":\nretry: \d+\n", answer.text)
    assert answer.headers["Cache-Control"] == "no-cache, no-transform"
    app.extensions["eventstream"].broker.close()


def test_a_batch_is_published_in_order_and_told_of(app: Flask, eventstream: EventStream) -> None:
    told: list[tuple[tuple[str, ...], str]] = []

    def note(sender: Flask, channels: tuple[str, ...], id: str) -> None:
        told.append((channels, id))

    when = datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc)
    events: list[Any] = ["text", {"at": when}, ServerSentEvent("x", "tick", "own")]
    with client_stream(app.test_client(), "/stream") as stream, app.app_context():
        with event_published.connected_to(note, app):
            ids = eventstream.publish_many(iter(events), channel=iter(["sse", "other"]))
        received = [stream.next() for _ in range(3)]
    assert [event.id for event in received] == ids
    assert [event.type for event in received] == ["message", "message", "tick"]
    assert json.loads(received[1].data) == {"at": "Fri, 02 Jan 2026 00:00:00 GMT"}
    assert told == [(("sse", "other"), id) for id in ids]


def test_the_health_of_an_app_tells_how_its_broker_is(app: Flask, eventstream: EventStream) -> None:
    app.add_url_rule("/health", view_func=eventstream.health)
    with client_stream(app.test_client(), "/stream"):
        answer = app.test_client().get("/health")
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.json == {
        "status": "ok",
        "broker": "memory://",
        "seconds": 0,
        "subscribers": 1,
    }


def test_a_broker_that_is_away_is_503_without_its_secrets(
    make_app: MakeApp, eventstream: EventStream, own_redis: RedisServer
) -> None:
    app = make_app(BROKER_URL=own_redis.url.replace("//", "//:secret@"))
    own_redis.redis.config_set("requirepass", "secret")
    app.add_url_rule("/health", view_func=eventstream.health)
    answer = app.test_client().get("/health")
    assert answer.json is not None
    assert (answer.status_code, answer.json["status"]) == (200, "ok")
    assert answer.json["broker"] == own_redis.url
    assert answer.json["seconds"] > 0
    own_redis.freeze()
    # It answers all the same; how long that takes at most is up to the link, see its tests.
    answer = app.test_client().get("/health")
    assert (answer.status_code, answer.headers["Cache-Control"]) == (503, "no-store")
    assert answer.json is not None
    assert answer.json["status"] == "unavailable"
    assert answer.json["reason"].startswith(own_redis.url)
    assert "secret" not in answer.text


@pytest.mark.parametrize("name", ["eventstream.js", "eventsource-parser.js"])
def test_a_module_for_pages_is_beside_the_channels_and_asked_for_anew(
    client: FlaskClient, name: str
) -> None:
    with client.get(f"/stream/{name}") as answer:
        assert (
            answer.data == (Path(flask_eventstream.__file__).parent / "static" / name).read_bytes()
        )
        assert answer.content_type == "text/javascript; charset=utf-8"
        assert "no-cache" in answer.headers["Cache-Control"]
    again = client.get(f"/stream/{name}", headers={"If-None-Match": answer.headers["ETag"]})
    assert again.status_code == 304


def test_the_modules_stay_where_they_are_among_the_files_and_views_of_the_app(
    tmp_path: Path,
) -> None:
    (tmp_path / "eventstream.js").write_text("another")
    eventstream = EventStream(
        "news",
        __name__,
        url_prefix="/news",
        static_folder=str(tmp_path),
        static_url_path="/static",
    )
    eventstream.authorize(lambda channel: abort(401))
    eventstream.stream("/<name>")(lambda name: iter([name]))
    app = Flask(__name__)
    app.register_blueprint(eventstream)
    client = app.test_client()
    with app.test_request_context():
        url = url_for("news.script", name="eventstream.js")
    for path, part in (
        (url, "class EventStream"),
        ("/news/static/eventstream.js", "another"),
        ("/news/other.js", "data: other.js"),
    ):
        with client.get(path) as answer:
            assert part in answer.get_data(as_text=True), path
