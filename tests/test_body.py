from __future__ import annotations

import math
import random
import re
import threading
import time
from typing import Any

import pytest

from flask_eventstream import EventStreamParser, MemoryBroker, endings
from flask_eventstream.body import Silence, SubscriptionBody, jittered
from flask_eventstream.event import HEARTBEAT
from flask_eventstream.places import Places
from flask_eventstream.shutdown import Shutdown
from flask_eventstream.subscription import FRAME_BYTES

from .servers import wait_for


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


class Keeper:
    """Who is told of bodies."""

    def __init__(self) -> None:
        self.shutdown = Shutdown()
        self.sent: list[bytes] = []
        self.of_history: list[bytes] = []
        self.reasons: list[str] = []

    def connected(self, start: bytes) -> int:
        return 7

    def delivered(self, wire: bytes) -> None:
        self.sent.append(wire)

    def replayed(self, wire: bytes) -> None:
        self.of_history.append(wire)

    def closed(self, body: SubscriptionBody) -> None:
        self.reasons.append(body.reason)


@pytest.fixture
def keeper() -> Keeper:
    return Keeper()


def body(
    broker: MemoryBroker, start: bytes = b"", keeper: Keeper | None = None, **options: Any
) -> SubscriptionBody:
    settings: dict[str, Any] = {"heartbeat": 15, "max_lifetime": None} | options
    return SubscriptionBody(broker.subscribe(), start, keeper=keeper or Keeper(), **settings)


def test_the_first_bytes_come_at_once_and_pending_events_together(broker: MemoryBroker) -> None:
    stream = body(broker, b"first")
    ids = [broker.publish(str(n)) for n in range(3)]
    assert next(stream) == b"first"
    wire = "".join(f"data: {n}\nid: {id}\n\n" for n, id in enumerate(ids))
    assert next(stream) == wire.encode()


def test_first_bytes_that_are_many_come_in_two_items(broker: MemoryBroker) -> None:
    # In more, each would be a copy of all that is left.
    stream = body(broker, b"x" * 1_000_000)
    assert [len(next(stream)), len(next(stream))] == [16 * 1024, 1_000_000 - 16 * 1024]
    broker.publish("next")
    assert b"data: next" in next(stream)


def test_history_comes_frame_by_frame_and_is_counted_as_such(
    broker: MemoryBroker, keeper: Keeper
) -> None:
    for n in range(50):
        broker.publish(f"{n:10000}")
    subscription = broker.subscribe(history=50)
    stream = SubscriptionBody(subscription, subscription.start, 15, None, keeper)
    broker.publish("new")
    broker.disconnect("sse")
    items = list(stream)
    assert max(map(len, items)) < FRAME_BYTES + 11_000
    got = [event.data.strip() for event in EventStreamParser().feed(b"".join(items))]
    assert got == [*map(str, range(50)), "new"]
    assert b"data: new" in b"".join(keeper.sent)
    assert subscription.start + b"".join(keeper.of_history + keeper.sent) == b"".join(items)
    assert keeper.reasons == [endings.ENDED]


def test_a_body_in_the_middle_of_history_ends_when_the_server_stops(
    broker: MemoryBroker, keeper: Keeper
) -> None:
    for n in range(50):
        broker.publish(f"{n:10000}")
    subscription = broker.subscribe(history=50)
    stream = SubscriptionBody(subscription, b"first", 15, None, keeper)
    assert [next(stream), len(next(stream)) > 10_000] == [b"first", True]
    stream.stop()
    assert re.fullmatch(rb"retry: \d{4}\n", b"".join(stream))
    assert keeper.reasons == [endings.STOPPED]


def test_a_body_whose_history_is_gone_ends_as_one_that_lags(keeper: Keeper) -> None:
    broker = MemoryBroker(history=20, max_event_bytes=11_000)
    for n in range(20):
        broker.publish(f"{n:10000}")
    stream = SubscriptionBody(broker.subscribe(history=20), b"", 15, None, keeper)
    for n in range(60):
        broker.publish(f"{n:10000}")
    assert list(stream) == []
    assert keeper.reasons == [endings.LAGGED]


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


def test_a_body_ends_when_its_subscription_does(broker: MemoryBroker, keeper: Keeper) -> None:
    stream = body(broker, keeper=keeper)
    broker.publish("last")
    broker.disconnect("sse")
    assert b"data: last" in b"".join(stream)
    assert keeper.reasons == [endings.ENDED]
    assert keeper.sent == [wire for wire in keeper.sent if b"data: last" in wire]


def test_a_body_that_falls_behind_what_is_kept_ends_as_one_that_lags(keeper: Keeper) -> None:
    broker = MemoryBroker(history=1, max_event_bytes=20_000)
    stream = body(broker, keeper=keeper)
    for _ in range(50):
        broker.publish("x" * 10_000)
    assert list(stream) == []
    assert keeper.reasons == [endings.LAGGED]


def test_a_body_ends_after_its_lifetime_and_says_when_to_return(
    broker: MemoryBroker, keeper: Keeper
) -> None:
    start = time.monotonic()
    # Without it, it would not end.
    *beats, last = body(broker, keeper=keeper, max_lifetime=0.05, heartbeat=3600)
    assert set(beats) <= {HEARTBEAT}
    assert re.fullmatch(rb"retry: \d{4}\n", last)
    assert time.monotonic() - start >= 0.04
    assert broker.subscriber_count() == 0
    assert keeper.reasons == [endings.EXPIRED]


def test_a_body_that_waits_ends_with_what_is_pending_when_the_server_stops(
    broker: MemoryBroker, keeper: Keeper
) -> None:
    received: list[bytes] = []
    stream = body(broker, keeper=keeper)
    reader = threading.Thread(target=lambda: received.extend(stream))
    reader.start()
    wait_for(lambda: keeper.shutdown._streams)
    keeper.shutdown.begin()
    reader.join()
    assert re.fullmatch(rb"retry: \d{4}\n", b"".join(received))
    assert keeper.reasons == [endings.STOPPED]
    late = body(broker, keeper=keeper)
    broker.publish("pending")
    assert re.fullmatch(rb"data: pending\nid: \S+\n\nretry: \d{4}\n", b"".join(late))


def test_a_body_that_many_threads_close_tells_it_once(broker: MemoryBroker, keeper: Keeper) -> None:
    stream = body(broker, keeper=keeper)
    threads = [threading.Thread(target=stream.close) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert keeper.reasons == [endings.LEFT]


def test_jitter_stays_within_a_fifth(monkeypatch: pytest.MonkeyPatch) -> None:
    # The least, the middle one and the largest that can be drawn.
    drawn = [0.0, 0.5, math.nextafter(1, 0)]
    monkeypatch.setattr(random, "uniform", lambda a, b: a + (b - a) * drawn.pop(0))
    assert [jittered(100) for _ in range(3)] == pytest.approx([80, 100, 120])
    monkeypatch.undo()
    assert all(80 <= jittered(100) <= 120 for _ in range(1000))


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


class NoThreads:
    """What has no thread of the server for anybody, but one for a large item."""

    def __init__(self, borrower: object = None) -> None:
        self._borrower = borrower

    def take(self, stream: object) -> bool:
        return False

    def lend(self, stream: object) -> bool:
        if self._borrower is not None:
            return False
        self._borrower = stream
        return True

    def release(self, stream: object) -> None:
        if self._borrower is stream:
            self._borrower = None


@pytest.mark.parametrize("events", [0, 2])
def test_a_body_that_may_not_wait_gives_what_there_is_and_ends(
    broker: MemoryBroker, keeper: Keeper, events: int
) -> None:
    stream = body(broker, b"first", keeper)
    stream.threads = NoThreads()  # type: ignore[assignment]
    for n in range(events):
        broker.publish(n)
    first, *rest = stream
    assert first == b"first"
    assert b"".join(rest).count(b"data: ") == events
    assert keeper.sent == rest
    assert keeper.reasons == ["refused"]
    assert broker.subscriber_count() == 0


LARGE = "x" * 100_000


def begin_without_thread(
    broker: MemoryBroker, start: bytes, keeper: Keeper, threads: NoThreads
) -> SubscriptionBody:
    stream = body(broker, start, keeper)
    stream.threads = threads  # type: ignore[assignment]
    assert next(stream)
    return stream


def test_a_body_that_may_not_wait_is_sent_nothing_large_while_another_is(
    broker: MemoryBroker, keeper: Keeper
) -> None:
    threads = NoThreads()
    start = b"data: %b\n\n" % LARGE.encode()
    one = begin_without_thread(broker, start, keeper, threads)
    assert next(one) == start[16 * 1024 :]
    for start in (b":" * 17_000, b":" * 100_000):
        other = begin_without_thread(broker, start, keeper, threads)
        broker.publish(LARGE)
        assert list(other) == [start[16 * 1024 :]][: len(start) < 100_000]
    # It had the thread for one large item, and gives it back with its end.
    assert list(one) == []
    third = begin_without_thread(broker, b":" * 100_000, keeper, threads)
    broker.publish("small")
    assert list(third)[1:] == keeper.sent[-1:] != []
    assert keeper.reasons == ["refused"] * 4


def test_a_body_that_may_not_wait_gets_no_more_at_once_than_a_machine_holds(
    broker: MemoryBroker, keeper: Keeper
) -> None:
    cursor = broker.last_event_id()
    for _ in range(30):
        broker.publish("x" * 10_000)
    subscription = broker.subscribe(last_event_id=cursor)
    stream = SubscriptionBody(subscription, subscription.start, 15, None, keeper)
    stream.threads = NoThreads(borrower="another")  # type: ignore[assignment]
    sent = b"".join(stream)
    assert 32_000 < len(sent) <= 64 * 1024
    assert sent.endswith(b"\n\n")
