"""Requests that come with more than a head, by which a client would take the server's threads."""

from __future__ import annotations

import socket
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import pytest

from .proxies import proxy
from .roads import TIMEOUT, Client, Site, Sites
from .servers import serving, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.beside

MANY = 30
"""How many attack at once. The server has eight threads."""

WORKERS = {"gthread": ["--threads=8"], "gevent": [], "sync": []}
GREETING = b"GET /greeting HTTP/1.1\r\nHost: test\r\n\r\n"
ATTACKS = {
    "a body that does not come": (b"Content-Length: 1", b""),
    "a body": (b"Content-Length: 1", b"x"),
    "half a body": (b"Content-Length: 10", b"x"),
    "a body without an end": (b"Content-Length: 1000000000000", b"x" * 50_000),
    "chunks that do not come": (b"Transfer-Encoding: chunked", b""),
    "a half chunk": (b"Transfer-Encoding: chunked", b"5\r\nab"),
    "chunks without an end": (b"Transfer-Encoding: chunked", b"2\r\nab\r\n"),
    "what is no chunk": (b"Transfer-Encoding: chunked", b"x\r\n\r\n"),
    "all chunks": (b"Transfer-Encoding: chunked", b"2\r\nab\r\n0\r\n\r\n"),
    "a second request": (b"A: 1", GREETING),
    "half a second request": (b"A: 1", GREETING[:9]),
    "a body and a second request": (b"Content-Length: 1", b"x" + GREETING),
    "a body that is waited for": (b"Content-Length: 1\r\nExpect: 100-continue", b""),
}
FIRST_LINES = [b"GET /stream HTTP/1.1", b"GET /stream/answer/one HTTP/1.9"]


@pytest.fixture(scope="module", params=WORKERS)
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    name = request.param
    with serving("tests.hijack_apps:create_site()", name, *WORKERS[name]) as server:
        site = Site(server, None, tmp_path_factory.mktemp("site"))
        with site.client() as starting:
            # A run that goes on.
            starting.ask("/stream/answer/one", "POST")
            assert starting.head().status_code == 200
            yield site
        assert "Traceback" not in server.log(), server.log()


def sockets(site: Site) -> int:
    """Return how many the hub has, but for the one of the run's first client."""
    return site.counts()["sockets"] - 1


def attack(port: int, wire: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)
    client.sendall(wire)
    return client


def until(client: socket.socket, end: bytes) -> bytes:
    wire = b""
    while end not in wire:
        part = client.recv(65536)
        assert part, wire
        wire += part
    return wire


@pytest.mark.parametrize("first_line", FIRST_LINES)
@pytest.mark.parametrize("what", ATTACKS)
def test_what_comes_with_the_request_of_a_stream_takes_no_thread(
    site: Site, what: str, first_line: bytes
) -> None:
    fields, rest = ATTACKS[what]
    wire = first_line + b"\r\nHost: test\r\n" + fields + b"\r\n\r\n" + rest
    greeted = site.counts().get("greeted", 0)
    with ExitStack() as stack:
        clients = [
            stack.enter_context(closing(attack(site.server.port, wire))) for _ in range(MANY)
        ]
        for client in clients:
            assert b"Connection: close\r\n" in until(client, b"retry: 0\n")
        # Each has its stream, and the server answers.
        assert sockets(site) == MANY
        if b"/answer" not in first_line:
            id = site.publish(what).encode()
            for client in clients:
                until(client, id)
    wait_for(lambda: sockets(site) == 0, what="those who left to be gone")
    assert site.counts().get("greeted", 0) == greeted


@pytest.mark.parametrize("what", ATTACKS)
def test_those_who_attack_and_leave_at_once_leave_nothing(site: Site, what: str) -> None:
    fields, rest = ATTACKS[what]
    wire = b"GET /stream HTTP/1.1\r\nHost: test\r\n" + fields + b"\r\n\r\n" + rest
    for _ in range(MANY):
        attack(site.server.port, wire).close()
    # No heartbeat finds them out: that of the site is an hour.
    wait_for(lambda: site.counts()["subscribers"] == 1, what="those who left to be gone")
    assert sockets(site) == 0


@pytest.mark.parametrize("what", ["a body", "all chunks", "a second request"])
def test_through_nginx_they_take_no_thread_either(site: Site, tmp_path: Path, what: str) -> None:
    fields, rest = ATTACKS[what]
    wire = b"GET /stream HTTP/1.1\r\nHost: test\r\n" + fields + b"\r\n\r\n" + rest
    with proxy("nginx", tmp_path, site.server.port) as nginx, ExitStack() as stack:
        clients = [stack.enter_context(closing(attack(nginx.port, wire))) for _ in range(MANY)]
        for client in clients:
            until(client, b"retry: 0\n")
        assert sockets(site) == MANY
    wait_for(lambda: sockets(site) == 0, what="those who left to be gone")


# --- What the hub cannot take


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    with ExitStack() as stack:
        sites = Sites(tmp_path_factory.mktemp("sites"), stack)
        yield sites
        sites.stop()


def subscribe(stack: ExitStack, site: Site) -> Client:
    client = stack.enter_context(site.client())
    client.ask("/stream")
    assert client.head().status_code == 200
    assert client.until(b"retry: 0\n") == b":\nretry: 0\n"
    return client


def test_over_tls_subscribers_have_half_of_the_threads(sites: Sites) -> None:
    site = sites("gthread-tls")
    with ExitStack() as stack:
        inside = [subscribe(stack, site) for _ in range(4)]
        wait_for(lambda: site.counts()["subscribers"] == 4)
        for _ in range(MANY):
            assert subscribe(stack, site).body() == b""
        assert site.counts()["subscribers"] == 4
        id = site.publish("x").encode()
        for client in inside:
            assert client.until(b"\n\n") == b"data: x\nid: %b\n\n" % id
        # Who leaves makes room.
        inside[0].leave()
        wait_for(lambda: site.publish("y") and site.counts()["subscribers"] == 3)
        subscribe(stack, site)
        wait_for(lambda: site.counts()["subscribers"] == 4)
        assert subscribe(stack, site).body() == b""
    assert site.server.log().count("take subscribers' sockets") == 1


@pytest.mark.parametrize("size", [100, 1_000_000])
def test_over_tls_those_who_do_not_read_large_events_leave_threads_for_others(
    sites: Sites, size: int
) -> None:
    site = sites("gthread-tls")
    cursor = site.publish("before")
    for _ in range(2_000_000 // size if size > 100 else 5):
        site.publish("x" * size)
    with ExitStack() as stack:
        for _ in range(MANY):
            client = stack.enter_context(site.client())
            client.ask("/stream", headers={"Last-Event-ID": cursor})
        # Four that stay, and one at most that is being sent what is large.
        wait_for(lambda: 4 <= site.counts()["subscribers"] <= 5)
        assert site.get("/counts")


def test_over_tls_a_single_thread_is_taken_by_nobody_and_those_who_return_miss_nothing(
    sites: Sites,
) -> None:
    site = sites("sync-tls")
    cursor = site.publish("first")
    ids = [site.publish(n).encode() for n in range(2)]
    with site.client() as client:
        client.ask("/stream", headers={"Last-Event-ID": cursor})
        assert client.head().status_code == 200
        events = b"data: 0\nid: %b\n\ndata: 1\nid: %b\n\n" % (ids[0], ids[1])
        assert client.body() == b":\nretry: 0\n" + events
    with ExitStack() as stack:
        assert subscribe(stack, site).body() == b""
    assert site.counts()["subscribers"] == 0
