"""A client's socket on its way from a server to the hub: one owner at each step, whatever fails."""

from __future__ import annotations

import gc
import linecache
import os
import socket
import sys
from contextlib import closing, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import flask_eventstream
from flask_eventstream.body import SubscriptionBody
from flask_eventstream.hijack import HijackingBody, ServerSocket
from flask_eventstream.hub import SocketHub
from flask_eventstream.memory_broker import MemoryBroker
from flask_eventstream.response import _hand_over
from flask_eventstream.shutdown import Shutdown

from .servers import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

HEAD = b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n\r\n"
BEAT = b":\n"


class Keeper:
    """Who is told of the stream."""

    def __init__(self) -> None:
        self.shutdown = Shutdown()
        self.ends: list[str] = []

    def connected(self, start: bytes) -> int:
        return 1

    def delivered(self, wire: bytes) -> None: ...

    def replayed(self, wire: bytes) -> None: ...

    def closed(self, body: SubscriptionBody) -> None:
        self.ends.append(body.reason)


class Stage:
    """A server, a client, and a hub; and which descriptors are closed."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.hub = SocketHub(self.broker.watch, 60, BEAT, 30, lambda streams: b"retry: 0\n")
        self.keeper = Keeper()
        self.client, self.server = socket.socketpair()
        self.client.settimeout(10)
        subscription = self.broker.subscribe("a")
        self.stream = SubscriptionBody(subscription, b"first\n", 15, None, self.keeper)
        self.then_calls = 0
        self.body = HijackingBody(
            ServerSocket(self.server, self.forget_rest),
            iter(self.stream),
            partial(_hand_over, self.hub, self.stream, self.stream),
            self.stream.close,
            self.then,
        )

    def forget_rest(self) -> None: ...

    def then(self) -> None:
        self.then_calls += 1

    def serve(self) -> None:
        """Serve the response as a server does, which closes what it has and notes an error."""
        wire = HEAD
        try:
            for item in self.body:
                self.server.sendall(wire + item)
                wire = b""
        finally:
            self.body.close()
            self.server.close()

    def close(self) -> None:
        self.hub.stop()
        # Has it close its own descriptors now, and not when it is garbage.
        self.hub._reset()
        self.broker.close()
        self.client.close()
        self.server.close()


@pytest.fixture
def stage() -> Iterator[Stage]:
    with closing(Stage()) as stage:
        yield stage


def open_descriptors() -> set[str]:
    # But for the one that the listing itself takes.
    return {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}


HANDING_OVER = {"hijack.py", "hub.py", "response.py", "body.py", "descriptors.py", "subscriber.py"}
HOME = Path(flask_eventstream.__file__).parent


class Fault:
    """Raises an error before one line of all that are run, of those that hand a socket over.

    :param line: its number, in the order in which they are run.
    """

    def __init__(self, line: int, error: BaseException) -> None:
        self._left = line
        self._error = error
        self.where = ""

    def __enter__(self) -> Fault:
        self._before = sys.gettrace()
        # What is left of another time is no step of this one.
        gc.disable()
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(self._before)
        gc.enable()

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        path = Path(frame.f_code.co_filename)
        if path.parent == HOME and path.name in HANDING_OVER:
            return partial(self._on_line, set())
        return None

    def _on_line(self, seen: set[int], frame: FrameType, event: str, argument: Any) -> Any:
        # Not where nothing can fail: before a line for the second time, as that of a "with" comes
        # again at its end, and before a bare return.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        is_able = frame.f_lineno not in seen and line not in {"return", "return None"}
        if event == "line" and is_able and not self.where:
            seen.add(frame.f_lineno)
            self._left -= 1
            if self._left < 0:
                self.where = f"{frame.f_code.co_name}:{frame.f_lineno}"
                raise self._error
        return partial(self._on_line, seen)


def received(client: socket.socket) -> bytes:
    """Return what a client gets until its connection is closed."""
    wire = b""
    with suppress(ConnectionResetError):
        while part := client.recv(65536):
            wire += part
    return wire


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("error", [MemoryError, RuntimeError, KeyboardInterrupt])
def test_a_fault_at_any_step_leaves_a_socket_to_one_owner(error: type[BaseException]) -> None:
    places = []
    for line in count():
        where = play_with_fault(line, error())
        if not where:
            break
        places.append(where)
    # Of all that take part in it.
    assert {"_hand_over", "add", "put_in_place", "_give_away"} <= {
        place.partition(":")[0] for place in places
    }


def play_with_fault(line: int, error: BaseException) -> str:
    before = open_descriptors()
    fault = Fault(line, error)
    play(fault, type(error))
    # Its traceback has all there was.
    error.__traceback__ = None
    if not open_descriptors() <= before:
        gc.collect()
    assert open_descriptors() <= before, fault.where
    return fault.where


def play(fault: Fault, error: type[BaseException]) -> None:
    with closing(Stage()) as stage:
        with fault, suppress(error):
            stage.serve()
        # They have the numbers of what was closed.
        others = [socket.socketpair() for _ in range(8)]
        members = stage.hub._members.all
        wait_for(lambda: members or not stage.hub.is_busy, what=fault.where)
        is_served = bool(members)
        stage.broker.publish("x", channel="a")
        stage.hub.stop()
        assert (b"data: x\n" in received(stage.client)) == is_served, fault.where
        for one, other in others:
            with one, other:
                one.setblocking(False)
                with pytest.raises(BlockingIOError):
                    one.recv(1)
                other.close()
                assert one.recv(1) == b"", fault.where
