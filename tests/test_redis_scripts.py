from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from flask_eventstream.redis_scripts import (
    PUBLISH,
    SYNC,
    Keys,
    MalformedError,
    Message,
    Record,
    Script,
    Sync,
)

if TYPE_CHECKING:
    from .redis_server import RedisServer

KEYS = Keys("mine:", 3)


def test_keys_have_the_prefix_and_the_database() -> None:
    assert KEYS.state == b"mine:3:state"
    assert KEYS.channel("房间:1") == "mine:3:channel:房间:1".encode()
    assert KEYS.process("token") == b"mine:3:process:token"
    assert KEYS.name_of(KEYS.channel("房间:1")) == "房间:1"


def test_a_message_is_read_whatever_its_event_has() -> None:
    wire, time = b"data: 1\n\ndata: 2\n\n", 1700000000000
    head = "abcd0123 7 1700000000000 own id: 房间\n-4 mine:3:channel:a b\n6 mine:3:channel:c\n\n"
    message = Message.of(head.encode() + wire, KEYS)
    assert message == ("abcd0123", 7, "own id: 房间", [("a b", -4), ("c", 6)], wire, None, time)


def test_a_message_of_a_key_tells_it() -> None:
    message = Message.of(b"abcd0123 7 17 \nkey A 4 \n6 mine:3:channel:c\n\ndata: x\n\n", KEYS)
    assert (message.key, message.prevs, message.wire) == ("A 4 ", [("c", 6)], b"data: x\n\n")


def test_a_message_without_an_event_tells_only_the_number() -> None:
    assert Message.of(b"abcd0123 7 17 \n\n", KEYS) == ("abcd0123", 7, None, [], b"", None, 17)


@pytest.mark.parametrize("head", [b"short 7 17 ", b"abcd0123 7 soon ", b"abcd0123 seven 17 "])
def test_a_message_with_a_head_that_cannot_be_is_refused(head: bytes) -> None:
    with pytest.raises(MalformedError):
        Message.of(head + b"\n\n", KEYS)


def test_an_entry_of_a_stream_is_read() -> None:
    fields = {b"nonce": b"n", b"prev": b"-3", b"id": b"", b"wire": b"data: x\n\n"}
    assert Record.of((b"12-1700", fields)) == (12, 1700, -3, None, b"data: x\n\n", None)
    assert Record.of((b"12-1700", {**fields, b"key": b"A"})).key == "A"
    assert Record.of((b"12-1700", {**fields, b"id": b"own"})).id == "own"


class Caller:
    """Runs the scripts in a namespace of its own."""

    def __init__(self, redis: RedisServer) -> None:
        self.redis: Any = redis.redis
        self.keys = Keys(redis.prefix(), 0)

    def publish(self, *wires: bytes, names: str = "a", **options: object) -> list[Any]:
        given = {"keep": 10, "seconds": 60, "nonce": "", "latest": "", "repeated": "", **options}
        keys = [self.keys.state, self.keys.marks, *[self.keys.channel(name) for name in names]]
        events = [each for wire in wires for each in (b"", b"", wire)]
        call = self.redis.register_script(PUBLISH)
        reply: list[Any] = call(keys, [*given.values(), *events])
        return reply

    def sync(self) -> Sync:
        keys = [self.keys.state, self.keys.marks, self.keys.process("x")]
        return Sync.of(self.redis.register_script(SYNC)(keys, [60]))

    def stream(self, name: str) -> list[Record]:
        return [Record.of(entry) for entry in self.redis.xrange(self.keys.channel(name).decode())]


@pytest.fixture(params=["redis", "valkey"])
def caller(request: pytest.FixtureRequest) -> Caller:
    return Caller(request.getfixturevalue(request.param))


def test_a_batch_may_be_larger_than_the_stack_of_lua(caller: Caller) -> None:
    # unpack() fails beyond 8,000 values. Publishers in other languages choose their own batches.
    assert caller.publish(*[b"data: x\n\n"] * 5000)[1] == 5000
    assert len(caller.stream("a")) == 10


def test_each_event_knows_the_one_before_it_in_its_channel(caller: Caller) -> None:
    for names in ("a", "b", "ab", "a"):
        caller.publish(b"data: x\n\n", names=names)
    assert [(one.seq, one.prev) for one in caller.stream("a")] == [(1, 0), (3, 1), (4, 3)]
    assert [(one.seq, one.prev) for one in caller.stream("b")] == [(2, 0), (3, 2)]


def test_a_server_that_was_restarted_or_flushed_has_another_epoch(caller: Caller) -> None:
    epoch, *_ = caller.publish(b"data: x\n\n", b"data: y\n\n")
    assert caller.sync()[:2] == (epoch.decode(), 2)
    caller.redis.hset(caller.keys.state.decode(), "run", "another server's")
    after_restart = caller.sync()
    assert (after_restart.seq, after_restart.base) == (2, 2)
    caller.redis.delete(caller.keys.state.decode())
    after_flush = caller.sync()
    assert (after_flush.seq, after_flush.base) == (0, 0)
    assert len({epoch, after_restart.epoch.encode(), after_flush.epoch.encode()}) == 3


def test_an_event_that_comes_too_late_is_not_published(caller: Caller) -> None:
    now = caller.sync().time
    assert caller.publish(b"data: x\n\n", latest=now - 1)[:2] == [b"", 0]
    assert caller.publish(b"data: x\n\n", latest=now + 60_000)[1] == 1
    assert len(caller.stream("a")) == 1


def test_what_was_published_already_is_found_by_its_nonce(caller: Caller) -> None:
    first = caller.publish(b"data: 1\n\n", b"data: 2\n\n", nonce="mine")
    caller.publish(b"data: 3\n\n", nonce="other")
    # Even if it comes late, since it is there.
    again = caller.publish(b"data: 1\n\n", b"data: 2\n\n", nonce="mine", repeated=1, latest=1)
    assert again[:2] == first[:2] == [first[0], 2]
    new = caller.publish(b"data: 4\n\n", nonce="new", repeated=1)
    assert new[1] == 4
    assert [one.seq for one in caller.stream("a")] == [1, 2, 3, 4]


def test_the_marks_tell_from_where_on_nothing_can_have_expired(caller: Caller) -> None:
    assert caller.sync().bound == 0
    caller.publish(b"data: x\n\n", names="b")
    assert caller.sync().bound == 0
    # As if it had been long ago: a mark of a time before the last minute.
    key = caller.keys.marks.decode()
    caller.redis.delete(key)
    caller.redis.xadd(key, {"mark": ""}, "1-1000")
    assert caller.sync().bound == 1
    caller.redis.hset(caller.keys.state.decode(), "marked", 0)
    caller.publish(*[b"data: x\n\n"] * 5, names="b")
    assert caller.sync().bound == 1
    assert caller.redis.xlen(key) == 2


def test_a_script_has_the_hash_that_redis_gives_it(redis: RedisServer) -> None:
    assert redis.redis.script_load(PUBLISH) == Script(PUBLISH).sha
