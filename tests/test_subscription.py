"""What holds of a subscription whatever its broker; the rest of it is in the brokers' contract."""

from __future__ import annotations

import threading

from flask_eventstream import MemoryBroker

from .servers import wait_for


def test_it_holds_a_position_and_no_events() -> None:
    broker = MemoryBroker()
    subscription = broker.subscribe("news")
    before = subscription.cursor
    broker.publish("x" * 100_000, channel="news")
    assert subscription.cursor == before
    assert subscription.take(0)
    assert subscription.cursor == broker.last_event_id()
    assert subscription.channels == ("news",)


def test_who_is_hurried_waits_for_nothing_and_still_gets_what_there_is() -> None:
    broker = MemoryBroker()
    subscription = broker.subscribe("news")
    taken: list[bytes | None] = []
    waiting = threading.Thread(target=lambda: taken.append(subscription.take(60)))
    waiting.start()
    wait_for(lambda: subscription.channel_set.waiting, what="the thread to wait")
    subscription.hurry()
    waiting.join(20)
    assert taken == [b""]
    broker.publish("x", channel="news")
    assert (subscription.take(60) or b"").startswith(b"data: x\n")


def test_closing_it_twice_is_closing_it_once() -> None:
    broker = MemoryBroker()
    one, other = broker.subscribe("news"), broker.subscribe("news")
    one.close()
    one.close()
    assert broker.subscriber_count("news") == 1
    assert one.take(60) is None
    assert other.take(0) == b""
