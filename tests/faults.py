"""What breaks between an app and its Redis, and a crowd of clients that check what they get.

As a program it is the crowd, in a process of its own: ``python -m tests.faults 8000 400``.
"""

from __future__ import annotations

import json
import os
import random
import select
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from flask_eventstream import EventStreamParser
from flask_eventstream.errors import BrokerUnavailableError

from .servers import ROOT, free_port
from .stress import UNTRACED, request, say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flask_eventstream import ServerSentEvent
    from flask_eventstream.redis_broker import RedisBroker

PATIENCE = 60.0
_RETURN_SECONDS = 0.3


# --- The clients


class Client:
    """A client that returns with its cursor whenever its stream ends, as a browser does.

    :param buffer: how many bytes the kernel takes for it, about; as many as it likes by default.
    :ivar faults: what it got that it should not have, or not then.
    :ivar last: the number of the latest event.
    """

    def __init__(self, port: int, path: str = "/stream", buffer: int = 0) -> None:
        self.faults: list[str] = []
        self.last = -1
        self.resets = self.connects = 0
        self._port = port
        self._path = path
        self._buffer = buffer
        self._cursor = ""
        self._expected: int | None = None

    def connect(self) -> socket.socket:
        self.connects += 1
        self._rest = b""
        self._has_head = False
        self._parser = EventStreamParser()
        self.socket = socket.socket()
        if self._buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer)
        self.socket.settimeout(20)
        self.socket.connect(("127.0.0.1", self._port))
        self.socket.sendall(request(self._path, self._cursor.encode()))
        return self.socket

    def read(self, size: int = 65536) -> bool:
        """Read what is there; tell whether the stream goes on."""
        try:
            data = self.socket.recv(size)
        except OSError:
            data = b""
        self._rest += data
        if not self._has_head:
            head, end, rest = self._rest.partition(b"\r\n\r\n")
            if not end:
                return bool(data)
            self._has_head, self._rest = True, rest
            if b" 200 " not in head:
                self.faults.append(head.decode())
        is_over = self._unframe()
        return bool(data) and not is_over

    def _unframe(self) -> bool:
        while (end := self._rest.find(b"\r\n")) >= 0:
            size = int(self._rest[:end], 16)
            if len(self._rest) < end + 4 + size:
                return False
            body = self._rest[end + 2 : end + 2 + size]
            self._rest = self._rest[end + 4 + size :]
            for event in self._parser.feed(body):
                self._check(event)
            if not size:
                return True
        return False

    def _check(self, event: ServerSentEvent) -> None:
        self._cursor = event.id or self._cursor
        if event.type == "reset":
            self.resets += 1
            self._expected = None
            return
        number = int(event.data)
        if self._expected is not None and number != self._expected:
            self.faults.append(f"{number} came, and not {self._expected}, with the id {event.id}")
        self.last, self._expected = number, number + 1


def crowd(port: int, size: int) -> None:
    """Read with many clients, and say how they are for each line with a number.

    They are looked at once all have the event with that number.
    """
    clients, chance = [Client(port) for _ in range(size)], random.Random(size)
    away = [(0.0, client) for client in clients]
    open_ones: dict[int, Client] = {}
    epoll = select.epoll()
    epoll.register(sys.stdin.fileno(), select.EPOLLIN)
    until, deadline = None, 0.0
    while True:
        now = time.monotonic()
        for when, client in tuple(away):
            if when <= now:
                away.remove((when, client))
                _connect(client, open_ones, away, epoll)
        for descriptor, _ in epoll.poll(0.05):
            if descriptor == sys.stdin.fileno():
                until, deadline = int(sys.stdin.readline()), now + PATIENCE
            elif not open_ones[descriptor].read():
                client = open_ones.pop(descriptor)
                epoll.unregister(descriptor)
                client.socket.close()
                away.append((now + chance.uniform(0, _RETURN_SECONDS), client))
        is_done = len(open_ones) == size and min(one.last for one in clients) >= (until or 0)
        if until is not None and (is_done or now > deadline):
            say(
                {
                    "faults": [fault for one in clients for fault in one.faults][:5],
                    "behind": sum(one.last < until for one in clients),
                    "away": len(away),
                    "resets": sum(one.resets for one in clients),
                    "reset_clients": sum(one.resets > 0 for one in clients),
                    "returns": sum(one.connects - 1 for one in clients),
                    "last": min(one.last for one in clients),
                }
            )
            until = None


def _connect(
    client: Client,
    open_ones: dict[int, Client],
    away: list[tuple[float, Client]],
    epoll: select.epoll,
) -> None:
    try:
        client.connect()
    except OSError:
        away.append((time.monotonic() + _RETURN_SECONDS, client))
        return
    open_ones[client.socket.fileno()] = client
    epoll.register(client.socket, select.EPOLLIN)


class Crowd:
    """A crowd in a process of its own.

    :cvar program: the module that is run there.
    """

    program = "tests.faults"

    def __init__(self, port: int, size: int) -> None:
        command = [sys.executable, "-m", self.program, str(port), str(size)]
        environ = {**os.environ, **UNTRACED}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def figures(self, until: Any) -> dict[str, Any]:
        """Return what the clients got, once all have an event, and are connected."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{json.dumps(until)}\n")
        self._process.stdin.flush()
        figures: dict[str, Any] = json.loads(self._process.stdout.readline())
        return figures

    def close(self) -> None:
        with self._process:
            self._process.kill()


# --- The publisher


class Publisher:
    """Publishes numbered events, each again until it is accepted.

    :ivar accepted: how many were.
    :ivar refusals: how often one was not.
    """

    def __init__(self, broker: RedisBroker, pause: float = 0.02) -> None:
        self.accepted = 0
        self.refusals = 0
        self.reasons: set[str] = set()
        self._broker = broker
        self._pause = pause
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.wait(self._pause):
            try:
                self._publish()
                self.accepted += 1
            except BrokerUnavailableError as error:  # noqa: PERF203  # it waits anyway
                self.refusals += 1
                self.reasons.add(str(error))

    def _publish(self) -> None:
        self._broker.publish(str(self.accepted))

    def stop(self) -> int:
        """Publish no more, and return the number of the last event that was accepted."""
        self._stopping.set()
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.accepted - 1


# --- The network


class Proxy:
    """Stands between an app and its Redis, and can lose what it is given without a word."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self._target = target
        self._is_lossy = self._loses_answers = False
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._subscribed: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_everything(self) -> None:
        """Take what comes over all connections, new ones included, and pass nothing on."""
        self._is_lossy = True

    def lose_answers(self) -> None:
        """Pass on what clients send, and nothing of what comes back."""
        self._loses_answers = True

    def lose_messages(self) -> None:
        """Lose what comes over the connections that are subscribed by now."""
        self._pairs[:] = [pair for pair in self._pairs if pair not in self._subscribed]

    def heal(self) -> None:
        """Pass on what comes over new connections; the old ones stay as they are."""
        self._pairs.clear()
        self._is_lossy = self._loses_answers = False

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            pair = (client, server)
            if not self._is_lossy:
                self._pairs.append(pair)
            for one, other in (pair, pair[::-1]):
                threading.Thread(target=self._pass_on, args=(pair, one, other), daemon=True).start()

    def _pass_on(
        self, pair: tuple[socket.socket, socket.socket], one: socket.socket, other: socket.socket
    ) -> None:
        try:
            while data := one.recv(65536):
                is_lost = self._is_lossy or (self._loses_answers and one is pair[1])
                if b"SUBSCRIBE" in data:
                    self._subscribed.append(pair)
                if pair in self._pairs and not is_lost:
                    other.sendall(data)
        except OSError:
            pass  # as ends are
        for end in pair:
            # close() alone would tell nobody as long as the other thread waits for something.
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.close()


@contextmanager
def proxy(target: int) -> Iterator[Proxy]:
    one = Proxy(target)
    try:
        yield one
    finally:
        one.close()


if __name__ == "__main__":
    crowd(int(sys.argv[1]), int(sys.argv[2]))
