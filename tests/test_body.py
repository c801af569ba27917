from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from flask_eventstream import MemoryBroker
from flask_eventstream.body import Silence, SubscriptionBody, jittered
from flask_eventstream.event import HEARTBEAT


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


def body(broker: MemoryBroker, start: bytes = b"", **options: Any) -> SubscriptionBody:
    settings: dict[str, Any] = {"heartbeat": 15, "max_lifetime": None, "on_close": print} | options
    return SubscriptionBody(broker.subscribe(), start, **settings)


def test_the_first_bytes_come_at_once_and_pending_events_together(broker: MemoryBroker) -> None:
    stream = body(broker, b"first")
    ids = [broker.publish(str(n)) for n in range(3)]
    assert next(stream) == b"first"
    wire = "".join(f"data: {n}\nid: {id}\n\n" for n, id in enumerate(ids))
    assert next(stream) == wire.encode()


def test_silence_is_broken_by_heartbeats(broker: MemoryBroker) -> None:
    stream = body(broker, heartbeat=0.02)
    start = time.monotonic()
    assert [next(stream) for _ in range(6)] == [HEARTBEAT] * 6
    assert time.monotonic() - start >= 3 * 0.02 - 0.005


def test_heartbeats_come_in_pairs_of_which_the_second_ends_the_interval() -> None:
    silence = Silence(15)
    pauses = []
    for wire in (HEARTBEAT, HEARTBEAT, HEARTBEAT, b"event", HEARTBEAT, b"event"):
        pauses.append(silence.pause)
        assert silence.broken_by(wire) == wire
    assert pauses == [14, 1, 14, 1, 14, 1]
    assert silence.pause == 14
    assert Silence(0.5).pause == 0.25


def test_a_body_ends_when_its_subscription_does(broker: MemoryBroker) -> None:
    closed: list[SubscriptionBody] = []
    stream = body(broker, on_close=closed.append)
    broker.publish("last")
    broker.disconnect("sse")
    assert b"data: last" in b"".join(stream)
    assert closed == [stream]


def test_a_body_ends_after_its_lifetime(broker: MemoryBroker) -> None:
    start = time.monotonic()
    assert set(body(broker, max_lifetime=0.05)) <= {HEARTBEAT}
    assert 0.04 <= time.monotonic() - start < 5
    assert broker.subscriber_count() == 0


def test_a_body_that_many_threads_close_tells_it_once(broker: MemoryBroker) -> None:
    closed: list[SubscriptionBody] = []
    stream = body(broker, on_close=closed.append)
    threads = [threading.Thread(target=stream.close) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert closed == [stream]


def test_jitter_stays_within_a_fifth() -> None:
    values = [jittered(100) for _ in range(1000)]
    assert 80 <= min(values) < 85
    assert 115 < max(values) <= 120
