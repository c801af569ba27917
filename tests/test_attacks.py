"""What strangers may send to a public endpoint, and what they must not get by it.

Of a broker's sequence everybody who has a cursor sees one number, and so how much is published in
all channels together: that is how one cursor can serve many channels. Nothing else of a channel may
be seen by those who cannot read it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from contextlib import ExitStack, closing, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from flask import Flask
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from werkzeug.middleware.proxy_fix import ProxyFix

from flask_eventstream import Broker, EventStream, EventStreamParser, MemoryBroker, ServerSentEvent
from flask_eventstream.errors import InvalidFieldError, RightsError
from flask_eventstream.redis_broker import RedisBroker
from flask_eventstream.testing import client_stream
from flask_eventstream.tokens import verified

from .attack_requests import Answer, create_app, new_environ
from .redis_server import PATIENT
from .servers import DEADLINE, ROOT
from .stress import UNTRACED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .redis_server import RedisServer

GUARDED = create_app(True)
MANY = settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# --- Lines and fields that are not intended

NASTY = [
    "\r\nX-Evil: 1", "\r\n\r\n<script>alert(1)</script>", "\n\ndata: evil\n\n", "\rid: evil",
    "\nevent: evil\n", "\nretry: 1\n", "\0", "a\0b", "\x0b\x0c\x1c", "\x7f", "\x85data: evil", "%",
    "\u2028data: evil", "\u2029", "\ufeff", "\ufffe", "é\xff數", "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>", "%0d%0aX-Evil:%201", "%00", "%ff%fe", "\x1b", "x" * 9000,
]  # fmt: skip
REFUSED = set("\r\n\0\x0b\x7f\x85\x1b")

PLACES: dict[str, tuple[str, str, str]] = {
    "channel": ("GET", "/stream", "channel={}"),
    "the second channel": ("GET", "/stream", "channel=sse&channel={}"),
    "token": ("GET", "/stream", "token={}"),
    "a token in the form of ours": ("GET", "/stream", "token=es1.{}"),
    "lastEventId": ("GET", "/stream", "lastEventId={}"),
    "last_event_id": ("GET", "/stream", "last_event_id={}"),
    "run": ("GET", "/stream/run/x", "run={}"),
    "run of a POST": ("POST", "/stream/run/x", "run={}"),
    "run of a DELETE": ("DELETE", "/stream/run/x", "run={}"),
    "the cursor of a run": ("GET", "/stream/run/x", "lastEventId={}"),
    "the URL of a run": ("POST", "/stream/run/{}", ""),
    "the URL": ("GET", "/{}", ""),
    "the name of an argument": ("GET", "/stream", "{}=1"),
}
FIELDS = ["LAST_EVENT_ID", "AUTHORIZATION", "X_FORWARDED_FOR", "HOST", "COOKIE", "ACCEPT"]


@pytest.fixture
def app() -> Flask:
    app = create_app(True)
    app.wsgi_app = ProxyFix(app.wsgi_app)  # type: ignore[method-assign]
    return app


def look_at(app: Flask, environ: dict[str, Any]) -> Answer:
    """Have an app answer, and see that nothing of the request has become a field or a line."""
    with closing(Answer(app, environ)) as answer:
        answer.check()
        assert answer.code < 500
        for event in EventStreamParser().feed(answer.body):
            # A run may be cancelled while it goes on, or after its end.
            assert event.type in {"message", "reset", "end", "cancelled"}
            assert event.id != "evil"
    return answer


ME: dict[str, Any] = {"HTTP_COOKIE": "user=me"}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_in_a_url_makes_no_field_and_no_line(app: Flask, place: str) -> None:
    method, path, query = PLACES[place]
    for text in NASTY:
        raw = text.encode().decode("latin-1")
        for one in (raw, quote(text)):
            answer = look_at(app, new_environ(method, path.format(text), query.format(one), **ME))
            if place == "channel" and one != raw and set(text) & REFUSED:
                assert answer.code == 400
            if "lastEventId" in query and path == "/stream" and one != raw:
                [reset] = EventStreamParser().feed(answer.body)
                assert json.loads(reset.data)["requested"] == text[:256]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("path", ["/stream", "/mine", "/stream/run/x", "/stream/generated/2"])
def test_what_is_in_a_field_makes_no_field_and_no_line(app: Flask, field: str, path: str) -> None:
    before = {"AUTHORIZATION": ["", "Bearer ", "Bearer es1."], "COOKIE": ["", "user="]}
    for text in NASTY:
        for start in before.get(field, [""]):
            value = (start + text).encode().decode("latin-1")
            for method in ("GET", "POST", "DELETE"):
                environ = new_environ(method, path, **ME)
                look_at(app, environ | {f"HTTP_{field}": value})


def test_the_pages_of_errors_escape_what_they_quote(app: Flask) -> None:
    for text in ("<script>alert(1)</script>", "\0<img src=x>", "login<b>"):
        answer = look_at(create_app(False), new_environ("GET", "/stream", f"channel={quote(text)}"))
        assert answer.code in {400, 403}
        assert dict(answer.fields)["Content-Type"] == "text/html; charset=utf-8"
        assert b"&lt;" in answer.body


odd_ones = st.sampled_from("\r\n\0\ud800\udfff\x85\u2028: <")
any_text = st.lists(st.one_of(st.text(max_size=9), odd_ones), max_size=9).map("".join)
json_values = st.one_of(any_text, st.none(), st.integers(), st.sampled_from(NASTY))


@pytest.fixture(scope="module")
def published() -> Iterator[Callable[[dict[str, Any]], list[ServerSentEvent]]]:
    """Return what publishes what a request says, and returns what a subscriber gets of it."""
    app = create_app(True, EVENTSTREAM_HEARTBEAT=60)
    client = app.test_client()
    token = app.config["EVENTSTREAM"]

    def publish(fields: dict[str, Any]) -> list[ServerSentEvent]:
        answer = client.post("/publish", data=json.dumps(fields), content_type="application/json")
        assert answer.status_code in {200, 400}
        assert (answer.status_code == 400) <= ("=" in answer.text)
        with app.app_context():
            token.publish("that was it", id="last")
        found = [stream.next()]
        while found[-1].id != "last":
            found.append(stream.next())
        assert (len(found) > 1) == (answer.status_code == 200)
        return found[:-1]

    with client_stream(client, "/stream?channel=sse") as stream:
        yield publish


@MANY
@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("data", "type", "id", "retry"), json_values))
)
@example({"data": "\r\n\r\nevent: x", "type": "\u2028", "id": "\x85", "retry": 0})
@example({"type": "a\nb"})
@example({"id": "\0"})
@example({"data": "\ud800"})
@example({"retry": -1})
def test_what_an_app_publishes_for_a_request_arrives_as_it_is_or_is_400(
    published: Callable[[dict[str, Any]], list[ServerSentEvent]], fields: dict[str, Any]
) -> None:
    for event in published(fields):
        expected = ServerSentEvent(**{"data": None} | fields)
        text = expected.data.replace("\r\n", "\n").replace("\r", "\n")
        assert (event.data, event.type) == (text, expected.type)
        assert fields.get("id") is None or event.id == expected.id


@MANY
@given(any_text)
def test_what_an_app_hands_on_is_taken_or_refused_with_an_error_of_ours(text: str) -> None:
    app, eventstream = Flask(__name__), EventStream("eventstream", __name__)
    app.secret_key = "key"
    app.register_blueprint(eventstream)
    acts: list[Callable[[], Any]] = [
        lambda: eventstream.subscribe(text).close(),
        lambda: eventstream.subscribe("a", "b", snapshot=lambda: text).close(),
        lambda: verified(eventstream.token(text), ["key"]),
        lambda: verified(eventstream.token("a", user=text, claim={text: text}), ["key"]),
        lambda: eventstream.revoke(text),
        lambda: eventstream.disconnect(text),
        lambda: eventstream.subscriber_count(text),
        lambda: eventstream.last_event_id(text),
        lambda: eventstream.publish(text, type=text),
        lambda: eventstream.publish(text, id=text, channel=text),
    ]
    with app.test_request_context("/"):
        for act in acts:
            with suppress(InvalidFieldError, RightsError):
                act()
    assert app.extensions["eventstream"].places.taken == 0


# --- Names of channels


def is_fine(name: str) -> bool:
    kinds = {unicodedata.category(character) for character in name}
    return 0 < len(name) <= 255 and not kinds & {"Cc", "Cs"}


ODD = [
    "*", "user:*", "user:?lice", "user:[a]lice", "user:\\alice", "\\", "^alice$", "%", "{alice}",
    "eventstream:0:channel:user:alice", "eventstream:0:state", "0:channel:user:alice", "0:state",
    "channel:user:alice", ":user:alice", "user:alice ", " user:alice", "User:Alice", "user:alice/",
    "../user:alice", "user:alice\u200b", "\uff55ser:alice", "user:a\u0301lice", "user:\u00e1lice",
    "user:alice,sse", "user:alice\u2028", "user", "alice", "user:alic", "user:alicee", "run:x", "'",
]  # fmt: skip
names = st.one_of(
    any_text,
    st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=255),
    st.builds(lambda text, n: (text * n)[:10_000], st.text(min_size=1), st.integers(1, 10_000)),
    st.sampled_from(ODD),
    st.sampled_from(
        ["\x1frun:x", "\x1f", "x" * 255, "x" * 256, "🎉" * 255, "🎉" * 256, "\x9f", "\xa0"]
    ),
)


@pytest.fixture(params=["memory", "redis"], scope="module")
def brokers(request: pytest.FixtureRequest) -> Iterator[tuple[Broker, Broker]]:
    """One broker to publish with and one to subscribe with, which may be the same one."""
    if request.param == "memory":
        one = MemoryBroker()
        yield one, one
        one.close()
        return
    server: RedisServer = request.getfixturevalue("redis")
    prefix = server.prefix()
    made = [RedisBroker(server.url, key_prefix=prefix, timeout=PATIENT) for _ in range(2)]
    yield made[0], made[1]
    for each in made:
        each.close()


def data_of(wire: bytes | None) -> list[str]:
    return [event.data for event in EventStreamParser().feed(wire or b"")]


@MANY
@given(names, st.lists(names, max_size=3))
def test_a_name_is_one_channel_everywhere_or_refused(
    brokers: tuple[Broker, Broker], name: str, others: list[str]
) -> None:
    publisher, reader = brokers
    if not is_fine(name):
        for act in (reader.subscribe, reader.last_event_id, reader.disconnect):
            with pytest.raises(InvalidFieldError):
                act(name)
        with pytest.raises(InvalidFieldError):
            publisher.publish("x", channel=["sse", name])
        return
    cursor = publisher.last_event_id()
    different = [one for one in others if is_fine(one) and one != name]
    with ExitStack() as stack:
        own, *foreign = [
            stack.enter_context(closing(reader.subscribe(one))) for one in (name, *different)
        ]
        publisher.publish("mine", channel=name)
        assert data_of(own.take(DEADLINE)) == ["mine"]
        replayed = reader.subscribe(name, last_event_id=cursor)
        assert data_of(stack.enter_context(closing(replayed)).start) == ["mine"]
        for one in foreign:
            assert data_of(one.take(0)) == []


def test_no_name_reads_what_another_one_has(brokers: tuple[Broker, Broker]) -> None:
    publisher, reader = brokers
    cursor = publisher.last_event_id()
    with ExitStack() as stack:
        live = [stack.enter_context(closing(reader.subscribe(name))) for name in ODD]
        publisher.publish("of alice", id="own", channel="user:alice")
        for name, subscription in zip(ODD, live, strict=True):
            publisher.publish(name, channel=name)
            assert data_of(subscription.take(DEADLINE)) == [name]
            for known in (cursor, "own"):
                late = stack.enter_context(closing(reader.subscribe(name, last_event_id=known)))
                assert data_of(late.start)[-1:] == [name]
                assert "of alice" not in data_of(late.start)


@MANY
@given(names)
def test_a_name_that_is_refused_is_400_and_reaches_nothing(name: str) -> None:
    app = GUARDED
    answer = look_at(app, new_environ("GET", "/stream", f"channel={quote(name, errors='replace')}"))
    sent = name.encode(errors="replace").decode()
    expected = 400 if not is_fine(sent) else {"secret": 403, "login": 401}.get(sent, 200)
    assert answer.code == expected
    assert app.extensions["eventstream"].broker.subscriptions == 0
    assert app.extensions["eventstream"].places.taken == 0


# --- Everything at once


@pytest.mark.beside
def test_a_hundred_thousand_random_requests_do_no_harm() -> None:
    command = [sys.executable, "-m", "tests.attack_requests"]
    environ, pipe = {**os.environ, **UNTRACED}, subprocess.PIPE
    with ExitStack() as stack:
        attacks = []
        for kind in ("open", "guarded"):
            attack = subprocess.Popen(
                [*command, kind, "50000"],
                cwd=ROOT,
                env=environ,
                stdout=pipe,
                stderr=pipe,
                text=True,
            )
            stack.enter_context(attack)
            stack.callback(attack.kill)
            attacks.append(attack)
        for attack in attacks:
            check_attack(*attack.communicate(timeout=1200))


def check_attack(printed: str, errors: str) -> None:
    assert not errors
    print(printed)
    figures = json.loads(printed)
    statuses = {int(code): count for code, count in figures["statuses"].items()}
    assert figures["faults"] == []
    assert sum(statuses.values()) == 50_000
    assert statuses.keys() <= OFTEN | {308, 413, 415, 503}
    assert all(statuses.get(code, 0) > 3 for code in OFTEN)
    # One object left behind by every twentieth request would be more.
    assert figures["grown"] < 2000


OFTEN = {200, 204, 400, 401, 403, 404, 405, 409, 429}
