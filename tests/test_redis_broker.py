from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import redis as redis_py

from flask_eventstream import EventStreamParser, ServerSentEvent, redis_reader
from flask_eventstream.errors import BrokerUnavailableError, InvalidFieldError, TooLargeError
from flask_eventstream.redis_broker import RedisBroker
from flask_eventstream.redis_scripts import PUBLISH, Keys
from flask_eventstream.run_registry import Write

from .faults import Proxy, proxy
from .redis_server import PATIENT, RedisServer, given_up_soon, redis_server, valkey_program
from .servers import DEADLINE, ROOT, free_port, serving, wait_for
from .stress import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from flask_eventstream import Subscription

    Make = Callable[..., RedisBroker]
    T = TypeVar("T")


@pytest.fixture
def make(redis: RedisServer) -> Iterator[Make]:
    """Return what makes brokers, each as if it were in a process of its own."""
    prefix = redis.prefix()
    made: list[RedisBroker] = []

    def make_broker(url: str = "", **options: Any) -> RedisBroker:
        made.append(
            RedisBroker(url or redis.url, **{"key_prefix": prefix, "timeout": PATIENT, **options})
        )
        return made[-1]

    yield make_broker
    for broker in made:
        broker.close()


@pytest.fixture
def brief_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a connection that has died without a word noticed sooner."""
    monkeypatch.setattr(redis_reader, "_SILENCE_SECONDS", 0.3)


def prefix_of(broker: RedisBroker) -> str:
    return broker._keys.state.decode().removesuffix("state")


def patiently(call: Callable[[], T]) -> T:
    """Call until Redis answers in time, where a broker waits less long than a machine is busy."""

    def attempt() -> list[T]:
        with suppress(BrokerUnavailableError):
            return [call()]
        return []

    return wait_for(attempt)[0]


def take(subscription: Subscription, count: int) -> list[ServerSentEvent]:
    """Return so many events, as soon as they have come."""
    events: list[ServerSentEvent] = []
    parser = EventStreamParser()

    def has_come() -> bool:
        wire = subscription.take(0.1)
        assert wire is not None, "it ended"
        events.extend(parser.feed(wire))
        return len(events) >= count

    wait_for(has_come, what=f"{count} events")
    assert len(events) == count
    return events


def data(subscription: Subscription, count: int) -> list[str]:
    return [event.data for event in take(subscription, count)]


def start(subscription: Subscription) -> list[str]:
    return [
        event.type if event.type != "message" else event.data
        for event in EventStreamParser().feed(subscription.start)
    ]


# Several processes


def test_what_one_process_publishes_reaches_the_subscribers_of_another(make: Make) -> None:
    one, two = make(), make()
    subscription = two.subscribe("a", "b")
    ids = [one.publish(str(n), channel=["a", "b"][: n % 2 + 1]) for n in range(6)]
    events = take(subscription, 6)
    assert [event.data for event in events] == list("012345")
    assert [event.id for event in events] == ids


def test_the_processes_have_one_sequence(make: Make) -> None:
    brokers = [make() for _ in range(3)]
    subscriptions = [broker.subscribe() for broker in brokers]

    def publish(broker: RedisBroker) -> None:
        for _ in range(50):
            broker.publish("x")

    threads = [threading.Thread(target=publish, args=(broker,)) for broker in brokers]
    for thread in threads:
        thread.start()
    received = [[event.id for event in take(one, 150)] for one in subscriptions]
    for thread in threads:
        thread.join()
    assert received[0] == received[1] == received[2]
    assert len(set(received[0])) == 150


def test_a_cursor_works_in_every_process(make: Make) -> None:
    one, two = make(), make()
    cursor = one.publish("1")
    one.publish("2", id="own")
    one.publish("3")
    assert start(two.subscribe(last_event_id=cursor)) == ["2", "3"]
    assert start(two.subscribe(last_event_id="own")) == ["3"]
    assert start(make().subscribe(history=2)) == ["2", "3"]


def test_a_cursor_of_which_a_process_has_not_heard_yet_is_no_reset(make: Make) -> None:
    one, two = make(), make()
    keep = two.subscribe()
    for n in range(100):
        # The message of it is still on its way to the other process.
        cursor = one.publish(str(n), id=f"own-{n}" if n % 2 else None)
        subscription = two.subscribe(last_event_id=cursor)
        assert subscription.resumed
        assert subscription.start == b""
        subscription.close()
    keep.close()


def test_a_cursor_that_a_process_has_from_other_channels_is_no_reset(make: Make) -> None:
    one, two = make(), make()
    keep = two.subscribe("quiet")
    one.publish("x", channel="busy")
    cursor = one.last_event_id()
    one.publish("y", channel="quiet")
    assert start(two.subscribe("quiet", last_event_id=cursor)) == ["y"]
    keep.close()


def test_a_channel_that_nobody_has_read_yet_can_be_resumed_from_a_recent_cursor(
    make: Make,
) -> None:
    one, two = make(), make()
    one.publish("x", channel="other")
    cursor = one.last_event_id("new")
    one.publish("y", channel="other")
    subscription = two.subscribe("new", last_event_id=cursor)
    assert (subscription.resumed, subscription.start) == (True, b"")


def test_disconnecting_reaches_every_process(make: Make) -> None:
    one, two = make(), make()
    subscriptions = [one.subscribe("a"), two.subscribe("a", "b"), two.subscribe("b")]
    wait_for(lambda: one.subscriber_count("a") == 2)
    one.publish("last", channel="a")
    assert one.disconnect("a") == 2
    one.publish("after", channel=["a", "b"])
    assert data(subscriptions[2], 1) == ["after"]
    for subscription in subscriptions[:2]:
        assert EventStreamParser().feed(subscription.take(DEADLINE) or b"")[0].data == "last"
        assert subscription.take(DEADLINE) is None


def test_a_disconnect_is_not_part_of_the_history(make: Make) -> None:
    one, two = make(), make()
    one.publish("1")
    one.disconnect("sse")
    one.publish("2")
    assert start(two.subscribe(history=2)) == ["1", "2"]


@pytest.mark.usefixtures("brief_silence")
@pytest.mark.parametrize(("missed", "is_reset"), [(200, False), (256, False), (257, True)])
def test_what_a_process_missed_is_made_good_or_a_reset(
    missed: int, is_reset: bool, make: Make, redis: RedisServer
) -> None:
    with proxy(redis.port) as between:
        one, two = make(), make(f"redis://127.0.0.1:{between.port}/0", timeout=2)
        subscription = patiently(two.subscribe)
        cursor = one.publish("before")
        assert data(subscription, 1) == ["before"]
        between.lose_everything()
        numbers = [str(n) for n in range(missed)]
        one.publish_many(numbers)
        between.heal()
        if not is_reset:
            assert data(subscription, missed) == numbers
            return
        [reset] = take(subscription, 1)
        assert (reset.type, reset.id) == ("reset", cursor)
        assert subscription.take(DEADLINE) is None
        back = patiently(partial(two.subscribe, last_event_id=cursor))
        assert start(back) == ["reset", *numbers[1:]]


@pytest.mark.parametrize(("missed", "is_reset"), [(4, False), (5, False), (6, True)])
def test_what_a_client_missed_is_replayed_or_a_reset(
    missed: int, is_reset: bool, make: Make
) -> None:
    one, two, three = make(history=5), make(history=5), make(history=5)
    keep = two.subscribe()
    cursor = one.publish("before")
    numbers = [str(n) for n in range(missed)]
    one.publish_many(numbers)
    assert data(keep, missed + 1) == ["before", *numbers]
    # In a process that has followed the channel, and in one that has not.
    for broker in (two, three):
        replayed = start(broker.subscribe(last_event_id=cursor))
        assert replayed == (["reset", *numbers[1:]] if is_reset else numbers)
    keep.close()


@pytest.mark.usefixtures("brief_silence")
def test_a_disconnect_that_was_missed_is_made_good(make: Make, redis: RedisServer) -> None:
    with proxy(redis.port) as between:
        one, two = make(), make(f"redis://127.0.0.1:{between.port}/0", timeout=2)
        subscription = patiently(two.subscribe)
        between.lose_everything()
        one.publish("last")
        one.disconnect("sse")
        one.publish("after")
        between.heal()
        assert data(subscription, 1) == ["last"]
        assert subscription.take(DEADLINE) is None


def test_subscribers_are_counted_in_all_processes(make: Make, redis: RedisServer) -> None:
    one, two = make(), make()
    subscriptions = [one.subscribe("a"), two.subscribe("a", "b"), two.subscribe("b")]
    wait_for(lambda: [one.subscriber_count(name) for name in ("a", "b", None)] == [2, 2, 3])
    wait_for(lambda: [two.subscriber_count(name) for name in ("a", "b", None)] == [2, 2, 3])
    assert (one.subscriptions, two.subscriptions) == (1, 2)
    subscriptions[1].close()
    wait_for(lambda: one.subscriber_count("a") == 1)
    two.close()
    wait_for(lambda: one.subscriber_count() == 1)
    keys = Keys(prefix_of(one).removesuffix("0:"), 0)
    assert redis.redis.scard(keys.processes.decode()) == 1
    subscriptions[0].close()
    subscriptions[2].close()


def test_the_counts_come_back_after_they_were_lost(make: Make, redis: RedisServer) -> None:
    one, two = make(), make()
    subscriptions = [one.subscribe("a") for _ in range(3)]
    wait_for(lambda: two.subscriber_count("a") == 3)
    redis.redis.delete(one._presence.key)
    assert two.subscriber_count("a") == 0
    wait_for(lambda: two.subscriber_count("a") == 3)
    for subscription in subscriptions:
        subscription.close()


def test_a_channel_is_heard_as_long_as_somebody_reads_it(make: Make, redis: RedisServer) -> None:
    broker = make()
    pattern = f"{prefix_of(broker)}*"

    def heard() -> int:
        return len(redis.redis.pubsub_channels(pattern))

    subscriptions = [broker.subscribe(f"user:{n}") for n in range(50)]
    assert heard() == 51  # and what only this process hears
    for subscription in subscriptions:
        subscription.close()
    wait_for(lambda: heard() == 1)
    again = broker.subscribe("user:7")
    broker.publish("x", channel="user:7")
    assert data(again, 1) == ["x"]
    again.close()


def test_a_thousand_subscribers_take_one_connection(own_redis: RedisServer, make: Make) -> None:
    before = len(own_redis.redis.client_list())
    broker = make(own_redis.url)
    subscriptions = [broker.subscribe(f"user:{n % 100}") for n in range(1000)]
    broker.publish("x", channel="user:1")
    clients = own_redis.redis.client_list()
    assert sum(int(client["sub"]) == 101 for client in clients) == 1
    assert len(clients) - before <= 1 + 2
    for subscription in subscriptions:
        subscription.close()


# What Redis keeps


def test_every_key_but_the_state_expires(make: Make, redis: RedisServer) -> None:
    broker = make(history_seconds=10)
    with_presence = broker.subscribe("a")
    broker.publish("x", channel=["a", "b"])
    wait_for(lambda: broker._presence._counts == {"a": 1})
    keys = {key.decode() for key in redis.redis.scan_iter(f"{prefix_of(broker)}*")}
    lives = {key.removeprefix(prefix_of(broker)): redis.redis.ttl(key) for key in keys}
    presence = broker._presence.key.decode().removeprefix(prefix_of(broker))
    assert lives.pop("state") == -1
    assert lives.pop("processes") == -1
    assert 0 < lives.pop(presence) <= 15
    assert 0 < lives.pop("marks") <= 280
    assert lives == {"channel:a": pytest.approx(69, abs=2), "channel:b": pytest.approx(69, abs=2)}
    with_presence.close()


def test_the_streams_are_trimmed(make: Make, redis: RedisServer) -> None:
    small, large = make(history=3), make(history=300)
    small.publish_many(["x"] * 500, channel="a")
    large.publish_many(["x"] * 500, channel="b")
    lengths = [redis.redis.xlen(f"{prefix_of(small)}channel:{name}") for name in "ab"]
    assert lengths == [256, 300]
    assert start(small.subscribe("a", history=99)) == ["x"] * 3


def test_history_that_expired_is_a_reset_and_a_younger_cursor_is_not(
    make: Make, redis: RedisServer
) -> None:
    one, two = make(), make()
    old = one.publish("1", channel="a")
    one.publish("2", channel="a")
    young = one.publish("x", channel="b")
    # As if all of it had been published long ago, and the other channel went on.
    redis.redis.delete(f"{prefix_of(one)}channel:a", f"{prefix_of(one)}marks")
    redis.redis.hset(f"{prefix_of(one)}state", "marked", 0)
    latest = one.publish("y", channel="b")
    assert start(two.subscribe("a", last_event_id=old)) == ["reset"]
    assert two.subscribe("a", last_event_id=young).resumed
    assert two.subscribe("a", last_event_id=latest).resumed


def test_a_stream_that_begins_anew_remembers_what_may_be_gone(
    make: Make, redis: RedisServer
) -> None:
    one, two = make(), make()
    old = one.publish("1", channel="a")
    one.publish("2", channel="a")
    redis.redis.delete(f"{prefix_of(one)}channel:a", f"{prefix_of(one)}marks")
    one.publish("3", channel="a")
    assert start(two.subscribe("a", last_event_id=old)) == ["reset", "3"]


def test_streams_of_a_time_that_the_state_does_not_know_are_dropped(
    make: Make, redis: RedisServer
) -> None:
    one, two = make(), make()
    one.publish_many(["old"] * 5)
    redis.redis.delete(f"{prefix_of(one)}state")
    one.publish("new")
    assert start(two.subscribe(history=99)) == ["new"]


def test_brokers_of_two_databases_or_prefixes_do_not_hear_each_other(make: Make) -> None:
    subscriptions = [make().subscribe(), make(key_prefix="other:").subscribe()]
    url = make()._link.address.removesuffix("0")
    elsewhere = make(f"{url}1")
    subscriptions.append(elsewhere.subscribe())
    elsewhere.publish("x")
    assert data(subscriptions[2], 1) == ["x"]
    assert [one.take(0.05) for one in subscriptions[:2]] == [b"", b""]
    for subscription in subscriptions:
        subscription.close()


# Publishing


def test_a_batch_is_published_in_order_and_at_once(make: Make) -> None:
    one, two = make(), make()
    subscription = two.subscribe()
    events = [ServerSentEvent(str(n), "tick", f"own-{n}" if n % 2 else None) for n in range(250)]
    ids = one.publish_many(events)
    received = take(subscription, 250)
    assert [event.id for event in received] == ids
    assert [event.data for event in received] == [str(n) for n in range(250)]
    assert ids[1::2] == [f"own-{n}" for n in range(1, 250, 2)]


def test_a_batch_with_a_bad_event_publishes_nothing(make: Make) -> None:
    broker = make(max_event_bytes=100)
    cursor = broker.last_event_id()
    for bad, error in [("x" * 100, TooLargeError), (b"x", InvalidFieldError)]:
        with pytest.raises(error):
            broker.publish_many(["fine", bad])
    with pytest.raises(InvalidFieldError, match="broker's own ids") as caught:
        broker.publish_many(["fine", ServerSentEvent("x", id=cursor)])
    assert caught.value.value == cursor
    assert broker.last_event_id() == cursor
    assert broker.publish_many([]) == []


def test_a_server_that_has_forgotten_the_scripts_is_told_them_again(
    make: Make, redis: RedisServer
) -> None:
    broker = make()
    broker.publish("1")
    redis.redis.script_flush()
    assert broker.publish("2")


def test_a_whole_script_publishes_without_an_app(make: Make, redis: RedisServer) -> None:
    broker = make()
    subscription = broker.subscribe()
    prefix = prefix_of(broker).removesuffix("0:")
    program = (
        "from flask_eventstream.redis_broker import RedisBroker\n"
        f"RedisBroker({redis.url!r}, key_prefix={prefix!r}).publish('from a script')\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    assert data(subscription, 1) == ["from a script"]


def test_any_program_can_publish_with_one_evalsha(make: Make, redis: RedisServer) -> None:
    broker = make()
    subscription = broker.subscribe()
    prefix = prefix_of(broker)
    sha = redis.redis.script_load(PUBLISH)
    keys = [f"{prefix}state", f"{prefix}marks", f"{prefix}channel:sse"]
    wire = "event: greeting\ndata: Hello!\n\n"
    epoch, seq, _ = redis.redis.evalsha(sha, 3, *keys, 256, 360, *[""] * 5, wire)
    [event] = take(subscription, 1)
    assert (event.data, event.type, event.id) == ("Hello!", "greeting", f"{epoch.decode()}-{seq}")


def test_what_the_server_refuses_is_an_error_that_says_so(make: Make, redis: RedisServer) -> None:
    broker = make()
    redis.redis.set(f"{prefix_of(broker)}state", "of something else")
    with pytest.raises(BrokerUnavailableError, match="WRONGTYPE") as caught:
        broker.publish("x")
    assert caught.value.is_refusal


# Redis away


def test_publishing_without_redis_fails_and_streams_stay(
    own_redis: RedisServer, make: Make
) -> None:
    # How long that takes at most is tested where connections are: in test_redis_link.
    broker = make(own_redis.url)
    subscription = broker.subscribe()
    broker.publish("before")
    assert data(subscription, 1) == ["before"]
    own_redis.kill()
    with given_up_soon(broker._link):
        with pytest.raises(BrokerUnavailableError, match=r"no answer within 0\.2 s") as caught:
            broker.publish("x")
        assert not caught.value.is_refusal
        calls = (broker.last_event_id, broker.subscriber_count, lambda: broker.disconnect("sse"))
        for call in calls:
            with pytest.raises(BrokerUnavailableError):
                call()
        with pytest.raises(BrokerUnavailableError):
            broker.subscribe("another")
        assert subscription.take(0) == b""
        assert broker.subscribe().take(0) == b""


def test_a_frozen_server_does_late_what_was_given_up_only_once(
    own_redis: RedisServer, make: Make
) -> None:
    broker = make(own_redis.url, timeout=2)
    subscription = patiently(broker.subscribe)
    patiently(partial(broker.publish, "0"))
    for attempt in range(3):
        own_redis.freeze()
        with pytest.raises(BrokerUnavailableError):
            broker.publish(str(attempt + 1))
        own_redis.thaw()
        patiently(partial(broker.publish, str(attempt + 1)))
    assert data(subscription, 4) == ["0", "1", "2", "3"]
    assert subscription.take(0.1) == b""


@contextmanager
def losing_answers(redis: RedisServer, make: Make) -> Iterator[tuple[RedisBroker, Proxy]]:
    """Have a broker that has published an event, and gets no answer any more."""
    with proxy(redis.port) as between:
        broker = make(f"redis://127.0.0.1:{between.port}/0", timeout=2)
        patiently(partial(broker.publish, "0"))
        between.lose_answers()
        yield broker, between


def test_an_event_whose_answer_was_lost_is_not_published_twice(
    redis: RedisServer, make: Make
) -> None:
    subscription = make().subscribe()
    with losing_answers(redis, make) as (broker, between):
        with pytest.raises(BrokerUnavailableError):
            broker.publish("1")
        with pytest.raises(BrokerUnavailableError) as caught:
            broker.publish_many([str(n) for n in range(2, 150)])
        assert caught.value.published == []
        between.heal()
        ids = patiently(partial(broker.publish_many, [str(n) for n in range(2, 150)]))
        events = take(subscription, 150)
        assert [event.data for event in events] == [str(n) for n in range(150)]
        assert [event.id for event in events[2:]] == ids
        # Another one like it is not the same one.
        patiently(partial(broker.publish, "149"))
        assert data(subscription, 1) == ["149"]


def test_a_call_like_one_that_failed_long_ago_is_not_the_same(
    redis: RedisServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscription = make().subscribe()
    with losing_answers(redis, make) as (broker, between):
        with pytest.raises(BrokerUnavailableError):
            broker.publish("alarm")
        between.heal()
        monkeypatch.setattr(time, "monotonic", partial(later, time.monotonic()))
        patiently(partial(broker.publish, "alarm"))
        monkeypatch.undo()
        assert data(subscription, 3) == ["0", "alarm", "alarm"]


def later(now: float) -> float:
    return now + 3600


def test_what_a_server_has_lost_is_waited_for_only_once(
    own_redis: RedisServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = make(own_redis.url)
    subscription = broker.subscribe()
    monkeypatch.setattr(broker, "_expected", 1_000_000)
    waits: list[float] = []

    def wait_in_vain(condition: Callable[[], bool], seconds: float) -> bool:
        assert not condition()
        waits.append(seconds)
        return False

    monkeypatch.setattr(broker._progress, "wait_until", wait_in_vain)
    for _ in range(2):
        assert subscription.take(0) == b""
    assert waits == [1]
    assert broker._expected == 0
    monkeypatch.undo()


def test_a_batch_that_fails_in_the_middle_tells_what_was_published(
    own_redis: RedisServer, make: Make
) -> None:
    broker = make(own_redis.url)
    broker.publish("warm")
    script = broker._link.call
    calls = 0

    def fill_up_after_two(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            own_redis.redis.config_set("maxmemory", 1)
        return script(*arguments)

    broker._link.call = fill_up_after_two  # type: ignore[assignment]
    with pytest.raises(BrokerUnavailableError, match="maxmemory") as caught:
        broker.publish_many(["x"] * 250)
    assert caught.value.is_refusal
    assert len(caught.value.published) == 200


def test_a_clock_that_was_set_delays_an_event_and_loses_none(make: Make) -> None:
    broker = make()
    broker.publish("1")
    broker._clock_ahead -= 3600
    broker.publish("2")
    assert start(make().subscribe(history=9)) == ["1", "2"]


def test_a_server_that_is_always_too_slow_is_an_error(make: Make) -> None:
    broker = make()
    with given_up_soon(broker._link):
        # Whatever it does comes too late.
        broker._timeout, broker._link.patience = 0.2, -1
        with pytest.raises(BrokerUnavailableError, match="too slow"):
            broker.publish("x")
    broker._timeout = 60
    broker.publish("x")
    assert start(make().subscribe(history=9)) == ["x"]


def test_a_wrong_password_is_an_error_at_once(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        server.redis.config_set("requirepass", "secret")
        server.redis.auth("secret")
        # If it were tried again, it would take half an hour.
        broker = RedisBroker(server.url.replace("//", "//:wrong@"), timeout=3600)
        with pytest.raises(BrokerUnavailableError, match="password") as caught:
            broker.publish("x")
        assert "wrong" not in str(caught.value)
        broker.close()


def test_what_is_no_message_does_not_stop_the_reader(
    make: Make, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    broker = make()
    subscription = broker.subscribe()
    redis.redis.publish(f"{prefix_of(broker)}channel:sse", "garbage")
    wait_for(lambda: "could not be read" in caplog.text)
    broker.publish("x")
    assert data(subscription, 1) == ["x"]


def test_a_stream_that_was_cut_by_hand_is_a_reset(make: Make, redis: RedisServer) -> None:
    broker = make()
    subscription = broker.subscribe()
    broker.publish("1")
    assert data(subscription, 1) == ["1"]
    # A publisher that is not one of ours wrote to the stream and told nobody.
    key = f"{prefix_of(broker)}channel:sse"
    redis.redis.xadd(key, {"nonce": "", "prev": "1", "id": "", "wire": "data: 2\n\n"}, "2-1")
    redis.redis.hincrby(f"{prefix_of(broker)}state", "seq", 1)
    broker.publish("3")
    assert data(subscription, 2) == ["2", "3"]


def test_the_loss_and_the_return_of_the_connection_are_logged(
    make: Make, own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    broker = make(own_redis.url)
    subscription = broker.subscribe()
    [mine] = [one for one in own_redis.redis.client_list() if one["sub"] == "2"]
    own_redis.redis.client_kill_filter(_id=mine["id"])
    wait_for(lambda: caplog.text.count("is heard") == 2)
    assert "Redis is not heard" in caplog.text
    subscription.close()


# Ways to a server


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    request = "req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=127.0.0.1 -keyout key -out cert"
    command = ["openssl", *request.split(), "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("way", ["unix", "tls", "user", "database", "valkey"])
def test_every_url_of_redis_py_works(way: str, tmp_path: Path, certificate: Path) -> None:
    tls = free_port()
    options = ["--unixsocket", str(tmp_path / "socket"), "--user", "app"]
    options += ["on", ">secret", "~*", "&*", "+@all"]
    options += ["--tls-port", str(tls), "--tls-auth-clients", "no"]
    options += ["--tls-cert-file", f"{certificate}/cert", "--tls-key-file", f"{certificate}/key"]
    program = ""
    if way == "valkey":
        program, options = valkey_program(), []
    with redis_server(tmp_path, *options, program=program) as server:
        url = {
            "unix": f"unix://{tmp_path}/socket?db=2",
            "tls": f"rediss://127.0.0.1:{tls}/0?ssl_ca_certs={certificate}/cert",
            "user": server.url.replace("//", "//app:secret@"),
            "database": server.url.replace("/0", "/7"),
        }.get(way, server.url)
        broker = RedisBroker(url)
        subscription = broker.subscribe()
        broker.publish("x")
        assert data(subscription, 1) == ["x"]
        databases = {"unix": 2, "database": 7}
        assert broker._keys.state == b"eventstream:%d:state" % databases.get(way, 0)
        broker.close()
        wait_for(lambda: len(server.redis.client_list()) == 1, what="the connections to close")


def test_the_rights_in_the_documentation_are_enough(own_redis: RedisServer) -> None:
    page = (ROOT / "docs" / "redis.rst").read_text("utf-8")
    [rule] = [line.strip() for line in page.splitlines() if line.startswith("    ACL SETUSER")]
    command: Any = own_redis.redis.execute_command
    command(*rule.split())
    broker = RedisBroker(own_redis.url.replace("//", "//app:secret@"), max_run_bytes=1000)
    subscription = broker.subscribe()
    broker.publish("x")
    assert data(subscription, 1) == ["x"]
    assert broker.subscriber_count() == 1
    assert broker.ping() > 0
    assert broker.server_info()
    with closing(RedisBroker(own_redis.url.replace("//", "//app:secret@"))) as other:
        assert wait_for(other.channels) == {"sse": 1}
    assert broker.disconnect("sse") == 1
    registry = broker.registry(600, 1, 1)
    assert registry.begin("key", "run", print, b"")
    reader = broker.subscribe_log("run", 0)
    for n in (1, 2, 3):
        wire = b"data: %b\nid: run.%d\n\n" % (b"x" * 500, n)
        assert registry.write([Write("key", "run", n, wire)]) == [True]
        assert reader.take(DEADLINE) == wire
    standing = registry.find("key")
    assert standing
    registry.watch("key", standing, b"event: lost\ndata: {}\n\n")
    registry.close()
    wait_for(lambda: b"event: lost" in (reader.take(DEADLINE) or b""))
    reader.close()
    assert broker.revocation_log
    broker.revocation_log.add("ada", 1.5)
    broker.revocation_log.add("ada", 2.5)
    assert broker.revocation_log.behind(b"")[0] == [("ada", 2.5)]
    stay = broker.members(0.01).enter("sse", "ada")
    stay.leave()
    members = broker.subscribe("sse", history=2)
    wait_for(lambda: b"event: leave" in (members.take(DEADLINE) or b""))
    broker.close()
    wait_for(lambda: not own_redis.redis.keys("*process:*"))


def test_a_forked_child_has_a_connection_of_its_own(make: Make) -> None:
    broker = make()
    subscription = broker.subscribe()
    broker.publish("1")
    assert data(subscription, 1) == ["1"]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        own = broker.subscribe()
        broker.publish("from the child")
        os.write(writing, own.take(DEADLINE) or b"nothing")
        os._exit(0)
    os.waitpid(child, 0)
    assert b"data: from the child" in os.read(reading, 1000)
    assert data(subscription, 1) == ["from the child"]
    broker.publish("2")
    assert data(subscription, 1) == ["2"]
    for end in (reading, writing):
        os.close(end)


GEVENT = """
import sys
{patch}
import gevent
from flask_eventstream.redis_broker import RedisBroker
broker = RedisBroker(sys.argv[1], key_prefix=sys.argv[2])
turns = 0
def turn():
    global turns
    while True:
        turns += 1
        gevent.sleep(0.01)
def read(subscription):
    wire = b""
    while wire.count(b"\\n\\n") < 50:
        wire += subscription.take(20)
    return wire
def main():
    gevent.spawn(turn)
    subscriptions = [broker.subscribe("a") for _ in range(20)]
    readers = [gevent.spawn(read, one) for one in subscriptions]
    for n in range(50):
        broker.publish(str(n), channel="a")
        gevent.sleep(0.005)
    wires = {{one.get(timeout=20) for one in readers}}
    assert len(wires) == 1, wires
    assert turns > 10
    print(wires.pop().count(b"data: "))
gevent.spawn(main).get()
"""


@pytest.mark.parametrize("patch", ["", "from gevent import monkey; monkey.patch_all()"])
def test_greenlets_wait_without_holding_up_others(
    patch: str, redis: RedisServer, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(GEVENT.format(patch=patch))
    command = [sys.executable, str(program), redis.url, redis.prefix()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == ("50\n", "")


@pytest.mark.parametrize("worker", ["gevent", "gthread", "sync"])
def test_a_worker_that_ends_in_order_is_counted_out_at_once(
    worker: str, own_redis: RedisServer
) -> None:
    broker = RedisBroker(own_redis.url)
    environ = {"REDIS_URL": own_redis.url}
    options = ["--graceful-timeout=20"]
    with serving("tests.redis_app:create_app()", worker, *options, environ=environ) as server:
        client = Client(server).begin()
        wait_for(lambda: broker.subscriber_count() == 1)
        server.stop()
        # It did so itself before it ended. A lease would have gone on.
        assert broker.subscriber_count() == 0
        client.close()
        assert "Traceback" not in server.log()
    broker.close()


def test_at_the_end_of_a_process_a_broker_is_counted_out_if_it_was_counted(make: Make) -> None:
    one, two, never_used = make(), make(), make()
    subscription = two.subscribe()
    wait_for(lambda: one.subscriber_count() == 1)
    for broker in (two, never_used):
        broker._leave()  # what the interpreter calls
    assert one.subscriber_count() == 0
    subscription.close()


def test_a_reset_tells_what_was_asked_for(make: Make, redis: RedisServer) -> None:
    broker = make()
    subscription = broker.subscribe()
    broker.publish("x")
    [before] = take(subscription, 1)
    redis.redis.delete(f"{prefix_of(broker)}state")
    broker.publish("y")
    [reset] = take(subscription, 1)
    assert reset.type == "reset"
    assert json.loads(reset.data) == {"requested": before.id, "earliest": None}
    assert subscription.take(DEADLINE) is None
    assert start(broker.subscribe(last_event_id=reset.id)) == ["reset", "y"]


def test_redis_py_itself_is_not_told_to_retry() -> None:
    # It would do so without telling the script that the event may have been published.
    broker = RedisBroker("redis://127.0.0.1:1")
    assert broker._link._pool.connection_kwargs["retry"]._retries == 0
    assert isinstance(redis_py.__version__, str)
