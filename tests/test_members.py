"""Who is present: the contract of every registry, then what is special in one process."""

from __future__ import annotations

import gc
import json
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from flask_eventstream import (
    EventStreamParser,
    MemoryBroker,
    ServerSentEvent,
    endings,
    members,
    redis_members,
)
from flask_eventstream.errors import BrokerClosedError, InvalidFieldError
from flask_eventstream.members import (
    PRESENCE_SECONDS,
    STOP_SECONDS,
    MemoryMembers,
    grace,
    member_name,
    present_event,
)
from flask_eventstream.redis_broker import RedisBroker

from .redis_server import PATIENT
from .servers import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flask_eventstream.local_broker import LocalBroker

    from .redis_server import RedisServer

SHORT = 0.05
LONG = 600.0


class Room:
    """A broker, and what a subscriber of the channel ``room`` hears of its members."""

    def __init__(self, broker: LocalBroker, seconds: float) -> None:
        self.broker = broker
        self.members = broker.members(seconds)
        self._subscription = broker.subscribe("room")
        self._parser = EventStreamParser()
        self._heard: list[ServerSentEvent] = []

    def next(self) -> str:
        """Return the next event in words, such as ``"join ada 1"``."""
        wait_for(self._hear, what="an event")
        event = self._heard.pop(0)
        data = json.loads(event.data)
        return f"{event.type} {data['member']} {data['count']}"

    def _hear(self) -> bool:
        if not self._heard:
            self._heard += self._parser.feed(self._subscription.take(0.1) or b"")
        return bool(self._heard)

    def is_quiet(self) -> bool:
        """Tell whether nothing was heard up to an event that is published now."""
        self.broker.publish({"member": "", "count": 0}, "mark", channel="room")
        return self.next() == "mark  0"

    def close(self) -> None:
        self._subscription.close()
        self.broker.close()


@pytest.fixture(params=["memory", "redis", "valkey"])
def room(request: pytest.FixtureRequest) -> Iterator[Room]:
    yield from made(request, SHORT)


@pytest.fixture(params=["memory", "redis"])
def patient(request: pytest.FixtureRequest) -> Iterator[Room]:
    yield from made(request, LONG)


def made(request: pytest.FixtureRequest, seconds: float) -> Iterator[Room]:
    if request.param == "memory":
        room = Room(MemoryBroker(), seconds)
    else:
        server: RedisServer = request.getfixturevalue(request.param)
        room = Room(RedisBroker(server.url, key_prefix=server.prefix(), timeout=PATIENT), seconds)
    yield room
    room.close()


def test_the_first_connection_joins_and_the_last_one_leaves(room: Room) -> None:
    first = room.members.enter("room", "ada")
    second = room.members.enter("room", "ada")
    other = room.members.enter("room", "bob")
    assert [room.next(), room.next()] == ["join ada 1", "join bob 2"]
    first.leave()
    other.leave()
    assert room.next() == "leave bob 1"
    assert room.is_quiet()
    second.leave()
    assert room.next() == "leave ada 0"
    assert room.members.present("room") == (0, [])


def test_who_comes_back_in_time_has_never_left(patient: Room) -> None:
    stay = patient.members.enter("room", "ada")
    assert patient.next() == "join ada 1"
    for _ in range(3):
        stay.leave()
        stay = patient.members.enter("room", "ada")
    assert patient.is_quiet()
    assert patient.members.present("room") == (1, ["ada"])
    # The goodbye that was due then is not said now.
    stay.leave(0)
    assert patient.next() == "leave ada 0"
    assert patient.is_quiet()


def test_who_is_waited_for_is_present(patient: Room) -> None:
    patient.members.enter("room", "ada").leave()
    patient.members.enter("room", "bob").leave(0)
    assert [patient.next() for _ in range(3)] == ["join ada 1", "join bob 2", "leave bob 1"]
    assert patient.members.present("room") == (1, ["ada"])


def test_to_leave_twice_is_to_leave_once(patient: Room) -> None:
    stays = [patient.members.enter("room", "ada") for _ in range(2)]
    for _ in range(2):
        stays[0].leave(0)
    assert patient.next() == "join ada 1"
    assert patient.is_quiet()
    stays[1].leave(0)
    assert patient.next() == "leave ada 0"


def test_a_connection_that_is_dropped_leaves_too(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in (members, redis_members):
        monkeypatch.setattr(one, "LOOK_SECONDS", 0.1)
    stay = room.members.enter("room", "ada")
    del stay
    gc.collect()
    assert [room.next(), room.next()] == ["join ada 1", "leave ada 0"]


@pytest.mark.parametrize("name", ["数 👋🏽", 'a"b', "a\\/b\\", "</script>", "\u2028", "x" * 255])
def test_a_name_arrives_as_it_is(room: Room, name: str) -> None:
    room.members.enter("room", name).leave(0)
    assert [room.next(), room.next()] == [f"join {name} 1", f"leave {name} 0"]


def test_each_channel_has_its_own_members(room: Room) -> None:
    stays = [room.members.enter(channel, "ada") for channel in ("a", "a:b", "房间")]
    stays.append(room.members.enter("a", "bob"))
    assert [room.members.present(name)[0] for name in ("a", "a:b", "房间", "b")] == [2, 1, 1, 0]
    assert room.is_quiet()


def test_names_are_sorted_and_as_many_as_asked_for(room: Room) -> None:
    names = ["b", "a", "ab", "数", "Z", "é"]
    stays = [room.members.enter("room", name) for name in names]
    assert room.members.present("room") == (6, sorted(names))
    assert room.members.present("room", 2) == (6, ["Z", "a"])
    del stays


def test_what_the_events_say_is_what_is_there(room: Room) -> None:
    def come_and_go(name: str) -> None:
        for n in range(20):
            room.members.enter("room", name).leave(0.001 * (n % 3))

    threads = [threading.Thread(target=come_and_go, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    there: set[str] = set()
    joins = 0
    while joins < 4 or there or any(thread.is_alive() for thread in threads):
        type, name, count = room.next().split()
        assert (name in there) == (type == "leave")
        there ^= {name}
        assert int(count) == len(there)
        joins += type == "join"
    for thread in threads:
        thread.join()


def test_nothing_runs_once_nobody_is_there(room: Room) -> None:
    room.members.enter("room", "ada").leave()
    assert [room.next(), room.next()] == ["join ada 1", "leave ada 0"]
    wait_for(lambda: room.members._keeper._bell is None)
    room.members.enter("room", "ada").leave()
    assert [room.next(), room.next()] == ["join ada 1", "leave ada 0"]


def test_a_forked_child_has_no_members_and_takes_none_away(patient: Room) -> None:
    stay = patient.members.enter("room", "ada")
    assert patient.next() == "join ada 1"
    child = os.fork()
    if child == 0:
        stay.leave(0)
        os._exit(len(patient.members._here) + len(patient.members._left))
    assert os.waitpid(child, 0)[1] == 0
    assert patient.is_quiet()
    assert patient.members.present("room") == (1, ["ada"])


# One process


def test_a_failure_is_logged_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(members, "_RETRY_SECONDS", 0.01)
    sent: list[Any] = []

    def publish(data: Any, type: str | None = None, *, channel: str) -> str:
        if type == "leave" and not caplog.records:
            raise OSError("broken")
        sent.append((type, data, channel))
        return ""

    own = MemoryMembers(publish, SHORT)
    stays = [own.enter("room", name) for name in ("ada", "bob")]
    for stay in stays:
        stay.leave(0)
    wait_for(lambda: len(sent) >= 3)
    wait_for(lambda: own._keeper._bell is None)
    assert "could not be looked after" in caplog.text
    assert own.present("room") == (0, [])


def test_a_closed_broker_takes_nobody_and_says_no_goodbyes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    broker = MemoryBroker()
    own = broker.members(LONG)
    stay = own.enter("room", "ada")
    broker.close()
    stay.leave(0)
    wait_for(lambda: own._keeper._bell is None)
    assert "'ada' has left 'room'" in caplog.text
    with pytest.raises(BrokerClosedError):
        own.enter("room", "ada")
    assert own.present("room") == (0, [])
    assert not own._here


# What does not ask who is there


def test_a_member_is_the_user_unless_it_is_named() -> None:
    assert member_name("ada", "7") == "ada"
    assert member_name(None, "7") == "7"


def test_who_is_nobody_gets_a_name_of_its_own() -> None:
    names = {member_name(None, None) for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith("anonymous-") for name in names)


@pytest.mark.parametrize("name", ["", "x" * 256, "a\nb", 7, ["ada"]])
def test_a_name_that_cannot_be_is_refused(name: Any) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        member_name(name, None)
    assert caught.value.field == "member"
    assert caught.value.value == name


def test_a_newcomer_is_told_a_hundred_names_and_how_many_there_are() -> None:
    broker = MemoryBroker()
    own = broker.members(LONG)
    stays = [own.enter("room", f"{n:03}") for n in range(101)]
    [event] = EventStreamParser().feed(present_event(own, "room"))
    assert (event.type, event.id) == ("present", None)
    assert json.loads(event.data) == {"count": 101, "members": [f"{n:03}" for n in range(100)]}
    del stays
    broker.close()


def test_who_has_been_silent_is_waited_for_less_and_whose_server_stops_for_longer() -> None:
    assert grace(endings.LEFT, PRESENCE_SECONDS, 15) == PRESENCE_SECONDS
    assert grace(endings.VANISHED, PRESENCE_SECONDS, 15) == 0
    assert grace(endings.VANISHED, 60, 15) == 52.5
    assert grace(endings.STOPPED, PRESENCE_SECONDS, 15) == STOP_SECONDS
    assert grace(endings.STOPPED, 60, 15) == 60
