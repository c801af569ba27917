"""The contract of every broker: each test here runs against each of them."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import pytest

from flask_eventstream import (
    Broker,
    EventStreamParser,
    MemoryBroker,
    ServerSentEvent,
    Subscription,
)
from flask_eventstream.broker import channel_names
from flask_eventstream.errors import BrokerClosedError, InvalidFieldError, TooLargeError
from flask_eventstream.redis_broker import RedisBroker

from .redis_server import PATIENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flask_eventstream.local_broker import LocalBroker

    from .redis_server import RedisServer


@pytest.fixture(params=["memory", "redis", "valkey"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Broker]]:
    made: list[Broker] = []
    is_local = request.param == "memory"
    server: RedisServer | None = None if is_local else request.getfixturevalue(request.param)

    def make_broker(**options: Any) -> Broker:
        if server is None:
            made.append(MemoryBroker(**options))
        else:
            made.append(
                RedisBroker(server.url, key_prefix=server.prefix(), timeout=PATIENT, **options)
            )
        return made[-1]

    yield make_broker
    for broker in made:
        broker.close()


@pytest.fixture
def broker(make: Callable[..., Broker]) -> Broker:
    return make()


def read(subscription: Subscription, start: bool = True, timeout: float = 0) -> list[str]:
    wire = (subscription.start if start else b"") + (subscription.take(timeout) or b"")
    return [event.data for event in EventStreamParser().feed(wire)]


def events(subscription: Subscription) -> list[ServerSentEvent]:
    return EventStreamParser().feed(subscription.start + (subscription.take(0) or b""))


def test_it_counts_what_it_publishes_replays_and_cannot_replay(
    make: Callable[..., LocalBroker],
) -> None:
    broker = make()
    cursor = broker.publish("one", channel=["a", "b"])
    with pytest.raises(InvalidFieldError):
        broker.publish("refused", id=cursor)
    broker.publish_many(["two", "three"], channel="a")
    broker.subscribe("a").close()
    broker.subscribe("a", history=2).close()
    for last_event_id in (cursor, broker.last_event_id("a"), "of-another-life"):
        broker.subscribe("a", last_event_id=last_event_id).close()
    # It is an event of its own in Redis, that ends subscriptions.
    broker.disconnect("a")
    assert (broker.published, broker.replays, broker.resets) == (3, 2, 1)


def test_it_counts_its_own_subscriptions_by_the_prefixes_of_their_channels(
    make: Callable[..., LocalBroker],
) -> None:
    broker = make()
    keep = [broker.subscribe("room:1", "room:2", "news"), broker.subscribe("room:1:x", ":")]
    keep.append(broker.subscribe_log("id", 0))
    assert broker.prefixes() == {"room": 2, "news": 1, ":": 1, "run": 1}
    del keep[0]
    assert broker.prefixes() == {"room": 1, ":": 1, "run": 1}


def test_what_is_published_arrives_as_the_same_bytes(broker: Broker) -> None:
    subscription = broker.subscribe()
    id = broker.publish({"a": 1}, "tick", None, 5)
    assert subscription.take(5) == (
        b'retry: 5\nevent: tick\ndata: {"a": 1}\nid: %b\n\n' % id.encode()
    )


def test_a_whole_event_can_be_published(broker: Broker) -> None:
    subscription = broker.subscribe()
    assert broker.publish(ServerSentEvent("x", "tick", "mine", 5)) == "mine"
    assert subscription.take(5) == b"retry: 5\nevent: tick\ndata: x\nid: mine\n\n"


def test_a_batch_is_published_in_order(broker: Broker) -> None:
    subscription = broker.subscribe("a", "b")
    sent = (n if n % 2 else ServerSentEvent(str(n), id=f"own-{n}") for n in range(250))
    ids = broker.publish_many(sent, channel=["a", "b"])
    received = events(subscription)
    assert [event.data for event in received] == [str(n) for n in range(250)]
    assert [event.id for event in received] == ids
    assert ids[0] == "own-0"


def test_a_batch_with_a_bad_event_leaves_nothing(broker: Broker) -> None:
    subscription = broker.subscribe()
    with pytest.raises(InvalidFieldError):
        broker.publish_many(["fine", b"not"])
    assert broker.publish_many([]) == []
    assert subscription.take(0) == b""


def test_a_whole_event_has_its_fields_itself(broker: Broker) -> None:
    with pytest.raises(TypeError, match="type, id and retry itself"):
        broker.publish(ServerSentEvent("x"), type="tick")


def test_ids_are_short_and_of_plain_characters(broker: Broker) -> None:
    import re

    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,24}", broker.publish("x")) for _ in range(3))


def test_events_arrive_in_order_whatever_the_channel(broker: Broker) -> None:
    subscription = broker.subscribe("a", "b")
    for n in range(6):
        broker.publish(str(n), channel="ab"[n % 2])
    assert read(subscription) == list("012345")


def test_an_event_of_two_channels_arrives_once(broker: Broker) -> None:
    both, one = broker.subscribe("a", "b"), broker.subscribe("b")
    broker.publish("x", channel=["a", "b", "a"])
    assert read(both) == read(one) == ["x"]
    assert read(both) == []


def test_a_channel_gets_nothing_of_another(broker: Broker) -> None:
    subscription = broker.subscribe("a")
    broker.publish("x", channel="b")
    broker.publish("y", channel="a2")
    assert subscription.take(0) == b""


def test_what_was_published_before_is_not_sent_to_a_newcomer(broker: Broker) -> None:
    broker.publish("old")
    subscription = broker.subscribe()
    assert read(subscription) == []
    assert not subscription.resumed


def test_a_newcomer_can_start_with_the_last_events(broker: Broker) -> None:
    for n in range(5):
        broker.publish(str(n), channel="ab"[n % 2])
    assert read(broker.subscribe("a", "b", history=3)) == ["2", "3", "4"]
    assert read(broker.subscribe("a", history=99)) == ["0", "2", "4"]


def test_a_client_that_returns_gets_exactly_what_it_missed(broker: Broker) -> None:
    cursor = broker.publish("1", channel="a")
    broker.publish("2", channel="b")
    broker.publish("3", channel="c")
    broker.publish("4", channel="a")
    subscription = broker.subscribe("a", "b", last_event_id=cursor, history=99)
    broker.publish("5", channel="b")
    assert subscription.resumed
    assert read(subscription) == ["2", "4", "5"]


def test_a_client_that_missed_nothing_gets_nothing(broker: Broker) -> None:
    cursor = broker.publish("1")
    subscription = broker.subscribe(last_event_id=cursor)
    assert subscription.resumed
    assert subscription.start == b""


def test_the_cursor_of_this_moment_gets_all_that_comes_later(broker: Broker) -> None:
    broker.publish("before")
    cursor = broker.last_event_id()
    broker.publish("after")
    assert read(broker.subscribe(last_event_id=cursor)) == ["after"]


def test_the_cursor_of_a_subscription_continues_it(broker: Broker) -> None:
    subscription = broker.subscribe()
    broker.publish("1")
    subscription.take(5)
    cursor = subscription.cursor
    broker.publish("2")
    assert read(broker.subscribe(last_event_id=cursor)) == ["2"]


def test_a_publishers_own_id_is_a_cursor(broker: Broker) -> None:
    broker.publish("1", id="first", channel="a")
    broker.publish("2", id=0, channel="b")
    broker.publish("3", channel="a")
    assert read(broker.subscribe("a", "b", last_event_id="first")) == ["2", "3"]
    assert read(broker.subscribe("a", "b", last_event_id="0")) == ["3"]


def test_an_own_id_of_another_channel_tells_nothing(broker: Broker) -> None:
    broker.publish("1", id="first", channel="a")
    assert not broker.subscribe("b", last_event_id="first").resumed


def test_an_own_id_that_was_used_twice_is_a_reset_and_no_guess(broker: Broker) -> None:
    broker.publish("1", id="same")
    broker.publish("2", id="same")
    [reset, *rest] = events(broker.subscribe(last_event_id="same"))
    assert reset.type == "reset"
    assert [event.data for event in rest] == ["1", "2"]


UNKNOWN = ["garbage", "0", "ffffffff-1", "x" * 100_000, "\u20ac", "-", "7-", "\0"]


@pytest.mark.parametrize("cursor", UNKNOWN, ids=lambda cursor: cursor[:10])
def test_an_unknown_cursor_is_a_reset_and_what_history_has(broker: Broker, cursor: str) -> None:
    earliest = broker.publish("1")
    broker.publish("2")
    subscription = broker.subscribe(last_event_id=cursor)
    [reset, *rest] = events(subscription)
    assert not subscription.resumed
    assert reset.type == "reset"
    assert json.loads(reset.data) == {"requested": cursor[:256], "earliest": earliest}
    assert [event.data for event in rest] == ["1", "2"]


def test_a_cursor_of_the_future_is_a_reset(broker: Broker) -> None:
    epoch = broker.publish("1").rpartition("-")[0]
    for seq in ("2", "99999999999999999999", "٣", "-1", "+1", "1_0"):
        assert events(broker.subscribe(last_event_id=f"{epoch}-{seq}"))[0].type == "reset"


def test_a_reset_without_history_says_so(broker: Broker) -> None:
    [reset] = events(broker.subscribe("empty", last_event_id="garbage"))
    assert json.loads(reset.data) == {"requested": "garbage", "earliest": None}


def test_a_cursor_of_another_broker_is_a_reset(make: Callable[..., Broker]) -> None:
    cursor = make().publish("x")
    assert events(make().subscribe(last_event_id=cursor))[0].type == "reset"


def test_after_a_reset_the_stream_can_be_resumed_from_every_event(broker: Broker) -> None:
    broker.publish("1", id="own")
    broker.publish("2")
    received = events(broker.subscribe(last_event_id="garbage"))
    left = [[event.data for event in received[n + 1 :]] for n in range(3)]
    again = [broker.subscribe(last_event_id=event.id) for event in received]
    assert [read(subscription) for subscription in again] == left
    assert all(subscription.resumed for subscription in again)


def test_what_was_dropped_is_a_reset_and_what_was_not_is_exact(make: Callable[..., Broker]) -> None:
    broker = make(history=3)
    ids = [broker.publish(str(n)) for n in range(6)]
    assert read(broker.subscribe(last_event_id=ids[2])) == ["3", "4", "5"]
    [reset, *rest] = events(broker.subscribe(last_event_id=ids[1]))
    assert json.loads(reset.data) == {"requested": ids[1], "earliest": ids[3]}
    assert [event.data for event in rest] == ["3", "4", "5"]


def test_a_busy_channel_does_not_drop_events_of_a_quiet_one(make: Callable[..., Broker]) -> None:
    broker = make(history=3)
    cursor = broker.publish("1", channel="quiet")
    for _ in range(50):
        broker.publish("x", channel="busy")
    broker.publish("2", channel="quiet")
    assert read(broker.subscribe("quiet", last_event_id=cursor)) == ["2"]
    assert events(broker.subscribe("quiet", "busy", last_event_id=cursor))[0].type == "reset"


def test_a_burst_larger_than_history_does_not_cut_off_who_is_connected(
    make: Callable[..., Broker],
) -> None:
    broker = make(history=0)
    subscription = broker.subscribe()
    for n in range(1000):
        broker.publish(str(n))
    assert read(subscription) == [str(n) for n in range(1000)]


def test_a_subscription_that_fell_too_far_behind_ends(make: Callable[..., Broker]) -> None:
    broker = make(history=1, max_event_bytes=1000)
    slow, fast = broker.subscribe(), broker.subscribe()
    for n in range(100):
        broker.publish(f"{n:500}")
        assert fast.take(0)
    assert slow.take(0) is None
    assert fast.take(0) == b""
    assert events(broker.subscribe(last_event_id=slow.cursor))[0].type == "reset"


def test_take_waits_for_the_first_event(broker: Broker) -> None:
    subscription = broker.subscribe()
    taken: list[bytes | None] = []
    reader = threading.Thread(target=lambda: taken.append(subscription.take(20)))
    reader.start()
    id = broker.publish("x")
    reader.join(20)
    assert taken == [b"data: x\nid: %b\n\n" % id.encode()]


def test_take_returns_nothing_when_the_time_is_over(broker: Broker) -> None:
    assert broker.subscribe().take(0.01) == b""


def test_closing_a_subscription_ends_a_take_that_waits(broker: Broker) -> None:
    subscription = broker.subscribe()
    taken: list[bytes | None] = []
    reader = threading.Thread(target=lambda: taken.append(subscription.take(20)))
    reader.start()
    subscription.close()
    reader.join(20)
    assert taken == [None]
    assert subscription.take(0) is None


def test_publishing_reaches_many_waiting_subscribers(broker: Broker) -> None:
    taken: list[list[str]] = []
    subscriptions = [broker.subscribe() for _ in range(20)]
    readers = [
        threading.Thread(target=lambda one=one: taken.append(read(one, timeout=20)))
        for one in subscriptions
    ]
    for reader in readers:
        reader.start()
    broker.publish("x")
    for reader in readers:
        reader.join(20)
    assert taken == [["x"]] * 20


def test_subscribers_are_counted(broker: Broker) -> None:
    one, both = broker.subscribe("a"), broker.subscribe("a", "b")
    counts = [broker.subscriber_count(name) for name in ("a", "b", "c", None)]
    assert counts == [2, 1, 0, 2]
    both.close()
    both.close()
    assert [broker.subscriber_count(name) for name in ("a", "b", None)] == [1, 0, 1]
    one.close()
    assert broker.subscriber_count() == 0


def test_the_channels_that_are_read_are_told_with_their_numbers(broker: LocalBroker) -> None:
    broker.publish("nobody reads it", channel="c")
    one, both = broker.subscribe("a"), broker.subscribe("a", "b")
    log = broker.subscribe_log("a-run", 0)
    assert broker.channels() == {"a": 2, "b": 1}
    both.close()
    log.close()
    assert broker.channels() == {"a": 1}
    one.close()
    assert broker.channels() == {}


def test_a_broker_tells_how_fast_its_server_answers(broker: LocalBroker) -> None:
    is_local = isinstance(broker, MemoryBroker)
    assert (broker.ping() == 0) == is_local
    assert broker.ping() >= 0
    assert ("redis_version" in broker.server_info()) != is_local
    assert ("maxmemory_policy" in broker.server_info()) != is_local


def test_a_subscription_that_is_dropped_unclosed_is_not_counted(broker: Broker) -> None:
    broker.subscribe("a")
    assert broker.subscriber_count("a") == broker.subscriber_count() == 0


def test_disconnecting_ends_who_reads_the_channel_and_nobody_else(broker: Broker) -> None:
    readers = [broker.subscribe("a"), broker.subscribe("a", "b")]
    other = broker.subscribe("b")
    broker.publish("before", channel="a")
    assert broker.disconnect("a") == 2
    assert broker.disconnect("nobody") == 0
    broker.publish("after", channel=["a", "b"])
    assert [read(one) for one in readers] == [["before"], ["before"]]
    assert [one.take(0) for one in readers] == [None, None]
    assert read(other) == ["after"]
    assert events(broker.subscribe("a", last_event_id=readers[0].cursor))[0].data == "after"


def test_disconnecting_twice_does_not_open_the_stream_again(broker: Broker) -> None:
    subscription = broker.subscribe()
    broker.disconnect("sse")
    broker.publish("secret")
    broker.disconnect("sse")
    assert subscription.take(0) is None


def test_closing_the_broker_ends_all_after_what_was_published(broker: Broker) -> None:
    subscription = broker.subscribe()
    broker.publish("last")
    broker.close()
    broker.close()
    assert read(subscription) == ["last"]
    assert subscription.take(0) is None
    with pytest.raises(BrokerClosedError):
        broker.publish("x")
    with pytest.raises(BrokerClosedError):
        broker.subscribe()


def test_closing_the_broker_wakes_who_waits(broker: Broker) -> None:
    subscription = broker.subscribe()
    taken: list[bytes | None] = []
    reader = threading.Thread(target=lambda: taken.append(subscription.take(20)))
    reader.start()
    broker.close()
    reader.join(20)
    assert taken == [None]


BAD_NAMES = ["", "a\nb", "\0", "\x7f", "\x85", "\ud800", "\x1frun:x", "x" * 256, None, 7]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_no_channel_can_have_is_refused(broker: Broker, name: Any) -> None:
    for act in (
        lambda: broker.publish("x", channel=[name]),
        lambda: broker.subscribe(name),
        lambda: broker.last_event_id(name) if isinstance(name, str) else channel_names([name]),
        lambda: broker.disconnect(name) if isinstance(name, str) else channel_names([name]),
        lambda: broker.subscriber_count(name) if isinstance(name, str) else channel_names([name]),
    ):
        with pytest.raises(InvalidFieldError) as caught:
            act()
        assert caught.value.field == "channel"
    assert broker.subscriber_count() == 0


@pytest.mark.parametrize("channel", [None, 7, [["a"]], [{}], True, object()], ids=ascii)
def test_what_is_neither_a_name_nor_several_is_refused(channel: Any) -> None:
    with pytest.raises(InvalidFieldError, match="channel="):
        channel_names(channel)


def test_no_channel_at_all_is_refused(broker: Broker) -> None:
    with pytest.raises(InvalidFieldError, match="at least one"):
        broker.publish("x", channel=[])


@pytest.mark.parametrize("name", ["a", "room:1", "数据", "with space", "ü" * 255, "🎉", "a\u2028b"])
def test_every_other_name_is_fine(broker: Broker, name: str) -> None:
    subscription = broker.subscribe(name)
    broker.publish("x", channel=name)
    assert read(subscription) == ["x"]


def test_a_bad_event_is_refused_and_leaves_nothing(make: Callable[..., Broker]) -> None:
    broker = make(max_event_bytes=30)
    subscription = broker.subscribe(history=9)
    cursor = broker.last_event_id()
    refused: list[tuple[type[Exception], dict[str, Any]]] = [
        (InvalidFieldError, {"data": b"x"}),
        (InvalidFieldError, {"data": "x", "type": "a\nb"}),
        (InvalidFieldError, {"data": "x", "retry": "3"}),
        (InvalidFieldError, {"data": "x", "id": ""}),
        (InvalidFieldError, {"data": "x", "id": cursor}),
        (TooLargeError, {"data": "x" * 30}),
    ]
    for error, fields in refused:
        with pytest.raises(error):
            broker.publish(**fields)
    assert broker.last_event_id() == cursor
    assert subscription.take(0) == b""


def test_publishers_on_many_threads_make_one_sequence(broker: Broker) -> None:
    subscription = broker.subscribe("all")

    def publish(thread: int) -> None:
        for n in range(200):
            broker.publish([thread, n], channel="all")

    threads = [threading.Thread(target=publish, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
        thread.join()
    received = [json.loads(data) for data in read(subscription)]
    for sender in range(4):
        assert [n for one, n in received if one == sender] == list(range(200))


def test_who_has_not_got_a_value_of_a_key_yet_gets_only_the_newest(broker: Broker) -> None:
    slow = broker.subscribe("prices")
    broker.publish("A 1", channel="prices", key="A")
    assert read(slow) == ["A 1"]
    for price in range(2, 300):
        broker.publish(f"A {price}", channel="prices", key="A")
        broker.publish(f"B {price}", channel="prices", key="B")
    broker.publish("note", channel="prices")
    assert read(slow) == ["A 299", "B 299", "note"]


def test_a_client_that_returns_gets_only_the_newest_of_a_key_and_no_reset(
    make: Callable[..., Broker],
) -> None:
    broker = make(history=4)
    first = broker.subscribe("prices")
    cursor = broker.publish("note", channel="prices")
    for price in range(200):
        broker.publish(str(price), channel="prices", key="A")
    again = broker.subscribe("prices", last_event_id=cursor)
    assert (read(again), again.resumed) == (["199"], True)
    newcomer = broker.subscribe("prices", history=10)
    assert read(newcomer) == ["note", "199"]
    first.close()


def test_a_key_belongs_to_its_channel(broker: Broker) -> None:
    both = broker.subscribe("a", "b")
    broker.publish("1", channel=["a", "b"], key="k")
    broker.publish("2", channel="b", key="k")
    assert read(both) == ["1", "2"]
    broker.publish("3", channel=["a", "b"], key="k")
    broker.publish("4", channel="a", key="k")
    broker.publish("5", channel="b", key="k")
    assert read(both) == ["4", "5"]


def test_the_id_of_a_replaced_event_is_a_cursor_still(broker: Broker) -> None:
    open_one = broker.subscribe("prices")
    replaced = broker.publish("1", channel="prices", key="A")
    broker.publish("2", channel="prices", key="B")
    broker.publish("3", channel="prices", key="A")
    again = broker.subscribe("prices", last_event_id=replaced)
    assert (read(again), again.resumed) == (["2", "3"], True)
    open_one.close()


@pytest.mark.parametrize("key", ["", 1, "a\nb", "x" * 256])
def test_a_key_is_a_name_as_that_of_a_channel(broker: Broker, key: Any) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        broker.publish("x", key=key)
    assert (caught.value.field, caught.value.value) == ("key", key)


@pytest.mark.parametrize(
    "event", [{"data": "x", "id": "own"}, {"data": ServerSentEvent("x", id=7)}]
)
def test_an_own_id_and_a_key_do_not_go_together(broker: Broker, event: dict[str, Any]) -> None:
    subscription = broker.subscribe()
    with pytest.raises(InvalidFieldError, match="leave one of them out") as caught:
        broker.publish(**event, key="A")
    assert (caught.value.field, read(subscription)) == ("key", [])
