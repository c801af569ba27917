"""What happens to 400 subscribers of four processes when Redis, or one of the four, fails.

A publisher numbers its events, and tries again what was refused. Each subscriber gets every event
once and in order, or a ``reset``; and in the end all hear again.
"""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from flask_eventstream.redis_broker import RedisBroker

from .faults import Crowd, Proxy, Publisher, proxy
from .redis_server import RedisServer, redis_server
from .servers import DEADLINE, Server, serving, wait_for
from .stress import UNTRACED, workers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.beside

# What is acknowledged has been given to the kernel, which survives the process. With "everysec" it
# may wait for a sync, for up to two seconds on a busy disk, and an event be lost that was accepted.
KEPT = ["--appendonly", "yes", "--appendfsync", "no"]

SUBSCRIBERS = 400
WORKERS = 4


@dataclass
class Rig:
    redis: RedisServer
    server: Server
    crowd: Crowd
    publisher: Publisher
    proxy: Proxy

    def wait_for_events(self, count: int) -> None:
        """Wait until so many more events have been accepted."""
        until = self.publisher.accepted + count
        wait_for(lambda: self.publisher.accepted >= until, 60, f"event {until}")

    def outcome(self) -> dict[str, Any]:
        """Stop publishing, and return what the subscribers got; it must be without a fault."""
        self.wait_for_events(20)
        figures = self.crowd.figures(self.publisher.stop())
        figures |= {"accepted": self.publisher.accepted, "refusals": self.publisher.refusals}
        print(figures, self.server.log()[-2000:])
        assert figures["faults"] == []
        assert figures["behind"] == figures["away"] == 0
        return figures


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with running_rig(tmp_path) as one:
        yield one


@contextmanager
def running_rig(folder: Path, *options: str, pause: float = 0.02) -> Iterator[Rig]:
    with (
        redis_server(folder, *KEPT, *options) as redis,
        proxy(redis.port) as between,
    ):
        environ = {"REDIS_URL": f"redis://127.0.0.1:{between.port}/0", **UNTRACED}
        with serving(
            "tests.redis_app:create_app()", "gevent", f"--workers={WORKERS}", environ=environ
        ) as server:
            wait_for(lambda: len(workers(server)) == WORKERS)
            broker = RedisBroker(redis.url)
            crowd = Crowd(server.port, SUBSCRIBERS)
            publisher = Publisher(broker, pause)
            try:
                figures = crowd.figures(0)
                assert figures["behind"] == figures["resets"] == 0, figures
                yield Rig(redis, server, crowd, publisher, between)
            finally:
                publisher.stop()
                crowd.close()
                broker.close()


def test_nothing_is_lost_while_nothing_fails(rig: Rig) -> None:
    rig.wait_for_events(50)
    figures = rig.outcome()
    assert figures["resets"] == figures["returns"] == figures["refusals"] == 0
    clients = rig.redis.redis.client_list()
    # Of those that have subscribers: chance gives these to the workers.
    listening = sum(int(client["sub"]) > 0 for client in clients)
    assert 1 <= listening <= WORKERS
    wait_for(lambda: listening_processes(rig) == listening)
    assert len(clients) <= WORKERS * (1 + 8) + 8


def listening_processes(rig: Rig) -> int:
    """Return how many processes have told that they have subscribers."""
    keys: Any = rig.publisher._broker._keys
    redis: Any = rig.redis.redis
    told = [
        redis.hget(keys.process(token.decode()), "") for token in redis.smembers(keys.processes)
    ]
    return sum(int(total or 0) > 0 for total in told)


def test_redis_is_killed_and_started_again_ten_times(rig: Rig) -> None:
    for _ in range(10):
        rig.wait_for_events(10)
        rig.redis.kill()
        rig.redis.start()
    rig.outcome()


def test_the_connections_are_cut_a_hundred_times(rig: Rig) -> None:
    for n in range(100):
        rig.wait_for_events(3)
        rig.redis.redis.client_kill_filter(_type="normal" if n % 4 == 0 else "pubsub", skipme=True)
    figures = rig.outcome()
    # Each is made good from the streams, unseen by any client.
    assert figures["resets"] == figures["returns"] == 0


def test_redis_stands_still_for_ten_seconds(rig: Rig) -> None:
    rig.redis.freeze()
    begin = time.monotonic()
    # How long a call takes at most is in the tests of its link.
    with pytest.raises(urllib.error.HTTPError, match="500"):
        urllib.request.urlopen(f"{rig.server.url}/publish", data=b"", timeout=DEADLINE)
    wait_for(lambda: time.monotonic() > begin + 10, 20)
    rig.redis.thaw()
    figures = rig.outcome()
    assert figures["resets"] == figures["returns"] == 0
    assert figures["refusals"] >= 1


def test_the_connections_are_half_open_for_half_a_minute(tmp_path: Path) -> None:
    # Fewer events than history has, so that nothing is gone afterwards.
    with running_rig(tmp_path, pause=0.2) as rig:
        rig.proxy.lose_everything()
        deadline = time.monotonic() + 30
        wait_for(lambda: time.monotonic() > deadline and rig.publisher.accepted > 100, 100)
        rig.proxy.heal()
        figures = rig.outcome()
        assert figures["refusals"] == figures["resets"] == figures["returns"] == 0


def test_more_is_missed_than_redis_has_kept(tmp_path: Path) -> None:
    with running_rig(tmp_path, pause=0.005) as rig:
        rig.proxy.lose_everything()
        rig.wait_for_events(600)
        rig.proxy.heal()
        figures = rig.outcome()
        assert figures["reset_clients"] == SUBSCRIBERS


def test_redis_is_flushed(rig: Rig) -> None:
    rig.redis.redis.flushall()
    rig.wait_for_events(20)
    rig.redis.redis.flushall()
    figures = rig.outcome()
    assert figures["reset_clients"] == SUBSCRIBERS


def test_redis_is_full_for_a_while(rig: Rig) -> None:
    rig.redis.redis.config_set("maxmemory-policy", "noeviction")
    rig.redis.redis.config_set("maxmemory", 1)
    wait_for(lambda: rig.publisher.refusals >= 20)
    rig.redis.redis.config_set("maxmemory", 0)
    figures = rig.outcome()
    assert figures["resets"] == figures["returns"] == 0
    assert any("maxmemory" in reason for reason in rig.publisher.reasons)


def test_workers_are_killed_under_load(tmp_path: Path) -> None:
    # Fewer events than history has while a hundred clients find another worker.
    with running_rig(tmp_path, pause=0.1) as rig:
        for _ in range(6):
            rig.wait_for_events(10)
            os.kill(workers(rig.server)[0], signal.SIGKILL)
        figures = rig.outcome()
        assert figures["returns"] > 0
        assert figures["resets"] == 0
        # Those of the dead are counted out when their leases end.
        wait_for(lambda: count(rig.server) == SUBSCRIBERS, 60)


def count(server: Server) -> int:
    with urllib.request.urlopen(f"{server.url}/count", timeout=20) as answer:
        number: int = json.load(answer)["count"]
        return number
