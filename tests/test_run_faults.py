"""What becomes of a run on Redis, and of its clients, when the process that produces it dies."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from flask_eventstream import EventStreamParser, ServerSentEvent
from flask_eventstream.redis_broker import RedisBroker

from .servers import DEADLINE, ROOT, Server, serving, standing_still, wait_for
from .stress import UNTRACED, workers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .redis_server import RedisServer

pytestmark = pytest.mark.beside

CLIENTS = 100
LEASE = 4.0
URL = "/stream/count"
ENDS = {"end", "stream-error", "cancelled", "lost"}


class Follower:
    """A client of a run that returns with its cursor until it has the end.

    :ivar process: the process that served it last.
    """

    def __init__(self, port: int, method: str = "GET") -> None:
        self.events: list[ServerSentEvent] = []
        self.connects = 0
        self._port = port
        self._connect(method)

    def _connect(self, method: str) -> None:
        self.connects += 1
        self.connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=DEADLINE)
        cursor = {"Last-Event-ID": self.events[-1].id or ""} if self.events else {}
        self.connection.request(method, URL, headers=cursor)
        self.response = self.connection.getresponse()
        assert self.response.status == 200, (self.response.status, cursor)
        self.process = int(self.response.headers["X-Process"])
        self._parser = EventStreamParser()

    def read(self) -> bool:
        """Read what comes next; tell whether the stream goes on."""
        try:
            part = self.response.read1(65536)
        except (OSError, http.client.HTTPException):
            # Its process was killed.
            return False
        # Without the reconnection time of the first, which is not the same for all.
        new = self._parser.feed(part)
        self.events += [ServerSentEvent(one.data, one.type, one.id) for one in new]
        return bool(part)

    def follow(self) -> Follower:
        while not self.events or self.events[-1].type not in ENDS:
            if not self.read():
                self.close()
                self._return()
        self.close()
        return self

    def close(self) -> None:
        self.response.close()
        self.connection.close()

    def _return(self) -> None:
        # As a browser does, if not for as long.
        time.sleep(0.05)
        try:
            self._connect("GET")
        except (OSError, http.client.HTTPException):
            # The worker that took the connection was about to die.
            self.connection.close()


@pytest.fixture
def server(redis: RedisServer) -> Iterator[Server]:
    environ = {
        "REDIS_URL": redis.url,
        "KEY_PREFIX": redis.prefix(),
        "RUN_LEASE": str(LEASE),
        **UNTRACED,
    }
    with serving("tests.run_app:create_app()", "gevent", "--workers=2", environ=environ) as one:
        wait_for(lambda: len(workers(one)) == 2)
        yield one


def start(server: Server) -> Follower:
    """Start the run, and wait for its first events."""
    starter = Follower(server.port, "POST")
    wait_for(lambda: starter.read() and len(starter.events) > 3)
    return starter


def check(follower: Follower) -> None:
    ids = [str(event.id) for event in follower.events]
    run = ids[0].partition(".")[0]
    assert ids == [f"{run}.{n}" for n in range(1, len(ids) + 1)]
    data = [event.data for event in follower.events]
    assert data[1:-1] == [str(n) for n in range(1, len(ids) - 1)]


def test_when_the_producer_is_killed_all_clients_get_lost(server: Server) -> None:
    starter = start(server)
    producer = int(starter.events[0].data)
    followers = [starter, *[Follower(server.port) for _ in range(CLIENTS - 2)]]
    while len({follower.process for follower in followers}) < 2:
        # One of those that the other process serves, whichever takes connections more eagerly.
        with standing_still(producer):
            followers.append(Follower(server.port))
    with ThreadPoolExecutor(CLIENTS) as pool:
        futures = [pool.submit(follower.follow) for follower in followers]
        wait_for(lambda: all(len(one.events) > 10 for one in followers))
        os.kill(producer, signal.SIGKILL)
        done = [future.result(DEADLINE) for future in futures]
    assert {one.events[-1].type for one in done} == {"lost"}
    # The end is one event of the log, the same for all.
    assert len({one.events[-1].id for one in done}) == 1
    for one in done:
        check(one)
    # Those of the other process did not have to come back.
    assert 0 < sum(one.connects > 1 for one in done) < CLIENTS
    # It is free for the next one.
    start(server).close()


def test_a_producer_that_stood_still_for_too_long_writes_nothing_more(server: Server) -> None:
    starter = start(server)
    producer = int(starter.events[0].data)
    clients = [Follower(server.port)]
    with standing_still(producer):
        other = Follower(server.port)
        assert other.follow().events[-1].type == "lost"
    wait_for(lambda: "the generator was closed" in server.log())
    # Its own client sees the same end, and so does who comes now, wherever that is.
    assert starter.follow().events == other.events
    for client in (*clients, *[Follower(server.port) for _ in range(10)]):
        assert client.follow().events == other.events
    check(other)


def test_a_process_that_ends_by_itself_gives_its_runs_up_at_once(redis: RedisServer) -> None:
    prefix = redis.prefix()
    program = f"""
from flask_eventstream.redis_broker import RedisBroker
registry = RedisBroker({redis.url!r}, key_prefix={prefix!r}).registry(600, 600, 1)
assert registry.begin("key", "run", print, b"")
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=DEADLINE)
    broker = RedisBroker(redis.url, key_prefix=prefix)
    found = broker.registry(600, 600, 1).find("key")
    assert found
    assert found.is_lost
    broker.close()
