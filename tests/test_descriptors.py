from __future__ import annotations

import os
import select
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from flask_eventstream import descriptors
from flask_eventstream.descriptors import IS_GONE, SAYS_NO_MORE, Watcher

from .servers import DEADLINE, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOM = select.EPOLLOUT


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Return a connection over TCP: the server's end, and the client's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), timeout=DEADLINE)
        server, _ = listener.accept()
    with server, client:
        yield server, client


@pytest.fixture
def watcher() -> Watcher:
    watcher = Watcher()
    watcher.open()
    return watcher


def events_of(watcher: Watcher, descriptor: int) -> int:
    """Return the events of a descriptor within a deadline, of the first wait that has any."""
    found = wait_for(lambda: dict(watcher.wait(0.1)).get(descriptor, 0))
    return int(found)


def read_all(client: socket.socket) -> None:
    while client.recv(1 << 20):
        pass


def test_what_is_sent_arrives(pair: tuple[socket.socket, socket.socket]) -> None:
    server, client = pair
    size = descriptors.size_of(b"hello")
    assert descriptors.send(server.fileno(), b"hello", size, descriptors.FLAGS) == 5
    assert descriptors.send_from(server.fileno(), b"hello", 2) == 3
    assert client.recv(100) == b"hellollo"


def test_no_send_waits(pair: tuple[socket.socket, socket.socket]) -> None:
    server, _ = pair
    descriptors.prepare(server.fileno(), timeout=30)
    part = b"x" * 65536
    while descriptors.send_from(server.fileno(), part, 0):
        pass
    assert descriptors.send_from(server.fileno(), part, 0) == 0
    assert descriptors.send(server.fileno(), part, descriptors.size_of(part), 0x40) == -1


def test_the_kernel_takes_little_for_a_client_that_reads_nothing(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    taken = []
    server, client = pair
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    descriptors.prepare(server.fileno(), timeout=30)
    while sent := descriptors.send_from(server.fileno(), b"x" * 65536, 0):
        taken.append(sent)
    # It would be megabytes; the rest is what the client's machine had announced room for.
    assert sum(taken) < 600_000


def test_a_connection_that_is_gone_is_told_from_one_without_room(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    server, client = pair
    client.close()
    wait_for(lambda: descriptors.send_from(server.fileno(), b"x", 0) < 0)


def test_small_events_leave_at_once_and_a_vanished_client_is_given_up(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    server, _ = pair
    descriptors.prepare(server.fileno(), timeout=1.5)
    assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1500
    descriptors.prepare(server.fileno(), timeout=threading.TIMEOUT_MAX)
    assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 2**31 - 1


@pytest.mark.parametrize(
    ("patience", "idle", "look", "timeout"),
    [(7.5, 5, 2, 6500), (2, 1, 1, 1500), (0.5, 1, 1, 500), (1e9, 21845, 10922, 32_766_500)],
)
def test_a_silent_client_is_asked_once_and_then_looked_at(
    pair: tuple[socket.socket, socket.socket], patience: float, idle: int, look: int, timeout: int
) -> None:
    server, _ = pair
    descriptors.prepare(server.fileno(), 1e9, patience)
    assert server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == idle
    assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == look
    assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == timeout


def test_nobody_is_waited_for_longer_than_for_all_others(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    server, _ = pair
    descriptors.prepare(server.fileno(), 1, 60)
    assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1000


def test_a_unix_socket_needs_no_preparation() -> None:
    server, client = socket.socketpair()
    with server, client:
        descriptors.prepare(server.fileno(), timeout=30, patience=7)
        assert descriptors.send_from(server.fileno(), b"x", 0) == 1


def test_shutting_down_ends_the_stream_although_the_client_sends_what_nobody_reads(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    server, client = pair
    # More than is read at once.
    client.sendall(b"garbage" * 14_000)
    wait_for(lambda: len(server.recv(200_000, socket.MSG_PEEK)) == 98_000)
    descriptors.send_from(server.fileno(), b"last", 0)
    descriptors.shut_down(server.fileno())
    server.close()
    assert client.recv(100) == b"last"
    assert client.recv(100) == b""


def test_one_that_goes_on_sending_is_not_read_without_end(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = pair
    client.sendall(b"garbage" * 14_000)
    wait_for(lambda: len(server.recv(200_000, socket.MSG_PEEK)) == 98_000)
    monkeypatch.setattr(descriptors, "_MAX_IGNORED_PARTS", 1)
    descriptors.shut_down(server.fileno())
    assert len(server.recv(200_000)) == 98_000 - 65_536


def test_a_reset_drops_what_the_client_did_not_read(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    server, client = pair
    descriptors.send_from(server.fileno(), b"x" * 65536, 0)
    descriptors.reset_on_close(server.fileno())
    server.close()
    with pytest.raises(ConnectionResetError):
        read_all(client)


def test_a_connection_that_is_cut_is_over_at_both_ends(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    server, client = pair
    descriptors.cut(server.fileno())
    assert client.recv(100) == b""
    assert descriptors.send_from(server.fileno(), b"x", 0) < 0
    client.close()
    # It may be gone already.
    descriptors.cut(server.fileno())


def test_the_bell_ends_a_wait_from_any_thread(watcher: Watcher) -> None:
    threading.Timer(0.05, watcher.ring).start()
    # If nothing had ended it, there would be no event.
    assert watcher.wait(DEADLINE)


def test_ringing_twice_is_one_event_and_ringing_again_another(watcher: Watcher) -> None:
    watcher.ring()
    watcher.ring()
    assert len(watcher.wait(DEADLINE)) == 1
    assert watcher.wait(0) == []
    watcher.ring()
    assert len(watcher.wait(DEADLINE)) == 1


def test_a_bell_that_is_not_there_yet_may_be_rung() -> None:
    Watcher().ring()


def test_room_is_an_event_only_after_there_was_none(
    watcher: Watcher, pair: tuple[socket.socket, socket.socket]
) -> None:
    server, client = pair
    watcher.add(server.fileno())
    assert events_of(watcher, server.fileno()) == ROOM
    assert watcher.wait(0) == []
    while descriptors.send_from(server.fileno(), b"x" * 65536, 0):
        pass
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
        read_all(client)
    assert events_of(watcher, server.fileno()) == ROOM


def test_what_a_client_sends_is_no_event(
    watcher: Watcher, pair: tuple[socket.socket, socket.socket]
) -> None:
    server, client = pair
    watcher.add(server.fileno())
    assert events_of(watcher, server.fileno()) == ROOM
    client.sendall(b"garbage")
    wait_for(lambda: server.recv(100, socket.MSG_PEEK))
    assert watcher.wait(0.05) == []


def test_the_end_of_one_half_and_the_end_of_all_are_told_apart(
    watcher: Watcher, pair: tuple[socket.socket, socket.socket]
) -> None:
    server, client = pair
    watcher.add(server.fileno())
    assert events_of(watcher, server.fileno()) == ROOM
    client.shutdown(socket.SHUT_WR)
    event = events_of(watcher, server.fileno())
    assert event & SAYS_NO_MORE
    assert not event & IS_GONE
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    assert events_of(watcher, server.fileno()) & IS_GONE


def test_a_closed_socket_is_not_watched_any_more_although_a_child_has_it(
    watcher: Watcher, pair: tuple[socket.socket, socket.socket]
) -> None:
    server, client = pair
    inherited = server.dup()
    watcher.add(server.fileno())
    assert events_of(watcher, server.fileno()) == ROOM
    watcher.remove(server.detach())
    watcher.close_removed()
    client.close()
    assert watcher.wait(0.05) == []
    inherited.close()


def test_a_watcher_that_is_dropped_leaves_no_descriptors() -> None:
    before = len(os.listdir("/proc/self/fd"))
    watcher = Watcher()
    watcher.open()
    assert len(os.listdir("/proc/self/fd")) == before + 2
    del watcher
    assert len(os.listdir("/proc/self/fd")) == before
