"""What strangers may do to a real server by raw bytes, and by keeping it waiting."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import Counter
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any

import pytest

from .attack_requests import HEADERS
from .servers import DEADLINE, Server, serving
from .stress import request
from .test_stress import publish, serve, wait_for_subscribers

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.beside

OF_SERVERS = {
    "Connection",
    "Content-Length",
    "Content-Type",
    "Date",
    "Server",
    "Transfer-Encoding",
}

# --- Raw bytes

RAW = [
    b"GET /stream?channel=%0d%0aX-Evil:%201 HTTP/1.1\r\n",
    b"GET /stream?channel=\xff\xfe\xe2\x80\xa8<script> HTTP/1.1\r\n",
    b"GET /stream?channel=a\r\nX-Evil: 1 HTTP/1.1\r\n",
    b"GET /stream?channel=a\rb HTTP/1.1\r\n",
    b"GET /stream?channel=a\0b HTTP/1.1\r\n",
    b"GET /stream?lastEventId=%0d%0a%0d%0adata:%20evil%0a%0a HTTP/1.1\r\n",
    b"GET /stream HTTP/1.1\r\nLast-Event-ID: \xe2\x80\xa8data: evil\xc2\x85id: evil\r\n",
    b"GET /stream HTTP/1.1\r\nLast-Event-ID: \xff\xfe\xed\xa0\x80\r\n",
    b"GET /stream HTTP/1.1\r\nLast-Event-ID: a\rdata: evil\r\n",
    b"GET /stream HTTP/1.1\r\nLast-Event-ID: a\ndata: evil\r\n",
    b"GET /stream HTTP/1.1\r\nLast-Event-ID: a\0data: evil\r\n",
    b"GET /stream HTTP/1.1\r\nLast-Event-ID: a\r\n data: evil\r\n",
    b"GET /stream HTTP/1.1\r\nAuthorization: Bearer es1.\xff\r\n",
    b"GET /stream HTTP/1.1\r\nAuthorization: Bearer\r\nAuthorization: Bearer es1.x\r\n",
    b"GET /stream HTTP/1.1\r\nno colon at all\r\n",
    b"POST /stream/run/a%0d%0aX-Evil:%201?run=%0d%0aX-Evil:%201 HTTP/1.1\r\nCookie: user=me\r\n",
    b"POST /stream/run/%e2%80%a8%85%ff HTTP/1.1\r\nCookie: user=m\xc3\xa9\xff\r\n",
    b"GET /stream/generated/2?say=%0d%0aid:%20evil%0d%0a%0d%0a HTTP/1.1\r\n",
    b"GET http://evil/stream?channel=secret HTTP/1.1\r\n",
    b"GET /mine?say=%0aevent:evil HTTP/1.1\r\nX-Forwarded-For: \r\n",
]


def bare_answer(port: int, start: bytes) -> tuple[bytes, bytes]:
    """Return the head of an answer, and its body up to its end or the first lines of a stream."""
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as client:
        client.sendall(start + b"Host: test\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        wire = b""
        while not re.search(rb"\nretry: \d+\n", wire) and (data := client.recv(65536)):
            wire += data
    head, _, body = wire.partition(b"\r\n\r\n")
    return head, body


@pytest.mark.parametrize("worker", ["gthread", "gevent"])
def test_no_bytes_of_a_request_become_a_field_or_a_line(worker: str) -> None:
    app = "tests.attack_requests:create_app(True, EVENTSTREAM_HEARTBEAT=60)"
    codes = Counter[int]()
    with serving(app, worker, *(["--threads=4"] if worker == "gthread" else [])) as server:
        for start in RAW:
            head, body = bare_answer(server.port, start)
            line, *fields = head.decode("latin-1").split("\r\n")
            assert re.fullmatch(r"HTTP/1\.[01] \d{3} [A-Za-z ]+", line), start
            codes[int(line.split()[1])] += 1
            for field in fields:
                name, _, value = field.partition(": ")
                assert name in HEADERS | OF_SERVERS, start
                assert value.isascii(), start
                assert value.isprintable(), start
            assert not re.search(rb"(?m)^(data|event|id): evil|<script", body), start
        assert "Traceback" not in server.log()
    assert codes.keys() <= {200, 400, 401, 403, 404}
    assert min(codes[code] for code in (200, 400, 401)) > 1


# --- Clients that keep a server waiting

MANY = 300
LIMITS = {"max_subscribers": 100, "max_subscribers_per_address": 20, "heartbeat": 60}


class Visitor:
    """A client of one of ten addresses, which reads nothing until it is asked what it got."""

    def __init__(self, port: int, number: int) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(20)
        self.address = f"127.0.0.{2 + number * 10 // MANY}"
        self.socket.bind((self.address, 0))
        self.socket.connect(("127.0.0.1", port))
        self.wire = b""

    def read_until(self, end: bytes) -> bytes:
        while end not in self.wire and (data := self.socket.recv(65536)):
            self.wire += data
        return self.wire

    def status(self) -> int:
        head, _, _ = self.read_until(b"\r\n\r\n").partition(b"\r\n\r\n")
        code = int(head.split()[1])
        assert (b"\r\nRetry-After: 5" in head) == (code in {429, 503})
        return code

    def close(self) -> None:
        self.socket.close()


@contextmanager
def ordinary_requests(server: Server) -> Iterator[None]:
    """Send ordinary requests all the time, and see that each is answered within a second.

    From its connection on: a kernel that is asked for hundreds at once may drop a request for one,
    which is sent again after a second.
    """
    is_over, times = threading.Event(), [0.0]

    def ask() -> None:
        while not is_over.wait(0.005):
            with closing(HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
                connection.connect()
                begin = time.monotonic()
                connection.request("GET", "/started")
                connection.getresponse().read()
                times.append(time.monotonic() - begin)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        is_over.set()
        asking.join()
    slow = sum(seconds >= 1 for seconds in times)
    print(f"{len(times)} ordinary requests, {slow} of them slow, the slowest in {max(times):.3f} s")
    # One that is held up by others is so for as long as they are there. The machine may hold one up
    # here and there, too.
    assert len(times) > 2
    assert slow <= 1 + len(times) // 100


def send_slowly(visitors: list[Visitor]) -> None:
    """Have some send their requests byte by byte."""
    for byte in request():
        for visitor in visitors:
            visitor.socket.sendall(bytes([byte]))
        time.sleep(0.005)


# How many send half a head and stay, and how many send byte by byte. Each of them keeps a thread of
# gunicorn's gthread worker busy for as long as it likes, and one that sends nothing at all for some
# seconds: a proxy that reads whole requests belongs in front of it.
CROWDS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "gthread, hijacked": ("gthread", {}, 1, 1),
    "gevent": ("gevent", {}, 50, 50),
    # There a client that leaves is missed with the next heartbeat.
    "gthread, iterated": (
        "gthread",
        {"hijack": False, "max_subscribers": 2, "heartbeat": 0.5},
        0,
        1,
    ),
}


@pytest.mark.parametrize("kind", CROWDS)
def test_clients_that_take_nothing_and_send_slowly_harm_nobody(kind: str) -> None:
    worker, options, half, slow = CROWDS[kind]
    limits: dict[str, Any] = {**LIMITS, **options}
    places = limits["max_subscribers"]
    with serve(worker, **limits) as server, ExitStack() as stack:

        def come(number: int) -> Visitor:
            return stack.enter_context(closing(Visitor(server.port, number)))

        stack.enter_context(ordinary_requests(server))
        for number in range(half):
            come(number).socket.sendall(request()[:20])
        visitors = [come(number) for number in range(slow)]
        send_slowly(visitors)
        for number in range(slow, MANY):
            visitors.append(come(number))
            visitors[-1].socket.sendall(request())
            if number % 20 == 0:
                # A queue of hundreds would be a matter of the machine's speed.
                visitors[-1].socket.recv(1, socket.MSG_PEEK)
        wait_for_subscribers(server, places)
        publish(server)
        codes = Counter(visitor.status() for visitor in visitors)
        assert codes[200] == places
        assert codes.keys() <= {200, 429, 503}
        assert sum(codes.values()) == MANY
        inside = [visitor for visitor in visitors if visitor.status() == 200]
        of_addresses = Counter(visitor.address for visitor in inside)
        assert max(of_addresses.values()) <= 20
        if places == 100:
            assert codes[429] > 10
        # Nobody who was there had to go for those who came.
        for visitor in inside:
            assert b"\ndata: 0 " in visitor.read_until(b"\n\n")
        for visitor in visitors:
            visitor.close()
        wait_for_subscribers(server, 0)
        fitting = [number for number in range(MANY) if number % 30 < 20]
        again = [come(number) for number in fitting[:places]]
        for visitor in again:
            visitor.socket.sendall(request())
        assert {visitor.status() for visitor in again} == {200}
        for visitor in again:
            visitor.close()
        wait_for_subscribers(server, 0)
