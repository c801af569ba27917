"""Sockets by their file descriptors: the system calls of the hub.

They keep the GIL, for there may be thousands of them in a row. Given away, it comes back only after
the switch interval (5 ms) if another thread computes: 1,000 sends by ``socket.send`` took 353 ms
beside one busy thread, and 2 ms by ``ctypes.PyDLL``. Alone, both take the same time. None of them
waits for anything.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import sys
import time
from typing import Any

from . import concurrency

IS_AVAILABLE = sys.platform == "linux"
"""Whether this system has what is needed: epoll and eventfd."""

IS_GONE = 0x008 | 0x010  # EPOLLERR, EPOLLHUP
"""The event of a socket that is closed in both directions, or failed."""

SAYS_NO_MORE = 0x2000  # EPOLLRDHUP
"""The event of a client that has closed at least its half of the connection."""

_HAS_INPUT = 0x001  # EPOLLIN
_HAS_ROOM = 0x004  # EPOLLOUT
_EDGE_TRIGGERED = 1 << 31  # EPOLLET
_EPOLL_CTL_DEL = 2
_MAX_PART_BYTES = 64 * 1024
# What a client can have sent fills the socket's receive buffer at most: 128 KiB on Linux while
# nobody reads. One that goes on sending must not keep the hub busy.
_MAX_IGNORED_PARTS = 16
_MOST_MILLISECONDS = 2**31 - 1
_LONGEST_IDLE = 32_767
_NOT_SENT_BYTES = struct.pack("i", 128 * 1024)
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_ONE = struct.pack("i", 1)
_RING = struct.pack("Q", 1)

if IS_AVAILABLE:  # pragma: no branch  # elsewhere nobody asks for them
    FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
    _libc = ctypes.PyDLL(None)
    # Without argtypes, which cost half a microsecond for each call.
    send = _libc["send"]
    send.restype = ctypes.c_ssize_t
    # The same, with the reason of a failure, which costs a little too.
    _try_send = ctypes.PyDLL(None, use_errno=True)["send"]
    _try_send.restype = ctypes.c_ssize_t
    _ignored_input = ctypes.create_string_buffer(_MAX_PART_BYTES)


def size_of(wire: bytes) -> Any:
    """Return the size of some bytes as :data:`send` needs it."""
    return ctypes.c_size_t(len(wire))


def send_from(descriptor: int, wire: bytes, offset: int) -> int:
    """Send what there is room for, from an offset on.

    :returns: how many bytes were sent, 0 if there was no room; if the connection is gone, the
        negative number of the error.
    """
    part = wire[offset : offset + _MAX_PART_BYTES]
    sent: int = _try_send(descriptor, part, size_of(part), FLAGS)
    if sent >= 0:
        return sent
    return 0 if (error := ctypes.get_errno()) == errno.EAGAIN else -error


def error_of(descriptor: int) -> int:
    """Return the number of the error that has ended a connection; 0 if it was closed."""
    error = ctypes.c_int()
    size = ctypes.c_uint(ctypes.sizeof(error))
    _libc.getsockopt(
        descriptor, socket.SOL_SOCKET, socket.SO_ERROR, ctypes.byref(error), ctypes.byref(size)
    )
    return error.value


def prepare(descriptor: int, timeout: float, patience: float | None = None) -> None:
    """Have small events leave at once, and bound what the kernel does for a client.

    :param descriptor: the socket.
    :param timeout: how long sent bytes may stay unacknowledged, in seconds.
    :param patience: see :func:`probe`; by default a client to which nothing is sent may be silent.
    """
    # They fail on Unix sockets, which need none of them.
    _libc.setsockopt(descriptor, socket.IPPROTO_TCP, socket.TCP_NODELAY, _ONE, 4)
    # The kernel would take megabytes for a client that does not read.
    _libc.setsockopt(descriptor, socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _NOT_SENT_BYTES, 4)
    _set_user_timeout(descriptor, timeout)
    if patience is not None:
        probe(descriptor, min(timeout, patience))


def probe(descriptor: int, patience: float) -> None:
    """Have the kernel ask a silent client's machine whether it is there, and give it up if not.

    :param descriptor: the socket.
    :param patience: how long it may be silent while nothing is sent, in seconds, 2 at least; and
        how long sent bytes may stay unacknowledged. One may come on top of the other.
    """
    # Asked once; whether it has answered is looked at a while later.
    seconds = max(2, min(int(patience), _LONGEST_IDLE))
    look = max(1, seconds // 3)
    for option, value in (
        (socket.TCP_KEEPIDLE, seconds - look),
        (socket.TCP_KEEPINTVL, look),
    ):
        _libc.setsockopt(descriptor, socket.IPPROTO_TCP, option, struct.pack("i", value), 4)
    _libc.setsockopt(descriptor, socket.SOL_SOCKET, socket.SO_KEEPALIVE, _ONE, 4)
    # It goes before TCP_KEEPCNT, and must be over at that look.
    _set_user_timeout(descriptor, min(patience, seconds - 0.5))


def _set_user_timeout(descriptor: int, seconds: float) -> None:
    milliseconds = struct.pack("i", min(int(seconds * 1000), _MOST_MILLISECONDS))
    _libc.setsockopt(descriptor, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds, 4)


def shut_down(descriptor: int) -> None:
    """Say that no more bytes will come; what was sent still arrives."""
    # Not left to close(): a forked child may still have the socket open.
    _libc.shutdown(descriptor, socket.SHUT_WR)
    # To close a socket with unread input resets it, and the client may lose the last bytes.
    for _ in range(_MAX_IGNORED_PARTS):
        if _libc.recv(descriptor, _ignored_input, ctypes.c_size_t(_MAX_PART_BYTES), FLAGS) <= 0:
            return


def cut(descriptor: int) -> None:
    """End a connection in both directions. Who waits for it, to send or to read, waits no more."""
    _libc.shutdown(descriptor, socket.SHUT_RDWR)


def reset_on_close(descriptor: int) -> None:
    """Have the kernel drop what it still holds for a client when the socket is closed."""
    _libc.setsockopt(descriptor, socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE, 8)


def close(descriptor: int) -> None:
    """Close a socket, or whatever else, now."""
    # Not os.close: gevent's waits for its loop, which a forked child may never run.
    _libc.close(descriptor)


class Watcher:
    """Waits for the events of many sockets, and for a bell.

    The sockets are watched edge-triggered, for room and for the client's end, from the start. What
    a client sends after its request is no event. Under gevent, greenlets run meanwhile.

    :ivar rung_at: when somebody rang who ended, or will end, a wait, by :func:`time.monotonic`.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.is_greenlet = False
        self.rung_at = 0.0
        self._is_rung = False
        self._bell = -1
        self._epoll: Any = None
        self._removed: list[int] = []

    def open(self) -> None:
        """Start to watch, for the thread or the greenlet that calls :meth:`wait` later."""
        self.is_greenlet = concurrency.runs_in_greenlet()
        try:
            self._epoll = concurrency.original("select", "epoll")()
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            # Edge-triggered, an eventfd tells of each write and never has to be read.
            self._epoll.register(self._bell, _HAS_INPUT | _EDGE_TRIGGERED)
            self.is_open = True
        except BaseException:
            # The next caller tries again.
            self._close()
            raise

    def add(self, descriptor: int) -> None:
        """Watch a socket."""
        self._epoll.register(descriptor, _HAS_ROOM | SAYS_NO_MORE | _EDGE_TRIGGERED)

    def forget(self, descriptor: int) -> None:
        """Watch a socket no more."""
        # Not left to close(): a forked child that still has the socket open would keep it watched.
        _libc.epoll_ctl(self._epoll.fileno(), _EPOLL_CTL_DEL, descriptor, None)

    def remove(self, descriptor: int) -> None:
        """Watch a socket no more; :meth:`close_removed` closes it."""
        self._removed.append(descriptor)
        self.forget(descriptor)

    def close_removed(self) -> None:
        """Close what was removed, once the events of the last wait have been looked at.

        Not earlier, or one of them would be taken for an event of the next connection, which gets
        the same descriptor.
        """
        while self._removed:
            close(self._removed.pop())

    def ring(self) -> None:
        """End the current or the next wait; from any thread."""
        if self.is_open and not self._is_rung:
            self._is_rung = True
            self.rung_at = time.monotonic()
            _libc.write(self._bell, _RING, ctypes.c_size_t(8))

    def wait(self, timeout: float) -> list[tuple[int, int]]:
        """Wait for events, for some seconds at most, and return descriptors with their events."""
        if self.is_greenlet:
            concurrency.wait_readable(self._epoll.fileno(), timeout)
            timeout = 0
        events: list[tuple[int, int]] = self._epoll.poll(timeout)
        # From now on who rings counts on another round.
        self._is_rung = False
        return events

    def let_others_run(self) -> None:
        """Let other greenlets run. Threads take turns anyway: nothing here keeps the GIL long."""
        if self.is_greenlet:
            concurrency.switch()

    def _close(self) -> None:
        if self._epoll is not None:
            self._epoll.close()
        if self._bell >= 0:
            close(self._bell)
        self._epoll, self._bell, self.is_open = None, -1, False

    def __del__(self) -> None:
        self.close_removed()
        self._close()
