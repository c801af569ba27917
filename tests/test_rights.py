from __future__ import annotations

import gc
import logging
import re
import threading
import time
from enum import Enum, IntEnum
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from flask import Flask, abort, redirect, request
from markupsafe import Markup
from werkzeug.local import LocalProxy
from werkzeug.middleware.proxy_fix import ProxyFix

from flask_eventstream import EventStream
from flask_eventstream.errors import (
    ConfigurationError,
    InvalidFieldError,
    RightsError,
    TooLargeError,
)
from flask_eventstream.testing import client_stream
from flask_eventstream.tokens import PREFIX

from .test_roads import Site

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from werkzeug.test import TestResponse

    MakeApp = Callable[..., Flask]


LEFT = 3.0
"""How long a token is good that is to end while a test waits, in seconds. What comes before its end
has that much time."""


@pytest.fixture
def app(make_app: MakeApp) -> Flask:
    app = make_app()
    app.secret_key = "secret"
    return app


def token(app: Flask, *channels: str, **options: Any) -> str:
    with app.app_context():
        stream: EventStream = app.extensions["eventstream"].blueprints[0]
        return stream.token(*channels, **options)


def get(app: Flask, query: str = "", bearer: str | None = None, **headers: str) -> TestResponse:
    if bearer is not None:
        headers["Authorization"] = f"Bearer {bearer}"
    return app.test_client().get(f"/stream{query}", headers=headers)


def channels_of(app: Flask, query: str = "", bearer: str | None = None) -> tuple[str, ...]:
    """Open a stream, and return what it reads."""
    headers = {} if bearer is None else {"Authorization": f"Bearer {bearer}"}
    with client_stream(app.test_client(), f"/stream{query}", headers=headers) as stream:
        return stream._bodies[0].subscription.channels


def user_of(stream: Any) -> str | None:
    """Return whose place a stream has."""
    user: str | None = stream._bodies[0]._place.user
    return user


def assert_is_401(answer: TestResponse, why: str) -> None:
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].strip() == "Bearer"
    assert why in answer.text
    assert PREFIX not in answer.text


# --- The app's own judgement


def test_rights_are_asked_before_replay_at_every_connect(
    app: Flask, eventstream: EventStream
) -> None:
    asked: list[tuple[str, str | None]] = []
    allowed = True

    @eventstream.authorize
    def may_read(channel: str) -> bool:
        asked.append((channel, request.headers.get("Last-Event-ID")))
        return allowed

    with app.app_context():
        cursor = eventstream.publish("1", channel="news")
        eventstream.publish("missed", channel="news")
    returning = {"Last-Event-ID": cursor}
    with client_stream(app.test_client(), "/stream?channel=news", headers=returning) as stream:
        assert stream.next().data == "missed"
    allowed = False
    answer = get(app, "?channel=news", **returning)
    assert answer.status_code == 403
    assert "missed" not in answer.text
    assert asked == [("news", cursor)] * 2


class Policy:
    """An object that decides, and knows whose a request is."""

    def may_read(self, channel: str) -> bool:
        if channel == "teapot":
            abort(418)
        return channel.startswith("open")

    def user(self) -> str | None:
        return request.headers.get("X-User")


def test_an_object_may_decide(make_app: MakeApp, eventstream: EventStream) -> None:
    eventstream.authorize(Policy())
    app = make_app(MAX_SUBSCRIBERS_PER_USER=1)
    statuses = [get(app, f"?channel={name}").status_code for name in ("sse", "teapot")]
    assert statuses == [403, 418]
    me = {"X-User": "me"}
    with client_stream(app.test_client(), "/stream?channel=open", headers=me):
        assert get(app, "?channel=open", **me).status_code == 429
        client_stream(app.test_client(), "/stream?channel=open").close()


async def true(channel: str = "") -> bool:
    return True


async def false(channel: str) -> bool:
    return False


async def nothing(channel: str) -> None:
    pass


async def many(channel: str) -> AsyncIterator[bool]:
    yield True


class AsyncPolicy:
    async def may_read(self, channel: str) -> bool:
        return channel == "open"


class AsyncCallable:
    async def __call__(self, channel: str) -> bool:
        return True


class OnlyTrue:
    """As numpy's and SQLAlchemy's: true, and no ``bool``."""

    def __bool__(self) -> bool:
        return True


NO_ANSWERS: list[tuple[Any, str]] = [
    (lambda channel: None, "None"),
    (lambda channel: 1, "int"),
    (lambda channel: "no", "str"),
    (lambda channel: "", "''"),
    (lambda channel: ("Forbidden", 403), "tuple"),
    (lambda channel: redirect("/login"), "Response"),
    (lambda channel: abort, "function"),
    (lambda channel: OnlyTrue(), "OnlyTrue"),
    (lambda channel: LocalProxy(lambda: True), "LocalProxy"),
    (lambda channel: [False], "list"),
    (lambda channel: 0, "int"),
    (lambda channel: true(channel), "coroutine"),
    (lambda channel: false(channel), "coroutine"),
    (lambda channel: (True for _ in "x"), "generator"),
    (partial(lambda text, channel: text, "x"), "str"),
    (AsyncCallable(), "coroutine"),
    (many, "async_generator"),
    (nothing, "None"),
    (SimpleNamespace(may_read=lambda channel: "yes"), "str"),
    (SimpleNamespace(may_read=AsyncCallable()), "coroutine"),
]


@pytest.mark.parametrize(("judge", "kind"), NO_ANSWERS)
@pytest.mark.parametrize("channel", ["sse", "news"])
def test_what_is_no_bool_opens_nothing_and_is_an_error_in_the_log(
    app: Flask,
    eventstream: EventStream,
    caplog: pytest.LogCaptureFixture,
    judge: Any,
    kind: str,
    channel: str,
) -> None:
    eventstream.authorize(judge)
    with app.app_context():
        eventstream.publish("missed", channel=channel)
    answer = get(app, f"?channel={channel}", **{"Last-Event-ID": "made-up"})
    assert answer.status_code == 500
    assert "missed" not in answer.text
    assert "what the function given to authorize() returned is " in caplog.text
    assert f" {kind}; return True or False" in caplog.text
    assert app.extensions["eventstream"].places.taken == 0
    # What was dropped would warn now, and warnings are errors.
    gc.collect()


@pytest.mark.parametrize(
    ("judge", "status"),
    [
        (true, 200),
        (false, 403),
        (partial(true), 200),
        (AsyncPolicy(), 200),
        (LocalProxy(AsyncPolicy), 200),
        (lambda channel: channel == "open", 200),
    ],
)
def test_async_functions_answer_as_any(
    app: Flask, eventstream: EventStream, judge: Any, status: int
) -> None:
    eventstream.authorize(judge)
    assert app.test_client().head("/stream?channel=open").status_code == status
    if judge is not true:
        assert isinstance(judge, partial) or get(app, "?channel=shut").status_code == 403


@pytest.mark.parametrize("wrong", [None, "news", True, ["news"], object()])
def test_what_cannot_be_asked_is_refused_at_once(eventstream: EventStream, wrong: Any) -> None:
    with pytest.raises(TypeError, match="is no function"):
        eventstream.authorize(wrong)
    with pytest.raises(TypeError, match="is no function"):
        eventstream.identify(wrong)


# --- Whose a request is


class User:
    """What apps have as their user, by any name."""

    def get_id(self) -> str:
        return "7"


class Number(IntEnum):
    SEVEN = 7


class Name(str, Enum):
    SEVEN = "7"


KEYS: list[tuple[Any, str]] = [
    ("7", "7"),
    (7, "7"),
    (0, "0"),
    (UUID(int=7), "00000000-0000-0000-0000-000000000007"),
    (LocalProxy(lambda: "7"), "7"),
    (LocalProxy(lambda: 7), "7"),
    (LocalProxy(lambda: LocalProxy(lambda: 7)), "7"),
    (Number.SEVEN, "7"),
    (Name.SEVEN, "7"),
    (Markup("7"), "7"),
]

NO_KEYS: list[tuple[Any, str]] = [
    (User(), "of the class User"),
    (LocalProxy(User), "of the class User"),
    (User, "of the class type"),
    (User().get_id, "of the class method"),
    (True, "of the class bool"),
    (LocalProxy(lambda: True), "of the class bool"),
    ("", "''"),
    (LocalProxy(lambda: ""), "''"),
    (7.0, "of the class float"),
    (b"7", "of the class bytes"),
    (("a", 7), "of the class tuple"),
    ({"id": 7}, "of the class dict"),
]


@pytest.mark.parametrize(("key", "text"), KEYS)
def test_a_key_counts_by_its_text(
    make_app: MakeApp, eventstream: EventStream, key: Any, text: str
) -> None:
    eventstream.identify(lambda: key)

    @eventstream.resumable("/run", owner=lambda: key)
    def run() -> Iterator[str]:
        yield "x"

    app = make_app()
    app.secret_key = "secret"
    app.add_url_rule("/room", view_func=lambda: eventstream.subscribe(presence=True))
    client = app.test_client()
    with client_stream(client, "/room") as stream, app.app_context():
        assert type(user_of(stream)) is str
        assert user_of(stream) == text
        assert eventstream.present() == [text]
        assert type(eventstream.present()[0]) is str
        eventstream.revoke(key)
        # The stream has ended.
        assert {event.type for event in stream} <= {"join", "present"}
        wire = eventstream.token(user=key)
    with app.test_request_context(headers={"Authorization": f"Bearer {wire}"}):
        assert eventstream.current_token().user == text
    assert client.post("/stream/run").status_code == 200


@pytest.mark.parametrize(("key", "described"), NO_KEYS)
def test_an_object_that_is_no_key_is_an_error_that_says_what_to_return(
    make_app: MakeApp, eventstream: EventStream, key: Any, described: str
) -> None:
    eventstream.identify(lambda: key)

    @eventstream.resumable("/run", owner=lambda: key)
    def run() -> Iterator[str]:
        yield "x"

    app = make_app(MAX_SUBSCRIBERS_PER_USER=1)
    app.config["TESTING"] = True
    app.secret_key = "secret"
    app.add_url_rule("/room", view_func=lambda: eventstream.subscribe(presence=True, member=key))
    client = app.test_client()
    refused = f"is {re.escape(described)}; .* such as current_user.get_id\\(\\), and None stands"
    for method, path in (("GET", "/stream"), ("POST", "/stream/run"), ("GET", "/stream/run")):
        with pytest.raises(RightsError, match=refused):
            client.open(path, method=method)
    with pytest.raises((RightsError, InvalidFieldError)):
        client.get("/room")
    with app.app_context():
        for call in (eventstream.revoke, lambda key: eventstream.token(user=key)):
            with pytest.raises(RightsError, match=refused):
                call(key)
    state = app.extensions["eventstream"]
    assert (state.places.taken, state.runs.active) == (0, 0)


def test_a_proxy_of_a_name_is_resolved_while_it_can_be(
    app: Flask, eventstream: EventStream
) -> None:
    name: Any = LocalProxy(lambda: request.args["name"])
    app.add_url_rule("/room", view_func=lambda: eventstream.subscribe(presence=True, member=name))
    with client_stream(app.test_client(), "/room?name=ada"), app.app_context():
        assert eventstream.present() == ["ada"]


def test_a_coroutine_is_no_key(app: Flask, eventstream: EventStream) -> None:
    eventstream.identify(lambda: true())
    assert get(app).status_code == 500
    with app.app_context(), pytest.raises(RightsError, match="of the class coroutine"):
        eventstream.token(user=true())  # type: ignore[arg-type]
    gc.collect()


def test_an_async_function_may_tell_whose_a_request_is(
    app: Flask, eventstream: EventStream
) -> None:
    async def user() -> str:
        return "me"

    eventstream.identify(user)
    with client_stream(app.test_client(), "/stream") as stream:
        assert user_of(stream) == "me"


def test_nobody_is_none(make_app: MakeApp, eventstream: EventStream) -> None:
    @eventstream.resumable("/run", owner=lambda: LocalProxy(lambda: None))
    def run() -> Iterator[str]:
        yield "x"

    eventstream.identify(lambda: LocalProxy(lambda: None))
    app = make_app()
    client = app.test_client()
    with client_stream(client, "/stream") as stream:
        assert user_of(stream) is None
    assert client.post("/stream/run").status_code == 404
    with app.app_context(), pytest.raises(RightsError, match="revoked is None; name the one"):
        eventstream.revoke(None)  # type: ignore[arg-type]


def test_the_user_of_an_authority_is_a_key_too(
    make_app: MakeApp, eventstream: EventStream, caplog: pytest.LogCaptureFixture
) -> None:
    eventstream.authorize(SimpleNamespace(may_read=lambda channel: True, user=lambda: User()))
    assert get(make_app()).status_code == 500
    assert "(identify) is of the class User; " in caplog.text


def test_a_user_has_as_many_streams_as_the_limit_says(
    make_app: MakeApp, eventstream: EventStream
) -> None:
    other = EventStream("other", __name__, url_prefix="/other")

    @eventstream.identify
    def user() -> int | None:
        return request.args.get("user", type=int)

    app = make_app(MAX_SUBSCRIBERS_PER_USER=2)
    app.register_blueprint(other)
    app.add_url_rule("/own", view_func=lambda: eventstream.subscribe("own"))
    client = app.test_client()
    with client_stream(client, "/stream?user=7"), client_stream(client, "/other?user=7"):
        for path in ("/stream?user=7", "/own?user=7", "/other?user=7"):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["Retry-After"]) == (429, "5")
            assert "This user has too many streams open." in answer.text
        assert client.head("/stream?user=7").status_code == 200
        assert app.extensions["eventstream"].broker.subscriptions == 2
        for path in ("/stream?user=8", "/stream", "/own", "/own?user=8"):
            client_stream(client, path).close()
    client_stream(client, "/own?user=7").close()
    assert app.extensions["eventstream"].places.taken == 0


def test_an_address_has_as_many_streams_as_the_limit_says_behind_a_proxy_too(
    make_app: MakeApp,
) -> None:
    app = make_app(MAX_SUBSCRIBERS_PER_ADDRESS=1)
    client = app.test_client()
    with client_stream(client, "/stream"):
        answer = client.get("/stream", headers={"X-Forwarded-For": "192.0.2.1"})
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "5")
        assert "This address has too many streams open." in answer.text
        app.wsgi_app = ProxyFix(app.wsgi_app)  # type: ignore[method-assign]
        client_stream(client, "/stream", headers={"X-Forwarded-For": "192.0.2.1"}).close()
        assert client.get("/stream").status_code == 429


def test_what_has_no_stream_takes_no_place(make_app: MakeApp, eventstream: EventStream) -> None:
    @eventstream.resumable("/run")
    def run() -> Iterator[str]:
        yield "x"

    @eventstream.stream("/generated")
    def generated() -> Iterator[str]:
        yield "x"

    @eventstream.identify
    def user() -> str:
        return "me"

    app = make_app(MAX_SUBSCRIBERS_PER_USER=1)
    client = app.test_client()
    answer = client.post("/stream/run")
    end = {"Last-Event-ID": re.findall("id: (.*)", answer.text)[-1]}
    with client_stream(client, "/stream"):
        assert client.post("/stream/run").status_code == 429
        # One that has ended is sent as any.
        assert client.get("/stream/run").status_code == 429
        assert client.get("/stream/run", headers=end).status_code == 204
        assert client.get("/stream/generated").status_code == 200
        for path in ("/stream", "/stream/run", "/stream/generated"):
            assert client.head(path).status_code == 200
    assert app.extensions["eventstream"].places.taken == 0
    assert client.get("/stream/run").text.endswith(answer.text.partition("data:")[2])
    with client_stream(client, "/stream"):
        pass


def test_a_stream_that_cannot_be_opened_gives_its_place_back(
    make_app: MakeApp, eventstream: EventStream
) -> None:
    app = make_app(MAX_SUBSCRIBERS=1)
    app.add_url_rule("/own", view_func=lambda: eventstream.subscribe(snapshot=lambda: 1 / 0))
    client = app.test_client()
    assert [client.get("/own").status_code for _ in range(2)] == [500, 500]
    client_stream(client, "/stream").close()


# --- Tokens


def test_a_token_opens_its_channels_without_asking(app: Flask, eventstream: EventStream) -> None:
    eventstream.authorize(lambda channel: channel == "open")
    wire = token(app, "a", "b")
    assert channels_of(app, f"?token={wire}") == ("a", "b")
    assert channels_of(app, bearer=wire) == ("a", "b")
    assert channels_of(app, "?channel=b", wire) == ("b",)
    assert channels_of(app, "?channel=b&channel=open", wire) == ("b", "open")
    assert channels_of(app, bearer=token(app)) == ("sse",)
    assert get(app, "?channel=b&channel=c", wire).status_code == 403


def test_without_a_judge_a_token_opens_its_channels_and_the_default_one(app: Flask) -> None:
    wire = token(app, "a")
    assert channels_of(app, bearer=wire) == ("a",)
    assert channels_of(app, "?channel=sse&channel=a", wire) == ("sse", "a")
    answer = get(app, "?channel=other", wire)
    assert answer.status_code == 403
    assert "other" in answer.text


def test_a_bad_token_is_401_even_for_an_open_channel(app: Flask, eventstream: EventStream) -> None:
    eventstream.authorize(lambda channel: True)
    wire = token(app, "sse")
    other = Flask("other")
    other.secret_key = "other"
    other.register_blueprint(EventStream("eventstream", __name__))
    bad = [
        wire[:20] + ("A" if wire[20] != "A" else "B") + wire[21:],
        wire.rpartition(".")[0],
        token(other, "sse"),
        PREFIX,
        PREFIX + "x" * 10_000,
        PREFIX + "é",
    ]
    for one in bad:
        assert_is_401(get(app, "?channel=sse", one.encode().decode("latin-1")), "is not valid")
        assert_is_401(get(app, f"?channel=sse&token={one}"), "is not valid")
    assert app.extensions["eventstream"].places.taken == 0


def test_an_expired_token_is_401(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = token(app, "sse", max_age=10)
    assert channels_of(app, bearer=wire) == ("sse",)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 11)
    assert_is_401(get(app, bearer=wire), "This token has expired.")


@pytest.mark.parametrize("foreign", ["", "x", "eyJhbGciOiJIUzI1NiJ9.e30.x", "é", "x" * 10_000])
def test_a_token_of_others_is_for_the_app_to_judge_or_401(
    app: Flask, eventstream: EventStream, foreign: str
) -> None:
    wire = foreign.encode().decode("latin-1")
    assert_is_401(get(app, bearer=wire), "oken")
    assert_is_401(get(app, f"?token={foreign}"), "oken")
    eventstream.authorize(lambda channel: request.headers["Authorization"] == f"Bearer {wire}")
    assert channels_of(app, bearer=wire) == ("sse",)
    eventstream.authorize(lambda channel: False)
    assert get(app, f"?token={foreign}").status_code == 403


def test_the_header_goes_before_the_query(app: Flask) -> None:
    one, two = token(app, "one"), token(app, "two")
    assert channels_of(app, f"?token={two}", one) == ("one",)
    assert_is_401(get(app, f"?token={two}", PREFIX), "not valid")
    assert channels_of(app, f"?token={PREFIX}", one) == ("one",)
    answer = get(app, f"?token={PREFIX}", Authorization="Basic eDp5")
    assert_is_401(answer, "not valid")
    headers = {"Authorization": f"bEARER   {one} "}
    with client_stream(app.test_client(), "/stream", headers=headers) as stream:
        assert stream.status_code == 200


def test_a_key_that_was_replaced_still_verifies_and_signs_no_more(app: Flask) -> None:
    old = token(app, "news")
    app.config.update(SECRET_KEY="new", SECRET_KEY_FALLBACKS=["older", "secret"])
    new = token(app, "news")
    assert channels_of(app, bearer=old) == channels_of(app, bearer=new) == ("news",)
    app.config.update(SECRET_KEY_FALLBACKS=None)
    assert channels_of(app, bearer=new) == ("news",)
    assert_is_401(get(app, bearer=old), "not valid")


def test_an_empty_key_is_none(app: Flask) -> None:
    wire = token(app, "news")
    app.config.update(SECRET_KEY="", SECRET_KEY_FALLBACKS=[""])
    with pytest.raises(ConfigurationError, match="SECRET_KEY=None is needed"):
        token(app, "news")
    assert_is_401(get(app, bearer=wire), "not valid")


def test_what_cannot_be_signed_is_an_error(app: Flask) -> None:
    with pytest.raises(InvalidFieldError, match="channel="):
        token(app, "a\nb")
    with pytest.raises(TooLargeError, match="number of channels"):
        token(app, *map(str, range(65)))
    with pytest.raises(ConfigurationError, match="max_age="):
        token(app, max_age=0)
    with pytest.raises(InvalidFieldError, match="claims="):
        token(app, claim=object())


def test_a_view_of_ones_own_reads_the_current_token(app: Flask, eventstream: EventStream) -> None:
    @app.get("/own")
    def own() -> Any:
        found = eventstream.current_token()
        return {"user": found.user, **found.claims, "channels": found.channels}

    client = app.test_client()
    wire = token(app, "a", user=7, room="x")
    assert client.get(f"/own?token={wire}").json == {"user": "7", "room": "x", "channels": ["a"]}
    for query in ("", "?token=", "?token=foreign", f"?token={PREFIX}x"):
        assert_is_401(client.get(f"/own{query}"), "oken")


def test_the_user_of_a_token_goes_before_the_identified_one(
    make_app: MakeApp, eventstream: EventStream
) -> None:
    @eventstream.identify
    def user() -> str:
        return "me"

    app = make_app(MAX_SUBSCRIBERS_PER_USER=1)
    app.secret_key = "secret"
    yours, nobodys = token(app, user="you"), token(app)
    with client_stream(app.test_client(), "/stream"):
        assert get(app, bearer=nobodys).status_code == 429
        assert channels_of(app, bearer=yours) == ("sse",)


def test_neither_the_token_nor_the_secret_is_logged(
    app: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wire = token(app, "a")
    get(app, "?channel=b", wire)
    get(app, bearer=wire + "x")
    channels_of(app, bearer=wire)
    assert wire not in caplog.text
    assert "secret" not in caplog.text


def test_a_token_of_nobody_is_not_revoked_with_the_user_who_has_it(
    make_app: MakeApp, eventstream: EventStream
) -> None:
    @eventstream.identify
    def user() -> str:
        return "me"

    app = make_app()
    app.secret_key = "secret"
    wire = token(app)
    with client_stream(app.test_client(), f"/stream?token={wire}") as stream:
        with app.app_context():
            eventstream.revoke("me")
        assert list(stream) == []
    assert channels_of(app, bearer=wire) == ("sse",)


# --- On both roads


@pytest.fixture(params=[True, False], ids=["hub", "iterator"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    site = Site({"EVENTSTREAM_HIJACK": request.param, "SECRET_KEY": "secret"})
    yield site
    site.close()


def test_a_stream_ends_with_its_token(site: Site) -> None:
    def own() -> Any:
        site.eventstream.current_token()
        return site.eventstream.subscribe("other")

    site.app.add_url_rule("/own", view_func=own)
    begin = time.time()
    bearer = {"Authorization": f"Bearer {token(site.app, 'news', max_age=LEFT)}"}
    clients = [site.connect("/stream", **bearer), site.connect("/own", **bearer)]
    stays = site.connect("/stream")
    site.publish("x", channel=["news", "other"])
    for client in clients:
        client.read_event(b"x")
        client.read_all()
    # Nothing else ends them.
    assert time.time() - begin >= LEFT
    site.publish("y")
    stays.read_event(b"y")
    assert site.count() == 1
    assert site.connect("/stream", **bearer).response.status == 401


def test_a_clock_that_jumps_moves_no_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = token(site.app, "news", max_age=10)
    client = site.connect(f"/stream?token={wire}")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)
    site.publish("x", channel="news")
    client.read_event(b"x")
    monkeypatch.setattr(time, "time", lambda: now - 1e6)
    site.publish("y", channel="news")
    client.read_event(b"y")


def test_the_client_of_a_run_is_a_subscriber_like_any(
    make_app: MakeApp, eventstream: EventStream
) -> None:
    started: list[str] = []
    gate = threading.Event()

    @eventstream.resumable("/run/<name>", owner=lambda: eventstream.current_token().user)
    def run(name: str) -> Iterator[str]:
        started.append(name)
        yield "first"
        gate.wait()

    app = make_app(MAX_SUBSCRIBERS_PER_USER=1)
    app.secret_key = "secret"
    client, places = app.test_client(), app.extensions["eventstream"].places
    short, long = token(app, max_age=LEFT, user="me"), token(app, user="me")
    assert_is_401(client.post("/stream/run/one"), "A token is needed.")
    with client_stream(client, f"/stream/run/one?token={short}", method="POST") as stream:
        assert stream.next().data == "first"
        for method, name in (("POST", "two"), ("POST", "one"), ("GET", "one")):
            answer = client.open(f"/stream/run/{name}?token={long}", method=method)
            assert answer.status_code == 429
        assert started == ["one"]
        assert list(stream) == []
    assert places.taken == 0
    with client_stream(client, f"/stream/run/one?token={long}") as stream:
        assert stream.next().data == "first"
        with app.app_context():
            eventstream.revoke("me")
        assert list(stream) == []
    assert_is_401(client.get(f"/stream/run/one?token={long}"), "revoked")
    assert places.taken == 0
    gate.set()
