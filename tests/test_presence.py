"""Members of a room that real servers serve: tabs, reloads, workers and clients that die."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Any

import pytest

from flask_eventstream import EventStreamParser

from .servers import DEADLINE, Server, serving, wait_for
from .stress import workers
from .test_stress import drop_all_packets

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flask_eventstream import ServerSentEvent

    from .redis_server import RedisServer

pytestmark = pytest.mark.beside

CONFIG = {"HEARTBEAT": 2, "PRESENCE_SECONDS": 1}
OPTIONS = {"gevent": [], "gthread": ["--threads=8"]}


class Visitor:
    """A connection that is read to its end, and what it has heard, in words.

    :ivar process: who serves it.
    """

    def __init__(self, server: Server, path: str, last_event_id: str = "") -> None:
        self.heard: list[str] = []
        self.last_event_id = last_event_id
        self._connection = HTTPConnection("127.0.0.1", server.port, timeout=DEADLINE)
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        self._connection.request("GET", path, headers=headers)
        assert isinstance(self._connection.sock, socket.socket)
        self.socket = self._connection.sock
        self._answer = self._connection.getresponse()
        self.process = int(self._answer.headers["X-Pid"])
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        parser = EventStreamParser()
        # Whatever ends it: a browser would come back.
        with suppress(OSError, HTTPException, ValueError):
            while chunk := self._answer.read1():
                self.heard += [in_words(event) for event in parser.feed(chunk)]
                self.last_event_id = parser.last_event_id

    def wait_for(self, *words: str) -> None:
        self.wait_for_last(words[-1])
        assert self.heard == list(words)

    def wait_for_last(self, word: str) -> None:
        wait_for(lambda: self.heard[-1:] == [word], what=word)

    def wait_for_end(self) -> None:
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()

    def close(self) -> None:
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._connection.close()


def in_words(event: ServerSentEvent) -> str:
    data = json.loads(event.data)
    return f"{event.type} {data.get('member') or ' '.join(data['members'])} {data['count']}"


class House:
    """A server, and who visits its room."""

    def __init__(self, server: Server, stack: ExitStack) -> None:
        self.server = server
        self._stack = stack

    def visit(self, path: str, last_event_id: str = "") -> Visitor:
        visitor = Visitor(self.server, path, last_event_id)
        self._stack.callback(visitor.close)
        return visitor

    def visit_process(self, process: int, path: str) -> Visitor:
        """Visit until a process answers; what others have answered is closed."""
        while True:
            visitor = Visitor(self.server, path)
            if visitor.process == process:
                self._stack.callback(visitor.close)
                return visitor
            visitor.close()

    def wait_for_members(self, seconds: float) -> None:
        """Have who leaves be waited for that long from now on, in seconds; for one process."""
        url = f"{self.server.url}/wait/{seconds:.1f}"
        with urllib.request.urlopen(url, data=b"", timeout=DEADLINE) as answer:
            assert json.load(answer) == {"seconds": seconds}

    def present(self) -> Any:
        with urllib.request.urlopen(f"{self.server.url}/present", timeout=DEADLINE) as answer:
            return json.load(answer)


@contextmanager
def house(worker: str, *options: str, url: str = "", **config: Any) -> Iterator[House]:
    app = f"tests.presence_app:create_app({CONFIG | config})"
    environ = {"REDIS_URL": url} if url else {}
    with ExitStack() as stack:
        server = stack.enter_context(
            serving(app, worker, *OPTIONS[worker], *options, environ=environ)
        )
        yield House(server, stack)
        # One that gunicorn has for each client that it finds to be gone like this.
        log = server.log().replace("TimeoutError: [Errno 110]", "")
        assert log.count("Traceback") == server.log().count("TimeoutError: [Errno 110]"), log


@contextmanager
def two_processes(redis: RedisServer, **config: Any) -> Iterator[House]:
    config["KEY_PREFIX"] = redis.prefix()
    with house("gevent", "--workers=2", url=redis.url, **config) as one:
        wait_for(lambda: len(workers(one.server)) == 2)
        yield one


@pytest.fixture(scope="module")
def impatient(redis: RedisServer) -> Iterator[House]:
    """Two processes that meet in Redis, with a lease that ends soon."""
    with two_processes(redis, LEASE=3) as one:
        yield one


@pytest.fixture
def many(impatient: House) -> House:
    wait_for(lambda: impatient.present() == [])
    return impatient


def test_tabs_at_two_processes_are_one_member_which_joins_and_leaves_once(many: House) -> None:
    watcher = many.visit("/watch")
    tabs = [many.visit("/room/ada")]
    tabs[0].wait_for("present ada 1", "join ada 1")
    [other] = set(workers(many.server)) - {tabs[0].process}
    tabs.append(many.visit_process(other, "/room/ada"))
    tabs[1].wait_for("present ada 1")
    tabs[0].close()
    bob = many.visit("/room/bob")
    bob.wait_for("present ada bob 2", "join bob 2")
    # It hears what it has missed, and is not told again who was there.
    tabs[0] = many.visit("/room/ada", tabs[0].last_event_id)
    tabs[0].wait_for("join bob 2")
    assert many.present() == ["ada", "bob"]
    for tab in tabs:
        tab.close()
    watcher.wait_for("join ada 1", "join bob 2", "leave ada 1")
    bob.close()
    watcher.wait_for("join ada 1", "join bob 2", "leave ada 1", "leave bob 0")
    assert many.present() == []


def test_the_members_of_a_killed_process_leave_once_and_who_returns_stays(many: House) -> None:
    one, two = workers(many.server)
    doomed = [many.visit_process(one, f"/room/{name}") for name in ("ada", "bob")]
    wait_for(lambda: many.present() == ["ada", "bob"])
    watchers = [many.visit_process(two, "/watch") for _ in range(2)]
    os.kill(one, signal.SIGKILL)
    for visitor in doomed:
        visitor.wait_for_end()
    bob = many.visit("/room/bob")
    for watcher in watchers:
        watcher.wait_for("leave ada 1")
    bob.wait_for("present ada bob 2", "leave ada 1")
    zed = many.visit("/room/zed")
    zed.wait_for("present bob zed 2", "join zed 2")
    for watcher in watchers:
        watcher.wait_for("leave ada 1", "join zed 2")


def test_a_deploy_is_no_leave_for_those_who_come_back(redis: RedisServer) -> None:
    with two_processes(redis) as many:
        visitors = {path: many.visit(path) for path in ("/room/ada", "/watch")}
        many.visit("/room/bob").close()
        for visitor in visitors.values():
            visitor.wait_for_last("leave bob 1")
        old = set(workers(many.server))
        many.server.process.send_signal(signal.SIGHUP)
        # A worker that stops sends its clients away at once, and they would have to come again.
        wait_for(lambda: not old & set(workers(many.server)))
        for path, visitor in visitors.items():
            visitor.wait_for_end()
            visitors[path] = many.visit(path, visitor.last_event_id)
        # Who stays away longer than that has left, and ada has not.
        many.visit("/room/bob").close()
        for visitor in visitors.values():
            visitor.wait_for("join bob 2", "leave bob 1")
        assert many.present() == ["ada"]


@pytest.mark.parametrize(
    ("worker", "hijack"), [("gevent", True), ("gthread", True), ("gevent", False)]
)
def test_in_one_process_a_reload_is_nothing_and_who_vanishes_leaves(
    worker: str, hijack: bool
) -> None:
    # Only what is done for members finds the one that vanishes while the test waits.
    with house(worker, HIJACK=hijack, MAX_LAG=600) as one:
        ada, bob, watcher = [one.visit(path) for path in ("/room/ada", "/room/bob", "/watch")]
        # However long a reload takes. Bob is waited for no longer than others, but for the time
        # that it takes to find out that nothing comes from there.
        one.wait_for_members(600)
        for _ in range(3):
            ada.close()
            ada = one.visit("/room/ada")
            ada.wait_for("present ada bob 2")
        # Who is gone before the first byte.
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", one.server.port)) as hasty:
                hasty.sendall(b"GET /room/ada HTTP/1.1\r\nHost: test\r\n\r\n")
        one.wait_for_members(1)
        drop_all_packets(bob.socket)
        watcher.wait_for("leave bob 1")
        ada.close()
        watcher.wait_for("leave bob 1", "leave ada 0")
        assert one.present() == []
