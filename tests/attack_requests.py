"""Random requests against the views of an app, valid ones and broken ones in all their parts.

As a program it says what came how often: ``python -m tests.attack_requests guarded 50000``, or
``open``. The seed is fixed; ``EVENTSTREAM_ATTACK_SEED`` is another one.
"""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import random
import re
import sys
import time
from collections import Counter, deque
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from flask import Flask, abort, request
from werkzeug.exceptions import BadRequest

from flask_eventstream import EventStream, ServerSentEvent
from flask_eventstream.errors import EventStreamError
from flask_eventstream.tokens import PREFIX

from .servers import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

SEED = int(os.environ.get("EVENTSTREAM_ATTACK_SEED", "20261"))
SECRET = "marker-of-the-secret-channel"
"""What nobody may read who sends random requests."""

LIMITS = {"MAX_SUBSCRIBERS": 15, "MAX_SUBSCRIBERS_PER_ADDRESS": 6, "MAX_SUBSCRIBERS_PER_USER": 4}
MOST_OPEN = 20

HEADERS = {
    "Allow", "Cache-Control", "Content-Length", "Content-Type", "Location", "Retry-After",
    "Vary", "WWW-Authenticate", "X-Accel-Buffering", "X-Run-Id",
}  # fmt: skip
"""All header fields that an answer may have."""

_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_LINE = re.compile(rb"(:.*|retry: \d+|event: .+|data: .*|id: [^\0]*)?(?<!\r)")
_ID = re.compile(rb"^id: (\S+)$", re.MULTILINE)


def create_app(is_guarded: bool, **config: Any) -> Flask:
    """Make an app with every kind of view; what is guarded has a function that judges."""
    app, eventstream = Flask(__name__), EventStream("eventstream", __name__)
    app.secret_key = "the key"
    app.config.update({f"EVENTSTREAM_{key}": value for key, value in LIMITS.items()})
    app.config.update(
        EVENTSTREAM_HEARTBEAT=1e-6,  # nothing waits for what does not come
        EVENTSTREAM_HISTORY_SECONDS=0.2,
        EVENTSTREAM_RUN_SECONDS=0.2,
        EVENTSTREAM_MAX_RUNS=20,
        EVENTSTREAM_MAX_RUNS_PER_OWNER=3,
        EVENTSTREAM_MAX_CHANNELS=8,
        EVENTSTREAM_MAX_EVENT_BYTES=10_000,
        MAX_CONTENT_LENGTH=20_000,
    )
    app.config.update(config)

    @eventstream.identify
    def user() -> str | None:
        return request.cookies.get("user")

    if is_guarded:

        @eventstream.authorize
        def may_read(channel: str) -> bool:
            if channel == "login":
                abort(401)
            return channel != "secret"

    @eventstream.stream("/generated/<int:number>")
    def generated(number: int) -> Iterator[Any]:
        if number > 100:
            abort(404)
        yield from ({"n": n, "said": request.args.get("say")} for n in range(number))

    @eventstream.resumable(
        "/run/<name>", owner=lambda: request.cookies.get("user"), on_busy="reject", heartbeat=1
    )
    def run(name: str) -> Iterator[Any]:
        sent = request.get_json(silent=True)
        yield f"{name} {sent}"
        if name.startswith("long"):
            time.sleep(0.1)
        yield ServerSentEvent("more", retry=7)

    app.register_blueprint(eventstream)
    app.add_url_rule("/health", view_func=eventstream.health)
    app.add_url_rule("/mine", "mine", lambda: mine(eventstream))
    app.add_url_rule("/publish", "publish", lambda: publish(eventstream), methods=["POST"])
    app.register_error_handler(EventStreamError, lambda error: BadRequest(str(error)))
    app.config["EVENTSTREAM"] = eventstream
    return app


def mine(eventstream: EventStream) -> Any:
    """Stream what the token of a request says, with a snapshot that has parts of the request."""
    token = eventstream.current_token()
    return eventstream.subscribe(
        *token.channels, snapshot=lambda: request.args.get("say"), history=3
    )


def publish(eventstream: EventStream) -> Any:
    """Publish what a request says, as it comes."""
    sent = request.get_json()
    if not isinstance(sent, dict):
        abort(400)
    fields = {name: sent[name] for name in ("type", "id", "retry", "channel") if name in sent}
    return {"id": eventstream.publish(sent.get("data"), **fields)}


class Words:
    """Where the parts of requests come from; the same seed gives the same ones.

    :param chance: what chooses.
    :param tokens: some that are valid.
    """

    PLAIN = ("a", "b", "sse", "open", "news", "login", "secret", "other", "1", "7", "end", "me")
    BROKEN = (
        "", "\r\n", "\r\nX-Evil: 1\r\n\r\n", "\n\ndata: evil\n\n", "a\rb", "\0", "\x1frun:x",
        "\x7f", "\x85", "\u2028", "\u2029", "\ufeff", "数据", "é", "🎉" * 70, "x" * 256, "x" * 9000,
        "<script>alert(1)</script>", "'\"><img src=x>", "id: evil", "event: evil", "../../etc",
        "//", "*", "?", "[a-z]", "\\", "%00", "%", "%zz", "%ff", "+", ";a=b", "-1", "0", "NaN",
        "eventstream:0:state", "1e999", "9" * 30, "²", "١", "{}", "null", PREFIX, "a" * 8 + "-3",
    )  # fmt: skip
    METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "get", "X\xff")
    PATHS = ("/stream", "/stream", "/stream", "/mine", "/stream/generated/3", "/health")
    BROKEN_PATHS = (
        "/stream/", "/stream//", "//stream", "/stream/generated/-3", "/stream/generated/999",
        "/static/../stream", "/stream;channel=secret", "/", "*", "", "/publish/", "/stream/run/",
    )  # fmt: skip

    def __init__(self, chance: random.Random, tokens: list[str]) -> None:
        self.chance = chance
        self.seen: deque[str] = deque(maxlen=50)
        self._tokens = tokens

    def text(self) -> str:
        kind = self.chance.random()
        if kind < 0.45:
            return self.chance.choice(self.PLAIN)
        if kind < 0.6 and self.seen:
            return self.chance.choice(self.seen)
        if kind < 0.95:
            return self.chance.choice(self.BROKEN)
        return "".join(chr(self.chance.randrange(0x800)) for _ in range(self.chance.randrange(9)))

    def token(self) -> str:
        kind, token = self.chance.random(), self.chance.choice(self._tokens)
        if kind < 0.6:
            return token
        if kind < 0.8:
            at = self.chance.randrange(len(token))
            return token[:at] + chr(33 + self.chance.randrange(94)) + token[at + 1 :]
        return token[: self.chance.randrange(len(token))] if kind < 0.9 else self.text()

    def line(self) -> tuple[str, str]:
        """Return a method and a path, which fit as a rule."""
        kind = self.chance.random()
        if kind < 0.5:
            method, path = "GET", self.chance.choice(self.PATHS)
        elif kind < 0.65:
            method, path = "POST", "/publish"
        elif kind < 0.85:
            name = f"long{self.chance.randrange(3)}" if kind < 0.75 else self.text()
            method, path = (
                self.chance.choice(("GET", "GET", "POST", "DELETE")),
                f"/stream/run/{name}",
            )
        else:
            method = self.chance.choice(self.METHODS)
            path = self.chance.choice((*self.PATHS, *self.BROKEN_PATHS, f"/{self.text()}"))
        return method, path

    def query(self) -> str:
        chosen = self.chance.choices(
            ("channel", "token", "lastEventId", "last_event_id", "run", "say", "_method"),
            (8, 2, 2, 1, 1, 1, 1),
            k=self.chance.choice((0, 0, 1, 1, 1, 2, 3, 12)),
        )
        pairs = []
        for name in chosen:
            value = self.token() if name == "token" else self.text()
            is_raw = self.chance.random() < 0.1
            pairs.append(f"{name}={value if is_raw else quote(value, errors='replace')}")
        # Raw characters are bytes, which WSGI hands over as latin-1. Those that are no UTF-8 make
        # Werkzeug fail in every view that looks at its query; gunicorn and waitress refuse them.
        return "&".join(pairs).encode("utf-8", "replace").decode("latin-1")

    def headers(self) -> dict[str, str]:
        found: dict[str, str] = {}
        if self.chance.random() < 0.3:
            found["HTTP_LAST_EVENT_ID"] = self.text()
        if self.chance.random() < 0.15:
            scheme = self.chance.choice(("Bearer", "bearer", "Basic", "", "Bearer Bearer"))
            found["HTTP_AUTHORIZATION"] = f"{scheme} {self.token()}"
        if self.chance.random() < 0.7:
            user = self.chance.choice("abcdef") if self.chance.random() < 0.9 else self.text()
            found["HTTP_COOKIE"] = f"user={user}"
        if self.chance.random() < 0.1:
            name = self.chance.choice(
                ("HOST", "X_HTTP_METHOD_OVERRIDE", "X_FORWARDED_FOR", "ACCEPT", "COOKIE", "RANGE")
            )
            found[f"HTTP_{name}"] = self.text()
        return {name: field.encode().decode("latin-1") for name, field in found.items()}

    def body(self) -> tuple[str, bytes]:
        kind = self.chance.random()
        if kind < 0.6:
            fields = {
                name: self.value()
                for name in ("data", "type", "id", "retry", "channel")
                if self.chance.random() < 0.5
            }
            return "application/json", json.dumps(fields).encode()
        content = self.text().encode() if kind < 0.95 else b"x" * 30_000
        types = ("application/json", "text/plain", "multipart/form-data; boundary=b", "\u00e9", "")
        return self.chance.choice(types), content

    def value(self) -> Any:
        kind = self.chance.random()
        others: tuple[Any, ...] = (None, True, 3, -1, 10**20, 1.5, [], ["a", "b"], {"a": "\ud800"})
        return self.chance.choice((*others, "\ud800")) if kind < 0.2 else self.text()

    def environ(self) -> dict[str, Any]:
        """Return a whole request."""
        method, path = self.line()
        kind, content = self.body() if method in {"POST", "PUT", "DELETE"} else ("", b"")
        length = str(len(content)) if self.chance.random() < 0.98 else self.text()[:99]
        return new_environ(
            method,
            path,
            self.query(),
            content,
            REMOTE_ADDR=f"192.0.2.{self.chance.randrange(4)}",
            CONTENT_TYPE=kind,
            CONTENT_LENGTH=length,
            **self.headers(),
        )


def new_environ(
    method: str, path: str, query: str = "", body: bytes = b"", **others: Any
) -> dict[str, Any]:
    """Return a WSGI environment; what it says need not be possible."""
    return {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path.encode("utf-8", "replace").decode("latin-1"),
        "QUERY_STRING": query,
        "SERVER_NAME": "test",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "192.0.2.9",
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        **others,
    }


class Answer:
    """What an app has answered, its body as far as it was read."""

    def __init__(self, app: Flask, environ: dict[str, Any]) -> None:
        self.code, self.fields = 0, [("", "")]
        self.items = app.wsgi_app(environ, self._start)
        self.body = b""
        self._rest = iter(self.items)
        self.read(2)

    def _start(self, status: str, fields: list[tuple[str, str]], *exc_info: Any) -> Any:
        self.code, self.fields = int(status[:3]), fields

    def __str__(self) -> str:
        return f"{self.code} {self.fields} {self.body[:500]!r}"

    def read(self, number: int) -> bytes:
        """Read on, so many pieces; return all of the body that was read."""
        self.body += b"".join(islice(self._rest, number))
        return self.body

    def close(self) -> None:
        getattr(self.items, "close", int)()

    def check(self) -> None:
        """Look whether it is well formed, no error of the server, and has nothing of a request."""
        headers = dict(self.fields)
        assert self.code < 500 or self.code == 503
        assert (self.code in {429, 503}) == ("Retry-After" in headers)
        assert headers.keys() <= HEADERS
        assert len(headers) == len(self.fields)
        for value in headers.values():
            assert _HEADER_VALUE.fullmatch(value)
        assert re.fullmatch("[-\\w]{12}", headers.get("X-Run-Id", "-" * 12))
        # What has two slashes is sent on by Werkzeug, to the host that the request names.
        start = "http://" if self.code == 308 else "/stream/run/"
        assert headers.get("Location", start).startswith(start)
        kind = headers.get("Content-Type", "")
        if kind == "text/event-stream; charset=utf-8":
            assert headers["Cache-Control"] == "no-cache, no-transform"
            assert all(_LINE.fullmatch(line) for line in self.body.split(b"\n"))
        elif kind.startswith("text/html"):
            assert not re.search(b"<(script|img)", self.body)


class Faults(logging.Handler):
    """Keeps what is logged with a traceback, or as an error."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.levelno >= logging.ERROR:
            self.found.append(self.format(record))


class Attack:
    """Sends random requests to an app, and looks at each answer.

    :ivar statuses: how often each came.
    """

    def __init__(self, app: Flask, seed: int, faults: Faults) -> None:
        self.app = app
        self.faults = faults
        self.statuses: Counter[int] = Counter()
        self._chance = random.Random(seed)
        with app.app_context():
            eventstream: EventStream = app.config["EVENTSTREAM"]
            named = [("a",), ("b", "other"), ("news",), (), ("login",)]
            tokens = [
                eventstream.token(*names, user=names[0] if names else None) for names in named
            ]
            tokens += [eventstream.token("a", max_age=1e-3), eventstream.token("a", user="gone")]
            eventstream.revoke("gone")
        self._words = Words(self._chance, tokens)
        self._open: list[Answer] = []

    def send(self, number: int) -> None:
        """Send so many requests, and close all that they have opened."""
        for n in range(number):
            self._send_one(self._words.environ())
            if n % 500 == 0:
                with self.app.app_context():
                    self.app.config["EVENTSTREAM"].publish(
                        SECRET, id=f"{SECRET}-{n}", channel="secret"
                    )
        while self._open:
            self._open.pop().close()

    def _send_one(self, environ: dict[str, Any]) -> None:
        answer = Answer(self.app, environ)
        self.statuses[answer.code] += 1
        try:
            answer.check()
            assert SECRET not in f"{answer.fields} {answer.body!r}"
        except AssertionError as error:
            sent = environ["wsgi.input"].getvalue()[:300]
            evidence = f"{answer} for {environ} {sent!r} {self.faults.found[-1:]}"
            raise AssertionError(evidence) from error
        self._words.seen.extend(id.decode() for id in _ID.findall(answer.body)[:1])
        if answer.code != 200 or "/generated/" in environ["PATH_INFO"]:
            # Of streams that have a request's context, one thread serves one at a time.
            answer.close()
            return
        # Some clients stay for a while, others leave at once.
        self._open.append(answer)
        if len(self._open) > MOST_OPEN or self._chance.random() < 0.3:
            self._open.pop(self._chance.randrange(len(self._open))).close()


def objects() -> int:
    gc.collect()
    return len(gc.get_objects())


def main(kind: str, number: int) -> None:
    """Send so many requests to an app, and print what came."""
    faults = Faults()
    logging.getLogger().addHandler(faults)
    attack = Attack(create_app(kind == "guarded"), SEED, faults)
    begin = time.monotonic()
    attack.send(number // 10)
    settle(attack.app)
    before = objects()  # what is made once is there by now
    attack.send(number - number // 10)
    settle(attack.app)
    figures = {
        "seed": SEED,
        "seconds": round(time.monotonic() - begin, 1),
        "grown": objects() - before,
        "faults": faults.found[:3],
        "statuses": attack.statuses,
    }
    print(json.dumps(figures))


def settle(app: Flask) -> None:
    """Wait until nothing is left of what the requests have opened and started."""
    state = app.extensions["eventstream"]
    wait_for(lambda: not state.runs.is_busy, what="all runs to end")
    assert state.broker.subscriptions == state.places.taken == 0
    # What is over is swept by what comes after it.
    time.sleep(0.3)
    with app.app_context():
        for _ in range(100):
            app.config["EVENTSTREAM"].publish("x", channel="sse")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
