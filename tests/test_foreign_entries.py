"""What others write under our names in Redis: it is left out, told once, and stops nobody."""

from __future__ import annotations

import math
import random
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import pytest
import redis.exceptions

from flask_eventstream.errors import BrokerUnavailableError
from flask_eventstream.redis_broker import RedisBroker
from flask_eventstream.redis_scripts import Keys, MalformedError, Message, Record
from flask_eventstream.revocations import NO_FLOOR, RevocationLog
from flask_eventstream.run_registry import Write

from .servers import DEADLINE, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flask_eventstream import Subscription

    from .redis_server import RedisServer

JUNK: list[bytes] = [
    *(
        b"",
        b"garbage",
        b"\xff\xfe",
        b"\n\n",
        b"a b c d",
        b"nan",
        b"inf",
        b"-1",
    ),
    *(b"1e400", b"1.5", b"9" * 40, b"\xd9\xa3", b"1_0", b" 1", b"{}", b"id: x\ny", b"\x00", b"-1"),
]


class Site:
    """A broker, and what somebody with ``redis-cli`` may do to its keys."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self.redis = server.redis
        self.prefix = server.prefix()
        self.brokers: list[RedisBroker] = []
        self.broker = self.new_broker()

    def new_broker(self) -> RedisBroker:
        self.brokers.append(RedisBroker(self.server.url, key_prefix=self.prefix))
        return self.brokers[-1]

    def key(self, name: str) -> str:
        return f"{self.prefix}0:{name}"

    def execute(self, *command: Any) -> Any:
        untyped: Any = self.redis
        return untyped.execute_command(*command)

    def close(self) -> None:
        for broker in self.brokers:
            broker.close()


@pytest.fixture
def site(redis: RedisServer) -> Iterator[Site]:
    one = Site(redis)
    yield one
    one.close()


def until(subscription: Subscription, *data: str) -> None:
    """Read until some events have come; a ``reset`` may come before them."""
    wire, deadline = subscription.start, time.monotonic() + DEADLINE
    while not all(f"data: {each}\n".encode() in wire for each in data):
        assert time.monotonic() < deadline, wire
        wire += subscription.take(0.1) or b""


def test_whatever_is_sent_as_a_message_the_next_event_comes_on_the_same_connection(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(7)
    subscription = site.broker.subscribe("news", "other")
    site.broker.publish("first", channel="news")
    until(subscription, "first")
    good = f"{site.broker.last_event_id().replace('-', ' ')} 5 \n1 {site.key('channel:news')}\n\n"
    names = [site.key("channel:news"), site.broker._presence.key.decode()]
    heads = [good.encode()[:cut] for cut in range(len(good))]
    junk = (
        [one for one in JUNK if not one.startswith(b"12345678")]
        + heads
        + [chance.randbytes(chance.randrange(60)) for _ in range(100)]
    )
    junk += [good.encode().replace(b" 5 ", b" %b " % one, 1) for one in JUNK]
    junk += [good.encode().replace(b"\n1 ", b"\n%b " % one, 1) for one in JUNK if one[:1] != b"9"]
    connections = [one for one in caplog.messages if "is heard" in one]
    for text in junk:
        site.redis.publish(chance.choice(names), text)
    site.broker.publish("next", channel="news")
    site.broker.publish("other", channel="other")
    until(subscription, "next", "other")
    assert [one for one in caplog.messages if "is heard" in one] == connections
    left_out = [one for one in caplog.messages if "left out" in one]
    assert len(left_out) == 2
    assert all(name in "".join(left_out) for name in names)
    assert "garbage" not in caplog.text
    subscription.close()


@pytest.mark.parametrize("field", ["prev", "id", "wire", "key"])
@pytest.mark.parametrize("junk", JUNK, ids=repr)
def test_a_field_of_an_entry_that_cannot_be_is_left_out(field: str, junk: bytes) -> None:
    fields = {b"nonce": b"", b"prev": b"1", b"id": b"", b"wire": b"data: x\n\n", b"key": b""}
    record = Record.of((b"5-1", {**fields, field.encode(): junk}))
    assert record.seq == 5
    assert record.is_foreign or abs(record.prev) < 5
    assert record.is_foreign or record.wire in (b"", b"data: x\n\n") or junk == b"\n\n"
    lacking = {name: value for name, value in fields.items() if name != field.encode()}
    assert Record.of((b"5-1", lacking)).is_foreign == (field in ("prev", "wire"))


@pytest.mark.parametrize("junk", JUNK, ids=repr)
def test_what_is_no_message_raises_one_error(junk: bytes) -> None:
    keys = Keys("test:", 0)
    with pytest.raises(MalformedError):
        Message.of(junk, keys)
    message = b"12345678 %b 1 \n%b %b\n\n" % (junk, junk, keys.channel("a"))
    with pytest.raises(MalformedError):
        Message.of(message, keys)


@pytest.mark.parametrize("id", ["2-1", "3-7", "*"])
def test_entries_that_somebody_adds_end_no_channel(
    site: Site, id: str, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(id)
    subscription = site.broker.subscribe("news", "other")
    for number in range(3):
        site.broker.publish(number, channel="other")
    site.broker.publish("before", channel="news")
    until(subscription, "before")
    site.redis.delete(site.key("channel:news"))
    for name in ("news", "new"):
        fields: dict[Any, Any] = {
            chance.randbytes(5): chance.randbytes(9),
            "prev": "x",
            "wire": "secret text",
        }
        site.redis.xadd(site.key(f"channel:{name}"), fields, id)
    another = site.new_broker()
    late = another.subscribe("news", "new", last_event_id=site.broker.last_event_id())
    # And the first one reads its streams once more.
    site.redis.client_kill_filter(_type="pubsub", skipme=True)
    for name in ("news", "new", "other"):
        site.broker.publish(f"to {name}", channel=name)
        if name != "other":
            until(late, f"to {name}")
        if name != "new":
            until(subscription, f"to {name}")
    assert "secret text" not in caplog.text
    with closing(another.subscribe("news", history=9)) as found:
        assert b"secret" not in found.start


@pytest.mark.parametrize("junk", JUNK, ids=repr)
@pytest.mark.parametrize("field", ["seq", "base", "epoch", "marked", "run"])
def test_a_state_that_cannot_be_is_a_new_epoch_at_most(site: Site, field: str, junk: bytes) -> None:
    subscription = site.broker.subscribe("news")
    site.broker.publish("first", channel="news")
    site.redis.hset(site.key("state"), field, junk)
    site.broker.publish("second", channel="news")
    site.broker.publish("third", channel="news")
    # Who is connected is told that something may be gone, and returns.
    with closing(site.broker.subscribe("news", last_event_id="00000000-1")) as again:
        assert b"data: third" in again.start
    with closing(site.new_broker().subscribe("news", last_event_id="00000000-1")) as again:
        assert b"data: third" in again.start
    subscription.close()


def test_marks_that_somebody_has_written_refuse_nothing(site: Site) -> None:
    site.broker.publish("first", channel="news")
    for damage in (("XADD", site.key("marks"), "*", "a", "b"), ("SET", site.key("marks"), "x")):
        site.redis.delete(site.key("marks"))
        site.execute(*damage)
        site.redis.hset(site.key("state"), "marked", 0)
        with closing(site.new_broker().subscribe("unheard")) as subscription:
            site.broker.publish("second", channel="unheard")
            until(subscription, "second")
        assert site.redis.type(site.key("marks")) == b"stream"


def test_a_channel_of_another_type_is_left_out_and_the_others_are_heard(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("news", "new"):
        site.redis.set(site.key(f"channel:{name}"), "secret text")
    subscription = site.broker.subscribe("news", "other")
    site.redis.client_kill_filter(_type="pubsub", skipme=True)
    site.broker.publish("x", channel="other")
    until(subscription, "x")
    with pytest.raises(BrokerUnavailableError, match="WRONGTYPE"):
        site.broker.publish("y", channel="news")
    site.redis.delete(site.key("channel:news"))
    site.broker.publish("z", channel="news")
    until(subscription, "z")
    assert site.key("channel:news") in caplog.text
    assert "secret" not in caplog.text
    subscription.close()


def test_revocations_that_cannot_be_are_left_out(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    log = site.broker.revocation_log
    assert isinstance(log, RevocationLog)
    log.add("before", 1.5)
    for at in (*JUNK, b"1e300", str(time.time() * 1000).encode()):
        site.redis.xadd(site.key("revoked"), {"user": "ada", "at": at})
        site.redis.xadd(site.key("revoked"), {"user": b"\xff", "at": b"1"})
        site.redis.xadd(site.key("revoked"), {"users": "ada"})
    log.add("after", 2.5)
    found, last, floor = log.behind(b"")
    assert floor == NO_FLOOR
    when = dict(filter(None, found))
    assert when.pop("ada") in (1.5, 1.0, 10.0)
    assert when == {"before": 1.5, "after": 2.5}
    assert log.behind(last) == ([], last, NO_FLOOR)
    assert len([one for one in caplog.messages if "left out" in one]) == 1
    site.redis.delete(site.key("revoked"))
    site.redis.set(site.key("revoked"), "x")
    assert log.behind(b"") == ([], b"", NO_FLOOR)


def test_a_floor_that_cannot_be_refuses_nobody(site: Site) -> None:
    log = site.broker.revocation_log
    assert isinstance(log, RevocationLog)
    for at, entry in (
        ("inf", "1-0"),
        ("nan", "1-0"),
        ("soon", "1-0"),
        ("1.5", "x"),
        ("1.5", "1-x"),
    ):
        site.redis.hset(site.key("revoked:users"), mapping={"floor": at, "forgotten": entry})
        assert log.behind(b"")[2] == NO_FLOOR
    site.redis.hset(site.key("revoked:users"), "user:ada", "x inf")
    log.add("ada", 2.5)
    assert log.behind(b"")[0] == [("ada", 2.5)]


def test_a_batch_of_entries_that_are_none_hides_nothing_behind_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flask_eventstream import revocations

    monkeypatch.setattr(revocations, "_READ_AT_ONCE", 3)
    log = site.broker.revocation_log
    assert isinstance(log, RevocationLog)
    for _ in range(7):
        site.redis.xadd(site.key("revoked"), {"a": "b"})
    log.add("ada", time.time())
    known = revocations.Revocations(revocations_places(), log)
    known.refresh()
    assert known.is_revoked("ada", 1)


def revocations_places() -> Any:
    from flask_eventstream.places import Places

    return Places()


def test_numbers_of_subscribers_that_cannot_be_are_left_out(site: Site) -> None:
    other = site.new_broker()
    subscription = other.subscribe("news")
    wait_for(lambda: site.broker.subscriber_count("news") == 1)
    for number, junk in enumerate(JUNK):
        site.redis.sadd(site.key("processes"), junk, f"p{number}", f"q{number}")
        site.redis.hset(site.key(f"process:p{number}"), mapping={"": junk, "news": junk, junk: "x"})
        site.redis.set(site.key(f"process:q{number}"), junk)
    assert math.isfinite(site.broker.subscriber_count())
    assert site.broker.subscriber_count("news") >= 1
    assert site.broker.channels()["news"] >= 1
    site.redis.delete(site.key("processes"))
    site.redis.set(site.key("processes"), "x")
    assert site.broker.subscriber_count("news") == 0
    subscription.close()


def presence_damage(site: Site) -> Iterator[tuple[Any, ...]]:
    """Yield what somebody may have Redis do to those who are present."""
    own = site.key(f"present:{site.broker._members._token}")
    for number, junk in enumerate(JUNK):
        yield "ZADD", site.key("leaving"), 1, f"{number}".encode() + junk
        yield "ZADD", site.key("leases"), 1, f"{number}".encode() + junk
        yield "HSET", site.key("connected:room"), f"ada{number}", junk
        yield "ZADD", site.key("members:room"), 1, junk
        yield "HSET", own, junk, junk
    for name in ("leaving", "leases", "connected:room", "members:room", "told:room"):
        yield "SET", site.key(name), "x"
    yield "ZADD", site.key("leases"), 1, "dead"
    yield "HSET", site.key("present:dead"), "", "x", "y", "z"


def test_who_is_present_is_told_whatever_somebody_has_written(site: Site) -> None:
    members, subscription = site.broker._members, site.broker.subscribe("room", "hall")
    for number, damage in enumerate(presence_damage(site)):
        with suppress(redis.exceptions.ResponseError):
            site.execute(*damage)
        for channel in ("room", "hall"):
            stay = members.enter(channel, f"ada{number}")
            assert members.present(channel)[0] >= 1
            stay.leave(0)
    wait_for(lambda: members.present("hall") == (0, []))
    subscription.close()


def test_counts_of_connections_that_cannot_be_do_not_hold_a_member(site: Site) -> None:
    members = site.broker._members
    site.redis.hset(site.key("connected:room"), "ada", "inf")
    members.enter("room", "ada").leave(0)
    wait_for(lambda: members.present("room") == (0, []))


@pytest.mark.parametrize("field", ["run", "state", "last", "producer", "bytes", "type"])
@pytest.mark.parametrize("junk", [b"", b"\xff", b"n n", b"9" * 80])
def test_a_run_that_cannot_be_is_none_and_the_next_one_begins(
    site: Site, field: str, junk: bytes
) -> None:
    registry = site.broker.registry(60, 5, 10)
    fields = {"run": "r" * 12, "state": "active", "last": "0", "producer": "p", "bytes": "0"}
    pairs = [each for pair in {**fields, field: junk}.items() for each in pair]
    if field == "type":
        site.execute("SET", site.key("run:/chat/1"), "x")
    else:
        site.execute("HSET", site.key("run:/chat/1"), *pairs)
    assert registry.find("/chat/1") is None
    assert registry.begin("/chat/1", "n" * 12, lambda: None, b"").run == "n" * 12
    assert registry.write([Write("/chat/1", "n" * 12, 1, b"data: x\nid: n.1\n\n")]) == [True]
    site.redis.hset(site.key("run:/chat/1"), field, junk)
    if field != "type":
        assert registry.write([Write("/chat/1", "n" * 12, 2, b"data: y\nid: n.2\n\n")]) == [False]
    registry.close()
