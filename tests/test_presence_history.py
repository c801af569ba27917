"""Those who come and go take no room in a channel's history from what was said."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from flask_eventstream import EventStreamParser, MemoryBroker
from flask_eventstream.errors import InvalidFieldError
from flask_eventstream.history import PRESENCE
from flask_eventstream.members import MemoryMembers
from flask_eventstream.redis_broker import RedisBroker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flask_eventstream import ServerSentEvent, Subscription
    from flask_eventstream.local_broker import LocalBroker

    from .redis_server import RedisServer

    Make = Callable[[], LocalBroker]


@pytest.fixture(params=["memory", "redis"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Return what makes brokers of one store; with memory, it is always the same one."""
    made: list[LocalBroker] = []

    def make_one() -> LocalBroker:
        if request.param == "redis":
            made.append(RedisBroker(redis.url, key_prefix=prefix))
        elif not made:
            made.append(MemoryBroker())
        return made[-1]

    if request.param == "redis":
        redis: RedisServer = request.getfixturevalue("redis")
        prefix = redis.prefix()
    yield make_one
    for broker in made:
        broker.close()


def crowd(broker: LocalBroker, members: Any, count: int, channel: str = "room") -> None:
    """Have so many members come and go."""
    pairs = [(channel, f"anonymous-{number}") for number in range(count)]
    if isinstance(members, MemoryMembers):
        for pair in pairs:
            members._come(pair)
            members._go(pair, -1)
        members._look_after()
        return
    for start in range(0, count, 250):
        members._call(dict.fromkeys(pairs[start : start + 250]))
        members._call(dict.fromkeys(pairs[start : start + 250], 0.0))
        while members._call({})[2]:
            pass


def read(subscription: Subscription, last: str) -> list[ServerSentEvent]:
    """Read until an event whose data is known."""
    parser = EventStreamParser()
    events: list[ServerSentEvent] = [*parser.feed(subscription.start)]
    while not events or events[-1].data != last:
        events += parser.feed(subscription.take(20) or b"")
    return events


def number_of(event: ServerSentEvent) -> int:
    assert event.id is not None
    return int(event.id.partition("-")[2])


def messages(events: list[ServerSentEvent]) -> list[str]:
    return [event.data for event in events if event.type == "message"]


def test_ten_thousand_that_come_and_go_push_out_no_message(make: Make) -> None:
    broker = make()
    members = broker.members(0)
    said = [str(number) for number in range(300)]
    ids = [broker.publish(text, channel="room") for text in said]
    crowd(broker, members, 10_000)
    for another in (broker, make()):
        with closing(another.subscribe("room", last_event_id=ids[100])) as back:
            said.append(f"to {len(said)}")
            broker.publish(said[-1], channel="room")
            events = read(back, said[-1])
        assert events[0].type == "reset"
        assert messages(events) == said[-257:]
        assert 1000 <= len([event for event in events if event.type in ("join", "leave")]) <= 1024
        with closing(another.subscribe("room", history=50)) as new:
            assert messages(read(new, said[-1])) == said[-50:]
    assert members.present("room") == (0, [])


def test_a_replay_has_no_more_of_those_who_came_for_others_that_read_slowly(make: Make) -> None:
    broker = make()
    with closing(broker.subscribe("room")) as slow:
        broker.publish("first", channel="room")
        crowd(broker, broker.members(0), 2000)
        broker.publish("last", channel="room")
        with closing(broker.subscribe("room", history=2)) as new:
            events = read(new, "last")
        assert len(events) == 1024 + 2
        assert events[0].data == "first"
        numbers = [number_of(event) for event in read(slow, "last")]
    assert len(numbers) == 4002
    assert numbers == list(range(numbers[0], numbers[0] + 4002))


def test_who_reads_too_slowly_for_those_who_come_ends_and_is_told_when_it_is_back(
    make: Make,
) -> None:
    broker = make()
    members = broker.members(0)
    last = broker.publish("first", channel="room")
    with closing(broker.subscribe("room", last_event_id=last)) as slow:
        crowd(broker, members, 10_000)
        assert slow.take(20) is None
    with closing(broker.subscribe("room", last_event_id=last)) as back:
        assert not back.resumed
        broker.publish("last", channel="room")
        events = read(back, "last")
    assert events[0].type == "reset"
    assert messages(events) == ["first", "last"]


def test_who_reads_history_while_others_come_gets_all_of_it_or_ends(make: Make) -> None:
    broker = make()
    members = broker.members(0)
    first = broker.publish("x" * 30_000, channel="room")
    broker.publish("y" * 30_000, channel="room")
    broker.publish("z" * 30_000, channel="room")
    crowd(broker, members, 10)
    with closing(broker.subscribe("room", last_event_id=first)) as back:
        assert back.replay is not None
        crowd(broker, members, 10_000)
        got = b""
        while (wire := back.take(20)) is not None:
            got += wire
    events = EventStreamParser().feed(back.start + got)
    numbers = [number_of(event) for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_who_missed_only_a_few_who_came_is_told_of_each(make: Make) -> None:
    broker = make()
    members = broker.members(0)
    with closing(broker.subscribe("room")):
        id = broker.publish("first", channel="room")
        crowd(broker, members, 100)
        broker.publish("last", channel="room")
        for another in (broker, make()):
            with closing(another.subscribe("room", last_event_id=id)) as back:
                assert back.resumed
                assert len(read(back, "last")) == 201


def test_what_has_no_history_keeps_nobody_who_came() -> None:
    broker = MemoryBroker(history=0)
    crowd(broker, broker.members(0), 3)
    with closing(broker.subscribe("room", last_event_id="x")) as back:
        broker.publish("last", channel="room")
        assert [event.type for event in read(back, "last")] == ["reset", "message"]


def test_messages_are_bounded_among_those_who_come_and_go(make: Make) -> None:
    broker = make()
    members = broker.members(0)
    for number in range(600):
        broker.publish(str(number), channel="room")
        if number % 2:
            crowd(broker, members, 1)
    broker.publish("last", channel="room")
    with closing(broker.subscribe("room", last_event_id="x")) as back:
        assert messages(read(back, "last")) == [*map(str, range(345, 600)), "last"]


def test_redis_keeps_no_more_of_those_who_come_than_is_replayed(redis: RedisServer) -> None:
    prefix = redis.prefix()
    with closing(RedisBroker(redis.url, key_prefix=prefix)) as broker:
        stream, told = f"{prefix}0:channel:room", f"{prefix}0:told:room"
        for number in range(256):
            broker.publish(str(number), channel="room")
        crowd(broker, broker.members(0), 1)
        assert redis.redis.xlen(stream) == 256 + 2
        crowd(broker, broker.members(0), 1000)
        assert redis.redis.xlen(stream) == 256 + 1024
        assert redis.redis.zcard(told) == 1024
        assert 0 < redis.redis.ttl(told) <= 360


def test_those_of_a_sequence_that_is_lost_take_no_room_from_new_ones(redis: RedisServer) -> None:
    prefix = redis.prefix()
    with closing(RedisBroker(redis.url, key_prefix=prefix)) as broker:
        crowd(broker, broker.members(0), 1000)
        redis.redis.delete(f"{prefix}0:state")
        crowd(broker, broker.members(0), 1)
        assert redis.redis.zcard(f"{prefix}0:told:room") == 2
        assert redis.redis.xlen(f"{prefix}0:channel:room") == 2


def test_no_publisher_can_pass_for_one_who_comes(make: Make) -> None:
    with pytest.raises(InvalidFieldError):
        make().publish("x", channel="room", key=PRESENCE)
