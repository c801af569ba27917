"""Clients that ask for much of what was sent before, and read it fast, slowly, or not at all."""

from __future__ import annotations

import re
import socket
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask, request

from flask_eventstream import eventstream

from .servers import serving, wait_for
from .stress import memory_mib, workers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .servers import Server

pytestmark = pytest.mark.beside

MANY = 30
SIZE = 40_000
NUMBER = 250
MOST_MIB = 100
"""How much more memory the server may need: for each of them a frame, and what is on its way."""


@eventstream.resumable("/much")
def much() -> Iterator[str]:
    for n in range(int(request.args["number"])):
        yield f"{n:{SIZE}}"


def create_app(**config: Any) -> Flask:
    app = Flask(__name__)
    app.config.update({f"EVENTSTREAM_{key}": value for key, value in config.items()})
    app.register_blueprint(eventstream)

    @app.post("/fill")
    def fill() -> dict[str, int]:
        for n in range(NUMBER):
            eventstream.publish(f"{n:{SIZE}}")
        return {"bytes": NUMBER * SIZE}

    @app.get("/places")
    def places() -> dict[str, int]:
        return {"taken": app.extensions["eventstream"].places.taken}

    return app


class Client:
    """A connection that asks for one thing, and reads nothing before it is told to."""

    def __init__(self, server: Server, target: str, method: str = "GET") -> None:
        self.socket = socket.socket()
        # As little as possible, or a client that does not read takes megabytes.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(60)
        self.socket.connect(("127.0.0.1", server.port))
        line = f"{method} {target} HTTP/1.1\r\nHost: test\r\n"
        self.socket.sendall(f"{line}Content-Length: 0\r\n\r\n".encode())

    def status(self) -> int:
        return int(self.socket.recv(12, socket.MSG_PEEK)[9:])

    def read_until(self, end: bytes) -> bytes:
        wire = b""
        while end not in wire[-100:] and (part := self.socket.recv(1 << 20)):
            wire += part
        return wire

    def close(self) -> None:
        self.socket.close()


def ask(server: Server, target: str, method: str = "GET") -> bytes:
    with closing(Client(server, target, method)) as client:
        return client.read_until(b"}\n")


def taken(server: Server) -> int:
    found = re.search(rb'"taken":\s*(\d+)', ask(server, "/places"))
    assert found
    return int(found[1])


def numbers(wire: bytes) -> list[int]:
    # Without what is between chunks, which may be in the middle of an event.
    body = re.sub(rb"\r\n[0-9a-fA-F]+\r\n", b"", wire)
    return [int(found) for found in re.findall(rb"data: +(\d+)\n", body)]


OF_WORKERS = {"gevent": [], "gthread": ["--threads=40"], "sync": []}


@pytest.mark.parametrize(
    ("worker", "hijack"),
    [("gevent", True), ("gthread", True), ("sync", True), ("gevent", False), ("gthread", False)],
)
def test_a_long_history_costs_no_memory_for_each_client_that_does_not_read_it(
    worker: str, hijack: bool
) -> None:
    app = f"tests.test_replay_attacks:create_app(HIJACK={hijack}, MAX_LAG=300)"
    with serving(app, worker, *OF_WORKERS[worker]) as server, ExitStack() as stack:
        ask(server, "/fill", "POST")
        [pid] = workers(server)
        before = memory_mib(pid)
        clients = [
            stack.enter_context(closing(Client(server, "/stream?lastEventId=invented")))
            for _ in range(MANY)
        ]
        assert {client.status() for client in clients} == {200}
        if worker != "sync":
            wait_for(lambda: taken(server) == MANY)
        assert memory_mib(pid) - before < MOST_MIB
        # Nobody has lost anything.
        assert numbers(clients[0].read_until(b" %d\n" % (NUMBER - 1))) == list(range(NUMBER))


@pytest.mark.parametrize("hijack", [True, False])
def test_a_run_that_has_ended_has_the_limits_of_one_that_goes_on(hijack: bool) -> None:
    app = f"tests.test_replay_attacks:create_app(HIJACK={hijack}, MAX_LAG=2, MAX_SUBSCRIBERS=5)"
    with serving(app, "gthread", "--threads=40") as server, ExitStack() as stack:
        with closing(Client(server, f"/stream/much?number={NUMBER // 2}", "POST")) as starter:
            assert b"event: end\n" in starter.read_until(b"\n\n\r\n0\r\n\r\n")
        wait_for(lambda: taken(server) == 0)
        [pid] = workers(server)
        before = memory_mib(pid)
        clients = [
            stack.enter_context(closing(Client(server, "/stream/much?number=0")))
            for _ in range(MANY)
        ]
        codes = [client.status() for client in clients]
        assert (codes.count(200), codes.count(503)) == (5, MANY - 5)
        assert memory_mib(pid) - before < MOST_MIB
        # Those that read nothing are cut off, and leave their places to others.
        wait_for(lambda: taken(server) == 0)
        with closing(Client(server, "/stream/much?number=0")) as reader:
            wire = reader.read_until(b"\n\n\r\n0\r\n\r\n")
            assert numbers(wire) == list(range(NUMBER // 2))
            assert b"event: end\n" in wire
