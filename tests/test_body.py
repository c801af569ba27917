from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from flask_eventstream import MemoryBroker
from flask_eventstream.body import Silence, SubscriptionBody, jittered
from flask_eventstream.event import HEARTBEAT
from flask_eventstream.places import Places


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


def test_a_body_has_its_place_until_it_closes(broker: MemoryBroker) -> None:
    places = Places()
    stream = body(broker, place=places.take("192.0.2.1"))
    assert places.taken == 1
    stream.close()
    stream.close()
    assert places.taken == 0


def test_a_body_that_is_finished_ends_whoever_waits_for_it(broker: MemoryBroker) -> None:
    places = Places()
    stream = body(broker, b"first", place=places.take("192.0.2.1", "me"))
    assert next(stream) == b"first"
    threading.Timer(0.05, places.finish, ["me", 0]).start()
    assert list(stream) == []
    assert places.taken == 0


@pytest.mark.parametrize("is_first", [True, False])
def test_who_has_the_socket_ends_a_body_that_is_finished(
    broker: MemoryBroker, is_first: bool
) -> None:
    places, ended = Places(), []
    stream = body(broker, heartbeat=0.02, place=places.take("192.0.2.1", "me"))
    if is_first:
        places.finish("me", 0)
    stream.finish_by(lambda: ended.append("by the hub"))
    if not is_first:
        places.finish("me", 0)
        assert next(stream) == HEARTBEAT  # it is not the body that ends it
    assert ended == ["by the hub"]


def test_nobody_else_is_ended_alone(broker: MemoryBroker) -> None:
    for place in (None, Places().take("192.0.2.1")):
        stream = body(broker, place=place)
        stream.finish_by(pytest.fail)
        stream.finish()
        assert list(stream) == []
