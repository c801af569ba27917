from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from typing import Any

import pytest

from flask_eventstream import EventStreamParser, MemoryBroker
from flask_eventstream.channels import _SWEPT_AT_ONCE

from .hammer import SUBSCRIBERS, hammer
from .servers import ROOT, wait_for
from .stress import UNTRACED

RETURNS = 10_000


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def types(wire: bytes) -> list[str]:
    return [event.type for event in EventStreamParser().feed(wire)]


def test_replay_and_live_are_joined_without_a_hole_or_a_repeat() -> None:
    run = hammer(RETURNS)
    assert run.failures == []
    assert run.received["connections"] == RETURNS // SUBSCRIBERS * SUBSCRIBERS
    assert run.received["events"] > RETURNS


def test_replay_and_live_are_joined_under_gevent_too() -> None:
    command = [sys.executable, "-m", "tests.hammer", str(RETURNS)]
    environ = {**os.environ, **UNTRACED}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_history_is_bounded_by_age(clock: Clock) -> None:
    broker = MemoryBroker(history_seconds=10, clock=clock)
    cursor = broker.publish("1")
    clock.now = 6
    broker.publish("2")
    clock.now = 9
    assert broker.subscribe(last_event_id=cursor).resumed
    clock.now = 10.5
    assert broker.subscribe(last_event_id=cursor).resumed
    clock.now = 16.5
    assert types(broker.subscribe(last_event_id=cursor).start) == ["reset"]


def test_channels_that_were_used_once_leave_nothing_behind(clock: Clock) -> None:
    broker = MemoryBroker(history_seconds=10, clock=clock)
    for n in range(100_000):
        clock.now += 0.001
        broker.publish("x", channel=f"user:{n}")
    assert len(list(broker._channels)) <= 10_001
    clock.now += 11
    for _ in range(10_001 // _SWEPT_AT_ONCE + 1):
        broker.publish("x")
    assert list(broker._channels) == ["sse"]


def test_an_idle_subscriber_lets_expired_channels_go(clock: Clock) -> None:
    broker = MemoryBroker(history_seconds=10, clock=clock)
    broker.publish("x", channel="once")
    subscription = broker.subscribe("idle")
    clock.now = 11
    assert subscription.take(0) == b""
    assert list(broker._channels) == ["idle"]
    subscription.close()
    assert not list(broker._channels)


def test_a_channel_that_vanished_is_remembered_as_a_number(clock: Clock) -> None:
    broker = MemoryBroker(history_seconds=10, clock=clock)
    first = broker.publish("1", channel="gone")
    last = broker.publish("2", channel="gone")
    clock.now = 11
    latest = broker.publish("x", channel="other")
    assert "gone" not in broker._channels
    assert types(broker.subscribe("gone", last_event_id=first).start) == ["reset"]
    assert broker.subscribe("gone", last_event_id=last).resumed
    assert broker.subscribe("gone", last_event_id=latest).resumed


def test_the_events_that_left_history_are_replayed_to_nobody(clock: Clock) -> None:
    broker = MemoryBroker(history=2, clock=clock)
    connected = broker.subscribe()
    ids = [broker.publish(str(n)) for n in range(4)]
    assert types(broker.subscribe(last_event_id=ids[0]).start) == ["reset", "message", "message"]
    assert connected.take(0)


def calls_of_publish(subscribers: int) -> int:
    broker = MemoryBroker()
    subscriptions = [broker.subscribe() for _ in range(subscribers)]
    broker.publish("warm")
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    broker.publish("x")
    sys.setprofile(None)
    assert all(one.take(0) for one in subscriptions)
    return calls


def test_publish_does_the_same_work_for_one_and_for_many_subscribers() -> None:
    assert calls_of_publish(1) == calls_of_publish(2000)


def test_the_waker_lives_as_long_as_somebody_is_subscribed() -> None:
    broker = MemoryBroker()
    before = threading.active_count()
    for _ in range(3):
        with_waker = [broker.subscribe(), broker.subscribe()]
        assert [one.take(0.001) for one in with_waker] == [b"", b""]
        assert threading.active_count() == before + 1
        for one in with_waker:
            one.close()
        wait_for(lambda: threading.active_count() == before, what="the waker to end")


def test_a_stream_that_the_garbage_collector_closes_does_not_block_its_thread() -> None:
    broker = MemoryBroker()
    subscription = broker.subscribe()
    with broker._mutex:  # as if the collector had run in the middle of publish()
        subscription.close()
    assert broker.subscriber_count() == 0


def test_a_forked_child_starts_a_sequence_of_its_own() -> None:
    broker = MemoryBroker()
    broker.publish("x")
    cursor = broker.last_event_id()
    broker._mutex.acquire()  # held by a thread that the child does not have
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, broker.last_event_id().encode())
        os._exit(broker.published)
    assert os.waitpid(child, 0)[1] == 0
    broker._mutex.release()
    epoch, _, seq = os.read(reading, 100).decode().partition("-")
    assert seq == "0"
    assert epoch != cursor.partition("-")[0]
    assert broker.last_event_id() == cursor
    for end in (reading, writing):
        os.close(end)


def test_a_broker_that_is_gone_is_no_trouble_to_a_fork() -> None:
    MemoryBroker()
    gc.collect()
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_who_makes_up_channels_has_others_forgotten_and_no_more_kept() -> None:
    broker = MemoryBroker(max_idle_bytes=1 << 20)
    cursor = broker.publish("x", channel="news")
    reader = broker.subscribe("read")
    for n in range(2_000):
        broker.publish("x", channel=f"made-up-{n}")
    kept = list(broker._channels)
    assert 500 < len(kept) < 1_000
    assert "read" in kept
    assert kept[-1] == "made-up-1999"
    # In doubt it is said that something may be gone.
    again = broker.subscribe("news", last_event_id=cursor)
    assert types(again.start) == ["reset"]
    broker.publish("y", channel="read")
    assert types(reader.take(5) or b"") == ["message"]
