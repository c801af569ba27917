"""What is left in a real server once clients have gone: nothing."""

from __future__ import annotations

import json
import resource
import socket
import struct
import urllib.request
from typing import Any

import pytest

from .servers import Server, serving, wait_for

CLIENTS = 1000
APP = "tests.apps:create_app({'EVENTSTREAM_HEARTBEAT': 1, 'EVENTSTREAM_MAX_SUBSCRIBERS': 2000})"
ITERATOR_APP = APP.replace("})", ", 'EVENTSTREAM_HIJACK': False})")
WORKERS = [
    pytest.param("gevent", ["--worker-connections", "1200"], id="gevent"),
    pytest.param("gthread", ["--threads", "1020", "--worker-connections", "1200"], id="gthread"),
]


def connect(server: Server, path: str) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
    return client


def has_begun(client: socket.socket) -> bool:
    return b"\r\n\r\n" in client.recv(4096)


def leave(client: socket.socket, rudely: bool) -> None:
    if rudely:  # with RST instead of FIN
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def state(server: Server) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.url}/state", timeout=20) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def is_as_before(server: Server, before: dict[str, Any]) -> bool:
    now = state(server)
    # The connection that asked before may still have been open then, with its greenlet.
    is_closed = all(now.pop(key) <= before[key] for key in ("descriptors", "greenlets"))
    return is_closed and now == {key: before[key] for key in now}


def after_the_first_has_left(server: Server) -> dict[str, Any]:
    """Return the state once the hub has opened what it keeps: two descriptors."""
    [first] = open_many(server, ["/stream"], 1)
    leave(first, rudely=False)
    wait_for(lambda: state(server)["subscribers"] == state(server)["threads"] == 0)
    return state(server)


def open_many(server: Server, paths: list[str], number: int) -> list[socket.socket]:
    clients = [connect(server, paths[n % len(paths)]) for n in range(number)]
    assert all(has_begun(client) for client in clients)
    return clients


@pytest.fixture(scope="module", autouse=True)
def _enough_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))


@pytest.mark.parametrize("app", [APP, ITERATOR_APP], ids=["hub", "iterator"])
@pytest.mark.parametrize(("worker", "options"), WORKERS)
def test_nothing_is_left_of_a_thousand_clients(worker: str, options: list[str], app: str) -> None:
    with serving(app, worker, *options) as server:
        before = after_the_first_has_left(server)
        clients = open_many(server, ["/stream"], CLIENTS)
        assert state(server)["subscribers"] == CLIENTS
        for n, client in enumerate(clients):
            leave(client, rudely=n % 2 == 0)
        wait_for(lambda: is_as_before(server, before), what=f"{before} again")


@pytest.mark.parametrize(("worker", "options"), WORKERS)
def test_nothing_is_left_of_generators_and_their_threads(worker: str, options: list[str]) -> None:
    paths = ["/stream/ticks", "/stream/silent", "/stream/merged"]
    with serving(APP, worker, *options) as server:
        before = state(server)
        for client in open_many(server, paths, 60):
            leave(client, rudely=False)
        wait_for(lambda: is_as_before(server, before), what=f"{before} again")


@pytest.mark.parametrize("path", ["/stream", "/stream/mute"])
def test_a_client_that_left_is_noticed_by_heartbeats(path: str) -> None:
    # At the first write after a client has left, its machine only learns of it. That the second one
    # ends the interval is in the tests of bodies.
    heartbeat = 3
    config = {"EVENTSTREAM_HEARTBEAT": heartbeat, "EVENTSTREAM_HIJACK": False}
    app = f"tests.apps:create_app({config})"
    with serving(app, "gthread", "--threads", "4") as server:
        before = state(server)["threads"]
        client = connect(server, path)
        assert has_begun(client)
        # The thread that serves it, the waker or the producer, and who looks after gunicorn.
        wait_for(lambda: state(server)["threads"] == before + 3)
        leave(client, rudely=False)
        # The producer of a view that computes stays until its next item.
        left = before + 1 if path == "/stream/mute" else before
        wait_for(lambda: state(server)["threads"] == left)


@pytest.mark.parametrize(("worker", "options"), [*WORKERS, pytest.param("sync", [], id="sync")])
def test_every_worker_streams_the_same_bytes(worker: str, options: list[str]) -> None:
    with (
        serving(APP, worker, *options) as server,
        urllib.request.urlopen(f"{server.url}/stream/count/2", timeout=20) as answer,
    ):
        assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert answer.read() == (
            b'data: {"n": 0}\n\ndata: {"n": 1}\n\nevent: end\ndata: {}\nid: end\n\n'
        )
