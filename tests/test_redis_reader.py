"""The reader's own rules; what it makes of a lost connection is in test_redis_faults."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from flask_eventstream import redis_reader
from flask_eventstream.errors import BrokerUnavailableError
from flask_eventstream.redis_broker import RedisBroker

from .faults import proxy
from .redis_server import PATIENT, RedisServer, given_up_soon, redis_server
from .servers import DEADLINE, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flask_eventstream import Subscription
    from flask_eventstream.redis_scripts import Message, Sync


@pytest.fixture
def broker(redis: RedisServer) -> Iterator[RedisBroker]:
    one = RedisBroker(redis.url, key_prefix=redis.prefix(), timeout=PATIENT)
    yield one
    one.close()


def has_come(subscription: Subscription) -> bool:
    return b"data: x" in (subscription.take(0.1) or b"")


def test_many_channels_are_followed_at_once(broker: RedisBroker, redis: RedisServer) -> None:
    names = [f"user:{n}" for n in range(2500)]
    broker.publish_many(["before"], channel=names[:20])
    subscriptions = [broker.subscribe(*names[:20], history=1), broker.subscribe(*names[20:])]
    assert b"data: before" in subscriptions[0].start
    redis.redis.client_kill_filter(_type="pubsub", skipme=True)
    broker.publish("x", channel=names[::100])
    for subscription in subscriptions:
        wait_for(partial(has_come, subscription))
        subscription.close()
    wait_for(lambda: len(broker._reader._heard) == 0)


def test_silence_is_broken_by_asking(broker: RedisBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_reader, "_SILENCE_SECONDS", 0.2)
    subscription = broker.subscribe()
    asked: list[float] = []
    sync = broker._reader.sync

    def note() -> Sync:
        asked.append(time.monotonic())
        return sync()

    monkeypatch.setattr(broker._reader, "sync", note)
    wait_for(lambda: len(asked) >= 3)
    assert broker._reader.is_connected
    subscription.close()


def test_a_connection_that_has_died_without_a_word_is_replaced(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(redis_reader, "_SILENCE_SECONDS", 0.2)
    prefix = redis.prefix()
    with proxy(redis.port) as between:
        here = RedisBroker(redis.url, key_prefix=prefix)
        there = RedisBroker(f"redis://127.0.0.1:{between.port}", key_prefix=prefix)
        subscription = there.subscribe()
        # Only what hears, so that it is silence that tells.
        between.lose_messages()
        here.publish("x")
        wait_for(partial(has_come, subscription))
        assert "nothing was heard for" in caplog.text
        here.close()
        there.close()


def test_a_reader_that_is_stopped_before_it_connects_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with redis_server(tmp_path) as server:
        broker = RedisBroker(server.url)
        server.kill()
        with given_up_soon(broker._link):
            with pytest.raises(BrokerUnavailableError, match="nothing is heard of it"):
                broker.subscribe()
            broker.close()
            wait_for(lambda: "not counted out" in caplog.text)
        server.start()


def test_who_comes_in_vain_leaves_nothing_behind(own_redis: RedisServer) -> None:
    broker = RedisBroker(own_redis.url)
    subscription = broker.subscribe()
    own_redis.kill()
    with given_up_soon(broker._link):
        wait_for(lambda: not broker._reader.is_connected)
        for n in range(20):
            with pytest.raises(BrokerUnavailableError):
                broker.subscribe(f"user:{n}")
        wait_for(lambda: list(broker._feeds) == ["sse"])
    own_redis.start()
    # It has nothing of what was in it.
    wait_for(lambda: b"event: reset" in (subscription.take(0.1) or b""))
    broker.close()


def test_a_broker_that_never_subscribed_closes_its_connections(own_redis: RedisServer) -> None:
    before = len(own_redis.redis.client_list())
    broker = RedisBroker(own_redis.url)
    broker.publish("x")
    assert len(own_redis.redis.client_list()) == before + 1
    broker.close()
    wait_for(lambda: len(own_redis.redis.client_list()) == before)


def test_a_full_server_is_heard_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with redis_server(tmp_path) as server:
        broker = RedisBroker(server.url)
        subscription = broker.subscribe()
        broker.publish("x")
        server.redis.config_set("maxmemory", 1)
        another = broker.subscribe("another")
        wait_for(lambda: "could not be told" in caplog.text)
        server.redis.config_set("maxmemory", 0)
        broker.publish("y", channel=["sse", "another"])
        assert b"data: y" in (another.take(DEADLINE) or b"")
        assert b"data: y" in (subscription.take(DEADLINE) or b"")
        assert "is tried again" not in caplog.text
        broker.close()


def test_a_flood_of_messages_does_not_keep_the_reader_from_all_else(
    broker: RedisBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_reader, "_MESSAGES_IN_A_ROW", 2)
    subscription = broker.subscribe()
    broker.publish_many(["y"] * 500 + ["x"])
    wait_for(partial(has_come, subscription))


def test_a_server_that_does_not_answer_is_left_at_once(
    broker: RedisBroker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    subscription = broker.subscribe()
    tell = broker._presence.tell

    def fail(*arguments: object) -> None:
        monkeypatch.setattr(broker._presence, "tell", tell)
        raise BrokerUnavailableError("redis://x", "no answer")

    monkeypatch.setattr(broker._presence, "tell", fail)
    wait_for(lambda: "is tried again: redis://x: no answer" in caplog.text)
    broker.publish("x")
    wait_for(partial(has_come, subscription))


def test_a_reader_for_which_there_is_no_thread_is_started_later(
    broker: RedisBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="new thread"):
            broker.subscribe()
    subscription = broker.subscribe()
    broker.publish("x")
    assert has_come(subscription)


def spied(broker: RedisBroker, monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """Return the arguments with which something is entered into what is followed, as they come."""
    calls: list[tuple[Any, ...]] = []
    call = getattr(broker._feeds, name)

    def note(*arguments: Any) -> Any:
        calls.append(arguments)
        return call(*arguments)

    monkeypatch.setattr(broker._feeds, name, note)
    return calls


def test_a_message_of_another_channel_is_heard_between_two_pages(
    broker: RedisBroker, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_reader, "_BYTES_OF_PAGE", 1)
    broker.publish_many(["x"] * 100, channel="large")
    other = broker.subscribe("other")
    order: list[str] = []
    load, hear = broker._feeds.load, broker._feeds.hear

    def note_page(*arguments: Any) -> Any:
        if not order:
            elsewhere.publish("now", channel="other")
        order.append("page")
        return load(*arguments)

    def note_message(message: Message) -> bool:
        order.extend(["message"] if b"now" in message.wire else [])
        return hear(message)

    monkeypatch.setattr(broker._feeds, "load", note_page)
    monkeypatch.setattr(broker._feeds, "hear", note_message)
    prefix = broker._keys.state.decode().removesuffix("0:state")
    with closing(RedisBroker(redis.url, key_prefix=prefix, timeout=PATIENT)) as elsewhere:
        broker.subscribe("large").close()
    # Redis sends it before it answers what is asked behind it: for the next page.
    assert "message" in order[:3]
    assert order.count("page") > 100 / 4
    assert b"data: now" in (other.take(0) or b"")
    other.close()


def test_a_page_ends_with_the_bytes_that_it_may_have(
    broker: RedisBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_reader, "_BYTES_OF_PAGE", 1000)
    names = [f"large:{n}" for n in range(3)]
    for name in names:
        broker.publish_many(["x" * 2000] * 10, channel=name)
    loads = spied(broker, monkeypatch, "load")
    broker.subscribe(*names).close()
    assert len(loads) > 3 * 10 / 4
    assert all(len(records) <= 4 for _, _, records, *_ in loads)
    # Nobody has to wait for all that somebody else has asked for.
    assert [name for name, *_ in loads[:3]] == names


def test_who_comes_and_goes_has_no_history_read_again(
    broker: RedisBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.publish_many(["x"] * 200, channel="a")
    loads = spied(broker, monkeypatch, "load")
    for n in range(5):
        with closing(broker.subscribe("a", history=256)) as subscription:
            assert subscription.start.count(b"data: x") == 200 + n
            broker.publish("x", channel="a")
        wait_for(lambda: "a" not in broker._feeds)
    assert sum(len(records) for _, _, records, *_ in loads) < 200 + 3 * 5
