"""The subscribers: many sockets in a few processes, which read and note, and compute afterwards.

A client process must cost less than the server that it measures. So it only reads, takes the time
and keeps what it has read; it looks for events and compares them when the measurement is over.

The data of an event is ``NUMBER@NANOSECONDS@PADDING~``. Its number tells whether one is lost or out
of order; the time is that of ``CLOCK_MONOTONIC`` when it was published. The last character says
that the event is whole, since it occurs nowhere else.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import select
import signal
import socket
import time
from array import array
from collections import deque
from contextlib import suppress
from itertools import cycle
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from multiprocessing.connection import Connection

END = b"~"
MARK = re.compile(rb"(\d+)@(\d+)@[^~]*~")
READ_BYTES = 1 << 14
READY_AT_ONCE = 1024
ADDRESSES = [f"127.0.0.{number}" for number in range(2, 10)]
"""Where clients connect from; one address has 28,000 ports to one server's port."""
CONNECTING_AT_ONCE = 100
"""In all processes; Werkzeug's server has a backlog of 128."""
PATIENCE = 10.0
"""How many seconds may go by without one more subscriber."""
IP_BIND_ADDRESS_NO_PORT = 24
"""Linux's; without it a bound address takes a port that nobody else may use."""


class CrowdError(Exception):
    """Subscribers could not be connected, or their process has ended."""


class Report(NamedTuple):
    """What subscribers got since the last report.

    :param out_of_order: how many events did not come after the one with the number before.
    :param latencies: nanoseconds from publishing to arrival, one for each event that arrived.
    :param reached: for each number, when it was published and when it reached the last subscriber.
    :param ended: how many connections ended.
    """

    received: int
    out_of_order: int
    latencies: array[int]
    reached: dict[int, tuple[int, int]]
    ended: int


class Mark(NamedTuple):
    """What an event says in its data, and when it came.

    :param published: when it was published, in nanoseconds of the clock.
    :param arrival: when it was read.
    :param is_next: whether it came after the one with the number before on its connection.
    """

    number: int
    published: int
    arrival: int
    is_next: bool


class Crowd:
    """Subscribers in processes of their own.

    :param processes: how many.
    """

    def __init__(self, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        self._sizes = [0] * processes
        window = max(1, CONNECTING_AT_ONCE // processes)
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_run, args=(theirs, window), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def connect(
        self, port: int, targets: Sequence[str], seconds: float, awaits_heads: bool = True
    ) -> None:
        """Connect one more subscriber for each target.

        :param awaits_heads: whether to wait until all have got the head of their answer, which
            some servers send with the first event only.
        :raises CrowdError: if one is refused, or not all are connected within so many seconds.
        """
        shares = [targets[start :: len(self._pipes)] for start in range(len(self._pipes))]
        self._sizes = [size + len(share) for size, share in zip(self._sizes, shares, strict=True)]
        for pipe, share in zip(self._pipes, shares, strict=True):
            pipe.send(("connect", port, share, seconds, awaits_heads))
        for answer in self._answers("connected", seconds + PATIENCE):
            if answer is not None:
                raise CrowdError(answer)

    def record(self) -> None:
        """Keep what comes from now on."""
        for pipe in self._pipes:
            pipe.send(("record",))
        self._answers("recording", PATIENCE)

    def wait(self, events: int, seconds: float) -> bool:
        """Wait until each subscriber has got so many, and return whether that came true in time."""
        for pipe, size in zip(self._pipes, self._sizes, strict=True):
            pipe.send(("expect", events * size))
        end = time.monotonic() + seconds
        waiting = set(self._pipes)
        while waiting and (left := end - time.monotonic()) > 0:
            ready = wait(list(waiting), left)
            for pipe in [pipe for pipe in waiting if pipe in ready]:
                _receive(pipe)
                waiting.discard(pipe)
        return not waiting

    def report(self) -> Report:
        """Return what came since :meth:`record`; what comes later is not kept."""
        for pipe in self._pipes:
            pipe.send(("report",))
        return _joined(self._answers("report", 60.0))

    def disconnect(self) -> None:
        """Close all connections."""
        self._sizes = [0] * len(self._pipes)
        for pipe in self._pipes:
            pipe.send(("disconnect",))
        self._answers("disconnected", PATIENCE)

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()

    def _answers(self, kind: str, seconds: float) -> list[Any]:
        end = time.monotonic() + seconds
        return [_answer(pipe, kind, end) for pipe in self._pipes]


def _answer(pipe: Connection, kind: str, end: float) -> Any:
    while pipe.poll(max(0.0, end - time.monotonic())):
        found, value = _receive(pipe)
        # A note that all is there may come late, when nobody waits for it any more.
        if found == kind:
            return value
    raise CrowdError("the subscribers' process does not answer")


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, OSError) as error:
        raise CrowdError("the subscribers' process has ended") from error


def _joined(reports: Sequence[Report]) -> Report:
    latencies: array[int] = array("q")
    reached: dict[int, tuple[int, int]] = {}
    for report in reports:
        latencies.extend(report.latencies)
        for number, (published, last) in report.reached.items():
            reached[number] = (published, max(last, reached.get(number, (0, 0))[1]))
    return Report(
        sum(report.received for report in reports),
        sum(report.out_of_order for report in reports),
        latencies,
        reached,
        sum(report.ended for report in reports),
    )


def _run(pipe: Connection, window: int) -> None:
    """Do what the other end of the pipe says, until it is closed."""
    # Ctrl-C reaches the whole group; the parent ends this process when it is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()
    with suppress(EOFError, BrokenPipeError):
        _Subscribers(pipe, window).run()


class _Subscribers:
    """The subscribers of one process."""

    def __init__(self, pipe: Connection, window: int) -> None:
        self._pipe = pipe
        self._window = window
        self._epoll = select.epoll()
        self._epoll.register(pipe.fileno(), select.EPOLLIN)
        self._sockets: dict[int, socket.socket] = {}
        self._taken: list[tuple[int, int, bytes]] = []
        self._is_recording = False
        self._arrived = 0
        self._expected: int | None = None
        self._ended = 0

    def run(self) -> None:
        """Read what comes, and do what the other end of the pipe says, until that is closed."""
        pipe = self._pipe.fileno()
        while True:
            ready = [fd for fd, _ in self._epoll.poll(-1, READY_AT_ONCE)]
            has_order = pipe in ready
            if has_order:
                ready.remove(pipe)
            self._take(ready)
            if has_order:
                self._obey(*self._pipe.recv())

    def _take(self, ready: list[int]) -> None:
        read, now = os.read, time.monotonic_ns
        note = self._taken.append if self._is_recording else _forget
        arrived, unusual = 0, []
        for fd in ready:
            try:
                piece = read(fd, READ_BYTES)
            except BlockingIOError:
                # It came between the last poll and the last read, which has got it.
                continue
            except OSError:
                piece = b""
            note((fd, now(), piece))
            arrived += piece.count(END)
            if not 0 < len(piece) < READ_BYTES:
                unusual.append((fd, piece))
        self._arrived += arrived
        self._tell()
        for fd, piece in unusual:
            self._take([fd]) if piece else self._end(fd)

    def _tell(self) -> None:
        if self._expected is not None and self._arrived >= self._expected:
            self._expected = None
            self._pipe.send(("all", None))

    def _end(self, fd: int) -> None:
        self._ended += 1
        self._sockets.pop(fd).close()

    def _obey(self, order: str, *arguments: Any) -> None:
        if order == "connect":
            self._pipe.send(("connected", self._connect(*arguments)))
        elif order == "record":
            self._start_over(is_recording=True)
            self._pipe.send(("recording", None))
        elif order == "expect":
            (self._expected,) = arguments
            self._tell()
        elif order == "report":
            self._pipe.send(("report", _read_notes(self._taken, self._ended)))
            self._start_over(is_recording=False)
        elif order == "disconnect":
            self._disconnect()
            self._pipe.send(("disconnected", None))

    def _connect(
        self, port: int, targets: list[str], seconds: float, awaits_heads: bool
    ) -> str | None:
        """Connect, and return what went wrong."""
        window = self._window if awaits_heads else 0
        try:
            for connection in _connected(port, targets, window, seconds):
                self._sockets[connection.fileno()] = connection
                # A read that got less than it could have got has emptied the socket, so that an
                # edge is enough; and the kernel need not look at each socket twice.
                self._epoll.register(connection.fileno(), select.EPOLLIN | select.EPOLLET)
        except (CrowdError, OSError) as error:
            return str(error)
        return None

    def _start_over(self, is_recording: bool) -> None:
        self._taken.clear()
        self._is_recording = is_recording
        self._expected = None
        self._arrived = self._ended = 0

    def _disconnect(self) -> None:
        for connection in self._sockets.values():
            connection.close()
        self._sockets.clear()
        self._start_over(is_recording=False)


def _forget(note: tuple[int, int, bytes]) -> None:
    pass


def _read_notes(taken: list[tuple[int, int, bytes]], ended: int) -> Report:
    latencies: array[int] = array("q")
    reached: dict[int, tuple[int, int]] = {}
    out_of_order = 0
    for mark in marks_in(taken):
        latencies.append(mark.arrival - mark.published)
        latest = max(mark.arrival, reached.get(mark.number, (0, 0))[1])
        reached[mark.number] = (mark.published, latest)
        out_of_order += not mark.is_next
    return Report(len(latencies), out_of_order, latencies, reached, ended)


def marks_in(taken: Iterable[tuple[int, int, bytes]]) -> Iterator[Mark]:
    """Yield what events say in their data, in the order in which they came.

    :param taken: descriptors, when something was read from them, and what.
    """
    expected: dict[int, int] = {}
    rests: dict[int, bytes] = {}
    for fd, arrival, read in taken:
        piece = rests.pop(fd, b"") + read
        end = 0
        for mark in MARK.finditer(piece):
            number, end = int(mark[1]), mark.end()
            yield Mark(number, int(mark[2]), arrival, number == expected.get(fd, 0))
            expected[fd] = number + 1
        rests[fd] = piece[end:]


def _connected(
    port: int, targets: list[str], window: int, seconds: float
) -> Iterator[socket.socket]:
    """Yield connections: without a window once they have asked, else once they are answered.

    :param window: how many wait for their answer at once.
    """
    addresses = cycle(ADDRESSES)
    if not window:
        for target in targets:
            yield _Dialled(port, target, next(addresses)).connection
        return
    waiting = deque(targets)
    end = latest = time.monotonic()
    dialled: dict[int, _Dialled] = {}
    with select.epoll() as epoll:
        while waiting or dialled:
            if time.monotonic() > min(end + seconds, latest + PATIENCE):
                done = len(targets) - len(waiting) - len(dialled)
                raise CrowdError(f"only {done} of {len(targets)} subscribers are connected")
            while waiting and len(dialled) < window:
                one = _Dialled(port, waiting.popleft(), next(addresses))
                dialled[one.connection.fileno()] = one
                epoll.register(one.connection.fileno(), select.EPOLLIN)
            for fd, _ in epoll.poll(0.1):
                if dialled[fd].has_begun():
                    latest = time.monotonic()
                    epoll.unregister(fd)
                    yield dialled.pop(fd).connection


class _Dialled:
    """A connection that has sent its request."""

    def __init__(self, port: int, target: str, address: str) -> None:
        self.connection = socket.socket()
        self.connection.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        self.connection.settimeout(PATIENCE)
        self.connection.bind((address, 0))
        self.connection.connect(("127.0.0.1", port))
        request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n"
        self.connection.sendall(request.encode())
        self.connection.setblocking(False)
        self._head = b""

    def has_begun(self) -> bool:
        """Read, and return whether the head of the answer is there."""
        piece = self.connection.recv(READ_BYTES)
        self._head += piece
        if not piece or not self._head.startswith((b"HTTP/1.1 200", b"HTTP/1.0 200")):
            status = self._head.partition(b"\r\n")[0].decode("latin-1")
            raise CrowdError(f"a subscriber got: {status or 'an end'}")
        return b"\r\n\r\n" in self._head
