"""The clients of ``runs.py``: one process that reads many streams of tokens.

As those of ``fanout_clients.py``, it only reads, takes the time and keeps what it has read, and
looks for tokens afterwards. A token has the form of an event's data there.
"""

from __future__ import annotations

import gc
import multiprocessing
import select
import signal
import socket
import time
from array import array
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from fanout_clients import END, PATIENCE, READ_BYTES, READY_AT_ONCE, CrowdError, marks_in

if TYPE_CHECKING:
    from collections.abc import Iterable
    from multiprocessing.connection import Connection

    Note = tuple[int, int, bytes]

STARTING_AT_ONCE = 20
START_EVERY = 0.0023
"""Seconds between two starts. The pause between two tokens is no multiple of it, or many runs
would yield at the same moments."""
START_SECONDS = 60.0
REPORT_SECONDS = 60.0


class Report(NamedTuple):
    """What came while it was measured.

    :param seconds: for how long that was.
    :param cpu: the CPU time of the clients in it, in seconds.
    :param latencies: nanoseconds from yielding to arrival, one for each token that arrived.
    :param lost: how many tokens, from the first one of each stream on, did not come after the one
        with the number before.
    """

    seconds: float
    cpu: float
    latencies: array[int]
    lost: int


class Clients:
    """Clients in a process of their own."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def start(self, port: int, targets: Iterable[str]) -> None:
        """POST to each target, one after another, and wait until all stream.

        :raises CrowdError: if one does not, or not in time.
        """
        self._ask(START_SECONDS + PATIENCE, "start", port, list(targets))

    def begin(self) -> None:
        """Measure from now on."""
        self._ask(PATIENCE, "begin")

    def end(self) -> None:
        """Measure no longer."""
        self._ask(PATIENCE, "end")

    def report(self) -> Report:
        """Close all streams, and return what was measured.

        :raises CrowdError: if a stream has ended by itself.
        """
        report: Report = self._ask(REPORT_SECONDS, "report")
        return report

    def drop(self) -> None:
        """Close all streams."""
        self._ask(PATIENCE, "drop")

    def _ask(self, seconds: float, *order: Any) -> Any:
        self._pipe.send(order)
        if not self._pipe.poll(seconds):
            raise CrowdError("the clients' process does not answer")
        error, answer = self._pipe.recv()
        if error is not None:
            raise CrowdError(error)
        return answer

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(2)
        self._process.kill()
        self._process.join()


def _run(pipe: Connection) -> None:
    """Do what the other end of the pipe says, until it is closed."""
    # Ctrl-C reaches the whole group; the parent ends this process when it is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()
    with suppress(EOFError, BrokenPipeError):
        _Readers(pipe).run()


class _Readers:
    """The clients of one process."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._sockets: dict[int, socket.socket] = {}
        self.drop()

    def drop(self) -> None:
        for connection in self._sockets.values():
            connection.close()
        self._sockets.clear()
        self._epoll = select.epoll()
        self._epoll.register(self._pipe.fileno(), select.EPOLLIN)
        self._notes: list[Note] = []
        self._silent: set[int] = set()
        self._ended = 0

    def run(self) -> None:
        while True:
            if self._read(-1):
                name, *arguments = self._pipe.recv()
                try:
                    self._pipe.send((None, getattr(self, name)(*arguments)))
                except (CrowdError, OSError) as error:
                    self._pipe.send((str(error), None))

    def _read(self, timeout: float) -> bool:
        """Read what comes, and return whether there is an order too."""
        now, sockets, note = time.monotonic_ns, self._sockets, self._notes.append
        has_order = False
        for fd, _ in self._epoll.poll(timeout, READY_AT_ONCE):
            if fd not in sockets:
                has_order = True
                continue
            piece = sockets[fd].recv(READ_BYTES)
            note((fd, now(), piece))
            if not piece:
                self._epoll.unregister(fd)
                self._ended += 1
            elif self._silent and END in piece:
                self._silent.discard(fd)
        return has_order

    def start(self, port: int, targets: list[str]) -> None:
        begin = time.monotonic()
        for number, target in enumerate(targets):
            self._read_until(begin + number * START_EVERY, STARTING_AT_ONCE - 1, begin)
            self._post(port, target)
        self._read_until(begin, 0, begin)

    def _read_until(self, due: float, most_silent: int, begin: float) -> None:
        while (now := time.monotonic()) < due or len(self._silent) > most_silent:
            self._read(max(0.001, due - now))
            if self._ended or now > begin + START_SECONDS:
                raise CrowdError(
                    f"{len(self._silent)} of {len(self._sockets)} streams have no token; "
                    f"{self._ended} have ended"
                )

    def _post(self, port: int, target: str) -> None:
        connection = socket.create_connection(("127.0.0.1", port), PATIENCE)
        head = f"POST {target} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n"
        connection.sendall(f"{head}Content-Length: 0\r\n\r\n".encode())
        connection.setblocking(False)
        self._sockets[connection.fileno()] = connection
        self._silent.add(connection.fileno())
        self._epoll.register(connection.fileno(), select.EPOLLIN)

    def begin(self) -> None:
        self._span = [time.monotonic_ns()]
        self._cpu = time.process_time()

    def end(self) -> None:
        self._cpu = time.process_time() - self._cpu
        self._span.append(time.monotonic_ns())

    def report(self) -> Report:
        if self._ended:
            raise CrowdError(f"{self._ended} streams have ended")
        begin, end = self._span
        latencies, lost = _read_notes(self._notes, begin, end)
        self.drop()
        return Report((end - begin) / 1e9, self._cpu, latencies, lost)


def _read_notes(notes: Iterable[Note], begin: int, end: int) -> tuple[array[int], int]:
    latencies: array[int] = array("q")
    lost = 0
    for mark in marks_in(notes):
        lost += not mark.is_next
        if begin <= mark.arrival < end:
            latencies.append(mark.arrival - mark.published)
    return latencies, lost
