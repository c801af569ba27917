"""The move from Flask-SSE, with the real one at the other end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Any

import flask_sse as theirs
import httpx
import pytest
from flask import Flask

from flask_eventstream import EventStream, EventStreamParser, flask_sse
from flask_eventstream.errors import ConfigurationError, InvalidFieldError
from flask_eventstream.signals import event_published
from flask_eventstream.testing import client_stream

from .flask_sse_app import create_app
from .servers import DEADLINE, ROOT, Server, serving, skip_unless_ci, wait_for
from .stress import UNTRACED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from flask_eventstream import ServerSentEvent

    from .redis_server import RedisServer

pytestmark = pytest.mark.beside

VALUES: list[Any] = [
    "text",
    "",
    "a\nb",
    "a\r\nb\rc\n",
    "\n",
    "\u2028a\x0bb",
    "Hé, 你好 👩‍💻",
    {"b": "é", "a": [1, 2.5, None, True]},
    {10: "x", 9: "y"},
    [],
    0,
    -1.5,
    None,
    False,
    "null",
]


@pytest.fixture(scope="module", autouse=True)
def their_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Path]]:
    """Fetch Flask-SSE's sdist meanwhile; return what waits for its tests, and skips without."""
    home = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(home)]
    options = ["--no-binary", "flask-sse", "--retries=1", "flask-sse==1.0.0"]
    log = home / "log"
    with log.open("w") as errors:
        pip = subprocess.Popen([*command, *options], stdout=errors, stderr=errors)

    def unpacked() -> Path:
        if pip.wait():
            skip_unless_ci(f"needs Flask-SSE's sdist, which pip could not fetch: {log.read_text()}")
        [sdist] = home.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            tests = [one for one in archive.getmembers() if "/tests/" in one.name]
            archive.extractall(home, tests, filter="data")
        [folder] = home.glob("*/tests")
        return folder

    yield unpacked
    pip.kill()
    pip.wait()


# --- One process


def old_app(redis: RedisServer) -> Flask:
    return create_app("flask_sse", SSE_REDIS_URL=redis.url)


def new_app(redis: RedisServer, **config: Any) -> Flask:
    prefix = redis.prefix()
    return create_app(SSE_REDIS_URL=redis.url, EVENTSTREAM_KEY_PREFIX=prefix, **config)


@pytest.fixture
def apps(redis: RedisServer) -> Iterator[Callable[..., Flask]]:
    """Return what makes an app of ours; its bridge and its broker are closed in the end."""
    made: list[Flask] = []

    def make(**config: Any) -> Flask:
        made.append(new_app(redis, **config))
        return made[-1]

    yield make
    for app in made:
        close(app)


def close(app: Flask) -> None:
    bridge = app.extensions.get("eventstream.flask_sse")
    if bridge is not None:
        bridge.stop()
    if "eventstream" in app.extensions:
        app.extensions["eventstream"].broker.close()


@contextmanager
def hearing(redis: RedisServer, channel: str) -> Iterator[Callable[[], Any]]:
    """Hear a channel of Redis; yield what returns the next message."""
    with closing(flask_sse.StrictRedis.from_url(redis.url).pubsub()) as pubsub:
        pubsub.subscribe(channel)
        messages = pubsub.listen()
        assert next(messages)["type"] == "subscribe"
        yield lambda: next(messages)["data"]


def publish(app: Flask, *arguments: Any, **options: Any) -> Any:
    with app.app_context():
        return app.extensions["sse"].publish(*arguments, **options)


@contextmanager
def old_subscriber(app: Flask, redis: RedisServer, channel: str) -> Iterator[list[bytes]]:
    """What a subscriber of Flask-SSE's gets, as it comes; the first one on a channel of its own."""
    wire: list[bytes] = []

    def read() -> None:
        with app.test_request_context(f"/events?channel={channel}"):
            for chunk in app.extensions["sse"].stream().response:
                if chunk == "data:stop\n\n":
                    return
                wire.append(chunk.encode())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        wait_for(lambda: redis.redis.pubsub_numsub(channel)[0][1])
        yield wire
    finally:
        redis.redis.publish(channel, '{"data": "stop"}')
        reader.join()


def fields(event: ServerSentEvent) -> tuple[Any, ...]:
    return event.data, event.type, event.retry


@pytest.mark.parametrize("module", ["flask_sse", "flask_eventstream.flask_sse"])
def test_browsers_see_what_they_saw_before(
    module: str, apps: Callable[..., Flask], redis: RedisServer
) -> None:
    old, new = old_app(redis), apps()
    publisher = old if module == "flask_sse" else new
    channel = f"same:{module}"
    values: list[tuple[Any, dict[str, Any]]] = [
        *[(value, {}) for value in VALUES],
        ("x", {"type": "greeting", "id": 5, "retry": 500}),
        ("x", {"type": 5, "id": "0-0"}),
        ("x", {"type": "", "id": 0, "retry": 0}),
    ]
    with old_subscriber(old, redis, channel) as wire:
        with client_stream(new.test_client(), f"/events?channel={channel}") as stream:
            # The first one comes with a reconnection time of the stream's own.
            publish(publisher, "first", channel=channel)
            stream.next(20)
            for value, options in values:
                publish(publisher, value, **options, channel=channel)
            got = [stream.next(20) for _ in values]
            wait_for(lambda: len(wire) == 1 + len(values))
    # What has no data line is dropped by browsers. Here it arrives.
    parsed = [list(EventStreamParser().feed(one)) for one in wire[1:]]
    assert parsed[1] == []
    assert fields(got[1]) == ("", "message", None)
    before = [fields(events[0]) for events in parsed if events]
    now = [fields(event) for n, event in enumerate(got) if n != 1]
    assert now == before
    assert [event.id for event in got[-3:-1]] == ["5", "0-0"]


def test_text_keeps_the_spaces_that_its_lines_begin_with(
    apps: Callable[..., Flask], redis: RedisServer
) -> None:
    app = apps()
    with client_stream(app.test_client(), "/events") as stream:
        publish(app, " a\n  b")
        assert stream.next(20).data == " a\n  b"
    [event] = EventStreamParser().feed(str(theirs.Message(" a\n  b")).encode())
    assert event.data == "a\n b"


def test_a_copy_is_what_flask_sse_would_have_sent(
    apps: Callable[..., Flask], redis: RedisServer
) -> None:
    old, new = old_app(redis), apps()
    with hearing(redis, "copies") as next_message:
        for value in VALUES:
            for app in (old, new):
                publish(app, value, type="a", retry=3, id="b", channel="copies")
            assert next_message() == next_message()


def test_without_copies_flask_sse_gets_nothing(
    apps: Callable[..., Flask], redis: RedisServer
) -> None:
    app = apps(SSE_REDIS_COPY=False)
    with hearing(redis, "no-copies") as next_message:
        publish(app, "x", channel="no-copies")
        redis.redis.publish("no-copies", "end")
        assert next_message() == b"end"


def test_messages_yields_what_both_publish(apps: Callable[..., Flask], redis: RedisServer) -> None:
    old, new = old_app(redis), apps()
    found: list[flask_sse.Message] = []

    def read() -> None:
        with new.app_context():
            for message in new.extensions["sse"].messages("both"):
                found.append(message)
                if message.data == 2:
                    return

    reader = threading.Thread(target=read)
    reader.start()
    wait_for(lambda: redis.redis.pubsub_numsub("both")[0][1] == 1)
    publish(old, 1, type="old", channel="both")
    publish(new, 2, channel="both")
    reader.join()
    assert found == [flask_sse.Message(1, "old"), flask_sse.Message(2)]


def test_a_message_shows_and_compares_itself_as_flask_sses() -> None:
    for arguments in [("a",), ({"b": 1}, "t"), ("c", None, 5, 500), (0, "", 0, 0)]:
        our, their = flask_sse.Message(*arguments), theirs.Message(*arguments)
        assert (str(our), repr(our), our.to_dict()) == (str(their), repr(their), their.to_dict())
        assert our == flask_sse.Message(*arguments)
        assert our != their


def test_the_endpoint_has_flask_sses_name(apps: Callable[..., Flask]) -> None:
    app = apps()
    assert app.test_client().get("/").text == "/events?channel=news"
    assert flask_sse.sse.name == "sse"
    answer = app.test_client().head("/events")
    assert (answer.status_code, answer.mimetype) == (200, "text/event-stream")


def test_what_a_before_request_function_refuses_is_refused(apps: Callable[..., Flask]) -> None:
    client = apps().test_client()
    assert client.get("/events?channel=secret:1").status_code == 403
    with client_stream(client, "/events?channel=open:1") as stream:
        assert stream.status_code == 200


def test_a_function_that_authorizes_closes_the_route(apps: Callable[..., Flask]) -> None:
    app = apps()
    app.extensions["sse"].authorize(lambda channel: channel == "sse")
    assert app.test_client().get("/events?channel=another").status_code == 403
    with client_stream(app.test_client(), "/events?channel=") as stream:
        assert stream.status_code == 200


def test_what_another_blueprint_guards_is_guarded(redis: RedisServer) -> None:
    app = Flask(__name__)
    app.config["EVENTSTREAM_BROKER_URL"] = redis.url
    guard, sse = EventStream("guard", "x"), flask_sse.ServerSentEventsBlueprint("sse", "x")
    guard.authorize(lambda channel: False)
    app.register_blueprint(guard)
    app.add_url_rule("/events", view_func=sse.stream)
    assert app.test_client().get("/events").status_code == 403
    close(app)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_beside_an_event_stream_the_route_opens_no_more_than_that(
    is_replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(EVENTSTREAM_BROKER_URL="memory://")
    other = EventStream("other", "x")
    # Whichever is registered first.
    app.register_blueprint(other)
    if is_replaced:
        monkeypatch.setattr(flask_sse, "StrictRedis", type("Own", (), {}))
    client = app.test_client()
    for path in ("/events", "/stream"):
        assert client.get(path, query_string={"channel": "user:1"}).status_code == 403
        assert client.head(path).status_code == 200
    other.authorize(lambda channel: channel == "user:1")
    assert client.get("/events?channel=user:2").status_code == 403
    assert client.head("/events?channel=user:1").status_code == 200
    app.extensions["sse"].authorize(lambda channel: channel == "user:2")
    assert client.head("/events?channel=user:2").status_code == 200


def test_without_a_configuration_a_replaced_client_is_open_as_flask_sses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = create_app()
    monkeypatch.setattr(flask_sse, "StrictRedis", type("Own", (), {}))
    assert app.test_client().head("/events?channel=any").status_code == 200
    app.extensions["sse"].authorize(lambda channel: False)
    assert app.test_client().head("/events?channel=any").status_code == 403


def test_who_finds_no_place_has_no_channel_heard(
    apps: Callable[..., Flask], redis: RedisServer
) -> None:
    app = apps(EVENTSTREAM_MAX_SUBSCRIBERS=1)
    with client_stream(app.test_client(), "/events?channel=first"):
        assert app.test_client().get("/events?channel=second").status_code == 503
        wait_for(lambda: redis.redis.pubsub_numsub("first")[0][1])
        assert redis.redis.pubsub_numsub("second")[0][1] == 0
    assert list(app.extensions["eventstream.flask_sse"]._followed) == ["first"]


@pytest.mark.parametrize("channel", ["a\x00b", "x" * 256, "PREFIX0:notes", "PREFIX0:channel:a"])
def test_names_that_are_the_brokers_own_or_no_names_are_refused(
    channel: str, apps: Callable[..., Flask]
) -> None:
    app = apps()
    channel = channel.replace("PREFIX", app.config["EVENTSTREAM_KEY_PREFIX"])
    answer = app.test_client().get("/events", query_string={"channel": channel})
    assert answer.status_code == 400
    with pytest.raises(InvalidFieldError):
        publish(app, "x", channel=channel)


def test_a_note_that_is_none_of_ours_changes_nothing(
    apps: Callable[..., Flask], redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    app = apps()
    with client_stream(app.test_client(), "/events?channel=noted") as stream:
        for note in (b"\xff", b"garbage", b"round x", b"round \xff", b""):
            redis.redis.publish(f"{app.config['EVENTSTREAM_KEY_PREFIX']}0:notes", note)
            publish(old_app(redis), "x", channel="noted")
            assert stream.next(20).data == "x"
    assert len([one for one in caplog.messages if "left out" in one]) == 1
    assert "could not be heard" not in caplog.text


def test_an_app_without_a_url_says_what_flask_sse_says() -> None:
    app = create_app()
    with pytest.raises(KeyError, match="Must set a redis connection URL in app config"):
        publish(app, "x")
    with app.app_context(), pytest.raises(KeyError, match="Must set a redis connection URL"):
        app.extensions["sse"].redis  # noqa: B018  # it is the access that fails


def test_keys_that_are_set_after_the_registration_are_read(redis: RedisServer) -> None:
    app = create_app()
    app.config.update(REDIS_URL=redis.url, EVENTSTREAM_KEY_PREFIX=redis.prefix())
    with client_stream(app.test_client(), "/events?channel=late") as stream:
        publish(app, "x", channel="late")
        publish(old_app(redis), "y", channel="late")
        assert {stream.next(20).data, stream.next(20).data} == {"x", "y"}
    close(app)


def test_the_broker_may_be_in_a_redis_of_its_own(
    apps: Callable[..., Flask], redis: RedisServer, own_redis: RedisServer
) -> None:
    app = apps(EVENTSTREAM_BROKER_URL=own_redis.url)
    with old_subscriber(old_app(redis), redis, "two") as wire:
        with client_stream(app.test_client(), "/events?channel=two") as stream:
            publish(app, "x", channel="two")
            publish(old_app(redis), "y", channel="two")
            assert {stream.next(20).data, stream.next(20).data} == {"x", "y"}
            wait_for(lambda: wire == [b"data:x\n\n", b"data:y\n\n"])


def test_with_the_broker_of_the_process_no_redis_is_needed() -> None:
    app = create_app(EVENTSTREAM_BROKER_URL="memory://")
    sent: list[Any] = []

    def note(sender: Flask, **values: Any) -> None:
        sent.append(values)

    with client_stream(app.test_client(), "/events") as stream, event_published.connected_to(note):
        id = publish(app, {"n": 1})
        event = stream.next(20)
    assert (event.id, event.data) == (id, '{"n": 1}')
    assert sent == [{"channels": ("sse",), "id": id}]


def test_a_blueprint_that_was_registered_before_with_another_broker_is_an_error(
    redis: RedisServer,
) -> None:
    app = Flask(__name__)
    app.config["REDIS_URL"] = redis.url
    app.register_blueprint(EventStream("eventstream", __name__))
    with pytest.raises(ConfigurationError, match="EVENTSTREAM_BROKER_URL='memory://' was read"):
        app.register_blueprint(flask_sse.ServerSentEventsBlueprint("sse", __name__))


def test_a_client_that_replaces_strict_redis_is_the_one_that_is_used(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(flask_sse.StrictRedis):  # type: ignore[misc]  # it is untyped
        pass

    monkeypatch.setattr(flask_sse, "StrictRedis", Own)
    app = new_app(redis)
    with old_subscriber(app, redis, "own") as wire:
        assert publish(app, {"a": 1}, type="b", channel="own") == 1
        wait_for(lambda: wire == [b'event:b\ndata:{"a": 1}\n\n'])
    with app.app_context():
        assert isinstance(app.extensions["sse"].redis, Own)
    close(app)
    # The broker was not spoken to.
    assert not redis.redis.keys(f"{app.config['EVENTSTREAM_KEY_PREFIX']}*")


def test_two_blueprints_of_an_app_share_its_bridge(redis: RedisServer) -> None:
    app = create_app()
    app.config.update(REDIS_URL=redis.url, EVENTSTREAM_KEY_PREFIX=redis.prefix())
    publish(app, "x", channel="shared")
    bridge = app.extensions["eventstream.flask_sse"]
    with app.app_context():
        flask_sse.sse.publish("y", channel="shared")
    assert app.extensions["eventstream.flask_sse"] is bridge
    assert len(app.extensions["eventstream"].blueprints) == 2
    close(app)


# --- Two processes


@pytest.fixture(scope="module")
def server(redis: RedisServer) -> Iterator[Server]:
    environ = {"REDIS_URL": redis.url, "KEY_PREFIX": redis.prefix()}
    with serving(
        "tests.flask_sse_app:served_app()", "gevent", "--workers=2", environ=environ
    ) as one:
        yield one


class Subscriber:
    """A client of the server's, which notes what it gets."""

    def __init__(self, server: Server, channel: str, last_event_id: str = "") -> None:
        self.events: list[ServerSentEvent] = []
        self._connection = HTTPConnection("127.0.0.1", server.port, timeout=20)
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        self._connection.request("GET", f"/events?channel={channel}", headers=headers)
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200
        self.process = int(self._answer.headers["X-Process"])
        self._parser = EventStreamParser()

    def read_until(self, data: str) -> list[str]:
        """Read until an event with some data comes; return the data of all so far."""
        while data not in self.data:
            chunk = self._answer.read1()
            assert chunk, f"the stream has ended without {data!r}: {self.data}"
            self.events += self._parser.feed(chunk)
        return self.data

    @property
    def data(self) -> list[str]:
        return [event.data for event in self.events]

    @property
    def last_event_id(self) -> str:
        return str(self.events[-1].id)

    def close(self) -> None:
        self._answer.close()
        self._connection.close()


def subscribers_of_both(server: Server, channel: str, open_ones: ExitStack) -> list[Subscriber]:
    """Connect until both processes of a server have a subscriber."""
    found: dict[int, Subscriber] = {}

    def has_both() -> bool:
        one = open_ones.enter_context(closing(Subscriber(server, channel)))
        found.setdefault(one.process, one)
        return len(found) == 2

    wait_for(has_both)
    return list(found.values())


@pytest.fixture(scope="module")
def post(server: Server) -> Iterator[Callable[[str, str], Any]]:
    """Return what has the server publish some data on a channel."""
    # The server may close a connection that is kept at any moment.
    alone = {"Connection": "close"}
    with httpx.Client(base_url=server.url, headers=alone, timeout=DEADLINE) as client:

        def request(data: str, channel: str) -> None:
            values = {"data": data, "channel": channel}
            client.post("/publish", json=values).raise_for_status()

        yield request


def test_each_event_of_both_publishers_comes_once_to_both_processes(
    server: Server, redis: RedisServer, post: Callable[[str, str], Any]
) -> None:
    old = old_app(redis)
    with ExitStack() as open_ones, old_subscriber(old, redis, "mixed") as wire:
        readers = subscribers_of_both(server, "mixed", open_ones)
        for n in range(10):
            publish(old, f"old {n}", channel="mixed")
            publish(old, "the same", channel="mixed")
            post(f"new {n}", "mixed")
            post("the same", "mixed")
        publish(old, "end", channel="mixed")
        expected = Counter({f"{who} {n}": 1 for who in ("old", "new") for n in range(10)})
        expected.update({"the same": 20, "end": 1})
        for reader in readers:
            got = reader.read_until("end")
            assert Counter(got) == expected
            for who in ("old", "new"):
                assert [each for each in got if who in each] == [f"{who} {n}" for n in range(10)]
        ids = [[event.id for event in reader.events] for reader in readers]
        assert ids[0] == ids[1]
        assert len(set(ids[0])) == 41
        wait_for(lambda: len(wire) == 41)
        assert wire[0] == b"data:old 0\n\n"
        assert wire[2] == b"data:new 0\n\n"


def test_a_client_that_returns_gets_what_both_have_published(
    server: Server, redis: RedisServer, post: Callable[[str, str], Any]
) -> None:
    old = old_app(redis)
    with closing(Subscriber(server, "again")) as one:
        publish(old, "first", channel="again")
        one.read_until("first")
    publish(old, "missed, old", channel="again")
    post("missed, new", "again")
    publish(old, "last", channel="again")
    with closing(Subscriber(server, "again", one.last_event_id)) as two:
        assert sorted(two.read_until("last")) == ["last", "missed, new", "missed, old"]


def test_a_process_that_is_killed_takes_no_event_with_it(
    server: Server, redis: RedisServer
) -> None:
    old = old_app(redis)
    numbers = [f"{n}" for n in range(200)]
    with ExitStack() as open_ones:
        killed, left = subscribers_of_both(server, "killed", open_ones)
        for n in numbers:
            publish(old, n, channel="killed")
            if n == "0":
                # Who has no cursor yet would not be sent what it has missed.
                killed.read_until("0")
            if n == "100":
                os.kill(killed.process, signal.SIGKILL)
        assert left.read_until("199") == numbers
        # What the dead one has sent ends somewhere.
        with suppress(AssertionError, OSError, HTTPException):
            killed.read_until("199")
        with closing(Subscriber(server, "killed", killed.last_event_id)) as back:
            assert killed.data + back.read_until("199") == numbers


# --- Flask-SSE's own tests


def test_flask_sses_own_tests_pass(their_tests: Callable[[], Path]) -> None:
    folder = their_tests()
    (folder / "pytest.ini").write_text("[pytest]\n", "utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "tests.flask_sse_plugin", "-rA", str(folder)]
    environ = {**os.environ, **UNTRACED, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True)
    said = done.stdout.decode()
    assert done.returncode == 0, said
    assert f"flask_sse is {flask_sse.__file__}" in said
    assert re.findall(r" (\d+) (\w+)", said.splitlines()[-1])[0] == ("20", "passed")
