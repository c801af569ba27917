"""Members of many processes: each broker here stands for a process of its own."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from flask_eventstream import concurrency, redis_members, redis_presence
from flask_eventstream.errors import BrokerUnavailableError
from flask_eventstream.redis_broker import RedisBroker

from .redis_server import PATIENT, given_up_soon
from .servers import wait_for
from .test_members import LONG, SHORT, Room

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .redis_server import RedisServer

    Make = Callable[..., Room]


@pytest.fixture
def make(redis: RedisServer) -> Iterator[Make]:
    prefix = redis.prefix()
    rooms: list[Room] = []

    def make_room(seconds: float = SHORT, url: str = "") -> Room:
        broker = RedisBroker(url or redis.url, key_prefix=prefix, timeout=PATIENT)
        rooms.append(Room(broker, seconds))
        return rooms[-1]

    yield make_room
    for room in rooms:
        room.close()


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have leases that end soon, and are renewed sooner."""
    monkeypatch.setattr(redis_members, "LEASE_SECONDS", 3)
    monkeypatch.setattr(redis_members, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(redis_presence, "RENEWAL_SECONDS", 0.1)


def die(room: Room) -> None:
    """Have nothing more told, as if the process had been killed."""
    room.members._look_after = lambda: None  # type: ignore[method-assign]


def leases_of(room: Room) -> Any:
    return room.broker._keys.leases  # type: ignore[attr-defined]


def test_a_member_of_two_processes_joins_and_leaves_once(make: Make) -> None:
    one, two = make(), make()
    stays = [room.members.enter("room", "ada") for room in (one, two)]
    assert one.next() == two.next() == "join ada 1"
    stays[0].leave(0)
    assert one.is_quiet()
    assert two.next() == "mark  0"
    assert one.members.present("room") == two.members.present("room") == (1, ["ada"])
    stays[1].leave(0)
    assert one.next() == two.next() == "leave ada 0"


def test_who_comes_back_by_another_process_has_never_left(make: Make) -> None:
    one, two = make(LONG), make(LONG)
    stay = one.members.enter("room", "ada")
    assert two.next() == "join ada 1"
    stay.leave()
    wait_for(lambda: not one.members._has_lease)  # type: ignore[attr-defined]
    stay = two.members.enter("room", "ada")
    assert two.is_quiet()
    assert two.members.present("room") == (1, ["ada"])


@pytest.mark.usefixtures("brief")
def test_a_leave_is_announced_once_although_all_processes_look_for_it(make: Make) -> None:
    rooms = [make() for _ in range(3)]
    stays = [room.members.enter("room", str(n)) for n, room in enumerate(rooms)]
    for n in range(10):
        rooms[n % 3].members.enter("room", f"x{n}").leave()
    heard = [rooms[0].next() for _ in range(23)]
    assert sorted(one.split()[1] for one in heard if one.startswith("leave")) == [
        f"x{n}" for n in range(10)
    ]
    assert rooms[0].is_quiet()
    assert rooms[0].members.present("room")[0] == len(stays)


@pytest.mark.usefixtures("brief")
def test_the_members_of_a_process_that_dies_leave_unless_others_have_them(
    make: Make, redis: RedisServer
) -> None:
    one, two = make(LONG), make(LONG)
    dying = [one.members.enter("room", name) for name in ("ada", "bob")]
    staying = two.members.enter("room", "bob")
    assert [two.next(), two.next()] == ["join ada 1", "join bob 2"]
    die(one)
    # By its own clock Redis has waited for the end of the lease.
    end = redis.redis.zscore(leases_of(two), one.members._token)  # type: ignore[attr-defined]
    assert two.next() == "leave ada 1"
    seconds, microseconds = redis.redis.time()
    assert end is not None
    assert seconds * 1000 + microseconds / 1000 >= end
    assert two.is_quiet()
    assert two.members.present("room") == (1, ["bob"])
    del dying, staying


@pytest.mark.usefixtures("brief")
def test_a_process_that_only_reads_tells_of_members_whose_process_has_died(make: Make) -> None:
    one, two = make(LONG), make(LONG)
    stay = one.members.enter("room", "ada")
    assert two.next() == "join ada 1"
    die(one)
    assert two.next() == "leave ada 0"
    del stay


@pytest.mark.usefixtures("brief")
def test_a_process_that_was_given_up_tells_all_of_its_members_again(
    make: Make, redis: RedisServer
) -> None:
    one, two = make(LONG), make(LONG)
    stays = [one.members.enter("room", name) for name in ("ada", "bob")]
    assert [two.next(), two.next()] == ["join ada 1", "join bob 2"]
    key = leases_of(two)

    def is_given_up() -> bool:
        # It may have renewed its lease between the two.
        redis.redis.zadd(key, {one.members._token: 0})  # type: ignore[attr-defined]
        return two.members.present("room") == (0, [])

    wait_for(is_given_up)
    heard = [two.next() for _ in range(4)]
    assert sorted(heard[:2]) == ["leave ada 1", "leave bob 0"]
    assert heard[2:] == ["join ada 1", "join bob 2"]
    assert one.members.present("room") == (2, ["ada", "bob"])
    del stays


def test_a_call_that_comes_late_changes_nothing(make: Make) -> None:
    room = make()
    members = room.members
    assert isinstance(members, redis_members.RedisMembers)
    old = members._token, 1
    members.enter("room", "ada").leave(0)
    assert [room.next(), room.next()] == ["join ada 1", "leave ada 0"]
    members._ask(old, told=("room", "ada", ""))
    assert members.present("room") == (0, [])
    assert room.is_quiet()


def test_many_come_and_go_at_once(make: Make) -> None:
    room = make()
    with room.members._mutex:
        for n in range(600):
            room.members._here["room", str(n)] = 1
            room.members._come(("room", str(n)))
    stay = room.members.enter("room", "last")
    assert room.members.present("room", 1) == (601, ["0"])
    with room.members._mutex:
        for n in range(600):
            room.members._left.append((("room", str(n)), 0))
    room.members._keeper.ring()
    wait_for(lambda: room.members.present("room", 1)[0] == 1)
    heard = [room.next() for _ in range(1201)]
    assert sum(one.startswith("join") for one in heard) == 601
    assert sum(one.startswith("leave") for one in heard) == 600
    assert heard[-1].endswith(" 1")
    stay.leave()


def test_nothing_is_left_of_members_that_have_gone(make: Make, redis: RedisServer) -> None:
    room = make()
    prefix = room.broker._keys.prefix.decode()  # type: ignore[attr-defined]
    room.members.enter("room", "ada").leave()
    assert [room.next(), room.next()] == ["join ada 1", "leave ada 0"]
    for kind in ("members", "connected", "leases", "leaving"):
        assert not redis.redis.keys(f"{prefix}{kind}*")
    [own] = redis.redis.keys(f"{prefix}present:*")
    assert 0 < redis.redis.ttl(own) <= 60


# Redis away


def test_nobody_enters_while_redis_is_away(own_redis: RedisServer, make: Make) -> None:
    room = make(url=own_redis.url)
    stay = room.members.enter("room", "ada")
    assert room.next() == "join ada 1"
    own_redis.kill()
    with given_up_soon(room.broker._link):  # type: ignore[attr-defined]
        with pytest.raises(BrokerUnavailableError):
            room.members.enter("room", "bob")
        with pytest.raises(BrokerUnavailableError):
            room.members.present("room")
    # Who is told already needs no word of it.
    room.members.enter("room", "ada").leave(0)
    stay.leave(0)
    own_redis.start()
    wait_for(lambda: not room.members._keeper._bell)
    assert room.members.present("room") == (0, [])


@pytest.mark.usefixtures("brief")
def test_a_server_that_has_lost_everything_is_told_again(own_redis: RedisServer) -> None:
    with closing(RedisBroker(own_redis.url)) as broker:
        members = broker.members(LONG)
        stay = members.enter("room", "ada")
        own_redis.redis.flushall()
        wait_for(lambda: members.present("room") == (1, ["ada"]))
        stay.leave(0)
        wait_for(lambda: members.present("room") == (0, []))


def test_nobody_looks_without_a_thread_and_nobody_once_it_is_closed(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = make().members
    assert isinstance(members, redis_members.RedisMembers)

    def refuse(*arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(concurrency, "spawn", refuse)
    members.sweep()
    assert members._keeper._bell is None
    monkeypatch.undo()
    stay = members.enter("room", "ada")
    members.close()
    wait_for(lambda: members._keeper._bell is None)
    members.sweep()
    assert members._keeper._bell is None
    stay.leave()


def test_a_server_that_refuses_says_so_at_once(own_redis: RedisServer) -> None:
    with closing(RedisBroker(own_redis.url)) as broker:
        own_redis.redis.config_set("maxmemory", 1)
        with pytest.raises(BrokerUnavailableError):
            broker.members(LONG).enter("room", "ada")
