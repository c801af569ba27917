"""The system call of the hub's innermost loop: ways to send a frame to a thousand sockets.

The sockets are connections over loopback, which another process reads. Two figures for each way:

* *Alone*: the CPU time of the sending thread, with the kernel's work, for one send; the best of the
  rounds.
* *Beside a computing thread*: the time that passes, for one send of a thousand in a row; the median
  of the rounds. Whoever gives the GIL away for a call may get it back only after the switch
  interval, 5 ms.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import threading
import time
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

from measuring import Table, options, print_machine, raise_descriptor_limit, write_json

from flask_eventstream import descriptors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Way = Callable[[], None]

SOCKETS = 1_000
FRAME = b"78\r\ndata: " + b"x" * 92 + b"\nid: 0123abcd-1000\n\n\r\n"
HUB = "ctypes.PyDLL, as the hub"


def main() -> None:
    given = options("Compare ways to send to many sockets.", rounds=20)
    raise_descriptor_limit()
    machine = print_machine(["flask-eventstream"])
    with connections(SOCKETS) as sockets:
        ways = ways_to_send(sockets)
        alone = timed(ways, given.rounds, time.thread_time, min)
        with computing_thread():
            beside = timed(ways, given.rounds, time.perf_counter, median)
    rows = {"alone: CPU time": alone, "beside a computing thread: time": beside}
    table = Table("One send", HUB, rows, unit="us", is_judged=False)
    table.print()
    write_json(given.json, machine, [table], bars=[])


def ways_to_send(sockets: list[socket.socket]) -> dict[str, Way]:
    """Return functions that send a frame to each of the sockets."""
    numbers = [one.fileno() for one in sockets]
    typed: Any = ctypes.PyDLL(None)["send"]
    typed.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
    size, flags = descriptors.size_of(FRAME), descriptors.FLAGS

    def by_the_hub(send: Any = descriptors.send) -> None:
        for number in numbers:
            assert send(number, FRAME, size, flags) == len(FRAME)

    def with_argtypes() -> None:
        for number in numbers:
            assert typed(number, FRAME, len(FRAME), flags) == len(FRAME)

    def by_socket() -> None:
        for one in sockets:
            assert one.send(FRAME) == len(FRAME)

    def by_write(write: Callable[[int, bytes], int] = os.write) -> None:
        for number in numbers:
            assert write(number, FRAME) == len(FRAME)

    return {
        HUB: by_the_hub,
        "with argtypes": with_argtypes,
        "socket.send": by_socket,
        "os.write": by_write,
    }


def timed(
    ways: dict[str, Way], rounds: int, clock: Callable[[], float], one_of: Callable[[Any], float]
) -> dict[str, float]:
    """Return the time of one send, in seconds: ``one_of`` the rounds. The ways take turns."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = clock()
            way()
            found[name].append((clock() - start) / SOCKETS)
    return {name: one_of(times) for name, times in found.items()}


@contextmanager
def computing_thread() -> Iterator[None]:
    """Run a thread that computes in Python without pause."""
    is_over = threading.Event()

    def compute() -> None:
        while not is_over.is_set():
            sum(range(1_000))

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@contextmanager
def connections(number: int) -> Iterator[list[socket.socket]]:
    """Open connections that another process reads, and yield this end of them."""
    with socket.create_server(("127.0.0.1", 0), backlog=number) as listener:
        reader = os.fork()
        if reader == 0:
            read_for_ever([socket.create_connection(listener.getsockname()) for _ in range(number)])
        sockets = [listener.accept()[0] for _ in range(number)]
    for one in sockets:
        one.setblocking(False)
        descriptors.prepare(one.fileno(), timeout=30)
    try:
        yield sockets
    finally:
        os.kill(reader, signal.SIGKILL)
        os.waitpid(reader, 0)


def read_for_ever(sockets: list[socket.socket]) -> None:
    """Read whatever comes, and throw it away."""
    watcher = select.epoll()
    for one in sockets:
        watcher.register(one.fileno(), select.EPOLLIN)
    while True:
        for number, _ in watcher.poll():
            os.read(number, 65536)


if __name__ == "__main__":
    main()
