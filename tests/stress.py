"""Clients by the thousand, and what a server's process costs.

As a program it is a crowd of clients in a process of its own, which says what they got:
``python -m tests.stress crowd '{"port": 8000, "good": 1000}'``.
"""

from __future__ import annotations

import json
import os
import random
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .servers import ROOT, Server, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    Figures = dict[str, Any]

UNTRACED = {"COVERAGE_PROCESS_START": "", "COVERAGE_PROCESS_CONFIG": ""}
"""The environment of a process whose lines nobody counts, which would make it several times slower
and its figures those of something else."""

_EVENT = re.compile(rb"^data: (\d+) (\d+) x*\nid: (\S+)\n\n", re.MULTILINE)
_SNAPSHOT = re.compile(rb"^data: (\d+)\nid: \S+\n\n", re.MULTILINE)
_RESET = re.compile(rb"^(?:id: \S+\n)?event: reset\n(?:[^\n]+\n)+\n", re.MULTILINE)
_ADDRESSES = 16
_AT_ONCE = 50
_PATIENCE = 120.0
_SO_TIMESTAMPNS = 35


class Wire:
    """What one client got: whole numbered events, one after the other, or a fault.

    :ivar status: of the answer; 0 until its head is there.
    :ivar faults: what is wrong with the bytes.
    :ivar first: the number of the first event; ``last`` of the last one, and ``id`` its id.
    :ivar stamps: when the events of the last call of :meth:`feed` were published.
    :ivar resets: how many ``reset`` events came.
    :ivar snapshot: an event that is only a number.
    :ivar is_complete: whether the body came to its end.
    """

    def __init__(self) -> None:
        self.status = 0
        self.head = self.id = self.snapshot = b""
        self.faults: list[str] = []
        self.first = self.last = -1
        self.events = self.resets = 0
        self.stamps: list[tuple[int, int]] = []
        self.is_complete = False
        self._rest = self._text = b""

    def feed(self, data: bytes) -> None:
        self.stamps = []
        self._rest += data
        if not self.head:
            head, end, rest = self._rest.partition(b"\r\n\r\n")
            if not end:
                return
            self.head, self._rest = head, rest
            self.status = int(head.split(b" ", 2)[1])
        if self.status == 200:
            self._read_events(self._unframed())

    def _unframed(self) -> bytes:
        body, rest, start = [], self._rest, 0
        while (end := rest.find(b"\r\n", start)) >= 0:
            size = int(rest[start:end], 16)
            if len(rest) < end + 4 + size:
                break
            self.is_complete = size == 0
            body.append(rest[end + 2 : end + 2 + size])
            start = end + 4 + size
        self._rest = rest[start:]
        return b"".join(body)

    def _read_events(self, body: bytes) -> None:
        whole, end, text = (self._text + body).rpartition(b"\n\n")
        if not end:
            self._text = text
            return
        self._text, whole = text, whole + end
        found = _EVENT.findall(whole)
        resets = len(_RESET.findall(whole))
        snapshots = _SNAPSHOT.findall(whole)
        self.snapshot = snapshots[0] if snapshots else self.snapshot
        if len(found) + resets + len(snapshots) != whole.count(b"\n\n"):
            self.faults.append(f"not whole: {whole[:200]!r}")
        self.resets += resets
        if found:
            self._check([int(number) for number, _, _ in found])
            self.id = found[-1][2]
            self.stamps = [(int(number), int(stamp)) for number, stamp, _ in found]

    def _check(self, numbers: list[int]) -> None:
        start = self.last + 1 if self.events else numbers[0]
        if numbers != list(range(start, start + len(numbers))):
            self.faults.append(f"{numbers[:3]}…{numbers[-3:]} came instead of {start} and so on")
        self.first = numbers[0] if self.first < 0 else self.first
        self.last = numbers[-1]
        self.events += len(numbers)


class Client:
    """A client of its own, which a test has in its hands.

    :param last_event_id: as a browser sends it when it reconnects.
    :param buffer: how many bytes the kernel takes for it, about; as many as it likes by default.
    :param slowly: whether the server has to wait for the end of its head.
    """

    def __init__(
        self,
        server: Server,
        path: str = "/stream",
        last_event_id: bytes = b"",
        buffer: int = 0,
        slowly: bool = False,
    ) -> None:
        self.wire = Wire()
        self.is_ended = False
        self.socket = socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(20)
        self.socket.connect(("127.0.0.1", server.port))
        wire = request(path, last_event_id)
        if slowly:
            self.socket.sendall(wire[:-10])
            threading.Event().wait(0.2)
            wire = wire[-10:]
        self.socket.sendall(wire)
        self.socket.setblocking(False)

    def read(self, size: int = 65536, timeout: float = 0.0) -> bool:
        """Read what is there within some seconds; tell whether there was something."""
        if self.is_ended or not is_ready(self.socket, select.POLLIN, timeout):
            return False
        try:
            data = self.socket.recv(size)
        except ConnectionResetError:
            data = b""
        self.is_ended = not data
        self.wire.feed(data)
        return bool(data)

    def read_all(self) -> Wire:
        """Read what is there."""
        while self.read():
            pass
        return self.wire

    def begin(self) -> Client:
        """Wait for the head and the first bytes of a stream."""
        wait_for(lambda: self.read(4096, 1) and self.wire.status, what="the head")
        assert self.wire.status == 200, self.wire.head
        return self

    def wait_for_event(self, number: int, timeout: float = 20.0) -> None:
        """Wait until an event has arrived, and all before it."""
        wait_for(
            lambda: self.read_all().last >= number or self.is_ended, timeout, f"event {number}"
        )
        assert self.wire.last >= number, f"ended after event {self.wire.last}"

    def wait_for_end(self, timeout: float = 20.0) -> Wire:
        wait_for(lambda: (self.read_all(), self.is_ended)[1], timeout, "the end of a stream")
        return self.wire

    def close(self, rudely: bool = False) -> None:
        close(self.socket, rudely)


class Readers:
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
        those = set(numbers)
        wait_for(lambda: not self._open.keys() & those, what="the ends of the streams")
        return [self.wires[one][-200:] for one in numbers]

    def close(self) -> None:
        self._is_over = True
        self._thread.join()
        for client in (*self._open.values(), *self._ended):
            client.close()
        self._poll.close()


def is_ready(client: socket.socket, events: int, timeout: float) -> bool:
    """Tell whether a socket is ready within some seconds."""
    # Not select(), which knows only the first 1024 descriptors.
    poll = select.poll()
    poll.register(client, events)
    return bool(poll.poll(timeout * 1000))


def request(path: str = "/stream", last_event_id: bytes = b"") -> bytes:
    cursor = b"Last-Event-ID: %b\r\n" % last_event_id if last_event_id else b""
    return b"GET %b HTTP/1.1\r\nHost: test\r\n%b\r\n" % (path.encode(), cursor)


def close(client: socket.socket, rudely: bool) -> None:
    if rudely:  # with RST instead of FIN
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


# --- The server's process


def workers(server: Server) -> list[int]:
    """Return the process ids of gunicorn's workers; it listens before it has any."""
    master = server.process.pid
    children = Path(f"/proc/{master}/task/{master}/children")
    return [int(pid) for pid in wait_for(lambda: children.read_text().split())]


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int) -> float:
    """Return the memory that a process has for itself, and its share of what it has not."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise AssertionError


# --- The crowd


@contextmanager
def crowd(kind: str, server: Server, **options: Any) -> Iterator[Crowd]:
    """Run a crowd of clients in a process of its own, and connect them."""
    one = Crowd(kind, {"port": server.port, **options})
    try:
        yield one
    finally:
        one.close()


class Crowd:
    """A process full of clients. It is asked for what they got by a line with a number."""

    def __init__(self, kind: str, options: Figures) -> None:
        environ = {**os.environ, **UNTRACED}
        command = [sys.executable, "-m", "tests.stress", kind, json.dumps(options)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.connected = self._answer()

    def _answer(self) -> Figures:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the crowd failed; see above"
        figures: Figures = json.loads(line)
        return figures

    def figures(self, until: int = -1) -> Figures:
        """Return what its clients got since the last time, once all have the event ``until``."""
        assert self._process.stdin
        self._process.stdin.write(f"{until}\n")
        self._process.stdin.flush()
        return self._answer()

    def next_figures(self, events: int) -> Figures:
        """Return what its clients get from now on, once all have so many events more."""
        return self.figures(self.figures()["last"] + events)

    def close(self) -> None:
        with self._process:
            self._process.kill()


class Member:
    """One client of a crowd."""

    def __init__(self, port: int, number: int, buffer: int = 0) -> None:
        self.wire = Wire()
        self.is_ended = self.is_reset = False
        self.socket = socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        # The kernel notes when something arrives, however late it is looked at.
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self.socket.bind((f"127.0.0.{1 + number % _ADDRESSES}", 0))
        self.socket.connect(("127.0.0.1", port))

    def read(self) -> int:
        """Read what is there, since there is something; return when it arrived."""
        try:
            data, timestamps, *_ = self.socket.recvmsg(32 * 1024, 64, socket.MSG_DONTWAIT)
        except OSError:
            data, timestamps = b"", []
            self.is_reset = True
        self.is_ended = not data
        self.wire.feed(data)
        return nanoseconds(timestamps[0][2]) if timestamps else time.time_ns()


class Audience:
    """Good clients, which read all there is, and such as read nothing."""

    def __init__(self, port: int, good: int = 0, stalled: int = 0, at_once: int = _AT_ONCE) -> None:
        self._at_once = at_once
        self._epoll = select.epoll()
        self._epoll.register(sys.stdin.fileno(), select.EPOLLIN)
        self._good: dict[int, Member] = {}
        self._stalled: list[Member] = []
        self._delays: list[int] = []
        self._reached: dict[int, list[int]] = {}
        self._refused: list[str] = []
        # Alternating, or the good ones would be first in every list of the server's.
        everybody = good + stalled
        for number in range(everybody):
            is_good = number * good % everybody < good
            self._connect(Member(port, number, 0 if is_good else 4096), is_good)
            if number % at_once == 0:
                self._run_until(self._is_connected)
        self._run_until(self._is_connected)

    def _connect(self, member: Member, is_good: bool) -> None:
        member.socket.sendall(request())
        if is_good:
            self._good[member.socket.fileno()] = member
            self._epoll.register(member.socket, select.EPOLLIN)
        else:
            self._stalled.append(member)

    def _is_connected(self) -> bool:
        newest = self._stalled[-self._at_once :]
        heads = [bool(one.socket.recv(1, socket.MSG_PEEK)) for one in newest]
        return all(heads) and all(one.wire.status for one in self._good.values())

    def _run_until(self, condition: Any) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "the clients were not served in time"
            self._turn(0.1)

    def _turn(self, timeout: float) -> bool:
        is_asked = False
        for descriptor, _ in self._epoll.poll(timeout):
            if descriptor == sys.stdin.fileno():
                is_asked = True
            else:
                self._read(descriptor)
        return is_asked

    def _read(self, descriptor: int) -> None:
        member = self._good[descriptor]
        arrival = member.read()
        if member.is_ended:
            self._epoll.unregister(descriptor)
        if member.wire.status not in {0, 200}:
            # As a browser does, which has no use for the connection.
            self._refused.append(member.wire.head.decode())
            self._good.pop(descriptor).socket.close()
        for number, stamp in member.wire.stamps:
            self._delays.append(arrival - stamp)
            reached = self._reached.setdefault(number, [0, 0])
            reached[0] += 1
            reached[1] = max(reached[1], arrival - stamp)

    def run(self) -> None:
        """Tell what the clients got, at first and whenever it is asked for."""
        say(self._figures())
        while True:
            if self._turn(1):
                until = int(sys.stdin.readline())
                self._run_until(lambda: self._last() >= until)  # noqa: B023  # it is over then
                say(self._figures())

    def _last(self) -> int:
        return min((one.wire.last for one in self._good.values()), default=-1)

    def _figures(self) -> Figures:
        wires = [one.wire for one in self._good.values()]
        everybody = [delay for count, delay in self._reached.values() if count == len(wires)]
        delays, self._delays, self._reached = self._delays, [], {}
        return {
            "served": len(wires),
            "refused": self._refused,
            "faults": [fault for wire in wires for fault in wire.faults][:5],
            "ended": sum(one.is_ended for one in self._good.values()),
            "complete": sum(wire.is_complete for wire in wires),
            "first": max((wire.first for wire in wires), default=-1),
            "last": self._last(),
            "arrivals": len(delays),
            "events": len(everybody),
            "arrival_p50": percentile(delays, 50),
            "arrival_p99": percentile(delays, 99),
            "everybody_p50": percentile(everybody, 50),
            "everybody_p99": percentile(everybody, 99),
        }


def nanoseconds(timespec: bytes) -> int:
    seconds, rest = struct.unpack("qq", timespec)
    return int(seconds) * 10**9 + int(rest)


def percentile(times: list[int], percent: int) -> float:
    """Return a percentile of some nanoseconds, in milliseconds."""
    ordered = sorted(times)
    return ordered[len(ordered) * percent // 100] / 1e6 if ordered else 0.0


def say(figures: Figures) -> None:
    print(json.dumps(figures), flush=True)


class Churn:
    """Clients that come and leave in every way there is, so many of them at once."""

    def __init__(self, port: int, clients: int, at_once: int = _AT_ONCE) -> None:
        self._port = port
        self._left_to_come = clients
        self._at_once = at_once
        self._chance = random.Random(clients)
        self._epoll = select.epoll()
        self._open: dict[int, tuple[Member, int]] = {}
        self._faults: list[str] = []
        self._events = self._cut = self._closed = self._served = 0

    def run(self) -> None:
        """Come and leave, and say at the end what they got."""
        say({})
        progress = time.monotonic()
        while self._left_to_come or self._open:
            while self._left_to_come and len(self._open) < self._at_once:
                self._come()
            for descriptor, _ in self._epoll.poll(1):
                progress = time.monotonic()
                self._read(*self._open[descriptor])
            assert time.monotonic() < progress + _PATIENCE, f"{len(self._open)} got nothing"
        sys.stdin.readline()
        say(
            {
                "events": self._events,
                "cut": self._cut,
                "closed": self._closed,
                "served": self._served,
                "faults": self._faults[:5],
            }
        )

    def _come(self) -> None:
        self._left_to_come -= 1
        member = Member(self._port, self._left_to_come)
        way = self._chance.choice(["in its head", "after its request", 0, 0, 1, 20, 100, 1000])
        wire = request()
        if isinstance(way, int):
            member.socket.sendall(wire)
            self._open[member.socket.fileno()] = member, way
            self._epoll.register(member.socket, select.EPOLLIN)
            return
        member.socket.sendall(wire[:20] if way == "in its head" else wire)
        close(member.socket, self._chance.random() < 0.5)

    def _read(self, member: Member, enough: int) -> None:
        member.read()
        wire = member.wire
        is_enough = wire.status and wire.events >= enough
        if not (member.is_ended or is_enough or wire.faults):
            return
        self._faults += wire.faults
        self._events += wire.events
        self._served += wire.status == 200
        # Who falls behind is reset, or the stream ends for all who were as far, with a last chunk.
        is_cut = member.is_reset or wire.is_complete
        self._cut += member.is_ended and is_cut
        self._closed += member.is_ended and not is_cut
        del self._open[member.socket.fileno()]
        close(member.socket, self._chance.random() < 0.5)


if __name__ == "__main__":
    kinds = {"audience": Audience, "churn": Churn}
    kinds[sys.argv[1]](**json.loads(sys.argv[2])).run()
