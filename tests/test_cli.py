from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from flask import Flask

from flask_eventstream import EventStream, EventStreamParser
from flask_eventstream.cli import commands
from flask_eventstream.redis_broker import RedisBroker

from .canned import END, GONE, STREAM, answered, canned, chunked
from .servers import DEADLINE, ROOT, serving, traced, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from click.testing import Result

    from flask_eventstream import ServerSentEvent

    from .redis_server import RedisServer

    MakeApp = Callable[..., Flask]


pytestmark = pytest.mark.beside


def run(app: Flask, *arguments: str, input: bytes | None = None) -> Result:
    return app.test_cli_runner().invoke(commands, list(arguments), input=input)


def printed(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(result: Result) -> str:
    """Return what a command says that fails, without a traceback."""
    assert result.exit_code > 0
    assert isinstance(result.exception, SystemExit)
    return result.stderr


@pytest.fixture
def shared(make_app: MakeApp, redis: RedisServer) -> Iterator[Flask]:
    app = make_app(BROKER_URL=redis.url, KEY_PREFIX=redis.prefix())
    yield app
    app.extensions["eventstream"].broker.close()


@pytest.fixture
def anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be where nothing tells how gunicorn is started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GUNICORN_CMD_ARGS", raising=False)
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)


def received(app: Flask, act: Callable[[], object]) -> list[ServerSentEvent]:
    """Return what a subscriber of ``news`` gets of what is done."""
    subscription = app.extensions["eventstream"].broker.subscribe("news")
    act()
    wire = subscription.take(DEADLINE)
    subscription.close()
    return EventStreamParser().feed(wire)


# publish


def test_what_is_published_arrives_and_its_id_is_printed(shared: Flask) -> None:
    ids: list[str] = []

    def publish(*arguments: str, input: bytes | None = None) -> None:
        ids.append(printed(run(shared, "publish", "news", *arguments, input=input)).strip())

    def publish_all() -> None:
        publish("Hello!")
        publish("x", "--type=t", "--id=own", "--retry=5")
        publish('{"a":[1,"数"]}', "--json")
        publish("-", input="two\nlines 数\n\n".encode())

    events = received(shared, publish_all)
    assert [event.id for event in events] == ids
    assert [event.data for event in events[:2]] == ["Hello!", "x"]
    assert (events[1].type, events[1].id, events[1].retry) == ("t", "own", 5)
    assert json.loads(events[2].data) == {"a": [1, "数"]}
    assert events[3].data == "two\nlines 数\n"


def test_what_cannot_be_published_is_an_error_in_words(shared: Flask) -> None:
    assert "type='a\\nb' has a line break" in refused(
        run(shared, "publish", "c", "x", "--type=a\nb")
    )
    assert "DATA is no JSON" in refused(run(shared, "publish", "c", "{", "--json"))
    assert "lone surrogate" in refused(run(shared, "publish", "c", "-", input=b"\xff"))


def test_with_the_broker_of_one_process_nobody_would_hear_of_it(app: Flask) -> None:
    for command, what in (
        (["publish", "c", "x"], "nobody is subscribed"),
        (["channels"], "nobody is subscribed"),
        (["listen", "c"], "nothing is published"),
    ):
        text = refused(run(app, *command))
        assert what in text
        assert "EVENTSTREAM_BROKER_URL='redis://…'" in text


def test_an_app_without_a_blueprint_is_told_to_register_one() -> None:
    text = refused(run(Flask("bare"), "publish", "c", "x"))
    assert text == (
        "Error: app 'bare' has no event stream; call app.register_blueprint(eventstream) first\n"
    )


def test_a_broker_that_is_away_is_an_error_in_words(make_app: MakeApp) -> None:
    result = run(make_app(BROKER_URL="redis://:secret@127.0.0.1:1"), "channels")
    assert result.exit_code == 1
    assert refused(result).startswith("Error: redis://127.0.0.1:1: no answer within 5 s")
    assert "secret" not in result.output


# listen


def test_a_key_is_that_of_the_event_and_does_not_go_with_an_own_id(shared: Flask) -> None:
    def publish_twice() -> None:
        for value in ("1", "2"):
            printed(run(shared, "publish", "news", value, "--key=tea"))

    assert [event.data for event in received(shared, publish_twice)] == ["2"]
    both = run(shared, "publish", "news", "3", "--key=tea", "--id=own")
    assert "leave one of them out" in refused(both)


def test_a_url_is_followed_until_its_server_says_that_it_is_over(app: Flask) -> None:
    events = b"id: 1\nretry: 0\ndata: a\ndata: b\x1b[2J\n\n", "event: t\ndata: 数\n\n".encode()
    with canned(STREAM + chunked(*events) + END, GONE) as server:
        options = ["--header", "X-Own: 1", "--token", "abc", "--last-event-id", "0"]
        result = run(app, "listen", server.url, *options)
    lines = re.sub(r"\d\d:\d\d:\d\d", "NOW", printed(result))
    assert lines == "NOW  message  1  a\n    b\\x1b[2J\nNOW  t  1  数\n"
    assert "The stream has ended. Connecting again in 0.1 s." in result.stderr
    for text in ("X-Own: 1", "Authorization: Bearer abc", "Last-Event-ID: 0"):
        assert f"{text}\r\n" in server.requests[0]


def test_the_raw_bytes_are_printed_as_they_come(app: Flask) -> None:
    with canned(
        STREAM + chunked(b":\nid: 1\n", b"data: \x1b\n\n", b"data: 2\n\n") + b"..."
    ) as server:
        result = run(app, "listen", server.url, "--raw", "--count=2")
    assert printed(result) == ":\nid: 1\ndata: \x1b\n\ndata: 2\n\n"


def test_after_so_many_events_it_ends(app: Flask) -> None:
    with canned(STREAM + chunked(b"data: 1\n\n", b"data: 2\n\ndata: 3\n\n") + b"...") as server:
        result = run(app, "listen", server.url, "--count=2")
    assert [line.split()[-1] for line in printed(result).splitlines()] == ["1", "2"]


def test_a_url_needs_no_app() -> None:
    with canned(GONE) as server:
        result = CliRunner().invoke(commands, ["listen", server.url])
    assert printed(result) == ""


def test_what_is_no_stream_is_an_error_that_shows_it(app: Flask) -> None:
    with canned(answered("403 Forbidden", "No\x1b[2J.")) as server:
        text = refused(run(app, "listen", server.url))
    assert "403 Forbidden No\\x1b[2J." in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["http://a/", "news"],
        ["http://a/", "http://b/"],
        ["http://a/", "--header", "nothing"],
        ["http://a/", "--header", "a b: x"],
        ["http://a/", "--header", "A: x\r\nB: y"],
        ["http://a/", "--count", "0"],
        ["gopher://a/"],
        [],
    ],
)
def test_what_cannot_be_followed_is_refused(app: Flask, arguments: list[str]) -> None:
    assert "Error: " in refused(run(app, "listen", *arguments))


# As processes


@contextmanager
def flask(redis: RedisServer, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "flask", "--app", "tests.redis_app:create_app", "eventstream"]
    pipe = subprocess.PIPE
    environ = {**os.environ, **traced(command), "REDIS_URL": redis.url}
    process = subprocess.Popen(
        [*command, *arguments], cwd=ROOT, env=environ, stdout=pipe, stderr=pipe, text=True
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def told(redis: RedisServer, *arguments: str) -> str:
    with flask(redis, *arguments) as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    return out


def test_events_go_from_one_shell_to_another_by_http_and_by_redis(own_redis: RedisServer) -> None:
    environ = {"REDIS_URL": own_redis.url}
    with (
        serving("tests.redis_app:create_app()", "gthread", environ=environ) as server,
        flask(own_redis, "listen", f"{server.url}/stream", "--count=1") as by_http,
        flask(own_redis, "listen", "sse", "--raw") as by_redis,
        closing(RedisBroker(own_redis.url)) as broker,
    ):
        wait_for(lambda: broker.channels().get("sse") == 2)
        assert told(own_redis, "channels") == "sse\t2\n"
        id = told(own_redis, "publish", "sse", "Hello!", "--type=greeting").strip()
        out, err = by_http.communicate(timeout=20)
        assert re.fullmatch(rf"\d\d:\d\d:\d\d  greeting  {id}  Hello!\n", out)
        assert (by_http.returncode, err) == (0, "")
        assert by_redis.stdout
        lines = [by_redis.stdout.readline() for _ in range(4)]
        assert lines == ["event: greeting\n", "data: Hello!\n", f"id: {id}\n", "\n"]
        by_redis.send_signal(signal.SIGINT)
        assert (*by_redis.communicate(timeout=20), by_redis.returncode) == ("", "", 0)


def test_the_doctor_finds_nothing_wrong_where_nothing_is(redis: RedisServer) -> None:
    with canned(STREAM + chunked(b":\n") + b"...") as server:
        command = "gunicorn -k gthread --threads 20 -w 4 app:app"
        lines = told(redis, "doctor", server.url, "--idle=0.1", "--gunicorn", command).splitlines()
    assert re.fullmatch(rf"ok    the broker {redis.url} answers within \d+\.\d{{4}} s", lines[0])
    assert f"ok    gunicorn has 4 gthread workers, and the broker is {redis.url}" in lines
    assert f"ok    {server.url} answers 200 with text/event-stream" in lines
    assert not [line for line in lines if line.startswith("fail")]


# token


def test_a_token_is_what_the_first_blueprint_signs(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def token(self: EventStream, *channels: str, **options: Any) -> str:
        return json.dumps([self.name, channels, options])

    monkeypatch.setattr(EventStream, "token", token, raising=False)
    options = ["--max-age", "60", "--user", "7", "--claim", "a=b=c", "--claim", "d="]
    signed = json.loads(printed(run(app, "token", "news", "sport", *options)))
    expected = {"max_age": 60, "user": "7", "a": "b=c", "d": ""}
    assert signed == ["eventstream", ["news", "sport"], expected]
    plain = json.loads(printed(run(app, "token", "news")))
    assert plain == ["eventstream", ["news"], {"user": None}]


@pytest.mark.parametrize("claim", ["a", "=x", "a b=c", "user=8", "max_age=1", "self=1"])
def test_a_claim_that_is_none_is_refused(app: Flask, claim: str) -> None:
    assert "not of the form key=value" in refused(run(app, "token", "news", "--claim", claim))


# doctor


@pytest.mark.usefixtures("anywhere")
def test_the_doctor_prints_a_line_for_each_finding_and_its_cure(make_app: MakeApp) -> None:
    app = make_app(HEARTBEAT=70)
    app.secret_key = "secret"
    result = run(app, "doctor")
    lines = printed(result).splitlines()
    assert all(re.match("(ok    |warn  |      → )[a-zA-Z]", line) for line in lines)
    assert lines[0] == "ok    the broker is memory://, for one process"
    assert lines[1:3] == [
        "warn  how the server runs is not known",
        "      → tell how it is started: --gunicorn 'gunicorn -k gevent -w 4 app:app'",
    ]
    assert "warn  heartbeats come every 70 s, and nginx waits for 60" in lines
    assert "ok    the app has a SECRET_KEY, so tokens can be signed" in lines


@pytest.mark.usefixtures("anywhere")
def test_what_fails_is_told_by_the_exit_status(app: Flask) -> None:
    result = run(app, "doctor", "--gunicorn", "gunicorn -k gthread -w 4 app:app")
    assert result.exit_code == 1
    assert "fail  gunicorn has 4 gthread workers, and the broker is memory://" in result.stdout


@pytest.mark.usefixtures("anywhere")
def test_settings_that_cannot_be_read_are_a_finding(app: Flask) -> None:
    lines = printed(run(app, "doctor", "--gunicorn", "gunicorn --nonsense"))
    assert "warn  the settings of gunicorn cannot be read: error: unrecognized" in lines


@pytest.mark.usefixtures("anywhere")
def test_the_doctor_looks_at_a_stream_as_its_client(make_app: MakeApp) -> None:
    app = make_app(HEARTBEAT=10)
    with canned(STREAM + chunked(b":\n") + b"...") as server:
        result = run(app, "doctor", server.url, "--idle=0.3", "--header", "X-Own: 1", "--token=abc")
    line = "warn  the stream is open after 0.3 s, but heartbeats are due every 10 s"
    assert line in printed(result).splitlines()
    assert "X-Own: 1\r\n" in server.requests[0]
    assert "Authorization: Bearer abc\r\n" in server.requests[0]
    with canned(answered("403 Forbidden", "\x1b[2J")) as server:
        result = run(app, "doctor", server.url)
    assert result.exit_code == 1
    assert "answers 403 Forbidden \\x1b[2J\n" in result.stdout


def test_every_command_is_documented() -> None:
    page = (ROOT / "docs" / "cli.rst").read_text("utf-8")
    headings = set(re.findall(r"^``(\w+)``\n-+$", page, re.MULTILINE))
    assert headings == set(commands.commands)
