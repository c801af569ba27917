"""The client's socket out of real servers: which road is taken, and that nobody can tell."""

from __future__ import annotations

import errno
import gzip
import importlib
import io
import os
import socket
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import flask
import httpx
import pytest

from flask_eventstream import EventStreamResponse, ServerSentEvent, descriptors
from flask_eventstream.hijack import (
    Hijacked,
    HijackingBody,
    ServerSocket,
    closing,
    prepare,
    server_socket,
)
from flask_eventstream.subscriber import framed
from flask_eventstream.testing import client_stream

from .hijack_apps import CHANGING, EARLIER, LIVE, PASSING
from .roads import (
    HIJACKABLE,
    KEEPING_ALIVE,
    NO_HEADERS,
    ONE_AT_A_TIME,
    READING_BODIES,
    SERVERS,
    TIMEOUT,
    Client,
    Site,
    Sites,
    numbered,
)
from .servers import free_port, running, serving, system_part, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import h11
    from flask import Flask


ROADS = ["", "/iterated"]
ASKED_MEANWHILE = [
    (name, app) for name in HIJACKABLE for app in ROADS if not app or name not in ONE_AT_A_TIME
]
"""The roads on which a server answers others while a stream is open."""
FIRST_BYTES = b":\nretry: 0\n"
FIELDS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",
}
GREETING = (
    b"POST /greeting HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
)
UNNOTICED = {"split", "preceded_by_nothing"}
"""Middleware that some servers make nothing of: they write the same bytes as without it."""
OTHER_APPS = ["/iterated", "/beating"]


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    with ExitStack() as stack:
        sites = Sites(tmp_path_factory.mktemp("sites"), stack)
        yield sites
        sites.stop()
        assert sites.failures() == []


def wire_of(events: Iterable[ServerSentEvent]) -> bytes:
    numbers = map(str, count(1))
    return b"".join([event.with_id(event.id or next(numbers)).encode() for event in events])


PLAYED = FIRST_BYTES + wire_of([*EARLIER, *LIVE])
# What the hub cannot take must not take the only thread of a worker.
ITERATED = {"sync": FIRST_BYTES + wire_of(EARLIER)}


class Stream(NamedTuple):
    """A whole answer."""

    status: int
    fields: dict[str, str]
    body: bytes


def fields_of(head: h11.Response) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in head.headers}


def app_of(target: str) -> str:
    """Return the prefix of the app that serves a target; all middleware has the same one."""
    return next((prefix for prefix in OTHER_APPS if target.startswith(prefix)), "")


def is_deserted(counts: dict[str, int]) -> bool:
    is_told = counts.get("connected", 0) == counts.get("disconnected", 0)
    return is_told and counts["subscribers"] == counts["sockets"] == 0


def becomes_deserted(site: Site, app: str = "") -> None:
    wait_for(lambda: is_deserted(site.counts(app)), what="nobody to be subscribed")


def play(
    site: Site,
    target: str,
    *,
    is_hijacked: bool | None,
    is_local: bool = False,
    is_new: bool = False,
    method: str = "GET",
    body: bytes = b"",
    version: str = "1.1",
    headers: Mapping[str, str] = NO_HEADERS,
) -> Stream:
    """Read a stream to its end, whose events come before the client and while it is there.

    The client comes with a cursor unless it is new. Which road it took is asserted, if known.
    """
    app = app_of(target)
    becomes_deserted(site, app)
    before = site.counts(app).get("hijacked", 0)
    cursor = site.post(f"{app}/play")["cursor"]
    with site.client(is_local) as client:
        came_with = {} if is_new else {"Last-Event-ID": cursor}
        client.ask(target, method, body, version, {**headers, **came_with})
        head, answer = client.head(), client.body()
        assert not is_hijacked or client.rest() == b""
    site.post(f"{app}/play/end")
    assert is_hijacked in {None, site.counts(app).get("hijacked", 0) - before}
    return Stream(head.status_code, fields_of(head), answer)


@contextmanager
def reading(
    site: Site, target: str = "/stream", headers: Mapping[str, str] = NO_HEADERS
) -> Iterator[Client]:
    """Read a stream that has begun."""
    with site.client() as client:
        client.ask(target, headers=headers)
        assert client.head().status_code == 200
        assert client.until(FIRST_BYTES) == FIRST_BYTES
        yield client


# Every server, both roads


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("name", SERVERS)
def test_both_roads_send_the_same_bytes(sites: Sites, name: str, version: str) -> None:
    site = sites(name)
    hijacked = play(site, "/stream", is_hijacked=name in HIJACKABLE, version=version)
    iterated = play(site, "/iterated/stream", is_hijacked=False, version=version)
    assert numbered(hijacked.body) == numbered(iterated.body) == PLAYED
    assert hijacked.status == iterated.status == 200
    of_one = {"date": "", "connection": ""}
    assert hijacked.fields | of_one == iterated.fields | of_one
    assert hijacked.fields.items() >= FIELDS.items()
    # It ends with the stream. What the server iterates is the server's.
    assert hijacked.fields["connection"] == "close" or name not in HIJACKABLE


@pytest.mark.parametrize("target", ["/stream", "/iterated/stream"])
@pytest.mark.parametrize("name", ["gevent", "gthread", "sync"])
def test_a_unix_socket_is_as_good(sites: Sites, name: str, target: str) -> None:
    is_hijacked = target == "/stream"
    stream = play(sites(name), target, is_hijacked=is_hijacked, is_local=True)
    assert numbered(stream.body) == PLAYED
    assert stream.fields.items() >= FIELDS.items()


@pytest.mark.parametrize("name", HIJACKABLE)
def test_a_hijacked_stream_begins_at_once_and_keeps_nobody_from_being_served(
    sites: Sites, name: str
) -> None:
    site = sites(name)
    with reading(site) as one, reading(site) as other:
        assert site.counts()["sockets"] == 2
        for n in range(3):
            wire = b"data: %d\nid: %b\n\n" % (n, site.publish(n).encode())
            assert one.until(b"\n\n") == other.until(b"\n\n") == wire
        assert site.post("/disconnect") == [2]
        for client in (one, other):
            assert client.body() == b""
            assert client.rest() == b""


@pytest.mark.parametrize("name", HIJACKABLE)
def test_a_client_that_leaves_is_noticed_without_a_heartbeat(sites: Sites, name: str) -> None:
    site = sites(name)
    with reading(site):
        assert site.counts()["sockets"] == 1
    becomes_deserted(site)


# What is not hijacked


@pytest.mark.parametrize("name", SERVERS)
def test_head_is_answered_without_a_subscription(sites: Sites, name: str) -> None:
    site = sites(name)
    becomes_deserted(site)
    before = site.counts()
    with site.client() as client:
        client.ask("/stream", "HEAD")
        head = client.head()
        assert client.body() == b""
    assert head.status_code == 200
    assert fields_of(head).items() >= FIELDS.items()
    assert site.counts() == before


@pytest.mark.parametrize("target", ["/subscribe?gzip", "/subscribe?coding", "/zipped/stream"])
@pytest.mark.parametrize("name", HIJACKABLE)
def test_with_a_content_coding_the_server_keeps_its_socket(
    sites: Sites, name: str, target: str
) -> None:
    stream = play(sites(name), target, is_hijacked=False)
    is_zipped = stream.fields["content-encoding"] == "gzip"
    assert is_zipped == ("zip" in target)
    body = gzip.decompress(stream.body) if is_zipped else stream.body
    assert numbered(body) == ITERATED.get(name, PLAYED)


@pytest.mark.parametrize("change", CHANGING)
@pytest.mark.parametrize("name", HIJACKABLE)
def test_middleware_that_changes_the_items_gets_all_of_them(
    sites: Sites, name: str, change: str
) -> None:
    is_hijacked = None if change in UNNOTICED else False
    stream = play(sites(name), f"/{change}/stream", is_hijacked=is_hijacked)
    start = b":hello\n" if change == "introduced" else b""
    assert numbered(stream.body) == start + ITERATED.get(name, PLAYED)


def test_a_test_client_iterates(app: Flask) -> None:
    with client_stream(app.test_client(), "/stream"):
        assert app.extensions["eventstream"].broker.subscriber_count() == 1
        assert not app.extensions["eventstream"].hub._is_running


def test_a_server_that_forks_for_each_request_keeps_the_socket(sites: Sites) -> None:
    # The process ends with the response, and a hub in it would, too.
    with reading(sites("werkzeug-forking"), "/beating/stream") as client:
        assert client.until(b":\n:\n") == b":\n:\n"


@pytest.mark.parametrize("worker", [["gthread", "--threads=4"], ["gevent"]])
def test_http_2_streams_are_iterated(worker: list[str]) -> None:
    pytest.importorskip("h2")
    pytest.importorskip("gunicorn.http2")
    options = ["--http-protocols=h2,h1", "--http2-cleartext=prior-knowledge"]
    # Or the server may close the connection between two requests.
    options += ["--keep-alive=300"]
    with (
        serving("tests.hijack_apps:create_site()", *worker, *options) as server,
        httpx.Client(http1=False, http2=True, base_url=server.url, timeout=TIMEOUT) as client,
    ):
        cursor = client.post("/play").json()["cursor"]
        answer = client.get("/stream", headers={"Last-Event-ID": cursor})
        assert answer.http_version == "HTTP/2"
        assert numbered(answer.content) == PLAYED
        assert "hijacked" not in client.get("/counts").json()


# What is hijacked all the same


@pytest.mark.parametrize("name", READING_BODIES)
def test_a_body_that_the_view_has_read_is_no_obstacle(sites: Sites, name: str) -> None:
    request: Any = {"method": "POST", "headers": {"Content-Type": "application/json"}}
    request["body"] = b'{"channel": "sse"}'
    stream = play(sites(name), "/subscribe?json", is_hijacked=True, **request)
    assert numbered(stream.body) == PLAYED


@pytest.mark.parametrize("headers", [{}, {"Transfer-Encoding": "chunked"}])
@pytest.mark.parametrize("name", HIJACKABLE)
def test_a_body_that_the_view_does_not_read_is_no_obstacle(
    sites: Sites, name: str, headers: dict[str, str]
) -> None:
    request: Any = {"method": "POST", "body": b"unread", "headers": headers}
    stream = play(sites(name), "/subscribe", is_hijacked=True, **request)
    assert numbered(stream.body) == PLAYED


@pytest.mark.parametrize("middleware", PASSING)
@pytest.mark.parametrize("name", HIJACKABLE)
def test_middleware_that_passes_the_items_on_is_no_obstacle(
    sites: Sites, name: str, middleware: str
) -> None:
    stream = play(sites(name), f"/{middleware}/stream", is_hijacked=True)
    assert numbered(stream.body) == PLAYED


# Connections that carry more than one request


@pytest.mark.parametrize("name", KEEPING_ALIVE)
def test_a_connection_that_carried_requests_before_is_hijacked(sites: Sites, name: str) -> None:
    site = sites(name)
    with site.client() as client:
        for n in range(3):
            client.ask(f"/greeting?name={n}")
            assert client.answer() == (200, b"hello %d" % n)
        client.ask("/greeting", "POST", b"not read by the view")
        assert client.answer() == (200, b"hello ")
        client.ask("/stream")
        assert client.head().status_code == 200
        assert client.until(FIRST_BYTES) == FIRST_BYTES
        assert site.counts()["sockets"] == 1
        id = site.publish("x").encode()
        assert client.until(b"\n\n") == b"data: x\nid: %b\n\n" % id
        site.post("/disconnect")
        assert client.body() == b""
        assert client.rest() == b""


@pytest.mark.parametrize("target", ["/stream", "/iterated/stream"])
@pytest.mark.parametrize("name", HIJACKABLE)
def test_a_request_that_comes_with_that_of_a_stream_is_answered_or_not_run(
    sites: Sites, name: str, target: str
) -> None:
    site, app = sites(name), app_of(target)
    becomes_deserted(site, app)
    greeted = site.counts(app).get("greeted", 0)
    cursor = site.post(f"{app}/play")["cursor"]
    with site.client() as client:
        first = client.request(target, headers={"Last-Event-ID": cursor})
        client.send(first + GREETING.replace(b"/greeting", f"{app}/greeting".encode()))
        assert client.head().status_code == 200
        assert numbered(client.body()) == PLAYED
        answers = client.rest().count(b"hello ")
    assert site.counts(app).get("greeted", 0) - greeted == answers


@pytest.mark.parametrize("name", HIJACKABLE)
def test_a_request_that_comes_during_a_hijacked_stream_is_not_run(sites: Sites, name: str) -> None:
    site = sites(name)
    greeted = site.counts().get("greeted", 0)
    with reading(site) as client:
        client.send(GREETING)
        site.publish("x")
        assert b"data: x\n" in client.until(b"\n\n")
        site.post("/disconnect")
        assert client.body() == b""
        assert client.rest() == b""
    assert site.counts().get("greeted", 0) == greeted


@pytest.mark.parametrize("more", ["a body", "a request"])
@pytest.mark.parametrize("name", ONE_AT_A_TIME)
def test_a_request_with_more_than_its_head_keeps_nobody_from_being_served(
    sites: Sites, name: str, more: str
) -> None:
    site = sites(name)
    with site.client() as client:
        body = more.encode() if more == "a body" else b""
        wire = client.request("/beating/stream", body=body)
        client.send(wire if body else wire + GREETING)
        assert client.head().status_code == 200
        assert client.until(FIRST_BYTES) == FIRST_BYTES
        assert site.counts("/beating")["subscribers"] == 1


@pytest.mark.parametrize("name", KEEPING_ALIVE)
def test_a_stream_that_is_asked_for_with_the_request_before_it_is_answered(
    sites: Sites, name: str
) -> None:
    site = sites(name)
    with site.client() as client:
        stream = b"GET /stream HTTP/1.1\r\nHost: test\r\n\r\n"
        client.send(client.request("/greeting") + stream)
        assert client.answer() == (200, b"hello ")
        assert client.request("/stream") == stream
        assert client.head().status_code == 200
        assert client.until(FIRST_BYTES) == FIRST_BYTES
        assert site.counts()["sockets"] == 1


# nginx


NGINX = """
daemon off; pid nginx.pid; error_log stderr;
events {{ }}
http {{
    access_log off; {temporary}
    {upstreams}
    server {{
        listen 127.0.0.1:{port};
        {locations}
    }}
}}
"""
NGINX_SITES = ["gevent", "gthread", "sync"]
NGINX_OPTIONS = {
    "default": "",
    "unbuffered": "proxy_buffering off;",
    "keepalive": 'proxy_http_version 1.1; proxy_set_header Connection "";',
    "unbuffered-keepalive": (
        'proxy_buffering off; proxy_http_version 1.1; proxy_set_header Connection "";'
    ),
}


def nginx_config(sites: Sites, port: int) -> str:
    parts = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
    return NGINX.format(
        port=port,
        temporary=" ".join([f"{part}_temp_path {part};" for part in parts]),
        upstreams=" ".join(
            [
                f"upstream {name} {{ server 127.0.0.1:{sites(name).server.port}; keepalive 4; }}"
                for name in NGINX_SITES
            ]
        ),
        locations=" ".join(
            [
                f"location /{name}/{option}/ {{ {directives} proxy_pass http://{name}/; }}"
                for name in NGINX_SITES
                for option, directives in NGINX_OPTIONS.items()
            ]
        ),
    )


@pytest.fixture(scope="module")
def proxy(sites: Sites, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    program, home, port = system_part("nginx"), tmp_path_factory.mktemp("nginx"), free_port()
    (home / "nginx.conf").write_text(nginx_config(sites, port), "utf-8")
    with running([program, "-p", str(home), "-c", "nginx.conf", "-e", "stderr"], port) as server:
        yield Site(server, None, home)


@pytest.mark.parametrize("option", NGINX_OPTIONS)
@pytest.mark.parametrize("name", NGINX_SITES)
def test_through_nginx_a_hijacked_stream_begins_at_once_and_goes_on(
    sites: Sites, proxy: Site, name: str, option: str
) -> None:
    site = sites(name)
    becomes_deserted(site)
    with reading(proxy, f"/{name}/{option}/stream") as client:
        assert site.counts()["sockets"] == 1
        for n in range(3):
            id = site.publish(n).encode()
            assert client.until(b"\n\n") == b"data: %d\nid: %b\n\n" % (n, id)
        site.post("/disconnect")
        assert client.body() == b""


@pytest.mark.parametrize("option", NGINX_OPTIONS)
@pytest.mark.parametrize("name", NGINX_SITES)
def test_a_client_that_leaves_nginx_is_noticed_without_a_heartbeat(
    sites: Sites, proxy: Site, name: str, option: str
) -> None:
    site = sites(name)
    becomes_deserted(site)
    with reading(proxy, f"/{name}/{option}/stream"):
        assert site.counts()["sockets"] == 1
    becomes_deserted(site)


# The server's own business


@pytest.mark.parametrize("prefix", ["", *[f"/{name}" for name in PASSING]])
@pytest.mark.parametrize("name", HIJACKABLE)
def test_a_hijacked_response_is_logged_once_and_as_a_success(
    sites: Sites, name: str, prefix: str
) -> None:
    site, target = sites(name), f"{prefix}/stream?marked-for-the-log"
    play(site, target, is_hijacked=True)
    [line] = wait_for(lambda: lines_about(site, f"GET {target}"), what=f"{target} in the log")
    assert "200" in line
    if name in {"gevent", "gthread", "sync"}:
        wait_for(lambda: lines_about(site, f"after {target} 200 OK"), what="the hook to run")
        assert len(lines_about(site, target)) == 2


def lines_about(site: Site, words: str) -> list[str]:
    return [line for line in site.server.log().splitlines() if words in line]


@pytest.mark.parametrize(("name", "app"), ASKED_MEANWHILE)
@pytest.mark.parametrize("does_leave", [False, True])
def test_what_is_to_be_called_on_close_is_called_when_the_stream_ends(
    sites: Sites, name: str, app: str, does_leave: bool
) -> None:
    site = sites(name)
    becomes_deserted(site, app)
    before = site.counts(app)
    with reading(site, f"{app}/subscribe?closers") as client:
        assert site.counts(app).get("closed", 0) == before.get("closed", 0)
        assert site.counts(app).get("disconnected", 0) == before.get("disconnected", 0)
        if not does_leave:
            assert site.post(f"{app}/disconnect") == [1]
            assert client.body() == b""
    if does_leave and app:
        # Without a heartbeat it is found out by what is published.
        wait_for(lambda: site.publish("x", app) and site.counts(app)["subscribers"] == 0)
    wait_for(lambda: site.counts(app).get("second closer", 0) > before.get("second closer", 0))
    after = site.counts(app)
    for event in ("closed", "first closer", "second closer", "connected", "disconnected"):
        assert after[event] == before.get(event, 0) + 1, event


@pytest.mark.parametrize("app", ROADS)
@pytest.mark.parametrize("name", SERVERS)
def test_a_cookie_of_the_view_arrives(sites: Sites, name: str, app: str) -> None:
    is_hijacked = name in HIJACKABLE and not app
    stream = play(sites(name), f"{app}/subscribe?session", is_hijacked=is_hijacked)
    assert stream.fields["set-cookie"].startswith("session=")
    assert stream.fields["vary"] == "Cookie"


# Sizes


@pytest.mark.parametrize(("cookies", "is_hijacked"), [(15, True), (20, False)])
@pytest.mark.parametrize("name", HIJACKABLE)
def test_a_large_head_arrives(sites: Sites, name: str, cookies: int, is_hijacked: bool) -> None:
    site = sites(name)
    becomes_deserted(site)
    stream = play(site, f"/subscribe?cookies={cookies}", is_hijacked=is_hijacked)
    assert stream.fields["set-cookie"] == f"cookie-{cookies - 1}={'c' * 4000}; Path=/"
    assert numbered(stream.body) == (PLAYED if is_hijacked else ITERATED.get(name, PLAYED))


@pytest.mark.parametrize("app", ROADS)
@pytest.mark.parametrize("name", HIJACKABLE)
def test_a_large_snapshot_arrives(sites: Sites, name: str, app: str) -> None:
    target = f"{app}/subscribe?snapshot=5000000"
    stream = play(sites(name), target, is_hijacked=not app, is_new=True)
    events = wire_of([ServerSentEvent("s" * 5_000_000), *LIVE])
    assert numbered(stream.body) == FIRST_BYTES + events


@pytest.mark.parametrize("name", HIJACKABLE)
def test_a_large_history_arrives(sites: Sites, name: str) -> None:
    site = sites(name)
    cursor = site.publish("first")
    texts = ["h" * 200_000] * 15 + ["the end"]
    for text in texts:
        site.publish(text)
    with site.client() as client:
        client.ask("/stream", headers={"Last-Event-ID": cursor})
        assert client.head().status_code == 200
        wire = b""
        while b"data: the end\n" not in wire:
            wire += client.until(b"\n\n")
        assert site.counts()["sockets"] == 1
    assert numbered(wire) == FIRST_BYTES + wire_of(map(ServerSentEvent, texts))


# A stand-in for a server, and no more than the body

HEAD = b"HTTP/1.1 200 OK\r\nServer: stand-in\r\n\r\n"
CHUNKED_HEAD = HEAD.replace(b"\r\n\r\n", b"\r\ntransfer-encoding: chunked\r\n\r\n")
ITEMS = [b"first", b"second", b"third"]


class StandIn:
    """A server whose client's socket is one of a pair, and which serves one response."""

    def __init__(
        self,
        head: bytes = HEAD,
        take: Callable[[Hijacked], BaseException | None] | None = None,
        then: Callable[[], object] = bool,
    ) -> None:
        self._client, self.socket = socket.socketpair()
        self._client.settimeout(TIMEOUT)
        self._head = head
        self.taken: list[Hijacked] = []
        self.closed = self.forgotten = 0
        server = ServerSocket(self.socket, self._forget_rest)
        take = take or self.taken.append
        self.body = HijackingBody(server, iter(ITEMS), take, self._close, then)

    def _forget_rest(self) -> None:
        self.forgotten += 1

    def _close(self) -> None:
        self.closed += 1

    def serve(self, frame: Callable[[bytes], bytes] = bytes) -> None:
        head = self._head
        try:
            for item in self.body:
                self.socket.sendall(head + frame(item))
                head = b""
            self.socket.sendall(b"the end")
        finally:
            self.body.close()

    def received(self) -> bytes:
        """Return what the client gets until everybody has closed its connection."""
        self.socket.close()
        with self._client:
            return b"".join(iter(lambda: self._client.recv(65536), b""))

    def leave(self) -> None:
        self._client.close()
        self.socket.close()


@pytest.fixture
def stand_in() -> Iterator[Callable[..., StandIn]]:
    servers: list[StandIn] = []

    def make(*arguments: Any, **options: Any) -> StandIn:
        servers.append(StandIn(*arguments, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.leave()


def chunk(item: bytes) -> bytes:
    return framed(item, True)


@pytest.mark.parametrize(
    ("head", "frame", "first"),
    [(HEAD, bytes, b"first"), (CHUNKED_HEAD, chunk, b"5\r\nfirst\r\n")],
    ids=["plain", "chunked"],
)
def test_the_socket_is_handed_over_with_what_the_server_wrote(
    stand_in: Callable[..., StandIn], head: bytes, frame: Callable[[bytes], bytes], first: bytes
) -> None:
    server = stand_in(head)
    server.serve(frame)
    [hijacked] = server.taken
    closing_head = head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    assert hijacked[1:] == (closing_head + first, head is CHUNKED_HEAD)
    assert (server.closed, server.forgotten) == (0, 1)
    os.write(hijacked.descriptor, b"from us")
    os.close(hijacked.descriptor)
    assert server.received() == b"from us"


@pytest.mark.parametrize(
    ("head", "frame"),
    [
        (HEAD, chunk),
        (CHUNKED_HEAD, bytes),
        (CHUNKED_HEAD, lambda item: chunk(item.upper() + b"!")),
        (HEAD.replace(b"Server", b"Content-Encoding"), bytes),
        (HEAD.replace(b"Server: stand-in", b"Content-Length: 16"), bytes),
        (HEAD + b"more", bytes),
        (b"", bytes),
    ],
)
def test_what_is_not_as_expected_is_given_back(
    stand_in: Callable[..., StandIn], head: bytes, frame: Callable[[bytes], bytes]
) -> None:
    server = stand_in(head)
    server.serve(frame)
    assert server.taken == []
    assert (server.closed, server.forgotten) == (1, 0)
    assert server.received() == head + b"".join(map(frame, ITEMS)) + b"the end"


def fail(*args: Any) -> Any:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize("owner", [socket, socket.socket], ids=["pair", "client"])
def test_without_descriptors_for_the_pair_the_response_goes_on(
    stand_in: Callable[..., StandIn], monkeypatch: pytest.MonkeyPatch, owner: Any
) -> None:
    server = stand_in()
    monkeypatch.setattr(owner, "socketpair" if owner is socket else "dup", fail)
    server.serve()
    assert (server.taken, server.closed) == ([], 1)
    assert server.received() == HEAD + b"".join(ITEMS) + b"the end"


def test_a_socket_that_nobody_could_take_is_closed(stand_in: Callable[..., StandIn]) -> None:
    server = stand_in(take=fail)
    with suppress(OSError):
        server.serve()
    assert server.closed == 1
    assert server.received() == b""


ANSWERS = {
    b"": b"",
    b"Connection: keep-alive": b"",
    b"CONNECTION:Keep-Alive": b"",
    b"connection: close": b"",
    b"Keep-Alive: timeout=5, max=100\r\nA: 1": b"\r\nA: 1",
    b"Connection: keep-alive, Upgrade\r\nUpgrade: h2c": b"",
    b"Connection: keep-alive\r\nA: 1\r\nConnection: close\r\nB: 2": b"\r\nA: 1\r\nB: 2",
    b"Connection:\r\n keep-alive,\r\n\tclose\r\nA: 1": b"\r\nA: 1",
    b"A: 1\r\n Connection: keep-alive": b"\r\nA: 1 Connection: keep-alive",
    b"Proxy-Connection: keep-alive\r\nConnection : keep-alive": b"",
    b"Connection: ,, keep-alive ,": b"",
    b"X: Connection\r\nConnection-Id: 7": b"\r\nX: Connection\r\nConnection-Id: 7",
}
"""Fields of a head, and what is left of them in one that says that the connection ends."""


@pytest.mark.parametrize("fields", ANSWERS)
@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/1.0"])
def test_the_head_says_that_the_connection_ends_with_the_stream(
    fields: bytes, version: bytes
) -> None:
    start, body = version + b" 200 OK", b"\r\n\r\nConnection: keep-alive\r\n\r\nbody"
    kept = ANSWERS[fields]
    wire = start + (b"\r\n" + fields if fields else b"") + body
    assert closing(wire) == start + kept + b"\r\nConnection: close" + body


def test_an_option_that_keeps_a_field_from_going_further_is_kept() -> None:
    head = b"HTTP/1.1 200 OK\r\nConnection: Keep-Alive, X-Inside\r\nX-Inside: 1\r\n\r\n"
    expected = b"HTTP/1.1 200 OK\r\nX-Inside: 1\r\nConnection: close, X-Inside\r\n\r\n"
    assert closing(head) == expected


# The servers that are known

ENVIRON = {"SERVER_PROTOCOL": "HTTP/1.1", "REQUEST_METHOD": "GET", "wsgi.multithread": True}


@pytest.fixture
def plain() -> Iterator[socket.socket]:
    with socket.socket() as one:
        yield one


def of_gunicorn(found: socket.socket) -> dict[str, Any]:
    body = SimpleNamespace(reader=SimpleNamespace(length=0, unreader=SimpleNamespace()))
    return {**ENVIRON, "gunicorn.socket": found, "wsgi.input": body}


def of_werkzeug(found: socket.socket) -> dict[str, Any]:
    own = {"werkzeug.socket": found, "wsgi.input": io.BytesIO(), "wsgi.multiprocess": False}
    return ENVIRON | own


def of_pywsgi(found: socket.socket, length: int, **arguments: Any) -> dict[str, Any]:
    pywsgi = importlib.import_module("gevent.pywsgi")
    return {**ENVIRON, "wsgi.input": pywsgi.Input(found.makefile("rb"), length, **arguments)}


@pytest.mark.parametrize("name", ["gunicorn", "werkzeug", "pywsgi"])
def test_the_sockets_of_three_servers_are_known(plain: socket.socket, name: str) -> None:
    environs = {
        "gunicorn": of_gunicorn(plain),
        "werkzeug": of_werkzeug(plain),
        "pywsgi": of_pywsgi(plain, 0),
    }
    found = server_socket(environs[name])
    assert found is not None
    assert found.socket is plain


def rest_in_gunicorn(wire: bytes, body: bytes, size: int) -> bytes:
    """Return what gunicorn still has to read of a request, of whose body a view has read a part.

    It forgets the rest before that.
    """
    parser = importlib.import_module("gunicorn.http.parser")
    config = importlib.import_module("gunicorn.config").Config()
    requests = parser.RequestParser(config, iter([wire + body]), ("127.0.0.1", 1))
    request = next(requests)
    request.body.read(size)
    with socket.socket() as plain:
        found = server_socket(of_gunicorn(plain) | {"wsgi.input": request.body})
        assert found is not None
        found.forget_rest()
    with pytest.raises(StopIteration):
        next(requests)
    rest: bytes = requests.unreader.read()
    return rest


def rest_in_pywsgi(wire: bytes, body: bytes, size: int) -> bytes:
    pywsgi = importlib.import_module("gevent.pywsgi")
    client, connection = socket.socketpair()
    with client, connection, connection.makefile("rb") as file:
        client.sendall(b"x" + body)
        client.shutdown(socket.SHUT_WR)
        file.read(1)
        length = None if b"chunked" in wire else len(BODY)
        request_body = pywsgi.Input(file, length, chunked_input=length is None)
        request_body.read(size)
        found = server_socket(ENVIRON | {"wsgi.input": request_body})
        assert found is not None
        found.forget_rest()
        request_body._discard()
        rest: bytes = file.read()
    return rest


def chunk_of(item: bytes) -> bytes:
    return framed(item, True) + b"0\r\n\r\n"


BODY = b"a body that nobody wants"
REQUESTS = {
    "nothing": (b"", b"", 0),
    "a request": (b"", GREETING, 0),
    "a body": (b"Content-Length: %d\r\n" % len(BODY), BODY + GREETING, 0),
    "half a body": (b"Content-Length: %d\r\n" % len(BODY), BODY + GREETING, 9),
    "chunks": (b"Transfer-Encoding: chunked\r\n", chunk_of(BODY) + GREETING, 0),
    "half a chunk": (b"Transfer-Encoding: chunked\r\n", chunk_of(BODY) + GREETING, 9),
}


@pytest.mark.parametrize("rest_in", [rest_in_gunicorn, rest_in_pywsgi])
@pytest.mark.parametrize("what", REQUESTS)
def test_a_server_forgets_what_came_behind_the_head_of_a_stream(
    rest_in: Callable[..., bytes], what: str
) -> None:
    fields, behind, size = REQUESTS[what]
    wire = b"POST /stream HTTP/1.1\r\nHost: test\r\n" + fields + b"\r\n"
    assert rest_in(wire, behind, size) == b""


@pytest.mark.parametrize(
    "environ",
    [
        {"SERVER_PROTOCOL": "HTTP/2.0"},
        {"SERVER_PROTOCOL": "HTTP/0.9"},
        {"SERVER_PROTOCOL": None},
        {"REQUEST_METHOD": "HEAD"},
        # As it is with middleware around the input.
        {"wsgi.input": SimpleNamespace(reader=object())},
        {"wsgi.input": io.BytesIO()},
        {"gunicorn.socket": None},
    ],
)
def test_what_does_not_look_as_gunicorns_is_not_hijacked(
    plain: socket.socket, environ: dict[str, Any]
) -> None:
    assert server_socket(of_gunicorn(plain) | environ) is None


def test_a_process_that_werkzeug_forks_for_a_request_keeps_the_socket(plain: socket.socket) -> None:
    assert server_socket(of_werkzeug(plain) | {"wsgi.multiprocess": True}) is None


def test_a_socket_that_is_more_than_a_socket_is_not_hijacked() -> None:
    class Encrypting(socket.socket):
        pass

    with Encrypting() as found:
        assert server_socket(of_gunicorn(found)) is None


def test_a_server_that_is_not_known_keeps_its_socket() -> None:
    assert server_socket({**ENVIRON, "wsgi.input": io.BytesIO()}) is None


def test_where_the_hub_has_no_epoll_nothing_is_hijacked(
    plain: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "IS_AVAILABLE", False)
    assert server_socket(of_gunicorn(plain)) is None


# What the response decides


def road_of(app: Flask, path: str = "/stream") -> type:
    """Return the class of the body that an app gives to a server whose socket it can take."""
    with socket.socket() as plain:
        environ = of_werkzeug(plain)
        with app.test_request_context(path, environ_overrides=environ):
            response = app.full_dispatch_request()
            body = response.get_app_iter(flask.request.environ)
            response.close()
    return type(body)


def test_a_stream_of_channels_is_hijacked(app: Flask) -> None:
    assert road_of(app) is HijackingBody


def test_a_stream_of_a_generator_is_not_hijacked(app: Flask) -> None:
    app.add_url_rule("/items", view_func=lambda: EventStreamResponse(["x"]))
    assert road_of(app, "/items") is not HijackingBody


def test_an_apps_own_class_of_responses_is_no_obstacle(app: Flask) -> None:
    app.response_class = type("OwnResponse", (flask.Response,), {})
    assert road_of(app) is HijackingBody


def test_the_kernel_looks_for_the_silent_client_of_a_server_that_is_known() -> None:
    with socket.socket() as client:
        prepare({"gunicorn.socket": client}, 30, 15)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    # Nothing can be done, and nothing fails.
    prepare({"wsgi.input": io.BytesIO()}, 30, 15)
