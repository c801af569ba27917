"""What is left open when a server is told to stop: nothing, and nobody waits for it."""

from __future__ import annotations

import re
import select
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from .servers import Server, free_port, gunicorn, running, wait_for
from .stress import request

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT = 2.0
OPTIONS = {
    "gevent": ["--worker-connections", "1000"],
    "gthread": ["--threads", "150", "--worker-connections", "1000"],
    "sync": [],
}
FAREWELL = re.compile(rb"retry: \d+\n\r\n0\r\n\r\n\Z")


class Clients:
    """Connections that are read to their end, by a thread, and closed there, as browsers do."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._poll = select.epoll()
        self._open: dict[int, socket.socket] = {}
        self._ended: list[socket.socket] = []
        self._is_over = False
        self.wires: dict[int, bytes] = {}
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def connect(self, path: str, number: int = 1, method: str = "GET") -> list[int]:
        """Open some streams; return their numbers once all of them have begun."""
        numbers = [self._connect(path, method) for _ in range(number)]
        wait_for(lambda: all(b"\r\n\r\n" in self.wires[one] for one in numbers), what=path)
        return numbers

    def _connect(self, path: str, method: str) -> int:
        client = socket.create_connection(("127.0.0.1", self._port), 20)
        client.sendall(request(path).replace(b"GET", method.encode()))
        self.wires[client.fileno()] = b""
        self._open[client.fileno()] = client
        self._poll.register(client, select.EPOLLIN)
        return client.fileno()

    def _read(self) -> None:
        while not self._is_over:
            for descriptor, _ in self._poll.poll(0.1):
                try:
                    data = self._open[descriptor].recv(1 << 16)
                except ConnectionResetError:
                    data = b""
                self.wires[descriptor] += data
                if not data:
                    self._poll.unregister(descriptor)
                    # Its number stays its own until the test is over.
                    self._ended.append(self._open.pop(descriptor))
                    with suppress(OSError):
                        self._ended[-1].shutdown(socket.SHUT_RDWR)

    def ends(self, numbers: list[int]) -> list[bytes]:
        """Return the last bytes of some streams, once they have ended."""
        wait_for(lambda: not self._open.keys() & set(numbers), what="the ends of the streams")
        return [self.wires[one][-200:] for one in numbers]

    def close(self) -> None:
        self._is_over = True
        self._thread.join()
        for client in (*self._open.values(), *self._ended):
            client.close()
        self._poll.close()


@contextmanager
def stage(command: list[str], port: int) -> Iterator[tuple[Server, Clients]]:
    with running(command, port) as server:
        clients = Clients(port)
        try:
            yield server, clients
        finally:
            clients.close()


@contextmanager
def serving(worker: str, *, hijack: bool) -> Iterator[tuple[Server, Clients]]:
    port, app = free_port(), f"tests.apps:create_app({{'EVENTSTREAM_HIJACK': {hijack}}})"
    command = gunicorn(app, worker, *OPTIONS[worker], "--graceful-timeout", "30", port=port)
    with stage(command, port) as both:
        yield both
        assert "Traceback" not in both[0].log(), both[0].log()


def seconds_to_stop(server: Server, kind: signal.Signals = signal.SIGTERM) -> float:
    start = time.monotonic()
    server.process.send_signal(kind)
    server.process.wait(30)
    return time.monotonic() - start


@pytest.mark.parametrize("hijack", [True, False])
@pytest.mark.parametrize("worker", ["gevent", "gthread"])
def test_a_worker_that_is_told_to_stop_ends_all_its_streams_and_is_gone(
    worker: str, hijack: bool
) -> None:
    with serving(worker, hijack=hijack) as (server, clients):
        streams = clients.connect("/stream", 50)
        for path in ("ticks", "mute", "silent", "merged"):
            streams += clients.connect(f"/stream/{path}", 5)
        runs = clients.connect("/stream/answer/one", method="POST")
        blocked = clients.connect("/stream/blocked", 5) if worker == "gevent" else []
        seconds = seconds_to_stop(server)
        assert seconds < LIMIT
        ends = clients.ends(streams + blocked)
        assert [end for end in ends if not FAREWELL.search(end)] == []
        assert all(b"event: lost\n" in end for end in clients.ends(runs))
        assert server.log().count("blocked was closed") == len(blocked)


@pytest.mark.parametrize("path", ["/stream", "/stream/ticks", "/stream/mute"])
def test_the_sync_worker_is_gone_too_though_a_stream_has_it(path: str) -> None:
    with serving("sync", hijack=False) as (server, clients):
        streams = clients.connect(path)
        assert seconds_to_stop(server) < LIMIT
        assert all(map(FAREWELL.search, clients.ends(streams)))


def test_the_sync_worker_ends_the_streams_of_its_hub() -> None:
    with serving("sync", hijack=True) as (server, clients):
        streams = clients.connect("/stream", 300)
        assert seconds_to_stop(server) < LIMIT
        assert all(map(FAREWELL.search, clients.ends(streams)))


@pytest.mark.parametrize("worker", ["gevent", "gthread"])
def test_a_client_that_reads_nothing_holds_up_no_worker(worker: str) -> None:
    with serving(worker, hijack=True) as (server, clients), socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", server.port))
        stalled.sendall(request("/stream/large"))
        assert stalled.recv(1, socket.MSG_PEEK)
        others = clients.connect("/stream", 10)
        # By now the server waits until there is room for more.
        wait_for(lambda: is_stuck(server))
        assert seconds_to_stop(server) < 2 * LIMIT
        assert all(map(FAREWELL.search, clients.ends(others)))


def is_stuck(server: Server) -> bool:
    """Tell whether something that was to be sent to a client stays where it is."""
    listed = subprocess.run(["cat", "/proc/net/tcp"], capture_output=True, text=True, check=True)
    sender = f":{server.port:04X} "
    rows = [row.split() for row in listed.stdout.splitlines()[1:] if sender in row.split("rem")[0]]
    queues = [int(row[4].partition(":")[0], 16) for row in rows if row[1].endswith(sender.strip())]
    return any(size > 200_000 for size in queues)
